"""One preset on a list of data sets, judged in one table: the whole score and its parts, both also before
training, and every simple detector, with differences by a joint bootstrap; and what the whole score loses to
the best of them on each set.

python benchmarks/suite.py benchmarks/suite.toml
python benchmarks/suite.py benchmarks/suite.toml --trial --only digits,cells --name try --knobs fusion=none
python benchmarks/suite.py --compare results/suite.csv results/try.csv    runs nothing: which settings to take

Run it in the repository's folder; with --knobs cluster=tcp://host:8786 a Dask cluster fits the classes. A set
is a run of main.py in runs/NAME-SET, whose finished classes are kept; a set that is not there is left out
with a line. The table goes to results/NAME.md, its figures per class to NAME.csv beside it."""

import argparse
import csv
import datetime
import io
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from judging import Problem, Row, difference, judge, leave_one_set_out, regret, set_means

import config as knobs
import utils
from detector.checkpoints import Record, read_record
from reporting.report import Summary, read_summary
from reporting.tables import as_markdown, escaped
from shell.command_line import OneLineParser
from shell.files import file_name, write_text
from shell.signals import KEPT, guarded

ROOT = Path(__file__).resolve().parents[1]
WHOLE, IMAGE, PLACES = "whole score", "image part", "places"
OURS = {  # ours -> what it is compared with
    WHOLE: (), f"{WHOLE}, before training": (WHOLE,), IMAGE: (WHOLE,), PLACES: (WHOLE,),
    f"{PLACES}, before training": (WHOLE, PLACES), "likelihood": (WHOLE, PLACES),
}  # fmt: skip
EVERY_SEED = (WHOLE, IMAGE, PLACES, "likelihood")  # has these; the others the first alone
JUDGED = (WHOLE, PLACES)  # what everything else is compared with
BEST = "best simple of each class"
DRAWS = 10_000  # of the bootstrap
HOW = (
    "AUROC, mean over a set's classes, then over the sets (± standard deviation over the seeds); in "
    f"brackets: over the sets that a detector has. {BEST}: chosen by AUROC on the test images. Differences: "
    f"with the 95 % interval of {DRAWS:,} bootstrap draws of the first seed's test images, normal and "
    "anomalous ones separately, the same draw for all detectors, and for all classes that share their test "
    "images; AUROC of a draw by DeLong's placement values, linear in how often an image is drawn. Win / "
    "level / loss: classes whose own interval is above, about, or below zero; in brackets with Holm's "
    "correction over the classes."
)
REGRET = (
    f"AUROC of the {WHOLE} minus that of the detector in brackets, the best of its kind on the set's test "
    "images: below zero where that one alone would have been the better choice."
)


# ---------------------------------------------------------------- the list of sets
class Set(NamedTuple):
    """A table [[set]] of the suite's file. prepare: the command that makes ``path``. trial: further knobs of
    a trial. development: whether settings were chosen on its test images."""

    name: str
    dataset: str
    path: str | None = None
    prepare: str | None = None
    knobs: dict = {}
    trial: dict = {}
    development: bool = False

    @property
    def given(self) -> dict:
        """The knobs of the set, its images among them."""
        return {"dataset": self.dataset, "dataset_path": self.path, **self.knobs}


def read_suite(path: Path, only: str | None = None) -> tuple[dict, list[Set]]:
    """The preset and the extractor of a suite's file, and its sets, all or those named in ``only``. Raises
    UserError."""
    settings = {"preset": "paper", "extractor": "efficientnet_lite0"}
    try:
        settings |= tomllib.loads(path.read_text(encoding="utf-8"))
        sets = {entry["name"]: Set(**entry) for entry in settings.pop("set", [])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise knobs.UserError(f"expected a suite's file, as benchmarks/suite.toml; {path}: {error}") from None
    chosen = [name.strip() for name in only.split(",")] if only else list(sets)
    for name in chosen:
        if name not in sets:
            raise knobs.UserError(knobs.unknown("set", name, sets))
    return settings, [sets[name] for name in chosen]


def why_left_out(entry: Set) -> str:
    """Prepare a set that is not there -> in one line, why it still is not; empty where it is."""
    if entry.path is None or Path(entry.path).exists():
        return ""
    if not entry.prepare:
        return f"left out: {entry.name}, {entry.path} is not there"
    first, *others = shlex.split(entry.prepare)
    made = subprocess.run([sys.executable if first == "python" else first, *others]).returncode == 0
    there = made and Path(entry.path).exists()
    return "" if there else f"left out: {entry.name}, `{entry.prepare}` did not make {entry.path}"


def command_of(entry: Set, settings: dict, name: str, seeds: int, more: dict) -> list[str]:
    """The command that runs a set. more: knobs that win over the set's."""
    given = {**settings, **entry.given, **more}
    given |= {"modelname": f"{name}-{entry.name}", "n_seeds": seeds, "baselines": True, "keep": "results"}
    pairs = ((f"--{knob}", str(value)) for knob, value in given.items() if value is not None)
    return [sys.executable, str(ROOT / "main.py"), *(part for pair in pairs for part in pair)]


# ---------------------------------------------------------------- what a run has found
def scores_of(record: Record) -> dict[str, np.ndarray]:
    ours = {name: record.flow_scores[name] for name in OURS if name in record.flow_scores}
    return {WHOLE: record.test.scores, **ours, **record.simple_scores}


def read_problems(folder: Path) -> tuple[list[Problem], Summary]:
    """The classes of a finished run that have test images of both labels, and the run's summary. Raises
    UserError, ValueError and OSError."""
    summary, problems = read_summary(folder), []
    for name in sorted(summary.classes, key=lambda name: f"{file_name(name)}-"):  # in the order of the files
        paths = [folder / "classes" / f"{file_name(name)}-seed{seed}" for seed in summary.seeds]
        records = [read_record(path) for path in paths]
        test, scores = records[0].test, [scores_of(record) for record in records]
        seeds = {title: scores if title in EVERY_SEED else scores[:1] for title in scores[0]}
        aurocs = {
            title: [utils.auroc(record.test.labels, own[title]) for record, own in zip(records, found)]
            for title, found in seeds.items()
            if all(title in own for own in found)
        }
        if len(set(test.labels)) == 2:
            problems.append(Problem(name, test.rows, test.labels, scores[0], aurocs))
    if not problems:
        raise ValueError("no class has normal and anomalous test images")
    return problems, summary


# ---------------------------------------------------------------- the tables
def auroc_cell(values: np.ndarray) -> str:
    """A mean AUROC of every seed; empty where it is undefined."""
    if np.isnan(values).any():
        return ""
    spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{spread}"


def bracketed(text: str, partly: bool) -> str:
    return f"({text})" if partly and text else text


def make_table(found: dict[str, list[Problem] | None], draws: int = DRAWS) -> tuple[list, list[list[str]]]:
    """Header and rows. found: of every set its classes, None where it failed."""
    done = {name: problems for name, problems in found.items() if problems}
    titles = list(dict.fromkeys(title for problems in done.values() for p in problems for title in p.aurocs))
    simple = [title for title in titles if title not in OURS]
    detectors = [*(title for title in OURS if title in titles), *simple]
    judged = [judge(problems, detectors, simple, draws, [0, i]) for i, problems in enumerate(done.values())]
    means = set_means(rows_of(found))
    for name, of_set in zip(done, judged):
        means[name][BEST] = of_set.points[:, -1].mean(keepdims=True)
    header = ["detector", *found, "mean"]
    header += [text for ours in JUDGED for text in (f"{ours} - it [95 %]", "win / level / loss (Holm)")]
    rows = []
    for k, title in enumerate([*detectors, BEST] if simple else detectors):
        own = {name: means[name].get(title, [np.nan]) if name in done else None for name in found}
        row = [title, *("failed" if values is None else auroc_cell(values) for values in own.values())]
        have = [values for values in own.values() if values is not None and not np.isnan(values).any()]
        row.append(bracketed(auroc_cell(np.mean(have, 0)), len(have) < len(done)))
        for ours in JUDGED:
            shown = ours in detectors and ours in OURS.get(title, JUDGED)
            it = difference(judged, detectors.index(ours), k) if shown else None
            row += [bracketed(str(it), it.sets < len(done)), it.wins] if it else ["", ""]
        rows.append(row)
    return header, rows


def rows_of(found: dict[str, list[Problem] | None], first_seed: int = 0) -> list[Row]:
    """An AUROC per set, class, detector and seed."""
    return [
        Row(title, name, problem.name, seed, value)
        for name, problems in found.items()
        for problem in problems or ()
        for title, values in problem.aurocs.items()
        for seed, value in enumerate(values, first_seed)
    ]


def regret_table(rows: list[Row]) -> str:
    """Per set, what the whole score loses to the best simple detector and to the better of its parts."""
    simple = [title for title in dict.fromkeys(row.detector for row in rows) if title not in OURS]
    kinds = {f"{WHOLE} - best simple": simple, f"{WHOLE} - better part": [IMAGE, PLACES]}
    found = [regret(rows, WHOLE, others) for others in kinds.values()]
    lines = [
        [name, *("{:+.4f} ({})".format(*own[name]) if name in own else "" for own in found)]
        for name in dict.fromkeys(name for own in found for name in own)
    ]
    for title, of_all in (("mean", np.mean), ("worst", np.min)):
        values = [[value for value, _ in own.values()] for own in found]
        lines.append([title, *(f"{of_all(own):+.4f}" if own else "" for own in values)])
    return f"## Regret\n\n{as_markdown(['set', *kinds], lines)}\n\n{REGRET}"


def choice_table(runs: dict[str, list[Row]]) -> str:
    """What a choice among the settings is worth on a set that had no part in it. Raises UserError."""
    found = leave_one_set_out(runs, WHOLE)
    if not found:
        raise knobs.UserError(f"expected at least two sets with a {WHOLE} in all of {', '.join(runs)}")
    _, _, aurocs, _, best = zip(*found)
    found.append(("mean", "", float(np.mean(aurocs)), "", float(np.mean(best))))
    lines = [[name, run, f"{auroc:.4f}", other, f"{most:.4f}"] for name, run, auroc, other, most in found]
    header = ["set", f"best by the mean {WHOLE} of all other sets", "AUROC", "best on this set", "AUROC"]
    return f"## Settings chosen without the set\n\n{as_markdown(header, lines)}"


def read_csv(path: Path) -> list[Row]:
    """The rows of a table that ``publish`` wrote. Raises UserError."""
    try:
        _, *lines = csv.reader(path.read_text(encoding="utf-8").splitlines())
        return [Row(*names, int(seed), float(auroc)) for *names, seed, auroc in lines]
    except (OSError, TypeError, ValueError) as error:
        raise knobs.UserError(f"expected a table as results/suite.csv; {path}: {error}") from None


def made_by(*told: str) -> str:
    """How tables came about: the command, what is told of it, and what their figures depend on."""
    command, versions = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]], utils.versions()
    made = [f"{name} {versions[name]}" for name in ("commit", "torch", "timm", "machine")]
    return ", ".join([f"`{shlex.join(command)}`", *told, *made, f"{datetime.date.today()}."])


def publish(out: Path, title: str, tables: str, others: list[str], rows: list[Row]) -> None:
    """Write the tables and the other paragraphs of a page, and beside it .csv, a line per row, numbers
    unrounded; print the tables."""
    write_text(out, "\n\n".join([f"# {title}", tables, *others]) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["detector", "set", "class", "seed", "auroc"], *rows])
    write_text(out.with_suffix(".csv"), text.getvalue())
    print(f"\n{tables}\n\nin {out} and {out.with_suffix('.csv')}", flush=True)


# ---------------------------------------------------------------- the script
def main(args: argparse.Namespace) -> None:
    """Raises UserError where no set is there, or, once the table is written, where a set failed."""
    if args.compare:
        return compare(args.compare)
    if args.suite is None:
        raise knobs.UserError("expected the list of sets, as benchmarks/suite.toml, or --compare")
    settings, sets = read_suite(args.suite, args.only)
    more = dict(pair.partition("=")[::2] for pair in args.knobs)
    settings |= {name: value for name, value in more.items() if name in settings}
    found, notes, failures, summaries = {}, [], [], []
    for entry in sets:
        if left_out := why_left_out(entry):
            notes.append(left_out)
            print(left_out, flush=True)
            continue
        print(f"== {entry.name}", flush=True)
        of_set = (entry.trial if args.trial else {}) | more
        status = subprocess.run(command_of(entry, settings, args.name, args.seeds, of_set)).returncode
        try:
            if status:
                raise ValueError(f"main.py ended with status {status}")
            found[entry.name], summary = read_problems(Path("runs") / f"{args.name}-{entry.name}")
            summaries.append(summary)
        except (OSError, ValueError, knobs.UserError) as error:
            found[entry.name] = None
            failures.append(f"failed: {entry.name}, {error}")
    if not summaries:
        raise knobs.UserError("; ".join(failures + notes) or f"{args.suite} names no set")
    figures = rows_of(found, summaries[0].seeds[0])
    tables = f"{as_markdown(*make_table(found))}\n\n{regret_table(figures)}"
    precisions = dict.fromkeys(str(summary.features.get("precision")) for summary in summaries)
    told = [f"preset {settings['preset']}", settings["extractor"]]
    told += [f"seeds {', '.join(map(str, summaries[0].seeds))}", f"features in {' and '.join(precisions)}"]
    chosen = ", ".join(entry.name for entry in sets if entry.development and entry.name in found) or "none"
    about = f"{made_by(*told)} Development sets (settings were chosen on their test images): {chosen}."
    others = [*map(escaped, failures + notes), "## How", textwrap.fill(HOW, 120), about]
    out = args.out or Path("results") / f"{args.name}{'-trial' if args.trial else ''}.md"
    publish(out, args.name, tables, others, figures)
    if failures:
        raise knobs.UserError("; ".join(failures))


def compare(files: list[Path]) -> None:
    """Print the regret of each of the tables, and what a choice among them is worth. Raises UserError."""
    runs = {str(path.with_suffix("")): read_csv(path) for path in files}
    for name, rows in runs.items():
        print(f"# {name}\n\n{regret_table(rows)}\n")
    if len(runs) > 1:
        print(choice_table(runs))


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path, nargs="?", help="the list of sets, as benchmarks/suite.toml")
    parser.add_argument("--only", help="sets to run, separated by commas [all]")
    parser.add_argument("--seeds", type=int, default=1, help="[1]")
    parser.add_argument("--trial", action="store_true", help="with the knobs for trials: fewer classes")
    parser.add_argument("--knobs", nargs="*", default=[], metavar="KNOB=VALUE", help="more, for all sets")
    parser.add_argument("--name", default="suite", help="the runs are runs/NAME-SET [suite]")
    parser.add_argument("--out", type=Path, help="where the table goes [results/NAME.md]")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="CSV", help="run nothing, compare tables")
    guarded(main, parser.parse_args(), told=KEPT)
