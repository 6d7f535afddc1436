"""Timing shared by the benchmarks: interleaved medians, the machine's matmul peak."""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import linear  # noqa: E402
import utils  # noqa: E402


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(jobs: dict, repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each job, run in turns after one warm-up turn, so that all of them see the same
    machine."""
    times = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            wait(device)
            start = time.perf_counter()
            job()
            wait(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_peak(device: torch.device, dtype: torch.dtype, n: int | None = None) -> float:
    """FLOP/s of a large square matrix product (n x n): the best of twenty, by PyTorch's own product and by
    oneDNN's."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    products = [torch.matmul] + ([linear.product] if device.type == "cpu" and linear.AVAILABLE else [])
    best = float("inf")
    with torch.inference_mode():
        for product in products * 10:
            wait(device)
            start = time.perf_counter()
            product(a, b)
            wait(device)
            best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def print_machine() -> None:
    print(", ".join(f"{name} {value}" for name, value in utils.versions().items()), flush=True)
