"""The suite of data sets: its list, the joint bootstrap, its tables."""

import csv
import sys

import numpy as np
import pytest
from conftest import ROOT

import utils

sys.path.insert(0, str(ROOT / "benchmarks"))

import judging
import suite
from judging import Row


# ---------------------------------------------------------------- the joint bootstrap
def problem(name, rows, labels, **scores):
    aurocs = {title: [utils.auroc(labels, values)] for title, values in scores.items()}
    return judging.Problem(name, np.array(rows), np.array(labels), scores, aurocs)


def noisy(labels, signal, seed, step=0.5):
    """Scores in coarse steps: many are tied."""
    values = np.random.RandomState(seed).randn(len(labels)) + signal * np.array(labels)
    return np.round(values / step) * step


def pairs_won(labels, scores):
    """The AUROC, pair by pair."""
    normal, anomalous = scores[labels == 0], scores[labels == 1][:, None]
    return ((anomalous > normal) + 0.5 * (anomalous == normal)).mean()


def drawn_plainly(problems, kind, draws):
    """AUROCs (draws, classes, 2) of images drawn anew within each kind, one draw for all classes."""
    generator, found = np.random.RandomState(5), []
    for _ in range(draws):
        drawn = np.concatenate(
            [generator.choice(own, len(own)) for own in (np.flatnonzero(kind == k) for k in range(3))]
        )
        places = [np.argsort(p.rows)[drawn] for p in problems]
        found.append(
            [[pairs_won(p.labels[at], p.scores[t][at]) for t in "ab"] for p, at in zip(problems, places)]
        )
    return np.array(found)


def test_draws_are_those_of_a_plain_loop():
    """The mean, the spread of differences and what classes that share their images have in common, with ties,
    in whatever order a record has the images."""
    kind, rows, problems = np.arange(90) % 3, np.random.RandomState(9).permutation(90), []
    for i in range(3):
        labels, order = (kind != i).astype(int), rows if i else np.arange(90)
        a = noisy(labels, 1.0, i)
        b = a + 0.5 * noisy(labels, 0.5, 7 + i)
        problems.append(problem(str(i), order, labels[order], a=a[order], b=b[order]))
    ours, wanted = judging.resampled(problems, ["a", "b"], 4000, 0), drawn_plainly(problems, kind, 300)
    assert np.allclose(ours.mean(0), [[p.aurocs[title][0] for title in "ab"] for p in problems], atol=0.003)
    spreads = [(of[..., 0] - of[..., 1]).std(0) for of in (ours, wanted)]
    assert np.allclose(*spreads, rtol=0.25)
    assert np.isclose(*(of[..., 0].mean(1).std() for of in (ours, wanted)), rtol=0.25)
    together = [np.corrcoef(of[..., 0].T)[0, 1] for of in (ours, wanted)]
    assert abs(together[0] - together[1]) < 0.15


# ---------------------------------------------------------------- regret, and choices without a set
def row(name, class_name, detector, auroc, seed=0):
    return Row(detector, name, class_name, seed, auroc)


def test_leave_one_set_out():
    """What is best on a set has no part in the choice for it."""
    aurocs = {"plain": (0.9, 0.8, 0.7), "wide": (0.6, 0.9, 0.8), "deep": (0.7, 0.7, 1.0)}
    runs = {
        run: [row(name, "x", "whole", value) for name, value in zip("ABC", values)]
        for run, values in aurocs.items()
    }
    found = judging.leave_one_set_out(runs, "whole")
    assert [of[:3] for of in found] == [("A", "wide", 0.6), ("B", "deep", 0.7), ("C", "plain", 0.7)]
    assert [of[3:] for of in found] == [("plain", 0.9), ("wide", 0.9), ("deep", 1.0)]
    assert judging.leave_one_set_out(runs, "other") == []


# ---------------------------------------------------------------- the tables
def test_table():
    """Set one has two classes, and PaDiM; the whole score has two seeds."""
    labels, problems = np.arange(40) % 2, []
    for i, signal in enumerate((6.0, 5.0, 4.0)):
        scores = {suite.WHOLE: noisy(labels, signal, i), "kNN": noisy(labels, 0.5, 30 + i)}
        scores |= {"PaDiM": noisy(labels, 0.3, 60 + i)} if i < 2 else {}
        made = problem(str(i), np.arange(40) + 40 * i, labels, **scores)
        made.aurocs[suite.WHOLE].append(0.9)
        problems.append(made)
    header, lines = suite.make_table({"one": problems[:2], "two": problems[2:], "bad": None}, draws=500)
    rows = {row[0]: dict(zip(header, row)) for row in lines}
    first, knn = ([p.aurocs[title][0] for p in problems] for title in (suite.WHOLE, "kNN"))
    padim = [p.aurocs["PaDiM"][0] for p in problems[:2]]
    seeds = [np.mean([np.mean(first[:2]), first[2]]), 0.9]
    assert rows[suite.WHOLE]["mean"] == f"{np.mean(seeds):.4f} ± {np.std(seeds, ddof=1):.4f}"
    assert all(row["bad"] == "failed" for row in rows.values())
    assert rows["kNN"]["mean"] == f"{np.mean([np.mean(knn[:2]), knn[2]]):.4f}"
    assert rows["PaDiM"]["two"] == "" and rows["PaDiM"]["mean"] == f"({np.mean(padim):.4f})"
    best = rows[suite.BEST]
    assert best["one"] == f"{np.mean(np.maximum(knn[:2], padim)):.4f}" and best["two"] == rows["kNN"]["two"]
    title = "whole score - it [95 %]"
    difference = np.mean([np.mean(np.subtract(first, knn)[:2]), first[2] - knn[2]])
    assert rows["kNN"][title].startswith(f"{difference:+.4f} [+") and not rows[suite.WHOLE][title]
    assert rows["PaDiM"][title].startswith(f"({np.mean(np.subtract(first[:2], padim)):+.4f} [+")


SUITE = """
preset = "accurate"
extractor = "test_resnet"
[[set]]
name = "made"
dataset = "folder"
path = "images"
knobs = {{ img_size = "32x32", places = 4, fc_internal = 8, least_steps = 2, class_name = "apple,sky" }}
development = true
prepare = "python -c 'import shutil; shutil.copytree(\\"{folder}\\", \\"images\\")'"
[[set]]
name = "broken"
dataset = "folder"
path = "images"
knobs = {{ class_name = "nothing" }}
[[set]]
name = "away"
dataset = "mvtec"
path = "no/such"
"""


@pytest.mark.long
def test_the_suite_at_a_tiny_size(run_script, tmp_path, texture_folder):
    """A set that fails or is not there stops no other; the table has what the run has found."""
    (tmp_path / "suite.toml").write_text(SUITE.format(folder=texture_folder))
    knobs = ("--knobs", "threads=1", "weights_path=random")
    done = run_script("benchmarks/suite.py", "suite.toml", "--name", "s", *knobs, timeout=500)
    assert done.returncode == 2 and "error: failed: broken, main.py ended with status 2" in done.stderr
    text = (tmp_path / "results/s.md").read_text()
    assert "| detector | made | broken | mean |" in text and "| set | whole score - best simple |" in text
    assert "left out: away, no/such" in text and "preset accurate, test_resnet, seeds 0" in text
    found = {(row.of_class, row.detector): row.auroc for row in suite.read_csv(tmp_path / "results/s.csv")}
    lines = csv.DictReader((tmp_path / "runs/s-made/results.csv").read_text().splitlines())
    wanted = {line["class"]: float(line["auroc"]) for line in lines if line["class"] != "mean"}
    assert {name: found[name, suite.WHOLE] for name in ("apple", "sky")} == wanted
    assert {suite.IMAGE, suite.PLACES, "kNN, raw"} < {title for _, title in found}
    done = run_script("benchmarks/suite.py", "--compare", "results/s.csv")
    assert done.returncode == 0 and done.stdout.split("## Regret")[1].split("\n\n")[1] in text
    done = run_script("benchmarks/suite.py", "--compare", "results/s.csv", "results/../results/s.csv")
    assert done.returncode == 2 and "error: expected at least two sets" in done.stderr


def test_the_list_of_sets(tmp_path):
    """The committed one's are data sets of this program, and what prepares them is there; a mistake is
    told."""
    _, sets = suite.read_suite(ROOT / "benchmarks/suite.toml")
    assert {"digits", "textures", "cells", "cifar10"} < {entry.name for entry in sets}
    for entry in sets:
        assert entry.dataset in suite.knobs.DATASETS and entry.development
        assert not entry.prepare or (ROOT / entry.prepare.split()[1]).is_file()
    (tmp_path / "suite.toml").write_text('[[set]]\nname = "x"\ndata = "digits"')
    with pytest.raises(suite.knobs.UserError, match="suite.toml.*'data'"):
        suite.read_suite(tmp_path / "suite.toml")
