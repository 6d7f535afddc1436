"""Classes trained at once come to what each comes to alone."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_cache

import batched
import datasets
import detector
import train
from config import Config


def random_cache(folder, sizes, channels=16, grid=(6, 6)):
    """A cache of random features whose class c has sizes[c] training images."""
    category = {
        "train": np.repeat(np.arange(len(sizes)), sizes),
        "test": np.arange(2 * len(sizes)) % len(sizes),
    }
    splits = {name: datasets.Split.of(map(str, range(len(c))), c) for name, c in category.items()}
    labels = datasets.Labels(tuple("abcdef"[: len(sizes)]), **splits)
    rng = np.random.default_rng(0)
    n = 1 + grid[0] * grid[1]
    tokens = {name: rng.standard_normal((len(c), n, channels)) for name, c in category.items()}
    return make_cache(folder, labels, tokens, grid=grid)


def make_trainers(cache, config):
    sources = [detector.TokenSource(cache.arrays(split), torch.device("cpu")) for split in datasets.SPLITS]
    return [train.make_trainer(config, cache, name, 0, *sources) for name in cache.labels.classes]


OPTIONS = {
    "plain": {},
    "everything": {
        "max_grad_norm": 0.05,
        "feature_noise": 0.3,
        "normalize": "power_l2",
        "lr_schedule": "cosine",
        "holdout": 0.2,
        "select_epoch": "likelihood",
        "patience": 1,
        "score": "likelihood",
    },
}


@pytest.mark.parametrize("fusion", ["class_attention", "hilo", "spectral", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_together_equals_alone(tmp_path, fusion, options):
    config = Config(
        fusion=fusion,
        meta_epochs=4,
        batch_size=8,
        lr_init=3e-3,
        hide_tqdm_bar=True,
        verbose=False,
        n_heads=4,
        **OPTIONS[options],
    )
    cache = random_cache(tmp_path / "cache", [20, 20, 20])
    alone = [trainer.run() for trainer in make_trainers(cache, config)]
    at_once = batched.BatchedTrainer(make_trainers(cache, config)).run()
    untrained = [trainer.detector for trainer in make_trainers(cache, config)]
    for one, other, start in zip(alone, at_once, untrained):
        assert [e["epoch"] for e in one.history] == [e["epoch"] for e in other.history]
        assert one.result["epoch"] == other.result["epoch"]
        np.testing.assert_allclose(
            [e["loss"] for e in one.history if e["epoch"]],
            [e["loss"] for e in other.history if e["epoch"]],
            rtol=1e-5,
        )
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
        moved = max(
            (a - b).abs().max().item()
            for a, b in zip(other.detector.flow.parameters(), start.flow.parameters())
        )
        assert moved > 1e-3, "nothing was trained"


def test_a_class_keeps_its_own_bytes(tmp_path):
    """What a class trained together leaves is no view into the stack of all classes."""
    cache = random_cache(tmp_path / "cache", [8, 8, 8])
    config = Config(fusion="hilo", batch_size=8, verbose=False, hide_tqdm_bar=True)
    for fitted in batched.BatchedTrainer(make_trainers(cache, config)).run():
        for name, value in fitted.detector.flow.state_dict().items():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


@pytest.mark.parametrize("together", [True, False])
def test_bfloat16_products(tmp_path, together):
    """The losses are those of float32 to bfloat16's three digits, and not to float32's seven; weights stay
    float32."""
    cache, found = random_cache(tmp_path / "cache", [16, 16]), {}
    for matmul in ("highest", "bfloat16"):
        config = Config(fusion="hilo", batch_size=8, verbose=False, hide_tqdm_bar=True, matmul=matmul, seed=1)
        trainers = make_trainers(cache, config)
        fits = batched.BatchedTrainer(trainers).run() if together else [t.run() for t in trainers]
        found[matmul] = np.array([fitted.history[-1]["loss"] for fitted in fits])
        assert {p.dtype for fitted in fits for p in fitted.detector.parameters()} == {torch.float32}
    difference = np.abs(found["bfloat16"] / found["highest"] - 1)
    assert (difference < 1e-2).all() and (difference > 1e-6).any()


def test_a_compiled_step_is_the_same_step(tmp_path, monkeypatch):
    """Alone and together, with a compiler that counts the graphs it gets and leaves them as they are."""
    graphs = []

    def keep(graph, _, **__):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    cache = random_cache(tmp_path / "cache", [16, 16])
    config = Config(n_coupling_blocks=1, batch_size=8, verbose=False, hide_tqdm_bar=True)
    plain = [trainer.run() for trainer in make_trainers(cache, config)]
    config = dataclasses.replace(config, compile_flow=True)
    alone = make_trainers(cache, config)[0].run()
    assert len(graphs) == 1
    at_once = batched.BatchedTrainer(make_trainers(cache, config)).run()
    assert len(graphs) == 2
    for one, other in zip([plain[0], *plain], [alone, *at_once]):
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)


def test_as_many_as_the_memory_holds():
    assert [batched.at_once(100, free) for free in (0, 150, 1000)] == [1, 1, 6]


def test_groups_hold_classes_of_one_size(tmp_path):
    cache = random_cache(tmp_path / "cache", [10, 12, 10])
    trainers = make_trainers(cache, Config(fusion="none", verbose=False))
    assert [[t.data.class_name for t in group] for group in batched.groups(trainers)] == [["a", "c"], ["b"]]
