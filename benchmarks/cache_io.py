"""Write and read speed of the feature cache, beside a plain .npy of the same content, in the same run.

python benchmarks/cache_io.py --gigabytes 4 --folder /path/on/the/disk/to/measure

Every way is timed in turn, ``--repeats`` times over; the table gives the median and the range. The files are
in the system's cache when they are read; with ``--cold`` (Linux) the first reading comes from the disk."""

import argparse
import functools
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import print_machine

from backbone.storing import SHARD_ROWS
from cache import shards
from cache.feature_cache import FeatureCache, ImageList
from cache.store import CacheIdentity, Store
from datasets import Labels, Split

TOKENS, CHANNELS, CHUNK = 65, 768, 64  # an image's row; rows that are written together
FIRST = "first reading, with checksums"
BATCH, BATCHES = 32, 300  # rows that are read together in training, and how many such batches


class Plain:
    """One memory-mapped .npy, its pages given back after a read."""

    def __init__(self, path: Path):
        self._map = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._map)

    def __getitem__(self, index):
        rows = np.array(self._map[index]) if isinstance(index, slice) else np.asarray(self._map[index])
        self._map._mmap.madvise(mmap.MADV_DONTNEED)
        return rows

    def semantic(self) -> np.ndarray:
        found = np.empty((len(self), CHANNELS), np.float16)
        for start in range(0, len(self), 1000):
            found[start : start + 1000] = self._map[start : start + 1000, 0]
            self._map._mmap.madvise(mmap.MADV_DONTNEED)
        return found


def chunks(count: int):
    """The same rows for both."""
    block = _block()
    for start in range(0, count, CHUNK):
        yield block[: min(CHUNK, count - start)]


@functools.cache
def _block() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((CHUNK, TOKENS, CHANNELS), np.float32)
    return values.astype(np.float16)


def write_plain(path: Path, count: int) -> None:
    header = {"descr": "<f2", "fortran_order": False, "shape": (count, TOKENS, CHANNELS)}
    with open(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for rows in chunks(count):
            stream.write(rows.data)
        stream.flush()
        os.fsync(stream.fileno())


def write_sharded(folder: Path, count: int) -> None:
    store = Store(CacheIdentity(folder, {}))
    store.begin({"n_feat": CHANNELS, "grid": (8, 8), "shapes": {"tokens": (TOKENS, CHANNELS)}})
    for start in range(0, count, SHARD_ROWS):
        names = images(count)[start : start + SHARD_ROWS]
        rows = np.concatenate(list(chunks(len(names))))
        shards.write_shard(folder, store.of, names, {"tokens": rows})


def images(count: int) -> list[str]:
    return [f"{i:032d}" for i in range(count)]


def in_order(array) -> None:
    for start in range(0, len(array), CHUNK):
        array[start : start + CHUNK]


def at_random(array) -> None:
    rng = np.random.default_rng(0)
    for _ in range(BATCHES):
        array[rng.integers(0, len(array), BATCH)]


def semantic(array) -> None:
    array.semantic()


def opened(folder: Path):
    store = Store(CacheIdentity(folder, {}))
    names = [image for shard in store.shards for image in shard.images]
    labels = Labels(("a",), Split.of(names, np.zeros(len(names))), Split.of([], []))
    return FeatureCache(store, ImageList(labels, {"train": sorted(names), "test": []})).tokens("train")


def first_reading(folder: Path) -> None:
    """With the checksum of every row, as at the start of a training."""
    shards._checked.cache_clear()
    in_order(opened(folder))


def forget(folder: Path) -> None:
    """Drop the files from the system's cache."""
    for path in folder.rglob("*.npy"):
        with open(path, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(task: Callable, *arguments) -> float:
    start = time.perf_counter()
    task(*arguments)
    return time.perf_counter() - start


def measure(root: Path, count: int, repeats: int, cold: bool) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each way: {name: (plain, sharded)}."""
    tasks = {"in order": in_order, "random batches of 32": at_random, "all semantic tokens": semantic}
    times: dict[str, tuple[list[float], list[float]]] = {n: ([], []) for n in ("write", FIRST, *tasks)}
    for _ in range(repeats):
        plain, folder = root / "plain.npy", root / "sharded"
        plain.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        times["write"][0].append(seconds(write_plain, plain, count))
        times["write"][1].append(seconds(write_sharded, folder, count))
        for turn, task in ((0, lambda: in_order(Plain(plain))), (1, lambda: first_reading(folder))):
            if cold:
                forget(root)
            times[FIRST][turn].append(seconds(task))
        for name, read in tasks.items():
            for turn, array in enumerate((Plain(plain), opened(folder))):
                times[name][turn].append(seconds(read, array))
    return times


def main(args: argparse.Namespace) -> None:
    count = max(CHUNK, int(args.gigabytes * 1e9 / (2 * TOKENS * CHANNELS)))
    print_machine()
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        times = measure(Path(root), count, args.repeats, args.cold)
        files = len(list((Path(root) / "sharded").glob("*.npy")))
    size = 2 * count * TOKENS * CHANNELS / 1e9
    print(f"\n{count} rows of {TOKENS} x {CHANNELS}, {size:.2f} GB, {files} shards; n = {args.repeats}\n")
    print("| | one .npy, s | shards, s | shards / one |\n|---|---|---|---|")
    for name, (plain, sharded) in times.items():
        shown = [f"{statistics.median(t):.3f} ({min(t):.3f} to {max(t):.3f})" for t in (plain, sharded)]
        print(
            f"| {name} | {' | '.join(shown)} | {statistics.median(sharded) / statistics.median(plain):.2f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", default=None, help="where to write; the system's temporary folder otherwise"
    )
    parser.add_argument("--cold", action="store_true", help="drop the files from the system's cache first")
    main(parser.parse_args())
