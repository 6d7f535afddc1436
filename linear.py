"""A linear layer that takes oneDNN's float32 matrix product on the CPU, where PyTorch would take another
library's.

On AMD processors oneDNN's is about twice as quick for these sizes (benchmarks/RESULTS.md). The outcome is the
same up to float32 rounding. PyTorch offers the product as an operator of its compiler; where that operator is
missing, nn.Linear does the work."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "none") -> Tensor:
    """x (M, K), weight (N, K), bias (N) -> x weight^T + bias (M, N), by oneDNN; act "relu": its positive
    part."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], "")


def _works() -> bool:
    """Whether the operator, which is private to PyTorch, is there and multiplies: asked once, with a tiny
    product."""
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        right = x @ weight.t()
        return (
            torch.backends.mkldnn.is_available()
            and torch.allclose(product(x, weight), right)
            and torch.allclose(product(x, -weight, act="relu"), (-right).relu())
        )
    except (AttributeError, RuntimeError, TypeError):
        return False


AVAILABLE = _works()


def is_traced() -> bool:
    """Whether the code is being compiled, exported or traced: PyTorch's own operators are wanted then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@functools.cache
def batched_by_onednn() -> bool:
    """Whether float32 products of stacked matrices that are allowed bfloat16 go to oneDNN and come out as
    exact as ever: so on processors without bfloat16 tiles (AMX). On one thread it is quicker than the library
    that PyTorch takes otherwise, on two slower (benchmarks/RESULTS.md)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 8, 300, generator=generator), torch.randn(4, 300, 50, generator=generator)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (a @ b - a.double() @ b.double()).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    return AVAILABLE and error < 1e-4  # of values about 17; bfloat16 would be off by 0.1


@contextmanager
def products(matmul: str, device: torch.device) -> Iterator[None]:
    """float32 products by the knob ``matmul``: in TF32 on a GPU that is told so; on a CPU by oneDNN, stacked
    matrices too, where that costs no digits."""
    before, wanted = torch.get_float32_matmul_precision(), None
    if device.type == "cuda" and matmul == "tf32":
        wanted = "high"
    elif device.type == "cpu" and torch.get_num_threads() == 1 and batched_by_onednn():
        wanted = "medium"
    torch.set_float32_matmul_precision(wanted or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def forward_precision(matmul: str, device: torch.device) -> AbstractContextManager:
    """What the forward pass of a training step runs under: bfloat16 products where ``matmul`` says so, of
    weights that stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if matmul == "bfloat16" else nullcontext()


class _Linear(torch.autograd.Function):
    """``product`` with its gradient, which is two such products."""

    @staticmethod
    def forward(ctx, x, weight, bias, relu):
        x = x.contiguous()  # oneDNN is slow, very slow backwards, on rows with gaps
        y = product(x, weight, bias, "relu" if relu else "none")
        ctx.save_for_backward(x, weight, *([y] if relu else []))
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, *positive = ctx.saved_tensors
        gradient = gradient.contiguous()
        if positive:
            gradient = torch.ops.aten.threshold_backward(gradient, positive[0], 0)
        to_x = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        to_weight = product(gradient.t(), x.t()) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, gradient.sum(0) if ctx.has_bias else None, None


class Linear(nn.Linear):
    """nn.Linear, with ``relu`` its positive part, by oneDNN for float32 matrices on the CPU. ``plain`` keeps
    to nn.Linear: transforms of torch.func need that; so does whoever compiles, exports or traces it."""

    plain = False

    def __init__(self, inputs: int, outputs: int, bias: bool = True, relu: bool = False):
        super().__init__(inputs, outputs, bias)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.plain
            or not AVAILABLE
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or x.dim() != 2
            or is_traced()
            or torch.is_autocast_enabled("cpu")
            or x.shape[0] == 0
        ):
            y = super().forward(x)
            return y.relu() if self.relu else y
        return _Linear.apply(x, self.weight, self.bias, self.relu)
