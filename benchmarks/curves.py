"""How many good training pictures a detector needs, and what defective ones among them cost: AUROC of the
whole score beside simple detectors, as a table and two pictures.

python benchmarks/curves.py benchmarks/suite.toml --knobs threads=1

The defective pictures are taken out of the test: those of the largest share, for every share, so that all
shares have one test. The pictures of a smaller number or share are among those of a larger one."""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from chosen_rows import Kept, Pictures, about, command_line, sets_of  # noqa: E402
from suite import auroc_cell  # noqa: E402

import utils  # noqa: E402
from config import ClassError  # noqa: E402
from detector import calibration  # noqa: E402
from detector.checkpoints import Fitted  # noqa: E402
from detector.class_data import evenly  # noqa: E402
from reporting import tables  # noqa: E402
from reporting.figures import Figure  # noqa: E402
from shell.files import whole_file, write_text  # noqa: E402
from shell.signals import KEPT, guarded  # noqa: E402

ALL = 0  # a number of pictures: all there are
SIZES = (5, 10, 20, 50, 100, ALL)
SHARES = (0.0, 0.02, 0.05, 0.1)
WHOLE = "whole score"
DETECTORS = (WHOLE, "Gaussian, joint token", "kNN, joint token", "PaDiM-like, places")
RATE = 0.05  # the false-alarm rate of the thresholds that are told


class Case(NamedTuple):
    """A class and a seed with so many pictures, or such a share of defective ones."""

    aurocs: dict[str, float]  # by detector; empty where it could not be fitted
    fault: str  # why not; else empty
    trained: int = 0  # pictures fitted to
    held: int = 0  # and held out
    threshold: bool = False  # whether those are enough for a threshold at RATE


def case_of(fit: Fitted) -> Case:
    scores = {WHOLE: fit.scores, **fit.simple_scores}
    aurocs = {name: float(utils.auroc(fit.labels, scores[name])) for name in DETECTORS if name in scores}
    held, trained = fit.held_scores, fit.result["n_train"]
    enough = len(held) > 0 and calibration.threshold(held, RATE).enough
    return Case(aurocs, "", trained, len(held), enough)


def few(pictures: Pictures, class_name: str, seed: int, size: float) -> Case:
    """A detector of so many good pictures, on the whole test."""
    good, normal, anomalous = pictures.of_class(class_name)
    if size > len(good):
        return Case({}, f"there are {len(good)} good pictures")
    chosen = np.random.RandomState(seed).permutation(good)[: int(size) or len(good)]
    return fitted(pictures, class_name, seed, chosen, normal, anomalous)


def dirty(pictures: Pictures, class_name: str, seed: int, share: float) -> Case:
    """A detector of all good pictures and defective ones, a share of all training pictures."""
    good, normal, anomalous = pictures.of_class(class_name)
    count, most = (round(part / (1 - part) * len(good)) for part in (share, SHARES[-1]))
    if most >= len(anomalous):
        return Case({}, f"there are {len(anomalous)} defective pictures, {most} to be taken out of the test")
    shuffled = np.random.RandomState(seed).permutation(anomalous)
    chosen = np.concatenate([good, shuffled[:count]])
    return fitted(pictures, class_name, seed, chosen, normal, np.sort(shuffled[most:]))


def fitted(pictures: Pictures, class_name: str, seed: int, chosen: np.ndarray, *test: np.ndarray) -> Case:
    try:
        return case_of(pictures.fit(class_name, seed, np.sort(chosen), *test))
    except ClassError as error:
        return Case({}, str(error))


def kept_case(kept: Kept, pictures: Pictures, study: str, class_name: str, seed: int, at: float) -> Case:
    case, _ = STUDIES[study]
    return Case(
        *kept.get(pictures, (study, class_name, seed, at), lambda: case(pictures, class_name, seed, at))
    )


STUDIES = {"few": (few, SIZES), "dirty": (dirty, SHARES)}
AXES = {"few": "good training pictures", "dirty": "defective ones among the training pictures"}


# ---------------------------------------------------------------- the table and the pictures
class Point(NamedTuple):
    """A row of the table: the cases (classes x seeds) of a set at a number or share."""

    set_name: str
    at: float
    cases: list[list[Case]]  # by seed, then by class

    @property
    def fault(self) -> str:
        """The first reason for which a class could not be fitted; empty where all could."""
        return next((case.fault for cases in self.cases for case in cases if case.fault), "")

    def aurocs(self, name: str) -> np.ndarray:
        """The mean over the classes (seeds); NaN where a class lacks it."""
        return np.array([np.mean([case.aurocs.get(name, np.nan) for case in of]) for of in self.cases])

    def row(self, study: str) -> list[str]:
        start = [self.set_name, told(study, self.at)]
        if self.fault:
            return [*start, "", *[""] * len(DETECTORS), f"cannot be had: {self.fault}"]
        cases = [case for of in self.cases for case in of]
        counts = f"{span([case.trained for case in cases])} + {span([case.held for case in cases])}"
        return [*start, counts, *map(self._cell, DETECTORS), self._threshold(cases)]

    def _cell(self, name: str) -> str:
        return auroc_cell(self.aurocs(name)) or "-"

    @staticmethod
    def _threshold(cases: list[Case]) -> str:
        if all(case.threshold for case in cases):
            return "yes"
        held = span([case.held for case in cases])
        return f"none: {held} held out, {calibration.needed(RATE)} needed"


def span(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def told(study: str, at: float) -> str:
    return (f"{at:.0f}" if at else "all") if study == "few" else f"{at:.0%}"


def table_of(study: str, points: list[Point]) -> str:
    header = ["set", AXES[study], "fitted + held out", *DETECTORS, f"threshold at {RATE:g}"]
    return tables.as_markdown(header, [point.row(study) for point in points])


def draw(study: str, points: list[Point], path: Path) -> None:
    """A panel per set: AUROC of every detector, bars of one standard deviation over the seeds."""
    names = list(dict.fromkeys(point.set_name for point in points))
    figure = Figure(figsize=(3.6 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        there = [point for point in points if point.set_name == name and not point.fault]
        at = range(len(there))
        for title in DETECTORS:
            values = [point.aurocs(title) for point in there]
            spread = [each.std(ddof=1) if len(each) > 1 else 0.0 for each in values]
            style = {"marker": "o", "markersize": 3, "linewidth": 2 if title == WHOLE else 1, "capsize": 2}
            axes.errorbar(at, [each.mean() for each in values], spread, label=title, **style)
        axes.set_xticks(at, [told(study, point.at) for point in there])
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("AUROC")
    figure.axes[0].legend(fontsize=7)
    figure.supxlabel(AXES[study], fontsize=10)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=80)


HOW = (
    "AUROC, mean over a set's classes, ± standard deviation over the seeds (which also choose the pictures). "
    "Of the pictures a tenth is held out, as the preset says. Threshold: whether the held-out pictures are "
    f"enough for a false-alarm rate of {RATE:g}; where they are not, predict.py takes the greatest of their "
    "scores as threshold, says at what rate, and --calibrate with more good pictures is the way. Defective "
    "ones: taken out of the test, those of the largest share for every share; all good pictures stay."
)


def main(args: argparse.Namespace) -> None:
    """Raises UserError."""
    points: dict[str, list[Point]] = {study: [] for study in STUDIES}
    sets, chosen, kept, start = [], {}, Kept(args.kept), time.perf_counter()
    for pictures in sets_of(args, baselines=True):
        sets.append(pictures)
        chosen[pictures.name] = evenly(np.array(pictures.classes), args.classes)
        for study, (_, amounts) in STUDIES.items():
            for at in amounts:
                cases = [
                    [kept_case(kept, pictures, study, str(c), seed, at) for c in chosen[pictures.name]]
                    for seed in args.seeds
                ]
                points[study].append(Point(pictures.name, at, cases))
                seconds = f"{time.perf_counter() - start:.0f} s"
                print(f"{' | '.join(points[study][-1].row(study))} | {seconds}", flush=True)
    seeds, note = ", ".join(map(str, args.seeds)), about("curves.py", sets)
    classes = "; ".join(f"{name}: {', '.join(map(str, of))}" for name, of in chosen.items())
    parts = ["# Few pictures, and dirty ones"]
    for study, of in points.items():
        path = args.out.with_name(f"{args.out.stem}-{study}.png")
        draw(study, of, path)
        parts += [f"![AUROC against {AXES[study]}]({path.name})", table_of(study, of)]
    parts += [HOW, f"{note} Seeds {seeds}; classes of {classes}; {time.perf_counter() - start:.0f} s."]
    write_text(args.out, "\n\n".join(parts) + "\n")
    print(f"in {args.out}", flush=True)


if __name__ == "__main__":
    parser = command_line(__doc__, "curves")
    parser.add_argument("--only", default="surfaces,cells,digits", help="sets [%(default)s]")
    parser.add_argument("--knobs", nargs="*", default=[], metavar="KNOB=VALUE", help="knobs for all sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="[0 1 2]")
    parser.add_argument("--classes", type=int, default=3, help="most classes of a set, evenly spaced [3]")
    guarded(main, parser.parse_args(), told=KEPT)
