"""The report: means and deviations, margins, tables, files."""

import csv
import json
import math
import types

import numpy as np
import pytest
from scipy import stats

import datasets
import utils
from config import Config
from detector.checkpoints import Record, Scored
from reporting import findings, report, tables
from utils import METRICS


def result(name: str, seed: int, auroc: float, **more) -> dict:
    counts = {"epoch": 3 + seed, "n_train": 40, "n_test": 60, "n_anomalous": 40, "seconds": 2.0}
    return dict.fromkeys(report.COLUMNS, auroc) | {"class": name, "seed": seed} | counts | more


def undefined(name: str, **more) -> dict:
    """The result of a class whose test images are of one label, or none."""
    return result(name, 0, float("nan"), **{"n_anomalous": 0} | more)


def record_of(labels: np.ndarray, scores: np.ndarray) -> Record:
    test = Scored(np.arange(len(labels)), labels, scores)
    return Record(
        result={"class": "cat", "seed": 7, "auroc": 0.8, "epoch": 3}, history=[], test=test,
        held_out_scores=np.empty(0), flow_scores={}, simple_scores={}, config={}, features={}, weights=None,
    )  # fmt: skip


def simple(low: float = 0.2, **aurocs: float) -> report.Found:
    """What findings.py tells of a class: simple detectors by their AUROC, and the flow's margin."""
    metrics = {method: dict.fromkeys(METRICS, auroc) for method, auroc in aurocs.items()}
    return report.Found(metrics, {"difference": 0.3, "low": low, "high": 0.6 - low})


AUROCS = [("red, round", 0, 0.8), ("red, round", 1, 0.9), ("b", 0, 0.6), ("b", 1, 0.6)]
RESULTS = [result(*each) for each in AUROCS]
FOUND = {"red, round": simple(0.2, kNN=0.5), "b": simple(-0.1, kNN=0.5)}


def summary_of(results=RESULTS, found=FOUND, features=None, **knobs) -> report.Summary:
    return report.summarize(Config(**knobs), results, found, 4000.0, features or {})


def rows_of(folder) -> list[dict]:
    with (folder / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_mean_and_deviation_over_seeds():
    """The deviation is the sample's (n - 1), of the seeds' means over the classes: .70 and .75."""
    found = [(row["auroc"], row["auroc_std"]) for row in summary_of().rows]
    spread = 0.1 / 2**0.5
    assert np.allclose(found, [(0.85, spread), (0.6, 0), (0.725, spread / 2)])


def test_margin_is_that_over_the_best_simple_detector():
    """With DeLong's interval."""
    generator = np.random.RandomState(0)
    labels = np.arange(40) % 2
    flow, good, bad = (generator.randn(40) + signal * labels for signal in (2.0, 1.0, 0.0))
    record, empty = record_of(labels, flow), datasets.Split.of([str(i) for i in range(40)], [0] * 40)
    cache = types.SimpleNamespace(labels=datasets.Labels((), empty, empty))
    assert findings.of_class(cache, None, findings.Left([record])) == report.Found()
    record.simple_scores = {"bad": bad, "good": good}
    found = findings.of_class(cache, None, findings.Left([record]))
    assert found.simple["bad"] == utils.detection_metrics(labels, bad)
    assert found.margin == utils.paired_difference(labels, flow, good)


def test_classes_are_counted_by_holms_correction():
    """Worked by hand: .01 x 4, then .02 x 3, then .03 x 2 is less than that, then .5. Of eight classes, an
    interval that just excludes zero is no win; of one, it is."""
    assert tables.holm(np.array([0.03, 0.01, 0.5, 0.02])) == pytest.approx([0.06, 0.04, 0.5, 0.06])

    def margin(difference: float, p: float) -> dict:
        half = 1.96 * abs(difference) / stats.norm.isf(p / 2)
        return {"difference": difference, "low": difference - half, "high": difference + half}

    sure, close, lost = margin(0.1, 1e-4), margin(0.1, 0.04), margin(-0.2, 1e-4)
    same = dict.fromkeys(("difference", "low", "high"), 0.0)
    unknown = dict.fromkeys(("difference", "low", "high"), math.nan)
    assert tables.wins_cell([close]) == "above 1, level 0, below 0"
    assert tables.wins_cell([sure, *[close] * 5, same, lost, unknown]) == "above 1, level 6, below 1"
    assert tables.wins_cell([unknown]) == "-"


def test_every_table_is_of_the_same_rows(tmp_path):
    """csv, md, terminal: each class and the mean, metrics, best simple detector, margin; md says how they
    were made."""
    text = report.write_results(tmp_path, summary := summary_of(clamp=2.5))
    first, second, mean = rows_of(tmp_path)
    assert [row["class"] for row in (first, second, mean)] == ["red, round", "b", "mean"]
    assert float(first["auroc"]) == pytest.approx(0.85) and float(mean["kNN"]) == 0.5
    about = [first[column] for column in ("dataset", "run", "seeds", "epoch", "n_train")]
    assert about == ["cifar10", "foad_mfff", "0 1", "3 4", "40"]
    assert (first["best_simple"], first["margin_low"], mean["n_train"]) == ("kNN", "0.2", "")
    header, rows, _ = report.main_table(summary)
    assert header[1:5] == ["AUROC", "AUPR", "FPR95", "oracle"]
    wanted = ["red, round", "0.8500 ± 0.0707", *["0.8500"] * 3, "0.5000", "+0.3000 [+0.2000, +0.4000]"]
    assert rows[0] == wanted and rows[2][-1] == "above 1, level 1, below 0"
    markdown = (tmp_path / "results.md").read_text()
    made = [summary.command, *(summary.versions[name] for name in ("commit", "torch", "machine"))]
    for told in (f"| {' | '.join(wanted)} |", *made, "seeds 0, 1", "4000 s", "| clamp | 2.5 |"):
        assert told in markdown, told
    assert "  ".join(wanted[1:]) in text.replace("       ", "  ")


@pytest.mark.parametrize("name", ["a,b", 'a "b"', "a\nb", " a ", "ü|<b>"])
def test_any_name_survives(tmp_path, name):
    report.write_results(tmp_path, summary_of([result(name, 0, 0.5)], {}))
    rows = rows_of(tmp_path)
    assert [row["class"] for row in rows] == [name, "mean"] and None not in rows[0]
    lines = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("|")][:4]
    assert "<b>" not in lines[2] and len({line.replace(r"\|", "").count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"n_test": 0}, "no test images"),
        ({"n_anomalous": 60}, "no normal test images"),
        ({"reason": "the loss is nan"}, "the loss is nan"),
    ],
)
def test_undefined_is_null_with_its_reason(tmp_path, more, reason):
    """Never a number; the mean is that of the other classes, and says so."""
    summary = summary_of([undefined("bare", **more), result("b", 0, 0.6)], {"b": FOUND["b"]})
    text = report.write_results(tmp_path, summary)
    bare, other, mean = rows_of(tmp_path)
    assert (bare["auroc"], bare["auroc_std"], bare["kNN"], bare["undefined"]) == ("", "", "", reason)
    assert other["undefined"] == "" and float(mean["auroc"]) == pytest.approx(0.6)
    assert mean["undefined"] == f"mean of 1 of 2 classes: {reason}"
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["classes"]["bare"]["auroc"] is None and kept["classes"]["bare"]["undefined"] == reason
    assert f"no AUROC ({reason}): bare." in text and text.splitlines()[2].split() == ["bare", *["-"] * 6]
    assert report.terminal_table(report.read_summary(tmp_path)) == text, "read again it is the same"


def test_the_mean_of_a_detector_is_over_all_classes_or_none():
    """One that only an easy class has is not the best of all."""
    found = {"easy": simple(kNN=0.97, PaDiM=0.99), "hard": simple(kNN=0.6)}
    easy, _, mean = summary_of([result("easy", 0, 0.9), result("hard", 0, 0.7)], found).rows
    assert (mean["best_simple"], mean["best_simple_auroc"]) == ("kNN", pytest.approx(0.785))
    assert (easy["best_simple"], easy["best_simple_auroc"]) == ("PaDiM", 0.99)


def test_auroc_of_each_kind_of_defect():
    """Normal images against those of one kind; over seeds, mean and deviation; images of other classes, whose
    kind is empty, are not looked at."""
    kinds = ["good", "good", "hole", "scratch", "hole", ""]
    seeds = ([1.0, 2.0, 3.0, 1.5, 3.0, 9.0], [1.0, 2.0, 0.0, 1.5, 3.0, 9.0])
    records = [record_of(np.array([0, 0, 1, 1, 1, 1]), np.array(scores)) for scores in seeds]
    table = findings.per_defect(records, kinds)
    assert table == {
        "hole": {"n": 2, "auroc": pytest.approx(0.75), "auroc_std": pytest.approx(0.5 / 2**0.5)},
        "scratch": {"n": 1, "auroc": 0.5, "auroc_std": 0.0},
    }
    assert findings.per_defect(records, ["good", "good", "hole", "hole", "hole", ""]) == {}, "one kind only"
