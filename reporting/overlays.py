"""Heat maps to look at: the picture, and the same with the map laid over it."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from config import UserError
from detector.picture_detector import PictureDetector
from shell.files import file_name, whole_file


def overlaid(
    pixels: np.ndarray, values: np.ndarray, least: float, side: int | None = None
) -> tuple[Image.Image, Image.Image]:
    """The picture (H, W, 3), and the same under the map (H, W), no side longer than ``side``. The colours
    begin at 0 and end at ``least`` or at the greatest value, so that a normal picture stays dark."""
    from matplotlib import colormaps  # slow to import, and needed by few

    heat = torch.from_numpy(values / max(least, float(values.max()), 1e-9)).clamp(0, 1)
    picture = Image.fromarray(pixels)
    if side:
        picture.thumbnail((side, side))
    hottest = F.adaptive_max_pool2d(heat[None], picture.size[::-1])[0]  # a small place stays to be seen
    colours = (colormaps["inferno"](hottest.numpy())[..., :3] * 255).astype(np.uint8)
    return picture, Image.blend(picture, Image.fromarray(colours), 0.55)


def draw(pixels: np.ndarray, values: np.ndarray, least: float, path: Path) -> None:
    """Write ``overlaid`` side by side as a PNG."""
    both = np.hstack([np.asarray(picture) for picture in overlaid(pixels, values, least)])
    with whole_file(path) as partial:
        Image.fromarray(both).save(partial, "PNG")


def check_folder(folder: Path) -> None:
    """Make the folder for heat maps. Raises UserError where no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"heat_maps: expected a folder that can be written to, got {folder} ({error.strerror})"
        ) from None


def draw_heat_maps(
    detectors: list[PictureDetector], rows: list[dict], folder: Path, drawn: set[Path]
) -> None:
    """A PNG for each row: the picture, and where it is unusual. drawn: those of this run, to which these are
    added; names that are alike get a number, what an earlier run left takes none."""
    for row in rows:
        fitted = next(known for known in detectors if known.class_name == row["class"])
        name = f"{Path(row['image']).stem}-{row['class']}" if len(detectors) > 1 else Path(row["image"]).stem
        stem, number = file_name(name), 1
        while (path := folder / f"{stem}{f'-{number}' * (number > 1)}.png") in drawn:
            number += 1
        try:
            draw(fitted.pixels(row["image"]), fitted.heat_map(row["image"]), fitted.least_heat, path)
            drawn.add(path)
        except UserError as gone:  # or changed since it was scored
            print(f"no heat map: {gone}", file=sys.stderr)
