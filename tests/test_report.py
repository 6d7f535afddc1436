"""The report: means and deviations, tables, files."""

import csv
import json
import math

import pytest

from config import Config
from detector.calibration import Threshold
from reporting import findings, report, tables
from utils import METRICS


def result(name: str, seed: int, auroc: float) -> dict:
    columns = {metric: auroc for metric in report.COLUMNS}
    return columns | {
        "class": name,
        "seed": seed,
        "likelihood_auroc": auroc - 0.1,
        "latent_auroc": auroc - 0.2,
        "epoch": 3 + seed,
        "n_train": 40,
        "n_test": 60,
        "n_anomalous": 40,
        "seconds": 2.0 + seed,
    }


RESULTS = [
    result(name, seed, auroc) for name, seed, auroc in (("red, round", 0, 0.8), ("red, round", 1, 0.9))
]
RESULTS += [result("b", 0, 0.6), result("b", 1, 0.6)]
SIMPLE = {
    name: {
        "metrics": {"kNN": {metric: 0.5 for metric in METRICS}},
        "best": "kNN",
        "margin": {"difference": 0.3, "low": low, "high": 0.4},
    }
    for name, low in (("red, round", 0.2), ("b", -0.1))
}


@pytest.fixture
def summary() -> dict:
    return report.summarize(Config(n_seeds=2), RESULTS, SIMPLE, 12.0, {})


def test_mean_and_deviation_over_seeds(summary):
    """The deviation is the sample's (n - 1), of the seeds' means over the classes."""
    assert summary["classes"]["red, round"]["auroc"] == pytest.approx(0.85)
    assert summary["classes"]["red, round"]["auroc_std"] == pytest.approx(0.1 / 2**0.5)
    assert summary["mean"]["auroc"] == pytest.approx(0.725)
    assert summary["mean"]["auroc_std"] == pytest.approx(0.05 / 2**0.5)  # of .70 and .75
    assert summary["classes"]["b"]["auroc_std"] == 0


def test_csv_survives_a_comma_in_a_name(summary, tmp_path):
    report.write_results(tmp_path, summary)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["method"], row["class"]) for row in rows] == [
        (method, name) for method in ("flow", "kNN") for name in ("red, round", "b", "mean")
    ]
    assert float(rows[0]["auroc"]) == pytest.approx(0.85) and float(rows[3]["auroc"]) == 0.5
    assert json.loads((tmp_path / "results.json").read_text())["mean"]["auroc"] == pytest.approx(0.725)


def test_the_positive_class_and_its_share_are_named():
    told = " ".join(report.notes(report.summarize(Config(n_seeds=2), RESULTS, {}, 12.0, {})))
    assert "anomalies are the positive class, 66.7% of a class's test images" in told
    rarer = result("c", 0, 0.5) | {"n_anomalous": 15}
    told = " ".join(report.notes(report.summarize(Config(), [*RESULTS[::2], rarer], {}, 12.0, {})))
    assert "25.0% to 66.7% of" in told


def test_table_has_every_metric_and_the_margin(summary):
    header, rows = report.make_table(summary)
    for metric in METRICS.values():
        assert any(column.startswith(metric.title) for column in header)
    assert [row[0] for row in rows] == ["red, round", "b", "mean"]
    assert rows[0][-1] == "+0.3000 [+0.2000, +0.4000]" and rows[2][-1] == "above in 1 of 2"
    assert rows[0][1] == "0.8500 ± 0.0707"


def undefined(name: str, seed: int = 0, n_test: int = 60, n_anomalous: int = 0) -> dict:
    """The result of a class whose test images are of one label, or none."""
    return result(name, seed, float("nan")) | {"n_test": n_test, "n_anomalous": n_anomalous}


def rows_of(text: str) -> list[dict]:
    return list(csv.DictReader(text.splitlines(keepends=True)))


def test_csv_says_what_each_row_is_of(summary):
    rows = rows_of(report.as_csv(summary))
    flow, mean, simple = rows[0], rows[2], rows[3]
    assert (flow["dataset"], flow["run"], flow["seeds"]) == ("cifar10", "foad_mfff", "0 1")
    assert (flow["epoch"], flow["n_train"], flow["n_test"], flow["seconds"]) == ("3 4", "40", "60", "2.5")
    assert (mean["epoch"], mean["n_train"], mean["undefined"]) == ("", "", "")
    assert (simple["method"], simple["epoch"], simple["seconds"]) == ("kNN", "", ""), "no fit of the flow's"
    assert (simple["n_train"], simple["seeds"]) == ("40", "0")


@pytest.mark.parametrize("name", ["a,b", 'a "b"', "a\nb", " a ", "=1+1", "ü|<b>"])
def test_csv_survives_any_name(tmp_path, name):
    summary = report.summarize(Config(), [result(name, 0, 0.5)], {}, 1.0, {})
    report.write_results(tmp_path, summary)
    with (tmp_path / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["class"] for row in rows] == [name, "mean"] and None not in rows[0]
    markdown = (tmp_path / "results.md").read_text().splitlines()
    lines = [line for line in markdown if line.startswith("|")]
    assert len(lines) == 4 and "<b>" not in lines[2], "a header, a rule, a class and the mean"
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1, "as many cells in each"


@pytest.mark.parametrize(
    "counts, reason",
    [
        ({"n_test": 0}, "no test images"),
        ({"n_anomalous": 0}, "no anomalous test images"),
        ({"n_anomalous": 60}, "no normal test images"),
    ],
)
def test_undefined_is_empty_with_its_reason(tmp_path, counts, reason):
    """Never a number; the mean is that of the other classes, and says so."""
    results = [undefined("bare", **counts), result("b", 0, 0.6)]
    summary = report.summarize(Config(), results, {}, 1.0, {})
    text = report.write_results(tmp_path, summary)
    bare, other, mean = rows_of((tmp_path / "results.csv").read_text())
    assert (bare["auroc"], bare["auroc_std"], bare["fpr95"], bare["undefined"]) == ("", "", "", reason)
    assert other["undefined"] == "" and float(mean["auroc"]) == pytest.approx(0.6)
    assert mean["undefined"] == f"mean of 1 of 2 classes: {reason}"
    kept = json.loads((tmp_path / "results.json").read_text())["classes"]["bare"]
    assert kept["auroc"] is None and kept["undefined"] == reason
    assert f"no AUROC ({reason}): bare." in text and "nan" not in text
    assert "nan" not in (tmp_path / "results.md").read_text()


LINE = Threshold(1.25, 0.1, 0.01, 0.3, 9, 0.05)


def test_thresholds_are_what_normal_images_alone_give(tmp_path):
    """No row of dashes on screen; beside an AUROC they stand in the files only."""
    lines = {"a": LINE, "b": None}
    summary = report.summarize(Config(), [undefined("a", n_test=0)], {}, 1.0, {}, None, lines)
    text = report.write_results(tmp_path, summary)
    assert " ".join(text.splitlines()[2].split()) == "a 1.25 10.0% 1.0% to 30.0% 9"
    assert "no AUROC (no test images): a." in text and "oracle" not in text
    assert "| a | 1.25 | 10.0% | 1.0% to 30.0% | 9 |" in (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["thresholds"]["a"]["n"] == 9
    tested = report.summarize(Config(), [result("a", 0, 0.5)], {}, 1.0, {}, None, lines)
    assert "30.0%" not in report.terminal_table(tested) and "30.0%" in report.as_markdown(tested)


def test_a_class_without_simple_detectors_stands_beside_others(tmp_path):
    """One that could not be fitted, or has no test images."""
    results = [undefined("bare") | {"reason": "the loss is nan"}, result("b", 0, 0.6)]
    summary = report.summarize(Config(), results, {"b": SIMPLE["b"]}, 1.0, {})
    _, rows = report.make_table(summary)
    assert rows[0][-2:] == ["-", "-"] and rows[1][-2:] == ["0.5000", "+0.3000 [-0.1000, +0.4000]"]
    lines = report.write_results(tmp_path, summary).splitlines()
    assert lines[2].split() == ["bare", *["-"] * 6] and "no AUROC (the loss is nan): bare." in lines


def test_a_class_may_be_called_mean(tmp_path):
    simple = {
        "mean": SIMPLE["b"] | {"metrics": {"kNN": {metric: 0.9 for metric in METRICS}}},
        "b": SIMPLE["b"],
    }
    summary = report.summarize(Config(), [result("mean", 0, 0.9), result("b", 0, 0.6)], simple, 1.0, {})
    _, rows = report.make_table(summary)
    assert [row[1] for row in rows] == ["0.9000", "0.6000", "0.7500"]
    assert [row[-2] for row in rows] == ["0.9000", "0.5000", "0.7000"]
    assert [row[-1][:5] for row in rows] == ["+0.30", "+0.30", "above"]
    found = [(row["n_train"], row["auroc"][:4]) for row in rows_of(report.as_csv(summary))[:3]]
    assert found == [("40", "0.9"), ("40", "0.6"), ("", "0.75")]


def test_nothing_defined_at_all(tmp_path):
    summary = report.summarize(Config(n_seeds=2), [undefined("a"), undefined("a", 1)], {}, 1.0, {})
    assert math.isnan(summary["mean"]["auroc"])
    assert "0.0" not in report.write_results(tmp_path, summary).splitlines()[2]


def test_terminal_table_fits(summary):
    """Long names, many baselines, several seeds: 100 columns, and nothing of the names' ends lost."""
    long = "large_man-made_outdoor_things_and_more_of_them"
    results = [result(long, seed, 0.5 + seed / 10) for seed in (0, 1)] + RESULTS
    metrics = {f"baseline number {i}": {metric: i / 10 for metric in METRICS} for i in range(8)}
    margin = {"difference": -0.12345, "low": -0.2, "high": 0.1}
    simple = {
        name: {"metrics": metrics, "best": "baseline number 7", "margin": margin}
        for name in (long, "red, round", "b")
    }
    text = report.terminal_table(report.summarize(Config(n_seeds=2), results, simple, 1.0, {}))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2].startswith("large_man-m") and "_of_them " in lines[2] and "…" in lines[2]
    assert "0.5500 ± 0.0707" in lines[2] and " 0.7000 " in lines[2], "the best baseline stands there"
    assert "baseline number 7 0.7000; baseline number 6 0.6000" in " ".join(text.split())


def test_shortened_names():
    assert tables.shorten("abcdefghij", 10) == "abcdefghij"
    assert tables.shorten("abcdefghijk", 10) == "abcde…hijk" and tables.shorten("a\n b", 10) == "a b"


def test_per_defect_auroc():
    """Normal images against those of one kind; over seeds, mean and deviation; images of other classes are
    not looked at."""
    kinds = ["good", "good", "hole", "scratch", "hole", "good"]
    labels, rows = [0, 0, 1, 1, 1], [0, 1, 2, 3, 4]
    records = [
        {"test": {"rows": rows, "labels": labels, "scores": scores}}
        for scores in ([1.0, 2.0, 3.0, 1.5, 3.0], [1.0, 2.0, 0.0, 1.5, 3.0])
    ]
    table = findings.per_defect(records, kinds)
    assert table["hole"] == {
        "n": 2,
        "auroc": pytest.approx(0.75),
        "auroc_std": pytest.approx(0.5 / 2**0.5),
    }
    assert table["scratch"] == {"n": 1, "auroc": 0.5, "auroc_std": 0.0}
    assert findings.per_defect(records, ["good", "good", "hole", "hole", "hole", ""]) == {}, "one kind only"


def test_images_of_another_class_are_no_kind_of_defect():
    test = {"rows": [0, 1, 2, 3], "labels": [0, 1, 1, 1], "scores": [0.0, 1.0, 2.0, 3.0]}
    assert list(findings.per_defect([{"test": test}], ["", "", "hole", "scratch"])) == ["hole", "scratch"]


def test_the_mean_of_a_detector_is_over_all_classes_or_none(tmp_path):
    """One that only an easy class has is not the best of all."""

    def entry(**aurocs):
        metrics = {name: dict.fromkeys(METRICS, auroc) for name, auroc in aurocs.items()}
        return {"metrics": metrics, "best": max(aurocs), "margin": SIMPLE["b"]["margin"]}

    simple = {"easy": entry(kNN=0.97, PaDiM=0.99), "hard": entry(kNN=0.6)}
    summary = report.summarize(Config(), [result("easy", 0, 0.9), result("hard", 0, 0.7)], simple, 1.0, {})
    assert report.best_simple(summary, None) == ("kNN", pytest.approx(0.785))
    assert report.best_simple(summary, "easy") == ("PaDiM", 0.99)
    assert "PaDiM" not in report.write_results(tmp_path, summary)


def test_a_run_whose_simple_detectors_have_no_auroc_is_shown_again(tmp_path):
    """Of a test of one label: results.json has null where the run had NaN."""
    nothing = {"metrics": {"kNN": dict.fromkeys(METRICS, math.nan)}, "best": "kNN", "margin": {}}
    nothing["margin"] = dict.fromkeys(("difference", "low", "high"), math.nan)
    summary = report.summarize(Config(), [undefined("a", n_anomalous=0)], {"a": nothing}, 1.0, {})
    text = report.write_results(tmp_path, summary)
    again = json.loads((tmp_path / "results.json").read_text())
    assert report.terminal_table(again) == report.terminal_table(summary) and "kNN" not in text


def test_defects_stand_in_the_markdown():
    defects = {"b": {"hole": {"n": 7, "auroc": 0.75, "auroc_std": 0.1}}}
    summary = report.summarize(Config(n_seeds=2), RESULTS, {}, 1.0, {}, defects)
    assert "| b | hole | 7 | 0.7500 ± 0.1000 |" in report.as_markdown(summary)


def test_sweep_table_takes_each_column_from_its_own_run():
    sweep = {"fusion": ["none", "hilo"], "dataset": ["digits", "cifar10"]}
    summaries = {}
    for i, values in enumerate((f, d) for f in sweep["fusion"] for d in sweep["dataset"]):
        summaries[values] = report.summarize(Config(), [result("a", 0, 0.5 + i / 10)], {}, 1.0, {})
    header, rows = report.sweep_table(sweep, summaries)
    assert header == ["fusion", "digits", "cifar10"]
    assert rows == [["none", "0.5000", "0.6000"], ["hilo", "0.7000", "0.8000"]]


def test_sweep_file_names_each_score(tmp_path):
    sweep = {"fusion": ["none"]}
    report.write_sweep(
        tmp_path, sweep, {("none",): report.summarize(Config(), RESULTS[:1], {}, 1.0, {})}, 1.0
    )
    text = (tmp_path / "sweep.md").read_text()
    for title, value in (("mean z²", "0.6000"), ("negative log-likelihood", "0.7000")):
        assert value in text.split(f"scored by {title}")[1].split("scored by")[0], title
