"""Images on their way to the backbone: read, stacked, resized as Pillow does."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from config import UserError


class Unreadable(NamedTuple):
    """Stands for an image that could not be read, on its way from a reader."""

    reason: str


def read_levels(
    pictures: Iterable, pixels_of: Callable[[Any], list[np.ndarray]], size: tuple[int, int]
) -> list[Tensor | Unreadable]:
    """Pictures as the device takes them, consecutive ones of one shape stacked -> [(n, 3, h, w) or why one
    cannot be read, ...] in order. Those with a side longer than ``size`` are resized to it here (Pillow,
    bicubic), smaller ones are enlarged on the device, many at a time (``resized``).

    pixels_of: gives the pixels (h, w, 3) uint8 of a picture, or those of its tiles; may raise UserError."""
    rows: list[Tensor | Unreadable] = []
    for picture in pictures:
        try:
            for pixels in pixels_of(picture):
                if pixels.shape[0] > size[0] or pixels.shape[1] > size[1]:
                    pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))
                rows.append(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
        except UserError as mistake:  # raised again, or noted, where it is known what is wanted
            rows.append(Unreadable(str(mistake)))
    stacks: list = []
    for shape, group in itertools.groupby(rows, lambda row: isinstance(row, Tensor) and row.shape):
        found = list(group)
        stacks += [torch.stack(found)] if shape else found
    return stacks


FINE_BITS = 22  # of a filter's weights behind the binary point, as Pillow rounds them for pixels of 8 bits
COARSE_BITS = 15  # of the largest weight in all, as torch's CPU kernel rounds them


@functools.lru_cache(maxsize=64)
def bicubic_weights(before: int, after: int, coarse: bool = False) -> Tensor:
    """The antialiased bicubic filter (a = -1/2) from ``before`` to ``after`` pixels in a row -> (after,
    before), float64, each row summing to 1 but for the rounding.

    Made smaller, the filter is as wide as the ratio asks, so that every pixel counts. Weights are rounded as
    Pillow's are (src/libImaging/Resample.c), or, ``coarse``, as those of torch's resize of uint8 on a CPU."""
    scale = before / after
    stretch = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    first = np.maximum((centre - 2 * stretch + 0.5).astype(int), 0)[:, None]
    last = np.minimum((centre + 2 * stretch + 0.5).astype(int), before)[:, None]
    place = np.arange(before)
    x = np.abs((place + 0.5 - centre[:, None]) / stretch)
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * ((place >= first) & (place < last))
    weights /= weights.sum(1, keepdims=True)
    bits = FINE_BITS
    while coarse and weights.max() * 2**bits + 0.5 >= 2**COARSE_BITS:
        bits -= 1
    return torch.from_numpy(np.round(weights * 2**bits) / 2**bits)


def resize_like_pillow(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 3, h, w) uint8 -> (n, 3, H, W) float32 of whole grey levels 0 to 255: those of Pillow's bicubic
    resize; where both sides grow, those of torch's on a CPU, a level or two off Pillow's here and there.

    Two matrix products, along the width and then the height (the other way where only the height shrinks),
    each rounded and cut to 8 bits. In float64 they are exact: any device gives the same, and so does an
    exported file. Pillow 13 takes the height first for some tall pictures that shrink both ways; theirs
    differ by what one rounding is worth."""
    pixels, (height, width) = images.double(), images.shape[2:]
    grows = size[0] >= height and size[1] >= width
    for dim in (2, 3) if size[0] < height and size[1] > width else (3, 2):
        before, after = pixels.shape[dim], size[dim - 2]
        if before != after:
            weights = bicubic_weights(before, after, grows).to(images.device)
            pixels = torch.matmul(pixels, weights.t()) if dim == 3 else torch.matmul(weights, pixels)
            pixels = (pixels + 0.5).floor().clamp(0, 255)
    return pixels.float()


def resized(images: Tensor, img_size: tuple[int, int]) -> Tensor:
    """(n, 3, h, w) uint8 on the device -> (n, 3, H, W) of whole grey levels 0 to 255, resized as Pillow does
    (bicubic, antialiased): uint8 on a CPU and where the size is that already, float32 otherwise."""
    if images.shape[2:] == img_size:
        return images
    if images.device.type == "cpu":  # which resizes uint8 itself, rounding as Pillow does
        images = images.contiguous(memory_format=torch.channels_last)
        return F.interpolate(images, img_size, mode="bicubic", antialias=True)
    return resize_like_pillow(images, img_size)
