"""Scored pictures on one page, to look at: sorted by score, a heat map beside each, a threshold to move. Its
layout is verdicts.html."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from config import UserError
from detector.picture_detector import PictureDetector
from images.images import pixels_of
from reporting.webpage import template
from shell.files import write_text

MOST_DRAWN = 200  # pictures of a class, those with the highest scores; the others are named
SIDE = 320  # pixels of a drawn picture, at most


def check_page(page: Path) -> None:
    """Raise UserError on a name that is no page's."""
    if page.suffix not in (".html", ".htm"):
        raise UserError(f"page: expected a name ending in .html, got {page}")


def write_verdicts(page: Path, detectors: list[PictureDetector], rows: list[dict], progress: Any) -> None:
    """Write the page of the rows of reporting/scores.py. progress: passes pictures that are drawn on, as tqdm
    does."""
    classes = []
    for fitted in detectors:
        mine = [row for row in rows if row["class"] == fitted.class_name]
        classes.append(_class(fitted, sorted(mine, key=lambda row: -row["score"])))
    for each in classes:
        for card in progress(each["cards"][:MOST_DRAWN]):
            card["pictures"] = _pictures(each["fitted"], card["image"])
    names = ", ".join(each["name"] for each in classes)
    counted = f"{max(len(each['cards']) for each in classes)} pictures"
    write_text(
        page, template("verdicts.html").render(title=f"Verdicts: {names}", about=counted, classes=classes)
    )


def _class(fitted: PictureDetector, rows: list[dict]) -> dict:
    """What the page shows of a class: cards, and where its threshold lies among those that it may have."""
    scores, held_out = [row["score"] for row in rows], fitted.held_out.tolist()
    threshold = fitted.threshold.score if held_out else max(scores, default=0.0)
    limits = sorted({*scores, *held_out, threshold})
    return {
        "fitted": fitted,
        "name": fitted.class_name,
        "cards": [row | {"pictures": {}} for row in rows],
        "held_out": held_out,
        "limits": limits,
        "chosen": limits.index(threshold),
        "told": str(fitted.threshold) if held_out else "no threshold: no normal pictures were held out",
    }


def _pictures(fitted: PictureDetector, image: str) -> dict[str, str]:
    """The picture, and the same under its heat map, small, as addresses that hold them; none of a picture
    that can no longer be read."""
    from matplotlib import colormaps  # slow to import, and needed by few

    try:
        pixels, values = pixels_of(image), fitted.heat_map(image)
    except UserError:
        return {}
    heat = torch.from_numpy(values / max(fitted.least_heat, float(values.max()), 1e-9)).clamp(0, 1)
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    hottest = F.adaptive_max_pool2d(heat[None], picture.size[::-1])[0]  # a small place stays to be seen
    colours = Image.fromarray((colormaps["inferno"](hottest.numpy())[..., :3] * 255).astype(np.uint8))
    return {
        f"picture {image}": _address(picture),
        f"heat map of {image}": _address(Image.blend(picture, colours, 0.55)),
    }


def _address(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
