"""A run on one page: report.html, whole in itself. Pictures lie in it as text, and it asks no server for
anything. Its layout is webpage.html on base.html, templates of jinja2 that escape what is put into them."""

import base64
import datetime
from pathlib import Path

import jinja2

import utils
from reporting import report
from reporting.figures import Picture


def page(summary: dict, pictures: list[Picture]) -> str:
    """The whole page of a run's summary and pictures."""
    config = summary["config"]
    about = [config["dataset"], config["extractor"], f"preset {config['preset']}, fusion {config['fusion']}"]
    about += [utils.readable_time(summary["wall_time_s"]), f"{datetime.datetime.now():%Y-%m-%d %H:%M}"]
    by_class: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_class.setdefault(picture.class_name, []).append(picture)
    return template("webpage.html").render(
        title=config["modelname"],
        about=", ".join(about),
        notes=report.notes(summary),
        of_the_run=by_class.pop("", []),
        by_class=by_class,
        tables=report.all_tables(summary),
    )


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


def data_uri(path: Path) -> str:
    """A picture's file as an address that holds the picture."""
    kind = "png" if path.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
