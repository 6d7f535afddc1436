"""p-values and thresholds from held-out scores."""

import numpy as np
import pytest

from config import UserError
from detector import calibration


def test_p_values_by_hand():
    held = np.array([3.0, 1.0, 2.0, 2.0])
    assert calibration.p_values(held, np.array([0.0, 2.0, 2.5, 9.0])) == pytest.approx([1, 0.8, 0.4, 0.2])
    assert calibration.p_values(held, 2.0) == pytest.approx(0.8)


@pytest.mark.parametrize("n", [1, 5, 19, 20, 99, 100, 250])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_above_the_threshold_is_a_small_p_value(n, rate):
    held = np.random.RandomState(n).randn(n)
    found = calibration.threshold(held, rate)
    scores = np.concatenate([held, held + 1e-9, np.linspace(-5, 5, 101)])
    enough = n >= calibration.needed(rate)
    assert enough != ("warning" in str(found))
    limit = rate if enough else 1 / (n + 1)
    assert np.array_equal(scores > found.score, calibration.p_values(held, scores) <= limit + 1e-12)


@pytest.mark.parametrize("n, rate", [(19, 0.05), (100, 0.05), (400, 0.01)])
def test_the_interval_covers_the_true_rate(n, rate):
    """The rate of uniform scores above a threshold u is 1 - u: known without an estimate."""
    generator, rates, covered = np.random.RandomState(0), [], 0
    for _ in range(2000):
        found = calibration.threshold(generator.rand(n), rate)
        rates.append(1 - found.score)
        covered += found.low <= rates[-1] <= found.high
    assert np.mean(rates) == pytest.approx(found.expected, rel=0.1) and found.expected <= rate
    assert 0.93 <= covered / 2000 <= 0.97


def test_too_few_pictures_are_said():
    found = calibration.threshold(np.arange(10.0), 0.01)
    assert found.score == 9.0 and found.expected == pytest.approx(1 / 11) and "needs 99" in str(found)
    assert "10 held-out" in str(found)
    assert calibration.needed(0.05) == 19 and calibration.needed(0.03) == 33
    with pytest.raises(UserError, match="--calibrate"):
        calibration.threshold(np.empty(0), 0.05)
