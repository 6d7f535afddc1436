"""Training, scoring, checkpoints and the whole run: on fabricated features, and from images to
results.json."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import make_cache, make_folder, script
from safetensors.torch import load_file

import config as knobs
import detector
import main
import model
import train
import utils
from config import Config, UserError
from datasets import SPLITS, CacheIdentity, FeatureCache, Labels, Split
from token_grid import Bands

BAND_CHANNELS = (4, 6)  # of the two depths of the fabricated band tokens
CLASSES, N_TRAIN, N_TEST, C, GRID = ("a", "b", "c"), 40, 20, 32, (3, 3)


def fabricate(folder, signal: float = 2.0, scale: float = 1.0) -> FeatureCache:
    """A cache of Gaussian tokens: semantic tokens lie ``signal`` apart per channel and class; patch tokens
    follow them."""
    generator = np.random.RandomState(0)
    n, centres = math.prod(GRID), generator.randn(len(CLASSES), C)
    counts = dict(zip(SPLITS, (N_TRAIN, N_TEST)))
    category = {s: np.repeat(np.arange(len(CLASSES)), counts[s]) for s in SPLITS}
    splits = {
        s: Split.of([f"{s}/{name}/{i}.png" for name in CLASSES for i in range(counts[s])], category[s])
        for s in SPLITS
    }
    tokens = {
        s: scale * (generator.randn(len(category[s]), 1 + n, C) + signal * centres[category[s]][:, None])
        for s in SPLITS
    }
    size = Bands(2, 0.15).size(BAND_CHANNELS)
    places = generator.randn(len(CLASSES), size)
    bands = {
        s: 3 + 0.3 * (generator.randn(len(category[s]), size) + signal * places[category[s]]) for s in SPLITS
    }
    labels = Labels(CLASSES, **splits)
    return make_cache(folder, labels, tokens, bands, grid=GRID, band_channels=BAND_CHANNELS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("features") / "clear")


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("features") / "blank", signal=0.0)


def settings(**more) -> Config:
    """A small flow that learns in a moment."""
    return Config(
        **{
            "fusion": "class_attention",
            "n_coupling_blocks": 2,
            "fc_internal": 24,
            "lr_init": 1e-3,
            "batch_size": 8,
            "threads": 1,
            "extractor": "resnet18",
            "weights_path": "random",
            "hide_tqdm_bar": True,
            "verbose": False,
            **more,
        }
    )


SPECTRUM = {"score": "spectrum", "bands": True, "holdout": 0.2}
by_score = pytest.mark.parametrize(
    "options", [*({"score": name} for name in knobs.SCORES[:3]), SPECTRUM], ids=str
)


def make(cache, class_name: str = "a", seed: int = 0, **more) -> train.Trainer:
    sources = [detector.TokenSource(cache.arrays(split), torch.device("cpu")) for split in SPLITS]
    return train.make_trainer(settings(**more), cache, class_name, seed, *sources)


def fit(cache, class_name: str = "a", seed: int = 0, **more) -> detector.Fitted:
    return make(cache, class_name, seed, **more).run()


# ---------------------------------------------------------------- detection
@by_score
@pytest.mark.parametrize("fusion", ["hilo", "none"])
def test_clear_classes_are_detected(cache, fusion, options):
    for class_name in CLASSES:
        assert (
            fit(cache, class_name, fusion=fusion, normalize="standardize", meta_epochs=5, **options).result[
                "auroc"
            ]
            > 0.95
        )


@by_score
def test_no_signal_no_detection(blank, options):
    for class_name in CLASSES:
        assert (
            0.3
            < fit(blank, class_name, normalize="standardize", meta_epochs=5, **options).result["auroc"]
            < 0.7
        )


def test_training_raises_the_likelihood(cache):
    """The loss falls, on the images trained on and on held-out ones."""
    history = fit(cache, holdout=0.25, meta_epochs=6).history
    assert (
        history[-1]["loss"] < history[0]["loss"]
        and history[-1]["held_out_loss"] < history[0]["held_out_loss"]
    )


def test_result_and_history(cache):
    fitted = fit(cache, "b", seed=7, meta_epochs=3)
    result = fitted.result
    assert (result["class"], result["seed"], result["epoch"]) == ("b", 7, 3)
    assert (result["n_train"], result["n_held_out"], result["n_test"]) == (N_TRAIN, 0, 3 * N_TEST)
    assert [entry["epoch"] for entry in fitted.history] == [1, 2, 3]
    assert result["auroc"] == fitted.history[-1]["auroc"] == utils.auroc(fitted.labels, fitted.scores), (
        "the last epoch is the headline"
    )
    assert result["best_on_test_auroc"] == max(entry["auroc"] for entry in fitted.history)
    assert fitted.labels.tolist() == [int(not N_TEST <= row < 2 * N_TEST) for row in fitted.test_rows]


# ---------------------------------------------------------------- reproducing
def test_same_seed_same_scores(cache):
    first = fit(cache, fusion="hilo", feature_noise=0.1, holdout=0.1, meta_epochs=2)
    fit(cache, "c", seed=9)  # what ran before does not matter
    torch.rand(3), np.random.rand(3)
    again = fit(cache, fusion="hilo", feature_noise=0.1, holdout=0.1, meta_epochs=2)
    assert np.array_equal(first.scores, again.scores) and first.history == again.history
    other = fit(cache, seed=1, fusion="hilo", feature_noise=0.1, holdout=0.1, meta_epochs=2)
    assert not np.array_equal(first.scores, other.scores)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.05},
        {"feature_noise": 0.2, "holdout": 0.2, "select_epoch": "likelihood", "patience": 1, "lr_init": 0.02},
    ],
    ids=str,
)
def test_together_is_as_alone(cache, options):
    """All classes as one batched model come to what each comes to alone."""
    import batched

    options = {"fusion": "hilo", "meta_epochs": 4, **options}
    joint = batched.BatchedTrainer([make(cache, name, **options) for name in CLASSES]).run()
    for fitted, name in zip(joint, CLASSES):
        alone = fit(cache, name, **options)
        assert fitted.result["class"] == name and len(fitted.history) == len(alone.history)
        assert fitted.result["epoch"] == alone.result["epoch"] and fitted.result["auroc"] == pytest.approx(
            alone.result["auroc"], abs=0.01
        )
        assert np.abs(fitted.scores - alone.scores).max() < 1e-3 * np.abs(alone.scores).max()


# ---------------------------------------------------------------- what each knob does
def changes(cache, **more) -> bool:
    return not np.allclose(fit(cache).scores, fit(cache, **more).scores, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"clamp": 0.5},
        {"use_gamma": False},
        {"identity_start": True},
        {"n_heads": 2},
        {"n_coupling_blocks": 3},
        {"fc_internal": 20},
        {"fusion": "hilo"},
        {"normalize": "standardize"},
        {"normalize": "power_l2"},
        {"normalize": "whiten"},
        {"batch_size": 7},
        {"lr_init": 1e-4},
        {"lr_schedule": "cosine"},
        {"weight_decay": 1.0},
        {"max_grad_norm": 1e-3},
        {"feature_noise": 0.5},
        {"holdout": 0.25},
        {"score": "likelihood"},
        {"score": "latent_knn"},
        {"sub_epochs": 2},
    ],
    ids=str,
)
def test_knob_changes_the_outcome(cache, change):
    assert changes(cache, **change)


@pytest.mark.parametrize("change", [{"alpha": 0.25}, {"window": 2}], ids=str)
def test_hilo_knob_changes_the_outcome(cache, change):
    assert not np.allclose(
        fit(cache, fusion="hilo").scores, fit(cache, fusion="hilo", **change).scores, rtol=1e-6
    )


def test_gradient_clipping(cache):
    trainer = make(cache, max_grad_norm=1e-3, weight_decay=0.0)
    trainer.train_step(trainer.data.fit_rows[:8])
    averages = [
        state["exp_avg"]
        for optimizer in trainer.heads[0].optimizer.optimizers
        for state in optimizer.state.values()
    ]
    norm = torch.stack([average.norm() for average in averages]).norm() / (
        1 - 0.8
    )  # after one step, (1 - beta_1) times the gradient
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert np.array_equal(fit(cache, max_grad_norm=1e9).scores, fit(cache).scores), (
        "a limit that is never reached changes nothing"
    )


def test_use_gamma(cache):
    assert any("gamma" in name for name in fit(cache).detector.state_dict())
    assert not any("gamma" in name for name in fit(cache, use_gamma=False).detector.state_dict())


def test_feature_noise_is_for_training_only(cache):
    """Without learning, noise leaves no trace in the scores."""
    assert np.array_equal(fit(cache, lr_init=0.0, feature_noise=3.0).scores, fit(cache, lr_init=0.0).scores)
    assert (
        fit(cache, lr_init=0.0, feature_noise=3.0).result["loss"] > fit(cache, lr_init=0.0).result["loss"] + 1
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rates(cache, schedule):
    trainer = make(cache, lr_schedule=schedule, meta_epochs=2, batch_size=16)
    steps, seen = 2 * math.ceil(N_TRAIN / 16), []
    for _ in range(steps):
        trainer.train_step(trainer.data.fit_rows[:16])
        seen.append(trainer.rate)
    wanted = [
        1e-3 * (0.5 * (1 + math.cos(math.pi * i / steps)) if schedule == "cosine" else 1)
        for i in range(steps)
    ]
    assert seen == pytest.approx(wanted, rel=1e-9)


def test_every_training_image_once_per_epoch(cache, monkeypatch):
    trainer, seen = make(cache, "b", holdout=0.1, meta_epochs=1), []
    monkeypatch.setattr(
        trainer, "train_step", lambda batch: seen.append(np.asarray(batch)) or torch.zeros(())
    )
    trainer.train_epoch()
    trainer.train_epoch()
    half = len(seen) // 2
    assert half == math.ceil(36 / 8) and [len(batch) for batch in seen[:half]] == [8, 8, 8, 8, 4]
    first, second = np.concatenate(seen[:half]), np.concatenate(seen[half:])
    assert sorted(first) == sorted(second) == trainer.data.fit_rows.tolist() and not np.array_equal(
        first, second
    )


def test_holdout(cache):
    trainer = make(cache, "b", holdout=0.23)
    fit_rows, held = set(trainer.data.fit_rows.tolist()), set(trainer.data.held_rows.tolist())
    assert (
        len(held) == math.ceil(0.23 * N_TRAIN)
        and not fit_rows & held
        and fit_rows | held == set(range(N_TRAIN, 2 * N_TRAIN))
    )
    assert set(make(cache, "b", seed=1, holdout=0.23).data.held_rows.tolist()) != held
    fitted = trainer.run()
    z, log_det = fitted.detector.latents(trainer.data.train, trainer.data.held_rows)
    assert fitted.result["held_out_loss"] == pytest.approx(
        model.loss_per_image(z, log_det).mean().item(), rel=1e-5
    )
    assert fit(cache).result.get("held_out_loss") is None


def test_sub_epochs(cache):
    """Two sub-epochs of one meta epoch are two meta epochs, with one evaluation instead of two."""
    sub, meta = fit(cache, sub_epochs=2), fit(cache, meta_epochs=2)
    assert np.array_equal(sub.scores, meta.scores)
    assert [e["epoch"] for e in sub.history] == [2] and [e["epoch"] for e in meta.history] == [1, 2]


def test_scores_are_what_they_are_called(cache):
    for score in knobs.SCORES[:3]:
        trainer = make(cache, score=score)
        fitted = trainer.run()
        with torch.no_grad():
            z, log_det = fitted.detector(*trainer.data.test[fitted.test_rows])
            known, _ = fitted.detector(*trainer.data.train[trainer.data.fit_rows])
        if score == "latent":
            wanted = (z**2).mean(1)
        elif score == "likelihood":
            wanted = ((z**2).sum(1) / 2 + C / 2 * math.log(2 * math.pi) - log_det) / C
        else:
            wanted = (z[:, None] - known[None]).norm(dim=2).sort(dim=1).values[:, :2].mean(1)
        assert np.allclose(fitted.scores, wanted.numpy(), rtol=1e-3), score


def test_normalizer_sees_normal_training_images_only(cache):
    """The statistics are those of the class's own training images, without the held-out ones."""
    trainer = make(cache, "c", normalize="standardize", holdout=0.2)
    semantic = trainer.data.train[trainer.data.fit_rows].semantic
    assert torch.allclose(trainer.detector.normalizer.semantic_mean, semantic.mean(0), atol=1e-5)


def test_standardizing_takes_the_scale_away(cache, tmp_path):
    larger = fabricate(tmp_path / "larger", scale=64.0)
    one, other = (fit(found, normalize="standardize").scores for found in (cache, larger))
    assert np.allclose(one, other, rtol=1e-2)


# ---------------------------------------------------------------- choosing the epoch
CHOOSING = {"holdout": 0.25, "select_epoch": "likelihood", "lr_init": 0.02}


@pytest.mark.parametrize("patience", [1, 2])
def test_select_epoch_by_likelihood(cache, patience):
    """The epoch with the lowest held-out loss is reported, and training ends ``patience`` evaluations behind
    it."""
    full = fit(cache, **CHOOSING, patience=100, meta_epochs=14)
    losses = [entry["held_out_loss"] for entry in full.history]
    best = int(np.argmin(losses))
    assert len(losses) == 15 and full.result["epoch"] == best and full.result["held_out_loss"] == losses[best]
    assert full.result["auroc"] == full.history[best]["auroc"]
    stopped = fit(cache, **CHOOSING, patience=patience, meta_epochs=14)
    running = np.minimum.accumulate(losses)
    ends = next(i for i in range(patience, 15) if running[i] == running[i - patience])
    assert ends < 14, "the learning rate of this test is to overfit"
    assert [entry["held_out_loss"] for entry in stopped.history] == losses[: ends + 1]
    assert stopped.result["epoch"] == int(np.argmin(losses[: ends + 1]))


@by_score
def test_chosen_epoch_is_the_detectors(cache, options):
    """Scores, detector and epoch belong together, though training went on."""
    trainer = make(cache, **(CHOOSING | options), patience=2, meta_epochs=14)
    fitted = trainer.run()
    assert fitted.result["epoch"] < len(fitted.history)
    again = fitted.detector.score_features(trainer.data.test[fitted.test_rows])
    assert np.allclose(again, fitted.scores, rtol=1e-4, atol=1e-4)


def test_best_on_test_never_chooses(cache):
    """With the last epoch as the headline the test AUROC has no say."""
    fitted = fit(cache, lr_init=0.02, meta_epochs=6)
    assert fitted.result["epoch"] == 6 and fitted.result["auroc"] == fitted.history[-1]["auroc"]


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize("meta_epochs, lr", [(1, 1e30), (3, 1e30)])
def test_loss_that_is_not_finite(tmp_path, meta_epochs, lr):
    """Told with the epoch that it happened in and the learning rate."""
    cache = fabricate(tmp_path / "large", scale=3000.0)
    with pytest.raises(UserError) as mistake:
        fit(cache, lr_init=lr, meta_epochs=meta_epochs)
    line = str(mistake.value)
    assert re.search(r"\bepoch 1\b", line) and "1e+30" in line and "class a" in line and "lr_init" in line, (
        line
    )


def test_too_few_images(cache):
    category = np.zeros(3 * N_TRAIN, int)
    category[0] = 1
    cache_of_few = FeatureCache(CacheIdentity(cache.folder, {}))
    cache_of_few.labels = dataclasses.replace(
        cache.labels, train=Split.of(cache.labels.train.names, category)
    )
    with pytest.raises(UserError, match="class b: 1 training"):
        fit(cache_of_few, "b")


@pytest.mark.parametrize("change", [{"fusion": "spectral"}, {"n_heads": 17}], ids=str)
def test_flow_that_does_not_fit(cache, change):
    with pytest.raises(UserError):
        fit(cache, **change)


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


# ---------------------------------------------------------------- the whole run
def whole(folder, **more) -> Config:
    """From images to results: EfficientNet-Lite0 with its own weights at 64 pixels."""
    return Config(
        **{
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
            "plots": False,
            "hide_tqdm_bar": True,
            "verbose": False,
            **more,
        }
    )


@pytest.fixture(scope="module")
def run_folder(texture_folder, tmp_path_factory):
    """A working folder in which main.py has run once, with everything; its features/ serve the other runs."""
    folder = tmp_path_factory.mktemp("work")
    given = knobs.changed(whole(texture_folder, plots=True, baselines=True, n_seeds=2)).items()
    text = {"img_size": "64x64"}
    done = script(
        "main.py",
        *(part for name, value in given for part in (f"--{name}", text.get(name, value))),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


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
    assert len(list((run / "figures").glob("*.png"))) >= 3
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
        assert kept[0]["test"] == kept[1]["test"] and kept[0]["history"] == kept[1]["history"]
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


def test_together_run(run_folder, texture_folder, tmp_path, monkeypatch):
    alone, joint = (
        in_process(whole(texture_folder, train_together=value), run_folder, tmp_path, monkeypatch)
        for value in ("False", "True")
    )
    for name, values in metrics(alone).items():
        assert metrics(joint)[name]["auroc"] == pytest.approx(values["auroc"], abs=0.02)
    assert list(joint["classes"]) == list(alone["classes"])


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


def test_resume_skips_what_is_finished(run_folder, texture_folder, tmp_path, monkeypatch):
    first = in_process(whole(texture_folder), run_folder, tmp_path, monkeypatch)
    (tmp_path / "runs/run/classes/leaf-seed0.json").unlink()
    seen = fitted_classes(monkeypatch)
    again = in_process(whole(texture_folder, resume=True), run_folder, tmp_path, monkeypatch)
    assert seen == [("leaf", 0)] and metrics(again) == metrics(first)
    seen.clear()
    in_process(
        whole(texture_folder, resume=True, verbose=True, class_name="sky"), run_folder, tmp_path, monkeypatch
    )
    assert seen == [], "knobs that change no outcome do not count"
    in_process(
        whole(texture_folder, resume=True, n_seeds=2, class_name="sky"), run_folder, tmp_path, monkeypatch
    )
    assert seen == [("sky", 1)]


@pytest.mark.parametrize("change", [{"lr_init": 2e-3}, {"clamp": 1.0}, {"score": "likelihood"}], ids=str)
def test_resume_fits_again_what_differs(run_folder, texture_folder, tmp_path, monkeypatch, change):
    in_process(whole(texture_folder, class_name="leaf"), run_folder, tmp_path, monkeypatch)
    seen = fitted_classes(monkeypatch)
    in_process(
        whole(texture_folder, class_name="leaf", resume=True, **change), run_folder, tmp_path, monkeypatch
    )
    assert seen == [("leaf", 0)]


def test_without_resume_everything_runs_again(run_folder, texture_folder, tmp_path, monkeypatch):
    for _ in range(2):
        seen = fitted_classes(monkeypatch)
        in_process(whole(texture_folder, class_name="leaf"), run_folder, tmp_path, monkeypatch)
        assert seen == [("leaf", 0)]


@pytest.mark.parametrize(
    "options",
    [
        {"token_grid": "1"},
        {"token_grid": "compact", "window": 1},
        {"token_grid": "1", "pooling": "released", "fusion": "class_attention"},
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
    """Nothing but normal test images: no AUROC, and no failure either, the second time with --resume."""
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "images", classes=("only",), n_train=8, n_test=4)
    for resume in (False, True):
        main.main(
            whole(
                folder,
                extractor="resnet18",
                weights_path="random",
                normalize="standardize",
                resume=resume,
                plots=True,
            )
        )
    auroc = json.loads((tmp_path / "runs/run/results.json").read_text())["mean"]["auroc"]
    assert auroc is None or math.isnan(auroc)
