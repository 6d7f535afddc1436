"""Where is it? Heat maps of pictures, from how unusual each of their places is, and how good they are against
masks of the defects."""

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

LEVELS = 2**20  # between the coldest and the hottest pixel of a class
MOST_FALSE = 0.3  # false positive rate up to which AUPRO counts (Bergmann et al. 2019, MVTec AD)


def of_places(scores: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """From the scores (P) of the places of a grid (rows, columns) -> (H, W) at a picture's ``size``, float32,
    bilinear."""
    values = torch.from_numpy(np.ascontiguousarray(scores, np.float32)).view(1, 1, *grid)
    return F.interpolate(values, size, mode="bilinear", align_corners=False)[0, 0].numpy()


# ---------------------------------------------------------------- how good they are
def localisation(maps: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, float]:
    """How good maps (H, W) are against masks (H, W) bool of the same sizes; NaN without a defective or
    without a normal pixel.

    Pixel AUROC: pixels of one level of heat count half. AUPRO: the area under the mean overlap of the
    defective regions over the false positive rate, up to ``MOST_FALSE`` and divided by it: 1 at best; each
    region, a connected one (8 neighbours) of a mask, counts alike. Pixels are counted by levels of heat,
    image by image: all of them sorted would take 70 bytes each."""
    from sklearn.metrics import auc  # slow to import; predict.py needs none

    low, high = min(values.min() for values in maps), max(values.max() for values in maps)
    # of each level, the hottest first: normal pixels, defective pixels, shares of regions
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
    if not (normal.any() and defective.any()):
        return {"pixel_auroc": float("nan"), "aupro": float("nan")}
    colder = normal.sum() - np.cumsum(normal) + normal / 2
    pixel_auroc = (defective * colder).sum() / (normal.sum() * defective.sum())
    false = np.append(0, np.cumsum(normal) / normal.sum())
    overlaps = np.append(0, np.cumsum(overlap) / n_regions)
    inside = false <= MOST_FALSE
    x = np.append(false[inside], MOST_FALSE)
    y = np.append(overlaps[inside], np.interp(MOST_FALSE, false, overlaps))
    return {"pixel_auroc": float(pixel_auroc), "aupro": float(auc(x, y) / MOST_FALSE)}
