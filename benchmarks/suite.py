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
from judging import Problem, Row, difference, judge, leave_one_set_out, regret

import config as knobs
import utils
from detector import checkpoints
from reporting.report import Summary, read_summary
from reporting.tables import as_markdown, escaped
from shell.files import write_text
from shell.signals import KEPT, guarded

ROOT = Path(__file__).resolve().parents[1]
WHOLE, IMAGE, PLACES = "whole score", "image part", "places"
OURS = {  # ours -> what it is compared with
    WHOLE: (), f"{WHOLE}, before training": (WHOLE,), IMAGE: (WHOLE,), PLACES: (WHOLE,),
    f"{PLACES}, before training": (WHOLE, PLACES), "likelihood": (WHOLE, PLACES),
}  # fmt: skip
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
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise knobs.UserError(f"expected a suite's file, as benchmarks/suite.toml; {path}: {error}") from None
    entries = content.pop("set", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise knobs.UserError(f"{path}: expected tables [[set]], got set = {entries!r}")
    for keys, known in ((content, ("preset", "extractor")), *((entry, Set._fields) for entry in entries)):
        for key in keys:
            if key not in known:
                raise knobs.UserError(f"{path}: {knobs.unknown('key', key, known)}")
    for needed in ("name", "dataset"):
        if not all(needed in entry for entry in entries):
            raise knobs.UserError(f"{path}: every [[set]] needs a {needed}")
    sets = {entry["name"]: Set(**entry) for entry in entries}
    chosen = [name.strip() for name in only.split(",")] if only else list(sets)
    for name in chosen:
        if name not in sets:
            raise knobs.UserError(knobs.unknown("set", name, sets))
    return {"preset": "paper", "extractor": "efficientnet_lite0"} | content, [sets[name] for name in chosen]


def why_left_out(entry: Set) -> str:
    """Prepare a set that is not there -> in one line, why it still is not; empty where it is."""
    if entry.path is None or Path(entry.path).exists():
        return ""
    if entry.prepare:
        command = shlex.split(entry.prepare)
        command[0] = sys.executable if command[0] == "python" else command[0]
        if subprocess.run(command).returncode == 0 and Path(entry.path).exists():
            return ""
        return f"left out: {entry.name}, `{entry.prepare}` did not make {entry.path}"
    return f"left out: {entry.name}, {entry.path} is not there"


def command_of(entry: Set, settings: dict, name: str, seeds: int, more: dict) -> list[str]:
    """The command that runs a set. more: knobs that win over the set's."""
    given = {**settings, **entry.given, **more}
    given |= {"modelname": f"{name}-{entry.name}", "n_seeds": seeds, "baselines": True, "keep": "results"}
    pairs = ((f"--{knob}", str(value)) for knob, value in given.items() if value is not None)
    return [sys.executable, str(ROOT / "main.py"), *(part for pair in pairs for part in pair)]


# ---------------------------------------------------------------- what a run has found
def scores_of(record: checkpoints.Record) -> dict[str, np.ndarray]:
    ours = {name: record.flow_scores[name] for name in OURS if name in record.flow_scores}
    return {WHOLE: record.test.scores, **ours, **record.simple_scores}


def read_problems(folder: Path) -> tuple[list[Problem], Summary]:
    """The classes of a finished run that have test images of both labels, and the run's summary. Raises
    UserError, ValueError and OSError."""
    summary = read_summary(folder)
    by_class: dict[str, list[checkpoints.Record]] = {}
    for record in map(checkpoints.read_record, sorted((folder / "classes").glob("*.json"))):
        result = record.result
        asked = result["class"] in summary.classes and result["seed"] in summary.seeds
        if asked and len(set(record.test.labels)) == 2:
            by_class.setdefault(result["class"], []).append(record)
    problems = []
    for name, records in by_class.items():
        records.sort(key=lambda record: record.result["seed"])
        aurocs: dict[str, list[float]] = {}
        for record in records:
            for title, scores in scores_of(record).items():
                aurocs.setdefault(title, []).append(utils.auroc(record.test.labels, scores))
        test = records[0].test
        problems.append(Problem(name, test.rows, test.labels, scores_of(records[0]), aurocs))
    if not problems:
        raise ValueError("no class has normal and anomalous test images")
    return problems, summary


# ---------------------------------------------------------------- the tables
def set_aurocs(problems: list[Problem], title: str) -> np.ndarray:
    """A detector's mean AUROC over the classes with every seed; NaN where a class lacks it."""
    if not all(title in problem.aurocs for problem in problems):
        return np.array([np.nan])
    return np.mean([problem.aurocs[title] for problem in problems], 0)


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
    header = ["detector", *found, "mean"]
    header += [text for ours in JUDGED for text in (f"{ours} - it [95 %]", "win / level / loss (Holm)")]
    rows = []
    for k, title in enumerate([*detectors, BEST] if simple else detectors):
        means = {name: set_aurocs(problems, title) for name, problems in done.items()}
        if title == BEST:
            means = {name: s.points[:, k].mean(keepdims=True) for name, s in zip(done, judged)}
        row = [title, *("failed" if name not in done else auroc_cell(means[name]) for name in found)]
        have = [values for values in means.values() if not np.isnan(values).any()]
        row.append(bracketed(auroc_cell(np.mean(have, 0)), len(have) < len(done)))
        for ours in JUDGED:
            if ours not in OURS.get(title, JUDGED) or ours not in detectors:
                row += ["", ""]
                continue
            it = difference(judged, detectors.index(ours), k)
            row += [bracketed(str(it), it.sets < len(done)), it.wins] if it else ["", ""]
        rows.append(row)
    return header, rows


def rows_of(found: dict[str, list[Problem] | None], seeds: list[int]) -> list[Row]:
    """An AUROC per set, class, detector and seed."""
    problems = [(name, problem) for name, of_set in found.items() for problem in of_set or ()]
    return [
        Row(title, name, problem.name, seed, value)
        for name, problem in problems
        for title, values in problem.aurocs.items()
        for seed, value in zip(seeds, values)
    ]


def regret_table(rows: list[Row]) -> str:
    """Per set, what the whole score loses to the best simple detector and to the better of its parts."""
    simple = [title for title in dict.fromkeys(row.detector for row in rows) if title not in OURS]
    kinds = {f"{WHOLE} - best simple": simple, f"{WHOLE} - better part": (IMAGE, PLACES)}
    found = [regret(rows, WHOLE, others) for others in kinds.values()]

    def cell(losses: dict[str, tuple[float, str]], name: str) -> str:
        return "{:+.4f} ({})".format(*losses[name]) if name in losses else ""

    sets = dict.fromkeys(name for losses in found for name in losses)
    lines = [[name, *(cell(losses, name) for losses in found)] for name in sets]
    values = [[value for value, _ in losses.values()] for losses in found]
    for title, of_all in (("mean", np.mean), ("worst", np.min)):
        lines.append([title, *(f"{of_all(own):+.4f}" if own else "" for own in values)])
    return f"## Regret\n\n{as_markdown(['set', *kinds], lines)}\n\n{REGRET}"


def choice_table(runs: dict[str, list[Row]]) -> str:
    """What a choice among the settings is worth on a set that had no part in it. Raises UserError."""
    found = leave_one_set_out(runs, WHOLE)
    if not found:
        raise knobs.UserError(f"expected at least two sets with a {WHOLE} in all of {', '.join(runs)}")
    mean, best = (float(np.mean(values)) for values in list(zip(*found))[2::2])
    lines = [
        [name, chosen, f"{auroc:.4f}", best_one, f"{most:.4f}"]
        for name, chosen, auroc, best_one, most in [*found, ("mean", "", mean, "", best)]
    ]
    header = ["set", f"best by the mean {WHOLE} of all other sets", "AUROC", "best on this set", "AUROC"]
    return f"## Settings chosen without the set\n\n{as_markdown(header, lines)}"


def as_csv(rows: list[Row]) -> str:
    """A line per row, numbers unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["detector", "set", "class", "seed", "auroc"], *rows])
    return text.getvalue()


def read_csv(path: Path) -> list[Row]:
    """The rows of a table that ``as_csv`` wrote. Raises UserError."""
    try:
        _, *lines = csv.reader(path.read_text(encoding="utf-8").splitlines())
        return [Row(*names, int(seed), float(auroc)) for *names, seed, auroc in lines]
    except (OSError, TypeError, ValueError) as error:
        raise knobs.UserError(f"expected a table as results/suite.csv; {path}: {error}") from None


def about(settings: dict, sets: list[Set], summaries: list[Summary]) -> str:
    """How the tables came about: the command, and what their figures depend on."""
    versions = utils.versions()
    precisions = dict.fromkeys(str(summary.features.get("precision")) for summary in summaries)
    told = [f"`{shlex.join(['python', 'benchmarks/suite.py', *sys.argv[1:]])}`"]
    told += [f"preset {settings['preset']}", settings["extractor"]]
    told += [f"seeds {', '.join(map(str, summaries[0].seeds))}"]
    told += [f"{name} {versions[name]}" for name in ("commit", "torch", "timm")]
    told += [versions["machine"], f"features in {' and '.join(precisions)}", f"{datetime.date.today()}"]
    development = ", ".join(entry.name for entry in sets if entry.development) or "none"
    return f"{', '.join(told)}. Development sets (settings were chosen on their test images): {development}."


# ---------------------------------------------------------------- the script
def main(args: argparse.Namespace) -> None:
    """Raises UserError where no set is there, or, once the table is written, where a set failed."""
    if args.compare:
        compare(args.compare)
        return
    if args.suite is None:
        raise knobs.UserError("expected the list of sets, as benchmarks/suite.toml, or --compare")
    settings, sets = read_suite(args.suite, args.only)
    if args.preset:
        settings["preset"] = args.preset
    more = dict(pair.partition("=")[::2] for pair in args.knobs)
    settings |= {name: value for name, value in more.items() if name in settings}
    found, notes, failures, summaries = {}, [], [], []
    for entry in sets:
        if left_out := why_left_out(entry):
            notes.append(left_out)
            print(left_out, flush=True)
            continue
        of_set = (entry.trial if args.trial else {}) | more
        print(f"== {entry.name}", flush=True)
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
    there = [entry for entry in sets if entry.name in found]
    figures = rows_of(found, summaries[0].seeds)
    tables = f"{as_markdown(*make_table(found))}\n\n{regret_table(figures)}"
    how = ["## How", textwrap.fill(HOW, 120), about(settings, there, summaries)]
    lines = [*map(escaped, failures + notes), *how]
    out = args.out or Path("results") / f"{args.name}{'-trial' if args.trial else ''}.md"
    write_text(out, f"# {args.name}\n\n{tables}\n\n" + "\n\n".join(lines) + "\n")
    write_text(out.with_suffix(".csv"), as_csv(figures))
    print(f"\n{tables}\n\nin {out} and {out.with_suffix('.csv')}", flush=True)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", type=Path, nargs="?", help="the list of sets, as benchmarks/suite.toml")
    parser.add_argument("--preset", help="[the suite's]")
    parser.add_argument("--only", help="sets to run, separated by commas [all]")
    parser.add_argument("--seeds", type=int, default=1, help="[1]")
    parser.add_argument("--trial", action="store_true", help="with the knobs for trials: fewer classes")
    parser.add_argument("--knobs", nargs="*", default=[], metavar="KNOB=VALUE", help="more, for all sets")
    parser.add_argument("--name", default="suite", help="the runs are runs/NAME-SET [suite]")
    parser.add_argument("--out", type=Path, help="where the table goes [results/NAME.md]")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="CSV", help="run nothing, compare tables")
    guarded(main, parser.parse_args(), told=KEPT)
