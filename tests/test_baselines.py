"""The simple detectors: against brute force, and on blobs that anyone can tell apart."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

import utils
from detector import baselines


def blobs(seed: int = 0, n: int = 80, channels: int = 6):
    """Normal training tokens, test tokens (half normal, half elsewhere) and test labels."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.arange(channels) + 3.0
    train, normal, anomalous = (
        centre + 0.5 * torch.randn(n, channels, generator=generator) for _ in range(3)
    )
    return train, torch.cat([normal, anomalous.flip(1)]), np.repeat([0, 1], n)


def test_blobs_are_told_apart():
    train, test, labels = blobs()
    scores = baselines.semantic_scores(train, test)
    assert set(scores) == set(baselines.SEMANTIC)
    for name, score in scores.items():
        assert score.shape == (len(test),) and utils.auroc(labels, score) > 0.99, name


def test_neighbours_equal_brute_force(monkeypatch):
    train, test, _ = blobs(n=37)
    distances = np.sort(np.linalg.norm(test.numpy()[:, None] - train.numpy()[None], axis=2), axis=1)
    for chunk in (7, 1024):  # queries in pieces give the same
        monkeypatch.setattr(baselines, "CHUNK", chunk)
        got = baselines.neighbours(train, test)
        assert np.abs(got / distances[:, :2].mean(1) - 1).max() < 1e-3  # float32


def test_cosine_neighbours_by_hand():
    """Unit vectors at 60 and 90 degrees from the query: chords 1 and sqrt 2."""
    reference = torch.tensor([[0.5, 3**0.5 / 2], [0.0, 2.0], [-1.0, 0.0]])
    assert np.allclose(
        baselines.cosine_neighbours(reference, torch.tensor([[7.0, 0]])), (1 + 2**0.5) / 2, atol=1e-6
    )


@pytest.mark.parametrize("n", [8, 12, 13, 200])
def test_gaussian_is_mahalanobis_under_ledoit_wolf(n, monkeypatch):
    """scikit-learn's, with fewer and with more images than the 12 channels."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(12, 12, generator=generator)
    train, test = (torch.randn(m, 12, generator=generator) @ mix + 2 for m in (n, 50))
    wanted = LedoitWolf().fit(train.double().numpy()).mahalanobis(test.double().numpy())
    for chunk in (9, 1024):
        monkeypatch.setattr(baselines, "CHUNK", chunk)
        assert baselines.gaussian(train, test) == pytest.approx(wanted, rel=1e-3)
