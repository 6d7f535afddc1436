"""A store: the features that one backbone gives, of whatever images, in a folder of shards.

    features/                            the knob feature_path
        datasets/<data set>.json         the images of each data set (cache/feature_cache.py)
        <backbone, size, grid>-<hash>/   a store; the hash is of all that the features depend on
            identity.json                which features these are; sealed
            <random name>/               a shard: up to 256 images, written whole or not at all
                tokens.npy   float16 (images, 1 + N, C): the semantic token, then the patch tokens
                bands.npy    float16 (images, D): the band token, where one is kept; likewise places.npy
                record.json  of which features and images, size and checksum of each file; sealed

An image is known by the hash of its bytes, and its features depend on it and on the identity alone. So what
is missing is what no shard names: growth, renaming, removal, copies, a second data set of the same pictures
and going on after a kill are no cases of their own. A damaged shard counts as missing.

Shards are never changed. Their names are drawn at random, so that any number of processes and machines may
write into one store; a row that two of them have written is there twice, which does no harm."""

import functools
import io
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

import numpy as np

import utils
from config import UserError
from shell.files import as_strict_json, checksum, read_sealed, sweep, whole_file, write_sealed

FORMAT = 4
IDENTITY, RECORD = "identity.json", "record.json"
EXAMPLE = "example"  # the field that holds what the backbone gave of a fixed picture
FARTHEST = {True: 0.02, False: 0.1}  # of its size, that machines may move it, where both compute in float32
ABANDONED = 3600  # seconds after which what a killed process has left half written is removed
DTYPE = np.dtype("<f2")
EXPONENT = 0x7C00  # of a float16: all of its bits are set where it is infinite or no number
OPEN_FILES = 256  # of each array, kept open between two reads


class Store:
    """A store as it was when it was looked at.

    fields: which features these are, flat, as JSON has them; empty where there are none yet. shards: the
    sound ones. gone: the folders of the others: of damaged shards, which are told of, and of those that hold
    images to be made ``again``."""

    def __init__(self, folder: Path, verified: Set[str] = frozenset(), again: Set[str] = frozenset()):
        """The sizes of files are checked, of the shards that hold any of the images ``verified`` every byte.
        Raises UserError on a store of another version."""
        self.folder, path = folder, folder / IDENTITY
        self.fields: dict = {}
        try:
            content = read_sealed(path)
            refuse_others(folder, content, {"format": FORMAT})
            self.fields = content["fields"]
        except FileNotFoundError:
            pass
        except ValueError as error:
            print(f"features: {path} is damaged ({error}); the next extraction mends it", flush=True)
        self.shards, self.gone, damaged, of = list[Shard](), list[Path](), list[str](), self.of
        for place in sorted(place for place in folder.glob("[!.]*") if place.is_dir()):
            try:
                shard = read_shard(place, verified)
                if not again.isdisjoint(shard.images):
                    self.gone.append(place)
                elif shard.of == of:
                    self.shards.append(shard)
            except Damaged as damage:
                self.gone.append(place)
                damaged.append(f"{place.name}/{damage}")
        if damaged:
            told = utils.first_named(damaged, "; ")
            print(f"features: damaged shards in {folder}, which count as missing: {told}", flush=True)
        self._places: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(self.shards):
            for row, image in enumerate(shard.images):
                self._places.setdefault(image, (number, row))

    @property
    def of(self) -> str:
        """Which features these are, on whatever machine they were made."""
        return checksum({name: value for name, value in self.fields.items() if name != EXAMPLE})[:16]

    def find(self, images: list[str]) -> np.ndarray:
        """The number of the shard, and the row in it (n, 2), of images by their hashes; -1: nowhere."""
        found = [self._places.get(image, (-1, -1)) for image in images]
        return np.array(found, np.int64).reshape(-1, 2)

    def begin(self, fields: dict) -> None:
        """Make a store of which nothing is left one of these features. Raises UserError on one of others."""
        stays = bool(self.shards or not self.gone and self.fields)
        if stays:
            refuse_others(self.folder, self.fields, fields)
        self.clear()
        if not stays:
            self.fields = as_strict_json(fields)
            write_sealed(self.folder / IDENTITY, {"format": FORMAT, "fields": self.fields})

    def clear(self) -> None:
        """Remove the shards that are gone, and what was left half written long ago."""
        sweep(self.folder, ABANDONED)
        for folder in self.gone:
            shutil.rmtree(folder, ignore_errors=True)

    def keep_only(self, images: set[str]) -> int:
        """Keep one row of each of these images; a shard that keeps some of its rows is written anew -> the
        bytes that this frees."""
        images = set(images)
        for shard in self.shards:
            rows = [i for i, image in enumerate(shard.images) if image in images]
            if len(rows) < len(shard.images):
                self.gone.append(shard.folder)
                if not rows:
                    continue
                try:
                    arrays = {name: np.load(checked(file))[rows] for name, file in shard.files.items()}
                except Damaged:  # another shard may have its rows
                    continue
                write_shard(self.folder, self.of, [shard.images[i] for i in rows], arrays)
            images.difference_update(shard.images)  # which two processes may have written
        self.clear()
        if not (left := Store(self.folder)).shards and self.shards:  # else just begun, or damaged
            (self.folder / IDENTITY).unlink(missing_ok=True)
        return self.size() - left.size()

    def size(self) -> int:
        """Bytes of the shards' files."""
        return sum(file.size for shard in self.shards for file in shard.files.values())


def refuse_others(folder: Path, fields: dict, wanted: dict) -> None:
    """Raise UserError that names the first of the fields ``wanted`` that is another one in the store."""
    for field, value in wanted.items():
        there = fields.get(field)
        fault = f"{field} is {there} there, {value} is wanted" if there != value else None
        if field == EXAMPLE:  # of another machine, perhaps
            fault = example_fault(there, value)
        if fault:
            advice = "delete that folder or give another --feature_path"
            raise UserError(f"the features in {folder} do not fit: {fault}; {advice}")


def example_fault(recorded: dict | None, now: dict) -> str | None:
    """How far what the backbone gives of the fixed picture is from what it gave, where that is more than
    rounding; None where it is not, and where none was recorded."""
    if recorded is None:
        return None
    before, after = (np.array(example["values"], float) for example in (recorded, now))  # (arrays, numbers)
    far, exact = np.inf, all(example["precision"] == "float32" for example in (recorded, now))
    if after.shape == before.shape:
        sizes = np.linalg.norm(before, axis=1).clip(1e-9)
        far = (np.linalg.norm(after - before, axis=1) / sizes).max()
    told = (
        f"with timm {recorded['timm']} the backbone gave other features of a fixed picture than with timm "
        f"{now['timm']} now ({far:.0%} off): install timm {recorded['timm']}, or make the features again"
    )
    return told if far > FARTHEST[exact] else None


# ---------------------------------------------------------------- shards
class Damaged(UserError):
    """A file that is not what was written."""


class File(NamedTuple):
    """One array of a shard on the disk: its rows, its size in bytes and the CRC-32 of all of them."""

    path: Path
    rows: int
    size: int
    crc32: int

    def check(self, thorough: bool) -> None:
        """Raise Damaged where the size is another one or, ``thorough``, the checksum."""
        try:
            if (size := self.path.stat().st_size) != self.size:
                raise Damaged(f"{self.path.name}: {size} bytes, expected {self.size}")
            if thorough and zlib.crc32(self.path.read_bytes()) != self.crc32:
                raise Damaged(f"{self.path.name}: its checksum differs: the file has been changed")
        except OSError as error:
            raise Damaged(f"{self.path.name}: {error.strerror or error}") from None


class Shard(NamedTuple):
    """A shard as its record has it. of: which features these are. images: the hash of each row's image."""

    folder: Path
    of: str
    images: list[str]
    files: dict[str, File]


def write_shard(store: Path, of: str, images: list[str], arrays: dict[str, np.ndarray]) -> None:
    """Add rows, float16 (n, ...) of each array, of images (n) to a store. Raises UserError unless finite."""
    if any((values.view(np.int16) & EXPONENT == EXPONENT).any() for values in arrays.values()):
        raise UserError(
            "the backbone gave features that are not finite or exceed float16; try --precision float32, and "
            "check its weights"
        )
    with whole_file(store / uuid.uuid4().hex[:16]) as partial:
        partial.mkdir()
        record: dict = {"of": of, "images": images, "files": {}}
        for name, values in arrays.items():
            path = partial / f"{name}.npy"
            np.save(path, values)
            content = path.read_bytes()
            record["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
        (partial / RECORD).write_text(json.dumps(record | {"checksum": checksum(record)}))


def read_shard(folder: Path, verified: Set[str]) -> Shard:
    """The shard in a folder, by its record and its files' sizes; where it holds one of the images
    ``verified``, every byte is checked. Raises Damaged."""
    try:
        record = read_sealed(folder / RECORD)
        images, thorough = record["images"], not verified.isdisjoint(record["images"])
        files = {
            name: File(folder / f"{name}.npy", len(images), file["bytes"], file["crc32"])
            for name, file in record["files"].items()
        }
        shard = Shard(folder, record["of"], images, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{RECORD}: {getattr(error, 'strerror', None) or error}") from None
    for file in files.values():
        file.check(thorough)
    return shard


# ---------------------------------------------------------------- reading rows
@functools.cache  # in a process: no shard is ever written again in its place
def checked(file: File) -> Path:
    """The path of a file of rows, once every byte is checked. Raises Damaged."""
    try:
        file.check(thorough=True)
    except Damaged as damage:
        raise Damaged(
            f"the features in {file.path.parent} are damaged ({damage}); python extractor.py with the same "
            "settings mends that and leaves the rest as it is"
        ) from None
    return file.path


class CachedArray:
    """One array of a data set's images: ``array[index]`` reads their rows, float16, out of the shards' files.
    Raises Damaged on a damaged file when a row of it is first read.

    files: of the shards. places (n, 2): each image's shard, and its row there. row_shape: of one image."""

    def __init__(self, files: list[File], places: np.ndarray, row_shape: tuple[int, ...]):
        self.shape = (len(places), *row_shape)
        self._places, self._row_size = places, DTYPE.itemsize * math.prod(row_shape)
        self._first = [file.size - file.rows * self._row_size for file in files]  # behind the header
        self._open = functools.lru_cache(OPEN_FILES)(lambda number: io.FileIO(checked(files[number])))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        return self._read(self._places[index], self.shape[1:])

    def semantic(self) -> np.ndarray:
        """Of tokens (n, 1 + N, C): the semantic ones of all images (n, C), without reading the others."""
        return self._read(self._places, self.shape[2:])

    def _read(self, places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """What stands first in the rows at these places, so much of each as has this shape. Whole rows that
        follow one another in a file are read at once."""
        found = np.empty((len(places), *shape), DTYPE)
        apart = (np.diff(places, axis=0, prepend=-2) != (0, 1)).any(1) | (shape != self.shape[1:])
        bounds = [*np.flatnonzero(apart).tolist(), len(places)]
        for (shard, row), start, end in zip(places[apart].tolist(), bounds, bounds[1:]):
            file, values = self._open(shard), found[start:end]
            at = self._first[shard] + row * self._row_size
            if os.preadv(file.fileno(), [values.data], at) != values.nbytes:
                raise Damaged(f"the features in {file.name} have been cut while they were read")
        return found
