"""Read runs that were reported: their list, the table of one, or two side by side.

python report.py               every run in runs/: what it was, its mean AUROC, when
python report.py RUN           its table
python report.py RUN_A RUN_B   side by side: AUROC per class, paired difference, knobs that differ
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import OneLineParser
from shell.signals import guarded


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="the name of a run in runs/, or its folder")
    parser.add_argument("other", nargs="?", help="that of the run to compare it with")
    return parser.parse_args()


if __name__ == "__main__":  # parse before the slow imports
    ARGUMENTS = parse_arguments()

import datetime

import numpy as np

import utils
from config import UserError
from detector.checkpoints import read_record
from reporting.report import Summary, read_summary, terminal_table
from reporting.tables import Table, as_text, cell, margin_cell, number, shorten, wins_cell, wrapped
from shell.files import file_name

NOTE = (
    "B - A: of seed {}, on the same test images, interval by DeLong; counts of classes by Holm's correction. "
    "mean: over the classes that both have."
)


def list_runs(root: Path) -> str:
    """A line per run, in folders of runs, too: what it was made of, its mean AUROC, when. Raises UserError
    where there is none."""
    folders = {path.parent for path in (*root.rglob("results.json"), *root.rglob("classes"))}
    if not folders:
        raise UserError(f"no runs in {root}/; main.py writes them there, or give two folders to compare")
    rows = []
    for folder in sorted(folders):
        try:
            run = read_summary(folder)
            about = [str(run.config[knob]) for knob in ("dataset", "extractor", "preset")]
            about += [",".join(map(str, run.seeds)), number(run.mean["auroc"])]
        except UserError:
            finished = (folder / "results.json").exists()
            about = ["another version" if finished else "unfinished", "", "", "", ""]
        date = datetime.date.fromtimestamp(folder.stat().st_mtime)
        rows.append([folder.relative_to(root).as_posix(), *(shorten(word, 18) for word in about), str(date)])
    return as_text(["run", "data set", "backbone", "preset", "seeds", "AUROC", "date"], rows)


def find_run(name: str, root: Path) -> Path:
    """The folder of a finished run, given by its name or as a folder. Raises UserError when there is none."""
    for folder in (root / name, Path(name)):
        if (folder / "results.json").is_file():
            return folder
    known = ", ".join(str(path.parent.relative_to(root)) for path in sorted(root.rglob("results.json")))
    raise UserError(f"no finished run {name!r} in {root}/; there are: {known or 'none'}")


def compare(names: list[str], root: Path) -> str:
    """Two runs side by side: AUROC per class with the paired difference, and the knobs that differ. Raises
    UserError."""
    folders = [find_run(name, root) for name in names]
    a, b = map(read_summary, folders)
    shared = [name for name in a.classes if name in b.classes]
    if not shared:
        raise UserError(f"{names[0]} and {names[1]} have no class in common")
    seed = next((seed for seed in a.seeds if seed in b.seeds), None)
    table, margins = Table(["class", "A", "B", "B - A [95 %]"], [], has_mean=True), []
    for name in shared:
        aurocs = [cell(run.classes[name], "auroc", len(run.seeds)) for run in (a, b)]
        files = [folder / "classes" / f"{file_name(name)}-seed{seed}" for folder in folders]
        try:
            margins.append(paired(*files))
            told = margin_cell(margins[-1])
        except UserError as reason:
            told = str(reason)
        except (OSError, ValueError):
            told = "no seed in common" if seed is None else f"no scores of seed {seed}"
        table.rows.append([name, *aurocs, told])
    means = [np.mean([run.classes[name]["auroc"] for name in shared], dtype=float) for run in (a, b)]
    table.rows.append(["mean", *map(number, means), wins_cell(margins)])
    titles = f"A: {names[0]}\nB: {names[1]}\n"
    return "\n".join([titles, as_text(*table), wrapped([NOTE.format(seed)]), "", differences(a, b)])


def paired(first: Path, second: Path) -> dict:
    """AUROC of the second checkpoint minus that of the first, with its interval. Raises OSError or
    ValueError where one cannot be read, UserError where they cannot be paired."""
    a, b = read_record(first), read_record(second)
    alike = all(a.features.get(key) == b.features.get(key) for key in ("image_list", "skipped", "precision"))
    if not alike or not np.array_equal([a.test.rows, a.test.labels], [b.test.rows, b.test.labels]):
        raise UserError("other test images or precision")  # either moves AUROC by more than most knobs
    return utils.paired_difference(b.test.labels, b.test.scores, a.test.scores)


def differences(a: Summary, b: Summary) -> str:
    """The knobs and versions in which two summaries differ, as a table."""
    of_a, of_b = (summary.config | summary.versions for summary in (a, b))
    pairs = {name: (of_a.get(name, "-"), of_b.get(name, "-")) for name in of_a | of_b if name != "modelname"}
    rows = [
        [name, *(shorten(str(v), 38) for v in pair)] for name, pair in pairs.items() if pair[0] != pair[1]
    ]
    return as_text(["differs", "A", "B"], rows) if rows else "no knob and no version differs"


def main(names: list[str], root: Path = Path("runs")) -> None:
    if len(names) == 2:
        print(compare(names, root))
    else:
        print(terminal_table(read_summary(find_run(names[0], root))) if names else list_runs(root))


if __name__ == "__main__":
    guarded(main, [name for name in (ARGUMENTS.run, ARGUMENTS.other) if name])
