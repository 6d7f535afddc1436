"""The measurements on chosen pictures (benchmarks/curves.py, benchmarks/false_alarms.py), on a fabricated
cache."""

import argparse
import sys

import numpy as np
import pytest
from conftest import ROOT, script
from fabricated import JOINED, N_TEST, N_TRAIN, settings

sys.path.insert(0, str(ROOT / "benchmarks"))

import chosen_rows
import curves
import false_alarms

from config import UserError

QUICK = {**JOINED, "least_steps": 2, "meta_epochs": 1, "sub_epochs": 1, "patience": 3}


@pytest.fixture
def pictures(cache):
    return chosen_rows.Pictures("made", settings(**QUICK, baselines=True, device="cpu"), cache)


def options(tmp_path, **more):
    values = {"out": tmp_path / "out.md", "kept": tmp_path / "kept" / "figures.jsonl", **more}
    return argparse.Namespace(suite=None, only=None, knobs=[], **values)


# ---------------------------------------------------------------- rows of both splits
def test_rows_of_both_splits(pictures, cache):
    """A row is the same picture whichever rows are asked for beside it, of either split."""
    good, normal, anomalous = pictures.of_class("b")
    assert len(good) == N_TRAIN and len(normal) == N_TEST and len(anomalous) == 2 * N_TEST
    for name, joined in pictures.source.arrays.items():
        train, test = (cache.arrays(split)[name] for split in ("train", "test"))
        index = np.array([normal[0], good[3], anomalous[-1], good[0]])
        expected = [test[N_TEST], train[N_TRAIN + 3], test[3 * N_TEST - 1], train[N_TRAIN]]
        assert np.array_equal(joined[index], np.stack(expected))
    tokens = pictures.source.arrays["tokens"]
    assert np.array_equal(tokens.semantic()[normal], tokens[normal][:, 0])


def test_a_fit_sees_the_pictures_that_were_chosen(pictures):
    good, normal, anomalous = pictures.of_class("a")
    training = np.concatenate([good[:20], anomalous[:3]])
    fit = pictures.fit("a", 1, training, normal, anomalous[3:])
    assert fit.result["n_train"] + fit.result["n_held_out"] == 23 and fit.result["seed"] == 1
    assert fit.test_rows.tolist() == sorted([*normal, *anomalous[3:]])
    assert fit.labels.tolist() == [int(row in anomalous) for row in fit.test_rows]
    assert set(curves.DETECTORS[:3]) <= {curves.WHOLE, *fit.simple_scores}
    held = pictures.fit("a", 1, good[:20], normal, anomalous, held=good[20:])
    assert held.result["n_train"] == 20 and len(held.held_scores) == N_TRAIN - 20


def test_figures_are_measured_once(tmp_path, pictures):
    path = tmp_path / "kept.jsonl"
    assert chosen_rows.Kept(path).get(pictures, ("a", 1), lambda: [1.5]) == [1.5]
    again = chosen_rows.Kept(path)
    assert again.get(pictures, ("a", 1), lambda: [2.5]) == [1.5]
    assert again.get(pictures, ("a", 2), lambda: [2.5]) == [2.5]
    other = chosen_rows.Pictures("made", settings(**QUICK, lr_init=0.5, device="cpu"), pictures.cache)
    assert again.get(other, ("a", 1), lambda: [3.5]) == [3.5]


def test_no_set(tmp_path):
    suite = tmp_path / "suite.toml"
    suite.write_text('[[set]]\nname = "cells"\ndataset = "mvtec"\npath = "nowhere"\n')
    given = options(tmp_path, seeds=[0], classes=1)
    given.suite = suite
    with pytest.raises(UserError, match="none of the sets is there"):
        curves.main(given)


# ---------------------------------------------------------------- few pictures and dirty ones
def test_few_pictures_are_among_more(pictures, monkeypatch):
    seen = {}

    def keep(pictures, class_name, seed, chosen, *test):
        seen[len(chosen)] = (set(chosen), *test)

    monkeypatch.setattr(curves, "fitted", keep)
    for size in (5, 20, curves.ALL):
        curves.few(pictures, "a", 3, size)
    good, normal, anomalous = pictures.of_class("a")
    assert seen[5][0] < seen[20][0] < seen[N_TRAIN][0] == set(good)
    assert all(np.array_equal(np.concatenate(test), [*normal, *anomalous]) for _, *test in seen.values())
    assert curves.few(pictures, "a", 3, 100).fault == f"there are {N_TRAIN} good pictures"


def test_defective_pictures_are_taken_out_of_every_test(pictures, monkeypatch):
    seen = []
    monkeypatch.setattr(curves, "fitted", lambda p, c, seed, *rows: seen.append([set(part) for part in rows]))
    for share in curves.SHARES:
        curves.dirty(pictures, "a", 3, share)
    good, normal, anomalous = (set(part) for part in pictures.of_class("a"))
    for share, (training, tested, defective) in zip(curves.SHARES, seen):
        assert training >= good and tested == normal
        assert len(training - good) == round(share * N_TRAIN / (1 - share))
        assert training - good <= anomalous - defective and defective == seen[0][2]


def test_too_few_defective_pictures(pictures, monkeypatch):
    monkeypatch.setattr(curves, "SHARES", (0.0, 0.6))
    assert "60 to be taken out" in curves.dirty(pictures, "a", 0, 0.6).fault


def test_a_class_that_cannot_be_fitted_is_a_line(pictures):
    case = curves.few(pictures, "a", 0, 2)  # one to fit to, one held out
    assert "expected at least 3" in case.fault
    point = curves.Point("made", 2, [[case]])
    assert point.row("few")[-1].startswith("cannot be had: class a") and "nan" not in str(point.row("few"))


def test_a_row_of_the_curves():
    def case(value, held):
        return curves.Case({curves.WHOLE: value}, "", 9, held, held >= 19)

    point = curves.Point("made", 5, [[case(0.5, 1), case(0.7, 2)], [case(0.9, 1), case(0.7, 2)]])
    row = point.row("few")
    assert row[:4] == ["made", "5", "9 + 1 to 2", "0.7000 ± 0.1414"]  # seeds: .6 and .8
    assert row[4] == "-" and row[-1] == "none: 1 to 2 held out, 19 needed"
    assert curves.Point("made", 0.02, [[case(0.5, 19)]]).row("dirty")[1::6] == ["2%", "yes"]


def test_table_and_pictures_of_the_curves(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(curves, "sets_of", lambda args, **_: iter([pictures]))
    monkeypatch.setitem(curves.STUDIES, "few", (curves.few, (5, 100)))
    monkeypatch.setitem(curves.STUDIES, "dirty", (curves.dirty, (0.0, 0.1)))
    curves.main(options(tmp_path, seeds=[0, 1], classes=1))
    text = (tmp_path / "out.md").read_text()
    assert "| made | 5 | 4 + 1 | " in text and "none: 1 held out, 19 needed" in text
    assert f"| made | 100 |  |  |  |  |  | cannot be had: there are {N_TRAIN} good pictures |" in text
    assert "Seeds 0, 1; classes of made: a;" in text
    for study in curves.STUDIES:
        assert (tmp_path / f"out-{study}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(out-{study}.png)" in text


# ---------------------------------------------------------------- false alarms
def test_a_split_shares_no_picture():
    normal = np.arange(100, 200)
    parts = false_alarms.split(normal, 20, 5)
    assert [len(part) for part in parts] == [20, 40, 40]
    assert len(set(np.concatenate(parts))) == 100 and all((np.diff(part) > 0).all() for part in parts)
    assert not np.array_equal(parts[0], false_alarms.split(normal, 20, 6)[0])


def test_what_is_too_few_for_a_split():
    assert false_alarms.shares(59, 20) is None and false_alarms.shares(60, 20) == (20, 20)
    assert false_alarms.shares(1000, 20) == (40, 100)


def test_false_alarms_of_a_split(pictures, monkeypatch):
    """The rates are those of further pictures above the held-out ones' threshold."""
    problem = false_alarms.problems_of([pictures])[0]

    class Fit:
        held_scores, scores = np.arange(99.0), np.array([98.5, 95.0, 92.0, 0.0])

    monkeypatch.setattr(chosen_rows.Pictures, "fit", lambda *_: Fit)
    assert false_alarms.measure(problem, 20, 0) == [0.25, 0.5, 0.75]


def test_a_row_of_false_alarms():
    found = {"made": [[0.0, 0.1, 0.0], [0.0, 0.3, 0.0]]}
    assert false_alarms.row_of(20, 1, found, ["made", "other"]) == [
        "20", "0.05", "0.0476", "0.2000 ± 0.1000", "2", "0.2000", "",
    ]  # fmt: skip
    assert false_alarms.row_of(20, 0, {}, ["made"])[2:] == ["0.0476 (too few pictures)", "-", "0", ""]


def test_table_of_false_alarms(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(false_alarms, "sets_of", lambda args, **_: iter([pictures]))
    false_alarms.main(options(tmp_path, held_out=[20, 500], splits=2))
    text = (tmp_path / "out.md").read_text()
    assert "| 20 | 0.05 | 0.0476 | 0." in text and "| 500 | 0.05 | 0.0499 | - | 0 |  |" in text
    assert "- 20 held out: 3 of 3 classes of made, fitted to 20 to 20 pictures." in text
    assert "- 500 held out: 0 of 3 classes of made; the others have fewer than 540 pictures." in text


@pytest.mark.slow
@pytest.mark.long
def test_both_scripts_at_a_tiny_size(tmp_path, texture_folder):
    suite = tmp_path / "suite.toml"
    suite.write_text(f'preset = "accurate"\nextractor = "test_resnet"\n[[set]]\nname = "made"\n'
                     f'dataset = "folder"\npath = "{texture_folder}"\n')  # fmt: skip
    small = ["img_size=32", "places=4", "fc_internal=8", "least_steps=2", "threads=1"]
    knobs = ["--only", "made", "--knobs", "weights_path=random", *small]
    for name, more in (
        ("curves", ["--seeds", 0, "--classes", 1]),
        ("false_alarms", ["--held_out", 500]),
    ):
        done = script(f"benchmarks/{name}.py", suite, *knobs, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"`python benchmarks/{name}.py" in (tmp_path / "results" / f"{name}.md").read_text()
