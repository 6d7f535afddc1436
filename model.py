"""The normalizing flow: coupling layers whose subnets also see the fused patch tokens; its likelihood.

Notation (docs/method.md, section 1): y_sem (B, C) is the semantic token, y_patch (B, N, C) the patch tokens,
z (B, C) the latent; the log-determinant is log|det dz/dy_sem| in the forward direction and its negative in
reverse, as FrEIA asks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import numpy as np
import torch
from torch import Tensor, nn

from freq_fusion import build_fusion


class Inputs(NamedTuple):
    """What a flow takes: tokens (n, C) that it moves, and those (n, N, C) that the fusion sees."""

    tokens: Tensor
    seen: Tensor


class Subnet(nn.Module):
    """S: x (B, d) and patch tokens -> (B, out): three hidden layers beside the fused features, joined by a
    linear one (docs/method.md, eq. 5 to 7).

    Args:
        fusion: a module of freq_fusion (B, d), (B, N, C), (d) -> (B, H), or None for no fusion.
        identity_start: zero the last layer, so that the coupling starts as the identity.
    """

    def __init__(self, d: int, out: int, hidden: int, fusion: nn.Module | None, identity_start: bool):
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, hidden)
        self.fusion = fusion
        if fusion is not None:
            self.gamma = nn.Parameter(torch.ones(hidden))
        self.fc_out = nn.Linear(hidden if fusion is None else 2 * hidden, out)
        if identity_start:
            nn.init.zeros_(self.fc_out.weight)
            nn.init.zeros_(self.fc_out.bias)

    def forward(self, x: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
        h = x
        for layer in (self.fc1, self.fc2, self.fc3):
            h = layer(h).relu()
        if self.fusion is None:
            return self.fc_out(h)
        return self.fc_out(torch.cat([h, self.gamma * self.fusion(x, tokens, index)], 1))


class FusedCoupling(Fm.InvertibleModule):
    """One coupling layer (docs/method.md, eq. 1 to 4): a fixed permutation, then two affine halves, each
    conditioned on the other.

    Patch tokens come as they were cached, in their first channel order; ``token_order`` says where this layer
    finds its channels, so that tokens are never permuted.

    Args:
        dims_in: [(C,)], the semantic token. dims_c: [(N, C)], the patch tokens.
        order: (C) the layer's permutation. token_order: (C) the product of those up to this layer.
        make_subnet: (d, out) -> Subnet.
        clamp: alpha of the soft clamp.
    Raises:
        ValueError: dimensions that do not fit, when it is built, and when tokens of other shapes come.
    """

    def __init__(
        self,
        dims_in,
        dims_c=None,
        *,
        order: np.ndarray,
        token_order: np.ndarray,
        make_subnet: Callable[[int, int], Subnet],
        clamp: float,
    ):
        super().__init__(dims_in, dims_c)
        ranks = [[len(dims) for dims in each] for each in (self.dims_in, self.dims_c)]
        if ranks != [[1], [2]] or self.dims_c[0][1] != self.dims_in[0][0]:
            got = f"got {self.dims_in} and {self.dims_c}"
            raise ValueError(f"FusedCoupling takes one input of shape (C,) and one condition (N, C), {got}")
        channels = self.dims_in[0][0]
        self.clamp, self.split = clamp, channels // 2
        self.register_buffer("order", torch.from_numpy(order), persistent=False)
        self.register_buffer("inverse_order", torch.from_numpy(np.argsort(order)), persistent=False)
        self.register_buffer("p1", torch.from_numpy(token_order[: self.split]), persistent=False)
        self.register_buffer("p2", torch.from_numpy(token_order[self.split :]), persistent=False)
        self.s1 = make_subnet(self.split, 2 * (channels - self.split))  # sees y1, moves x2
        self.s2 = make_subnet(channels - self.split, 2 * self.split)  # sees x2, moves x1

    def forward(self, x_or_z, c=None, rev=False, jac=True):
        """([(B, C)], [(B, N, C)]) -> ([(B, C)], log-determinant (B) of the direction taken)."""
        (x,), (tokens,) = x_or_z, c
        self._check_shapes(x, tokens)
        if rev:
            y1, y2 = x[:, : self.split], x[:, self.split :]
            scale1, shift1 = self._affine(self.s1(y1, tokens, self.p1))
            x2 = (y2 - shift1) * torch.exp(-scale1)
            scale2, shift2 = self._affine(self.s2(x2, tokens, self.p2))
            x1 = (y1 - shift2) * torch.exp(-scale2)
            return (torch.cat([x1, x2], 1)[:, self.inverse_order],), -(scale1.sum(1) + scale2.sum(1))
        x = x.index_select(1, self.order)
        x1, x2 = x[:, : self.split], x[:, self.split :]
        scale2, shift2 = self._affine(self.s2(x2, tokens, self.p2))
        y1 = torch.addcmul(shift2, torch.exp(scale2), x1)
        scale1, shift1 = self._affine(self.s1(y1, tokens, self.p1))
        y2 = torch.addcmul(shift1, torch.exp(scale1), x2)
        return (torch.cat([y1, y2], 1).clamp(-1e6, 1e6),), scale1.sum(1) + scale2.sum(1)

    def _check_shapes(self, x: Tensor, tokens: Tensor) -> None:
        expected = (x.shape[0], *self.dims_c[0])
        if x.shape[1:] != self.dims_in[0] or tokens.shape != expected:
            got = f"got {tuple(x.shape)} and {tuple(tokens.shape)}"
            raise ValueError(f"expected a semantic token (B, {expected[2]}), patch tokens {expected}, {got}")

    def _affine(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Subnet output (B, 2 d') -> log-scale with the soft clamp, and shift, (B, d') each (docs/method.md,
        eq. 3; 0.636 stands for 2 / pi)."""
        s, t = out.chunk(2, 1)
        return self.clamp * 0.636 * torch.atan(s / self.clamp), t

    def output_dims(self, input_dims):
        return input_dims


def build_flow(
    channels: int,
    grid: tuple[int, int],
    *,
    n_tokens: int,
    n_blocks: int,
    hidden: int,
    clamp: float,
    fusion: str,
    identity_start: bool,
    **fusion_options,
) -> Ff.SequenceINN:
    """The flow: ``n_blocks`` coupling layers chained by FrEIA; layer k permutes C channels by
    numpy.random.RandomState(k).permutation(C). ``flow(y_sem, [y_patch])`` -> z (B, C), log-determinant (B).

    Args:
        channels: C. grid: rows and columns of the patch tokens. n_tokens: N; 0 where none are given.
        hidden: width H of the subnets. fusion, fusion_options: see ``freq_fusion.build_fusion``.
    Raises:
        ValueError: sizes that do not fit each other.
    """

    def make_subnet(d: int, out: int) -> Subnet:
        module = build_fusion(fusion, d, hidden, grid, channels=channels, **fusion_options)
        return Subnet(d, out, hidden, module, identity_start)

    flow = Ff.SequenceINN(channels)
    token_order = np.arange(channels)
    for k in range(n_blocks):
        order = np.random.RandomState(k).permutation(channels)
        token_order = token_order[order]
        flow.append(
            FusedCoupling,
            cond=0,
            cond_shape=(n_tokens, channels),
            order=order,
            token_order=token_order,
            make_subnet=make_subnet,
            clamp=clamp,
        )
    return flow


# ---------------------------------------------------------------- likelihood
LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)  # of the normal base density, nats per channel


def loss_per_image(z: Tensor, log_det: Tensor, outside: Tensor | float = 0.0, channels: int = 0) -> Tensor:
    """(0.5 |z|^2 - log|det J|) / C of every image (docs/method.md, eq. 11): its negative log-likelihood under
    a normal base density in nats per channel, without the constant. z (..., C), log_det (...) -> (...).

    outside (...): the squared length in directions that the flow does not see; channels: with these."""
    return (0.5 * (z.square().sum(-1) + outside) - log_det) / (channels or z.shape[-1])


def negative_log_likelihood(
    z: Tensor, log_det: Tensor, outside: Tensor | float = 0.0, channels: int = 0
) -> Tensor:
    """The same with its constant: -log p / C."""
    return loss_per_image(z, log_det, outside, channels) + LOG_ROOT_2PI
