"""The runs of a folder in one list, and two runs side by side: what `python report.py` prints."""

import datetime
from pathlib import Path

import numpy as np

import utils
from config import UserError
from detector import checkpoints
from reporting import tables
from reporting.report import Summary, read_summary
from reporting.tables import Table, cell, margin_cell, number, shorten
from shell.files import file_name


def list_runs(root: Path) -> str:
    """A line per run, in folders of runs, too: what it was made of, its mean AUROC, when. Raises UserError
    where there is none."""
    folders = {path.parent for path in (*root.rglob("results.json"), *root.rglob("classes"))}
    if not folders:
        raise UserError(f"no runs in {root}/; main.py writes them there, or give two folders to compare")
    table = Table(["run", "data set", "backbone", "preset", "seeds", "AUROC", "date"], [])
    for folder in sorted(folders):
        name = folder.relative_to(root).as_posix()
        date = f"{datetime.datetime.fromtimestamp(folder.stat().st_mtime):%Y-%m-%d}"
        try:
            summary = read_summary(folder)
            about = [str(summary.config[knob]) for knob in ("dataset", "extractor", "preset")]
            about += [",".join(map(str, summary.seeds)), number(summary.mean["auroc"])]
        except UserError:
            about = ["unfinished", "", "", "", ""]
        table.rows.append([name, *(shorten(word, 18) for word in about), date])
    return tables.as_text(*table)


def find_run(name: str, root: Path) -> Path:
    """The folder of a finished run, given by its name or as a folder. Raises UserError when there is none."""
    for folder in (root / name, Path(name)):
        if (folder / "results.json").is_file():
            return folder
    known = ", ".join(str(path.parent.relative_to(root)) for path in sorted(root.rglob("results.json")))
    raise UserError(f"no finished run {name!r} in {root}/; there are: {known or 'none'}")


def compare(first: str, second: str, root: Path) -> str:
    """Two runs side by side: AUROC per class with the paired difference, and the knobs that differ. Raises
    UserError."""
    folders = [find_run(name, root) for name in (first, second)]
    a, b = map(read_summary, folders)
    shared = [name for name in a.classes if name in b.classes]
    if not shared:
        raise UserError(f"{first} and {second} have no class in common")
    seed = next((seed for seed in a.seeds if seed in b.seeds), None)
    table, margins = Table(["class", "A", "B", "B - A [95 %]"], [], has_mean=True), {}
    for name in shared:
        aurocs = [cell(run.classes[name], "auroc", len(run.seeds)) for run in (a, b)]
        try:
            margins[name] = paired(
                [folder / "classes" / f"{file_name(name)}-seed{seed}" for folder in folders]
            )
            told = margin_cell(margins[name])
        except UserError as reason:
            told = str(reason)
        except (OSError, ValueError):
            told = "no seed in common" if seed is None else f"no scores of seed {seed}"
        table.rows.append([name, *aurocs, told])
    means = [np.mean([run.classes[name]["auroc"] for name in shared], dtype=float) for run in (a, b)]
    table.rows.append(["mean", *map(number, means), tables.wins_cell(margins.values())])
    note = (
        f"B - A: of seed {seed}, on the same test images, interval by DeLong; counts of classes by Holm's "
        "correction. mean: over the classes that both have."
    )
    return "\n".join(
        [f"A: {first}\nB: {second}\n", tables.as_text(*table), tables.wrapped([note]), "", differences(a, b)]
    )


def paired(paths: list[Path]) -> dict:
    """AUROC of the second checkpoint minus that of the first, with its interval. Raises OSError or
    ValueError where one cannot be read, UserError where they cannot be paired."""
    a, b = map(checkpoints.read_record, paths)
    alike = all(a.features.get(key) == b.features.get(key) for key in ("image_list", "skipped", "precision"))
    if not alike or not np.array_equal([a.test.rows, a.test.labels], [b.test.rows, b.test.labels]):
        raise UserError("other test images or precision")  # either moves AUROC by more than most knobs
    return utils.paired_difference(b.test.labels, b.test.scores, a.test.scores)


def differences(a: Summary, b: Summary) -> str:
    """The knobs and versions in which two summaries differ, as a table."""
    of_a, of_b = (summary.config | summary.versions for summary in (a, b))
    table = Table(["differs", "A", "B"], [])
    for name in {**of_a, **of_b}:
        values = [of.get(name, "-") for of in (of_a, of_b)]
        if values[0] != values[1] and name != "modelname":
            table.rows.append([name, *(shorten(str(value), 38) for value in values)])
    return tables.as_text(*table) if table.rows else "no knob and no version differs"
