"""Every fusion module against its plain transcription, and the windows, bands and frequencies they are made
of."""

import math

import numpy as np
import pytest
import reference
import scipy.fft
import torch
from conftest import make_fusion

import freq_fusion
from backbone.token_grid import split_bands, window_of
from freq_fusion import HiLo, dct_filter, window_members


def random_tokens(d: int, channels: int, n: int, batch: int = 3):
    """x (B, d), whole tokens (B, N, C) and the channels of them that a subnet sees, all drawn at random,
    float64."""
    generator = torch.Generator().manual_seed(d + n)
    x = torch.randn(batch, d, generator=generator).double()
    tokens = torch.randn(batch, n, channels, generator=generator).double()
    return x, tokens, torch.randperm(channels, generator=generator)[:d]


CASES = [
    ("class_attention", 8, 24, (3, 4), {}),
    ("class_attention", 13, 13, (2, 2), {}),
    ("hilo", 16, 20, (6, 6), {"alpha": 0.0}),
    ("hilo", 16, 20, (6, 6), {"alpha": 0.5}),
    ("hilo", 16, 20, (6, 6), {"alpha": 1.0}),
    ("hilo", 17, 33, (7, 5), {"alpha": 0.5}),
    ("hilo", 12, 12, (4, 7), {"alpha": 0.4, "window": 2}),
    ("hilo", 16, 16, (2, 2), {"window": 5}),
    ("hilo", 16, 16, (5, 4), {"window": 1, "alpha": 0.25}),
    ("bands", 5, 9, (1, 3), {}),
    ("spectral", 32, 40, (6, 8), {}),
    ("spectral", 21, 43, (13, 7), {}),
]


@pytest.mark.parametrize("name, d, channels, grid, options", CASES)
def test_equals_plain_transcription(name, d, channels, grid, options):
    torch.manual_seed(0)
    module = make_fusion(name, d, 11, grid, channels=channels, **options).double()
    x, tokens, index = random_tokens(d, channels, math.prod(grid))
    got = module(x, tokens, index)
    wanted = reference.fuse(module, x, tokens[..., index], grid, options.get("window", 3), tokens)
    assert got.shape == (len(x), 11)
    assert (got - wanted).abs().max() < 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_compact_equals_plain_transcription(alpha):
    """Lo-Fi heads see the low band, Hi-Fi heads the high band; the grid is that of the windows."""
    torch.manual_seed(0)
    module = make_fusion("hilo", 16, 10, (2, 4), alpha=alpha, bands=True).double()
    x, tokens, index = random_tokens(16, 33, 2 * 8)
    wanted = reference.fuse(module, x, tokens[..., index], (2, 4), 3)
    assert (module(x, tokens, index) - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("alpha, low, high", [(0.0, 0, 8), (0.3, 2, 6), (0.5, 4, 4), (1.0, 8, 0)])
def test_heads_follow_alpha(alpha, low, high):
    """int(heads * alpha) heads are Lo-Fi; a kind without heads has no parameters."""
    module = HiLo(16, 16, (3, 3), alpha=alpha, window=3, bands=False)
    assert (module.low, module.high) == (low, high)
    assert hasattr(module, "l_q") == (low > 0) and hasattr(module, "h_q") == (high > 0)


def test_hilo_band_sensitivity():
    """Lo-Fi heads alone cannot tell how patches lie inside their window; Hi-Fi heads can tell which window
    they are in."""
    torch.manual_seed(0)
    x, tokens, index = random_tokens(16, 16, 36)
    swapped = tokens.clone()
    swapped[:, [0, 1]] = tokens[:, [1, 0]]  # two patches of one window
    moved = tokens.clone()
    moved[:, [0, 35]] = tokens[:, [35, 0]]  # two patches of opposite windows
    for alpha in (0.0, 1.0):
        module = make_fusion("hilo", 16, 16, (6, 6), alpha=alpha).double()
        out = module(x, tokens, index)
        assert torch.allclose(out, module(x, swapped, index), atol=1e-12)
        assert (out - module(x, moved, index)).abs().max() > 1e-5


def test_none_is_no_module():
    assert make_fusion("none", 8, 8, (3, 3)) is None


@pytest.mark.parametrize(
    "name, d, grid, options, told",
    [
        ("fourier", 16, (6, 6), {}, "fourier"),
        ("spectral", 16, (5, 9), {}, "5x9"),
        ("spectral", 16, (6, 6), {"bands": True}, "two bands"),
    ],
)
def test_sizes_that_do_not_fit(name, d, grid, options, told):
    with pytest.raises(ValueError, match=told):
        make_fusion(name, d, 16, grid, **options)


def test_a_subnet_too_narrow_for_its_heads_is_refused():
    with pytest.raises(ValueError, match="hilo with 8 heads and alpha 0.5 needs a wider subnet.* 1$"):
        make_fusion("hilo", 16, 1, (6, 6))


@pytest.mark.parametrize("name", ["class_attention", "hilo", "spectral", "bands"])
def test_only_what_is_learnt_is_saved(name):
    """And the released gate's weights, which are in its checkpoints."""
    module = make_fusion(name, 16, 16, (6, 6))
    kept = set(module.state_dict()) - set(dict(module.named_parameters()))
    assert {key.rpartition(".")[2] for key in kept} == ({"weight"} if name == "spectral" else set())


def test_a_gate_of_sixteen_channels_is_squeezed_to_one():
    assert sum(parameter.numel() for parameter in freq_fusion.SpectralGate(16, (6, 6)).parameters()) == 2 * 16


# ---------------------------------------------------------------- windows and bands
GRIDS = [((6, 6), 3), ((7, 5), 3), ((1, 4), 3), ((4, 7), 2), ((2, 2), 5), ((3, 2), 1)]


@pytest.mark.parametrize("grid, window", GRIDS)
def test_windows(grid, window):
    wanted = reference.windows(grid, window)
    owner = window_of(grid, window)
    assert owner.tolist() == [
        next(w for w, patches in enumerate(wanted) if n in patches) for n in range(math.prod(grid))
    ]
    members = window_members(grid, window)
    assert members.shape == (len(wanted), window * window)
    assert [[patch for patch in row if patch >= 0] for row in members.tolist()] == wanted


@pytest.mark.parametrize("grid, window", GRIDS)
def test_split_bands(grid, window):
    """Low is the window's mean, and low^2 + high^2 its mean square: no energy is lost."""
    patches = torch.randn(2, math.prod(grid), 5, generator=torch.Generator().manual_seed(1)).double()
    groups = reference.windows(grid, window)
    low, high = split_bands(patches, grid, window).split(len(groups), 1)
    for w, members in enumerate(groups):
        assert torch.allclose(low[:, w], patches[:, members].mean(1), atol=1e-12)
        assert torch.allclose(
            low[:, w] ** 2 + high[:, w] ** 2, patches[:, members].square().mean(1), atol=1e-12
        )
    assert (high >= 0).all()


# ---------------------------------------------------------------- frequencies
def test_frequencies_are_fcanets():
    assert freq_fusion.TOP16 == tuple(zip(reference.FCANET_ROWS, reference.FCANET_COLUMNS))


@pytest.mark.parametrize("grid", [(6, 6), (7, 9), (1, 4)])
def test_dct_filters_are_scipys(grid):
    """The filters of all frequencies give scipy's orthonormal DCT-II of a map."""
    image = np.random.RandomState(0).randn(*grid)
    got = [
        [(dct_filter(u, v, grid).double().numpy() * image).sum() for v in range(grid[1])]
        for u in range(grid[0])
    ]
    assert np.abs(np.array(got) - scipy.fft.dctn(image, norm="ortho")).max() < 1e-5


def test_gate_of_map_and_of_tokens_agree():
    gate = freq_fusion.SpectralGate(20, (7, 6))
    maps = torch.randn(2, 20, 7, 6)
    index = torch.randperm(20)
    tokens = maps.flatten(2).transpose(1, 2)[
        ..., index.argsort()
    ]  # channel c of the map stands at index[c] of the tokens
    assert torch.allclose(maps * gate.gate_tokens(tokens, index)[..., None, None], gate(maps), atol=1e-5)


def test_double_means_double():
    """Averages and filters are those of float64 in a module of float64, not of float32 widened."""
    hilo = make_fusion("hilo", 16, 16, (6, 6)).double()
    assert (hilo.averaging.sum(0) - 1).abs().max() < 1e-15
    gate = freq_fusion.SpectralGate(16, (12, 12)).double()
    used = gate.filters[gate.filters.abs().sum(1) > 1e-6]
    assert ((used @ used.T).diagonal() - 1).abs().max() < 1e-14


@pytest.mark.parametrize("side, zero", [(6, 3), (7, 0), (12, 3), (24, 3), (8, 0)])
def test_filters_that_vanish(side, zero):
    energy = freq_fusion.SpectralGate(16, (side, side)).filters.square().sum(1)
    assert (energy < 1e-12).sum() == zero


@pytest.mark.parametrize("fusion", ["class_attention", "hilo"])
def test_narrow_tokens_have_fewer_heads(fusion):
    """The whitened token of a few images has few channels: a default that does not fit would refuse them."""
    module = make_fusion(fusion, 3, 16, (3, 3))
    assert module(torch.randn(2, 3), torch.randn(2, 9, 7), torch.arange(3)).shape == (2, 16)
