"""The report of a run: its summary over classes and seeds, and its tables, which results.csv, results.md, the
page and the terminal show."""

import csv
import dataclasses
import io
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import utils
from config import FIELDS, Config, UserError
from reporting import tables
from reporting.tables import Table, cell, margin_cell, number, undefined
from shell.files import write_json, write_text
from utils import METRICS

ORACLE = "best_on_test_auroc"
COLUMNS = (*METRICS, ORACLE, "latent_auroc", "likelihood_auroc")  # the last two: of the flow's other scores
OF_FEATURES = ("weights", "weights_sha256", "precision", "img_size", "tokens", "n_feat", "image_list")


# ---------------------------------------------------------------- the summary
@dataclasses.dataclass
class Summary:
    """A run's results.json; what is of single classes is by their names."""

    classes: dict[str, dict]  # metrics, mean and deviation over seeds; result of each seed; why undefined
    mean: dict  # the same metrics, over the classes for which they are defined
    baselines: dict[str, dict]  # of each simple detector: "classes" with their metrics, "mean" over them
    margins: dict[str, dict]  # AUROC of the flow minus that of the best simple detector
    defects: dict[str, dict]  # of each kind of defect: images, AUROC
    thresholds: dict[str, dict]
    localisation: dict[str, dict]  # metrics of heat maps
    config: dict
    seeds: list[int]
    features: dict  # the sidecar of the features
    versions: dict[str, str]
    wall_time_s: float
    command: str


def summarize(
    config: Config, results: list[dict], found: dict[str, dict], seconds: float, features: dict
) -> Summary:
    """results: of every class and seed. found: {class: what findings.py found of it}."""
    by_class: dict[str, dict] = {}
    for name in dict.fromkeys(result["class"] for result in results):
        runs = [result for result in results if result["class"] == name]
        reasons = [reason for run in runs if (reason := why_undefined(run))]
        by_class[name] = _over_seeds([runs]) | {"runs": runs, "undefined": (reasons or [""])[0]}
    missing = [entry["undefined"] for entry in by_class.values() if entry["undefined"]]
    told = (
        f"mean of {len(by_class) - len(missing)} of {len(by_class)} classes: {missing[0]}" if missing else ""
    )
    simple = {name: entry["simple"] for name, entry in found.items() if entry.get("simple")}
    baselines: dict[str, dict] = {}
    for method in dict.fromkeys(method for metrics in simple.values() for method in metrics):
        per_class = {name: metrics[method] for name, metrics in simple.items() if method in metrics}
        whole = len(per_class) == len(simple)  # the mean of some classes is no match for that of all
        mean = _over_seeds([[entry] for entry in per_class.values()], METRICS) if whole else {}
        baselines[method] = {"classes": per_class, "mean": mean}
    parts = {
        part: {name: entry[part] for name, entry in found.items() if entry.get(part)}
        for part in ("margins", "defects", "thresholds", "localisation")
    }
    return Summary(
        classes=by_class,
        mean=_over_seeds([entry["runs"] for entry in by_class.values()]) | {"undefined": told},
        baselines=baselines,
        **parts,
        config=dataclasses.asdict(config),
        seeds=sorted({result["seed"] for result in results}),
        features=features,
        versions=utils.versions(),
        wall_time_s=round(seconds, 1),
        command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def read_summary(folder: Path) -> Summary:
    """The results.json of a run. Raises UserError."""
    path = folder / "results.json"
    try:
        return Summary(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} holds no results of a run of this version; run main.py again") from None


def why_undefined(result: dict) -> str:
    """Why a class has no AUROC; empty where it has one."""
    if not undefined(result["auroc"]):
        return ""
    if "reason" in result:  # it could not be fitted
        return result["reason"]
    if not result["n_test"]:
        return "no test images"
    return f"no {'normal' if result['n_anomalous'] else 'anomalous'} test images"


def _over_seeds(groups: list[list[dict]], metrics: Iterable[str] = COLUMNS) -> dict:
    """Mean over groups and seeds of the metrics, and the standard deviation over seeds of the groups' mean
    (0 for one seed). Groups for which a metric is undefined do not count; NaN where none is left."""
    summary = {}
    for metric in metrics:
        values = np.array([[result[metric] for result in group] for group in groups], float)  # groups, seeds
        defined = values[~np.isnan(values).any(1)]
        per_seed = defined.mean(0) if len(defined) else np.full(1, np.nan)
        summary[metric] = float(per_seed.mean())
        spread = per_seed.std(ddof=1) if len(per_seed) > 1 else 0 * per_seed[0]
        summary[f"{metric}_std"] = float(spread)
    return summary


# ---------------------------------------------------------------- the tables
def table_rows(summary: Summary) -> list[dict]:
    """The rows of the table, of every class and last of their mean, as results.csv has them: {column: text or
    number, not rounded, None or NaN where it is undefined}. Each simple detector has a column, its AUROC."""
    config, rows = summary.config, []
    for name, values in [*summary.classes.items(), (None, summary.mean)]:
        runs = values.get("runs", [{}])
        simple = {
            method: (table["mean"] if name is None else table["classes"].get(name, {})).get("auroc")
            for method, table in summary.baselines.items()
        }
        defined = {method: auroc for method, auroc in simple.items() if not undefined(auroc)}
        best = max(defined, key=lambda method: defined[method]) if defined else ""
        margin = {} if name is None else summary.margins.get(name, {})
        rows.append(
            {
                "class": "mean" if name is None else name,
                "dataset": config["dataset"],
                "run": config["modelname"],
                "seeds": " ".join(map(str, summary.seeds)),
                "epoch": " ".join(str(run["epoch"]) for run in runs if "epoch" in run),
                **{count: runs[0].get(count) for count in ("n_train", "n_test", "seconds")},
                **{key: values[key] for metric in COLUMNS for key in (metric, f"{metric}_std")},
                "best_simple": best,
                "best_simple_auroc": defined.get(best),
                **{f"margin_{key}": margin.get(key) for key in ("difference", "low", "high")},
                **simple,
                "undefined": values["undefined"],
            }
        )
    return rows


def main_table(summary: Summary) -> Table:
    """Every metric of the flow, and its lead over the best simple detector of each class; the thresholds
    where nothing was tested."""
    if summary.thresholds and not is_tested(summary):
        return threshold_table(summary)
    header, rows = ["class", *map(str.upper, METRICS), "oracle"], []
    header += ["simple", "flow - simple [95 %]"] if summary.baselines else []
    for row, name in zip(table_rows(summary), [*summary.classes, None]):
        cells = [row["class"], cell(row, "auroc", len(summary.seeds))]
        cells += [number(row[column]) for column in (*METRICS[1:], ORACLE)]
        if summary.baselines:
            margins = summary.margins
            lead = tables.wins_cell(margins.values()) if name is None else margin_cell(margins.get(name))
            cells += [number(row["best_simple_auroc"]), lead]
        rows.append(cells)
    return Table(header, rows, has_mean=True)


def threshold_table(summary: Summary) -> Table:
    """Where each class's first seed draws the line, and how sure that is."""
    rows = []
    for name, found in summary.thresholds.items():
        interval = f"{found['low']:.1%} to {found['high']:.1%}"
        rows.append([name, f"{found['score']:.4g}", f"{found['expected']:.1%}", interval, str(found["n"])])
    return Table(["class", "anomalous above", "false alarms", "95 % interval", "held-out images"], rows)


def all_tables(summary: Summary) -> dict[str, Table]:
    """{heading: table} of results.md and the page; those without content are left out."""
    n_seeds, methods = len(summary.seeds), list(summary.baselines)
    simple = [[row["class"], *(number(row[method]) for method in methods)] for row in table_rows(summary)]
    defects = [
        [name, kind, str(entry["n"]), cell(entry, "auroc", n_seeds)]
        for name, kinds in summary.defects.items()
        for kind, entry in kinds.items()
    ]
    heat = [
        [name, number(found["pixel_auroc"]), number(found["aupro"])]
        for name, found in summary.localisation.items()
    ]
    made = {"command": summary.command, "wall time": f"{summary.wall_time_s:.0f} s"}
    made |= summary.versions
    made |= {f"features: {key}": value for key, value in summary.features.items() if key in OF_FEATURES}
    changed = {name: value for name, value in summary.config.items() if value != FIELDS[name].default}
    found = {
        "Result": main_table(summary),
        "Simple detectors, AUROC": Table(["class", *methods], simple if methods else [], has_mean=True),
        "Kinds of defect": Table(["class", "kind", "images", "AUROC against the normal ones"], defects),
        "Where the defect is": Table(["class", "pixel AUROC", "AUPRO, up to 30 % false positives"], heat),
        "How it was made": Table(["", ""], [[name, str(value)] for name, value in made.items()]),
        "Knobs that are not the defaults": Table(["", ""], [[k, str(v)] for k, v in changed.items()]),
    }
    return {heading: table for heading, table in found.items() if table.rows}


def is_tested(summary: Summary) -> bool:
    """Whether a class has an AUROC."""
    return not undefined(summary.mean["auroc"])


def notes(summary: Summary) -> list[str]:
    """What a reader of the table must know: the epoch, the seeds, the simple detectors, what is undefined."""
    lines = []
    if is_tested(summary):
        epoch = "epoch by held-out likelihood" if summary.config["patience"] else "last epoch"
        over = "mean ± standard deviation over the seeds" if len(summary.seeds) > 1 else "seed"
        lines.append(
            f"AUROC: {epoch}, {over} {', '.join(map(str, summary.seeds))}; oracle: the epoch that is best on "
            "the test images. AUPR and FPR95: anomalies are the positive class."
        )
    if summary.baselines:
        lines.append(
            "simple: the best simple detector of each class, by its AUROC on the test images. flow - simple: "
            "of the first seed, interval by DeLong; counts of classes by Holm's correction."
        )
    reasons: dict[str, list[str]] = {}
    for name, values in summary.classes.items():
        if values["undefined"]:
            reasons.setdefault(values["undefined"], []).append(name)
    lines += [f"no AUROC ({reason}): {', '.join(names)}." for reason, names in reasons.items()]
    if skipped := summary.features.get("skipped"):
        lines.append(f"Left out: unreadable images: {utils.first_named(skipped)}.")
    return lines


# ---------------------------------------------------------------- rendered
def terminal_table(summary: Summary) -> str:
    return "\n".join([tables.as_text(*main_table(summary)), tables.wrapped(notes(summary))])


def as_markdown(summary: Summary) -> str:
    config = summary.config
    parts = [f"# {config['dataset']}, {config['extractor']}, fusion {config['fusion']}"]
    parts += map(tables.escaped, notes(summary))
    for heading, table in all_tables(summary).items():
        parts += [f"## {heading}", tables.as_markdown(table.header, table.rows)]
    return "\n\n".join(parts) + "\n"


def as_csv(summary: Summary) -> str:
    text, rows = io.StringIO(), table_rows(summary)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow("" if value != value else value for value in row.values())  # NaN is not itself
    return text.getvalue()


def write_results(folder: Path, summary: Summary) -> str:
    """Write results.json, results.csv and results.md -> the table as text."""
    write_text(folder / "results.md", as_markdown(summary))
    write_text(folder / "results.csv", as_csv(summary))
    write_json(folder / "results.json", vars(summary))
    return terminal_table(summary)
