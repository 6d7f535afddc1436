"""Pages for a browser, whole in themselves: pictures lie in them as text, and they ask no server for
anything. Their layouts are report.html and verdicts.html on base.html, templates of jinja2 that escape what
is put into them."""

import base64
import datetime
import io
from pathlib import Path

import jinja2
from tqdm import tqdm

from detector.picture_detector import PictureDetector
from reporting import report
from reporting.figures import Picture
from reporting.overlays import pictures_of
from reporting.scores import Row
from shell.files import write_text

MOST_DRAWN = 200  # pictures of a class, those with the highest scores; the others are named
SIDE = 320  # pixels of a drawn picture, at most


def data_uri(content: bytes) -> str:
    """A PNG or JPEG as an address that holds it."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["data_uri"] = data_uri


def run_page(summary: report.Summary, of_the_run: list[Picture], by_class: dict[str, list[Picture]]) -> str:
    """The page of a run, report.html: its summary, and the pictures of all classes and of each."""
    config = summary.config
    about = [config["dataset"], config["extractor"], f"preset {config['preset']}, fusion {config['fusion']}"]
    about += [tqdm.format_interval(summary.wall_time_s), f"{datetime.datetime.now():%Y-%m-%d %H:%M}"]
    return TEMPLATES.get_template("report.html").render(
        title=config["modelname"],
        about=", ".join(about),
        notes=report.notes(summary),
        of_the_run=of_the_run,
        by_class=by_class,
        tables=report.all_tables(summary),
    )


def write_verdicts(page: Path, detectors: list[PictureDetector], rows: list[Row]) -> None:
    """Write a page of scored pictures: sorted by score, heat maps beside them, a threshold to move."""
    classes = []
    for fitted in detectors:
        ranked = sorted(rows, key=lambda row: -row.score)
        cards = [row._asdict() | {"pictures": {}} for row in ranked if row.class_name == fitted.class_name]
        for card in tqdm(cards[:MOST_DRAWN], "drawing", disable=None):
            for what, picture in zip(("picture", "heat map of"), pictures_of(fitted, card["image"], SIDE)):
                content = io.BytesIO()
                picture.save(content, "JPEG", quality=85)
                card["pictures"][f"{what} {card['image']}"] = data_uri(content.getvalue())
        held_out, scores = fitted.held_out.tolist(), [card["score"] for card in cards]
        threshold = fitted.threshold.score if held_out else max(scores, default=0.0)
        limits = sorted({*scores, *held_out, threshold})
        chosen = {"limits": limits, "chosen": limits.index(threshold), "held_out": held_out}
        classes.append({"name": fitted.class_name, "cards": cards, **chosen})
    title = f"Verdicts: {', '.join(fitted.class_name for fitted in detectors)}"
    about = f"{len(rows) // len(detectors)} pictures"
    template = TEMPLATES.get_template("verdicts.html")
    write_text(page, template.render(title=title, about=about, classes=classes))
