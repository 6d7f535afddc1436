"""What a fit leaves on disk, and what reads it."""

import json

import numpy as np
import pytest
import torch
from fabricated import JOINED, all_of, make, settings
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from config import UserError
from detector import checkpoints, detector
from shell.files import checksum, write_sealed
from train import train


# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "likelihood", "normalize": "power_l2+whiten", "bands": True},
        {"fusion": "hilo", "score": "likelihood"},
        {**JOINED, "meta_epochs": 3},
    ],
    ids=str,
)
def test_checkpoint_gives_the_same_scores(cache, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    prepared = make(cache, **options)
    fitted = train(prepared)
    path = checkpoints.save_fitted(settings(**options), cache.meta, prepared.detector, fitted)
    for suffix in (".json", ".safetensors"):
        loaded, content = detector.load_detector(path.with_name(path.name + suffix))
        with torch.no_grad():
            again = loaded.score_features(all_of(prepared.data.test, fitted.test.rows))
            held = loaded.score_features(all_of(prepared.data.train, prepared.data.held_rows))
        assert np.allclose(again, fitted.test.scores, rtol=1e-4, atol=1e-4)
        assert np.allclose(held, fitted.held_out_scores, rtol=1e-4, atol=1e-4)
        assert loaded.uses_places == ("places" in options) == content.result["reads_places"]
    assert content.result == fitted.result and content.history == fitted.history
    assert np.array_equal(content.test.scores, fitted.test.scores)
    assert np.array_equal(content.test.labels, fitted.test.labels)
    assert checkpoints.config_of(content) == settings(**options)


@pytest.fixture(scope="module")
def of_fit(cache):
    prepared = make(cache)
    return cache.meta, prepared.detector, train(prepared)


@pytest.fixture
def kept(of_fit, tmp_path, monkeypatch):
    """The two files of a checkpoint."""
    monkeypatch.chdir(tmp_path)
    return checkpoints.checkpoint_files(checkpoints.save_fitted(settings(), *of_fit))


def test_checkpoint_without_weights(kept, of_fit, tmp_path):
    """None of an older fit stay, either."""
    with pytest.raises(UserError, match="nothing"):
        detector.load_detector(tmp_path / "nothing.json")
    record, weights = kept
    assert weights.exists()
    checkpoints.save_fitted(settings(keep="results"), *of_fit)
    assert record.exists() and not weights.exists()
    with pytest.raises(UserError, match="no weights were kept"):
        detector.load_detector(record)


# ---------------------------------------------------------------- what was changed, cut or made up
def refused(path) -> str:
    with pytest.raises(UserError) as mistake:
        detector.load_detector(path)
    assert "\n" not in str(mistake.value)
    return str(mistake.value)


def test_an_edit_of_the_record_is_noticed(kept, monkeypatch):
    """And a fit of other formulas."""
    content = json.loads(kept[0].read_text())
    kept[0].write_text(json.dumps(content))  # the layout is no part of the checksum
    detector.load_detector(kept[0])
    content["test"]["scores"] = [0.0]
    kept[0].write_text(json.dumps(content))
    assert "checksum" in refused(kept[0])
    reseal(kept)
    monkeypatch.setattr(checkpoints, "SCORING", checkpoints.SCORING + 1)
    assert "fitted by a version whose scores are others; train it again" in refused(kept[0])


def test_weights_that_were_cut_or_exchanged(kept):
    _, weights = kept
    whole = weights.read_bytes()
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        weights.write_bytes(damaged)
        assert "cut or were changed" in refused(weights)
    weights.unlink()
    assert "No such file" in refused(weights)


def reseal(kept, **changes) -> None:
    """Change a record and its weights' fingerprint, and seal it again: what a forger would do."""
    record = json.loads(kept[0].read_text()) | changes
    write_sealed(kept[0], record | {"weights": checkpoints.fingerprint(kept[1])})


def test_weights_of_another_flow_are_refused(kept):
    state = {k: v.clone() for k, v in load_file(kept[1]).items()}  # older safetensors map the file
    for other in (
        {"x": torch.zeros(1)},
        {**state, "a.reference": torch.zeros(1)},
        {k: v.flatten()[:1] for k, v in state.items()},
    ):
        save_file({k: v.clone() for k, v in other.items()}, kept[1])
        reseal(kept)
        assert "expected a checkpoint of this version" in refused(kept[0])


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
FUZZ = examples(
    max_examples=25, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


PARTS = ["result", "config", "features", "weights", "scoring", "checksum"]  # that a detector is made of


@FUZZ
@given(name=st.sampled_from(PARTS), value=ANY_JSON, sealed=st.booleans())
def test_records_of_any_shape_are_one_line(kept, name, value, sealed):
    """A part of the record replaced by any JSON, the checksum made to fit or not."""
    original, content = kept[0].read_text(), json.loads(kept[0].read_text())
    content[name] = value
    if sealed and name != "checksum":
        content["checksum"] = checksum(content)
    kept[0].write_text(json.dumps(content))
    try:
        detector.load_detector(kept[0])
    except UserError as mistake:
        assert "\n" not in str(mistake)
    finally:
        kept[0].write_text(original)


@FUZZ
@given(content=st.binary(max_size=200), which=st.sampled_from([0, 1]), at=st.integers(0, 400))
def test_bytes_of_any_kind_are_one_line(kept, content, which, at):
    """Bytes put into either file, with a fingerprint that fits the weights."""
    originals = [file.read_bytes() for file in kept]
    kept[which].write_bytes(originals[which][:at] + content + originals[which][at + len(content) :])
    if which:
        reseal(kept)
    try:
        detector.load_detector(kept[0])
    except UserError as mistake:
        assert "\n" not in str(mistake)
    finally:
        for file, original in zip(kept, originals):
            file.write_bytes(original)


def test_a_score_that_is_not_finite_is_no_verdict(cache):
    prepared = make(cache, score="likelihood")
    fitted = train(prepared)
    features = prepared.data.test[fitted.test.rows]
    features.semantic[3] = float("nan")
    with pytest.raises(UserError, match="image 3"):
        prepared.detector.score_features(features)
