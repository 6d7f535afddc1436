"""How products of matrices are computed.

On AMD processors oneDNN's float32 products are about twice as quick, for the sizes of a flow, as those of the
library that PyTorch takes by itself (benchmarks/RESULTS.md). PyTorch uses oneDNN when the precision of
products is "medium"; on processors without bfloat16 tiles (AMX) they stay full float32 all the same."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@functools.cache
def exact_by_onednn() -> bool:
    """Whether float32 products, of matrices and of stacks of them, that are allowed bfloat16 come out as
    exact as ever on this CPU: asked once, with small ones."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 8, 300, generator=generator), torch.randn(4, 300, 50, generator=generator)
    with _by_onednn():
        error = max((x @ y - x.double() @ y.double()).abs().max().item() for x, y in ((a, b), (a[0], b[0])))
    return error < 1e-4  # of values about 17; bfloat16 would be off by 0.1


@contextmanager
def _by_onednn() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def products(device: torch.device) -> AbstractContextManager:
    """What float32 products of the detector run under: on a CPU by oneDNN, where that costs no digits."""
    return _by_onednn() if device.type == "cpu" and exact_by_onednn() else nullcontext()
