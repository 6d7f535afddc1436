"""Shards: the features of up to 256 images, a folder each, written whole or not at all.

    tokens.npy  float16 (images, 1 + N, C): the semantic token, then the patch tokens
    bands.npy   float16 (images, D): the band token, where one is kept; likewise places.npy
    record.json which features of which images these are, size and checksum of each file; sealed

Shards are never changed. Their names are drawn at random, so that any number of processes and machines may
write into one store; a row that two of them have written is there twice, which does no harm."""

import functools
import io
import itertools
import json
import math
import os
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError
from shell.files import checksum, read_sealed, sync, whole_file

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

    def damage(self, thorough: bool) -> str | None:
        """What is wrong with the file, by its size or, thorough, by its checksum; None where nothing is."""
        try:
            if (size := self.path.stat().st_size) != self.size:
                return f"{self.path.name}: {size} bytes, expected {self.size}"
            changed = thorough and zlib.crc32(self.path.read_bytes()) != self.crc32
        except OSError as error:
            return f"{self.path.name}: {error.strerror or error}"
        return f"{self.path.name}: its checksum differs: the file has been changed" if changed else None


class Shard(NamedTuple):
    """A shard as its record has it. of: which features these are. images: the hash of each row's image."""

    folder: Path
    of: str
    images: list[str]
    files: dict[str, File]

    def damage(self, thorough: bool = False) -> str | None:
        """What is wrong with the first damaged file; None where nothing is."""
        return next(filter(None, (file.damage(thorough) for file in self.files.values())), None)


def write_shard(store: Path, of: str, images: list[str], arrays: dict[str, np.ndarray]) -> None:
    """Add rows, float16 (n, ...) of each array, of images (n) to a store. Raises UserError on values that are
    not finite."""
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
            sync(path)
            content = path.read_bytes()
            record["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
        (partial / RECORD).write_text(json.dumps(record | {"checksum": checksum(record)}))
        sync(partial / RECORD)


def read_shard(folder: Path) -> Shard:
    """The shard in a folder, by its record alone. Raises Damaged."""
    try:
        record = read_sealed(folder / RECORD)
        files = {
            name: File(folder / f"{name}.npy", len(record["images"]), file["bytes"], file["crc32"])
            for name, file in record["files"].items()
        }
        return Shard(folder, record["of"], record["images"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{RECORD}: {getattr(error, 'strerror', None) or error}") from None


# ---------------------------------------------------------------- reading rows
_damage = functools.cache(File.damage)  # once in a process: no shard is ever written again in its place


def opened(file: File) -> io.FileIO:
    """A file of rows, checked the first time in a process; it is closed when nobody holds it. Raises
    Damaged."""
    if damage := _damage(file, thorough=True):
        raise Damaged(
            f"the features in {file.path.parent} are damaged ({damage}); python extractor.py with the same "
            "settings mends that and leaves the rest as it is"
        )
    return io.FileIO(file.path)


class CachedArray:
    """One array of a data set's images: ``array[index]`` reads their rows, float16, out of the shards' files.
    Raises Damaged on a damaged file when a row of it is first read.

    files: of the shards. shard, row (n): in which of them, and where in it, each image's row is. row_shape:
    of one image."""

    def __init__(self, files: Sequence[File], shard: np.ndarray, row: np.ndarray, row_shape: tuple[int, ...]):
        self.shape = (len(row), *row_shape)
        self._shard, self._row, self._numbers = shard, row, np.arange(len(row))
        self._row_size = DTYPE.itemsize * math.prod(row_shape)
        self._first = [file.size - file.rows * self._row_size for file in files]  # behind the header
        self._open = functools.lru_cache(OPEN_FILES)(lambda number: opened(files[number]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | slice | int) -> np.ndarray:
        wanted = np.asarray(self._numbers[index])
        rows = np.empty((wanted.size, *self.shape[1:]), DTYPE)
        shard, row = self._shard[wanted.reshape(-1)], self._row[wanted.reshape(-1)]
        ends = np.flatnonzero((np.diff(shard) != 0) | (np.diff(row) != 1)) + 1  # of runs, each read at once
        for start, stop in itertools.pairwise([0, *ends.tolist(), wanted.size] if wanted.size else ()):
            values, number = rows[start:stop], int(shard[start])
            file, at = self._open(number), self._first[number] + int(row[start]) * self._row_size
            if os.preadv(file.fileno(), [values.data], at) != values.nbytes:
                raise Damaged(f"the features in {file.name} have been cut while they were read")
        return rows.reshape(*wanted.shape, *self.shape[1:])

    def semantic(self) -> np.ndarray:
        """Of tokens (n, 1 + N, C): the semantic ones of all images (n, C), without reading the others."""
        tokens, order = np.empty((len(self), self.shape[2]), DTYPE), np.argsort(self._shard, kind="stable")
        numbers, starts = np.unique(self._shard[order], return_index=True)
        for shard, wanted in zip(numbers.tolist(), np.split(order, starts[1:])):
            tokens[wanted] = np.load(self._open(shard).name, mmap_mode="r")[self._row[wanted], 0]
        return tokens
