"""The report: means and deviations, tables, files."""

import csv
import json

import pytest

import report
from config import Config
from utils import METRICS


def result(name: str, seed: int, auroc: float) -> dict:
    columns = {metric: auroc for metric in report.COLUMNS}
    return columns | {
        "class": name,
        "seed": seed,
        "likelihood_auroc": auroc - 0.1,
        "latent_auroc": auroc - 0.2,
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


def test_table_has_every_metric_and_the_margin(summary):
    header, rows = report.make_table(summary)
    for metric in METRICS.values():
        assert any(column.startswith(metric.title) for column in header)
    assert [row[0] for row in rows] == ["red, round", "b", "mean"]
    assert rows[0][-1] == "+0.3000 [+0.2000, +0.4000]" and rows[2][-1] == "above in 1 of 2"
    assert rows[0][1] == "0.8500 ± 0.0707"


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
