"""From the scores of held-out normal pictures to p-values, a threshold at a false-alarm rate, and how sure
that is."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv

from config import UserError

CONFIDENCE = 0.95  # of the interval of the false-alarm rate


def p_values(held_out: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The share of normal pictures at least as unusual, (1 + #held-out scores >= score) / (1 + n), of scores
    of any shape; NaN where none were held out.

    Among pictures like the n held-out ones, a p-value of at most alpha comes with probability at most alpha,
    whatever the scores are that they had no part in (conformal prediction: Vovk, Gammerman and Shafer
    2005, section 2.2)."""
    if not len(held_out):
        return np.full(np.shape(scores), np.nan)
    ordered = np.sort(np.asarray(held_out, float))
    return (1 + len(ordered) - np.searchsorted(ordered, scores, side="left")) / (1 + len(ordered))


class Threshold(NamedTuple):
    """The score above which a picture counts as anomalous, and what is known of the false alarms there."""

    score: float
    expected: float  # the false-alarm rate, on average over held-out sets of this size
    low: float  # its 95 % interval, given this held-out set
    high: float
    n: int  # held-out pictures that it rests on
    asked: float

    def __str__(self) -> str:
        told = (
            f"anomalous: above {self.score:.6g}; false alarms there {self.expected:.2%} "
            f"({self.low:.2%} to {self.high:.2%} with {CONFIDENCE:.0%} confidence), from {self.n} "
            "held-out normal pictures"
        )
        if self.expected <= self.asked:
            return told
        return (
            f"{told}\nwarning: a false-alarm rate of {self.asked:g} needs {needed(self.asked)} of them: the "
            f"threshold is the greatest of their scores, at a rate of {self.expected:.3g}"
        )


def needed(false_alarms: float) -> int:
    """How many held-out pictures a false-alarm rate needs: with fewer no score would be anomalous."""
    return math.ceil(round(1 / false_alarms, 9)) - 1


def threshold(held_out: np.ndarray, false_alarms: float) -> Threshold:
    """The lowest threshold whose expected false-alarm rate is at most ``false_alarms``: a score above it has
    a p-value of at most that. With too few pictures, the greatest held-out score.

    Above the (m + 1)-th greatest of n scores the true rate is distributed as Beta(m + 1, n - m) where scores
    have no ties: an order statistic's coverage. Raises UserError without held-out scores."""
    ordered = np.sort(np.asarray(held_out, float))[::-1]
    n = len(ordered)
    if n == 0:
        raise UserError(
            "no normal pictures were held out, so there is no threshold; train with --holdout 0.1, or give "
            "fresh good pictures: predict.py --calibrate FOLDER"
        )
    above = max(0, math.floor(false_alarms * (n + 1) + 1e-9) - 1)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(betaincinv(above + 1, n - above, share)) for share in (tail, 1 - tail))
    return Threshold(float(ordered[above]), (above + 1) / (n + 1), low, high, n, false_alarms)
