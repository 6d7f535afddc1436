"""Timing shared by the benchmarks: interleaved medians, the machine's matmul peak."""

import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import extractor  # noqa: E402
import utils  # noqa: E402
from backbone import arithmetic  # noqa: E402
from backbone.identity import cache_identity, settled  # noqa: E402
from cache.feature_cache import FeatureCache, ImageList  # noqa: E402
from cache.store import Store  # noqa: E402
from config import Config  # noqa: E402
from datasets import ImageSet  # noqa: E402


def extracted(config: Config, images: ImageSet, device: torch.device) -> FeatureCache:
    """The features of images that may have no place on the disk, extracted into the store of a
    configuration."""
    config, listed = settled(config, device, images), ImageList.of(images)
    store = Store(cache_identity(config))
    extractor.extract(config, images, store, extractor.absent_from(store, listed), device)
    return FeatureCache(store, listed)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(jobs: dict, repeats: int, device: torch.device, settle: int = 0) -> dict[str, float]:
    """Median seconds of each job, run in turns after one warm-up turn, so that all of them see the same
    machine. settle: how often a job runs before it is timed in a turn, where what the other left in caches
    and memory would not be there in use."""
    times = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            for _ in range(settle):
                job()
            wait(device)
            start = time.perf_counter()
            job()
            wait(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_peak(device: torch.device, dtype: torch.dtype, n: int | None = None) -> float:
    """FLOP/s of a large square matrix product (n x n): the best of twenty, half of them as training takes
    them."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    with torch.inference_mode():
        for turn in range(20):
            with arithmetic.products(device) if turn % 2 else nullcontext():
                wait(device)
                start = time.perf_counter()
                torch.matmul(a, b)
                wait(device)
                best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def print_machine() -> None:
    print(", ".join(f"{name} {value}" for name, value in utils.versions().items()), flush=True)
