"""The runs of a folder in one list, and two runs side by side: what `python report.py` prints."""

import datetime
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

import utils
from config import UserError
from detector import checkpoints
from reporting import tables
from reporting.tables import cell, margin_cell, number
from shell.files import file_name

STATES = "unfinished: no table yet, so many classes and seeds are fitted; newer: fitted since the table."
NAMES_ONLY = ("modelname",)  # knobs in which two runs always differ


class Run(NamedTuple):
    """A run's folder with its results.json (empty while unfinished, or unreadable by ``fault``) and the
    records of its classes."""

    name: str
    folder: Path
    summary: dict
    records: list[Path]
    fault: str = ""


def find_runs(root: Path) -> list[Run]:
    """The runs below a folder, by name; those of a sweep too."""
    folders = {path.parent for path in root.rglob("results.json")}
    folders |= {path.parent for path in root.rglob("classes") if path.is_dir()}
    return [open_run(folder, folder.relative_to(root).as_posix()) for folder in sorted(folders)]


def open_run(folder: Path, name: str) -> Run:
    """What a run's folder holds."""
    path, fault = folder / "results.json", ""
    summary: dict = {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if path.exists() and not {"classes", "mean", "config", "seeds"} <= set(summary):
            raise ValueError("it holds no results of a run")
    except (OSError, ValueError, TypeError) as error:
        summary, fault = {}, f"{path} cannot be read: {error}"
    return Run(name, folder, summary, sorted((folder / "classes").glob("*.json")), fault)


# ---------------------------------------------------------------- the list
def list_runs(root: Path) -> str:
    """A line per run: what it was made of, its mean AUROC, when, and whether it is finished. Raises UserError
    where there is none."""
    if not root.is_dir() or not (found := find_runs(root)):
        raise UserError(f"no runs in {root}/; main.py writes them there, or give two folders to compare")
    header = ["run", "data set", "backbone", "preset", "seeds", "AUROC", "date", "state"]
    table = tables.as_text(header, [line(run) for run in found], ruled_last=False)
    return f"{table}\n{tables.wrapped([STATES])}"


def line(run: Run) -> list[str]:
    config = configuration(run)
    about = [str(config.get(knob, "?")) for knob in ("dataset", "extractor", "preset")]
    about[1] = tables.shorten(about[1], 18)
    if not run.summary:
        newest = max([run.folder, *run.records], key=lambda path: path.stat().st_mtime)
        return [run.name, *about, "", "", date(newest), state(run)]
    seeds = ",".join(map(str, run.summary["seeds"]))
    auroc = number(run.summary["mean"]["auroc"])
    return [run.name, *about, tables.shorten(seeds, 8), auroc, date(run.folder / "results.json"), state(run)]


def configuration(run: Run) -> dict:
    """The knobs of a run: its own, or those of a class that it has fitted; empty where none can be read."""
    if run.summary:
        return run.summary["config"]
    for path in run.records:
        try:
            return checkpoints.read_record(path)["config"]
        except (OSError, ValueError, KeyError):
            continue
    return {}


def state(run: Run) -> str:
    """Whether a run has its table, and no class is newer than it."""
    if run.fault:
        return "unreadable"
    if not run.summary:
        return f"unfinished: {len(run.records)}"
    written = (run.folder / "results.json").stat().st_mtime
    newer = sum(path.stat().st_mtime > written for path in run.records)
    return f"newer: {newer}" if newer else "finished"


def date(path: Path) -> str:
    return datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d")


# ---------------------------------------------------------------- two runs
def find_run(name: str, root: Path) -> Run:
    """A finished run by its name or its folder. Raises UserError when there is none."""
    for folder in (root / name, Path(name)):
        if (folder / "results.json").is_file():
            inside = folder.resolve().is_relative_to(root.resolve())
            shown = folder.resolve().relative_to(root.resolve()).as_posix() if inside else folder.name
            run = open_run(folder, shown)
            if run.fault:
                raise UserError(f"{run.fault}; run main.py again")
            return run
    known = ", ".join(run.name for run in find_runs(root) if run.summary) if root.is_dir() else ""
    raise UserError(f"no finished run {name!r} in {root}/; there are: {known or 'none'}")


def compare(first: str, second: str, root: Path) -> str:
    """Two runs side by side: AUROC per class with the paired difference, and the knobs that differ. Raises
    UserError."""
    a, b = find_run(first, root), find_run(second, root)
    shared = [name for name in a.summary["classes"] if name in b.summary["classes"]]
    if not shared:
        raise UserError(f"{first} and {second} have no class in common")
    margins = {name: paired(a, b, name) for name in shared}
    header = ["class", "A", "B", "B - A [95 %]"]
    rows = [
        [name, *(cell(run.summary["classes"][name], "auroc", len(run.summary["seeds"])) for run in (a, b))]
        + [margins[name].get("missing") or margin_cell(margins, name)]
        for name in shared
    ]
    known = {name: margin for name, margin in margins.items() if "missing" not in margin}
    means = [number(mean_over(run, shared)) for run in (a, b)]
    rows.append(["mean", *means, margin_cell(known, None)])
    parts = [f"A: {a.name}\nB: {b.name}\n", tables.as_text(header, rows)]
    return "\n".join([*parts, tables.wrapped(notes(a, b, shared)), "", differences(a, b)])


def mean_over(run: Run, names: list[str]) -> float:
    """The mean AUROC over some classes; NaN where one is undefined."""
    return float(np.mean([run.summary["classes"][name]["auroc"] for name in names], dtype=float))


def notes(a: Run, b: Run, shared: list[str]) -> list[str]:
    """What a reader of the comparison must know."""
    seed = first_seed(a, b)
    lines = ["mean: over the classes that both have."]
    if seed is not None:
        lines = [f"B - A: seed {seed}, on the same test images, with its 95 % interval (DeLong); {lines[0]}"]
    for run in (a, b):
        alone = [name for name in run.summary["classes"] if name not in shared]
        lines += [f"only in {run.name}: {', '.join(alone)}."] if alone else []
    return lines


def first_seed(a: Run, b: Run) -> int | None:
    """The first seed that both runs have."""
    return next((seed for seed in a.summary["seeds"] if seed in b.summary["seeds"]), None)


def paired(a: Run, b: Run, name: str) -> dict:
    """AUROC of B minus that of A on a class's test images, with its interval (utils.paired_difference), for
    the first seed of both; {"missing": the reason} where they cannot be paired."""
    seed, kept = first_seed(a, b), []
    if seed is None:
        return {"missing": "no seed in common"}
    for run in (a, b):
        try:
            kept.append(checkpoints.read_record(run.folder / "classes" / f"{file_name(name)}-seed{seed}"))
        except (OSError, ValueError):
            return {"missing": f"no scores in {run.name}"}
    theirs, ours = (record["test"] for record in kept)
    images = [[record["features"].get(field) for field in ("image_list", "skipped")] for record in kept]
    if images[0] != images[1] or any(ours[key] != theirs[key] for key in ("rows", "labels")):
        return {"missing": "other test images"}
    precisions = [record["features"].get("precision") for record in kept]
    if precisions[0] != precisions[1]:  # which alone moves AUROC by more than most knobs do
        return {"missing": f"features in {precisions[0]}, {precisions[1]}"}
    return utils.paired_difference(*map(np.array, (ours["labels"], ours["scores"], theirs["scores"])))


def differences(a: Run, b: Run) -> str:
    """The knobs and versions that differ, as a table."""
    rows = []
    for kind in ("config", "versions"):
        of_a, of_b = (run.summary.get(kind, {}) for run in (a, b))
        for name in {**of_a, **of_b}:
            values = [of.get(name, "-") for of in (of_a, of_b)]
            if values[0] != values[1] and name not in NAMES_ONLY:
                rows.append([name, *(tables.shorten(str(value), 38) for value in values)])
    if not rows:
        return "no knob and no version differs"
    return tables.as_text(["differs", "A", "B"], rows, ruled_last=False)
