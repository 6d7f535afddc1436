"""Which patch tokens of the backbone's grid are kept: the whole grid, or a pooled one.

Adding a kind of grid means adding it here and naming it in the help of config.py's ``token_grid``."""

import dataclasses
import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from config import UserError

PLACE_CHANNELS = 192  # of a place token, at most


def centred_window(grid: tuple[int, int], share: float) -> Tensor:
    """Weights (N), summing to 1, of a Gaussian on the grid's centre, its sigma ``share`` times the sides."""
    rows, columns = (
        torch.softmax(-0.5 * ((torch.arange(side) - (side - 1) / 2) / (share * side)).square(), 0)
        for side in grid
    )
    return torch.outer(rows, columns).flatten()


@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """The kind of grid that is kept. ``name``: full, or the side g of a pooled grid.

    pooling "released" reads (B, N, C) as (B, C, rows, columns) without a transpose, as the released code did
    (docs/method.md, section 7): tokens and channels are mixed before pooling. It is kept for parity only."""

    name: str
    pooling: str

    @classmethod
    def named(cls, knob: str) -> "TokenGrid":
        """The grid that the knob ``token_grid`` names; released8 is 8 pooled as released."""
        name = knob.removeprefix("released")
        return cls(name, "correct" if name == knob else "released")

    def cached_shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns kept of the backbone's grid. Raises UserError on more than it has."""
        if self.name == "full":
            return grid
        if (side := int(self.name)) > min(grid):
            raise UserError(
                f"token_grid: {side}x{side} is more than the backbone's {grid[0]}x{grid[1]} patches; choose "
                f"at most {min(grid)}, or full"
            )
        return side, side

    def pool(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The backbone's tokens (B, 1 + rows x columns, C) -> the tokens kept (B, 1 + N, C)."""
        if self.name == "full":
            return tokens
        semantic, patches = tokens[:, :1], tokens[:, 1:]
        batch, _, channels = patches.shape
        if self.pooling == "released":
            maps = patches.reshape(batch, channels, *grid)
        else:
            maps = patches.transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, rows, columns)
        pooled = F.adaptive_avg_pool2d(maps, int(self.name))  # (B, C, g, g)
        return torch.cat([semantic, pooled.flatten(2).transpose(1, 2)], 1)


# ---------------------------------------------------------------- the band token
# What Bands and Places compute, in the fields of every store that holds them: raised with each change of it.
# 2: means at the border are of the cells there.
OF_MAPS = 2


def dct_basis(frequency: Tensor, length: int) -> Tensor:
    """The orthonormal DCT-II: cosines of frequencies (...) at ``length`` places -> (..., length), float64."""
    places = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    scale = (torch.where(frequency == 0, 1, 2).double() / length).sqrt()
    return torch.cos(math.pi * frequency.double()[..., None] * places) * scale[..., None]


@functools.lru_cache(maxsize=32)
def dct_matrix(length: int) -> Tensor:
    """The DCT-II of ``length`` numbers: row k is the cosine of frequency k -> (length, length), float32."""
    return dct_basis(torch.arange(length), length).float()


@functools.lru_cache(maxsize=32)
def ring_of(grid: tuple[int, int], rings: int) -> Tensor:
    """The ring that each DCT coefficient of a map lies in -> one-hot (rings, rows, columns).

    Rings are octaves of the radial frequency, counted down from the highest: with three, up to a quarter of
    the map's highest frequency, up to a half, and beyond. The constant lies in none."""
    u, v = (torch.arange(side) / side for side in grid)
    radius = torch.hypot(u[:, None], v[None])
    edges = torch.tensor([2.0 ** (k - rings) for k in range(1, rings)])
    member = F.one_hot(torch.bucketize(radius, edges), rings).permute(2, 0, 1).float()
    member[:, 0, 0] = 0
    return member


@dataclasses.dataclass(frozen=True)
class Bands:
    """The band token (docs/method.md, eq. 13 to 15): what maps of several depths hold at each frequency.

    Per depth and channel: ``low``, the map's mean under a Gaussian window on its centre (sigma in shares of
    its sides); ``rings`` numbers, the root mean energy of the map's DCT in rings of frequency, without the
    constant; ``peak``, the root of the largest local energy (3 x 3 mean of the squared deviation)."""

    rings: int = 2
    sigma: float = 0.15

    @property
    def statistics(self) -> tuple[str, ...]:
        return ("low", *(f"ring{k + 1}" for k in range(self.rings)), "peak")

    def columns(self, channels: tuple[int, ...], statistics: tuple[str, ...], depths: range) -> list[range]:
        """Where the chosen statistics of the chosen depths stand in the token: a range of columns each."""
        columns, start = [], 0
        for depth, width in enumerate(channels):
            for statistic in self.statistics:
                if depth in depths and statistic in statistics:
                    columns.append(range(start, start + width))
                start += width
        return columns

    def measure(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, C_i, rows_i, columns_i) of several depths -> the band token (B, D), float32; depth by
        depth, in each statistic by statistic, in each channel by channel."""
        return torch.cat([self._measure_map(features.float()) for features in maps], 1)

    def _measure_map(self, features: Tensor) -> Tensor:
        grid = (int(features.shape[2]), int(features.shape[3]))  # tracing has tensors for them
        deviation = features - features.mean((2, 3), keepdim=True)
        low = torch.matmul(features.flatten(2), centred_window(grid, self.sigma).to(features.device))
        # Every coefficient: what other rings leave of the total would be rounding where the highest is weak.
        rows, columns = (dct_matrix(side).to(features.device) for side in grid)
        spectrum = torch.matmul(torch.matmul(rows, deviation), columns.t()).square()
        member = ring_of(grid, self.rings).to(features.device)
        energy = torch.matmul(spectrum.flatten(2), member.flatten(1).t()).transpose(1, 2) / math.prod(grid)
        peak = F.avg_pool2d(deviation.square(), 3, 1, 1, count_include_pad=False).amax((2, 3)).sqrt()
        return torch.cat([low, energy.sqrt().flatten(1), peak], 1)


# ---------------------------------------------------------------- places
def place_grid(side: int, img_size: tuple[int, int], own_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of places of an image of any shape: side x side of a square one, in proportion of
    others; of as many pixels a place as at the backbone's own size where the image is larger than that."""
    pixels = math.sqrt(min(math.prod(img_size), math.prod(own_size))) / side  # of a place's side
    return max(1, round(img_size[0] / pixels)), max(1, round(img_size[1] / pixels))


def place_grid_of(features: dict) -> tuple[int, int]:
    """Rows and columns of the places that a cache's fields tell of: a square unless they say otherwise."""
    side = math.isqrt(features["place_shape"][0])
    rows, columns = features.get("place_grid") or (side, side)
    return rows, columns


@dataclasses.dataclass(frozen=True)
class Places:
    """Place tokens (docs/method.md, section 5.3): what the maps of middle depths hold at each place of one
    grid (rows, columns), the deepest depth left out unless it is alone. A local defect shows in the tokens of
    its place alone.

    channels: at most so many per place; more are brought down by a fixed random ``rotation``."""

    grid: tuple[int, int]
    channels: int = PLACE_CHANNELS

    def measure(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, C_i, rows_i, columns_i) of several depths -> place tokens (B, rows x columns, D), float32:
        3 x 3 means, brought to the grid and joined (as PatchCore does, arXiv 2106.08265, section 3.1)."""
        resized = [self._resize(features.float()) for features in maps[:-1] or maps]
        tokens = torch.cat(resized, 1).flatten(2).transpose(1, 2)
        width = int(tokens.shape[2])
        return tokens if width <= self.channels else tokens @ rotation(width, self.channels).to(tokens.device)

    def _resize(self, features: Tensor) -> Tensor:
        sides = [int(side) for side in features.shape[2:]]
        pools = sides[0] >= self.grid[0] and sides[1] >= self.grid[1]
        rows, columns = (place_weights(*ends, pools).to(features.device) for ends in zip(sides, self.grid))
        return torch.matmul(torch.matmul(rows, features), columns.t())


@functools.lru_cache(maxsize=32)
def place_weights(before: int, after: int, pools: bool) -> Tensor:
    """How much each of ``before`` cells in a row counts at each of ``after`` places -> (after, before),
    float32: 3 x 3 means, at the border of the cells there are, averaged where ``pools``, else interpolated.
    Both take rows and columns in turn."""
    cells = torch.eye(before).unsqueeze(1)  # (before, 1, before)
    smooth = F.avg_pool1d(cells, 3, 1, 1, count_include_pad=False)
    if pools:
        return F.adaptive_avg_pool1d(smooth, after).squeeze(1).t()
    return F.interpolate(smooth, after, mode="linear", align_corners=False).squeeze(1).t()


@functools.lru_cache(maxsize=4)
def rotation(before: int, after: int) -> Tensor:
    """A fixed random matrix (before, after), columns orthogonal; it keeps lengths on average."""
    generator = torch.Generator().manual_seed(0)
    columns, _ = torch.linalg.qr(torch.randn(before, after, generator=generator, dtype=torch.float64))
    return (columns * math.sqrt(before / after)).float()


OfMaps = dict[str, Bands | Places]  # what is kept of the maps of several depths, by the name of its array
