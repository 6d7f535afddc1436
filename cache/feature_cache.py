"""The feature cache of a configuration: where it lies, which features are meant, and reading it."""

import dataclasses
import json
from pathlib import Path

import numpy as np

import datasets
from cache.manifest import CACHE_FORMAT, Manifest
from cache.shards import REPAIR, CachedArray, Damaged
from config import Config, UserError
from datasets import SPLITS, ImageSet, Labels
from shell.files import as_strict_json, checksum, sha256_of_text

LABELS = "labels.json"


def cache_folder(config: Config, size: str, grid_key: str) -> Path:
    """Where the features of a configuration lie: feature_path, or a folder named after data set, the place of
    its images where that tells two sets apart, backbone, size (as in 224x224) and grid."""
    if config.feature_path:
        return Path(config.feature_path)
    extractor = config.extractor.replace("/", "_").replace(":", "_")
    slug = datasets.slug(config)
    place = f"-{slug}" if slug else ""
    return Path("features") / f"{datasets.collection(config.dataset)}{place}-{extractor}-{size}-{grid_key}"


@dataclasses.dataclass(frozen=True)
class CacheIdentity:
    """Which features are meant: the folder of their cache, and the manifest's fields that must be found
    there."""

    folder: Path
    fields: dict

    def with_images(self, images: ImageSet) -> "CacheIdentity":
        """The same, of these very images."""
        return CacheIdentity(self.folder, self.fields | {"image_list": images.fingerprint()})


# ---------------------------------------------------------------- reading
class FeatureCache:
    """A finished cache, checked against the fields that are expected: sizes and headers of its files now,
    each file's rows when they are first read. Raises UserError that says what differs or is damaged.

    manifest: the folder's, where it has been read."""

    def __init__(self, identity: CacheIdentity, manifest: Manifest | None = None):
        self.folder, self.manifest = identity.folder, manifest or Manifest.read(identity.folder)
        self.manifest.refuse_others(self.folder, identity.fields)
        if not self.manifest.finished:
            raise UserError(
                f"the features in {self.folder} are not finished; python extractor.py with the same settings "
                f"goes on with them"
            )
        self.all_labels = self._read_labels()
        train, test = (self.all_labels.split(split).kept(self.image_rows(split)) for split in SPLITS)
        self.labels = dataclasses.replace(self.all_labels, train=train, test=test)
        self.skipped = [
            self.all_labels.split(split).names[i] for split in SPLITS for i in self.manifest.skipped(split)
        ]
        for split in SPLITS:
            self.arrays(split)

    @property
    def meta(self) -> dict:
        """What the features are, flat: the fields, and count, shapes and skipped images; content changes with
        any row."""
        return as_strict_json(
            self.manifest.fields
            | {
                "count": {split: len(self.labels.split(split).names) for split in SPLITS},
                "shapes": self.manifest.shapes,
                "dtype": "float16",
                "format": CACHE_FORMAT,
                "skipped": self.skipped,
                "content": checksum(self.manifest.records),
            }
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch tokens (of the windows, when compact)."""
        rows, columns = self.manifest.fields["grid"]
        return rows, columns

    @property
    def channels(self) -> int:
        return self.manifest.fields["n_feat"]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array, per image."""
        return self.manifest.shapes

    def image_rows(self, split: str) -> np.ndarray:
        """The number of each row's image among all images of its split: unreadable ones have no row."""
        return np.delete(np.arange(self.manifest.images[split]), self.manifest.skipped(split))

    def arrays(self, split: str) -> dict[str, CachedArray]:
        """Every array of a split, memory-mapped."""
        stored = [
            self.manifest.stored(self.folder, shard, self.manifest.records[shard.name])
            for shard in self.manifest.shards
            if shard.split == split
        ]
        return {
            name: CachedArray([files[name] for files in stored], shape) for name, shape in self.shapes.items()
        }

    def tokens(self, split: str) -> CachedArray:
        """The tokens (n, 1 + N, C) of a split, memory-mapped."""
        return self.arrays(split)["tokens"]

    def _read_labels(self) -> Labels:
        if damage := labels_damage(self.folder, self.manifest):
            raise Damaged(f"the labels in {self.folder / LABELS} are damaged ({damage}); {REPAIR}")
        return Labels.from_json(json.loads((self.folder / LABELS).read_text(encoding="utf-8")))


def labels_damage(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with the file of labels; None where nothing is."""
    try:
        text = (folder / LABELS).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return str(error)
    same = sha256_of_text(text) == manifest.labels_sha256
    return None if same else "its checksum differs: the file has been changed"
