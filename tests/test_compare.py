"""The list of runs, and two runs side by side."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import new_process, script
from test_report import result

import utils
from config import Config, UserError
from report import main as show_runs
from reporting import compare, report
from shell.files import file_name, write_sealed

ROWS = list(range(40))
IMAGES = {"image_list": "i", "skipped": [], "precision": "float32"}
LABELS = [i % 2 for i in ROWS]


def scores_of(signal: float, seed: int = 0) -> list[float]:
    return (np.random.RandomState(seed).randn(len(ROWS)) + signal * np.array(LABELS)).tolist()


def write_run(
    root: Path, name: str, classes: dict[str, list], seed: int = 0, rows=ROWS, images=IMAGES, **knobs
):
    """A finished run: {class: scores}."""
    folder, results = root / name, []
    for class_name, scores in classes.items():
        auroc = utils.auroc(np.array(LABELS), np.array(scores))
        results.append(result(class_name, seed, auroc))
        record = {
            "result": results[-1],
            "history": [],
            "config": {},
            "features": {"kind": "map", "grid": [1, 1], "tokens": 2, "n_feat": 4, **images},
            "weights": None,
            "test": {"rows": rows, "labels": LABELS, "scores": scores},
            "held_out_scores": [],
            "simple_scores": {},
        }
        write_sealed(folder / "classes" / f"{file_name(class_name)}-seed{seed}.json", record)
    summary = report.summarize(Config(modelname=name, seed=seed, **knobs), results, {}, 1.0, {})
    report.write_results(folder, summary)
    return folder


def lines_of(text: str) -> dict[str, str]:
    """{first word: line}"""
    return {line.split()[0]: line for line in text.splitlines() if line.strip()}


def test_list_says_what_every_run_is(tmp_path):
    write_run(tmp_path, "done", {"a": scores_of(9.0)}, dataset="digits", extractor="efficientnet_lite0")
    os.utime(write_run(tmp_path, "sweep/one", {"a": scores_of(0.0)}) / "results.json", (2e9, 2e9))
    (write_run(tmp_path, "begun", {"a": scores_of(0.0)}) / "results.json").unlink()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/results.json").write_text("[]")
    text = compare.list_runs(tmp_path)
    lines = lines_of(text)
    assert max(map(len, text.splitlines())) <= 100
    for word in ("digits", "efficientnet_lite0", "paper", " 0 ", "1.0000", "finished"):
        assert word in lines["done"], word
    assert "2033-05-18" in lines["sweep/one"] and "finished" in lines["sweep/one"]
    assert lines["begun"].endswith("unfinished: 1") and lines["odd"].endswith("unreadable")


def test_list_tells_classes_that_are_newer_than_the_table(tmp_path):
    folder = write_run(tmp_path, "again", {"a": scores_of(1.0), "b": scores_of(1.0)})
    os.utime(folder / "results.json", (1e9, 1e9))
    os.utime(folder / "classes/a-seed0.json", (9e8, 9e8))
    assert lines_of(compare.list_runs(tmp_path))["again"].endswith("newer: 1")


def test_compare_pairs_each_class(tmp_path):
    """The difference and its interval are those of utils.paired_difference, B minus A."""
    weak, strong = scores_of(0.5), scores_of(4.0, 1)
    write_run(tmp_path, "a", {"x": weak, "y": strong, "z": weak}, clamp=2.0)
    write_run(tmp_path, "b", {"y": strong, "x": strong}, clamp=2.5)
    text = compare.compare("a", "b", tmp_path)
    wanted = utils.paired_difference(np.array(LABELS), np.array(strong), np.array(weak))
    assert wanted["low"] > 0
    lines = lines_of(text)
    assert report.margin_cell({"x": wanted}, "x") in lines["x"]
    assert lines["x"].split()[1:3] == [
        f"{utils.auroc(np.array(LABELS), np.array(s)):.4f}" for s in (weak, strong)
    ]
    assert "+0.0000 [+0.0000, +0.0000]" in lines["y"] and "above in 1 of 2" in lines["mean"]
    assert "only in a: z." in text
    assert lines["clamp"].split() == ["clamp", "2.0", "2.5"] and "modelname" not in text


@pytest.mark.parametrize(
    "change, told",
    [
        ({"rows": ROWS[::-1]}, "other test images"),
        ({"images": IMAGES | {"image_list": "other"}}, "other test images"),
        ({"images": IMAGES | {"skipped": ["x.png"]}}, "other test images"),
        ({"images": IMAGES | {"precision": "bfloat16"}}, "features in float32, bfloat16"),
        ({"seed": 1}, "no seed in common"),
        ({}, "no scores in b"),
    ],
)
def test_what_cannot_be_paired_is_told(tmp_path, change, told):
    write_run(tmp_path, "a", {"x": scores_of(1.0)})
    folder = write_run(tmp_path, "b", {"x": scores_of(1.0)}, **change)
    if not change:
        (folder / "classes/x-seed0.json").write_text("{}")
    lines = lines_of(compare.compare("a", str(folder), tmp_path))
    assert lines["x"].endswith(told) and lines["mean"].endswith("-")


def test_a_run_of_a_sweep_goes_by_its_whole_name(tmp_path):
    """However it is named: two sweeps may have the same value."""
    (tmp_path / "sweep").mkdir()
    folder = write_run(tmp_path / "sweep", "none", {"x": scores_of(1.0)})
    for name in ("sweep/none", str(folder)):
        assert compare.find_run(name, tmp_path).name == "sweep/none"
    assert compare.find_run(str(folder), tmp_path / "elsewhere").name == "none"


def test_runs_that_are_not_there(tmp_path):
    write_run(tmp_path, "a", {"x": scores_of(1.0)})
    write_run(tmp_path, "b", {"y": scores_of(1.0)})
    with pytest.raises(UserError, match="no finished run 'c'.*there are: a, b"):
        compare.find_run("c", tmp_path)
    with pytest.raises(UserError, match="no class in common"):
        compare.compare("a", "b", tmp_path)
    with pytest.raises(UserError, match="no runs in"):
        compare.list_runs(tmp_path / "elsewhere")
    (tmp_path / "a/results.json").write_text(json.dumps({"runs": {}}))
    with pytest.raises(UserError, match="run main.py again"):
        compare.find_run("a", tmp_path)


def test_script_prints_list_table_and_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs", "one", {"x": scores_of(1.0)})
    printed = []
    for names in ([], ["one"], ["one", "one"]):
        show_runs(SimpleNamespace(runs=names))
        printed.append(capsys.readouterr().out)
    assert "finished" in printed[0] and "FPR95" in printed[1] and "+0.0000" in printed[2]


@pytest.mark.slow
def test_script_ends_a_mistake_with_one_line(tmp_path):
    no_numpy = tmp_path / "without"
    (no_numpy / "numpy").mkdir(parents=True)
    (no_numpy / "numpy/__init__.py").write_text("raise ImportError")
    for arguments, told in ((("-h",), "RUN_A RUN_B"), (("a", "b", "c"), "two runs at most")):
        done = new_process("report.py", *arguments, cwd=tmp_path, PYTHONPATH=str(no_numpy))
        assert told in done.stdout + done.stderr, "before the slow imports"
        assert done.stderr.count("\n") <= 1
    done = script("report.py", "two", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "two" in done.stderr
