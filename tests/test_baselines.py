"""The simple detectors: against brute force, and on blobs that anyone can tell apart."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
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
    for name, (detector, prepare) in baselines.SEMANTIC.items():
        score = detector(prepare(train), prepare(test))
        assert score.shape == (len(test),) and utils.auroc(labels, score) > 0.99, name


def test_neighbours_equal_brute_force(monkeypatch):
    train, test, _ = blobs(n=37)
    distances = np.sort(np.linalg.norm(test.numpy()[:, None] - train.numpy()[None], axis=2), axis=1)
    for chunk in (7, 1024):  # queries in pieces give the same
        monkeypatch.setattr(baselines, "CHUNK", chunk)
        got = baselines.neighbours(train, test)
        assert np.abs(got / distances[:, :2].mean(1) - 1).max() < 1e-3  # float32


def test_neighbours_by_cosine_by_hand():
    """Unit vectors at 60 and 90 degrees from the query: chords 1 and sqrt 2."""
    tokens = [[0.5, 3**0.5 / 2], [0.0, 2.0], [-1.0, 0.0], [7.0, 0.0]]
    detector, prepare = baselines.SEMANTIC["kNN, raw"]
    unit = prepare(torch.tensor(tokens))
    assert np.allclose(detector(unit[:3], unit[3:]), (1 + 2**0.5) / 2, atol=1e-6)


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


def test_coreset_takes_the_farthest():
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [50.0]])
    assert sorted(baselines.greedy_coreset(line, 3).flatten().tolist()) == [0, 11, 50]
    assert len(baselines.greedy_coreset(line.repeat(2, 1), 99).unique()) == 6


@pytest.mark.parametrize("places, kept", [(4, 3), (60, 36)])
def test_patch_memory_equals_brute_force(places, kept):
    """Over a tenth of all places of six images, with fewer than nine neighbours and with more."""
    generator = torch.Generator().manual_seed(0)
    reference, query = (torch.randn(n, places, 3, generator=generator) for n in (6, 5))
    memory = baselines.greedy_coreset(reference.flatten(0, 1), kept).numpy().astype(float)
    wanted = []
    for image in query.numpy().astype(float):
        distances = np.linalg.norm(image[:, None] - memory[None], axis=2)
        place = distances.min(1).argmax()
        owner = distances[place].argmin()
        around = np.argsort(np.linalg.norm(memory - memory[owner], axis=1))[:9]
        weight = 1 - np.exp(distances[place, owner]) / np.exp(distances[place, around]).sum()
        wanted.append(weight * distances[place, owner])
    assert np.allclose(baselines.patch_memory(reference)(query).numpy(), wanted, rtol=1e-3)


def test_place_gaussians_equal_scipys():
    generator = torch.Generator().manual_seed(0)
    reference, query = (torch.randn(n, 4, 3, generator=generator) for n in (40, 5))
    wanted = []
    for image in query.numpy().astype(float):
        distances = []
        for p in range(4):
            tokens = reference[:, p].numpy().astype(float)
            precision = np.linalg.inv(np.cov(tokens.T) + 0.01 * np.eye(3))
            distances.append(mahalanobis(image[p], tokens.mean(0), precision))
        wanted.append(max(distances))
    assert np.allclose(baselines.place_gaussians(reference)(query).numpy(), wanted, rtol=1e-3)
