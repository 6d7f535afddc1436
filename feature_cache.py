"""The feature cache: the only module that knows its paths and its format."""

import dataclasses
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

import datasets
from config import Config, UserError
from datasets import SPLITS, ImageSet, Labels, Split

# <folder>/meta.json      what the features are (the fields below), and finished: true, written last
# <folder>/labels.json    names, categories and defects of the images
# <folder>/{train,test}-tokens.npy   float16 (images, 1 + N, C): the semantic token, then the patch tokens
# <folder>/{train,test}-bands.npy    float16 (images, D): the band token, where one is kept
CACHE_FORMAT = 2


def cache_folder(config: Config, img_size: tuple[int, int], grid_key: str) -> Path:
    """Where the features of a configuration lie: feature_path, or a folder named after data set, the place of
    its images where that tells two sets apart, backbone, size and grid."""
    if config.feature_path:
        return Path(config.feature_path)
    extractor = config.extractor.replace("/", "_").replace(":", "_")
    validation = "-validation" if config.validate else ""
    slug = datasets.slug(config)
    place = f"-{slug}" if slug else ""
    size = f"{img_size[0]}x{img_size[1]}"
    return Path("features") / f"{config.dataset}{place}-{extractor}-{size}-{grid_key}{validation}"


@dataclasses.dataclass(frozen=True)
class CacheIdentity:
    """Which features are meant: the folder of their cache, and the sidecar's fields that must be found
    there."""

    folder: Path
    fields: dict

    def with_images(self, images: ImageSet) -> "CacheIdentity":
        """The same, of these very images."""
        return CacheIdentity(self.folder, self.fields | {"image_list": images.fingerprint()})


def size_in_bytes(labels: Labels, shapes: dict[str, tuple[int, ...]]) -> int:
    """The size of a cache that holds float16 arrays of these shapes per image."""
    return 2 * sum(math.prod(shape) for shape in shapes.values()) * labels.count()


def array_file(folder: Path, split: str, name: str) -> Path:
    return folder / f"{split}-{name}.npy"


def has_features(folder: Path) -> bool:
    """Whether a folder holds a cache, fitting or not. Raises UserError when it holds something else."""
    if (folder / "meta.json").exists():
        return True
    if folder.is_dir() and any(folder.iterdir()) or folder.is_file():
        raise UserError(
            f"feature_path: {folder} is there and holds no features; give a folder that is new, empty or a "
            f"cache"
        )
    return False


class CacheWriter:
    """Writes a cache beside its final folder and moves it there whole when its ``with`` block ends well;
    otherwise nothing stays. Splits are appended in order; shapes: of each array, per image."""

    def __init__(self, folder: Path, fields: dict, labels: Labels, shapes: dict[str, tuple[int, ...]]):
        self.folder, self.partial = folder, folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        self.fields, self.labels, self.shapes = fields, labels, shapes
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, error_type, error, trace) -> None:
        if error_type is None:
            self._finish()
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def open_split(self, split: str) -> Callable[[dict[str, np.ndarray]], None]:
        """A function that appends rows of every array, float16, to a split. Raises ValueError on other
        shapes."""
        count, done = len(self.labels.split(split).names), 0
        mapped = {}
        for name, shape in self.shapes.items():
            path = array_file(self.partial, split, name)
            mapped[name] = np.lib.format.open_memmap(path, "w+", np.float16, (count, *shape))
            _reserve(path)

        def append(rows: dict[str, np.ndarray]) -> None:
            nonlocal done
            n = len(next(iter(rows.values())))
            expected = {name: (n, *shape) for name, shape in self.shapes.items()}
            got = {name: values.shape for name, values in rows.items()}
            if got != expected or done + n > count:
                raise ValueError(f"expected at most {count - done} rows of shapes {expected}, got {got}")
            for name, values in rows.items():
                mapped[name][done : done + n] = values
                _release(mapped[name])
            done += n

        return append

    def _finish(self) -> None:
        labels = self.labels
        content = {"classes": labels.classes, "per_category": labels.per_category}
        content |= {split: labels.split(split).as_json() for split in SPLITS}
        (self.partial / "labels.json").write_text(json.dumps(content))
        counts = {split: len(labels.split(split).names) for split in SPLITS}
        meta = self.fields | {
            "count": counts,
            "shapes": self.shapes,
            "dtype": "float16",
            "format": CACHE_FORMAT,
            "finished": True,
        }
        (self.partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)


def _reserve(path: Path) -> None:
    """Take a file's whole size on the disk now: a full disk is an OSError here, but kills a process that
    writes to a map."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)


def _release(mapped: np.memmap) -> None:
    """Give the pages of a mapped file back to the system's cache: resident memory stays small."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


class FeatureCache:
    """A finished cache, checked against the fields that are expected. Raises UserError that says which field
    differs."""

    def __init__(self, identity: CacheIdentity):
        self.folder, self.meta = identity.folder, read_meta(identity.folder)
        folder, advice = self.folder, "delete that folder or give another --feature_path"
        for field, expected in {"format": CACHE_FORMAT, **identity.fields}.items():
            recorded = self.meta.get(field)
            if recorded == as_json(expected):
                continue
            if field == "image_list":
                raise UserError(
                    f"the features in {folder} are of other images than those now there; {advice}"
                )
            raise UserError(
                f"the features in {folder} do not fit: {field} is {_short(recorded)} there, "
                f"{_short(expected)} "
                f"is wanted; {advice}"
            )
        try:
            content = json.loads((folder / "labels.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"the labels in {folder}/labels.json cannot be read ({error}); delete {folder} and extract "
                f"again"
            ) from None
        train, test = (Split.of(**content[split]) for split in SPLITS)
        self.labels = Labels(tuple(content["classes"]), train, test, content["per_category"])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch tokens (of the windows, when compact)."""
        rows, columns = self.meta["grid"]
        return rows, columns

    @property
    def channels(self) -> int:
        return self.meta["n_feat"]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array, per image."""
        return {name: tuple(shape) for name, shape in self.meta["shapes"].items()}

    def arrays(self, split: str) -> dict[str, "CachedArray"]:
        """Every array of a split, memory-mapped."""
        count = self.meta["count"][split]
        return {
            name: CachedArray(array_file(self.folder, split, name), (count, *shape))
            for name, shape in self.shapes.items()
        }

    def tokens(self, split: str) -> "CachedArray":
        """The tokens (n, 1 + N, C) of a split, memory-mapped."""
        return self.arrays(split)["tokens"]


class CachedArray:
    """An array of a split, memory-mapped: ``array[index]`` copies the rows, float16, out of the file."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        advice = f"delete {path.parent} and extract again"
        try:
            self._map = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"the features in {path} cannot be read ({error}); {advice}") from None
        if self._map.shape != shape or self._map.dtype != np.float16:
            raise UserError(
                f"the features in {path} are {self._map.dtype} {self._map.shape}, expected float16 {shape}; "
                f"{advice}"
            )
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        rows = self._map[index]
        rows = (
            np.array(rows) if isinstance(index, slice) else np.asarray(rows)
        )  # an index array copies already
        _release(self._map)
        return rows

    def semantic(self) -> np.ndarray:
        """Of tokens (n, 1 + N, C): the semantic ones of all images (n, C), without reading the patch
        tokens."""
        semantic = np.empty((self.shape[0], self.shape[2]), np.float16)
        for start in range(0, len(self), 1000):
            semantic[start : start + 1000] = self._map[start : start + 1000, 0]
            _release(self._map)
        return semantic


def read_meta(folder: Path) -> dict:
    """The sidecar of a finished cache. Raises UserError when there is none, or it is not finished."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except OSError:
        raise UserError(
            f"no features in {folder}; run python extractor.py with the same settings, or set pretrained "
            f"False"
        ) from None
    except ValueError:
        meta = {}
    if meta.get("finished") is not True:
        raise UserError(f"the features in {folder} are not finished; delete that folder and extract again")
    return meta


def as_json(value):
    """What a value is after it has been through JSON."""
    return json.loads(json.dumps(value))


def _short(value) -> str:
    return "absent" if value is None else str(value)
