"""How often good pictures are called anomalous: the false-alarm rates that were asked for beside those that
were measured, over random splits of the normal pictures of the suite's classes.

python benchmarks/false_alarms.py benchmarks/suite.toml --knobs threads=1

A split takes n pictures of a class as held out, as train.py does (places are standardised by them, too),
fits the detector to half of the others, and measures how many of the rest are above the threshold. The splits
of an n are dealt out to the classes in turn."""

import argparse
import collections
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from chosen_rows import Kept, Pictures, about, command_line, sets_of  # noqa: E402

from detector import calibration  # noqa: E402
from reporting import tables  # noqa: E402
from shell.files import write_text  # noqa: E402
from shell.signals import KEPT, guarded  # noqa: E402

RATES = (0.01, 0.05, 0.1)
FEWEST = 20  # pictures to fit to, and to measure on
MOST_FITTED, MOST_MEASURED = 40, 100  # of a split, for the time it takes

Problem = tuple[Pictures, str, np.ndarray]  # a class of a set and the rows of all its normal pictures


def problems_of(sets: list[Pictures]) -> list[Problem]:
    found = []
    for pictures in sets:
        for class_name in pictures.classes:
            good, normal, _ = pictures.of_class(class_name)
            found.append((pictures, class_name, np.concatenate([good, normal])))
    return found


def shares(count: int, n: int) -> tuple[int, int] | None:
    """Of so many normal pictures of which n are held out: how many are fitted to and how many are measured;
    None where they are too few."""
    fitted = min((count - n) // 2, MOST_FITTED)
    return (fitted, min(count - n - fitted, MOST_MEASURED)) if fitted >= FEWEST else None


def measure(problem: Problem, n: int, seed: int) -> list[float]:
    """The measured false-alarm rate at each of RATES, of one split. Raises ClassError."""
    pictures, class_name, normal = problem
    held, fitted, measured = split(normal, n, seed)
    nothing = measured[:0]
    fit = pictures.fit(class_name, seed, fitted, measured, nothing, held)
    return [float((fit.scores > calibration.threshold(fit.held_scores, rate).score).mean()) for rate in RATES]


def split(normal: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of normal pictures at random: n held out, some to fit to, some to measure on; each in order."""
    shuffled = np.random.RandomState(seed).permutation(normal)
    fitted, measured = shares(len(normal), n) or (0, 0)
    parts = np.split(shuffled, np.cumsum([n, fitted, measured]))[:3]
    held, fit, rest = (np.sort(part) for part in parts)
    return held, fit, rest


def row_of(n: int, k: int, found: dict[str, list[list[float]]], names: list[str]) -> list[str]:
    """The row of n held-out pictures and the k-th rate. found: by set, the rates of its splits."""
    expected = calibration.threshold(np.arange(n), RATES[k])
    rates = np.array([rates[k] for of_set in found.values() for rates in of_set])
    error = rates.std(ddof=1) / len(rates) ** 0.5 if len(rates) > 1 else float("nan")
    means = [tables.number(np.mean([r[k] for r in found[name]])) if name in found else "" for name in names]
    by_count = f"{expected.expected:.4f}" + ("" if expected.enough else " (too few pictures)")
    measured = f"{rates.mean():.4f} ± {error:.4f}" if len(rates) else "-"
    return [str(n), f"{RATES[k]:g}", by_count, measured, str(len(rates)), *means]


HOW = (
    "By count: what the threshold of n held-out pictures promises, (m + 1) / (n + 1), the largest such rate "
    "up to the nominal one; with too few pictures for that the threshold is their greatest score, and "
    "predict.py says so. Measured: the share of further normal pictures above the threshold, mean ± standard "
    "error over the splits (their differences to each other; splits of a class share its pictures); then the "
    "mean of each set. Every split fits the detector anew; its held-out pictures choose the epoch and the "
    "bandwidth, too."
)


def main(args: argparse.Namespace) -> None:
    """Raises UserError."""
    sets = list(sets_of(args, baselines=False))
    problems, names, start = problems_of(sets), [pictures.name for pictures in sets], time.perf_counter()
    note = about("false_alarms.py", sets)
    rows, notes, kept = [], [], Kept(args.kept)
    for n in args.held_out:
        able = [problem for problem in problems if shares(len(problem[2]), n)]
        fitted = [shares(len(problem[2]), n)[0] for problem in able]  # type: ignore[index]
        found: dict[str, list[list[float]]] = collections.defaultdict(list)
        for seed in range(args.splits if able else 0):
            problem = able[seed % len(able)]
            pictures, class_name, _ = problem
            rates = kept.get(pictures, (class_name, n, seed), lambda: measure(problem, n, seed))
            found[pictures.name].append(rates)
            seconds = time.perf_counter() - start
            print(f"{n} held out: split {seed + 1} of {args.splits}, {seconds:.0f} s", flush=True)
        rows += [row_of(n, k, found, names) for k in range(len(RATES))]
        counts = {name: sum(problem[0].name == name for problem in able) for name in names}
        told = ", ".join(f"{counts[p.name]} of {len(p.classes)} classes of {p.name}" for p in sets)
        few = "" if len(able) == len(problems) else f"; the others have fewer than {n + 2 * FEWEST} pictures"
        size = f", fitted to {min(fitted)} to {max(fitted)} pictures" if able else ""
        notes.append(f"{n} held out: {told}{few}{size}.")
    header = ["held out", "nominal", "by count", "measured", "splits", *names]
    table = tables.as_markdown(header, rows)
    seeds = f"Seeds 0 to {args.splits - 1}, {time.perf_counter() - start:.0f} s."
    lines = [HOW, "\n".join(f"- {line}" for line in notes), f"{note} {seeds}"]
    write_text(args.out, f"# False alarms\n\n{table}\n\n" + "\n\n".join(lines) + "\n")
    print(f"\n{table}\n\nin {args.out}", flush=True)


if __name__ == "__main__":
    parser = command_line(__doc__, "false_alarms")
    parser.add_argument("--only", default="digits,signs,cells", help="sets [%(default)s]")
    parser.add_argument("--knobs", nargs="*", default=[], metavar="KNOB=VALUE", help="knobs for all sets")
    parser.add_argument("--held_out", type=int, nargs="+", default=[20, 100, 500], metavar="N")
    parser.add_argument("--splits", type=int, default=200, help="for each N [200]")
    guarded(main, parser.parse_args(), told=KEPT)
