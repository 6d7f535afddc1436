"""Shards: the features of up to 256 images, a folder each, written whole or not at all.

    tokens.npy  float16 (images, 1 + N, C): the semantic token, then the patch tokens
    bands.npy   float16 (images, D): the band token, where one is kept; likewise places.npy
    record.json which features of which images these are, size and checksum of each file; sealed

Shards are never changed. Their names are drawn at random, so that any number of processes and machines may
write into one store; a row that two of them have written is there twice, which does no harm."""

import functools
import io
import json
import math
import os
import uuid
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError
from shell.files import checksum, read_sealed, whole_file

DTYPE = np.dtype("<f2")
EXPONENT = 0x7C00  # of a float16: all of its bits are set where it is infinite or no number
RECORD = "record.json"
OPEN_FILES = 256  # of each array, kept open between two reads


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


def read_shard(folder: Path, verified: set[str]) -> Shard:
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

    def __getitem__(self, index: np.ndarray | slice | int) -> np.ndarray:
        places = self._places[index]  # (..., 2)
        rows = self._read(places.reshape(-1, 2), self.shape[1:])
        return rows.reshape(*places.shape[:-1], *self.shape[1:])

    def semantic(self) -> np.ndarray:
        """Of tokens (n, 1 + N, C): the semantic ones of all images (n, C), without reading the others."""
        return self._read(self._places, self.shape[2:])

    def _read(self, places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """What stands first in the rows at these places, so much of each as has this shape."""
        found = np.empty((len(places), *shape), DTYPE)
        for values, (shard, row) in zip(found, places.tolist()):
            file, at = self._open(shard), self._first[shard] + row * self._row_size
            if os.preadv(file.fileno(), [values.data], at) != values.nbytes:
                raise Damaged(f"the features in {file.name} have been cut while they were read")
        return found
