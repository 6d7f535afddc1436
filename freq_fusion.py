"""Multi-frequency fusion: what a subnet of the flow learns from the patch tokens (docs/method.md, section 3).

Notation: B images, C channels of a token, N patch tokens on a grid of (rows, columns), d channels that one
subnet sees (half of C), H hidden width. Each module maps the semantic half x (B, d) and the patch halves p
(B, N, d) to (B, H).

The semantic token is the only query, which makes attention cheap without changing its value:
    q . (W_k m_i) = (W_k^T q) . m_i        and        sum_i a_i W_v m_i = W_v (sum_i a_i m_i),
so tokens are never projected: O(heads N d) per image instead of O(N d^2). Nor are they ever moved: a module
reads its d channels out of whole tokens (B, N, C) through ``index`` (d), by putting the projected query at
these channels and zero elsewhere.

A new module: write it here with the same ``forward``, made from d, hidden, grid and, by name, what it needs
of ``build_fusion``'s options; add it to FUSIONS and its name to config.FUSIONS.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.token_grid import dct_basis

# The frequencies that FcaNet (arXiv 2012.11879) ranks first on a 7 x 7 grid: (row, column), best first.
TOP16 = ((0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0),
         (5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2))  # fmt: skip


# ---------------------------------------------------------------- one query, many tokens
def take(x: Tensor, index: Tensor) -> Tensor:
    """The entries ``index`` (n) of the last dimension of x (..., m) -> (..., n). As ``index_select``, whose
    kernel takes four times as long here, on a CPU."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def put(x: Tensor, index: Tensor, size: int) -> Tensor:
    """x (..., n) at ``index`` (n) in a last dimension of ``size``, else zero: the adjoint of ``take``."""
    return x.new_zeros(*x.shape[:-1], size).scatter(-1, index.expand(*x.shape[:-1], -1), x)


def fold_keys(query: Tensor, weight: Tensor) -> Tensor:
    """W_k^T q for every head: query (B, heads, w), weight (heads * w, d) -> (B, heads, d)."""
    heads, width = query.shape[1:]
    return torch.bmm(query.transpose(0, 1), weight.view(heads, width, -1)).transpose(0, 1)


def project_values(mixed: Tensor, weight: Tensor) -> Tensor:
    """W_v of every head's mixed token: mixed (B, heads, d), weight (heads * w, d) -> (B, heads * w)."""
    heads, d = mixed.shape[1:]
    values = torch.bmm(mixed.transpose(0, 1), weight.view(heads, -1, d).transpose(1, 2))  # (heads, B, w)
    return values.transpose(0, 1).flatten(1)


def token_logits(query: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
    """Inner products of query (B, heads, d) and channels ``index`` of tokens (B, N, C) -> (B, heads, N)."""
    return torch.bmm(put(query, index, tokens.shape[-1]), tokens.transpose(1, 2))


def mix_tokens(weights: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
    """Weighted sums of the channels ``index``: weights (B, heads, N), tokens (B, N, C) -> (B, heads, d)."""
    return take(torch.bmm(weights, tokens), index)


class ClassAttention(nn.Module):
    """SANF-AD's class attention (its CAFF module), which the released flow calls (docs/method.md, eq. 8).

    The semantic token asks, itself and the patch tokens answer, by four heads (d where that is less). No
    biases but the projection's."""

    def __init__(self, d: int, hidden: int, grid: tuple[int, int], **_):
        super().__init__()
        self.heads = min(4, d)
        self.width = d // self.heads
        inner = self.heads * self.width
        self.q = nn.Linear(d, inner, bias=False)
        self.k = nn.Linear(d, inner, bias=False)
        self.v = nn.Linear(d, inner, bias=False)
        self.proj = nn.Linear(inner, hidden)

    def forward(self, x: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
        """x (B, d), tokens (B, N, C), index (d) into C -> (B, H)."""
        query = self.q(x).view(-1, self.heads, self.width) * self.width**-0.5
        query = fold_keys(query, self.k.weight)  # (B, heads, d)
        own = torch.bmm(query, x.unsqueeze(2))  # (B, heads, 1): the semantic token's own logit
        weights = torch.cat([own, token_logits(query, tokens, index)], 2).softmax(2)
        mixed = torch.addcmul(mix_tokens(weights[..., 1:], tokens, index), weights[..., :1], x.unsqueeze(1))
        return self.proj(project_values(mixed, self.v.weight))


class HiLo(nn.Module):
    """HiLo attention (arXiv 2205.13213) of the semantic token as the only query (docs/method.md, eq. 9, 10).

    Of eight heads (d where that is less) the share ``alpha`` is Lo-Fi. Hi-Fi heads attend inside each window
    of ``window`` x ``window`` patches; the window results are averaged. Lo-Fi heads attend over the windows'
    mean tokens. A mean token's logit is the mean of its patches' logits, so both kinds share one pass over
    the full grid. A grid that the window does not divide ends in smaller windows."""

    def __init__(self, d: int, hidden: int, grid: tuple[int, int], *, alpha: float, window: int, **_):
        super().__init__()
        heads = min(8, d)
        self.width = d // heads
        self.low = int(heads * alpha)
        self.high = heads - self.low
        low_out = hidden * self.low // heads
        if self.low and not low_out:
            raise ValueError(
                f"hilo with {heads} heads and alpha {alpha} needs a wider subnet than fc_internal {hidden}"
            )
        for name, count, out in (("h", self.high, hidden - low_out), ("l", self.low, low_out)):
            if count:
                inner = count * self.width
                self.add_module(f"{name}_q", nn.Linear(d, inner, bias=False))
                # its rows: (2, heads, width)
                self.add_module(f"{name}_kv", nn.Linear(d, 2 * inner, bias=False))
                self.add_module(f"{name}_proj", nn.Linear(inner, out))
        members = window_members(grid, min(window, max(grid)))  # a wider window holds no more patches
        sizes = (members >= 0).sum(1)
        flat = members.flatten()
        # (W * window^2) patches, window by window; (N) patch -> its place there
        self.register_buffer("members", flat.clamp(min=0), persistent=False)
        self.register_buffer("padding", flat < 0, persistent=False)
        self.register_buffer("place", torch.argsort(flat)[(flat < 0).sum() :], persistent=False)
        averaging = F.one_hot(window_of(grid, window), len(sizes)).double() / sizes  # (N, W)
        self.register_buffer("averaging", averaging, persistent=False)
        self.n_windows = len(sizes)

    def forward(self, x: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
        """x (B, d), tokens (B, N, C), index (d) into C -> (B, H)."""
        queries, values, projections = [], [], []
        for name, count in (("h", self.high), ("l", self.low)):
            if count:
                query = getattr(self, f"{name}_q")(x).view(-1, count, self.width) * self.width**-0.5
                keys, value = getattr(self, f"{name}_kv").weight.chunk(2)
                queries.append(fold_keys(query, keys))
                values.append(value)
                projections.append(getattr(self, f"{name}_proj"))
        high, low = token_logits(torch.cat(queries, 1), tokens, index).split([self.high, self.low], 1)
        weights = torch.cat([self._window_weights(high), self._mean_weights(low)], 1)
        parts = mix_tokens(weights, tokens, index).split([q.shape[1] for q in queries], 1)  # (B, heads, d)
        return torch.cat([proj(project_values(m, v)) for proj, m, v in zip(projections, parts, values)], 1)

    def _window_weights(self, logits: Tensor) -> Tensor:
        """Softmax inside each window, windows averaged: (B, heads, N) -> (B, heads, N)."""
        windows = take(logits, self.members).masked_fill(self.padding, -torch.inf)  # (B, heads, W * window^2)
        weights = windows.unflatten(2, (self.n_windows, -1)).softmax(3).flatten(2) / self.n_windows
        return take(weights, self.place)

    def _mean_weights(self, logits: Tensor) -> Tensor:
        """Softmax over the windows' means, spread over their patches: (B, heads, N) -> (B, heads, N)."""
        averaging = self.averaging.to(logits.dtype)  # made in float64, for a double module
        return torch.matmul(torch.matmul(logits, averaging).softmax(2), averaging.t())


class SpectralGate(nn.Module):
    """Multi-spectral channel attention (FcaNet, arXiv 2012.11879): DCT coefficients gate a map's channels.

    Channels are split evenly among the sixteen frequencies of ``TOP16``, whose indices are scaled by ``grid
    // 6``, as in the released code (FcaNet scales for a 7 x 7 space). By that scaling three of the sixteen
    filters are zero on grids whose sides are multiples of 6, ViT-B's 24 among them: a cosine whose frequency
    equals the side of the grid vanishes at every patch."""

    def __init__(self, channels: int, grid: tuple[int, int]):
        super().__init__()
        if min(grid) < 6:
            raise ValueError(f"spectral fusion needs a token grid of at least 6x6, got {grid[0]}x{grid[1]}")
        # (C) which of the sixteen a channel takes
        frequency = torch.arange(channels) * len(TOP16) // channels
        filters = torch.stack([dct_filter(u * (grid[0] // 6), v * (grid[1] // 6), grid) for u, v in TOP16])
        self.dct_layer = nn.Module()
        self.dct_layer.register_buffer("weight", filters[frequency].float())  # (C, rows, columns)
        self.register_buffer("filters", filters.flatten(1).double(), persistent=False)  # (16, N)
        self.register_buffer("frequency", frequency, persistent=False)
        squeezed = max(channels // 16, 1)
        self.fc = nn.Sequential(
            nn.Linear(channels, squeezed, bias=False),
            nn.ReLU(),
            nn.Linear(squeezed, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Gate a map (B, C, rows, columns) -> the same shape."""
        return x * self.fc((x * self.dct_layer.weight).sum((2, 3)))[..., None, None]

    def gate_tokens(self, tokens: Tensor, index: Tensor) -> Tensor:
        """The gate of the channels ``index`` of tokens (B, N, C) -> (B, d), without moving them."""
        spectrum = torch.matmul(self.filters.to(tokens.dtype), tokens)  # (B, 16, C): all coefficients
        return self.fc(take(spectrum.flatten(1), self.frequency * tokens.shape[2] + index))


class Spectral(nn.Module):
    """Frequency channel attention over the patches, pooled, added to the semantic half, projected to H.

    The released code defines the gate but never connects it to the flow; pooling and projection are ours."""

    def __init__(self, d: int, hidden: int, grid: tuple[int, int], **_):
        super().__init__()
        self.gate = SpectralGate(d, grid)
        self.proj = nn.Linear(d, hidden)

    def forward(self, x: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
        """x (B, d), tokens (B, N, C), index (d) into C -> (B, H)."""
        pooled = take(tokens.mean(1), index)  # the gate does not vary over the grid
        return self.proj(x + self.gate.gate_tokens(tokens, index) * pooled)


class BandProjection(nn.Module):
    """A learned projection of the bands that a place sees of its image (docs/method.md, eq. 18): what is left
    of HiLo where each band has one window, so that there is nothing to choose from. All channels of the bands
    are seen, those that the subnet moves among them. ``grid``: 1 x N, the bands, of C ``channels`` each."""

    def __init__(self, d: int, hidden: int, grid: tuple[int, int], *, channels: int, **_):
        super().__init__()
        self.proj = nn.Linear(math.prod(grid) * channels, hidden)

    def forward(self, x: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
        """x (B, d), tokens (B, N, C), index (d) into C, not needed -> (B, H)."""
        return self.proj(tokens.flatten(1))


FUSIONS: dict[str, type[nn.Module] | None] = {
    "class_attention": ClassAttention,
    "hilo": HiLo,
    "spectral": Spectral,
    "bands": BandProjection,
    "none": None,
}


def build_fusion(
    name: str, d: int, hidden: int, grid: tuple[int, int], *, channels: int, alpha: float, window: int
) -> nn.Module | None:
    """The fusion module ``name`` (FUSIONS) for d channels and width ``hidden``; None for no fusion.

    Args:
        grid: rows and columns of the patch tokens. channels: C, of a whole token. alpha, window: of hilo.
    Raises:
        ValueError: an unknown name, or sizes that do not fit.
    """
    if name not in FUSIONS:
        raise ValueError(f"unknown fusion {name!r}: expected {', '.join(FUSIONS)}")
    module = FUSIONS[name]
    return module and module(d, hidden, grid, channels=channels, alpha=alpha, window=window)


# ---------------------------------------------------------------- grids, windows, frequencies
def window_of(grid: tuple[int, int], window: int) -> Tensor:
    """The window that each patch of the grid lies in -> (N), row by row; the last windows may be smaller. On
    the CPU, so that a module on the device meta can count its windows."""
    rows, columns = (torch.arange(side, device="cpu") // window for side in grid)
    return (rows[:, None] * math.ceil(grid[1] / window) + columns).flatten()


def window_members(grid: tuple[int, int], window: int) -> Tensor:
    """The patches of each window -> (W, window^2), filled up with -1 where a window is smaller."""
    owner = window_of(grid, window)
    windows = [torch.nonzero(owner == w).flatten() for w in range(int(owner.max()) + 1)]
    return torch.stack([F.pad(patches, (0, window * window - len(patches)), value=-1) for patches in windows])


def dct_filter(u: int, v: int, grid: tuple[int, int]) -> Tensor:
    """The orthonormal 2-D DCT-II basis function of frequency (u, v) on a grid -> (rows, columns), float64."""
    return torch.outer(*(dct_basis(torch.tensor(f), side) for f, side in zip((u, v), grid)))
