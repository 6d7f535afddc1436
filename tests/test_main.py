"""The whole run, from images to results.json."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_folder, script
from fabricated import small_run

import config as knobs
import main
from config import Config

pytestmark = pytest.mark.slow


def whole(folder, **more) -> Config:
    """From images to results: EfficientNet-Lite0 with its own weights at 64 pixels."""
    given = {
        "modelname": "run", "dataset_path": str(folder), "keep": "weights", "weights_path": None,
        "extractor": "efficientnet_lite0", "fc_internal": 32, "n_coupling_blocks": 2,
        "normalize": "power_l2+whiten", "lr_init": 1e-3, "batch_size": 8, "meta_epochs": 3,
    }  # fmt: skip
    return small_run(**given | more)


UNTRAINED = {"extractor": "test_resnet", "weights_path": "random", "normalize": "power_l2", "fc_internal": 8}


def results_of(modelname: str = "run", root: Path = Path()) -> dict:
    return json.loads((root / "runs" / modelname / "results.json").read_text())


@pytest.fixture(scope="module")
def run_folder(texture_folder, tmp_path_factory):
    """A working folder in which main.py has run once, with everything; its features/ serve the other runs."""
    folder = tmp_path_factory.mktemp("work")
    given = knobs.changed(
        whole(texture_folder, class_name="apple,sky", keep="all", baselines=True, n_seeds=2)
    )
    given["img_size"] = "64x64"
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    done = script("main.py", *arguments, cwd=folder, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def again(run_folder, texture_folder, tmp_path, monkeypatch):
    """again(knob=value, ...) -> results.json of main.main in a folder of its own, on the first run's
    features."""
    monkeypatch.chdir(tmp_path)
    Path("features").symlink_to(run_folder[0] / "features")

    def go(**more) -> dict:
        main.main(whole(texture_folder, **more))
        return results_of()

    return go


def test_main_detects_and_says_so(run_folder):
    """Classes done and to come, the time that is left, the table; no bar where nobody looks; its files."""
    folder, done = run_folder
    results = results_of(root=folder)
    assert list(results["classes"]) == ["apple", "sky"]
    for name, values in results["classes"].items():
        assert values["auroc"] > 0.95 and 0 <= values["fpr95"] <= 1 and values["aupr"] > 0.9, name
        assert [run["seed"] for run in values["runs"]] == [0, 1]
        assert values["auroc"] == pytest.approx(np.mean([run["auroc"] for run in values["runs"]]))
    means = [results["mean"][method] for method in results["baselines"]]
    assert len(means) > 2 and min(means) > 0.9
    assert all(found["margin"]["low"] <= 0 for found in results["found"].values())
    assert results["config"]["extractor"] == "efficientnet_lite0" and results["seeds"] == [0, 1]
    mean = f"{results['mean']['auroc']:.4f}"
    for told in (mean, "fitting 4 flows of 4", "for 3 more", "[4/4]", "report.html"):
        assert told in done.stdout, told
    assert "for 0 more" not in done.stdout and "it/s" not in done.stderr and "%|" not in done.stderr
    run = folder / "runs/run"
    assert {path.name for path in folder.iterdir()} == {"features", "runs"}
    assert all("sky" in (run / f"results.{ending}").read_text() for ending in ("md", "csv", "json"))
    assert len(list(run.glob("classes/*.safetensors"))) == len(list(run.glob("classes/*.json"))) == 4
    pictures = list((run / "figures").iterdir())
    assert len(pictures) == 3 + 2 * 2, "methods, ROC, epochs; scores and a contact sheet per class"
    assert (run / "report.html").read_text().count("<img") == len(pictures)
    assert not list(folder.rglob("*.partial*"))


def test_same_run_same_results(run_folder, again):
    """In another process, one class at a time, in another order, without simple detectors: the numbers are
    the first run's."""
    again(class_name="sky,apple")
    for name in ("sky", "apple"):
        first, second = (
            json.loads((folder / f"runs/run/classes/{name}-seed0.json").read_text())
            for folder in (run_folder[0], Path())
        )
        start, *epochs = first["history"]
        assert start["epoch"] == 0, "with simple detectors, the start is measured, too"
        assert first["test"] == second["test"] and epochs == second["history"]
        for metric in ("auroc", "best_on_test_auroc"):  # of epochs that could be reported
            assert first["result"][metric] == second["result"][metric]


def test_images_without_signal(tmp_path, monkeypatch):
    """All classes drawn from one distribution: no detector may find anything, from the image on."""
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "images", n_train=24, n_test=24, signal=False)
    main.main(whole(folder, class_name="leaf", **UNTRAINED))
    assert 0.3 < results_of()["classes"]["leaf"]["auroc"] < 0.7


def test_test_images_of_one_label(tmp_path, monkeypatch):
    """Nothing but normal test images: no AUROC, and no failure either, the second time as well."""
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "images", classes=("only",), n_train=8, n_test=4)
    for _ in range(2):
        main.main(whole(folder, keep="all", baselines=True, **UNTRAINED))
        assert results_of()["mean"]["auroc"] is None
        assert results_of()["classes"]["only"]["undefined"] == "no anomalous test images"
