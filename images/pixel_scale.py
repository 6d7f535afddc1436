"""What is black and what is white in pictures of more than eight bits: one range for a whole data set."""

import functools
from collections.abc import Callable

import numpy as np

BITS = (8, 10, 12, 14, 16)  # that cameras and files have
UNKNOWN = {"integer": [0, 65535], "float": [0, 1]}  # where the training pictures are of another kind


class PixelScale:
    """The ranges [black, white] of a data set, as JSON has them: {"integer": [0, 4095]}, {"float": [0, 1]},
    both or neither.

    ranges: those that are known; else ``measure`` gives them when they are first asked for. clipped: how many
    of the pictures read so far have values beyond."""

    def __init__(self, ranges: dict | None = None, measure: Callable[[], dict] = dict):
        if ranges is not None:
            self.ranges = ranges
        self._measure, self.clipped = measure, 0

    @functools.cached_property
    def ranges(self) -> dict:
        return self._measure()

    def to_bytes(self, values: np.ndarray) -> np.ndarray:
        """Values of any shape -> uint8, what lies beyond the range clipped. Raises ValueError on values that
        are not finite."""
        if not np.isfinite((float(values.min()), float(values.max()))).all():
            raise ValueError("its values are not finite")
        black, white = self.ranges.get(kind_of(values), UNKNOWN[kind_of(values)])
        scaled = ((values.astype(np.float32) - black) * (255 / (white - black))).round()
        self.clipped += bool(scaled.min() < 0 or scaled.max() > 255)
        return scaled.clip(0, 255).astype(np.uint8)

    def beyond(self) -> str:
        """The line on the pictures that were clipped; "" without any."""
        known, count = UNKNOWN | self.ranges, f"{self.clipped} picture{'s' * (self.clipped > 1)}"
        told = f"{count} with pixels beyond {known['integer']} (floats: {known['float']}), which are clipped"
        return told if self.clipped else ""


def kind_of(values: np.ndarray) -> str:
    return "float" if values.dtype.kind == "f" else "integer"


def range_for(least: float, most: float, kind: str) -> list[float]:
    """The range of training pictures with these extremes: from 0, or where much is negative from the other
    side of it, to 1.0 (floats; a resized picture may go a little beyond) or the next whole number of bits."""
    largest = max(most, -least)
    bits = next((bits for bits in BITS if largest < 2**bits), int(largest).bit_length())
    white = 1 if kind == "float" and largest < 2 else 2**bits - 1
    return [-white if least < -white / 10 else 0, white]
