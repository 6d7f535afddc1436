"""What a fit leaves on disk, and what reads it."""

import numpy as np
import pytest
import torch
from fabricated import CHOOSING, SPECTRUM, fit, make, settings

import detector
from config import Config, UserError


# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "latent_knn", "normalize": "power_l2+whiten"},
        {"fusion": "hilo", "score": "likelihood", "use_gamma": False},
        {**CHOOSING, "meta_epochs": 3},
        SPECTRUM,
    ],
    ids=str,
)
def test_checkpoint_gives_the_same_scores(cache, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    trainer = make(cache, **options)
    fitted = trainer.run()
    path = detector.save_fitted(settings(**options), cache, fitted)
    for suffix in (".json", ".safetensors"):
        loaded, content = detector.load_detector(path.with_name(path.name + suffix))
        with torch.no_grad():
            again = loaded.score_features(trainer.data.test[fitted.test_rows])
        assert np.allclose(again, fitted.scores, rtol=1e-4, atol=1e-4)
    assert content["result"] == fitted.result and content["history"] == fitted.history
    assert (
        content["test"]["scores"] == pytest.approx(fitted.scores.tolist())
        and content["test"]["labels"] == fitted.labels.tolist()
    )
    assert Config(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in content["config"].items()}
    ) == settings(**options)


def test_checkpoint_that_is_not_there(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing"):
        detector.load_detector(tmp_path / "nothing.json")
    path = detector.save_fitted(settings(save_model=False), cache, fit(cache))
    assert path.with_suffix(".json").exists() and not path.with_suffix(".safetensors").exists()
    with pytest.raises(UserError):
        detector.load_detector(path)
    path.with_suffix(".safetensors").write_bytes(b"no weights")
    try:
        detector.load_detector(path)
    except Exception as error:
        assert isinstance(error, UserError), f"{type(error).__name__} instead of a UserError"
    else:
        pytest.fail("a broken checkpoint was loaded")


def test_no_weights_of_an_older_fit_stay(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, weights = detector.checkpoint_files(detector.save_fitted(settings(), cache, fit(cache)))
    assert weights.exists()
    detector.save_fitted(settings(save_model=False), cache, fit(cache))
    assert not weights.exists()
