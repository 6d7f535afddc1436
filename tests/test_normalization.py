"""The normaliser: what each name promises, measured on the tokens it was fitted to."""

import pytest
import torch

from normalization import NORMALIZATIONS, Normalizer, power_l2

C = 6


def make(name: str, channels: int, ridge: float = 0.0) -> Normalizer:
    return Normalizer(name, channels, ridge=ridge, centre_pool=0.0, grid=(1, 1), patches_used=True)


def correlated(n: int = 4000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Semantic (n, C) and patch tokens (n, C) with means, scales and correlations of their own."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(C, C, generator=generator)
    semantic = torch.randn(n, C, generator=generator) @ mix + 5 * torch.arange(C)
    return semantic, 7 * torch.randn(n, C, generator=generator) - 3


def test_none_is_the_identity():
    semantic, patches = correlated(20)
    got = make("none", C).fit(semantic, patches)(semantic, patches.view(4, 5, C))
    assert torch.equal(got[0], semantic) and torch.equal(got[1], patches.view(4, 5, C))


def test_power_l2():
    tokens = torch.randn(3, 5, C) * 10
    got = power_l2(tokens)
    assert torch.allclose(got.norm(dim=-1), torch.ones(3, 5), atol=1e-6)
    assert torch.equal(got.sign(), tokens.sign())
    assert torch.allclose(got, power_l2(4 * tokens), atol=1e-6), "length is gone"
    assert torch.allclose(power_l2(torch.tensor([9.0, -16.0])), torch.tensor([3 / 5, -4 / 5]))
    assert torch.equal(power_l2(torch.zeros(2, C)), torch.zeros(2, C)), "an empty token stays finite"


def test_standardize():
    semantic, patches = correlated()
    for got in make("standardize", C).fit(semantic, patches)(semantic, patches):
        assert got.mean(0).abs().max() < 1e-3 and (got.std(0) - 1).abs().max() < 1e-3


def test_constant_channel_stays_finite():
    semantic, patches = correlated()
    semantic[:, 2] = 4.0
    for name in NORMALIZATIONS:
        assert all(
            torch.isfinite(got).all() for got in make(name, C).fit(semantic, patches)(semantic, patches)
        ), name


def test_power_l2_normalizer():
    """One common scale: relative sizes of channels are kept, the mean square is 1."""
    semantic, patches = correlated()
    got, _ = make("power_l2", C).fit(semantic, patches)(semantic, patches)
    plain = power_l2(semantic)
    ratio = got.std(0) / plain.std(0)
    assert got.mean(0).abs().max() < 1e-3 and got.square().mean() == pytest.approx(1, abs=1e-3)
    assert (ratio / ratio[0] - 1).abs().max() < 1e-3


def test_whitening():
    """Semantic tokens get the identity covariance; patch tokens are standardised."""
    semantic, patches = correlated(20000)
    got, got_patches = make("whiten", C).fit(semantic, patches)(semantic, patches)
    assert got.mean(0).abs().max() < 1e-2
    assert (torch.cov(got.double().T) - torch.eye(C)).abs().max() < 0.03
    assert (got_patches.std(0) - 1).abs().max() < 1e-2


def test_power_then_whiten():
    """The two names joined are the two steps one after the other."""
    semantic, patches = correlated()
    got = make("power_l2+whiten", C).fit(semantic, patches)(semantic, patches)
    roots = power_l2(semantic), power_l2(patches)
    for one, wanted in zip(got, make("whiten", C).fit(*roots)(*roots)):
        assert torch.allclose(one, wanted, atol=1e-5)


def test_whitening_does_not_rotate():
    """The whitening matrix is symmetric: of all that whiten, the one that moves the tokens least."""
    semantic, patches = correlated()
    whitening = make("whiten", C).fit(semantic, patches).whitening
    assert torch.allclose(whitening, whitening.T, atol=1e-5)


def test_ridge_keeps_the_scale():
    """A large ridge leaves the ratio of the channels' variances as it was; none levels them."""
    generator = torch.Generator().manual_seed(0)
    semantic = torch.randn(4000, 2, generator=generator) * torch.tensor([1.0, 3.0])
    ratio = []
    for ridge in (0.0, 1.0, 1e6):
        got, _ = make("whiten", 2, ridge).fit(semantic, semantic)(semantic, semantic)
        ratio.append((got[:, 1].std() / got[:, 0].std()).item())
        assert got.square().mean() == pytest.approx(1, abs=1e-2)
    assert ratio[0] == pytest.approx(1, abs=0.02) and ratio[2] == pytest.approx(3, rel=0.05)
    assert ratio[1] == pytest.approx(3 * ((1 + 5) / (9 + 5)) ** 0.5, rel=0.05)  # mean eigenvalue 5


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_state_travels(name):
    """A fitted normaliser's buffers are all it needs."""
    semantic, patches = correlated(200)
    fitted = make(name, C).fit(semantic, patches)
    other = make(name, C)
    other.load_state_dict(fitted.state_dict())
    for got, wanted in zip(other(semantic, patches), fitted(semantic, patches)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_unseen_tokens_do_not_change_the_statistics(name):
    semantic, patches = correlated(200)
    normalizer = make(name, C).fit(semantic, patches)
    alone, _ = normalizer(semantic[:1], patches[:1])
    among, _ = normalizer(semantic * torch.linspace(1, 9, 200)[:, None], patches)
    assert torch.allclose(alone[0], among[0], atol=1e-5)
