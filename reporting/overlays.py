"""Heat maps to look at: the picture, and the map laid over it."""

import sys
import tempfile
from pathlib import Path

import numpy as np

from config import UserError
from detector.picture_detector import PictureDetector
from shell.files import file_name, whole_file


def draw(pixels: np.ndarray, values: np.ndarray, least: float, path: Path, title: str) -> None:
    """The picture, and beside it the map (H, W) laid over it with its scale: a PNG. The scale begins at 0 and
    ends at ``least`` or at the greatest value, so that a normal picture stays dark."""
    from matplotlib.figure import Figure  # slow to import, and needed by few

    figure = Figure((8.4, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(pixels)
    right.imshow(pixels)
    hottest = max(least, float(values.max()), 1e-9)
    shown = right.imshow(values, cmap="inferno", alpha=0.55, vmin=0, vmax=hottest)
    figure.colorbar(shown, ax=right, label="how unusual this place is")
    for axes in (left, right):
        axes.axis("off")
    figure.suptitle(title.encode(errors="replace").decode(), parse_math=False, fontsize="small")
    save(figure, path)


def check_folder(folder: Path) -> None:
    """Make the folder for heat maps. Raises UserError where no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"heat_maps: expected a folder that can be written to, got {folder} ({error.strerror})"
        ) from None


def save(figure, path: Path) -> None:
    """A matplotlib figure as a PNG, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


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
        drawn.add(path)
        told = f"{row['image']}  score {row['score']:.3g}  {row['verdict'] or ''}"
        try:
            draw(fitted.pixels(row["image"]), fitted.heat_map(row["image"]), fitted.least_heat, path, told)
        except UserError as gone:  # or changed since it was scored
            drawn.remove(path)
            print(f"no heat map: {gone}", file=sys.stderr)
