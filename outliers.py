"""Synthetic outliers, made from normal images alone: what settings are chosen by (``--validate``)."""

import numpy as np
from PIL import Image

KINDS = ("rotated", "pasted", "blended")


def outlier(image: np.ndarray, other: np.ndarray, kind: str, rng: np.random.RandomState) -> np.ndarray:
    """A synthetic outlier of a kind (KINDS) from a normal image and another one: (H, W, 3), (h, w, 3)
    uint8 -> (H, W, 3)."""
    rows, columns = image.shape[:2]
    if kind == "rotated":
        turned = np.rot90(image, 1 + rng.randint(3))
        return (
            turned
            if turned.shape == image.shape
            else np.asarray(Image.fromarray(turned).resize((columns, rows)))
        )
    other = (
        np.asarray(Image.fromarray(other).resize((columns, rows))) if other.shape != image.shape else other
    )
    if kind == "blended":
        return ((image.astype(np.uint16) + other) // 2).astype(np.uint8)
    height, width = (max(1, int(side * rng.uniform(0.45, 0.75))) for side in (rows, columns))
    top, left, other_top, other_left = (
        rng.randint(side - size + 1) for side, size in ((rows, height), (columns, width)) * 2
    )
    pasted = image.copy()
    pasted[top : top + height, left : left + width] = other[
        other_top : other_top + height, other_left : other_left + width
    ]
    return pasted
