"""The table of what fusion and training add, from runs that are there."""

import itertools
import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from fabricated import JOINED, settings

sys.path.insert(0, str(ROOT / "tools"))

import ablation

import config
import main
import utils
from shell.values import parse_sweep


@pytest.fixture
def swept(cache, tmp_path, monkeypatch):
    """A sweep on a fabricated cache: two runs of two classes and seeds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.extractor, "ensure_features", lambda *_: cache)
    sweep = {"sweep": "fusion=none,class_attention", "class_name": "a,b", "n_seeds": 2, "keep": "results"}
    main.main(settings(modelname="swept", **JOINED | sweep, baselines=True, lr_init=0.05))
    return tmp_path / "runs" / "swept"


def rows_of(table: str) -> dict[str, list[str]]:
    lines = table.splitlines()[2:]
    return {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines}


def test_the_table_is_of_the_runs_that_are_there(swept):
    table, gains = ablation.tables([swept, swept.with_name("nothing")])
    lines = table.splitlines()
    titles = [f"{name}, {score}" for name in ("swept", "nothing") for score in ("whole score", "places")]
    assert lines[0] == f"| | {' | '.join(titles)} |"
    rows = rows_of(table)
    assert list(rows) == [row.words for row in ablation.ROWS]
    assert all(cells[2:] == ["not run", "not run"] for cells in rows.values())
    assert rows["hilo"][:2] == ["not run", "not run"]

    def mean(run: str, score: str, before: bool) -> float:
        """Of all seeds, or of the first alone."""
        names = f"*-seed{'0' if before else '*'}.json"
        records = [json.loads(path.read_text()) for path in (swept / run / "classes").glob(names)]
        assert len(records) == (2 if before else 4)
        found = []
        for record in records:
            scores = {"whole score": record["test"]["scores"]} | record["flow_scores"]
            title = f"{score}, before training" if before else score
            found.append(utils.auroc(np.array(record["test"]["labels"]), np.array(scores[title])))
        return sum(found) / len(found)

    assert rows["before training"] != rows["no fusion"]
    for words, run, before in ablation.ROWS[:3]:
        for cell, score in zip(rows[words], ("whole score", "places")):
            assert float(cell[:6]) == pytest.approx(mean(run, score, before), abs=1e-4), words
            assert (" ± " in cell) != before
    for words, cells in rows_of(gains).items():  # on the mean of the sets nothing, where one was not run
        assert cells[2:] == ["not run"] * 4
        if words == "class attention":
            shown = float(cells[0].split(" ± ")[0])
            assert shown == pytest.approx(
                float(rows[words][0][:6]) - float(rows["no fusion"][0][:6]), abs=2e-4
            )


def test_gains_are_paired_by_seed():
    """Seeds that differ much, and a gain that does not."""
    those = {0: np.array([0.5, 0.6]), 1: np.array([0.9, 0.8]), 2: np.array([0.1, 0.1])}
    these = {seed: values + 0.01 for seed, values in those.items() if seed != 2}
    gains = ablation.less(these, those)
    assert ablation.cells(gains, "{:+.4f}") == ["+0.0100 ± 0.0000"] * 2
    double = {seed: 3 * values for seed, values in gains.items()}
    assert ablation.cells(ablation.mean_over([gains, double]), "{:+.3f}") == ["+0.020 ± 0.0000"] * 2
    assert ablation.mean_over([gains, {}]) == {}


def test_rows_are_runs_of_the_preset():
    """Every row is of a run that the preset's sweep makes, and every fusion has one."""
    sweep = parse_sweep(config.PRESETS["ablation"]["sweep"])
    made = {"-".join(values) for values in itertools.product(*sweep.values())}
    shown = {row.run for row in ablation.ROWS}
    assert shown == made
