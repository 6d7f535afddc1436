"""The band token, and the joint token that is built on it."""

import math

import numpy as np
import pytest
import scipy.fft
import torch
from conftest import make_cache
from fabricated import make

import train
from backbone.token_grid import Bands, ring_of
from config import Config
from datasets import SPLITS, Labels, Split
from detector import class_data, detector
from detector.normalization import power_l2

CHANNELS, BATCH = (4, 6), 3


def maps(grids=((8, 8), (6, 9)), seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, c, *grid, generator=generator) for c, grid in zip(CHANNELS, grids)]


# ---------------------------------------------------------------- the token
@pytest.mark.parametrize("rings", [1, 2, 3])
def test_rings_are_the_energy_of_scipys_dct(rings):
    bands, two = Bands(rings), maps()
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


def test_peak_is_the_largest_local_energy():
    flat = torch.zeros(1, 1, 9, 9)
    flat[0, 0, 4, 4] = 9.0
    token = Bands(1).measure([flat])
    mean = 9 / 81
    wanted = math.sqrt(((9 - mean) ** 2 + 8 * mean**2) / 9)
    assert token[0, -1].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16, torch.float16])
def test_weak_rings_beside_strong_ones_are_no_rounding(half):
    """Flat maps have no energy; a map of one low frequency and a ten-thousandth of it in the highest has just
    that, as a map in half precision has what its own numbers have."""
    x = torch.arange(16) + 0.5
    low, high = (torch.cos(math.pi * k * x / 16) for k in (1, 15))
    two = (300 + 50 * (low[:, None] + 1e-4 * high[:, None])).expand(1, 1, 16, 16).to(half).float()
    flat = torch.full((1, 1, 16, 16), 1234.567).to(half).float()
    rings = Bands().measure([flat, two])[0].reshape(2, 4)[:, 1:3]
    assert rings[0].max() < 1e-3
    spectrum = scipy.fft.dctn(two[0, 0].double().numpy() - two.double().mean().item(), norm="ortho") ** 2
    member = ring_of((16, 16), 2).numpy()
    wanted = np.sqrt((spectrum * member).sum((1, 2)) / 256)
    np.testing.assert_allclose(rings[1], wanted, rtol=1e-2)


def test_centred_pooling_is_a_gaussian():
    tokens = torch.randn(5, 1 + 12, 7).abs()
    config = Config(fusion="none", centre_pool=0.2, n_coupling_blocks=1)
    fields = {"n_feat": 7, "grid": (3, 4), "tokens": 13, "kind": "map"}
    features = class_data.Features(tokens[:, 0], tokens[:, 1:])
    rows, columns = (
        torch.softmax(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (0.2 * n)).square(), 0) for n in (3, 4)
    )
    wanted = torch.einsum("bijc,i,j->bc", tokens[:, 1:].unflatten(1, (3, 4)), rows, columns)
    assert torch.allclose(detector.Detector(config, fields).joint(features), power_l2(wanted), atol=1e-6)


# ---------------------------------------------------------------- the detector
N, C, N_TRAIN, N_TEST = 36, 32, 60, 30


def fabricate(folder, meaning: float, texture: float, channels=CHANNELS):
    """One class and its anomalies; they differ in the semantic token by ``meaning``, in rings by
    ``texture``."""
    generator = np.random.RandomState(0)
    category = {"train": np.zeros(N_TRAIN, int), "test": np.arange(N_TEST) % 2}
    splits = {
        s: Split.of([f"{s}{i}" for i in range(len(c))], np.where(c == 0, 0, -1)) for s, c in category.items()
    }
    bands_of = Bands()
    size = len(bands_of.statistics) * sum(channels)
    rings = np.zeros(size)
    for place in bands_of.columns(channels, bands_of.statistics[1:], range(len(channels))):
        rings[place.start : place.stop] = generator.randn(len(place))
    way = np.arange(C) >= C // 2  # where normal images hardly vary
    tokens, bands = {}, {}
    for split in SPLITS:
        odd = (category[split] != 0)[:, None]
        noise = generator.randn(len(odd), 1 + N, C) * np.where(np.arange(C) < C // 2, 3.0, 0.1)
        tokens[split] = noise
        tokens[split][:, 0] += meaning * odd * way
        bands[split] = 5 + 0.2 * generator.randn(len(odd), size) + texture * odd * rings
    labels = Labels(("a",), **splits)
    return make_cache(folder, labels, tokens, bands, grid=(6, 6), band_channels=channels)


OPTIONS = {
    "bands": True, "score": "likelihood", "holdout": 0.25, "normalize": "power_l2+whiten",
    "fusion": "spectral", "fc_internal": 16, "batch_size": 16, "identity_start": True,
}  # fmt: skip


def fit(cache, **more):
    prepared = make(cache, **OPTIONS | more)
    return prepared, train.train(prepared)


@pytest.mark.parametrize("meaning, texture", [(3.0, 0.0), (0.0, 5.0)], ids=["meaning", "texture"])
def test_meaning_and_texture_are_found_by_one_token(tmp_path, meaning, texture):
    cache = fabricate(tmp_path / "c", meaning, texture)
    assert fit(cache)[1].result["auroc"] > 0.95
    if texture:
        assert fit(cache, bands=False)[1].result["auroc"] < 0.7, "without bands it is not seen"


def test_the_joint_token_is_the_semantic_one_and_its_sub_bands(tmp_path):
    """Low bands of the two deepest depths, rings and peaks of all three; a root of each group by itself."""
    channels = (3, 4, 6)
    cache = fabricate(tmp_path / "c", meaning=1.0, texture=0.5, channels=channels)
    prepared, _ = fit(cache, fusion="none")
    features = prepared.data.train[prepared.data.fit_rows]
    # of each depth: low, two rings, peak
    depths = features.bands.split([4 * width for width in channels], 1)
    low = [depth[:, :width] for depth, width in zip(depths[1:], channels[1:])]
    others = [part for depth, width in zip(depths, channels) for part in depth[:, width:].split(width, 1)]
    wanted = torch.cat([power_l2(part) for part in (features.semantic, *low, *others)], 1)
    joint = prepared.detector.joint(features)
    assert torch.allclose(joint, wanted, atol=1e-6) and prepared.detector.channels == joint.shape[1]
