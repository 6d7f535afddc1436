"""The report of a run: its summary over classes and seeds, the table, and the files results.json,
.csv and .md."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

import utils
from config import Config
from detector.calibration import Threshold
from reporting import tables
from reporting.tables import cell, margin_cell, number, undefined
from shell.command_line import command_line
from shell.files import write_json, write_text
from utils import METRICS

ORACLE = "best_on_test_auroc"
# The AUROC that the flow's other scores would have had -> their titles.
SCORE_AUROCS = {"latent_auroc": "mean z²", "likelihood_auroc": "negative log-likelihood"}  # of every epoch
SHOWN = (*METRICS, ORACLE)  # the table's columns
COLUMNS = (*SHOWN, *SCORE_AUROCS)  # the files'
COUNTS = ("epoch", "n_train", "n_test", "seconds")  # what results.csv says of a class beside its metrics


# ---------------------------------------------------------------- the summary
def summarize(
    config: Config,
    results: list[dict],
    baseline_table: dict,
    seconds: float,
    meta: dict,
    defects: dict[str, dict] | None = None,
    thresholds: dict[str, Threshold | None] | None = None,
) -> dict:
    """results.json: per class the mean and standard deviation over seeds, and their mean over the classes for
    which they are defined (std of the seeds' means).

    defects: of each class that has kinds of defect (findings.py). thresholds: of each class's first seed,
    None where nothing was held out."""
    classes = list(dict.fromkeys(result["class"] for result in results))
    by_class = {name: _over_seeds([[r for r in results if r["class"] == name]]) for name in classes}
    seeds = sorted({result["seed"] for result in results})
    for name in classes:
        runs = [result for result in results if result["class"] == name]
        reasons = [reason for result in runs if (reason := why_undefined(result))]
        by_class[name] |= {"runs": runs, "undefined": reasons[0] if reasons else ""}
    mean = _over_seeds([[r for r in results if r["class"] == name] for name in classes])
    simple: dict[str, dict[str, dict]] = {}
    for class_name, entry in baseline_table.items():
        for name, metrics in entry["metrics"].items():
            simple.setdefault(name, {})[class_name] = metrics
    rows = {
        name: {"classes": per_class, "mean": _mean_metrics([per_class.get(c) for c in baseline_table])}
        for name, per_class in simple.items()
    }
    margins = {name: entry["margin"] | {"best": entry["best"]} for name, entry in baseline_table.items()}
    return {
        "classes": by_class,
        "mean": mean,
        "baselines": rows,
        "margins": margins,
        "defects": defects or {},
        "thresholds": {name: found._asdict() for name, found in (thresholds or {}).items() if found},
        "config": dataclasses.asdict(config),
        "seeds": seeds,
        "features": meta,
        "versions": utils.versions(),
        "wall_time_s": round(seconds, 1),
        "command": command_line(),
    }


def why_undefined(result: dict) -> str:
    """Why a class has no AUROC; empty where it has one."""
    if not undefined(result["auroc"]):
        return ""
    if "reason" in result:  # it could not be fitted
        return result["reason"]
    if result.get("n_test") == 0:
        return "no test images"
    if "n_anomalous" not in result:
        return "the test images have one label only"
    return f"no {'anomalous' if result['n_anomalous'] == 0 else 'normal'} test images"


def _over_seeds(groups: list[list[dict]]) -> dict:
    """Mean over groups and seeds of every metric, and the standard deviation over seeds of the groups' mean
    (0 for one seed). Groups for which a metric is undefined do not count; NaN where none is left."""
    summary = {}
    for metric in COLUMNS:
        values = np.array([[result[metric] for result in group] for group in groups], float)  # groups, seeds
        defined = values[~np.isnan(values).any(1)]
        per_seed = defined.mean(0) if len(defined) else np.full(1, np.nan)
        summary[metric] = float(per_seed.mean())
        spread = per_seed.std(ddof=1) if len(per_seed) > 1 else 0 * per_seed[0]
        summary[f"{metric}_std"] = float(spread)
    return summary


def _mean_metrics(entries: list[dict | None]) -> dict:
    """The mean of a simple detector over the classes for which a metric is defined; NaN where none is, and
    for a detector that some class lacks: the mean of others is no match for that of all."""
    means = {}
    for metric in METRICS:
        values = [entry[metric] for entry in entries if entry and not undefined(entry[metric])]
        means[metric] = float(np.mean(values)) if values and all(entries) else float("nan")
    return means


# ---------------------------------------------------------------- the table
def make_table(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table in the files: a row per class, then the mean; every baseline has a
    column."""
    n_seeds = len(summary["seeds"])
    headline, *others = (metric.title for metric in METRICS.values())
    header = ["class", f"{headline} ({reported_epoch(summary)})", *others, "best on test (oracle)"]
    header += summary["baselines"]
    if summary["margins"]:
        header.append("flow - best simple (95 %)")

    rows = []
    for row in table_rows(summary):
        rows.append(
            [
                row.label,
                *(cell(row.values, metric, n_seeds) for metric in SHOWN),
                *(number(simple_auroc(table, row.name)) for table in summary["baselines"].values()),
                *([margin_cell(summary["margins"], row.name)] if summary["margins"] else []),
            ]
        )
    return header, rows


def terminal_table(summary: dict) -> str:
    """The table on screen, 100 columns wide at most: the baselines folded to the best one, notes below. Where
    no class has an AUROC, the thresholds are what there is to tell."""
    if nothing_tested(summary) and summary.get("thresholds"):
        table = tables.as_text(*threshold_table(summary), ruled_last=False)
        return "\n".join([table, tables.wrapped(notes(summary))])
    n_seeds, baselines = len(summary["seeds"]), summary["baselines"]
    header = ["class", *(metric.title for metric in METRICS.values()), "oracle"]
    header += ["simple"] if baselines else []
    header += ["flow - simple [95 %]"] if summary["margins"] else []
    rows = []
    for row in table_rows(summary):
        line = [row.label, cell(row.values, "auroc", n_seeds)]
        line += [number(row.values[metric]) for metric in SHOWN[1:]]
        if baselines:
            line.append(number(best_simple(summary, row.name)[1]))
        if summary["margins"]:
            line.append(margin_cell(summary["margins"], row.name))
        rows.append(line)
    return "\n".join([tables.as_text(header, rows), tables.wrapped(notes(summary))])


def notes(summary: dict) -> list[str]:
    """What a reader of the table must know: the epoch, the seeds, the simple detectors, what is undefined."""
    seeds, lines = ", ".join(map(str, summary["seeds"])), []
    several = "mean ± standard deviation over the seeds" if len(summary["seeds"]) > 1 else "seed"
    if not nothing_tested(summary):
        how = f"{reported_epoch(summary)}, {several} {seeds}"
        lines.append(f"AUROC: {how}; oracle: the epoch that is best on the test images.")
        lines.append(
            "AUPR and FPR95 (false alarms where 95 % of the anomalies are found): anomalies are the positive "
            f"class{anomalous_share(summary)}."
        )
    if summary["baselines"]:
        means = {name: table["mean"]["auroc"] for name, table in summary["baselines"].items()}
        ranked = sorted((name for name in means if not undefined(means[name])), key=lambda n: -means[n])
        listed = "; ".join(f"{name} {number(means[name])}" for name in ranked)
        listed = f"; as means over the classes: {listed}" if ranked else ""
        lines.append(f"simple: the best simple detector of each class{listed}.")
    reasons: dict[str, list[str]] = {}
    for name, values in summary["classes"].items():
        if values.get("undefined"):
            reasons.setdefault(values["undefined"], []).append(name)
    lines += [f"no AUROC ({reason}): {', '.join(names)}." for reason, names in reasons.items()]
    if precision := summary["features"].get("precision"):
        lines.append(f"Features were computed in {precision}.")
    if skipped := summary["features"].get("skipped"):
        shown = utils.first_named(skipped)
        lines.append(f"Left out: {utils.counted(len(skipped), 'unreadable image')}: {shown}.")
    return lines


def anomalous_share(summary: dict) -> str:
    """The share of anomalous test images, or between what shares it lies; empty where it is not known."""
    runs = [run for entry in summary["classes"].values() for run in entry["runs"]]
    shares = sorted(run["n_anomalous"] / run["n_test"] for run in runs if run.get("n_test"))
    told = " to ".join(dict.fromkeys(f"{share:.1%}" for share in (*shares[:1], *shares[-1:])))
    return f", {told} of a class's test images (the AUPR of chance)" if told else ""


def nothing_tested(summary: dict) -> bool:
    """Whether no class has an AUROC."""
    return undefined(summary["mean"]["auroc"])


def threshold_table(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of where each class's first seed draws the line, and how sure that is."""
    rows = [
        [
            name,
            f"{found['score']:.4g}",
            f"{found['expected']:.1%}",
            f"{found['low']:.1%} to {found['high']:.1%}",
            str(found["n"]),
        ]
        for name, found in summary.get("thresholds", {}).items()
    ]
    return ["class", "anomalous above", "false alarms", "95 % interval", "held-out images"], rows


class Row(NamedTuple):
    """A row of a table: its label, the name of its class (None: the mean over them, whatever a class is
    called), and its figures."""

    label: str
    name: str | None
    values: dict


def table_rows(summary: dict) -> list[Row]:
    """A row per class, then the mean."""
    rows = [Row(name, name, values) for name, values in summary["classes"].items()]
    return [*rows, Row("mean", None, summary["mean"])]


def simple_auroc(table: dict, name: str | None) -> float:
    """The AUROC of a simple detector on a class, or its mean; NaN where it was not asked."""
    entry = table["mean"] if name is None else table["classes"].get(name, {})
    return entry.get("auroc", float("nan"))


def reported_epoch(summary: dict) -> str:
    return "epoch by held-out likelihood" if summary["config"]["patience"] else "last epoch"


def best_simple(summary: dict, name: str | None) -> tuple[str, float]:
    """The simple detector with the highest AUROC on a class (or on average), and that AUROC; NaN where it is
    undefined."""
    aurocs = {method: simple_auroc(table, name) for method, table in summary["baselines"].items()}
    defined = {method: value for method, value in aurocs.items() if not undefined(value)}
    return max(defined.items(), key=lambda item: item[1]) if defined else ("", float("nan"))


# ---------------------------------------------------------------- the files
def as_markdown(summary: dict) -> str:
    config = summary["config"]
    settings = ", ".join(f"{name} {value}" for name, value in config.items() if value is not None)
    parts = [table for table in (defect_table(summary), threshold_table(summary)) if table[1]]
    others = "".join(f"\n\n{tables.as_markdown(*table)}" for table in parts)
    explained = ["Baseline columns: AUROC.", *notes(summary)]
    return (
        f"# {config['dataset']}, {config['extractor']}, fusion {config['fusion']}\n\n"
        f"{tables.as_markdown(*make_table(summary))}{others}\n\n"
        f"{' '.join(tables.escaped(line) for line in explained)}\n\n"
        f"{describe_run(summary, summary['wall_time_s'])}\n\nConfiguration: {settings}.\n"
    )


def defect_table(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the AUROC per kind of defect; no rows where no class has kinds."""
    n_seeds = len(summary["seeds"])
    rows = [
        [name, kind, str(entry["n"]), cell(entry, "auroc", n_seeds)]
        for name, kinds in summary.get("defects", {}).items()
        for kind, entry in kinds.items()
    ]
    return ["class", "kind of defect", "images", "AUROC against the normal test images"], rows


def describe_run(summary: dict, seconds: float) -> str:
    """How a result came about, in one line: command, time, versions, machine."""
    versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    return f"command `{summary['command']}`; wall time {seconds:.0f} s; {versions}."


def write_results(folder: Path, summary: dict) -> str:
    """Write results.json, results.csv and results.md -> the table as text."""
    write_text(folder / "results.md", as_markdown(summary))
    write_text(folder / "results.csv", as_csv(summary))
    write_json(folder / "results.json", summary)
    return terminal_table(summary)


def as_csv(summary: dict) -> str:
    """One line per method and class, numbers unrounded: mean over the seeds; a metric that is undefined is
    empty, and the last column says why."""
    columns = [name for metric in COLUMNS for name in (metric, f"{metric}_std")]
    config, seeds = summary["config"], summary["seeds"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "class", "dataset", "run", "seeds", *COUNTS, *columns, "undefined"])
    for method, table in ({"flow": summary} | summary["baselines"]).items():
        for label, name, values in table_rows(table):
            fitted = method == "flow"  # the baselines stand beside the flows of the first seed
            own_seeds = " ".join(map(str, seeds if fitted else seeds[:1]))
            counts = _counts(summary["classes"][name]["runs"] if name is not None else [], fitted)
            figures = ["" if undefined(values.get(column)) else values[column] for column in columns]
            about = [method, label, config["dataset"], config["modelname"], own_seeds]
            writer.writerow([*about, *counts, *figures, _reason(summary, name)])
    return text.getvalue()


def _reason(summary: dict, name: str | None) -> str:
    """Why a row has no AUROC, or for how many classes the mean has none; empty where nothing is missing."""
    if name is not None:
        return summary["classes"][name]["undefined"]
    missing = [entry["undefined"] for entry in summary["classes"].values() if entry["undefined"]]
    total = len(summary["classes"])
    return f"mean of {total - len(missing)} of {total} classes: {missing[0]}" if missing else ""


def _counts(runs: list[dict], fitted: bool) -> list:
    """The columns COUNTS of a class: each seed's epoch; images; mean seconds. Epoch and seconds are the
    flow's own."""
    if not runs:
        return [""] * len(COUNTS)
    epochs = " ".join(str(run["epoch"]) for run in runs if "epoch" in run) if fitted else ""
    seconds = [run["seconds"] for run in runs if "seconds" in run] if fitted else []
    mean = round(float(np.mean(seconds)), 1) if seconds else ""
    return [epochs, runs[0].get("n_train", ""), runs[0].get("n_test", ""), mean]


# ---------------------------------------------------------------- sweeps
def sweep_table(
    sweep: dict[str, list[str]], summaries: dict[tuple, dict], metric: str = "auroc"
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a sweep: a row per value of its first knob, a column per combination of the others;
    each cell the mean ± std of a metric."""
    first = next(iter(sweep))
    columns = list(dict.fromkeys(values[1:] for values in summaries))
    n_seeds = len(next(iter(summaries.values()))["seeds"])
    header = [first, *(" ".join(column) or "mean AUROC" for column in columns)]
    rows = []
    for value in sweep[first]:
        means = [summaries[(value, *column)]["mean"] for column in columns]
        rows.append([value, *(cell(mean, metric, n_seeds) for mean in means)])
    return header, rows


def write_sweep(
    folder: Path, sweep: dict[str, list[str]], summaries: dict[tuple, dict], seconds: float
) -> str:
    """Write sweep.json and sweep.md -> the table as text."""
    header, rows = sweep_table(sweep, summaries)
    first = next(iter(summaries.values()))
    runs = {" ".join(values): summary for values, summary in summaries.items()}
    write_json(folder / "sweep.json", {"sweep": sweep, "runs": runs})
    seeds = ", ".join(map(str, first["seeds"]))
    spread = f"± standard deviation over seeds {seeds}" if len(first["seeds"]) > 1 else f"seed {seeds}"
    note = f"Mean AUROC over the classes, {spread}; {describe_run(first, seconds)}"
    parts = [f"Score: {first['config']['score']}\n\n{tables.as_markdown(header, rows)}"]
    for metric, title in SCORE_AUROCS.items():
        table = tables.as_markdown(*sweep_table(sweep, summaries, metric))
        parts.append(f"The same flows scored by {title}:\n\n{table}")
    write_text(folder / "sweep.md", "\n\n".join([f"# {' x '.join(sweep)}", *parts, note]) + "\n")
    return tables.as_text(header, rows, ruled_last=False)
