"""The normalisers: what each name promises, measured on the tokens they were fitted to."""

import numpy as np
import pytest
import torch

from detector import normalization
from detector.normalization import (
    NORMALIZATIONS,
    PatchNormalizer,
    Standardization,
    Whitening,
    power_l2,
    principal_directions,
    spread,
)

C = 7


def make(name: str, n: int) -> Standardization | Whitening:
    """For n images, with the directions that these have."""
    return NORMALIZATIONS[name](C, min(n - 1, C) if name.endswith("whiten") else C)


def correlated(n: int = 4000, seed: int = 0) -> torch.Tensor:
    """Tokens (n, C) with means, scales and correlations of their own, the same whatever n is."""
    mix = torch.randn(C, C, generator=torch.Generator().manual_seed(9))
    tokens = torch.randn(n, C, generator=torch.Generator().manual_seed(seed))
    return tokens @ mix + 2 * torch.arange(C)


def test_none_is_the_identity():
    tokens = correlated(20)
    got, outside = make("none", 20)(tokens)
    assert torch.equal(got, tokens) and torch.equal(outside, torch.zeros(20))


def test_power_l2():
    tokens = torch.randn(3, 5, C) * 10
    got = power_l2(tokens)
    assert torch.allclose(got.norm(dim=-1), torch.ones(3, 5), atol=1e-6)
    assert torch.equal(got.sign(), tokens.sign())
    assert torch.allclose(got, power_l2(4 * tokens), atol=1e-6), "length is gone"
    assert torch.allclose(power_l2(torch.tensor([9.0, -16.0])), torch.tensor([3 / 5, -4 / 5]))
    assert torch.equal(power_l2(torch.zeros(2, C)), torch.zeros(2, C)), "an empty token stays finite"


def test_spread_does_not_depend_on_how_many_images_there_are():
    """On the mean over draws: without its correction that of three images is two thirds of it."""
    assert spread(torch.ones(5, 8)) == pytest.approx(0, abs=1e-6)
    assert spread(torch.eye(8)) == pytest.approx(1, rel=1e-5), "no two have anything in common"
    generator = torch.Generator().manual_seed(0)
    tokens = 1 + torch.randn(6000, 8, generator=generator)
    few, many = (np.mean([spread(part) for part in tokens.split(n)]) for n in (3, 2000))
    assert few == pytest.approx(many, rel=0.03) and many > 0.1


@pytest.mark.parametrize("n", [5, 7, 8, 40])
def test_principal_directions_are_those_of_the_covariance(n):
    centred = correlated(n) - correlated(n).mean(0)
    values, directions = principal_directions(centred)
    wanted = np.linalg.eigvalsh(np.cov(centred.double().numpy().T, bias=True))[::-1][: min(n - 1, C)]
    assert len(values) == min(n - 1, C) and values.numpy() == pytest.approx(wanted, rel=1e-4, abs=1e-8)
    assert torch.allclose(directions.T @ directions, torch.eye(len(values)).double(), atol=1e-6)


@pytest.mark.parametrize("copies", [1, 5])
def test_an_image_that_is_there_twice_leaves_no_direction_of_rounding(copies):
    """Of fewer images than channels: unseen ones are as far as they were without the copies."""
    generator = torch.Generator().manual_seed(2)
    tokens, unseen = (torch.rand(n, 60, generator=generator) for n in (20, 30))

    def lengths(known):
        inside, _ = Whitening(60, len(known) - 1).fit(power_l2(known))(power_l2(unseen))
        return inside.square().sum(1)

    once, again = lengths(tokens), lengths(torch.cat([tokens, tokens[:copies]]))
    assert again.median() < 3 * once.median()


def test_constant_channel_stays_finite():
    tokens = correlated(50)
    tokens[:, 2] = 4.0
    assert all(got.isfinite().all() for got in make("power_l2+whiten", 50).fit(tokens)(tokens))


def test_standardization():
    """One common scale: relative sizes of channels are kept, the mean square is 1, nothing is outside."""
    tokens = correlated()
    got, outside = make("power_l2", 4000).fit(tokens)(tokens)
    ratio = got.std(0) / tokens.std(0)
    assert got.mean(0).abs().max() < 1e-3 and got.square().mean().item() == pytest.approx(1, abs=1e-3)
    assert (ratio / ratio[0] - 1).abs().max() < 1e-3 and outside.abs().max() == 0


def test_whitening_has_the_identity_covariance():
    tokens = correlated()
    got, _ = make("power_l2+whiten", 4000).fit(tokens)(tokens)
    held = torch.cov(got.double().T)
    assert (held - held[0, 0] * torch.eye(C)).abs().max() < 0.05 * held[0, 0]


@pytest.mark.parametrize("n", [5, 40], ids=["fewer images than channels", "more"])
def test_whitening_is_the_plain_one(n, monkeypatch):
    """In float64 over all channels: unseen tokens' squared lengths, inside and outside of the directions."""
    monkeypatch.setattr(normalization, "RIDGE", 0.1)  # with that of the method rounding decides
    tokens, unseen = correlated(n), correlated(30, seed=1)
    train, test = (each.double().numpy() for each in (tokens, unseen))
    away, count = test - train.mean(0), min(n - 1, C)
    values, vectors = np.linalg.eigh(np.cov(train.T, bias=True))
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    floor = 0.1 * values.mean()
    scale = 1 / np.sqrt(values + floor)
    common = (values * scale**2)[:count].mean()
    each = (away @ vectors * scale) ** 2 / common
    got, outside = make("power_l2+whiten", n).fit(tokens)(unseen)
    assert got.square().numpy() == pytest.approx(each[:, :count], rel=1e-3, abs=1e-3)
    wanted = each[:, count:].sum(1)
    assert outside.numpy() == pytest.approx(wanted, rel=1e-3, abs=1e-3) and (wanted.max() > 1) == (n < C)


# ---------------------------------------------------------------- patch tokens
def patches(n: int = 400) -> torch.Tensor:
    return correlated(n * 6).view(n, 6, C)


def test_patches_are_standardised_by_one_shift_and_scale():
    found = patches()
    got = PatchNormalizer(True, C, C).fit(found.flatten(0, 1))(found)
    plain = power_l2(found)
    wanted = plain - plain.mean((0, 1))
    assert torch.allclose(got, wanted / wanted.square().mean().sqrt(), atol=1e-3)


def test_missing_channels_of_patches_are_zeros():
    found = patches(3)
    plain = PatchNormalizer(True, C, C).fit(found.flatten(0, 1))(found)
    wider = PatchNormalizer(True, C, C + 4).fit(found.flatten(0, 1))(found)
    assert wider.shape == (3, 6, C + 4) and torch.equal(wider[..., :C], plain)
    assert wider[..., C:].abs().max() == 0


def test_more_channels_of_patches_are_brought_to_their_principal_directions():
    found = patches()
    kept = found.clone()
    got = PatchNormalizer(True, C, 3).fit(found.flatten(0, 1))(found)
    assert torch.equal(found, kept), "the cached tokens are as they were"
    plain = power_l2(found).flatten(0, 1).double()
    centred = plain - plain.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    wanted = (centred @ vectors.flip(1)[:, :3]).abs()
    wanted = wanted / wanted.square().mean().sqrt()
    assert got.shape == (400, 6, 3)
    assert torch.allclose(got.flatten(0, 1).abs().double(), wanted, rtol=1e-3, atol=1e-2)
