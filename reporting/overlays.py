"""Heat maps to look at: the picture, and the same with the map laid over it."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from config import UserError
from detector.picture_detector import PictureDetector
from reporting.scores import Row
from shell.files import file_name, whole_file

HOT = 3.0  # standard deviations that the colours of a map span at least


def overlaid(pixels: np.ndarray, values: np.ndarray | None, side: int | None = None) -> list[Image.Image]:
    """The picture (H, W, 3), no side longer than ``side``, and, where there is a map (H, W), the same under
    it. The colours begin at 0 and end at ``HOT`` or at the greatest value: a normal picture stays dark."""
    from matplotlib import colormaps  # slow to import, and needed by few

    picture = Image.fromarray(pixels)
    if side:
        picture.thumbnail((side, side))
    if values is None:
        return [picture]
    heat = torch.from_numpy(values / max(HOT, float(values.max()))).clamp(0, 1)
    hottest = F.adaptive_max_pool2d(heat[None], picture.size[::-1])[0]  # a small place stays to be seen
    colours = (colormaps["inferno"](hottest.numpy())[..., :3] * 255).astype(np.uint8)
    return [picture, Image.blend(picture, Image.fromarray(colours), 0.55)]


def pictures_of(fitted: PictureDetector, image: str, side: int | None = None) -> list[Image.Image]:
    """``overlaid``, of a picture that was scored, its map where the score reads places; none, which is said,
    where it can no longer be read or has changed."""
    try:
        pixels = fitted.pixels(image)
    except UserError as gone:
        print(f"not drawn: {gone}", file=sys.stderr)
        return []
    return overlaid(pixels, fitted.heat_map(pixels) if fitted.fitted.uses_places else None, side)


def draw_heat_maps(detectors: list[PictureDetector], rows: list[Row], folder: Path, drawn: set[Path]) -> None:
    """A PNG for each row, one of each detector, where its score reads places: the picture, and beside it its
    heat map. drawn: those of this run, to which these are added; names that are alike get a number."""
    for fitted, row in zip(detectors, rows):
        name = Path(row.image).stem
        stem, number = file_name(f"{name}-{row.class_name}" if len(detectors) > 1 else name), 1
        while (path := folder / f"{stem}{f'-{number}' * (number > 1)}.png") in drawn:
            number += 1
        if fitted.fitted.uses_places and (both := pictures_of(fitted, row.image)):
            with whole_file(path) as partial:
                Image.fromarray(np.hstack([*map(np.asarray, both)])).save(partial, "PNG")
            drawn.add(path)
