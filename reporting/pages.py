"""Pages for a browser, whole in themselves: pictures lie in them as text, and they ask no server for
anything. Their layouts are report.html and verdicts.html on base.html, templates of jinja2 that escape what
is put into them."""

import base64
import datetime
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from tqdm import tqdm

from config import UserError
from detector.picture_detector import PictureDetector
from images.images import pixels_of
from reporting import report
from reporting.figures import Picture
from reporting.overlays import overlaid
from reporting.scores import Row
from shell.files import write_text

MOST_DRAWN = 200  # pictures of a class, those with the highest scores; the others are named
SIDE = 320  # pixels of a drawn picture, at most


def template(name: str) -> jinja2.Template:
    """A template beside this file: escapes every value, and fails on a name that is not given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template(name)


def data_uri(content: bytes) -> str:
    """A PNG or JPEG as an address that holds it."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def run_page(summary: report.Summary, of_the_run: list[Picture], by_class: dict[str, list[Picture]]) -> str:
    """The page of a run, report.html: its summary, and the pictures of all classes and of each."""
    config = summary.config
    about = [config["dataset"], config["extractor"], f"preset {config['preset']}, fusion {config['fusion']}"]
    about += [tqdm.format_interval(summary.wall_time_s), f"{datetime.datetime.now():%Y-%m-%d %H:%M}"]
    return template("report.html").render(
        title=config["modelname"],
        about=", ".join(about),
        notes=report.notes(summary),
        of_the_run=of_the_run,
        by_class=by_class,
        tables=report.all_tables(summary),
    )


# ---------------------------------------------------------------- verdicts
def write_verdicts(page: Path, detectors: list[PictureDetector], rows: list[Row], progress: Any) -> None:
    """Write a page of scored pictures: sorted by score, a heat map beside each, a threshold to move.
    progress: passes pictures that are drawn on, as tqdm does."""
    classes = []
    for fitted in detectors:
        ranked = sorted(rows, key=lambda row: -row.score)
        cards = [row._asdict() | {"pictures": {}} for row in ranked if row.class_name == fitted.class_name]
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
    return data_uri(content.getvalue())
