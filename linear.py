"""A linear layer that takes oneDNN's float32 matrix product on the CPU, where PyTorch would take another
library's.

On AMD processors oneDNN's is about twice as quick for these sizes (benchmarks/RESULTS.md). The outcome is the
same up to float32 rounding. PyTorch offers the product as an operator of its compiler; where that operator is
missing, nn.Linear does the work."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K), weight (N, K), bias (N) -> x weight^T + bias (M, N), by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _works() -> bool:
    """Whether the operator, which is private to PyTorch, is there and multiplies: asked once, with a tiny
    product."""
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.backends.mkldnn.is_available() and torch.allclose(product(x, weight), x @ weight.t())
    except (AttributeError, RuntimeError, TypeError):
        return False


AVAILABLE = _works()


def is_traced() -> bool:
    """Whether the code is being compiled, exported or traced: PyTorch's own operators are wanted then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class _Linear(torch.autograd.Function):
    """``product`` with its gradient, which is two such products."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        x = x.contiguous()  # oneDNN is slow, very slow backwards, on rows with gaps
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        to_weight = product(gradient.t(), x.t()) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, gradient.sum(0) if ctx.has_bias else None


class Linear(nn.Linear):
    """nn.Linear, by oneDNN for float32 matrices on the CPU. ``plain`` keeps to nn.Linear: transforms of
    torch.func need that; so does whoever compiles, exports or traces it."""

    plain = False

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.plain
            or not AVAILABLE
            or x.device.type != "cpu"
            or x.dtype != torch.float32
            or x.dim() != 2
            or is_traced()
            or x.shape[0] == 0
        ):
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)
