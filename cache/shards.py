"""Float16 arrays in shards of a fixed number of rows: each file is written whole or not at all, has a
checksum, and is read memory-mapped."""

import functools
import io
import math
import mmap
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError
from shell.files import partial_of

DTYPE = np.dtype("<f2")
SHARD_BYTES = 256 << 20  # of the largest array of a shard, where the number of rows is left open
MOST_ROWS = 4096  # and at most so many rows: what a killed run does again is minutes of a slow backbone
BLOCK = 4 << 20  # bytes read at a time when a file is checked
OPEN_SHARDS = 256  # memory-mapped at a time per array: each holds a file handle


def rows_per_shard(shapes: dict[str, tuple[int, ...]]) -> int:
    """A power of two of rows that makes files of about 128 to 256 MB, at most MOST_ROWS."""
    largest = max(DTYPE.itemsize * math.prod(shape) for shape in shapes.values())
    return 2 ** int(math.log2(min(MOST_ROWS, max(1, SHARD_BYTES // largest))))


NOT_FINITE = (
    "the backbone gave features that are not finite or exceed float16; try --precision float32, and check "
    "its weights"
)
REPAIR = "python extractor.py with the same settings mends that and leaves the rest as it is"


class Damaged(UserError):
    """A file of a cache that is not what was written."""


class Shard(NamedTuple):
    """The images start..stop of a split."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"

    def file(self, folder: Path, array: str) -> Path:
        return folder / f"{self.split}-{array}-{self.number:05d}.npy"


def shards_of(counts: dict[str, int], rows: int) -> list[Shard]:
    """The shards of splits of so many images, in order."""
    return [
        Shard(split, number, start, min(start + rows, count))
        for split, count in counts.items()
        for number, start in enumerate(range(0, count, rows))
    ]


def npy_header(rows: int, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file of float16 rows of a shape. NumPy leaves room in it: its length does not
    depend on the number of rows."""
    buffer = io.BytesIO()
    content = {"descr": DTYPE.str, "fortran_order": False, "shape": (rows, *shape)}
    np.lib.format.write_array_header_1_0(buffer, content)
    return buffer.getvalue()


# ---------------------------------------------------------------- writing
class ArrayWriter:
    """One array of one shard: rows are appended to a file beside its place; ``flush``, then ``put``
    puts it there."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.path, self.shape, self.rows, self._crc = path, shape, 0, 0
        self._partial = partial_of(path)
        self._stream = open(self._partial, "wb")
        self._stream.write(npy_header(0, shape))

    def append(self, values: np.ndarray) -> None:
        """Raises ValueError on rows of another shape or type, UserError on values that are not finite."""
        if values.shape[1:] != self.shape or values.dtype != DTYPE:
            raise ValueError(f"expected float16 rows of {self.shape}, got {values.dtype} {values.shape[1:]}")
        data = np.ascontiguousarray(values)
        if not finite(data):
            raise UserError(NOT_FINITE)
        content = data.reshape(-1).view(np.uint8).data
        self._crc = zlib.crc32(content, self._crc)
        self._stream.write(content)
        self.rows += len(data)

    def flush(self) -> dict:
        """Everything on the disk, still beside its place -> what a reader checks the file against."""
        self._stream.seek(0)
        self._stream.write(npy_header(self.rows, self.shape))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return {"bytes": self._partial.stat().st_size, "crc32": f"{self._crc:08x}"}

    def put(self) -> None:
        os.replace(self._partial, self.path)

    def abandon(self) -> None:
        """Close and remove the partial file, if it is still there."""
        try:
            self._stream.close()
        except OSError:  # a full disk: what was not written yet cannot be
            pass
        self._partial.unlink(missing_ok=True)


def finite(values: np.ndarray) -> bool:
    """Whether no float16 value is infinite or NaN: as whole numbers those are the largest of either sign."""
    bits = values.view(np.int16)
    return not bits.size or bool(bits.max() < 0x7C00 and bits.view(np.uint16).max() < 0xFC00)


# ---------------------------------------------------------------- reading
class StoredArray(NamedTuple):
    """One array of one shard as the manifest has it."""

    path: Path
    shape: tuple[int, ...]  # (rows, *shape of a row)
    size: int  # of the file, in bytes
    crc32: str

    def damage(self) -> str | None:
        """What is wrong with the file without reading its rows: it is missing, or has another size or header;
        None where nothing is."""
        header = npy_header(self.shape[0], self.shape[1:])
        try:
            with open(self.path, "rb") as stream:
                size, found = os.fstat(stream.fileno()).st_size, stream.read(len(header))
        except OSError as error:
            return error.strerror or str(error)
        if size != self.size:
            return f"{size} bytes, expected {self.size}"
        return None if found == header else f"its header is not that of float16 {self.shape}"

    def full_damage(self) -> str | None:
        """What is wrong with the file and its rows: the checksum, or values that are not finite; None where
        nothing is."""
        if damage := self.damage():
            return damage
        crc, sound = 0, True
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(len(npy_header(self.shape[0], self.shape[1:])))
            while block := stream.read(BLOCK):
                crc = zlib.crc32(block, crc)
                sound = sound and finite(np.frombuffer(block, DTYPE))
        if f"{crc:08x}" != self.crc32:
            return "its checksum differs: the file has been changed"
        return None if sound else "it holds values that are not finite (NaN)"

    def open(self) -> np.memmap:
        """The rows, memory-mapped, checked the first time in a process. Raises Damaged."""
        try:
            status = os.stat(self.path)
            damage = _checked(self, status.st_ino, status.st_mtime_ns)
        except OSError as error:
            damage = error.strerror
        if damage:
            raise damaged(self.path, damage)
        offset = len(npy_header(self.shape[0], self.shape[1:]))
        return np.memmap(self.path, DTYPE, "r", offset, self.shape)


def damaged(path: Path, damage: str) -> Damaged:
    return Damaged(f"the features in {path} are damaged ({damage}); {REPAIR}")


@functools.cache
def _checked(stored: StoredArray, inode: int, changed: int) -> str | None:
    """``full_damage``, once per file in a process; a file that is replaced or written to is another one."""
    return stored.full_damage()


def release(mapped: np.memmap) -> None:
    """Give the pages of a mapped file back to the system's cache: resident memory stays small."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


class CachedArray:
    """An array of a split over its shards, memory-mapped: ``array[index]`` copies the rows, float16, out of
    the files. Raises Damaged on a damaged file: by size and header at once, by its rows when it is first
    read."""

    def __init__(self, stored: Sequence[StoredArray], row_shape: tuple[int, ...]):
        for part in stored:
            if damage := part.damage():
                raise damaged(part.path, damage)
        self._starts = np.cumsum([0, *(part.shape[0] for part in stored)])
        self.shape = (int(self._starts[-1]), *row_shape)
        self._open = functools.lru_cache(OPEN_SHARDS)(lambda number: stored[number].open())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | slice | int) -> np.ndarray:
        if isinstance(index, slice):
            return self._range(*index.indices(len(self)))
        wanted = np.arange(len(self))[index] if np.ndim(index) == 0 else np.asarray(index)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        return self._gather(wanted.reshape(-1)).reshape(*wanted.shape, *self.shape[1:])

    def _range(self, start: int, stop: int, step: int) -> np.ndarray:
        if step != 1:
            return self._gather(np.arange(start, stop, step))
        rows = np.empty((max(0, stop - start), *self.shape[1:]), DTYPE)
        at = start
        while at < stop:
            number = int(np.searchsorted(self._starts, at, "right")) - 1
            end = min(stop, int(self._starts[number + 1]))
            mapped, first = self._open(number), int(self._starts[number])
            rows[at - start : end - start] = mapped[at - first : end - first]
            release(mapped)
            at = end
        return rows

    def _gather(self, index: np.ndarray) -> np.ndarray:
        index = np.where(index < 0, index + len(self), index)
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"rows {index.min()} to {index.max()} of {len(self)}")
        rows = np.empty((len(index), *self.shape[1:]), DTYPE)
        numbers = np.searchsorted(self._starts, index, "right") - 1
        for number in np.unique(numbers):
            mapped = self._open(int(number))
            values, first = np.asarray(mapped), self._starts[number]
            for i in np.flatnonzero(numbers == number):  # each row is copied once
                rows[i] = values[index[i] - first]
            release(mapped)
        return rows

    def semantic(self) -> np.ndarray:
        """Of tokens (n, 1 + N, C): the semantic ones of all images (n, C), without keeping the patch tokens
        in memory."""
        semantic = np.empty((self.shape[0], self.shape[2]), DTYPE)
        for number, first in enumerate(self._starts[:-1]):
            mapped = self._open(number)
            for start in range(0, len(mapped), 1000):
                part = mapped[start : start + 1000, 0]
                semantic[first + start : first + start + len(part)] = part
                release(mapped)
        return semantic


def remove_partials(folder: Path, name: str) -> None:
    """Remove what killed writers of a file left beside it."""
    for partial in folder.glob(f".{name}.*.partial"):
        partial.unlink(missing_ok=True)
