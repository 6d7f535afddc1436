"""A run's report: its summary over classes and seeds, and the tables that its files and the terminal show."""

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
from shell.files import as_strict_json, write_text
from utils import METRICS

ORACLE = "best_on_test_auroc"
COLUMNS = (*METRICS, ORACLE, "latent_auroc", "likelihood_auroc")  # the last two: of the flow's other scores
OF_FEATURES = ("weights", "weights_sha256", "precision", "img_size", "tokens", "n_feat", "image_list")


# ---------------------------------------------------------------- the summary
@dataclasses.dataclass
class Found:
    """What a class came to beside its score; what could not be told is empty."""

    simple: dict[str, dict] = dataclasses.field(default_factory=dict)  # metrics of each simple detector
    margin: dict = dataclasses.field(default_factory=dict)  # of the flow over the best: paired_difference
    defects: dict[str, dict] = dataclasses.field(default_factory=dict)  # by kind: images n, AUROC
    threshold: dict = dataclasses.field(default_factory=dict)  # the fields of calibration.Threshold
    localisation: dict = dataclasses.field(default_factory=dict)  # metrics of heat maps


@dataclasses.dataclass
class Summary:
    """A run's results.json; what is of single classes is by their names."""

    classes: dict[str, dict]  # its row of results.csv, and "runs": the result of every seed
    mean: dict  # the last row: over the classes for which a metric is defined
    baselines: list[str]  # the names of the simple detectors
    found: dict[str, Found]
    config: dict
    seeds: list[int]
    features: dict  # the sidecar of the features
    versions: dict[str, str]
    wall_time_s: float
    command: str

    @property
    def rows(self) -> list[dict]:
        """Of results.csv: {column: text or number, not rounded, None or NaN where it is undefined}."""
        return [*self.classes.values(), self.mean]


def summarize(
    config: Config, results: list[dict], found: dict[str, Found], seconds: float, features: dict
) -> Summary:
    """results: of every class and seed."""
    seeds = sorted({result["seed"] for result in results})
    about = {"dataset": config.dataset, "run": config.modelname, "seeds": " ".join(map(str, seeds))}
    simple = [entry.simple for entry in found.values() if entry.simple]
    methods = list(dict.fromkeys(method for own in simple for method in own))

    def row(name: str, runs: list[dict], metrics: dict, aurocs: dict, margin: dict, undefined: str) -> dict:
        best = best_of(aurocs)
        return {
            "class": name,
            **about,
            "epoch": " ".join(str(run["epoch"]) for run in runs if "epoch" in run),
            **{count: runs[0].get(count) for count in ("n_train", "n_test", "seconds")},
            **metrics,
            "best_simple": best,
            "best_simple_auroc": aurocs.get(best),
            **{f"margin_{key}": margin.get(key) for key in ("difference", "low", "high")},
            **{method: aurocs.get(method) for method in methods},
            "undefined": undefined,
        }

    by_class: dict[str, list[dict]] = {}
    for result in results:
        by_class.setdefault(result["class"], []).append(result)
    classes = {}
    for name, runs in by_class.items():
        own = found.get(name, Found())
        aurocs = {method: metrics["auroc"] for method, metrics in own.simple.items()}
        reason = next(filter(None, map(why_undefined, runs)), "")
        classes[name] = row(name, runs, over_seeds([runs]), aurocs, own.margin, reason) | {"runs": runs}
    missing = [entry["undefined"] for entry in classes.values() if entry["undefined"]]
    told = f"mean of {len(classes) - len(missing)} of {len(classes)} classes: {missing[0]}" if missing else ""
    # The mean of some classes is no match for that of all.
    shared = [method for method in methods if all(method in own for own in simple)]
    means = {each: over_seeds([[own[each]] for own in simple], ["auroc"])["auroc"] for each in shared}
    return Summary(
        classes=classes,
        mean=row("mean", [{}], over_seeds(by_class.values()), means, {}, told),
        baselines=methods,
        found=found,
        config=dataclasses.asdict(config),
        seeds=seeds,
        features=features,
        versions=utils.versions(),
        wall_time_s=round(seconds, 1),
        command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def read_summary(folder: Path) -> Summary:
    """The results.json of a run. Raises UserError."""
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {name: Found(**parts) for name, parts in content.pop("found").items()}
        return Summary(**content, found=found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} holds no results of a run of this version; run main.py again") from None


def why_undefined(result: dict) -> str:
    """Why a class has no AUROC; empty where it has one."""
    if "reason" in result or not undefined(result["auroc"]):
        return result.get("reason", "")  # one that could not be fitted has a reason
    missing = "normal " if result["n_anomalous"] else "anomalous " if result["n_test"] else ""
    return f"no {missing}test images"


def over_seeds(groups: Iterable[list[dict]], metrics: Iterable[str] = COLUMNS) -> dict[str, float]:
    """Mean over groups and seeds of the metrics, and the standard deviation over seeds of the groups' mean
    (0 for one seed). Groups for which a metric is undefined do not count; NaN where none is left."""
    summary = {}
    for metric in metrics:
        values = np.array([[result[metric] for result in group] for group in groups], float)  # groups, seeds
        defined = values[~np.isnan(values).any(1)]
        per_seed = defined.mean(0) if len(defined) else np.full(1, np.nan)
        summary[metric] = float(per_seed.mean())
        summary[f"{metric}_std"] = float(per_seed.std(ddof=1) if len(per_seed) > 1 else 0 * per_seed[0])
    return summary


def best_of(aurocs: dict[str, float]) -> str:
    """The detector with the highest AUROC; empty where none is defined."""
    return max((name for name in aurocs if not undefined(aurocs[name])), key=aurocs.__getitem__, default="")


# ---------------------------------------------------------------- the tables
def main_table(summary: Summary) -> Table:
    """Every metric of the flow, and its lead over the best simple detector of each class; where nothing was
    tested, where each class's first seed draws the line, and how sure that is."""
    lines = {name: found.threshold for name, found in summary.found.items() if found.threshold}
    if lines and undefined(summary.mean["auroc"]):
        header = ["class", "anomalous above", "false alarms", "95 % interval", "held-out images"]
        forms = ("{score:.4g}", "{expected:.1%}", "{low:.1%} to {high:.1%}", "{n}")
        return Table(header, [[name, *(f.format(**line) for f in forms)] for name, line in lines.items()])
    header = ["class", *map(str.upper, METRICS), "oracle"]
    margins = [summary.found.get(name, Found()).margin for name in summary.classes]
    rows = []
    for row, lead in zip(summary.rows, [*map(margin_cell, margins), tables.wins_cell(margins)]):
        figures = [number(row[column]) for column in (*list(METRICS)[1:], ORACLE)]
        rows.append([row["class"], cell(row, len(summary.seeds)), *figures])
        rows[-1] += [number(row["best_simple_auroc"]), lead] if summary.baselines else []
    return Table(header + ["simple", "flow - simple [95 %]"] * bool(summary.baselines), rows, has_mean=True)


def all_tables(summary: Summary) -> dict[str, Table]:
    """{heading: table} of results.md and the page; those without content are left out."""
    methods, of_classes, n_seeds = summary.baselines, summary.found.items(), len(summary.seeds)
    simple = [[row["class"], *(number(row[method]) for method in methods)] for row in summary.rows]
    defects = [
        [name, kind, str(entry["n"]), cell(entry, n_seeds)]
        for name, of in of_classes
        for kind, entry in of.defects.items()
    ]
    heat = [[name, *map(number, of.localisation.values())] for name, of in of_classes if of.localisation]
    made = {"command": summary.command, "wall time": f"{summary.wall_time_s:.0f} s", **summary.versions}
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


def notes(summary: Summary) -> list[str]:
    """What a reader of the table must know: the epoch, the seeds, the simple detectors, what is undefined."""
    lines = []
    if not undefined(summary.mean["auroc"]):
        over = "mean ± standard deviation over the seeds" if len(summary.seeds) > 1 else "seed"
        lines.append(
            f"AUROC: last epoch, {over} {', '.join(map(str, summary.seeds))}; oracle: the epoch that is best "
            "on the test images. AUPR and FPR95: anomalies are the positive class."
        )
    if summary.baselines:
        lines.append(
            "simple: the best simple detector of each class, by its AUROC on the test images. flow - simple: "
            "of the first seed, interval by DeLong; counts of classes by Holm's correction."
        )
    reasons: dict[str, list[str]] = {}
    for name, row in summary.classes.items():
        reasons.setdefault(row["undefined"], []).append(name)
    lines += [f"no AUROC ({reason}): {', '.join(names)}." for reason, names in reasons.items() if reason]
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


def write_results(folder: Path, summary: Summary) -> str:
    """Write results.json, results.csv and results.md -> the table as text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, summary.mean, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(as_strict_json(summary.rows))  # what is undefined is empty
    write_text(folder / "results.csv", text.getvalue())
    write_text(folder / "results.md", as_markdown(summary))
    content = as_strict_json(dataclasses.asdict(summary))
    write_text(folder / "results.json", json.dumps(content, indent=1) + "\n")
    return terminal_table(summary)
