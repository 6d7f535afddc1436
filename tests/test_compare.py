"""The list of runs, and two runs side by side."""

import dataclasses

import numpy as np
import pytest
from conftest import script
from test_report import result

import report as command
import utils
from config import Config
from detector import checkpoints
from reporting import report
from reporting.tables import margin_cell
from shell.files import file_name, write_sealed

LABELS = [i % 2 for i in range(40)]
IMAGES = {"image_list": "i", "skipped": [], "precision": "float32"}


def scores_of(signal: float, seed: int = 0) -> list[float]:
    return (np.random.RandomState(seed).randn(len(LABELS)) + signal * np.array(LABELS)).tolist()


def write_run(root, name: str, classes: dict[str, list], seed: int = 0, images=IMAGES, **knobs):
    """A finished run: {class: scores}."""
    folder, results = root / name, []
    for class_name, scores in classes.items():
        results.append(result(class_name, seed, utils.auroc(np.array(LABELS), np.array(scores))))
        record = checkpoints.Record(
            result=results[-1], history=[], config={}, weights=None, held_out_scores=[], flow_scores={},
            features={"kind": "map", "grid": [1, 1], "tokens": 2, "n_feat": 4, **images},
            test=checkpoints.Scored(list(range(len(LABELS))), LABELS, scores), simple_scores={},
        )  # fmt: skip
        path = folder / "classes" / f"{file_name(class_name)}-seed{seed}.json"
        write_sealed(path, dataclasses.asdict(record))
    summary = report.summarize(Config(modelname=name, seed=seed, **knobs), results, {}, 1.0, {})
    report.write_results(folder, summary)
    return folder


def lines_of(text: str) -> dict[str, str]:
    """{first word: line}"""
    return {line.split()[0]: line for line in text.splitlines() if line.strip()}


def test_list_says_what_every_run_is(tmp_path):
    write_run(tmp_path, "done", {"a": scores_of(9.0)}, dataset="digits", extractor="efficientnet_lite0")
    (write_run(tmp_path, "grid/begun", {"a": scores_of(0.0)}) / "results.json").unlink()
    (write_run(tmp_path, "odd", {"a": scores_of(0.0)}) / "results.json").write_text("[]")
    lines = lines_of(text := command.list_runs(tmp_path))
    assert max(map(len, text.splitlines())) <= 100
    assert lines["done"].split()[1:6] == ["digits", "efficientnet_lite0", "paper", "0", "1.0000"]
    assert "no report" in lines["grid/begun"] and "another version" in lines["odd"]


def test_compare_pairs_each_class(tmp_path):
    """The difference and its interval are those of utils.paired_difference, B minus A."""
    weak, strong = scores_of(0.5), scores_of(4.0, 1)
    write_run(tmp_path, "a", {"x": weak, "y": strong, "z": weak}, clamp=2.0)
    write_run(tmp_path, "b", {"y": strong, "x": strong}, clamp=2.5)
    lines = lines_of(text := command.compare(["a", "b"], tmp_path))
    wanted = utils.paired_difference(np.array(LABELS), np.array(strong), np.array(weak))
    assert wanted["low"] > 0 and margin_cell(wanted) in lines["x"] and "z" not in lines
    aurocs = [f"{utils.auroc(np.array(LABELS), np.array(scores)):.4f}" for scores in (weak, strong)]
    assert lines["x"].split()[1:3] == aurocs
    assert "+0.0000 [+0.0000, +0.0000]" in lines["y"] and "above 1, level 1, below 0" in lines["mean"]
    assert lines["clamp"].split() == ["clamp", "2.0", "2.5"] and "modelname" not in text


@pytest.mark.parametrize(
    "change, told",
    [
        ({"images": IMAGES | {"image_list": "j"}}, "other test images or precision"),
        ({"images": IMAGES | {"precision": "bfloat16"}}, "other test images or precision"),
        ({"seed": 1}, "no seed in common"),
    ],
)
def test_what_cannot_be_paired_is_told(tmp_path, change, told):
    write_run(tmp_path, "a", {"x": scores_of(1.0)})
    folder = write_run(tmp_path, "b", {"x": scores_of(1.0)}, **change)
    lines = lines_of(command.compare(["a", str(folder)], tmp_path))
    assert lines["x"].endswith(told) and lines["mean"].endswith("-")


def test_script(tmp_path):
    write_run(tmp_path / "runs", "one", {"x": scores_of(1.0)})
    write_run(tmp_path / "runs", "other", {"y": scores_of(1.0)})
    for names, told in (((), "data set"), (("one",), "FPR95"), (("one", "one"), "+0.0000")):
        assert told in script("report.py", *names, cwd=tmp_path).stdout
    for names, told in ((("two",), "no report of 'two'"), (("one", "other"), "no class in common")):
        done = script("report.py", *names, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr
