"""A folder of good pictures and nothing else: a fit, a threshold, no metrics and no empty pictures."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import texture, write_image
from fabricated import JOINED, small_run

import config as knobs
import main
import train
from config import UserError
from detector import calibration
from detector.picture_detector import PictureDetector

ACCURATE = JOINED | {"baselines": True, "centre_pool": 0.1, "places": 4, "holdout": 0.1}


@pytest.fixture
def good(tmp_path, monkeypatch):
    """30 good pictures in a folder."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.RandomState(0)
    for i in range(30):
        write_image(tmp_path / "good" / f"{i:02d}.png", texture(0, generator, 48))
    return tmp_path


def record(name: str = "foad_mfff") -> dict:
    return json.loads(Path(f"runs/{name}/classes/good-seed0.json").read_text())


def test_main_on_good_pictures_alone(good, capsys):
    main.main(small_run(dataset_path="good", n_coupling_blocks=2, **ACCURATE))
    said, result, held = capsys.readouterr().out, record()["result"], record()["held_out_scores"]
    assert len(held) == 6, "as many as 5 % needs are not there: a fifth is held out"
    assert result["auroc"] is None and result["n_test"] == 0 and result["n_train"] == 24
    assert "no test images" in said and "nan" not in said
    results = json.loads(Path("runs/foad_mfff/results.json").read_text())
    assert results["classes"]["good"]["auroc"] is None and not results["found"]["good"]["margin"]
    drawn = {path.name for path in Path("runs/foad_mfff/figures").glob("*.png")}
    assert "roc.png" not in drawn and not any(name.startswith("extremes") for name in drawn)
    loaded = PictureDetector.load("runs/foad_mfff/classes/good-seed0", "cpu", 1)
    scores = loaded.score([texture(kind, np.random.RandomState(1), 48) for kind in (0, 2)])
    assert loaded.verdict(scores).tolist() == ["normal", "anomalous"]


def test_rate_that_the_pictures_support(good, capsys):
    """And features are enough for a class of one's own: the pictures need not be there any more."""
    options = {"dataset_path": "good", "fusion": "class_attention", "score": "likelihood", "holdout": 0.1}
    train.main(small_run(**options, modelname="few"))
    held, said = np.array(record("few")["held_out_scores"]), capsys.readouterr().out
    assert "no test images" in said and "nan" not in said
    assert str(calibration.threshold(held, 0.05)) in said and "warning: a false-alarm rate" in said
    train.main(small_run(**options, false_alarms=0.2))
    assert "warning" not in capsys.readouterr().out
    assert len(record()["held_out_scores"]) == 4, "a fifth needs four"
    (good / "good").rename(good / "away")
    train.main(small_run(**options, false_alarms=0.2, modelname="unseen", pretrained=True))
    assert record("unseen")["held_out_scores"] == record()["held_out_scores"]


def test_own_folders_hold_some_out():
    """Unless a share is given, or edited in config.py; checked whenever the data set changes, too."""
    assert knobs.held_share(None, "folder") == knobs.held_share(None, "csv") == 0.1
    assert knobs.held_share(None, "mvtec") == 0
    assert knobs.held_share(0.0, "folder") == 0 and knobs.held_share(0.2, "folder") == 0.2
    joined = knobs.make_config({"dataset": "folder", **JOINED, "holdout": None})
    with pytest.raises(UserError, match="holdout"):
        dataclasses.replace(joined, dataset="mvtec")
