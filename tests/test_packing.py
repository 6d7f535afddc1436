"""Weights in half their size: what is kept exactly, what is rounded and by how much."""

import numpy as np
import pytest
import torch
from fabricated import SPECTRUM, fit, make, settings

import detector
import packing
from packing import ROWS, SMALL, TRIANGLE


def matrix(rows: int = 90, columns: int = 70, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_rounding_is_half_a_step_of_the_row():
    """However different the rows are in size; zeros and the largest entry stay."""
    weights = matrix() * torch.logspace(-20, 8, 90)[:, None]
    weights[3], weights[:, 5] = 0, 0
    packed = packing.pack({"w": weights})
    assert packed["w"].dtype == torch.int16 and packed["w" + ROWS].shape == (90, 1)
    back, largest = packing.unpack(packed)["w"], weights.abs().amax(1, keepdim=True)
    assert back.dtype == torch.float32
    assert ((back - weights).abs() <= 0.501 * largest / 32767).all()
    assert (back[3] == 0).all() and (back[:, 5] == 0).all()
    assert torch.allclose(back.abs().amax(1, keepdim=True), largest, rtol=1e-6)


def test_rounding_is_finer_than_float16():
    weights = matrix(200, 300)
    error = packing.unpack(packing.pack({"w": weights}))["w"] - weights
    assert error.std() < 0.25 * (weights.half().float() - weights).std()


def test_symmetric_matrices_keep_every_bit():
    square = matrix(80, 80)
    square = square + square.T
    packed = packing.pack({"a": square})
    assert packed["a" + TRIANGLE].numel() == 80 * 81 // 2
    assert torch.equal(packing.unpack(packed)["a"], square)
    square[3, 4] += 1e-3
    assert set(packing.pack({"a": square})) == {"a", "a" + ROWS}, "not symmetric any more"


def test_what_is_small_or_no_float32_matrix_stays():
    state = {
        "small": matrix(4, SMALL // 4 - 1),
        "vector": torch.randn(2 * SMALL),
        "half": matrix().half(),
        "whole": torch.arange(2 * SMALL).reshape(2, SMALL),
        "scalar": torch.tensor(3.0),
    }
    packed = packing.pack(state)
    assert set(packed) == set(state) and all(packed[name] is state[name] for name in state)
    assert packing.pack({"just": matrix(4, SMALL // 4)})["just"].dtype == torch.int16


WIDE = {"fc_internal": 96, "sub_epochs": 3}


@pytest.mark.parametrize("options", [WIDE, WIDE | SPECTRUM, WIDE | {"score": "latent_knn"}], ids=str)
def test_checkpoint_is_half_as_large_and_scores_alike(cache, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    trainer = make(cache, **options)
    fitted = trainer.run()
    path = detector.save_fitted(settings(**options), cache, fitted)
    full = sum(t.numel() * t.element_size() for t in fitted.detector.state_dict().values())
    assert path.with_suffix(".safetensors").stat().st_size < 0.7 * full
    loaded, _ = detector.load_detector(path)
    scores = loaded.score_features(trainer.data.test[fitted.test_rows])
    moved = np.abs(scores - fitted.scores)
    assert moved.max() > 0, "nothing was packed"
    assert (moved <= 1e-4 * np.maximum(np.abs(fitted.scores), fitted.scores.std())).all()


def test_weights_that_would_move_a_score_are_kept_whole(cache, monkeypatch):
    fitted = fit(cache, **WIDE)
    assert any(name.endswith(ROWS) for name in detector.kept_weights(fitted, cache))
    monkeypatch.setattr(packing, "STEPS", 100)
    kept = detector.kept_weights(fitted, cache)
    assert set(kept) == set(fitted.detector.state_dict())


def test_weights_are_compared_without_test_images(cache):
    fitted = fit(cache, **WIDE)
    fitted.test_rows = fitted.test_rows[:0]
    assert any(name.endswith(ROWS) for name in detector.kept_weights(fitted, cache))


def test_packing_changes_nothing_in_memory(cache):
    fitted = fit(cache, **WIDE)
    before = {name: value.clone() for name, value in fitted.detector.state_dict().items()}
    detector.kept_weights(fitted, cache)
    assert all(torch.equal(value, before[name]) for name, value in fitted.detector.state_dict().items())


@pytest.mark.parametrize("name", ["w", "a"])
def test_damage_shows_after_unpacking(name):
    """A scale or a triangle that is not finite makes its matrix so."""
    square = matrix(80, 80)
    packed = packing.pack({"w": matrix(), "a": square + square.T})
    packed[name + (ROWS if name == "w" else TRIANGLE)].view(-1)[0] = float("nan")
    assert not packing.unpack(packed)[name].isfinite().all()
