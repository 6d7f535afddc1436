"""Read runs that were reported: their list, the table of one, or two side by side.

python report.py               every run in runs/: what it was, its mean AUROC, when
python report.py RUN           its table
python report.py RUN_A RUN_B   side by side: AUROC per class, paired difference, knobs that differ"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import OneLineParser
from shell.signals import guarded

if __name__ == "__main__":  # parse before the slow imports
    PARSER = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    PARSER.add_argument("run", nargs="?", help="the name of a run in runs/, or its folder")
    PARSER.add_argument("other", nargs="?", help="that of the run to compare it with")
    ARGUMENTS = PARSER.parse_args()

import datetime

import numpy as np

import utils
from config import UserError
from detector.checkpoints import read_record
from reporting.report import Summary, read_summary, terminal_table
from reporting.tables import as_text, cell, margin_cell, number, shorten, wins_cell, wrapped
from shell.files import file_name

SAME_TEST = ("image_list", "skipped", "precision")  # each of which moves AUROC by more than most knobs


def list_runs(root: Path) -> str:
    """A line per run, in folders of runs, too: of what, mean AUROC, when. Raises UserError without any."""
    rows = []
    for folder in sorted({path.parent for name in ("results.json", "classes") for path in root.rglob(name)}):
        try:
            run = read_summary(folder)
            about = [str(run.config[knob]) for knob in ("dataset", "extractor", "preset")]
            about += [",".join(map(str, run.seeds)), number(run.mean["auroc"])]
        except UserError:
            about = ["another version" if (folder / "results.json").exists() else "no report", *[""] * 4]
        date = datetime.date.fromtimestamp(folder.stat().st_mtime)
        rows.append([folder.relative_to(root).as_posix(), *(shorten(word, 18) for word in about), str(date)])
    if not rows:
        raise UserError(f"no runs in {root}/; main.py writes them there, or give two folders to compare")
    return as_text(["run", "data set", "backbone", "preset", "seeds", "AUROC", "date"], rows)


def find_run(name: str, root: Path) -> Path:
    """The folder of a finished run, given by its name or as a folder. Raises UserError when there is none."""
    for folder in (root / name, Path(name)):
        if (folder / "results.json").is_file():
            return folder
    raise UserError(f"no report of {name!r} in {root}/; main.py writes it; report.py lists what there is")


def compare(names: list[str], root: Path) -> str:
    """Two runs side by side: AUROC per class with paired difference, knobs that differ. Raises UserError."""
    folders = [find_run(name, root) for name in names]
    a, b = map(read_summary, folders)
    shared = [name for name in a.classes if name in b.classes]
    if not shared:
        raise UserError(f"{names[0]} and {names[1]} have no class in common")
    seed = next((seed for seed in a.seeds if seed in b.seeds), None)
    rows, margins = [], []
    for name in shared:
        file, told = f"classes/{file_name(name)}-seed{seed}", "other test images or precision"
        try:
            ours, theirs = (read_record(folder / file) for folder in folders)
            if all(ours.features.get(key) == theirs.features.get(key) for key in SAME_TEST):
                labels = theirs.test.labels
                margins.append(utils.paired_difference(labels, theirs.test.scores, ours.test.scores))
                told = margin_cell(margins[-1])
        except (OSError, ValueError):
            told = "no seed in common" if seed is None else f"no scores of seed {seed}"
        rows.append([name, *(cell(run.classes[name], len(run.seeds)) for run in (a, b)), told])
    means = [np.mean([run.classes[name]["auroc"] for name in shared], dtype=float) for run in (a, b)]
    rows.append(["mean", *map(number, means), wins_cell(margins)])
    note = f"B - A: of seed {seed}, interval by DeLong, counts by Holm's correction. mean: of shared classes."
    table = as_text(["class", "A", "B", "B - A [95 %]"], rows, has_mean=True)
    return "\n".join([f"A: {names[0]}\nB: {names[1]}\n", table, wrapped([note]), "", differences(a, b)])


def differences(a: Summary, b: Summary) -> str:
    """The knobs and versions in which two summaries differ, as a table."""
    of_a, of_b = (summary.config | summary.versions for summary in (a, b))
    rows = [
        [name, *(shorten(str(of.get(name, "-")), 38) for of in (of_a, of_b))]
        for name in of_a | of_b
        if name != "modelname" and of_a.get(name, "-") != of_b.get(name, "-")
    ]
    return as_text(["differs", "A", "B"], rows) if rows else "no knob and no version differs"


def main(names: list[str], root: Path = Path("runs")) -> None:
    if len(names) == 2:
        print(compare(names, root))
    else:
        print(terminal_table(read_summary(find_run(names[0], root))) if names else list_runs(root))


if __name__ == "__main__":
    guarded(main, [name for name in (ARGUMENTS.run, ARGUMENTS.other) if name])
