"""Metrics against values worked out by hand, devices and whole files."""

import math

import numpy as np
import pytest
import torch

import utils
from backbone import backbones
from config import UserError
from shell.files import as_strict_json, whole_file, write_text


@pytest.mark.parametrize(
    "labels, scores, metrics",
    [
        ([1, 0, 1, 1, 0], [5, 4, 3, 2, 1], (4 / 6, (1 / 1 + 2 / 3 + 3 / 4) / 3, 1 / 2)),
        ([0, 0, 1, 1], [1, 3, 2, 3], (2.5 / 4, 0.5 * 1 / 2 + 0.5 * 2 / 3, 1 / 2)),  # a tie
        ([0, 1, 0, 1], [1, 1, 1, 1], (0.5, 0.5, 1.0)),
        ([1, 1, 1], [0, 1, 2], (math.nan,) * 3),
        ([0, 0, 0], [0, 1, 2], (math.nan,) * 3),
    ],
)
def test_metrics_by_hand(labels, scores, metrics):
    found = utils.detection_metrics(np.array(labels), np.array(scores, float))
    assert found == pytest.approx(dict(zip(("auroc", "aupr", "fpr95"), metrics)), nan_ok=True)


def test_fpr95_takes_95_percent():
    """Twenty anomalies: 19 are 95 %, so one may lie below every normal."""
    labels = np.array([1] * 20 + [0] * 4)
    scores = np.array([9.0] * 19 + [0.0] + [8, 1, 2, 3])
    assert utils.detection_metrics(labels, scores)["fpr95"] == 0.0
    scores[18] = 0.0  # now two lie below: every threshold that takes 19 takes all normals
    assert utils.detection_metrics(labels, scores)["fpr95"] == 1.0


# ---------------------------------------------------------------- files
def test_whole_file(tmp_path):
    """Not in place before the block ends, nor after an error, which names the file that was asked for."""
    path = tmp_path / "new" / "file.txt"
    with whole_file(path) as partial:
        partial.write_text("content")
        assert not path.exists()
    with pytest.raises(RuntimeError), whole_file(path) as partial:
        partial.write_text("half of the ne")
        raise RuntimeError
    assert path.read_text() == "content" and list(path.parent.iterdir()) == [path]
    with pytest.raises(IsADirectoryError) as told:
        write_text(tmp_path / "new", "")
    assert told.value.filename == str(tmp_path / "new")


def test_json_is_strict():
    """NaN is no JSON: other programs must be able to read what a class with one label leaves."""
    content = {"é": float("nan"), "scores": (1.5, float("inf"))}
    assert as_strict_json(content) == {"é": None, "scores": [1.5, None]}


def test_hash_of_tensors():
    """Of names, shapes, types and values; the order and the memory layout do not matter."""
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.tensor(5)}
    transposed = {"c": tensors["c"], "b": torch.ones(3, 2, dtype=torch.bfloat16).T, "a": tensors["a"]}
    assert backbones.sha256_of_tensors(transposed) == backbones.sha256_of_tensors(tensors)
    values = [torch.arange(4.0) + 1e-6, torch.arange(4.0).view(2, 2), torch.arange(4.0).double()]
    others = [tensors, {"z": tensors["a"], "b": tensors["b"], "c": tensors["c"]}]
    others += [tensors | {"a": value} for value in values]
    assert len({backbones.sha256_of_tensors(other) for other in others}) == len(others)


# ---------------------------------------------------------------- devices
@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "mps", "", "cpu:x"])
def test_devices_that_are_not_there(name):
    with pytest.raises(UserError):
        utils.set_up(name, 1)


def test_devices_and_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    try:
        assert utils.set_up("cpu", 1).type == "cpu" and torch.get_num_threads() == 1
        assert utils.set_up("auto", 1).type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert torch.backends.cudnn.allow_tf32 is False, "float32 convolutions are float32"
        for threads in (-1, 10**6):
            with pytest.raises(UserError, match=f"threads: this machine has .* got {threads}"):
                utils.set_up("cpu", threads)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- differences
def test_paired_difference():
    """The same images in both: equal scores leave no interval, a clear gain stays above zero."""
    generator = np.random.RandomState(0)
    labels = np.arange(400) % 2
    weak = labels + 2.0 * generator.randn(400)
    assert utils.paired_difference(labels, weak, weak) == {"difference": 0.0, "low": 0.0, "high": 0.0}
    gain = utils.paired_difference(labels, weak + labels, weak)
    assert gain["difference"] == utils.auroc(labels, weak + labels) - utils.auroc(labels, weak)
    assert 0 < gain["low"] < gain["difference"] < gain["high"] < 0.4
    lone = utils.paired_difference(np.array([0, 1, 1]), np.array([0.5, 1.0, 0.0]), np.zeros(3))
    assert math.isnan(lone["low"]), "of a single normal image no variance is known"


def test_interval_of_a_difference_is_delongs():
    """The covariances of DeLong, DeLong and Clarke-Pearson 1988, eq. 5 to 7, over all pairs."""
    generator = np.random.RandomState(0)
    labels = np.repeat([0, 1], [40, 70])
    scores = [np.round(labels + k * generator.randn(110), 1) for k in (0.7, 1.5)]  # with ties
    pairs = [np.sign(s[labels == 1][:, None] - s[labels == 0]) / 2 + 0.5 for s in scores]
    of_anomalous, of_normal = (np.cov([each.mean(axis) for each in pairs]) for axis in (1, 0))
    covariance = of_anomalous / 70 + of_normal / 40
    half = 1.96 * math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found = utils.paired_difference(labels, *scores)
    middle = found["difference"]
    assert (found["high"] - middle, middle - found["low"]) == pytest.approx((half, half))
