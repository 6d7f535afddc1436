"""Values, files and bytes that nobody should give: one line, or they are taken; never a traceback."""

import dataclasses
import io
import random

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

import config as knobs
from backbone import backbones
from config import Config, UserError
from images import images
from shell.values import parse_values
from tools import hostile

FIELDS = dataclasses.fields(Config)
FUZZ = examples(max_examples=150, deadline=None, database=None, derandomize=True)


def test_there_are_values_for_every_knob():
    values = hostile.hostile_values()
    assert len(values) == len(set(values)) > 743
    assert {value.knob for value in values} == {field.name for field in FIELDS}


@pytest.mark.slow
def test_a_sample_of_hostile_values():
    """python tools/hostile.py tries them all."""
    chosen = random.Random(0).sample(hostile.hostile_values(), 40)
    wrong = {
        value: outcome
        for value, outcome in hostile.outcomes(chosen)
        if outcome.kind not in ("accepted", "refused")
    }
    assert not wrong


def test_what_the_tool_would_notice(tmp_path, monkeypatch):
    """A traceback, a hang, a file outside, a partial file left, a status without a line."""
    place = hostile.Place(tmp_path)
    assert hostile.judge(place, 0, "").kind == "accepted"
    assert hostile.judge(place, 2, "error: a line\n") == ("refused", "error: a line")
    assert hostile.judge(place, 1, "Traceback\nValueError: x").kind == "TRACEBACK"
    assert hostile.judge(place, -9, "").kind == "STATUS -9"
    assert hostile.judge(place, 2, "error: a\nerror: b\n").kind == "NO LINE"
    (place.work / "a.partial").touch()
    assert hostile.judge(place, 0, "").kind == "LEFTOVER"
    (tmp_path / "outer" / "x").touch()
    assert hostile.judge(place, 0, "").kind == "OUTSIDE"
    (tmp_path / "outer" / "x").unlink()
    monkeypatch.setattr(hostile, "TIMEOUT", 0.5)
    monkeypatch.setattr(hostile, "from_command_line", lambda *_: hostile.time.sleep(60))
    assert hostile.attempt(place, hostile.Value("seed", "0")).kind == "HANG"


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=4),
    st.lists(st.integers(), max_size=4), st.tuples(st.floats(), st.floats(), st.floats()),
    st.tuples(st.integers(), st.integers()),
)  # fmt: skip


@FUZZ
@given(name=st.sampled_from([field.name for field in FIELDS]), value=ANYTHING)
def test_values_of_any_kind(name, value):
    try:
        made = knobs.make_config({name: value})
    except UserError as mistake:
        assert "\n" not in str(mistake) or isinstance(value, str)
    else:
        assert getattr(made, name) == value or value != value
        hash(made)


@FUZZ
@given(name=st.sampled_from([field.name for field in FIELDS]), text=st.text(max_size=30))
def test_texts_of_any_kind(name, text):
    try:
        knobs.make_config(parse_values({name: text}))
    except UserError as mistake:
        assert str(mistake)


SUFFIXES = (".pth", ".safetensors", ".npz")


@examples(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    data=st.binary(max_size=300),
    at=st.integers(0, 3000),
    suffix=st.sampled_from([".pth", ".safetensors", ".npz"]),
)
def test_weights_files_of_any_bytes(tmp_path_factory, data, at, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    whole = weights_bytes(suffix)
    path.write_bytes(whole[:at] + data + whole[at + len(data) :])
    model = timm.create_model("resnet10t")
    try:
        backbones.load_weights_file(model, path)
    except UserError as mistake:
        assert "weights_path" in str(mistake)
    else:
        pytest.fail("a file of another model was taken")


def weights_bytes(suffix: str) -> bytes:
    """A small weights file, of another model."""
    from safetensors.torch import save

    state, buffer = {"a.weight": torch.zeros(3)}, io.BytesIO()
    if suffix == ".safetensors":
        return save(state)
    torch.save(state, buffer) if suffix == ".pth" else np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


PICTURES = {}
for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"):
    stream = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(stream, kind)
    PICTURES[kind] = stream.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@examples(max_examples=120, deadline=None, database=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(PICTURES)), data=st.binary(min_size=1, max_size=30), at=st.integers(0, 400)
)
def test_images_of_any_bytes(tmp_path_factory, kind, data, at):
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{kind.lower()}"
    path.write_bytes(PICTURES[kind][:at] + data + PICTURES[kind][at + len(data) :])
    try:
        pixels = images.read_image(path)
    except UserError as mistake:
        assert str(path) in str(mistake)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
