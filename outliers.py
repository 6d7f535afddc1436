"""Synthetic outliers, made from normal images alone: what settings are chosen by (``--validate``).

Two sorts: of meaning (the image turned, mixed with another one) and of texture (a defect somewhere)."""

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

RandomState = np.random.RandomState


# ------------------------------------- meaning: an image and another one, (H, W, 3) uint8, rng -> (H, W, 3)
def rotated(image: np.ndarray, other: np.ndarray, rng: RandomState) -> np.ndarray:
    """Turned by a quarter, a half or three quarters."""
    return _as_large(np.rot90(image, 1 + rng.randint(3)), image)


def pasted(image: np.ndarray, other: np.ndarray, rng: RandomState) -> np.ndarray:
    """A rectangle of the other image, 45 to 75 % of the sides, pasted in."""
    here, there = (_rectangle(image, 0.45, 0.75, rng) for _ in range(2))
    made = image.copy()
    rows, columns = made[here].shape[:2]
    top, left = there[0].start, there[1].start
    top, left = min(top, len(image) - rows), min(left, image.shape[1] - columns)
    made[here] = other[top : top + rows, left : left + columns]
    return made


def blended(image: np.ndarray, other: np.ndarray, rng: RandomState) -> np.ndarray:
    """The mean of both."""
    return ((image.astype(np.uint16) + other) // 2).astype(np.uint8)


# ------------------------------------------------------------------------------------ texture: a small defect
def scratched(image: np.ndarray, other: np.ndarray, rng: RandomState) -> np.ndarray:
    """A thin straight line, lighter or darker than what it crosses."""
    rows, columns, angle = *_grid(image), rng.uniform(0, np.pi)
    y, x = rng.uniform(0.25, 0.75, 2)
    across = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    along = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
    half = max(rng.uniform(0.01, 0.02), 0.6 / min(image.shape[:2]))  # of its width: a pixel at least
    opacity = (np.abs(across) < half) & (np.abs(along) < rng.uniform(0.08, 0.25))
    return _mixed(image, image + _shade(rng), opacity)


def spotted(image: np.ndarray, other: np.ndarray, rng: RandomState) -> np.ndarray:
    """A round spot, lighter or darker, with a soft edge."""
    return _mixed(image, image + _shade(rng), _disc(image, rng))


def cut(image: np.ndarray, other: np.ndarray, rng: RandomState) -> np.ndarray:
    """A small rectangle moved in from elsewhere in the image (CutPaste, arXiv 2104.04015)."""
    here, there = (_rectangle(image, 0.08, 0.25, rng) for _ in range(2))
    made = image.copy()
    piece = Image.fromarray(np.ascontiguousarray(image[there]))
    made[here] = np.asarray(piece.resize(made[here].shape[1::-1]))
    return made


def noisy(image: np.ndarray, other: np.ndarray, rng: RandomState) -> np.ndarray:
    """A patch of noise."""
    return _mixed(image, image + 30 * rng.standard_normal(image.shape), _disc(image, rng))


def blurred(image: np.ndarray, other: np.ndarray, rng: RandomState) -> np.ndarray:
    """A patch whose fine structure is gone."""
    sigma = max(0.03 * max(image.shape[:2]), 0.7)
    return _mixed(image, gaussian_filter(image.astype(float), (sigma, sigma, 0)), _disc(image, rng))


Outlier = Callable[[np.ndarray, np.ndarray, RandomState], np.ndarray]
MEANING: dict[str, Outlier] = {"rotated": rotated, "pasted": pasted, "blended": blended}
TEXTURE: dict[str, Outlier] = {
    "scratched": scratched, "spotted": spotted, "cut": cut, "noisy": noisy, "blurred": blurred
}  # fmt: skip
KINDS = MEANING | TEXTURE


def outlier(image: np.ndarray, other: np.ndarray, kind: str, rng: RandomState) -> np.ndarray:
    """A synthetic outlier of a kind (KINDS) from a normal image and another one: (H, W, 3), (h, w, 3)
    uint8 -> (H, W, 3)."""
    return KINDS[kind](image, _as_large(other, image), rng)


# ---------------------------------------------------------------- shapes
def _as_large(image: np.ndarray, model: np.ndarray) -> np.ndarray:
    """The image in the size of another one."""
    if image.shape == model.shape:
        return image
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(model.shape[1::-1]))


def _grid(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels' centres, in shares of the sides."""
    height, width = image.shape[:2]
    return (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None] + 0.5) / width


def _rectangle(image: np.ndarray, least: float, most: float, rng: RandomState) -> tuple[slice, slice]:
    """A random rectangle, its sides ``least`` to ``most`` of the image's."""
    slices = []
    for side in image.shape[:2]:
        length = max(1, int(side * rng.uniform(least, most)))
        start = rng.randint(side - length + 1)
        slices.append(slice(start, start + length))
    return slices[0], slices[1]


def _disc(image: np.ndarray, rng: RandomState) -> np.ndarray:
    """The opacity (H, W) of a random disc with a soft edge, 4 to 12 % of the sides in radius."""
    rows, columns = _grid(image)
    radius = max(rng.uniform(0.04, 0.12), 1 / min(image.shape[:2]))
    y, x = rng.uniform(0.15, 0.85, 2)
    return np.clip(2 * (1 - np.hypot(rows - y, columns - x) / radius), 0, 1)


def _shade(rng: RandomState) -> float:
    """Grey levels that a mark is lighter or darker."""
    return rng.choice([-1, 1]) * rng.uniform(25, 70)


def _mixed(below: np.ndarray, above: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """``above`` over ``below`` (H, W, 3) where the opacity (H, W) says so, as uint8."""
    mixed = below + opacity[..., None] * (above - below.astype(float))
    return np.clip(np.round(mixed), 0, 255).astype(np.uint8)
