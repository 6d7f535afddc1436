"""Pictures cut into tiles at their own resolution, and back from what was found of these to the whole."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

OVERLAP = 0.25  # of a tile's side that neighbours share, at least: what one cuts lies whole in another


class Tile(NamedTuple):
    """Where a tile lies in its picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """The part of a picture (H, W, ...) that lies in it."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def tiles_of(size: tuple[int, int], side: int) -> list[Tile]:
    """Squares of ``side`` pixels that cover a picture of a size (H, W), evenly spaced, row by row; as high or
    wide as the picture where it is smaller. A side of 0: one tile, the whole picture."""
    (height, rows), (width, columns) = (_spaced(length, side or length) for length in size)
    return [Tile(top, left, height, width) for top in rows for left in columns]


def _spaced(length: int, side: int) -> tuple[int, list[int]]:
    """The length of the parts that cover so many pixels, and where they begin."""
    side = min(side, length)
    count = 1 + math.ceil((length - side) / ((1 - OVERLAP) * side))
    return side, np.linspace(0, length - side, count).round().astype(int).tolist()


def whole_scores(scores: np.ndarray, pictures: Sequence) -> np.ndarray:
    """The scores of pictures from those of their tiles (n), the picture of each tile given (n), in order: the
    greatest, which a small defect does not share with the rest of its picture."""
    first = np.unique(np.asarray(pictures), return_index=True)[1]
    return np.maximum.reduceat(scores, np.sort(first)) if len(scores) else scores


def whole_map(maps: Sequence[np.ndarray], tiles: Sequence[Tile], size: tuple[int, int]) -> np.ndarray:
    """The map (H, W) of a picture from those of its tiles: where they overlap, the greater value."""
    whole = np.full(size, -np.inf, np.float32)
    for values, tile in zip(maps, tiles, strict=True):
        np.maximum(tile.of(whole), values, out=tile.of(whole))
    return whole
