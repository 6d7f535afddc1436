"""The features of a data set: its images in order, each looked up in a store; what all take of the disk."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import utils
from cache.store import IDENTITY, CachedArray, Store
from config import UserError, unknown
from datasets import SPLITS, ImageSet, Labels, Split
from shell.files import as_strict_json, checksum, read_sealed, write_sealed

EXTRACT = "run python extractor.py with the same settings, or set pretrained False"


def list_file(root: Path, name: str) -> Path:
    """Where the list of images of a data set is kept (datasets.name_of)."""
    return root / "datasets" / f"{name}.json"


class Wanted(NamedTuple):
    """An image whose features are missing: its split, its name there, the hash of its content."""

    split: str
    name: str
    hash: str


@dataclasses.dataclass
class ImageList:
    """The images of a data set, without the images: what is kept of it beside the stores.

    hashes: of each image of a split, in order. sizes: by backbone, the size of the images that img_size auto
    has chosen. pixel_scale: the ranges of pixels of more than eight bits (images/images.py); None until
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
        if before is None or set(before.all_hashes).isdisjoint(listed.all_hashes):
            return listed
        if (rows := before.rows_in(listed)) is not None:
            listed = cls(listed.labels.kept(rows), before.hashes)
        unreadable = sorted(set(before.unreadable).intersection(listed.all_hashes))
        return cls(listed.labels, listed.hashes, dict(before.sizes), before.pixel_scale, unreadable)

    def rows_in(self, other: "ImageList") -> dict[str, np.ndarray] | None:
        """The number in another list of each image of a split, by content and labels; None unless all are."""
        found = {}
        for split in SPLITS:
            ours, theirs = self._known_by(split), other._known_by(split)
            if sorted(ours) != sorted(theirs):
                return None
            numbers = range(len(ours))
            found[split] = np.empty(len(ours), np.int64)
            found[split][sorted(numbers, key=ours.__getitem__)] = sorted(numbers, key=theirs.__getitem__)
        return found

    def _known_by(self, split: str) -> list[tuple]:
        """All that is listed of each image of a split but its name."""
        labels, classes = self.labels.split(split), (*self.labels.classes, "")
        names = [classes[category] for category in labels.category]
        kinds = [kind + " (held out)" * held for kind, held in zip(labels.kind, labels.held.tolist())]
        return list(zip(self.hashes[split], names, labels.defect.tolist(), kinds))

    @classmethod
    def read(cls, path: Path) -> "ImageList | None":
        """The list in a file; None without one, or where it is damaged: the images tell it again."""
        try:
            content = read_sealed(path)
            kept, scale = content["labels"], content.get("pixel_scale")
            train, test = (Split.of(**kept[split]) for split in SPLITS)
            labels = Labels(tuple(kept["classes"]), train, test, kept["per_category"])
            return cls(labels, content["hashes"], content["sizes"], scale, content["unreadable"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path, before: "ImageList | None" = None) -> None:
        """Unless the file has the same ``before``."""
        if before is None or before.content() != self.content():
            write_sealed(path, self.content())

    def content(self) -> dict:
        """What ``write`` writes, made of lists."""
        return as_strict_json(dataclasses.asdict(self))

    @property
    def all_hashes(self) -> list[str]:
        return [image for split in SPLITS for image in self.hashes[split]]

    def fingerprint(self) -> str:
        """A hash of the images and their labels, whatever their names are."""
        of = {"per_category": self.labels.per_category, "classes": self.labels.classes}
        return checksum(of | {split: self._known_by(split) for split in SPLITS})[:16]


class FeatureCache:
    """The features of a data set's images as they are in a store; one that is not there is left out, its name
    in ``skipped``, what it is in ``absent``. It can be pickled: files are opened when rows are read."""

    def __init__(self, store: Store, images: ImageList):
        self.folder, self.fields, self.of, self.images = store.folder, store.fields, store.of, images
        self._files = [shard.files for shard in store.shards]
        self.skipped: list[str] = []
        self.absent: dict[str, Wanted] = {}  # by hash: each content once
        self._rows, self._places = {}, {}  # in the list; shard, and row in it
        for split, hashes in images.hashes.items():
            places, names = store.find(hashes), images.labels.split(split).names
            there = places[:, 0] >= 0
            self._rows[split], self._places[split] = np.flatnonzero(there), places[there]
            for i in np.flatnonzero(~there):
                self.skipped.append(names[i])
                self.absent.setdefault(hashes[i], Wanted(split, names[i], hashes[i]))
        self.labels = images.labels.kept(self._rows)

    @functools.cached_property
    def meta(self) -> dict:
        """What the features are, flat: the fields, count and skipped images; image_list is of the images and
        their labels, content also of what was computed of them."""
        image_list = self.images.fingerprint()
        return self.fields | {
            "count": {split: len(rows) for split, rows in self._rows.items()},
            "skipped": self.skipped,
            "image_list": image_list,
            "content": checksum({"features": self.of, "images": image_list})[:16],
        }

    def in_rows(self, images: ImageSet) -> ImageSet:
        """The images of the rows, in their order. Raises UserError unless they are those of the features."""
        numbers = self.images.rows_in(ImageList.of(images))
        if numbers is None:
            raise UserError("the images have changed since they were extracted")
        return images.kept({split: numbers[split][self._rows[split]] for split in SPLITS})

    def arrays(self, split: str) -> dict[str, CachedArray]:
        """Every array of a split, read from the files by index."""
        return {
            name: CachedArray([files[name] for files in self._files], self._places[split], tuple(shape))
            for name, shape in self.fields["shapes"].items()
        }


def complete(cache: FeatureCache, unreadable: str) -> FeatureCache:
    """The features, once it is said which images cannot be read and are left out. Raises UserError on an
    image that could be read and has none, and, where ``unreadable`` is stop, on one that cannot be."""
    listed, skipped = cache.images, cache.skipped
    missing = cache.absent.keys() - set(listed.unreadable)
    if missing or not cache.fields:
        some = f"{len(missing)} of {len(listed.all_hashes)} images"
        raise UserError(f"{some} have no features in {cache.folder}; {EXTRACT}")
    told = f"unreadable images: {utils.first_named(skipped)}"
    if skipped and unreadable == "stop":
        if len(skipped) > utils.MOST_NAMED:
            print(*skipped, sep="\n", file=sys.stderr)
        raise UserError(
            f"{told}; repair them or take them out, or leave them out with --unreadable skip; the "
            f"features of the others are kept in {cache.folder}"
        )
    if skipped:
        print(f"features: left out, {told}", flush=True)
    return cache


def prune(root: Path, named: str) -> None:
    """Print what each store takes of the disk and holds of each data set; then, unless ``named`` is "list",
    drop all but what the data sets that it names have. Raises UserError on other names and damaged lists."""
    lists = {}
    for path in sorted(list_file(root, "*").parent.glob("*.json")):
        if not (found := ImageList.read(path)):
            raise UserError(f"{path} is damaged: run extractor.py on its data set, or delete the file")
        lists[path.stem] = found
    names = [] if named == "list" else [name.strip() for name in named.split(",")]
    if strange := [name for name in names if name not in lists]:
        raise UserError(unknown("data set", strange[0], ["list", *lists]))
    if not (stores := sorted(root.glob(f"*/{IDENTITY}"))):
        print(f"no features in {root}")
    for path in stores:
        store = Store(path.parent)
        counts = {name: (store.find(each.all_hashes)[:, 0] >= 0).sum() for name, each in lists.items()}
        of = ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "of no data set"
        print(f"{path.parent}: {store.size() / 1e6:.1f} MB ({of})", flush=True)
        if names:
            freed = store.keep_only({image for name in names for image in lists[name].all_hashes})
            print(f"  {freed / 1e6:.1f} MB dropped", flush=True)
    for name in {*lists}.difference(names) if names else ():
        list_file(root, name).unlink(missing_ok=True)
