"""Training and scoring, on fabricated features."""

import dataclasses
import math
import re
import weakref

import numpy as np
import pytest
import torch
from fabricated import (
    CHOOSING,
    CLASSES,
    JOINED,
    N_TEST,
    N_TRAIN,
    C,
    all_of,
    by_score,
    fabricate,
    fit,
    latents_of,
    make,
    settings,
)

import config as knobs
import model
import utils
from cache.feature_cache import CacheIdentity, FeatureCache
from config import ClassError, UserError
from datasets import Split
from detector import class_data, detector, optimization
from detector.normalization import power_l2

# ---------------------------------------------------------------- detection
CLEAR = {"normalize": "power_l2", "meta_epochs": 5}


@by_score
@pytest.mark.parametrize("fusion", ["hilo", "none"])
def test_clear_classes_are_detected(cache, fusion, options):
    for class_name in CLASSES:
        found = fit(cache, class_name, **CLEAR | options | {"fusion": fusion})
        assert found.result["auroc"] > 0.95


@by_score
def test_no_signal_no_detection(blank, options):
    for class_name in CLASSES:
        assert 0.3 < fit(blank, class_name, **CLEAR | options).result["auroc"] < 0.7


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


# ---------------------------------------------------------------- what each knob does
def changes(cache, **more) -> bool:
    return not np.allclose(fit(cache).scores, fit(cache, **more).scores, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"clamp": 0.5},
        {"identity_start": True},
        {"n_coupling_blocks": 3},
        {"fc_internal": 20},
        {"fusion": "hilo"},
        {"normalize": "power_l2"},
        {"normalize": "power_l2+whiten"},
        {"bands": True},
        {"batch_size": 7},
        {"lr_init": 1e-4},
        {"lr_schedule": "cosine"},
        {"max_grad_norm": 1e-3},
        {"feature_noise": 0.5},
        {"holdout": 0.25},
        {"score": "likelihood"},
        JOINED,
        {"score": "latent_knn"},
        {"sub_epochs": 2},
    ],
    ids=str,
)
def test_knob_changes_the_outcome(cache, change):
    assert changes(cache, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"fusion": "none"},
        {"bands": False},
        {"centre_pool": 0.2},
        {"batch_size": 9},
        {"least_steps": 30},
        {"feature_noise": 0.5},
        {"fc_internal": 20},
        {"holdout": 0.3},
        {"identity_start": False},
    ],
    ids=str,
)
def test_knob_changes_the_joined_score(joined_scores, cache, change):
    assert not np.allclose(joined_scores, fit(cache, **JOINED | change).scores, rtol=1e-4)


@pytest.fixture(scope="module")
def joined_scores(cache):
    return fit(cache, **JOINED).scores


@pytest.mark.parametrize("change", [{"alpha": 0.25}, {"window": 2}], ids=str)
def test_hilo_knob_changes_the_outcome(cache, change):
    assert not np.allclose(
        fit(cache, fusion="hilo").scores, fit(cache, fusion="hilo", **change).scores, rtol=1e-6
    )


def test_gradient_clipping(cache, monkeypatch):
    monkeypatch.setitem(optimization.ADAM, "weight_decay", 0.0)
    trainer = make(cache, max_grad_norm=1e-3)
    trainer.train_step(np.arange(8))
    averages = [
        state["exp_avg"] for optimizer in trainer.optimizer.optimizers for state in optimizer.state.values()
    ]
    norm = torch.stack([average.norm() for average in averages]).norm() / (
        1 - 0.8
    )  # after one step, (1 - beta_1) times the gradient
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert np.array_equal(fit(cache, max_grad_norm=1e9).scores, fit(cache).scores), (
        "a limit that is never reached changes nothing"
    )


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
        trainer.train_step(np.arange(16))
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
    assert sorted(first) == sorted(second) == list(range(36)) and not np.array_equal(first, second)
    rows = trainer.data.fit_rows[first[:8]]
    taken = trainer.prepared.inputs(first[:8]).tokens
    assert torch.equal(taken, trainer.data.train[rows].semantic), "they are numbers of the images fitted to"


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
    with torch.no_grad():
        z, log_det = latents_of(fitted.detector, trainer.data.train, trainer.data.held_rows)
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
            z, log_det = latents_of(fitted.detector, trainer.data.test, fitted.test_rows)
            known, _ = latents_of(fitted.detector, trainer.data.train, trainer.data.fit_rows)
        if score == "latent":
            wanted = (z**2).mean(1)
        elif score == "likelihood":
            wanted = ((z**2).sum(1) / 2 + C / 2 * math.log(2 * math.pi) - log_det) / C
        else:
            wanted = (z[:, None] - known[None]).norm(dim=2).sort(dim=1).values[:, :2].mean(1)
        assert np.allclose(fitted.scores, wanted.numpy(), rtol=1e-3), score


def test_normalizer_sees_normal_training_images_only(cache):
    """The statistics are those of the class's own training images, without the held-out ones."""
    trainer = make(cache, "c", normalize="power_l2", holdout=0.2)
    semantic = power_l2(trainer.data.train[trainer.data.fit_rows].semantic)
    assert torch.allclose(trainer.detector.normalizer.mean, semantic.mean(0), atol=1e-5)


def test_normalizing_takes_the_scale_away(cache, tmp_path):
    larger = fabricate(tmp_path / "larger", scale=64.0)
    one, other = (fit(found, normalize="power_l2").scores for found in (cache, larger))
    assert np.allclose(one, other, rtol=1e-2)


# ---------------------------------------------------------------- choosing the epoch
@pytest.mark.parametrize("patience", [1, 2])
def test_epoch_by_likelihood(cache, patience):
    """The epoch with the lowest held-out loss is reported, and training ends ``patience`` evaluations behind
    it."""
    full = fit(cache, **CHOOSING | {"patience": 100}, meta_epochs=14)
    losses = [entry["held_out_loss"] for entry in full.history]
    best = int(np.argmin(losses))
    assert len(losses) == 15 and full.result["epoch"] == best and full.result["held_out_loss"] == losses[best]
    assert full.result["auroc"] == full.history[best]["auroc"]
    stopped = fit(cache, **CHOOSING | {"patience": patience}, meta_epochs=14)
    running = np.minimum.accumulate(losses)
    ends = next(i for i in range(patience, 15) if running[i] == running[i - patience])
    assert ends < 14, "the learning rate of this test is to overfit"
    assert [entry["held_out_loss"] for entry in stopped.history] == losses[: ends + 1]
    assert stopped.result["epoch"] == int(np.argmin(losses[: ends + 1]))


@by_score
def test_chosen_epoch_is_the_detectors(cache, options):
    """Scores, detector and epoch belong together, though training went on."""
    trainer = make(cache, **(CHOOSING | options | {"patience": 2}), meta_epochs=14)
    fitted = trainer.run()
    assert fitted.result["epoch"] < len(fitted.history)
    again = fitted.detector.score_features(all_of(trainer.data.test, fitted.test_rows))
    assert np.allclose(again, fitted.scores, rtol=1e-4, atol=1e-4)
    loss = trainer.prepared.scores("held")["likelihood"].mean().item()
    wanted = fitted.result["held_out_loss"] + 0.5 * math.log(2 * math.pi)
    assert loss == pytest.approx(wanted, abs=1e-3)
    assert fitted.result["held_out_loss"] == min(entry["held_out_loss"] for entry in fitted.history)


def test_best_on_test_never_chooses(cache):
    """With the last epoch as the headline the test AUROC has no say."""
    fitted = fit(cache, lr_init=0.02, meta_epochs=6)
    assert fitted.result["epoch"] == 6 and fitted.result["auroc"] == fitted.history[-1]["auroc"]


def test_noise_is_of_the_size_that_is_asked_for(cache):
    """On the tokens that the flow is trained on, and on these alone."""
    trainer = make(cache, feature_noise=0.25, meta_epochs=1)
    batch = trainer.prepared.usual["fit"][:16]
    seen, flow = [], trainer.flow
    trainer.flow = lambda tokens, patches: (seen.append(tokens), flow(tokens, patches))[1]
    clean = trainer.prepared.inputs(batch).tokens
    for _ in range(20):
        trainer.train_step(batch)
    noise = torch.stack(seen) - clean
    assert noise.std().item() == pytest.approx(0.25, rel=0.05) and abs(noise.mean().item()) < 0.02
    assert torch.equal(trainer.prepared.inputs(batch).tokens, clean)


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


def test_when_the_loss_is_looked_at(cache):
    """On a CPU at every step; on a GPU, which would wait for it, now and then and at the last step; never
    where an earlier epoch is kept."""

    def looks(trainer, kind):
        trainer.prepared.device, found = torch.device(kind), []
        for step in range(trainer.steps):
            trainer.step = step
            try:
                trainer.check_loss(torch.tensor(torch.nan))
            except ClassError:
                found.append(step)
        return found

    trainer = make(cache, meta_epochs=1, least_steps=150)
    assert looks(trainer, "cpu") == list(range(trainer.steps))
    assert looks(trainer, "cuda") == [63, 127, trainer.steps - 1]
    assert looks(make(cache, patience=3, holdout=0.2), "cpu") == []
    trainer.check_loss(torch.tensor(1.0))


@pytest.mark.parametrize("patience", [0, 3])
def test_scores_that_are_not_finite(cache, patience):
    """Are told with their epoch where the last one counts; else the best before them is kept."""
    trainer = make(cache, patience=patience, meta_epochs=4, holdout=0.2)
    trainer.evaluate(0, None)
    trainer.step = 2 * trainer.steps // 4  # as after the second epoch
    with torch.no_grad():
        next(trainer.detector.flow.parameters()).fill_(torch.nan)
    if patience:
        trainer.evaluate(2, 0.1)
        assert trainer.best.entry["epoch"] == 0 and trainer.since_best == 1
        assert np.isfinite(trainer.fitted(0.0).scores).all()
    else:
        told = (
            "class a: scores are not finite in epoch 2 at learning rate 0.001; try a lower lr_init, max_grad"
        )
        with pytest.raises(ClassError, match=told):
            trainer.evaluate(2, 0.1)


def test_too_few_images(cache):
    category = np.zeros(3 * N_TRAIN, int)
    category[0] = 1
    cache_of_few = FeatureCache(CacheIdentity(cache.folder, {}))
    cache_of_few.labels = dataclasses.replace(
        cache.labels, train=Split.of(cache.labels.train.names, category)
    )
    with pytest.raises(UserError, match="class b: 1 training"):
        fit(cache_of_few, "b")


@pytest.mark.parametrize("change", [{"fusion": "spectral"}, {"fusion": "hilo", "fc_internal": 1}], ids=str)
def test_flow_that_does_not_fit(cache, change):
    with pytest.raises(UserError):
        fit(cache, **change)


def test_auto_normalises_maps_and_leaves_transformers(cache):
    for kind, name in (("map", "power_l2+whiten"), ("tokens", "none")):
        assert detector.normalization_in_effect(settings(), {"kind": kind}) == name
    assert detector.normalization_in_effect(settings(normalize="power_l2"), {"kind": "map"}) == "power_l2"


def test_patch_statistics_come_from_many_images(cache):
    """All images of a small class, not a handful: their mean is the normaliser's."""
    trainer = make(cache, normalize="power_l2")
    patches = power_l2(trainer.data.train[trainer.data.fit_rows].patches.flatten(0, 1))
    assert torch.allclose(trainer.detector.patch_normalizer.mean, patches.mean(0), atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, JOINED], ids=str)
def test_adams_moments_go_with_the_training(cache, options, no_collector):
    """At once, not when cycles of references are looked for: the next class needs the memory."""
    trainer = make(cache, **options)
    moments = [weakref.ref(optimizer) for optimizer in trainer.optimizer.optimizers]
    fitted = trainer.run()
    tokens, seen = trainer.prepared.inputs(np.arange(2))
    del trainer
    assert moments and not any(moment() for moment in moments)
    z, _ = fitted.detector.flow(tokens, [seen])
    z.sum().backward()  # and nothing steps any more


def test_a_small_class_gets_its_least_number_of_steps(cache):
    trainer = make(cache, least_steps=37, meta_epochs=2)
    trainer.run()
    assert trainer.step == trainer.steps >= 37 and trainer.step - 10 < 37
    assert [entry["epoch"] for entry in trainer.history] == [4, 8]


def test_features_that_cannot_be_normalised_are_the_classes_fault(cache, monkeypatch):
    """The line of the class, which stops no other, instead of a traceback."""

    def diverges(*_):
        raise torch.linalg.LinAlgError("eigh did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", diverges)
    with pytest.raises(ClassError, match="class a: .*cannot be normalised .eigh did not converge"):
        make(cache, **JOINED)


def test_tokens_on_the_device_are_those_in_the_files(cache):
    """A source whose arrays were copied to the device reads there."""
    files, there = (class_data.TokenSource(cache.arrays("train"), torch.device("cpu")) for _ in range(2))
    there.make_resident()
    there.arrays = dict.fromkeys(there.arrays)  # the files are not asked any more
    rows = np.array([5, 0, 117, 5])
    for wanted, got in zip(files[rows][:3], there[rows]):
        assert torch.equal(wanted, got)
    assert torch.equal(files.one_on_cpu("bands", rows), there.one("bands", rows))
    assert torch.equal(files.one("bands", rows), files.one_on_cpu("bands", rows))


def test_tokens_leave_room_for_training():
    """CIFAR-10's 44 GB of ViT-B tokens stay on an idle H100 of 80 GB, and not where others use half of it."""
    assert class_data.fits_beside_training(44, 80, 80) and not class_data.fits_beside_training(44, 40, 80)
    assert not class_data.fits_beside_training(70, 80, 80)


def test_features_have_no_gaps():
    """oneDNN copies what has gaps before every product."""
    tokens = torch.arange(24).view(2, 4, 3).half()
    features = class_data.Features.of({"tokens": tokens})
    assert features.patches.is_contiguous() and features.patches.dtype == torch.float32
    assert torch.equal(features.patches, tokens[:, 1:].float())
    assert torch.equal(features.semantic, tokens[:, 0].float())


def test_features_are_split_with_and_without_bands():
    whole = class_data.Features(torch.arange(5.0)[:, None], torch.arange(10.0).view(5, 2, 1))
    parts = whole.split(2)
    assert [len(part.semantic) for part in parts] == [2, 2, 1] and all(part.bands is None for part in parts)
    assert torch.equal(torch.cat([part.patches for part in parts]), whole.patches)
    parts = whole._replace(bands=torch.arange(5.0)).split(3)
    assert [part.bands.tolist() for part in parts] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    "normalize, held",
    [("none", False), ("none", True), ("power_l2+whiten", False), ("power_l2+whiten", True)],
)
def test_an_extreme_image_neither_rules_training_nor_hides_a_good_start(tmp_path, capsys, normalize, held):
    """It is named, and losses are as without it: of the start, and of a training that goes on from it. Where
    whitening is fitted to it, it is not extreme."""
    settings = CHOOSING | {"normalize": normalize}
    plain = make(fabricate(tmp_path / "plain", extreme=[]), **settings)
    row = int((plain.data.held_rows if held else plain.data.fit_rows)[3])
    before = plain.run().history
    assert "note:" not in capsys.readouterr().out
    odd = fabricate(tmp_path / "odd", extreme=[row])
    after, said = fit(odd, **settings).history, capsys.readouterr().out
    if normalize == "none" or held:
        assert said.count("note:") == 1 and f" {odd.labels.train.names[row]} first" in said
    for one, other in zip(before, after):
        assert other["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=0.5)
