"""Where is it? Heat maps of pictures, how good they are against masks of the defects, and their overlays.

Two kinds (compared by tools/heat_maps.py): of place tokens, how unusual each place is under its own
Gaussian, where the score reads places; else by occlusion, how much the score falls when a part of the
picture is blurred, which any detector allows."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy import ndimage
from torch.nn import functional as F

import utils

SIDE = 8  # parts of a picture's side that occlusion blurs one after the other
MOST_FALSE = 0.3  # false positive rate up to which AUPRO counts (Bergmann et al. 2019, MVTec AD)


# ---------------------------------------------------------------- the maps
def resized(coarse: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (rows, columns) at a picture's size (H, W), bilinear, float32."""
    values = torch.from_numpy(np.ascontiguousarray(coarse, np.float32))[None, None]
    return F.interpolate(values, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def of_places(scores: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """From the scores (P) of the places of a grid (rows, columns) -> (H, W)."""
    return resized(scores.reshape(grid), size)


def by_occlusion(score: Callable[[list[np.ndarray]], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """How much the score of a picture (H, W, 3) falls when a part of it is blurred -> (H, W). SIDE x SIDE
    parts, each with half of its neighbours: SIDE^2 + 1 pictures are scored."""
    height, width = pixels.shape[:2]
    radius = max(height, width) / SIDE
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
    hidden = [pixels]
    for i in range(SIDE):
        for j in range(SIDE):
            rows, columns = (
                slice(max(0, int((k - 0.5) * side / SIDE)), int(np.ceil((k + 1.5) * side / SIDE)))
                for k, side in ((i, height), (j, width))
            )
            picture = pixels.copy()
            picture[rows, columns] = blurred[rows, columns]
            hidden.append(picture)
    whole, *parts = score(hidden)
    return resized((whole - np.array(parts)).reshape(SIDE, SIDE), (height, width))


# ---------------------------------------------------------------- how good they are
def aupro(maps: list[np.ndarray], masks: list[np.ndarray], most_false: float = MOST_FALSE) -> float:
    """Area under the mean overlap of the defective regions over the false positive rate, up to ``most_false``
    and divided by it: 1 at best. Each connected region (8 neighbours) of the masks (H, W) counts alike.

    Pixels of equal value pass a threshold together. NaN without a defective or without a normal pixel."""
    weights, normal, n_regions = [], [], 0
    for mask in masks:
        regions, count = ndimage.label(mask, np.ones((3, 3)))
        sizes = np.bincount(regions.ravel(), minlength=count + 1).astype(float)
        share = 1 / np.maximum(sizes, 1)
        share[0] = 0
        weights.append(share[regions.ravel()])
        normal.append(regions.ravel() == 0)
        n_regions += count
    values, is_normal = np.concatenate([m.ravel() for m in maps]), np.concatenate(normal)
    if n_regions == 0 or not is_normal.any():
        return float("nan")
    order = np.argsort(-values, kind="stable")
    last = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # of each group of equal values
    false = np.append(0, np.cumsum(is_normal[order])[last] / is_normal.sum())
    overlap = np.append(0, np.cumsum(np.concatenate(weights)[order])[last] / n_regions)
    inside = false <= most_false
    x = np.append(false[inside], most_false)
    y = np.append(overlap[inside], np.interp(most_false, false, overlap))
    return float(np.trapezoid(y, x) / most_false)


def localisation(maps: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, float]:
    """Pixel AUROC and AUPRO of maps (H, W) against masks (H, W) bool of the same sizes."""
    labels = np.concatenate([mask.ravel() for mask in masks]).astype(int)
    values = np.concatenate([values.ravel() for values in maps])
    return {"pixel_auroc": utils.auroc(labels, values), "aupro": aupro(maps, masks)}
