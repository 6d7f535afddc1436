"""The whole run, from images to results.json."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import make_folder, script
from safetensors.torch import load_file

import config as knobs
import main
import train
from config import Config, UserError, make_config
from detector import checkpoints

pytestmark = pytest.mark.slow


# ---------------------------------------------------------------- the whole run
def whole(folder, **more) -> Config:
    """From images to results: EfficientNet-Lite0 with its own weights at 64 pixels."""
    return make_config(
        {
            "modelname": "run",
            "dataset": "folder",
            "dataset_path": str(folder),
            "extractor": "efficientnet_lite0",
            "img_size": (64, 64),
            "fc_internal": 32,
            "n_coupling_blocks": 2,
            "normalize": "power_l2+whiten",
            "lr_init": 1e-3,
            "batch_size": 8,
            "meta_epochs": 3,
            "threads": 1,
            "workers": 0,
            "precision": "float32",
            "keep": "weights",
            **more,
        }
    )


@pytest.fixture(scope="module")
def run_folder(texture_folder, tmp_path_factory):
    """A working folder in which main.py has run once, with everything; its features/ serve the other runs."""
    folder = tmp_path_factory.mktemp("work")
    given = knobs.changed(whole(texture_folder, keep="all", baselines=True, n_seeds=2)).items()
    text = {"img_size": "64x64"}
    done = script(
        "main.py",
        *(part for name, value in given for part in (f"--{name}", text.get(name, value))),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.parametrize("fit", [main.main, train.main])
def test_a_fusion_that_does_not_go_with_the_grid_is_refused_before_extraction(
    fit, texture_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="grid of at least 6x6, got 2x2"):
        fit(whole(texture_folder, fusion="spectral", class_name="leaf"))
    assert not (tmp_path / "features").exists()


def in_process(config: Config, run_folder, tmp_path, monkeypatch) -> dict:
    """main.main in a folder of its own, on the features of the first run -> results.json."""
    monkeypatch.chdir(tmp_path)
    if not (tmp_path / "features").exists():
        (tmp_path / "features").symlink_to(run_folder[0] / "features")
    main.main(config)
    return json.loads((tmp_path / "runs" / config.modelname / "results.json").read_text())


def metrics(results: dict) -> dict:
    return {
        name: {key: value for key, value in values.items() if key != "runs"}
        for name, values in results["classes"].items()
    }


def test_main_detects(run_folder):
    folder, done = run_folder
    results = json.loads((folder / "runs/run/results.json").read_text())
    assert {"classes", "mean", "config"} <= set(results) and list(results["classes"]) == [
        "apple",
        "leaf",
        "sky",
    ]
    for name, values in results["classes"].items():
        assert values["auroc"] > 0.95 and 0 <= values["fpr95"] <= 1 and values["aupr"] > 0.9, name
        assert [run["seed"] for run in values["runs"]] == [0, 1]
        per_seed = [run["auroc"] for run in values["runs"]]
        assert values["auroc"] == pytest.approx(np.mean(per_seed)) and values["auroc_std"] == pytest.approx(
            np.std(per_seed, ddof=1)
        )
    assert results["mean"]["auroc"] == pytest.approx(
        np.mean([values["auroc"] for values in results["classes"].values()])
    )
    assert results["config"]["extractor"] == "efficientnet_lite0" and results["config"]["n_seeds"] == 2
    assert len(results["baselines"]) > 0 and all(
        table["mean"]["auroc"] > 0.9 for table in results["baselines"].values()
    )
    assert f"{results['mean']['auroc']:.4f}" in done.stdout and "preset paper" in done.stdout


def test_main_says_how_far_it_is(run_folder):
    """Classes done and to come, the time that is left; no bar where nobody looks."""
    _, done = run_folder
    assert "fitting 6 flows of 6" in done.stdout
    assert "for 5 more" in done.stdout and "[6/6]" in done.stdout and "for 0 more" not in done.stdout
    assert "report.html" in done.stdout and "it/s" not in done.stderr and "%|" not in done.stderr
    table = done.stdout[done.stdout.index("class  ") :]
    assert max(map(len, table.splitlines())) <= 100


def test_time_left_is_that_of_all_that_are_left():
    """By all that are finished, not by the last."""
    assert main.took({"seconds": 30.0}, 4, 45.0) == "30 s, about 3 min for 4 more"
    assert main.took({"seconds": 30.0}, 0, 45.0) == "30 s"


def test_main_leaves_its_files(run_folder):
    folder, _ = run_folder
    run = folder / "runs/run"
    assert {path.name for path in folder.iterdir()} == {"features", "runs"}
    assert "leaf" in (run / "results.md").read_text()
    rows = [line.split(",") for line in (run / "results.csv").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    column = rows[0].index("auroc")
    flow = rows[1][0]  # the first rows are the flow's, whatever it is called
    found = {row[1]: float(row[column]) for row in rows[1:] if row[0] == flow}
    assert found == {
        **{name: values["auroc"] for name, values in results["classes"].items()},
        "mean": results["mean"]["auroc"],
    }
    for name in ("apple", "leaf", "sky"):
        for seed in (0, 1):
            state = load_file(run / "classes" / f"{name}-seed{seed}.safetensors")
            assert all(
                torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point()
            )
    pictures = list((run / "figures").iterdir())
    assert len(pictures) == 3 + 2 * 3, "methods, ROC, epochs; scores and a contact sheet per class"
    page = (run / "report.html").read_text()
    assert page.count("<img") == len(pictures) and "leaf" in page
    assert not list(folder.rglob("*.partial*"))


def test_same_run_same_results(run_folder, texture_folder, tmp_path, monkeypatch):
    """In another process, one class at a time and in another order: the numbers are the first run's."""
    first = json.loads((run_folder[0] / "runs/run/results.json").read_text())
    again = in_process(whole(texture_folder, class_name="sky,apple"), run_folder, tmp_path, monkeypatch)
    for name in ("sky", "apple"):
        kept = [
            json.loads((folder / f"runs/run/classes/{name}-seed0.json").read_text())
            for folder in (run_folder[0], tmp_path)
        ]
        first_start, *epochs = kept[0]["history"]
        assert first_start["epoch"] == 0, "with simple detectors, the start is measured, too"
        assert kept[0]["test"] == kept[1]["test"] and epochs == kept[1]["history"]
        oracle = [record["result"]["best_on_test_auroc"] for record in kept]
        assert oracle[0] == oracle[1], "it is no epoch that could be reported"
        assert again["classes"][name]["runs"][0]["auroc"] == first["classes"][name]["runs"][0]["auroc"]


def test_train_script_is_one_class_of_main(run_folder, texture_folder, tmp_path, monkeypatch):
    in_process(whole(texture_folder, class_name="leaf"), run_folder, tmp_path, monkeypatch)
    wanted = json.loads((tmp_path / "runs/run/classes/leaf-seed0.json").read_text())
    train.main(whole(texture_folder, class_name="leaf", modelname="single"))
    assert (
        json.loads((tmp_path / "runs/single/classes/leaf-seed0.json").read_text())["test"] == wanted["test"]
    )
    with pytest.raises(UserError, match="class_name"):
        train.main(whole(texture_folder))


def fitted_classes(monkeypatch) -> list:
    """The classes that are fitted from now on, as they come."""
    seen, real = [], train.make_trainer
    monkeypatch.setattr(
        train,
        "make_trainer",
        lambda config, cache, class_name, seed, *a, **k: (
            seen.append((class_name, seed)) or real(config, cache, class_name, seed, *a, **k)
        ),
    )
    return seen


def test_a_run_goes_on_where_it_ended(run_folder, texture_folder, tmp_path, monkeypatch):
    first = in_process(whole(texture_folder), run_folder, tmp_path, monkeypatch)
    (tmp_path / "runs/run/classes/leaf-seed0.json").unlink()
    seen = fitted_classes(monkeypatch)
    again = in_process(whole(texture_folder), run_folder, tmp_path, monkeypatch)
    assert seen == [("leaf", 0)] and metrics(again) == metrics(first)
    seen.clear()
    more = whole(texture_folder, unreadable="skip", class_name="sky")
    in_process(more, run_folder, tmp_path, monkeypatch)
    assert seen == [], "knobs that change no outcome do not count"
    in_process(dataclasses.replace(more, n_seeds=2), run_folder, tmp_path, monkeypatch)
    assert seen == [("sky", 1)]
    seen.clear()
    in_process(dataclasses.replace(more, restart=True), run_folder, tmp_path, monkeypatch)
    assert seen == [("sky", 0)]


@pytest.mark.parametrize(
    "options",
    [
        {"token_grid": "1"},
        {"token_grid": "compact", "window": 1},
        {"token_grid": "released1", "fusion": "class_attention"},
    ],
    ids=str,
)
def test_token_grids_end_to_end(texture_folder, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    main.main(whole(texture_folder, class_name="sky", **options))
    assert json.loads((tmp_path / "runs/run/results.json").read_text())["mean"]["auroc"] > 0.95


def test_images_without_signal(tmp_path, monkeypatch):
    """All classes drawn from one distribution: no detector may find anything, from the image on."""
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "images", n_train=24, n_test=24, signal=False)
    main.main(whole(folder))
    results = json.loads((tmp_path / "runs/run/results.json").read_text())
    assert all(0.3 < values["auroc"] < 0.7 for values in results["classes"].values()), results["classes"]


def test_test_images_of_one_label(tmp_path, monkeypatch):
    """Nothing but normal test images: no AUROC, and no failure either, the second time as well."""
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "images", classes=("only",), n_train=8, n_test=4)
    for _ in range(2):
        main.main(
            whole(
                folder,
                extractor="resnet18",
                weights_path="random",
                normalize="power_l2",
                keep="all",
            )
        )
    auroc = json.loads((tmp_path / "runs/run/results.json").read_text())["mean"]["auroc"]
    assert auroc is None or math.isnan(auroc)


def test_sweep_runs_every_combination(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(
        dataset="folder",
        dataset_path=str(make_folder(tmp_path / "images", classes=("a", "b"), n_train=5, n_test=5)),
        extractor="resnet18",
        weights_path="random",
        img_size=(64, 64),
        workers=0,
        keep="weights",
        fc_internal=8,
        threads=1,
        n_seeds=2,
        modelname="grid",
        sweep="fusion=none,class_attention;clamp=1,3",
    )
    main.main(config)
    content = (tmp_path / "runs/grid/sweep.md").read_text()
    assert "| none |" in content and "| class_attention |" in content and content.count("±") >= 4
    for name in ("none-1", "none-3", "class_attention-1", "class_attention-3"):
        assert (tmp_path / "runs/grid" / name / "results.json").exists()
    kept = checkpoints.checkpoint_path(dataclasses.replace(config, modelname="grid/none-3"), "a", 1)
    assert kept.with_suffix(".safetensors").exists()
