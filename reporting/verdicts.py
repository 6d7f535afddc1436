"""Scored pictures on one page, to look at: sorted by score, a heat map beside each, a threshold to move. Its
layout is verdicts.html."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from config import UserError
from detector.picture_detector import PictureDetector
from images.images import pixels_of
from reporting.overlays import overlaid
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
        ranked = sorted(rows, key=lambda row: -row["score"])
        cards = [row | {"pictures": {}} for row in ranked if row["class"] == fitted.class_name]
        for card in progress(cards[:MOST_DRAWN]):
            card["pictures"] = _pictures(fitted, card["image"])
        classes.append({"name": fitted.class_name, "cards": cards, **_limits(fitted, cards)})
    names = ", ".join(each["name"] for each in classes)
    about = f"{len(rows) // len(detectors)} pictures"
    text = template("verdicts.html").render(title=f"Verdicts: {names}", about=about, classes=classes)
    write_text(page, text)


def _limits(fitted: PictureDetector, cards: list[dict]) -> dict:
    """Where a class's threshold lies among those that it may have."""
    scores, held_out = [card["score"] for card in cards], fitted.held_out.tolist()
    threshold = fitted.threshold.score if held_out else max(scores, default=0.0)
    limits = sorted({*scores, *held_out, threshold})
    told = str(fitted.threshold) if held_out else "no threshold: no normal pictures were held out"
    return {"held_out": held_out, "limits": limits, "chosen": limits.index(threshold), "told": told}


def _pictures(fitted: PictureDetector, image: str) -> dict[str, str]:
    """The picture, and the same under its heat map, small, as addresses that hold them; none of a picture
    that can no longer be read."""
    try:
        both = overlaid(pixels_of(image), fitted.heat_map(image), fitted.least_heat, SIDE)
    except UserError:
        return {}
    return dict(zip((f"picture {image}", f"heat map of {image}"), map(_address, both)))


def _address(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
