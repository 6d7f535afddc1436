"""The table of what each part adds, from runs that are there."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import ablation

from config import make_config, parse_values


def fabricate(folder, start: float, end: float) -> None:
    """A finished run of two classes whose AUROC training changed."""
    (folder / "classes").mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    for name, more in (("a", -0.1), ("b", 0.1)):
        record = {"history": [{"auroc": start + more}, {"auroc": 0.0}], "result": {"auroc": end + more}}
        (folder / "classes" / f"{name}-seed0.json").write_text(json.dumps(record))


def test_the_table_is_of_the_runs_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fabricate(tmp_path / "runs" / "ablation-digits-whole", 0.8, 0.85)
    fabricate(tmp_path / "runs" / "ablation-digits-nolow", 0.7, 0.75)
    lines = ablation.table(["digits", "textures"]).splitlines()
    assert len(lines) == 3 + len(ablation.ROWS)
    assert "before training" in lines[2] and lines[2].endswith("| 0.8000 | not run |")
    assert "alone" in lines[3] and lines[3].endswith("| 0.8500 | not run |")
    [low] = [line for line in lines if "low_depths" in line]
    assert low == "| without the low band | `--low_depths 0` | 0.7500 | not run |"


@pytest.mark.parametrize("name", ablation.ROWS)
def test_a_row_leaves_something_out(name):
    """Its knobs are knobs, and all but the first row's differ from the preset's."""
    assert (configured(ablation.ROWS[name].knobs) != configured(())) == (name != ablation.WHOLE)


def configured(knobs):
    knobs = (*knobs, "--modelname", ablation.name_of("digits", ablation.WHOLE))
    given = [part.removeprefix("--") for part in (*ablation.COMMON, *knobs)]
    return make_config(parse_values(dict(zip(given[::2], given[1::2], strict=True))))


def test_a_run_is_shared_and_a_failure_told(monkeypatch):
    """Every process has the row's knobs and its rank; one that fails stops the table."""
    started = []

    class Process:
        returncode = 2

        def __init__(self, command):
            started.append(list(map(str, command)))

        def wait(self):
            return self.returncode if len(started) > 2 else 0

    monkeypatch.setattr(ablation.subprocess, "Popen", Process)
    ablation.run(["--dataset", "digits"], "ablation-digits-nomirror", ablation.ROWS["nomirror"], 2)
    assert [command[-3:] for command in started] == [[str(r), "--world_size", "2"] for r in (0, 1)]
    assert all(
        "--mirror" in command and "features/ablation-digits-nomirror" in command for command in started
    )
    with pytest.raises(ablation.subprocess.CalledProcessError):
        ablation.run(["--dataset", "digits"], "ablation-digits-whole", ablation.ROWS["whole"], 1)
