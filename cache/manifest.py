"""What a feature cache holds, on the disk: the only module that knows its format.

A folder, made by one process or by several that share it, and whole when ``manifest.json`` says so:

    manifest.json               what the features are (the fields), the records of all shards, finished: true
                                when all are there, and its own checksum
    labels.json                 names, categories and defects of the images
    images.json                 the content hash of each image, and the file's own checksum (cache/growth.py)
    train-tokens-00000.npy ...  float16 (images, 1 + N, C): the semantic token, then the patch tokens
    train-bands-00000.npy ...   float16 (images, D): the band token, where one is kept
    train-00000.json ...        the record of a finished shard: rows, images left out, sizes and checksums;
                                written last, so that any number of processes can go on from what is there

and, while it is being made, per shard in work the lock ``.train-00000.lock``; ``.*.partial`` files beside
what is being written; ``train-00000.unreadable.json`` for a shard that was not finished because of unreadable
images. Nothing else in the folder is ever touched."""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cache import shards
from cache.shards import REPAIR, Damaged, Shard, StoredArray
from config import UserError
from shell.files import as_strict_json, checksum, read_json, read_sealed, write_sealed

CACHE_FORMAT = 3
IMAGES = "images.json"


def has_features(folder: Path) -> bool:
    """Whether a folder holds a cache, finished or not, fitting or not. Raises UserError when it holds
    something else, or a cache of an earlier version."""
    if (folder / "manifest.json").exists():
        return True
    if (folder / "meta.json").exists():
        raise UserError(
            f"the features in {folder} are in the format of an earlier version (2, this one reads "
            f"{CACHE_FORMAT}); delete that folder or give another --feature_path, and run python extractor.py"
        )
    if folder.is_file() or folder.is_dir() and any(not _is_ours(path.name) for path in folder.iterdir()):
        raise UserError(
            f"feature_path: {folder} is there and holds no features; give a folder that is new, empty or a "
            f"cache"
        )
    return False


RECORD = re.compile(r"(train|test)-\d{5,}\.json")
LEFT_OVER = re.compile(
    r"\.(train|test)-\d{5,}\.lock|(train|test)-\d{5,}\.unreadable\.json"
    r"|\.(manifest|labels|images|(train|test)(-[a-z]+)?-\d{5,}(\.unreadable)?)\.(json|npy)\..*\.partial"
)
OURS = re.compile(
    rf"{RECORD.pattern}|{LEFT_OVER.pattern}|\.lock|(labels|images)\.json|(train|test)-[a-z]+-\d{{5,}}\.npy"
    r"|lost\+found"  # what every new file system holds
)


def _is_ours(name: str) -> bool:
    """Whether a file may lie in a folder whose manifest is still to be written, or was lost."""
    return OURS.fullmatch(name) is not None


# ---------------------------------------------------------------- the manifest
@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache holds. records: per shard name the rows it has, the images it leaves out (``skipped``),
    what it is of, and size and checksum of its files; all of them when the cache is finished, none before."""

    fields: dict
    labels_sha256: str
    images: dict[str, int]  # per split, with those left out
    shapes: dict[str, tuple[int, ...]]  # of each array, per image
    shard_rows: int
    records: dict[str, dict] = dataclasses.field(default_factory=dict)
    finished: bool = False

    @property
    def shards(self) -> list[Shard]:
        return shards.shards_of(self.images, self.shard_rows)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises UserError when there is none, or it is damaged, or of another version."""
        path = folder / "manifest.json"
        try:
            has_features(folder)
            content = read_json(path)
            if isinstance(content, dict) and content.get("format", CACHE_FORMAT) != CACHE_FORMAT:
                raise UserError(
                    f"the features in {folder} are in format {content['format']}, this version reads "
                    f"{CACHE_FORMAT}; delete that folder or give another --feature_path"
                )
            content = read_sealed(path)
            del content["format"], content["dtype"], content["checksum"]
            content["fields"].setdefault("mirror", False)  # versions that mirrored nothing did not say so
            shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
            return cls(**content | {"shapes": shapes})
        except OSError:
            raise UserError(
                f"no features in {folder}; run python extractor.py with the same settings, or set pretrained "
                f"False"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{path} is damaged ({error}); {REPAIR}") from None

    def write(self, folder: Path) -> None:
        content = {"format": CACHE_FORMAT, "dtype": "float16"} | dataclasses.asdict(self)
        write_sealed(folder / "manifest.json", content)

    def stored(self, folder: Path, shard: Shard, record: dict) -> dict[str, StoredArray]:
        """The files of a shard by the name of their array."""
        return {
            name: StoredArray(
                shard.file(folder, name),
                (record["rows"], *shape),
                record["files"][name]["bytes"],
                record["files"][name]["crc32"],
            )
            for name, shape in self.shapes.items()
        }

    @property
    def features_sha256(self) -> str:
        """Which features these are, of whatever images."""
        return checksum(as_strict_json({"fields": without_images(self.fields), "shapes": self.shapes}))

    def size(self, wanted: Iterable[Shard]) -> int:
        """Bytes of the rows of shards."""
        row = sum(shards.DTYPE.itemsize * math.prod(shape) for shape in self.shapes.values())
        return row * sum(shard.stop - shard.start for shard in wanted)

    def skipped(self, split: str) -> list[int]:
        """The images of a split that a finished cache leaves out, in order."""
        return [i for s in self.shards if s.split == split for i in self.records[s.name]["skipped"]]

    def refuse_others(self, folder: Path, expected: dict) -> None:
        """Raise UserError that names the first of the ``expected`` fields that differs here."""
        advice = "delete that folder or give another --feature_path"
        for field, value in expected.items():
            recorded = self.fields.get(field)
            if field == EXAMPLE:
                if fault := example_fault(recorded, value):
                    raise UserError(f"the features in {folder} do not fit: {fault}; {advice}")
                continue
            if recorded == as_strict_json(value):
                continue
            if field == "image_list":
                raise UserError(
                    f"the features in {folder} are of other images than those now there; python extractor.py "
                    f"extracts those that have changed (--restart: all again), or {advice}"
                )
            raise UserError(
                f"the features in {folder} do not fit: {field} is {_short(recorded)} there, "
                f"{_short(value)} is wanted; {advice}"
            )

    def refuse_other_features(self, folder: Path, expected: dict) -> None:
        """As ``refuse_others``, of whatever images."""
        self.refuse_others(folder, {name: value for name, value in expected.items() if name != "image_list"})


def without_images(fields: dict) -> dict:
    """The fields that say what the features are, of whatever images, made on whatever machine."""
    return {name: value for name, value in fields.items() if name not in ("image_list", EXAMPLE)}


EXAMPLE = "example"  # the field that holds what the backbone gave of a fixed picture
FARTHEST = {True: 0.02, False: 0.1}  # of its size, that machines may move it, where both compute in float32


def example_fault(recorded: dict | None, now: dict) -> str | None:
    """How far what the backbone gives of the fixed picture is from what it gave, where that is more than
    rounding; None where it is not, and where none was recorded."""
    if recorded is None:
        return None
    before, after = (np.array(example["values"], float) for example in (recorded, now))  # (arrays, numbers)
    exact = all(example["precision"] == "float32" for example in (recorded, now))
    if after.shape == before.shape:
        sizes = np.linalg.norm(before, axis=1).clip(1e-9)
        far = (np.linalg.norm(after - before, axis=1) / sizes).max()
    else:
        far = np.inf
    if far <= FARTHEST[exact]:
        return None
    return (
        f"with timm {recorded['timm']} the backbone gave other features of a fixed picture than with timm "
        f"{now['timm']} now ({far:.0%} off): install timm {recorded['timm']}, or make the features again"
    )


def _short(value) -> str:
    return "absent" if value is None else str(value)
