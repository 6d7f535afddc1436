"""A fabricated cache of three classes, a small flow that learns in a moment, and what makes a trainer of
them."""

import math

import numpy as np
import pytest
import torch
from conftest import make_cache

import config as knobs
import train
from backbone.token_grid import Bands
from cache.feature_cache import FeatureCache
from config import Config
from datasets import SPLITS, Labels, Split
from detector import checkpoints, class_data
from detector.preparation import PreparedClass

BAND_CHANNELS = (4, 6)  # of the two depths of the fabricated band tokens
PLACES = (9, 5)  # places and channels of the fabricated place tokens
CLASSES, N_TRAIN, N_TEST, C, GRID = ("a", "b", "c"), 40, 20, 32, (3, 3)


def fabricate(folder, signal: float = 2.0) -> FeatureCache:
    """A cache of Gaussian tokens: semantic tokens lie ``signal`` apart per channel and class; patch tokens
    follow them, and so do bands and places."""
    generator = np.random.RandomState(0)
    n, centres = math.prod(GRID), generator.randn(len(CLASSES), C)
    counts = dict(zip(SPLITS, (N_TRAIN, N_TEST)))
    category = {s: np.repeat(np.arange(len(CLASSES)), counts[s]) for s in SPLITS}
    splits = {
        s: Split.of([f"{s}/{name}/{i}.png" for name in CLASSES for i in range(counts[s])], category[s])
        for s in SPLITS
    }
    tokens = {
        s: generator.randn(len(category[s]), 1 + n, C) + signal * centres[category[s]][:, None]
        for s in SPLITS
    }
    size = len(Bands().statistics) * sum(BAND_CHANNELS)
    textures = generator.randn(len(CLASSES), size)
    bands = {
        s: 3 + 0.3 * (generator.randn(len(category[s]), size) + signal * textures[category[s]])
        for s in SPLITS
    }
    scenes = generator.randn(len(CLASSES), *PLACES)
    places = {s: generator.randn(len(category[s]), *PLACES) + signal * scenes[category[s]] for s in SPLITS}
    fields = {"grid": GRID, "band_channels": BAND_CHANNELS, "place_shape": PLACES}
    return make_cache(folder, Labels(CLASSES, **splits), tokens, bands, places, **fields)


def settings(**more) -> Config:
    """A small flow that learns in a moment."""
    small = {
        "fusion": "class_attention", "n_coupling_blocks": 2, "fc_internal": 24, "lr_init": 1e-3,
        "batch_size": 8, "threads": 1, "extractor": "resnet18", "weights_path": "random",
    }  # fmt: skip
    return Config(**(small | more))


def small_run(**more) -> Config:
    """From image files to a fit in a moment: an untrained backbone at 64 pixels, a narrow flow."""
    small = {
        "dataset": "folder", "extractor": "resnet10t", "weights_path": "random", "img_size": (64, 64),
        "precision": "float32", "workers": 0, "threads": 1, "device": "cpu",
        "fc_internal": 16, "n_coupling_blocks": 1,
    }  # fmt: skip
    return Config(**(small | more))


JOINED = {  # as the preset accurate puts the method together
    "score": "joined", "fusion": "bands", "bands": True, "places": 3, "identity_start": True,
    "least_steps": 20, "holdout": 0.2,
}  # fmt: skip
EVERY_SCORE = [*({"score": name} for name in knobs.SCORES[:2]), JOINED]
by_score = pytest.mark.parametrize("options", EVERY_SCORE, ids=lambda options: options["score"])


def make(cache, class_name: str = "a", seed: int = 0, **more) -> PreparedClass:
    """A class ready for training."""
    sources = class_data.token_sources(cache, torch.device("cpu"))
    return train.prepare(settings(**more), cache, sources, class_name, seed)


def fit(cache, class_name: str = "a", seed: int = 0, **more) -> checkpoints.Record:
    return train.train(make(cache, class_name, seed, **more))


def all_of(source: class_data.TokenSource, rows: np.ndarray) -> class_data.Features:
    """All features of the images ``rows``, with their places where the cache has them."""
    places = source.one("places", rows) if "places" in source.arrays else None
    return source[rows]._replace(places=places)


def latents_of(detector, source: class_data.TokenSource, rows: np.ndarray):
    """z (n, k) and log-determinant (n) of the images ``rows``."""
    (tokens, seen), _ = detector.inputs(all_of(source, rows))
    return detector.flow(tokens, [seen])
