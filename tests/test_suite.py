"""The suite of data sets: its list, the joint bootstrap, its table."""

import argparse
import sys

import numpy as np
import pytest
from conftest import ROOT, tree

import datasets
import utils
from config import UserError
from shell.files import write_json, write_sealed

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tools"))

import bootstrap
import cells
import suite


# ---------------------------------------------------------------- the joint bootstrap
def problem(name, rows, labels, **scores):
    aurocs = {title: [utils.auroc(labels, values)] for title, values in scores.items()}
    return bootstrap.Problem(name, np.array(rows), np.array(labels), scores, aurocs)


def noisy(labels, signal, seed, step=0.5):
    """Scores in coarse steps: many are tied."""
    values = np.random.RandomState(seed).randn(len(labels)) + signal * np.array(labels)
    return np.round(values / step) * step


def shared(n=30, kinds=3):
    """Classes that share their test images, as one against the others: ``b`` is right about ``a``'s noise."""
    kind = np.arange(n * kinds) % kinds
    rows = np.random.RandomState(9).permutation(n * kinds)
    found = []
    for i in range(kinds):
        labels = (kind != i).astype(int)
        a = noisy(labels, 1.0, i)
        order = rows if i else np.arange(n * kinds)  # in whatever order a record has them
        by_row = {"a": a, "b": a + 0.5 * noisy(labels, 0.5, 7 + i)}
        scores = {title: values[order] for title, values in by_row.items()}
        found.append(problem(str(i), order, labels[order], **scores))
    return found, kind


def test_placements_are_the_shares_of_images_on_the_right_side():
    labels, scores = np.array([0, 1, 0, 1, 1]), np.array([1.0, 1.0, 2.0, 3.0, 0.0])
    assert utils.placements(labels, scores).tolist() == [0.5, 0.25, 1 / 3, 1.0, 0.0]
    labels = np.arange(60) % 3 // 2
    for label in (0, 1):
        placed = utils.placements(labels, noisy(labels, 0.7, 1))[labels == label]
        assert np.isclose(placed.mean(), pairs_won(labels, noisy(labels, 0.7, 1)))


def pairs_won(labels, scores):
    """The AUROC, pair by pair."""
    normal, anomalous = scores[labels == 0], scores[labels == 1][:, None]
    return ((anomalous > normal) + 0.5 * (anomalous == normal)).mean()


def plain(problems, kind, draws):
    """AUROCs (draws, classes, 2) of images drawn anew within each kind, one draw for all classes."""
    generator, found = np.random.RandomState(5), []
    for _ in range(draws):
        drawn = np.concatenate(
            [generator.choice(own, len(own)) for own in (np.flatnonzero(kind == k) for k in set(kind))]
        )
        row = []
        for p in problems:
            place = np.argsort(p.rows)[drawn]
            row.append([pairs_won(p.labels[place], p.scores[title][place]) for title in "ab"])
        found.append(row)
    return np.array(found)


def test_draws_are_those_of_a_plain_loop():
    """The mean, the spread of differences and what classes have in common, with ties."""
    problems, kind = shared()
    ours, wanted = bootstrap.resampled(problems, ["a", "b"], 4000, 0), plain(problems, kind, 300)
    assert np.allclose(ours.mean(0), [[p.aurocs[title][0] for title in "ab"] for p in problems], atol=0.003)
    for of in (ours, wanted):
        assert np.isfinite(of).all()
    difference = [(of[..., 0] - of[..., 1]).std(0) for of in (ours, wanted)]
    assert np.allclose(*difference, rtol=0.25)
    assert np.isclose(*(of[..., 0].mean(1).std() for of in (ours, wanted)), rtol=0.25)
    together = [np.corrcoef(of[..., 0].T)[0, 1] for of in (ours, wanted)]
    assert abs(together[0] - together[1]) < 0.15


def test_classes_with_their_own_images_are_drawn_apart():
    """And those with the same images together."""
    labels = np.arange(80) % 2
    apart = [problem(str(i), np.arange(80) + 80 * i, labels, a=noisy(labels, 1.0, 1)) for i in range(2)]
    same = [p._replace(rows=np.arange(80)) for p in apart]
    for problems, wanted in ((apart, 0.0), (same, 1.0)):
        assert abs(np.corrcoef(bootstrap.resampled(problems, ["a"], 2000, 0)[..., 0].T)[0, 1] - wanted) < 0.1


def test_weights_stay_within_labels():
    """Exact where the AUROC is linear in the weights: one normal image, drawn always."""
    labels, scores = np.array([0, 1, 1, 1, 1]), np.array([2.0, 1.0, 2.0, 3.0, 4.0])
    found = bootstrap.resampled([problem("x", range(5), labels, a=scores)], ["a"], 3000, 0)[:, 0, 0]
    assert {*np.unique(found.round(9) * 8)} == set(map(float, range(9)))


def test_holm():
    assert np.allclose(bootstrap.holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    assert bootstrap.holm(np.array([0.9, 0.8])).max() == 1


def test_wins_levels_and_losses():
    labels = np.arange(100) % 2
    strong, weak = noisy(labels, 4.0, 1, 0.01), noisy(labels, 0.5, 2, 0.01)
    pairs = ((strong, weak), (weak, strong), (weak, weak), (weak, noisy(labels, 0.5, 3, 0.01)))
    problems = [problem(str(i), np.arange(100) + 100 * i, labels, a=a, b=b) for i, (a, b) in enumerate(pairs)]
    judged = bootstrap.judge(problems, ["a", "b"], ["b"], 500, 0)
    found = bootstrap.difference([judged], 0, 1)
    assert found["wins"] == "1 / 2 / 1 (1 / 2 / 1)" and found["sets"] == 1
    assert found["low"] < found["difference"] < found["high"]
    assert np.isclose(found["difference"], np.mean(judged.points[:, 0] - judged.points[:, 1]))


# ---------------------------------------------------------------- the table
LABELS = [i % 2 for i in range(40)]


def write_run(name, classes, simple, seeds=(0,), first_row=0):
    """A finished run in runs/ as main.py leaves it; ``classes``: {class: signal of the whole score}."""
    folder = suite.Path("runs") / name
    for number, (class_name, signal) in enumerate(classes.items()):
        for seed in seeds:
            record = {
                "result": {"class": class_name, "seed": seed},
                "history": [],
                "config": {},
                "features": {"kind": "map", "grid": [1, 1], "tokens": 2, "n_feat": 4},
                "weights": None,
                "test": {
                    "rows": list(range(first_row + 40 * number, first_row + 40 * number + 40)),
                    "labels": LABELS,
                    "scores": noisy(LABELS, signal, seed).tolist(),
                },
                "flow_scores": {
                    "whole score, before training": noisy(LABELS, 0.0, 20 + seed).tolist(),
                    "image part": noisy(LABELS, 0.0, 40 + seed).tolist(),
                    "places": noisy(LABELS, signal, 10 + seed).tolist(),
                    "places, before training": noisy(LABELS, 0.0, 50 + seed).tolist(),
                    "likelihood": noisy(LABELS, signal, 60 + seed).tolist(),
                    "latent": noisy(LABELS, signal, 70 + seed).tolist(),
                },
                "simple_scores": {
                    title: noisy(LABELS, s, 30).tolist() for title, s in simple.items() if not seed
                },
                "held_out_scores": [],
                "own_input_scores": {},
            }
            write_sealed(folder / "classes" / f"{class_name}-seed{seed}.json", record)
    summary = {"classes": dict.fromkeys(classes, {}), "mean": {}, "config": {}, "seeds": list(seeds)}
    write_json(folder / "results.json", summary | {"features": {"precision": "float32"}})


def mean_auroc(signals, seed):
    return np.mean([utils.auroc(np.array(LABELS), noisy(LABELS, signal, seed)) for signal in signals])


def cells_of(table):
    return {row[0]: dict(zip(table[0], row)) for row in table[1]}


def test_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("s-one", {"x": 6.0, "y": 5.0}, {"kNN": 0.5, "PaDiM": 0.3}, seeds=(0, 1))
    write_run("s-two", {"z": 4.0}, {"kNN": 0.2}, seeds=(0, 1))
    found = {name: suite.read_problems(suite.Path("runs") / f"s-{name}")[0] for name in ("one", "two")}
    table = suite.make_table(found | {"bad": None}, draws=500)
    rows = cells_of(table)
    assert [row[0] for row in table[1]] == [*suite.OURS, "kNN", "PaDiM", suite.BEST]
    per_seed = np.array([[mean_auroc((6.0, 5.0), seed), mean_auroc((4.0,), seed)] for seed in (0, 1)])
    for i, name in enumerate(("one", "two")):
        assert rows[suite.WHOLE][name] == suite.auroc_cell(per_seed[:, i])
    assert (
        rows[suite.WHOLE]["mean"] == suite.auroc_cell(per_seed.mean(1)) and "±" in rows[suite.WHOLE]["mean"]
    )
    assert all(row["bad"] == "failed" for row in rows.values())
    simple = [mean_auroc((0.5,), 30), mean_auroc((0.2,), 30)]
    assert rows["kNN"]["mean"] == f"{np.mean(simple):.4f}"
    places = mean_auroc((0.3,), 30)
    assert rows["PaDiM"]["two"] == "" and rows["PaDiM"]["mean"] == f"({places:.4f})"
    assert (
        rows[suite.BEST]["one"] == f"{max(simple[0], places):.4f}"
        and rows[suite.BEST]["two"] == rows["kNN"]["two"]
    )

    margin = rows["kNN"]["whole score - it [95 %]"]
    first = [mean_auroc((6.0, 5.0), 0), mean_auroc((4.0,), 0)]
    assert margin.startswith(f"{np.mean(first) - np.mean(simple):+.4f} [+")
    assert rows["PaDiM"]["whole score - it [95 %]"].startswith(f"({first[0] - places:+.4f} [+")
    assert table[1][len(suite.OURS)][-3] == "3 / 0 / 0 (3 / 0 / 0)"
    for ours in suite.JUDGED:
        compared = {title for title, row in rows.items() if row[f"{ours} - it [95 %]"]}
        others = {title for title, against in suite.OURS.items() if ours in against}
        assert compared == others | {"kNN", "PaDiM", suite.BEST}


def test_only_what_the_run_reports_is_read(tmp_path, monkeypatch):
    """Not the classes and seeds that an earlier run left in its folder; an altered record is told."""
    monkeypatch.chdir(tmp_path)
    write_run("s-one", {"x": 6.0, "y": 5.0}, {"kNN": 0.5}, seeds=(0, 1))
    write_run("s-one", {"x": 6.0}, {"kNN": 0.5})
    [found], _ = suite.read_problems(suite.Path("runs/s-one"))
    assert found.name == "x" and {len(values) for values in found.aurocs.values()} == {1}
    path = suite.Path("runs/s-one/classes/x-seed0.json")
    path.write_text(path.read_text().replace("kNN", "KNN"))
    with pytest.raises(ValueError, match="was changed"):
        suite.read_problems(suite.Path("runs/s-one"))


SUITE = """
extractor = "resnet18"
[[set]]
name = "one"
dataset = "digits"
development = true
[[set]]
name = "broken"
dataset = "digits"
[[set]]
name = "away"
dataset = "mvtec"
path = "no/such"
"""


def arguments(path, **more):
    given = {"preset": None, "only": None, "seeds": 1, "trial": False, "knobs": [], "name": "s", "out": None}
    return argparse.Namespace(suite=path, **(given | more))


def test_sets_that_fail_or_are_missing_stop_no_other(tmp_path, monkeypatch, capsys):
    """The fits themselves are replaced by runs that are finished or fail."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.toml").write_text(SUITE)
    write_run("s-one", {"x": 6.0}, {"kNN": 0.5})
    finished = {"one": "exit(0)", "broken": "exit(2)"}
    monkeypatch.setattr(suite, "command_of", lambda entry, *_: [sys.executable, "-c", finished[entry.name]])
    with pytest.raises(UserError, match="failed: broken, main.py ended with status 2"):
        suite.main(arguments(tmp_path / "suite.toml", knobs=["extractor=resnet10t"]))
    assert "left out: away, no/such is not there" in capsys.readouterr().out
    text = (tmp_path / "results/s.md").read_text()
    for told in ("| detector | one | broken | mean |", "left out: away, no/such", "failed: broken", "float32",
                 "seeds 0", "preset paper, resnet10t,", "torch",
                 "chosen on their test images): one."):  # fmt: skip
        assert told in text, told
    lines = (tmp_path / "results/s.csv").read_text().splitlines()
    assert lines[0] == "detector,set,class,seed,auroc" and len(lines) == 8
    assert lines[1] == f"whole score,one,x,0,{mean_auroc((6.0,), 0)}"
    with pytest.raises(UserError, match="no/such is not there"):
        suite.main(arguments(tmp_path / "suite.toml", only="away"))


def test_a_set_is_prepared_where_it_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare = "python -c \"import os; os.mkdir('made')\""
    assert suite.why_left_out(suite.Set("a", "mvtec", "made", prepare)) == ""
    assert suite.why_left_out(suite.Set("a", "mvtec", "made", "python -c 'exit(1)'")) == "", "it is there"
    told = suite.why_left_out(suite.Set("a", "mvtec", "other", prepare))
    assert told.startswith("left out: a,") and told.endswith("did not make other")
    assert suite.why_left_out(suite.Set("a", "digits")) == ""


def test_the_command_of_a_set():
    entry = suite.Set("a", "mvtec", "data/a", knobs={"clamp": 2.0, "class_name": "x,y"})
    command = suite.command_of(entry, {"preset": "paper", "extractor": "e"}, "n", 3, {"clamp": "2.5"})
    given = dict(zip(command[2::2], command[3::2]))
    assert given["--modelname"] == "n-a" and given["--n_seeds"] == "3" and given["--baselines"] == "True"
    assert (
        given["--dataset_path"] == "data/a" and given["--clamp"] == "2.5" and given["--class_name"] == "x,y"
    )
    assert "--dataset_path" not in suite.command_of(suite.Set("a", "digits"), {}, "n", 1, {})


@pytest.mark.parametrize(
    "text, only, told",
    [
        ("set = 1 1", None, "is no TOML"),
        ("presett = 'paper'", None, "unknown key 'presett', did you mean preset"),
        (
            "[[set]]\nname = 'a'\ndataset = 'digits'\nknob = {}",
            None,
            "unknown key 'knob', did you mean knobs",
        ),
        ("[[set]]\nname = 'a'", None, "needs a dataset"),
        ("[[set]]\nname = 'a'\ndataset = 'digits'\npath = 3", None, "path: expected a str, got 3"),
        ("set = ['digits']", None, "expected tables"),
        ("[[set]]\nname = 'digits'\ndataset = 'digits'", "digit", "unknown set 'digit', did you mean digits"),
    ],
)
def test_a_mistake_in_the_list_is_one_line(tmp_path, text, only, told):
    (tmp_path / "suite.toml").write_text(text)
    with pytest.raises(UserError, match=told):
        suite.read_suite(tmp_path / "suite.toml", only)
    with pytest.raises(UserError, match="is not there"):
        suite.read_suite(tmp_path / "none.toml")


def test_the_committed_suite():
    """Its sets are data sets of this program, what prepares them is there, and all are told to be those that
    settings were chosen on."""
    _, sets = suite.read_suite(ROOT / "benchmarks/suite.toml")
    own = {"digits", "textures", "cells", "surfaces", "signs", "materials", "castings", "cifar10"}
    assert {entry.name for entry in sets} == own
    for entry in sets:
        assert entry.dataset in suite.knobs.DATASETS and entry.development
        assert not entry.prepare or (ROOT / entry.prepare.split()[1]).is_file()


# ---------------------------------------------------------------- solar cells
def test_cells_become_a_set_of_two_categories(tmp_path):
    """Good is a probability of 0, four fifths of them for training, the same ones with the same seed."""
    lines = [
        f"images/{kind}{i}.png {p} {kind}"
        for kind in cells.KINDS
        for i, p in enumerate([0.0] * 10 + [0.33, 1])
    ]
    source = tree(tmp_path / "source", *(line.split()[0] for line in lines))
    (source / "labels.csv").write_text("\n".join(lines) + "\n")
    cells.write_set(tmp_path / "cells", source, 0)
    labels = datasets.load_images("mvtec", str(tmp_path / "cells")).labels
    assert set(labels.classes) == {"mono", "poly"}
    train, test, anomalous = labels.one_class("poly")
    assert len(train) == 8 and len(test) == 4 and anomalous.sum() == 2
    first = np.random.RandomState(0).permutation(10)[:8]
    kept = {path.name for path in (tmp_path / "cells/mono/train/good").iterdir()}
    assert kept == {f"mono{i}.png" for i in first}
    tree(tmp_path / "other.partial", "mono/train/good/of an ended run.png")
    cells.write_set(tmp_path / "other", source, 1)
    assert len(datasets.load_images("mvtec", str(tmp_path / "other")).labels.one_class("mono")[0]) == 8
    assert kept != {path.name for path in (tmp_path / "other/mono/train/good").iterdir()}
    with pytest.raises(UserError, match="exists"):
        cells.write_set(tmp_path / "cells", source, 0)
    with pytest.raises(UserError, match="--seed: expected a whole number from 0, got -1"):
        cells.write_set(tmp_path / "third", source, -1)
