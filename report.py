"""The report of a run: its summary over classes and seeds, the table, and the files results.json, .csv and
.md."""

import csv
import dataclasses
import io
import shlex
import sys
from pathlib import Path

import numpy as np

import utils
from config import Config
from model import SCORES
from utils import METRICS

ORACLE = "best_on_test_auroc"
# The AUROC that the flow's other scores would have had -> their titles.
SCORE_AUROCS = {f"{name}_auroc": score.title for name, score in SCORES.items() if not score.needs_reference}
SHOWN = (*METRICS, ORACLE)  # the table's columns
COLUMNS = (*SHOWN, *SCORE_AUROCS)  # the files'


def summarize(config: Config, results: list[dict], baseline_table: dict, seconds: float, meta: dict) -> dict:
    """results.json: per class the mean and standard deviation over seeds, and their mean over classes (std of
    the seeds' means)."""
    classes = list(dict.fromkeys(result["class"] for result in results))
    by_class = {name: _over_seeds([[r for r in results if r["class"] == name]]) for name in classes}
    seeds = sorted({result["seed"] for result in results})
    for name in classes:
        by_class[name]["runs"] = [result for result in results if result["class"] == name]
    mean = _over_seeds([[r for r in results if r["class"] == name] for name in classes])
    simple: dict[str, dict[str, dict]] = {}
    for class_name, entry in baseline_table.items():
        for name, metrics in entry["metrics"].items():
            simple.setdefault(name, {})[class_name] = metrics
    rows = {
        name: {"classes": per_class, "mean": _mean_metrics(per_class)} for name, per_class in simple.items()
    }
    margins = {name: entry["margin"] | {"best": entry["best"]} for name, entry in baseline_table.items()}
    return {
        "classes": by_class,
        "mean": mean,
        "baselines": rows,
        "margins": margins,
        "config": dataclasses.asdict(config),
        "seeds": seeds,
        "features": meta,
        "versions": utils.versions(),
        "wall_time_s": round(seconds, 1),
        "command": "python " + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _over_seeds(groups: list[list[dict]]) -> dict:
    """Mean over groups and seeds of every metric, and the standard deviation over seeds of the groups' mean
    (0 for one seed)."""
    summary = {}
    for metric in COLUMNS:
        values = np.array([[result[metric] for result in group] for group in groups])  # (groups, seeds)
        per_seed = values.mean(0)
        summary[metric] = float(per_seed.mean())
        summary[f"{metric}_std"] = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else 0.0
    return summary


def _mean_metrics(per_class: dict[str, dict]) -> dict:
    return {metric: float(np.mean([values[metric] for values in per_class.values()])) for metric in METRICS}


def make_table(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a row per class, then the mean."""
    n_seeds, config = len(summary["seeds"]), summary["config"]
    chosen = "last epoch" if config["select_epoch"] == "last" else "epoch by held-out likelihood"
    headline, *others = (metric.title for metric in METRICS.values())
    header = ["class", f"{headline} ({chosen})", *others, "best on test (oracle)", *summary["baselines"]]
    if summary["margins"]:
        header.append("flow - best simple (95 %)")

    rows = []
    for name, values in [*summary["classes"].items(), ("mean", summary["mean"])]:
        baselines = summary["baselines"].values()
        simple = [table["mean"] if name == "mean" else table["classes"][name] for table in baselines]
        rows.append(
            [
                name,
                *(cell(values, metric, n_seeds) for metric in SHOWN),
                *(f"{result['auroc']:.4f}" for result in simple),
                *([margin_cell(summary["margins"], name)] if summary["margins"] else []),
            ]
        )
    return header, rows


def margin_cell(margins: dict[str, dict], name: str) -> str:
    """How far the flow of the first seed is above the best simple detector of a class, with the paired
    interval; for the mean, the classes where it is above by more than the interval."""
    if name in margins:
        margin = margins[name]
        return f"{margin['difference']:+.4f} [{margin['low']:+.4f}, {margin['high']:+.4f}]"
    return f"above in {sum(m['low'] > 0 for m in margins.values())} of {len(margins)}"


def cell(values: dict, metric: str, n_seeds: int) -> str:
    return f"{values[metric]:.4f}" + (f" ± {values[f'{metric}_std']:.4f}" if n_seeds > 1 else "")


def as_text(header: list[str], rows: list[list[str]], ruled_last: bool = True) -> str:
    """The table in columns; the last row stands below a line when it is a mean."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *rows]
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], *([rule] if ruled_last else []), lines[-1]])


def as_markdown(header: list[str], rows: list[list[str]], summary: dict) -> str:
    config = summary["config"]
    settings = ", ".join(f"{name} {value}" for name, value in config.items() if value is not None)
    return (
        f"# {config['dataset']}, {config['extractor']}, fusion "
        f"{config['fusion']}\n\n{markdown_table(header, rows)}\n\n"
        f"Seeds: {', '.join(map(str, summary['seeds']))}; ± is the standard deviation over them. Baseline "
        f"columns: AUROC.\n\n"
        f"{describe_run(summary, summary['wall_time_s'])}\n\nConfiguration: {settings}.\n"
    )


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_run(summary: dict, seconds: float) -> str:
    """How a result came about, in one line: command, time, versions, machine."""
    versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    return f"command `{summary['command']}`; wall time {seconds:.0f} s; {versions}."


def write_results(folder: Path, summary: dict) -> str:
    """Write results.json, results.csv and results.md -> the table as text."""
    header, rows = make_table(summary)
    utils.write_text(folder / "results.md", as_markdown(header, rows, summary))
    utils.write_text(folder / "results.csv", as_csv(summary))
    utils.write_json(folder / "results.json", summary)
    return as_text(header, rows)


def as_csv(summary: dict) -> str:
    """One line per method and class, numbers unrounded."""
    columns = [name for metric in COLUMNS for name in (metric, f"{metric}_std")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "class", *columns])
    for method, table in ({"flow": summary} | summary["baselines"]).items():
        for name, values in [*table["classes"].items(), ("mean", table["mean"])]:
            writer.writerow([method, name, *(values.get(column, "") for column in columns)])
    return text.getvalue()


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
    utils.write_json(folder / "sweep.json", {"sweep": sweep, "runs": runs})
    seeds = ", ".join(map(str, first["seeds"]))
    spread = f"± standard deviation over seeds {seeds}" if len(first["seeds"]) > 1 else f"seed {seeds}"
    note = f"Mean AUROC over the classes, {spread}; {describe_run(first, seconds)}"
    tables = [f"Score: {first['config']['score']}\n\n{markdown_table(header, rows)}"]
    for metric, title in SCORE_AUROCS.items():
        table = markdown_table(*sweep_table(sweep, summaries, metric))
        tables.append(f"The same flows scored by {title}:\n\n{table}")
    utils.write_text(folder / "sweep.md", "\n\n".join([f"# {' x '.join(sweep)}", *tables, note]) + "\n")
    return as_text(header, rows, ruled_last=False)
