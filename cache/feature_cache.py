"""The features of a data set: its images in order, each looked up in a store."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from cache.shards import CachedArray
from cache.store import Found, Store
from config import Config, UserError
from datasets import SPLITS, ImageSet, Labels
from shell.files import as_strict_json, checksum, read_sealed, write_sealed


def feature_folder(config: Config) -> Path:
    """The folder of all stores. Raises UserError when it is a file."""
    folder = Path(config.feature_path or "features")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"feature_path: expected a folder, {folder} is a file")
    return folder


def list_file(root: Path, name: str) -> Path:
    """Where the list of images of a data set is kept (datasets.name_of)."""
    return root / "datasets" / f"{name}.json"


@dataclasses.dataclass(frozen=True)
class ImageList:
    """The images of a data set, without the images: what is kept of it beside the stores.

    hashes: of each image of a split, in order. sizes: by backbone, the size of the images that img_size auto
    has chosen. pixel_scale: the ranges of pixels of more than eight bits (images/pixel_scale.py); None until
    they are measured. unreadable: the hashes of those that could not be read."""

    labels: Labels
    hashes: dict[str, list[str]]
    sizes: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    pixel_scale: dict | None = None
    unreadable: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, images: ImageSet, before: "ImageList | None" = None) -> "ImageList":
        """The list of these images; what was found out ``before`` holds while one of them is the same. If all
        are, but for their names, they keep their order: what was fitted to them stays what it is."""
        listed = cls(images.labels, {split: images.hashes(split) for split in SPLITS})
        if before is None or set(before.all_hashes()).isdisjoint(listed.all_hashes()):
            return listed
        if (rows := before.rows_in(listed)) is not None:
            listed = listed.kept(rows)
        listed = dataclasses.replace(listed, sizes=dict(before.sizes), pixel_scale=before.pixel_scale)
        return dataclasses.replace(listed, unreadable=list(before.unreadable))

    def rows_in(self, other: "ImageList") -> dict[str, np.ndarray] | None:
        """The number in another list of each image of a split, of the same content and labels; None where the
        two are not of the same images."""
        found = {}
        for split in SPLITS:
            ours, theirs = self._known_by(split), other._known_by(split)
            if sorted(ours) != sorted(theirs):
                return None
            found[split] = np.empty(len(ours), np.int64)
            found[split][sorted(range(len(ours)), key=ours.__getitem__)] = sorted(
                range(len(ours)), key=theirs.__getitem__
            )
        return found

    def _known_by(self, split: str) -> list[tuple]:
        """All that is listed of each image of a split but its name."""
        labels, classes = self.labels.split(split), (*self.labels.classes, "")
        names = [classes[category] for category in labels.category]
        kinds = [kind + " (held out)" * held for kind, held in zip(labels.kind, labels.held.tolist())]
        return list(zip(self.hashes[split], names, labels.defect.tolist(), kinds))

    def kept(self, rows: dict[str, np.ndarray]) -> "ImageList":
        """These images of each split, in the order of ``rows``."""
        train, test = (self.labels.split(split).kept(rows[split]) for split in SPLITS)
        labels = dataclasses.replace(self.labels, train=train, test=test)
        hashes = {split: [self.hashes[split][i] for i in rows[split]] for split in SPLITS}
        return dataclasses.replace(self, labels=labels, hashes=hashes)

    @classmethod
    def read(cls, path: Path) -> "ImageList | None":
        """The list in a file; None without one, or where it is damaged: the images tell it again."""
        try:
            content = read_sealed(path)
            labels = Labels.from_json(content["labels"])
            scale = content.get("pixel_scale")  # lists of before have none
            return cls(labels, content["hashes"], content["sizes"], scale, content["unreadable"])
        except (OSError, ValueError, KeyError, UserError):
            return None

    def write(self, path: Path) -> None:
        write_sealed(path, self.content())

    def content(self) -> dict:
        """What ``write`` writes, made of lists."""
        content = {"labels": self.labels.as_json(), "hashes": self.hashes, "sizes": self.sizes}
        return content | {"pixel_scale": self.pixel_scale, "unreadable": self.unreadable}

    def all_hashes(self) -> list[str]:
        return [image for split in SPLITS for image in self.hashes[split]]

    def fingerprint(self) -> str:
        """A hash of the images and their labels, whatever their names are."""
        of = {"per_category": self.labels.per_category, "classes": self.labels.classes}
        return checksum(as_strict_json(of | {split: self._known_by(split) for split in SPLITS}))[:16]


class FeatureCache:
    """The features of a data set's images as they are in a store; an image that is not there is left out, its
    name in ``skipped``. Files are opened when rows are read, in whatever process: a cache can be pickled."""

    def __init__(self, store: Store, images: ImageList):
        self.folder, self.fields, self.of, self.images = store.folder, store.fields, store.of, images
        self._files = [shard.files for shard in store.shards]
        self._rows: dict[str, np.ndarray] = {}
        self._found: dict[str, Found] = {}
        self.skipped: list[str] = []
        for split in SPLITS:
            found, names = store.find(images.hashes[split]), images.labels.split(split).names
            self.skipped += [names[i] for i in np.flatnonzero(found.shard < 0)]
            self._rows[split] = rows = np.flatnonzero(found.shard >= 0)
            self._found[split] = Found(found.shard[rows], found.row[rows])
        train, test = (images.labels.split(split).kept(self._rows[split]) for split in SPLITS)
        self.labels = dataclasses.replace(images.labels, train=train, test=test)

    @functools.cached_property
    def meta(self) -> dict:
        """What the features are, flat: the fields, count and skipped images; image_list is of the images and
        their labels, content also of what was computed of them."""
        image_list = self.images.fingerprint()
        return as_strict_json(
            self.fields
            | {
                "count": {split: len(rows) for split, rows in self._rows.items()},
                "skipped": self.skipped,
                "image_list": image_list,
                "content": checksum({"features": self.of, "images": image_list})[:16],
            }
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch tokens (of the windows, when compact)."""
        rows, columns = self.fields["grid"]
        return rows, columns

    @property
    def channels(self) -> int:
        return self.fields["n_feat"]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array, per image."""
        return {name: tuple(shape) for name, shape in self.fields["shapes"].items()}

    def in_rows(self, images: ImageSet) -> ImageSet:
        """The images of the rows, in their order. Raises UserError where they are other ones than those that
        were extracted."""
        numbers = self.images.rows_in(ImageList.of(images))
        if numbers is None:
            raise UserError("the images have changed since they were extracted")
        return images.kept({split: numbers[split][self._rows[split]] for split in SPLITS})

    def arrays(self, split: str) -> dict[str, CachedArray]:
        """Every array of a split, read from the files by index."""
        return {
            name: CachedArray([files[name] for files in self._files], *self._found[split], shape)
            for name, shape in self.shapes.items()
        }

    def tokens(self, split: str) -> CachedArray:
        """The tokens (n, 1 + N, C) of a split."""
        return self.arrays(split)["tokens"]
