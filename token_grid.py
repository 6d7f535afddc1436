"""Which patch tokens of the backbone's grid are kept: the whole grid, a pooled one, or two frequency bands
per window.

Adding a kind of grid means adding it here and naming it in the help of config.py's ``token_grid``."""

import dataclasses
import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from config import UserError


def window_of(grid: tuple[int, int], window: int) -> Tensor:
    """The window that each patch of the grid lies in -> (N), row by row; the last windows may be smaller."""
    rows, columns = torch.arange(grid[0]) // window, torch.arange(grid[1]) // window
    return (rows[:, None] * math.ceil(grid[1] / window) + columns).flatten()


@functools.lru_cache(maxsize=8)
def _window_means(grid: tuple[int, int], window: int) -> tuple[Tensor, Tensor]:
    """The window of each patch (N), and the matrix (W, N) that averages the patches of each window."""
    owner = window_of(grid, window)
    averaging = F.one_hot(owner).t().float()
    return owner, averaging / averaging.sum(1, keepdim=True)


def split_bands(patches: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """A patch grid as two bands per window (docs/method.md, eq. 13): a low one (mean) and a high one (what
    the mean loses).

    The high band is the root mean square deviation from the window's mean, per channel: low^2 + high^2 is the
    window's mean energy, so no energy is lost, only its place inside the window and its sign.

    patches (B, N, C) -> (B, 2 W, C): W low-band tokens, then W high-band tokens."""
    owner, averaging = _window_means(grid, window)
    owner, averaging = owner.to(patches.device), averaging.to(patches)
    low = torch.matmul(averaging, patches)
    high = torch.matmul(averaging, (patches - low[:, owner]).square()).sqrt()
    return torch.cat([low, high], 1)


@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """The kind of grid that is kept. ``name``: full, compact, or the side g of a pooled grid.

    pooling "released" reads (B, N, C) as (B, C, rows, columns) without a transpose, as the released code did
    (docs/method.md, section 7): tokens and channels are mixed before pooling. It is kept for parity only.
    """

    name: str
    pooling: str
    window: int

    @property
    def bands(self) -> bool:
        """Whether the tokens are two bands per window instead of places on a grid."""
        return self.name == "compact"

    @property
    def side(self) -> int | None:
        """The side of a pooled grid; None for the others."""
        return int(self.name) if self.name.isdigit() else None

    @property
    def key(self) -> str:
        """The grid's part of a cache folder's name."""
        return f"{self.name}{self.window}" if self.bands else self.name

    def fields(self) -> dict:
        """What a cache records of the grid: settings that change nothing are left out of the comparison."""
        return {
            "token_grid": self.name,
            "window": self.window if self.bands else None,
            "pooling": self.pooling if self.side else "correct",
        }

    def cached_shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns kept of the backbone's grid (of windows, for bands). Raises UserError on more than
        it has."""
        if self.bands:
            return math.ceil(grid[0] / self.window), math.ceil(grid[1] / self.window)
        if self.side is None:
            return grid
        if self.side > min(grid):
            raise UserError(
                f"token_grid: {self.side}x{self.side} is more than the backbone's {grid[0]}x{grid[1]} "
                f"patches; "
                f"choose at most {min(grid)}, or full"
            )
        return self.side, self.side

    def n_tokens(self, cached_shape: tuple[int, int]) -> int:
        """Patch tokens per image, N, from the rows and columns kept."""
        return math.prod(cached_shape) * (2 if self.bands else 1)

    def pool(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The backbone's tokens (B, 1 + rows x columns, C) -> the tokens kept (B, 1 + N, C)."""
        if self.name == "full":
            return tokens
        semantic, patches = tokens[:, :1], tokens[:, 1:]
        if self.bands:
            return torch.cat([semantic, split_bands(patches, grid, self.window)], 1)
        batch, _, channels = patches.shape
        if self.pooling == "released":
            maps = patches.reshape(batch, channels, *grid)
        else:
            maps = patches.transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, rows, columns)
        pooled = F.adaptive_avg_pool2d(maps, self.side)  # (B, C, g, g)
        return torch.cat([semantic, pooled.flatten(2).transpose(1, 2)], 1)
