"""Detectors compared over one-class problems: a bootstrap in which all see the same draws of test images;
what one score loses to others; what a choice of settings is worth on sets that had no part in it."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

import utils
from reporting.tables import holm

CHUNK = 250  # draws in memory at once


# ---------------------------------------------------------------- the joint bootstrap
class Problem(NamedTuple):
    """A class: the test split's rows (n), labels (n), {detector: its scores (n)} of the first seed, and
    {detector: its AUROC with every seed}."""

    name: str
    rows: np.ndarray
    labels: np.ndarray
    scores: dict[str, np.ndarray]
    aurocs: dict[str, list[float]]


def resampled(problems: list[Problem], detectors: list[str], draws: int, seed) -> np.ndarray:
    """AUROCs of bootstrap draws (draws, classes, detectors); NaN where a class lacks a detector. Normal and
    anomalous images are drawn apart, classes with the same test images together."""
    found = np.empty((draws, len(problems), len(detectors)))
    generator, groups = np.random.default_rng(seed), defaultdict(list)
    for i, problem in enumerate(problems):
        groups[np.sort(problem.rows).tobytes()].append(i)
    for members in groups.values():
        orders = [np.argsort(problems[i].rows) for i in members]
        labels = np.array([problems[i].labels[order] for i, order in zip(members, orders)])
        strata = np.unique(labels, axis=1, return_inverse=True)[1].ravel()  # images of the same labels
        sizes, n = np.bincount(strata), len(strata)
        aurocs = np.full((len(members), len(detectors)), np.nan)
        terms = np.full((n, *aurocs.shape), np.nan)  # what each time that an image is drawn adds
        for j, (i, order) in enumerate(zip(members, orders)):
            for k, title in enumerate(detectors):
                if title in problems[i].scores:
                    placed = utils.placements(labels[j], problems[i].scores[title][order])
                    aurocs[j, k] = placed[labels[j] == 1].mean()
                    terms[:, j, k] = (placed - aurocs[j, k]) / np.bincount(labels[j])[labels[j]]
        terms = terms[np.argsort(strata, kind="stable")].reshape(n, -1)  # stratum by stratum
        starts, widths = (np.repeat(part, sizes) for part in (np.cumsum(sizes) - sizes, sizes))
        for first in range(0, draws, CHUNK):
            count = min(CHUNK, draws - first)
            drawn = starts + generator.integers(widths, size=(count, n)) + n * np.arange(count)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n).astype(float)
            found[first : first + count, members] = aurocs + (weights @ terms).reshape(count, *aurocs.shape)
    return found


class Judged(NamedTuple):
    """A set: AUROCs of the first seed (classes, detectors) and of the draws (draws, classes, detectors)."""

    points: np.ndarray
    draws: np.ndarray


def judge(problems: list[Problem], detectors: list[str], simple: list[str], draws: int, seed) -> Judged:
    """A set's classes under all detectors, and in a last column under the best of the ``simple`` ones of each
    class, of those that the whole set has."""
    points = np.array([[p.aurocs.get(name, [np.nan])[0] for name in detectors] for p in problems])
    found = resampled(problems, detectors, draws, seed)
    counts = np.isin(detectors, simple) & ~np.isnan(points).any(0)
    best = np.where(counts, points, -np.inf).argmax(1)[:, None]
    chosen = np.take_along_axis(points, best, 1), np.take_along_axis(found, best[None], 2)
    known = 0.0 if counts.any() else np.nan
    return Judged(np.append(points, chosen[0] + known, 1), np.append(found, chosen[1] + known, 2))


class Difference(NamedTuple):
    """AUROC of one detector minus another's, mean over classes, then over ``sets`` sets, and its 95 %
    interval. wins: classes won / level / lost, and in brackets with Holm's correction."""

    mean: float
    low: float
    high: float
    sets: int
    wins: str

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def difference(judged: list[Judged], ours: int, theirs: int) -> Difference | None:
    """Of the detectors in two columns, over the sets that have both; None where there is none."""
    pairs = [
        (s.points[:, ours] - s.points[:, theirs], s.draws[..., ours] - s.draws[..., theirs]) for s in judged
    ]
    pairs = [(points, draws.round(12)) for points, draws in pairs if not np.isnan(points).any()]
    if not pairs:
        return None
    low, high = np.quantile(np.mean([draws.mean(1) for _, draws in pairs], 0), [0.025, 0.975])
    classes = np.concatenate([draws for _, draws in pairs], 1)
    lows, highs = np.quantile(classes, [0.025, 0.975], axis=0)
    tails = np.minimum((classes <= 0).sum(0), (classes >= 0).sum(0))
    sure = holm(np.minimum(2 * (tails + 1) / (len(classes) + 1), 1)) <= 0.05
    won, lost = lows > 0, highs < 0
    counts = [
        f"{w.sum()} / {(~w & ~lo).sum()} / {lo.sum()}" for w, lo in ((won, lost), (won & sure, lost & sure))
    ]
    mean = float(np.mean([points.mean() for points, _ in pairs]))
    return Difference(mean, float(low), float(high), len(pairs), f"{counts[0]} ({counts[1]})")


# ---------------------------------------------------------------- regret, and settings chosen without a set
class Row(NamedTuple):
    """An AUROC: of a class of a set by a detector, with one seed."""

    detector: str
    set: str
    of_class: str
    seed: int
    auroc: float


def set_means(rows: Iterable[Row]) -> dict[str, dict[str, np.ndarray]]:
    """{set: {detector: its mean AUROC over the classes with every seed}} of the detectors that all classes of
    a set have."""
    by_set: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        by_set[row.set][row.detector][row.of_class].append(row.auroc)
    most = {name: max(map(len, detectors.values())) for name, detectors in by_set.items()}
    return {
        name: {title: np.mean([*own.values()], 0) for title, own in of.items() if len(own) == most[name]}
        for name, of in by_set.items()
    }


def regret(rows: Iterable[Row], ours: str, others: list[str]) -> dict[str, tuple[float, str]]:
    """{set: (AUROC of ``ours`` minus that of the best of ``others`` on this set, which one that is)}: below
    zero where somebody who knew the set would have taken another. Sets that lack either are left out."""
    found = {}
    for name, means in set_means(rows).items():
        there = [other for other in others if other in means]
        if ours in means and there:
            best = max(there, key=lambda other: means[other].mean())
            found[name] = float(means[ours].mean() - means[best].mean()), best
    return found


def leave_one_set_out(runs: dict[str, list[Row]], detector: str) -> list[tuple[str, str, float, str, float]]:
    """Each set that all settings have with the detector, left out of the choice in turn -> its name, the
    setting chosen by the mean of all other sets, what that one has on it, the setting that is best on it, and
    what that one has; with fewer than two such sets none. runs: {setting: rows}."""
    means = {run: set_means(rows) for run, rows in runs.items()}
    known = [[name for name, of_set in own.items() if detector in of_set] for own in means.values()]
    sets = [name for name in known[0] if all(name in names for names in known)]
    aurocs = {run: {name: float(own[name][detector].mean()) for name in sets} for run, own in means.items()}
    found = []
    for name in sets if len(sets) > 1 else []:
        others = [other for other in sets if other != name]
        chosen = max(aurocs, key=lambda run: np.mean([aurocs[run][other] for other in others]))
        best = max(aurocs, key=lambda run: aurocs[run][name])
        found.append((name, chosen, aurocs[chosen][name], best, aurocs[best][name]))
    return found
