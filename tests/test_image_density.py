"""Densities of the image without a flow: what they are standardised by, and how a class weighs them."""

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from detector.image_density import (
    ImageDensity,
    Standardized,
    best_bandwidth,
    kernel_energy,
    left_out_distances,
    one_scene,
    squared_distances,
)


def tokens(n: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Correlated tokens (n, D), the same directions whatever n is."""
    mix = torch.randn(channels, channels, generator=torch.Generator().manual_seed(9))
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed)) @ mix / channels + 1


def fitted(known: torch.Tensor) -> ImageDensity:
    return ImageDensity(known.shape[1], min(len(known) - 1, known.shape[1])).fit(known)


FEW_AND_MANY = pytest.mark.parametrize("n, channels", [(12, 30), (40, 6)], ids=["few images", "many"])


@FEW_AND_MANY
def test_the_gaussian_has_ledoit_and_wolfs_covariance(n, channels):
    """By scikit-learn and an inverse, unseen images' parts outside of the directions included."""
    known, unseen = tokens(n, channels), tokens(25, channels, seed=1)
    density = fitted(known)
    covariance, _ = ledoit_wolf(known.double().numpy())
    away = (unseen - known.mean(0)).double().numpy()
    energy = np.einsum("nc,cd,nd->n", away, np.linalg.inv(covariance), away)
    unit = density.gaussian_unit
    got = (density(unseen)[:, 0] * unit.deviation + unit.mean).exp() * channels
    assert got.numpy() == pytest.approx(energy, rel=1e-3)


@FEW_AND_MANY
def test_the_kernels_are_those_of_a_plain_loop(n, channels):
    known, unseen = tokens(n, channels), tokens(25, channels, seed=1)
    density = fitted(known)
    covariance = np.cov(known.double().numpy().T, bias=True)
    metric = np.linalg.inv(covariance + 10 * np.trace(covariance) / channels * np.eye(channels))
    away, centres = ((x - known.mean(0)).double().numpy() for x in (unseen, known))
    h, wanted = density.bandwidth.item(), []
    for one in away:
        squares = [(one - c / 2) @ metric @ (one - c / 2) for c in centres]
        wanted.append(-2 * h * math.log(np.mean([math.exp(-d / 2 / h) for d in squares])))
    unit = density.kernel_unit
    got = (density(unseen)[:, 1] * unit.deviation + unit.mean).exp() * channels
    assert got.numpy() == pytest.approx(wanted, rel=1e-3)


def test_squared_distances_by_hand():
    known = torch.tensor([[0.0, 1.0], [3.0, -3.0], [2.0, 1.0]])
    assert squared_distances(known[:2], known).tolist() == [[0, 25, 4], [25, 0, 17]]
    far = 100 + torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    assert squared_distances(far, far + 1e-3).min() == 0, "rounding makes none negative"


def test_kernel_density_is_a_density():
    """It integrates to one under any bandwidth."""
    axis = torch.arange(-9, 9, 0.06).double()
    points, known = torch.cartesian_prod(axis, axis), torch.randn(5, 2).double()
    h = torch.tensor(0.3).double()
    energy = kernel_energy(squared_distances(points, known), h, 2)
    total = torch.exp(-energy / h - (2 * math.pi * h).log()).sum() * 0.06**2
    assert abs(total.item() - 1) < 1e-3


def test_best_bandwidth_is_the_best_of_those_tried():
    """The one under which held-out points are most likely, a factor of 1.12 from its neighbours: near the
    variance by which they lie beside the known ones."""
    generator = torch.Generator().manual_seed(0)
    known = 3 * torch.randn(200, 5, generator=generator).double()
    held = known[:60] + 0.8 * torch.randn(60, 5, generator=generator).double()
    distances = squared_distances(held, known)
    best = best_bandwidth(distances, 5)

    def loss(h):
        return (kernel_energy(distances, h, 5) / h + h.log()).mean()

    assert all(loss(best) < loss(best * factor) for factor in (1.12**-8, 1 / 1.12, 1.12, 1.12**8))
    assert 0.3 < best.item() < 1.2


@FEW_AND_MANY
def test_images_are_standardised_by_gaussians_without_them(n, channels):
    """By a second fit to the others, with the shrinkage of all."""
    known = tokens(n, channels)
    unit, x = fitted(known).gaussian_unit, known.double().numpy()
    shrinkage, logs = ledoit_wolf(x)[1], []
    for i in range(n):
        others = np.delete(x, i, 0)
        covariance, away = np.cov(others.T, bias=True), x[i] - others.mean(0)
        target = np.trace(covariance) / channels * np.eye(channels)
        inverse = np.linalg.inv((1 - shrinkage) * covariance + shrinkage * target)
        logs.append(math.log(away @ inverse @ away / channels))
    assert unit.mean.item() == pytest.approx(np.mean(logs), abs=1e-3)
    assert unit.deviation.item() == pytest.approx(np.std(logs, ddof=1), rel=1e-3)


@FEW_AND_MANY
def test_kernels_leave_the_image_out_of_their_metric_too(n, channels):
    """By an inverse for each image: mean and ridge of all, the covariance of the others."""
    known = tokens(n, channels)
    density, x = fitted(known), (known - known.mean(0)).double().numpy()
    ridge = 10 * np.square(x).mean() * np.eye(channels)
    wanted = np.full((n, n), np.inf)
    for i in range(n):
        metric = np.linalg.inv((x.T @ x - np.outer(x[i], x[i]) * n / (n - 1)) / n + ridge)
        for j in set(range(n)) - {i}:
            wanted[i, j] = (x[i] - x[j] / 2) @ metric @ (x[i] - x[j] / 2)
    scaled = density.gaussian.principal(known)[0] * density.kernel_scale
    assert left_out_distances(scaled, scaled / 2).numpy() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("n, channels", [(40, 400), (200, 6), (200, 60)])
def test_unseen_images_are_in_units_of_the_known_ones(n, channels):
    """Mean 0 and deviation 1, whatever the number of images, as densities without the image promise."""
    density = fitted(tokens(n, channels))
    found = density(tokens(2000, channels, seed=2))
    assert found.mean(0).abs().max() < 0.4 and (found.std(0) - 1).abs().max() < 0.3
    assert (density(tokens(50, channels, seed=2) + 1).mean(0) > 2).all()


def test_standardized():
    unit = Standardized().fit(torch.tensor([1.0, 2.0, 3.0]))
    assert unit(torch.tensor([2.0, 4.0])).tolist() == pytest.approx([0, 2])
    for alike in ([5.0], [5.0, 5.0]):
        assert Standardized().fit(torch.tensor(alike))(torch.tensor([6.0])).tolist() == [1]


def test_one_scene_is_a_ramp():
    found = [one_scene(spread) for spread in (0.0, 0.15, 0.27, 0.33, 0.39, 1.0)]
    assert found == pytest.approx([1, 1, 0.5, 0.25, 0, 0])
