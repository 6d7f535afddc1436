"""Where is it? Heat maps of pictures, how good they are against masks of the defects, and their overlays.

Two kinds (compared by tools/heat_maps.py): of place tokens, how unusual each place is under its own
Gaussian, where the score reads places; else by occlusion, how much the score falls when a part of the
picture is blurred, which any detector allows."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy import ndimage
from torch.nn import functional as F

HOT = 3.0  # standard deviations that the colours of a map span at least
SIDE = 8  # parts of a picture's side that occlusion blurs one after the other
LEVELS = 2**20  # between the coldest and the hottest pixel of a class
MOST_FALSE = 0.3  # false positive rate up to which AUPRO counts (Bergmann et al. 2019, MVTec AD)


# ---------------------------------------------------------------- the maps
def of_places(scores: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """From the scores (P) of the places of a grid (rows, columns) -> (H, W) at a picture's ``size``, float32,
    bilinear."""
    values = torch.from_numpy(np.ascontiguousarray(scores, np.float32)).view(1, 1, *grid)
    return F.interpolate(values, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def by_occlusion(score: Callable[[Iterator[np.ndarray]], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """How much the score of a picture (H, W, 3) falls when a part of it is blurred -> (H, W). SIDE x SIDE
    parts, each with half of its neighbours: SIDE^2 + 1 pictures are scored, made as they are asked for."""
    whole, *parts = score(_hidden(pixels))
    return of_places(whole - np.array(parts), (SIDE, SIDE), pixels.shape[:2])


def _hidden(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """The picture, and with each of its parts blurred."""
    yield pixels
    height, width = pixels.shape[:2]
    radius = max(height, width) / SIDE
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
    for i in range(SIDE):
        for j in range(SIDE):
            rows, columns = (
                slice(max(0, int((k - 0.5) * side / SIDE)), int(np.ceil((k + 1.5) * side / SIDE)))
                for k, side in ((i, height), (j, width))
            )
            picture = pixels.copy()
            picture[rows, columns] = blurred[rows, columns]
            yield picture


# ---------------------------------------------------------------- how good they are
class Counts(NamedTuple):
    """Of the levels of heat that pixels have, the hottest first: how many normal and defective pixels have
    it, and the share of defective regions, summed over the regions, that does."""

    normal: np.ndarray
    defective: np.ndarray
    overlap: np.ndarray
    n_regions: int


def count_pixels(maps: list[np.ndarray], masks: list[np.ndarray]) -> Counts:
    """Count the pixels of maps (H, W) by masks (H, W) bool of the same sizes, image by image: all of them
    sorted would take 70 bytes a pixel. Each connected region (8 neighbours) of a mask is one."""
    low, high = min(values.min() for values in maps), max(values.max() for values in maps)
    counts, n_regions = np.zeros((3, LEVELS)), 0
    for values, mask in zip(maps, masks):
        level = ((high - values) * ((LEVELS - 1) / ((high - low) or 1.0))).astype(np.int64).ravel()
        regions, count = ndimage.label(mask, np.ones((3, 3)))
        region = regions.ravel()
        share = 1 / np.maximum(np.bincount(region, minlength=count + 1), 1)
        share[0] = 0.0
        for row, weights in enumerate((region == 0, region > 0, share[region])):
            counts[row] += np.bincount(level, weights, LEVELS)
        n_regions += count
    normal, defective, overlap = counts[:, counts[:2].any(0)]
    return Counts(normal, defective, overlap, n_regions)


def aupro(counts: Counts, most_false: float = MOST_FALSE) -> float:
    """Area under the mean overlap of the defective regions over the false positive rate, up to ``most_false``
    and divided by it: 1 at best; each region counts alike. NaN without a defective or without a normal
    pixel."""
    from sklearn.metrics import auc  # slow to import; predict.py needs none

    if counts.n_regions == 0 or not counts.normal.any():
        return float("nan")
    false = np.append(0, np.cumsum(counts.normal) / counts.normal.sum())
    overlap = np.append(0, np.cumsum(counts.overlap) / counts.n_regions)
    inside = false <= most_false
    x = np.append(false[inside], most_false)
    y = np.append(overlap[inside], np.interp(most_false, false, overlap))
    return float(auc(x, y) / most_false)


def pixel_auroc(counts: Counts) -> float:
    """Area under the ROC curve of the pixels; those of one level count half. NaN where only one kind is."""
    pairs = counts.normal.sum() * counts.defective.sum()
    colder = counts.normal.sum() - np.cumsum(counts.normal) + counts.normal / 2
    return float((counts.defective * colder).sum() / pairs) if pairs else float("nan")


def localisation(maps: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, float]:
    """Pixel AUROC and AUPRO of maps (H, W) against masks (H, W) bool of the same sizes."""
    counts = count_pixels(maps, masks)
    return {"pixel_auroc": pixel_auroc(counts), "aupro": aupro(counts)}
