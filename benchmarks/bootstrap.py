"""A bootstrap of AUROCs over one-class problems: whatever is compared sees the same draws of test images."""

from typing import NamedTuple

import numpy as np

import utils

CHUNK = 250  # draws in memory at once


class Problem(NamedTuple):
    """A class: the test split's rows (n), labels (n), {detector: its scores (n)} of the first seed, and
    {detector: its AUROC with every seed}."""

    name: str
    rows: np.ndarray
    labels: np.ndarray
    scores: dict[str, np.ndarray]
    aurocs: dict[str, list[float]]


def resampled(problems: list[Problem], detectors: list[str], draws: int, seed) -> np.ndarray:
    """AUROCs of bootstrap draws (draws, classes, detectors); NaN where a class lacks a detector. Classes
    with the same test images are drawn together."""
    found = np.empty((draws, len(problems), len(detectors)))
    generator, groups = np.random.default_rng(seed), {}
    for i, problem in enumerate(problems):
        groups.setdefault(np.sort(problem.rows).tobytes(), []).append(i)
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


def holm(p: np.ndarray) -> np.ndarray:
    """p-values with Holm's correction."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    return np.minimum(adjusted, 1)[np.argsort(order)]


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


def difference(judged: list[Judged], ours: int, theirs: int) -> dict | None:
    """AUROC of one detector minus another's, mean over classes, then over the sets that have both:
    difference, low and high (95 %), sets (how many), wins (classes won, level and lost, then with Holm's
    correction). None where no set has both."""
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
    found = {"difference": mean, "low": float(low), "high": float(high), "sets": len(pairs)}
    return found | {"wins": f"{counts[0]} ({counts[1]})"}
