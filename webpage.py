"""A run on one page: report.html, whole in itself. Pictures lie in it as text, and it asks no server for
anything."""

import base64
import dataclasses
import datetime
import html
from pathlib import Path

import report
import utils
from config import Config
from figures import Picture
from shell.files import write_text
from tables import cell, number
from utils import METRICS

KINDS = {".png": "image/png", ".jpg": "image/jpeg"}
MOST_OPEN = 3  # classes whose pictures are unfolded from the start

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1216px; padding: 16px; color: #1b1f24; background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; }
.about { color: #525a63; margin: .2rem 0 1rem; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; padding: 0; margin: 0; }
.facts div { border: 1px solid #d4d9de; border-radius: 8px; padding: 8px 14px; }
.facts dt { color: #525a63; font-size: .85rem; } .facts dd { margin: 0; font-size: 1.3rem; font-weight: 600; }
.box { overflow-x: auto; max-width: 100%; border: 1px solid #d4d9de; border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #e7eaed; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
.words td { white-space: normal; min-width: 9rem; } .words td:last-child { min-width: 14rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
.kinds td:nth-child(2), .kinds th:nth-child(2) { text-align: left; }
thead th, thead th:first-child { background: #f3f5f7; } tbody tr:last-child > * { border-bottom: 0; }
.mean tbody tr:last-child > * { font-weight: 600; border-top: 2px solid #8a929b; }
.changed td { font-weight: 600; }
figure { margin: 0 0 16px; } figcaption { color: #525a63; font-size: .9rem; margin-bottom: 4px; }
figure div { overflow-x: auto; } figure img { height: auto; display: block; }
.plot img { width: 100%; min-width: 560px; max-width: 840px; }
@media (max-width: 600px) { figcaption::after { content: " (scrolls sideways)"; } }
.pair { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
code { background: #f3f5f7; padding: 1px 4px; border-radius: 4px; font-size: .85rem; }
details { border-top: 1px solid #d4d9de; padding: 8px 0; } summary { cursor: pointer; font-weight: 600; }
"""
ALLOWED = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


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
    parts = [
        f"<h1>{text(config['modelname'])}</h1><p class=about>{text(f'{about}; {made}')}</p>",
        facts(summary),
        section(
            "Result",
            "" if report.nothing_tested(summary) else headline(summary),
            *(paragraph(line) for line in report.notes(summary)),
        ),
        section("Pictures", pair(*(picture(p) for p in pictures if not p.class_name))),
        section("Simple detectors, AUROC", baselines(summary)),
        section("Kinds of defect", defects(summary)),
        section("Where the defect is", localisation(summary)),
        section("Thresholds", table(*report.threshold_table(summary))),
        section("Classes and seeds", fits(summary)),
        section("Class by class", *classes(pictures)),
        section("Pictures that could not be read, left out", skipped(summary)),
        section("How it was made", provenance(summary), "<h2>Configuration</h2>", configuration(config)),
    ]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{ALLOWED}">'
        f"<title>{text(config['modelname'])}</title><style>{STYLE}</style></head><body>"
    )
    return "\n".join([head, *filter(None, parts), "</body></html>\n"])


# ---------------------------------------------------------------- pieces
def text(value) -> str:
    """Any value as text that HTML takes as it is."""
    return html.escape(str(value))


def paragraph(line: str) -> str:
    return f"<p>{text(line)}</p>"


def section(title: str, *parts: str) -> str:
    """A section; empty where there is nothing in it."""
    inside = "\n".join(filter(None, parts))
    return f"<section><h2>{text(title)}</h2>\n{inside}</section>" if inside else ""


def table(header: list[str], rows: list[list[str]], kind: str = "", marked: tuple[int, ...] = ()) -> str:
    """A table that scrolls inside its box; empty without rows. kind: a class of the style. marked: numbers of
    rows that stand out."""
    if not rows:
        return ""
    titles = "".join(f'<th scope="col">{text(title)}</th>' for title in header)
    head = f"<thead><tr>{titles}</tr></thead>" if header else ""
    lines = [
        f"<tr{' class=changed' if number in marked else ''}>"
        + "".join(f"<td>{text(value)}</td>" for value in row)
        + "</tr>"
        for number, row in enumerate(rows)
    ]
    body = "\n".join(lines)
    return f'<div class="box"><table class="{kind}">{head}\n<tbody>{body}</tbody></table></div>'


def picture(shown: Picture) -> str:
    """A picture with its caption. On a narrow screen it scrolls rather than shrink beyond reading; a contact
    sheet keeps its size."""
    data = base64.b64encode(shown.path.read_bytes()).decode()
    image = f'<img alt="{text(shown.caption)}" src="data:{KINDS[shown.path.suffix]};base64,{data}">'
    caption = f"<figcaption>{text(shown.caption)}</figcaption>"
    kind = "box" if shown.path.suffix == ".jpg" else "plot"
    return f'<figure>{caption}<div class="{kind}">{image}</div></figure>'


def pair(*parts: str) -> str:
    return f'<div class="pair">{"".join(parts)}</div>' if parts else ""


# ---------------------------------------------------------------- sections
def facts(summary: dict) -> str:
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
    entries = (f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in shown.items())
    return f'<dl class="facts">{"".join(entries)}</dl>'


def headline(summary: dict) -> str:
    """The headline table: every metric, the best simple detector and the margin; empty without an AUROC."""
    if report.nothing_tested(summary):
        return ""
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
    return table(header, rows, "mean")


def localisation(summary: dict) -> str:
    """How well the heat maps find the defects, of classes whose test images have masks."""
    found = summary.get("localisation", {})
    rows = [[name, number(each["pixel_auroc"]), number(each["aupro"])] for name, each in found.items()]
    return table(["class", "pixel AUROC", "AUPRO, up to 30 % false positives"], rows)


def baselines(summary: dict) -> str:
    methods = summary["baselines"]
    if not methods:
        return ""
    n_seeds = len(summary["seeds"])
    rows = [
        [label, cell(values, "auroc", n_seeds)]
        + [number(report.simple_auroc(method, name)) for method in methods.values()]
        for label, name, values in report.table_rows(summary)
    ]
    return table(["class", "flow", *methods], rows, "mean")


def defects(summary: dict) -> str:
    return table(*report.defect_table(summary), "kinds")


def fits(summary: dict) -> str:
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
    return table(["class", "seed", "AUROC", *columns.values(), "seconds"], rows)


def classes(pictures: list[Picture]) -> list[str]:
    """The pictures of every class, folded away where there are many classes."""
    names = list(dict.fromkeys(p.class_name for p in pictures if p.class_name))
    unfolded = " open" if len(names) <= MOST_OPEN else ""
    return [
        f"<details{unfolded}><summary>{text(name)}</summary>"
        + "".join(picture(p) for p in pictures if p.class_name == name)
        + "</details>"
        for name in names
    ]


def skipped(summary: dict) -> str:
    """The images that were left out; empty where there are none."""
    names = summary["features"].get("skipped") or []
    return "<br>".join(text(name) for name in names)


def provenance(summary: dict) -> str:
    """Command, time, versions, machine, and the features that were used."""
    features = summary["features"]
    shown = {"command": summary["command"], "wall time": f"{summary['wall_time_s']:.0f} s"}
    shown |= {name: str(value) for name, value in summary["versions"].items()}
    known = ("weights", "weights_sha256", "precision", "img_size", "tokens", "n_feat", "image_list")
    shown |= {f"features: {name}": str(features[name]) for name in known if name in features}
    return table([], [[name, value] for name, value in shown.items()], "words")


def configuration(config: dict) -> str:
    """Every knob; those that differ from config.py's defaults stand out."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    rows = [[name, "none" if value is None else str(value)] for name, value in config.items()]
    marked = tuple(i for i, name in enumerate(config) if config[name] != defaults.get(name))
    return table(["knob (bold: not the default)", "value"], rows, "words", marked)
