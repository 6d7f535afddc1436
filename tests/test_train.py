"""Training and scoring, on fabricated features."""

import math

import numpy as np
import pytest
import torch
from fabricated import EVERY_SCORE, JOINED, N_TEST, N_TRAIN, all_of, by_score, fit, latents_of, make, settings
from torch.optim.optimizer import register_optimizer_step_post_hook

import config as knobs
import model
import train
import utils
from config import ClassError
from detector import class_data, detector
from detector.detector import WHOLE
from detector.normalization import power_l2

# ---------------------------------------------------------------- detection
CLEAR = {"normalize": "power_l2", "meta_epochs": 3}


@by_score
def test_clear_classes_are_detected(cache, options):
    assert fit(cache, "b", **CLEAR | {"fusion": "hilo"} | options).result["auroc"] > 0.95


@by_score
def test_no_signal_no_detection(blank, options):
    assert 0.3 < fit(blank, "b", **CLEAR | options).result["auroc"] < 0.7


def test_result_and_history(cache):
    """Of the last epoch, whatever the others have on the test images."""
    fitted = fit(cache, "b", seed=7, meta_epochs=3)
    result = fitted.result
    assert (result["class"], result["seed"], result["epoch"]) == ("b", 7, 3)
    assert (result["n_train"], result["n_held_out"], result["n_test"]) == (N_TRAIN, 0, 3 * N_TEST)
    assert [entry["epoch"] for entry in fitted.history] == [1, 2, 3]
    auroc = utils.auroc(fitted.test.labels, fitted.test.scores)
    assert result["auroc"] == fitted.history[-1]["auroc"] == auroc, "the last epoch is the headline"
    assert result["best_on_test_auroc"] == max(entry["auroc"] for entry in fitted.history)
    assert fitted.test.labels.tolist() == [int(not N_TEST <= row < 2 * N_TEST) for row in fitted.test.rows]


# ---------------------------------------------------------------- reproducing
def test_same_seed_same_scores(cache):
    options = {"feature_noise": 0.1, "holdout": 0.1, "meta_epochs": 2}
    first = fit(cache, **options)
    fit(cache, "c", seed=9)  # what ran before does not matter
    torch.rand(3), np.random.rand(3)
    again = fit(cache, **options)
    assert np.array_equal(first.test.scores, again.test.scores) and first.history == again.history
    assert not np.array_equal(first.test.scores, fit(cache, seed=1, **options).test.scores)


# ---------------------------------------------------------------- what each knob does
BASES = {"flow": {}, "hilo": {"fusion": "hilo"}, "joined": JOINED}
CHANGES = {
    "flow": [
        {"clamp": 0.5}, {"identity_start": True}, {"n_coupling_blocks": 3}, {"fc_internal": 20},
        {"normalize": "power_l2"}, {"normalize": "power_l2+whiten"}, {"bands": True}, {"batch_size": 7},
        {"lr_init": 1e-4}, {"lr_schedule": "cosine"}, {"max_grad_norm": 1e-3}, {"feature_noise": 0.5},
        {"holdout": 0.25},
    ],
    "hilo": [{"alpha": 0.25}, {"window": 2}],
    "joined": [
        {"fusion": "none"}, {"bands": False}, {"centre_pool": 0.2}, {"batch_size": 9}, {"holdout": 0.3},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def scores(cache):
    return {name: fit(cache, **base).test.scores for name, base in BASES.items()}


@pytest.mark.parametrize("base, change", [(name, c) for name in BASES for c in CHANGES[name]], ids=str)
def test_knob_changes_the_outcome(scores, cache, base, change):
    assert not np.allclose(scores[base], fit(cache, **BASES[base] | change).test.scores, rtol=1e-5)


@pytest.fixture
def steps():
    """Of each step of training: the optimiser, and its learning rate then."""
    made = []
    hook = register_optimizer_step_post_hook(lambda adam, *_: made.append((adam, adam.param_groups[0]["lr"])))
    yield made
    hook.remove()


def test_gradient_clipping(cache, steps, monkeypatch):
    monkeypatch.setitem(train.ADAM, "weight_decay", 0.0)
    fit(cache, max_grad_norm=1e-3, batch_size=N_TRAIN)
    averages = [state["exp_avg"] for state in steps[0][0].state.values()]
    norm = torch.stack([average.norm() for average in averages]).norm() / (1 - 0.8)
    assert norm == pytest.approx(1e-3, rel=1e-3), "after one step, (1 - beta_1) times the gradient"


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rates(cache, steps, schedule):
    fit(cache, lr_schedule=schedule, meta_epochs=2, batch_size=16)
    n = 2 * math.ceil(N_TRAIN / 16)
    waves = [0.5 * (1 + math.cos(math.pi * i / n)) if schedule == "cosine" else 1 for i in range(n)]
    assert [rate for _, rate in steps] == pytest.approx([1e-3 * wave for wave in waves], rel=1e-9)


def test_feature_noise_is_for_training_only(cache):
    """Without learning, noise leaves no trace in the scores."""
    noisy, clean = (fit(cache, lr_init=0.0, feature_noise=noise) for noise in (3.0, 0.0))
    assert np.array_equal(noisy.test.scores, clean.test.scores)
    assert noisy.result["loss"] > clean.result["loss"] + 1


def test_noise_is_of_the_size_that_is_asked_for(cache, monkeypatch):
    """On the tokens that the flow is trained on, each image once in every epoch, in another order."""
    prepared, batches, noise = make(cache, "b", holdout=0.1, feature_noise=0.25, meta_epochs=2), [], []
    inputs, flow = prepared.inputs, prepared.detector.flow
    monkeypatch.setattr(prepared, "inputs", lambda batch: batches.append(batch) or inputs(batch))
    flow.register_forward_pre_hook(lambda _, given: noise.append(given[0] - inputs(batches[-1]).tokens))
    list(train.train_epochs(prepared))
    assert [len(batch) for batch in batches] == 2 * [8, 8, 8, 8, 4]
    first, second = np.concatenate(batches[:5]), np.concatenate(batches[5:])
    assert sorted(first) == sorted(second) == list(range(36)) and not np.array_equal(first, second)
    noise = torch.cat(noise)
    assert noise.std().item() == pytest.approx(0.25, rel=0.05) and abs(noise.mean().item()) < 0.02
    assert torch.equal(
        inputs(first[:8]).tokens, prepared.data.train[prepared.data.fit_rows[first[:8]]].semantic
    )


def test_noise_has_a_seed_of_its_own(cache):
    first, second = [make(cache, feature_noise=0.5) for _ in range(2)]
    assert list(train.train_epochs(first)) == list(train.train_epochs(second))


def test_the_flow_is_compiled_where_that_is_asked_for(cache, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda flow, mode: compiled.append((flow, mode)) or flow)
    prepared = make(cache, compile=True)
    list(train.train_epochs(prepared))
    mode = "reduce-overhead" if torch.cuda.is_available() else "default"
    assert compiled == [(prepared.detector.flow, mode)]


def test_holdout(cache):
    prepared = make(cache, "b", holdout=0.23)
    fit_rows, held = set(prepared.data.fit_rows.tolist()), set(prepared.data.held_rows.tolist())
    assert len(held) == math.ceil(0.23 * N_TRAIN) and not fit_rows & held
    assert fit_rows | held == set(range(N_TRAIN, 2 * N_TRAIN))
    assert set(make(cache, "b", seed=1, holdout=0.23).data.held_rows.tolist()) != held
    fitted = train.train(prepared)
    with torch.no_grad():
        z, log_det = latents_of(prepared.detector, prepared.data.train, prepared.data.held_rows)
    assert fitted.result["held_out_loss"] == pytest.approx(
        model.loss_per_image(z, log_det).mean().item(), rel=1e-5
    )
    assert fit(cache).result.get("held_out_loss") is None


def test_sub_epochs(cache):
    """Two sub-epochs of one meta epoch are two meta epochs, with one evaluation instead of two."""
    sub, meta = fit(cache, sub_epochs=2), fit(cache, meta_epochs=2)
    assert np.array_equal(sub.test.scores, meta.test.scores)
    assert [e["epoch"] for e in sub.history] == [2] and [e["epoch"] for e in meta.history] == [1, 2]


# ---------------------------------------------------------------- one score, by its name
@pytest.mark.parametrize("options", [*EVERY_SCORE, {"score": "likelihood", "fusion": "none"}], ids=str)
def test_scores_of_tables_are_the_detectors_by_that_name(cache, options):
    """Each name of the table, of held-out images too, and of an image alone."""
    prepared = make(cache, **{"holdout": 0.2} | options)
    fitted = train.train(prepared)
    named = {WHOLE: fitted.test.scores} | {n: s for n, s in fitted.flow_scores.items() if "before" not in n}
    data, scorer = prepared.data, prepared.detector.eval()
    if options == JOINED:
        assert set(named) == {WHOLE, "image part", "places", "likelihood", "latent"}
    else:
        assert {WHOLE, "latent", "likelihood", options["score"]} == set(named)
        assert np.array_equal(named[WHOLE], named[options["score"]])
    with torch.no_grad():
        for name, wanted in named.items():
            got = scorer.score(all_of(data.test, data.test_rows), name).numpy()
            assert got == pytest.approx(wanted, rel=1e-4, abs=1e-4), name
            alone = scorer.score(all_of(data.test, data.test_rows[:1]), name).numpy()
            assert alone == pytest.approx(wanted[:1], rel=1e-4, abs=1e-4), name
    held = scorer.score_features(all_of(data.train, data.held_rows))
    assert held == pytest.approx(fitted.held_out_scores, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("score", knobs.SCORES[:2])
def test_scores_are_what_they_are_called(cache, score):
    prepared = make(cache, score=score)
    fitted = train.train(prepared)
    with torch.no_grad():
        z, log_det = latents_of(prepared.detector, prepared.data.test, fitted.test.rows)
    wanted = {
        "latent": (z**2).mean(1),
        "likelihood": (z**2).mean(1) / 2 + math.log(2 * math.pi) / 2 - log_det / z.shape[1],
    }
    assert np.allclose(fitted.test.scores, wanted[score].numpy(), rtol=1e-3)


def test_normalizers_see_normal_training_images_only(cache):
    """The statistics are those of all of the class's own training images, without the held-out ones."""
    prepared = make(cache, "c", normalize="power_l2", holdout=0.2)
    fitted, known = prepared.detector, prepared.data.train[prepared.data.fit_rows]
    assert torch.allclose(fitted.normalizer.mean, power_l2(known.semantic).mean(0), atol=1e-5)
    patches = power_l2(known.patches.flatten(0, 1)).mean(0)
    assert torch.allclose(fitted.patch_normalizer.mean, patches, atol=1e-4)


# ---------------------------------------------------------------- mistakes
@by_score
def test_training_that_diverges(cache, options):
    """Is told with its epoch and the learning rate."""
    with pytest.raises(ClassError) as mistake:
        fit(cache, **options | {"lr_init": 1e30})
    line = str(mistake.value)
    assert "class a: scores are not finite in epoch " in line and "1e+30" in line and "lr_init" in line


def test_auto_normalises_maps_and_leaves_transformers(cache):
    for kind, name, of_a_map in (("map", "auto", True), ("tokens", "auto", False), ("map", "none", False)):
        made = detector.make_detector(settings(normalize=name), cache.meta | {"kind": kind})
        assert made.powered == made.whitens == of_a_map


def test_a_small_class_gets_its_least_number_of_steps(cache):
    fitted = fit(cache, least_steps=37, meta_epochs=2)
    assert [entry["epoch"] for entry in fitted.history] == [4, 8], "of five steps each"


def test_without_steps_there_is_no_epoch(cache):
    prepared = make(cache)
    prepared.steps_per_epoch = 0
    assert list(train.train_epochs(prepared)) == []


def test_tokens_on_the_device_are_those_in_the_files(cache):
    """A source whose arrays were copied to the device reads there."""
    files, there = (class_data.TokenSource(cache.arrays("train"), torch.device("cpu")) for _ in range(2))
    there.make_resident()
    there.arrays = dict.fromkeys(there.arrays)  # the files are not asked any more
    rows = np.array([5, 0, 117, 5])
    for wanted, got in zip(files[rows][:3], there[rows]):
        assert torch.equal(wanted, got)
    assert torch.equal(files.one("bands", rows), there.one("bands", rows))
