"""A run on one page: report.html, whole in itself. Pictures lie in it as text, and it asks no server for
anything. Its layout is webpage.html on base.html, templates of jinja2 that escape what is put into them."""

import base64
import dataclasses
import datetime
import hashlib
from pathlib import Path
from typing import NamedTuple

import jinja2

import utils
from config import Config
from reporting import report
from reporting.figures import Picture
from reporting.tables import cell, number
from shell.files import write_text
from utils import METRICS

KINDS = {".png": "image/png", ".jpg": "image/jpeg"}
MOST_OPEN = 3  # classes whose pictures are unfolded from the start


class Table(NamedTuple):
    """A table of the page. kind: a class of the style. marked: numbers of the rows that stand out."""

    header: list[str]
    rows: list[list[str]]
    kind: str = ""
    marked: tuple[int, ...] = ()


def write_page(folder: Path, summary: dict, pictures: list[Picture]) -> Path:
    """Write report.html into a run's folder -> its path."""
    path = folder / "report.html"
    write_text(path, page(summary, pictures))
    return path


def page(summary: dict, pictures: list[Picture]) -> str:
    """The whole page of a run's summary and pictures."""
    config = summary["config"]
    about = (
        f"{config['dataset']}, {config['extractor']}, preset {config['preset']}, fusion {config['fusion']}"
    )
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    by_class: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_class.setdefault(picture.class_name, []).append(picture)
    of_the_run = by_class.pop("", [])
    tables = {
        "Simple detectors, AUROC": baselines(summary),
        "Kinds of defect": Table(*report.defect_table(summary), "kinds"),
        "Where the defect is": localisation(summary),
        "Thresholds": Table(*report.threshold_table(summary)),
        "Classes and seeds": fits(summary),
    }
    return template("webpage.html").render(
        title=config["modelname"],
        about=f"{about}; {made}",
        facts=facts(summary),
        headline=headline(summary),
        notes=report.notes(summary),
        of_the_run=of_the_run,
        tables=tables,
        by_class=by_class,
        unfolded=len(by_class) <= MOST_OPEN,
        skipped=summary["features"].get("skipped") or [],
        provenance=provenance(summary),
        configuration=configuration(config),
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
    environment.filters |= {"data_uri": data_uri, "sha256": sha256_source}
    return environment.get_template(name)


def sha256_source(script: str) -> str:
    """How a page's policy names the one script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def data_uri(path: Path) -> str:
    """A picture's file as an address that holds the picture."""
    return f"data:{KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


# ---------------------------------------------------------------- sections
def facts(summary: dict) -> dict[str, str]:
    """The figures that one looks for first."""
    n_seeds, (method, simple) = len(summary["seeds"]), report.best_simple(summary, None)
    shown = {}
    if not report.nothing_tested(summary):
        shown["mean AUROC of the flow"] = cell(summary["mean"], "auroc", n_seeds)
    if method:
        shown[f"best simple detector ({method})"] = number(simple)
    if summary["margins"]:
        shown["flow beyond it, by more than the interval"] = report.margin_cell(summary["margins"], None)
    shown |= {"classes": str(len(summary["classes"])), "seeds": ", ".join(map(str, summary["seeds"]))}
    shown["time"] = utils.readable_time(summary["wall_time_s"])
    return shown


def headline(summary: dict) -> Table:
    """Every metric, the best simple detector and the margin, per class; empty without an AUROC."""
    if report.nothing_tested(summary):
        return Table([], [])
    n_seeds = len(summary["seeds"])
    header = ["class", *(metric.title for metric in METRICS.values()), "best on test (oracle)"]
    header += ["best simple detector"] if summary["baselines"] else []
    header += ["flow - best simple [95 %]"] if summary["margins"] else []
    rows = []
    for label, name, values in report.table_rows(summary):
        row = [label, cell(values, "auroc", n_seeds)]
        row += [number(values[metric]) for metric in report.SHOWN[1:]]
        if summary["baselines"]:
            method, value = report.best_simple(summary, name)
            row.append(f"{number(value)} {method}")
        if summary["margins"]:
            row.append(report.margin_cell(summary["margins"], name))
        rows.append(row)
    return Table(header, rows, "mean")


def localisation(summary: dict) -> Table:
    """How well the heat maps find the defects, of classes whose test images have masks."""
    found = summary.get("localisation", {})
    rows = [[name, number(each["pixel_auroc"]), number(each["aupro"])] for name, each in found.items()]
    return Table(["class", "pixel AUROC", "AUPRO, up to 30 % false positives"], rows)


def baselines(summary: dict) -> Table:
    methods = summary["baselines"]
    if not methods:
        return Table([], [])
    n_seeds = len(summary["seeds"])
    rows = [
        [label, cell(values, "auroc", n_seeds)]
        + [number(report.simple_auroc(method, name)) for method in methods.values()]
        for label, name, values in report.table_rows(summary)
    ]
    return Table(["class", "flow", *methods], rows, "mean")


def fits(summary: dict) -> Table:
    """What every class and seed was fitted to, and what came of it."""
    columns = {
        "n_train": "training images", "n_held_out": "held out", "n_test": "test images", "epoch": "epoch",
        "loss": "training loss", "held_out_loss": "held-out loss",
    }  # fmt: skip
    rows = []
    for name, values in summary["classes"].items():
        for run in values["runs"]:
            shown = [run.get(column) for column in columns]
            figures = [str(value) if isinstance(value, int) else number(value) for value in shown]
            seconds = number(run.get("seconds"), 1)
            rows.append([name, str(run["seed"]), number(run["auroc"]), *figures, seconds])
    return Table(["class", "seed", "AUROC", *columns.values(), "seconds"], rows)


def provenance(summary: dict) -> Table:
    """Command, time, versions, machine, and the features that were used."""
    features = summary["features"]
    shown = {"command": summary["command"], "wall time": f"{summary['wall_time_s']:.0f} s"}
    shown |= {name: str(value) for name, value in summary["versions"].items()}
    known = ("weights", "weights_sha256", "precision", "img_size", "tokens", "n_feat", "image_list")
    shown |= {f"features: {name}": str(features[name]) for name in known if name in features}
    return Table([], [[name, value] for name, value in shown.items()], "words")


def configuration(config: dict) -> Table:
    """Every knob; those that differ from config.py's defaults stand out."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    rows = [[name, "none" if value is None else str(value)] for name, value in config.items()]
    marked = tuple(i for i, name in enumerate(config) if config[name] != defaults.get(name))
    return Table(["knob (bold: not the default)", "value"], rows, "words", marked)
