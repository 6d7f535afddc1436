"""The band token, and the detector of the whole spectrum that is built on it."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.fft
import torch
from conftest import make_cache

import detector
import model
import train
from config import Config, UserError
from datasets import SPLITS, Labels, Split
from normalization import BandNormalizer, Normalizer, power_l2, spread
from token_grid import Bands, TokenGrid, ring_of

CHANNELS, BATCH = (4, 6), 3


def maps(grids=((8, 8), (6, 9)), seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, c, *grid, generator=generator) for c, grid in zip(CHANNELS, grids)]


# ---------------------------------------------------------------- the token
@pytest.mark.parametrize("rings", [1, 2, 3])
def test_rings_are_the_energy_of_scipys_dct(rings):
    bands, two = Bands(rings, 0.0), maps()
    token = bands.measure(two).numpy()
    for depth, features in enumerate(two):
        spectrum = scipy.fft.dctn(features.numpy(), axes=(2, 3), norm="ortho")
        rows, columns = spectrum.shape[2:]
        radius = np.hypot(np.arange(rows)[:, None] / rows, np.arange(columns)[None] / columns)
        for ring in range(rings):
            lowest, highest = (0 if ring == 0 else 2.0 ** (ring - rings)), 2.0 ** (ring + 1 - rings)
            inside = (radius > lowest) & ((radius <= highest) | (ring == rings - 1))
            wanted = np.sqrt((spectrum**2 * inside).sum((2, 3)) / (rows * columns))
            (place,) = bands.columns(CHANNELS, (f"ring{ring + 1}",), range(depth, depth + 1))
            assert np.allclose(token[:, place], wanted, rtol=1e-4), (depth, ring)


def test_no_energy_is_lost():
    """Mean and rings together hold the mean square of a map (Parseval)."""
    bands, two = Bands(3, 0.0), maps()
    token = bands.measure(two)
    for depth, features in enumerate(two):
        places = bands.columns(CHANNELS, bands.statistics[:-1], range(depth, depth + 1))
        energy = sum(token[:, place].square() for place in places)
        assert torch.allclose(energy, features.square().mean((2, 3)), rtol=1e-4)


def test_rings_share_all_coefficients_but_the_constant():
    member = ring_of((6, 9), 3).sum(0)
    assert member[0, 0] == 0 and member.sum() == 6 * 9 - 1 and member.max() == 1


def test_low_band_is_the_mean_under_the_window():
    two = maps()
    plain, windowed = Bands(1, 0.0).measure(two), Bands(1, 0.2).measure(two)
    assert torch.allclose(plain[:, :4], two[0].mean((2, 3)), atol=1e-6)
    rows = torch.softmax(-0.5 * ((torch.arange(8) - 3.5) / (0.2 * 8)).square(), 0)
    assert torch.allclose(windowed[:, :4], torch.einsum("bcij,i,j->bc", two[0], rows, rows), atol=1e-5)


def test_peak_is_the_largest_local_energy():
    flat = torch.zeros(1, 1, 9, 9)
    flat[0, 0, 4, 4] = 9.0
    token = Bands(1, 0.0).measure([flat])
    mean = 9 / 81
    wanted = math.sqrt(((9 - mean) ** 2 + 8 * mean**2) / 9)
    assert token[0, -1].item() == pytest.approx(wanted, rel=1e-5)


def test_peak_in_a_corner_counts_the_cells_there():
    """A border cell's mean is of the four or six cells around it that are in the map."""
    corner = torch.zeros(1, 1, 9, 9)
    corner[0, 0, 0, 0] = 9.0
    mean = 9 / 81
    wanted = math.sqrt(((9 - mean) ** 2 + 3 * mean**2) / 4)
    assert Bands(1, 0.0).measure([corner])[0, -1].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16, torch.float16])
def test_weak_rings_beside_strong_ones_are_no_rounding(half):
    """Flat maps have no energy; a map of one low frequency and a ten-thousandth of it in the highest has just
    that, as a map in half precision has what its own numbers have."""
    x = torch.arange(16) + 0.5
    low, high = (torch.cos(math.pi * k * x / 16) for k in (1, 15))
    two = (300 + 50 * (low[:, None] + 1e-4 * high[:, None])).expand(1, 1, 16, 16).to(half).float()
    flat = torch.full((1, 1, 16, 16), 1234.567).to(half).float()
    rings = Bands(2, 0.0).measure([flat, two])[0].reshape(2, 4)[:, 1:3]
    assert rings[0].max() < 1e-3
    spectrum = scipy.fft.dctn(two[0, 0].double().numpy() - two.double().mean().item(), norm="ortho") ** 2
    member = ring_of((16, 16), 2).numpy()
    wanted = np.sqrt((spectrum * member).sum((1, 2)) / 256)
    np.testing.assert_allclose(rings[1], wanted, rtol=1e-2)


def test_columns_cover_the_token_once():
    bands = Bands(2, 0.1)
    places = bands.columns(CHANNELS, bands.statistics, range(2))
    flat = [column for place in places for column in place]
    assert sorted(flat) == list(range(bands.shape(CHANNELS)[0])) == list(range(4 * sum(CHANNELS)))
    (low,) = bands.columns(CHANNELS, ("low",), range(1, 2))
    assert torch.equal(bands.measure(maps())[:, low], Bands(2, 0.1).measure(maps()[1:])[:, :6])


def test_centre_grid_is_the_normalisers_own_pooling():
    """A cache of one centred token serves like the full grid that it was pooled from."""
    tokens = torch.randn(5, 1 + 12, 7).abs()
    full = Normalizer("power_l2", 7, ridge=0.0, centre_pool=0.2, grid=(3, 4), patches_used=False)
    one = Normalizer("power_l2", 7, ridge=0.0, centre_pool=0.2, grid=(1, 1), patches_used=False)
    kept = TokenGrid("centre", "correct", 3, 0.2).pool(tokens, (3, 4))
    assert kept.shape == (5, 2, 7) and torch.equal(kept[:, 0], tokens[:, 0])
    pooled = full.pool(tokens[:, 0], tokens[:, 1:])
    assert torch.allclose(pooled, one.pool(kept[:, 0], kept[:, 1:]), atol=1e-6)
    rows, columns = (
        torch.softmax(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (0.2 * n)).square(), 0) for n in (3, 4)
    )
    wanted = torch.einsum("bijc,i,j->bc", tokens[:, 1:].unflatten(1, (3, 4)), rows, columns)
    assert torch.allclose(pooled, wanted, atol=1e-6)


def test_band_normalizer_whitens_groups_of_unit_length():
    bands = torch.rand(400, 12) + 0.1
    normalizer = BandNormalizer([range(0, 4), range(8, 12)], ridge=0.0).fit(bands)
    assert torch.allclose(normalizer(bands * 7), normalizer(bands), atol=1e-3), (
        "a group's scale does not matter"
    )
    other = bands.clone()
    other[:, 4:8] += 5
    assert torch.equal(normalizer(other), normalizer(bands)), "columns that were not chosen do not matter"
    covariance = torch.cov(normalizer(bands).T)
    assert normalizer(bands).square().mean() == pytest.approx(1, rel=1e-4)
    assert covariance.diagonal()[1:4].std() < 0.1


def test_spread():
    assert spread(torch.ones(5, 8)) == pytest.approx(0, abs=1e-6)
    assert spread(torch.eye(8).repeat(3, 1)) == pytest.approx(1 - 1 / 8, rel=1e-5)


# ---------------------------------------------------------------- the detector
N, C, N_TRAIN, N_TEST = 36, 32, 60, 30


def fabricate(folder, meaning: float, texture: float, alike: bool):
    """One class and its anomalies; they differ in the semantic token by ``meaning``, in rings by ``texture``.
    alike: whether the normal images' semantic tokens point the same way."""
    generator = np.random.RandomState(0)
    category = {"train": np.zeros(N_TRAIN, int), "test": np.arange(N_TEST) % 2}
    splits = {
        s: Split.of([f"{s}{i}" for i in range(len(c))], np.where(c == 0, 0, -1)) for s, c in category.items()
    }
    bands_of = Bands(2, 0.15)
    size = bands_of.shape(CHANNELS)[0]
    rings = np.zeros(size)
    for place in bands_of.columns(CHANNELS, bands_of.statistics[1:], range(2)):
        rings[place.start : place.stop] = generator.randn(len(place))
    way = np.arange(C) >= C // 2  # where normal images hardly vary
    tokens, bands = {}, {}
    for split in SPLITS:
        odd = (category[split] != 0)[:, None]
        noise = generator.randn(len(odd), 1 + N, C) * (
            0.2 if alike else np.where(np.arange(C) < C // 2, 3.0, 0.1)
        )
        tokens[split] = 4 * alike + noise
        tokens[split][:, 0] += meaning * odd * way
        bands[split] = 5 + 0.2 * generator.randn(len(odd), size) + texture * odd * rings
    labels = Labels(("a",), **splits)
    return make_cache(folder, labels, tokens, bands, grid=(6, 6), band_channels=CHANNELS)


def settings(**more) -> Config:
    options = {
        "bands": True,
        "score": "spectrum",
        "holdout": 0.25,
        "select_epoch": "likelihood",
        "normalize": "power_l2+whiten",
        "fusion": "spectral",
        "n_coupling_blocks": 2,
        "fc_internal": 16,
        "batch_size": 16,
        "lr_init": 1e-3,
        "identity_start": True,
        "hide_tqdm_bar": True,
        "verbose": False,
    }
    return Config(**(options | more))


def fit(cache, **more):
    sources = [detector.TokenSource(cache.arrays(split), torch.device("cpu")) for split in SPLITS]
    trainer = train.make_trainer(settings(**more), cache, "a", 0, *sources)
    return trainer, trainer.run()


@pytest.mark.parametrize("alike", [False, True], ids=["varied", "alike"])
def test_the_class_decides_which_evidence_counts(tmp_path, alike):
    """Alike in meaning: texture counts, and the texture flow is trained. Varied: the other way round."""
    trainer, fitted = fit(fabricate(tmp_path / "c", meaning=0.0, texture=1.0, alike=alike))
    weight = fitted.result["texture_weight"]
    own = trainer.data.train.on_cpu(trainer.data.fit_rows).semantic
    assert weight == pytest.approx(1 / (1 + (spread(own) / 0.2) ** 4), rel=1e-5)
    assert (weight > 0.9) == alike and (weight < 0.1) == (not alike)
    assert [head.optimizer is not None for head in trainer.heads] == [not alike, alike]
    assert (fitted.result["auroc"] > 0.95) == alike


def test_meaning_is_found_where_it_varies(tmp_path):
    _, fitted = fit(fabricate(tmp_path / "c", meaning=3.0, texture=0.0, alike=False))
    assert fitted.result["auroc"] > 0.95


def test_the_start_is_an_epoch_and_stays_when_training_does_not_help(tmp_path):
    cache = fabricate(tmp_path / "c", meaning=1.0, texture=1.0, alike=True)
    trainer, fitted = fit(cache, lr_init=0.5, feature_noise=5.0)
    assert [entry["epoch"] for entry in fitted.history] == [0, 1] and fitted.history[0]["loss"] is None
    assert fitted.result["texture_epoch"] == 0, "so large a step ruins the flow"
    log_det = trainer.heads[1].measure(trainer.data.test, trainer.data.test_rows).log_det
    assert log_det.abs().max() == 0, "the flow is the identity it started from"


def test_the_semantic_flow_takes_the_low_bands_too(tmp_path):
    """Joined behind the semantic token, normalised by themselves; their patch tokens are zero."""
    trainer, fitted = fit(fabricate(tmp_path / "c", meaning=1.0, texture=0.5, alike=False), low_depths=1)
    features = trainer.data.train[trainer.data.fit_rows]
    tokens, patches = fitted.detector.inputs(*features)
    n_low = CHANNELS[-1]
    assert tokens.shape[1] == C + n_low and patches.shape == (len(tokens), N, C + n_low)
    assert torch.equal(tokens[:, C:], fitted.detector.low(features.bands)) and tokens[:, C:].std() > 0.5
    assert patches[..., C:].abs().max() == 0 and patches[..., :C].std() > 0.1


def test_an_image_scores_alone_as_in_any_batch(tmp_path):
    trainer, fitted = fit(fabricate(tmp_path / "c", meaning=1.0, texture=0.5, alike=True))
    together = fitted.detector.score_features(trainer.data.test[fitted.test_rows])
    alone = [
        fitted.detector.score_features(trainer.data.test[fitted.test_rows[i : i + 1]])[0] for i in range(6)
    ]
    assert np.allclose(together, fitted.scores, rtol=1e-4, atol=1e-4)
    assert np.allclose(together[:6], alone, rtol=1e-3, atol=1e-3)


def test_evidence_is_standardised_by_held_out_normals(tmp_path):
    trainer, fitted = fit(
        fabricate(tmp_path / "c", meaning=1.0, texture=0.5, alike=True), neighbours_weight=3.0
    )
    held = trainer.data.train[trainer.data.held_rows]
    tokens, none = fitted.detector.texture_inputs(held.bands)
    with torch.no_grad():
        likelihood = model.likelihood_score(*fitted.detector.texture(tokens, [none]))
    reference = fitted.detector.texture_inputs(trainer.data.train[trainer.data.fit_rows].bands).tokens
    near = torch.cdist(tokens, reference).topk(2, largest=False).values.mean(1)
    evidence = fitted.detector.evidence["texture"]
    wanted = (likelihood - likelihood.mean()) / likelihood.std() + 3 * (near - near.mean()) / near.std()
    with torch.no_grad():
        got = evidence(likelihood, evidence.distances([tokens]))
    assert torch.allclose(got, wanted / 4, atol=2e-2)
    assert fitted.held_scores.mean() == pytest.approx(0, abs=1e-3)


def test_neighbours_of_the_backbones_own_token_count_half(tmp_path):
    """Beside re-pooled semantic tokens, in evidence and in the simple detectors' input; else there are
    none."""
    cache = fabricate(tmp_path / "c", meaning=1.0, texture=0.5, alike=False)
    trainer, fitted = fit(cache, centre_pool=0.2, neighbours_weight=3.0)
    fit_rows, held = (trainer.data.train[rows] for rows in (trainer.data.fit_rows, trainer.data.held_rows))
    parts, kinds = fitted.detector, [[], []]
    for features in (fit_rows, held):
        pooled = parts.normalizer.semantic(features.semantic, features.patches)
        kinds[0].append(torch.cat([pooled, parts.low(features.bands)], 1))
        kinds[1].append((power_l2(features.semantic) - parts.own.semantic_mean) @ parts.own.whitening)
    assert not torch.allclose(kinds[1][1], kinds[0][1][:, :C], atol=0.1)
    assert kinds[1][0].mean(0).abs().max() < 1e-4 and kinds[1][0].square().mean().item() == pytest.approx(1)
    near = [torch.cdist(b, a).topk(2, largest=False).values.mean(1) for a, b in kinds]
    with torch.no_grad():
        likelihood = model.likelihood_score(*parts(*held))
    standard = [(values - values.mean()) / values.std() for values in (likelihood, *near)]
    wanted = (standard[0] + 3 * standard[1] + 1.5 * standard[2]) / 5.5
    evidence = parts.evidence["semantic"]
    with torch.no_grad():
        got = evidence(likelihood, evidence.distances([kinds[0][1], kinds[1][1]]))
    assert torch.allclose(got, wanted, atol=2e-2)
    taken = parts.own_input(held)
    own = taken[:, kinds[0][1].shape[1] :][:, :C]
    assert torch.allclose(own, (parts.weights[0] / 2).sqrt() * kinds[1][1], atol=1e-5)
    _, plain = fit(cache)
    assert plain.detector.own is None and plain.detector.evidence["semantic"].kinds == ["reference"]


def test_spectrum_needs_bands_and_held_out_images():
    for change in ({"bands": False}, {"holdout": 0.0, "select_epoch": "last"}):
        with pytest.raises(UserError, match="score spectrum needs"):
            dataclasses.replace(settings(), **change)
