"""The suite of data sets: its list, the joint bootstrap, its tables."""

import argparse
import sys

import numpy as np
import pytest
from conftest import ROOT

import utils
from config import UserError
from shell.files import write_json, write_sealed

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


def test_classes_with_their_own_images_are_drawn_apart():
    """And those with the same images together."""
    labels = np.arange(80) % 2
    apart = [problem(str(i), np.arange(80) + 80 * i, labels, a=noisy(labels, 1.0, 1)) for i in range(2)]
    same = [p._replace(rows=np.arange(80)) for p in apart]
    for problems, wanted in ((apart, 0.0), (same, 1.0)):
        assert abs(np.corrcoef(judging.resampled(problems, ["a"], 2000, 0)[..., 0].T)[0, 1] - wanted) < 0.1


def test_holm():
    assert np.allclose(judging.holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    assert judging.holm(np.array([0.9, 0.8])).max() == 1


def test_wins_levels_and_losses():
    labels = np.arange(100) % 2
    strong, weak = noisy(labels, 4.0, 1, 0.01), noisy(labels, 0.5, 2, 0.01)
    pairs = ((strong, weak), (weak, strong), (weak, weak), (weak, noisy(labels, 0.5, 3, 0.01)))
    problems = [problem(str(i), np.arange(100) + 100 * i, labels, a=a, b=b) for i, (a, b) in enumerate(pairs)]
    judged = judging.judge(problems, ["a", "b"], ["b"], 500, 0)
    found = judging.difference([judged], 0, 1)
    assert found.wins == "1 / 2 / 1 (1 / 2 / 1)" and found.sets == 1 and found.low < found.mean < found.high
    assert np.isclose(found.mean, np.mean(judged.points[:, 0] - judged.points[:, 1]))


# ---------------------------------------------------------------- regret, and choices without a set
ROWS = [  # two classes of set one, the first with two seeds; set two lacks c, and b has half of it alone
    *(Row("one", "x", "a", 0.8), Row("one", "x", "a", 0.6), Row("one", "y", "a", 0.9)),
    *(
        Row("one", "x", "b", 0.5),
        Row("one", "y", "b", 0.7),
        Row("one", "x", "c", 0.9),
        Row("one", "y", "c", 0.9),
    ),
    *(Row("two", "z", "a", 0.9), Row("two", "w", "a", 0.9), Row("two", "z", "b", 1.0)),
]


def test_regret():
    """Means over seeds, then over classes, of what all classes have."""
    found = judging.regret(ROWS, "a", ["b", "c"])
    assert list(found) == ["one"] and found["one"] == (pytest.approx(0.8 - 0.9), "c")
    assert judging.regret(ROWS, "a", ["b"])["one"] == (pytest.approx(0.8 - 0.6), "b")


def test_leave_one_set_out():
    """What is best on a set has no part in the choice for it."""
    aurocs = {"plain": (0.9, 0.8, 0.7), "wide": (0.6, 0.9, 0.8), "deep": (0.7, 0.7, 1.0)}
    runs = {
        run: [Row(name, "x", "whole", value) for name, value in zip("ABC", values)]
        for run, values in aurocs.items()
    }
    found = judging.leave_one_set_out(runs, "whole")
    assert [of[:3] for of in found] == [("A", "wide", 0.6), ("B", "deep", 0.7), ("C", "plain", 0.7)]
    assert [of[3:] for of in found] == [("plain", 0.9), ("wide", 0.9), ("deep", 1.0)]
    assert judging.leave_one_set_out(runs, "other") == []


# ---------------------------------------------------------------- the table
LABELS = [i % 2 for i in range(40)]


def write_run(name, classes, simple, seeds=(0,)):
    """A finished run in runs/ as main.py leaves it; ``classes``: {class: signal of the whole score}."""
    folder = suite.Path("runs") / name
    for number, (class_name, signal) in enumerate(classes.items()):
        for seed in seeds:
            flow = {
                "places": (signal, 10),
                "image part": (0.0, 40),
                "whole score, before training": (0.0, 20),
            }
            flow_scores = {title: noisy(LABELS, s, more + seed).tolist() for title, (s, more) in flow.items()}
            simple_scores = {title: noisy(LABELS, s, 30).tolist() for title, s in simple.items() if not seed}
            test = {"rows": list(range(40 * number, 40 * number + 40)), "labels": LABELS}
            record = {
                "result": {"class": class_name, "seed": seed}, "history": [], "config": {}, "weights": None,
                "features": {"kind": "map", "grid": [1, 1], "tokens": 2, "n_feat": 4},
                "test": test | {"scores": noisy(LABELS, signal, seed).tolist()}, "held_out_scores": [],
                "flow_scores": flow_scores, "simple_scores": simple_scores,
            }  # fmt: skip
            write_sealed(folder / "classes" / f"{class_name}-seed{seed}.json", record)
    summary = {"classes": dict.fromkeys(classes, {}), "mean": {}, "config": {}, "seeds": list(seeds)}
    write_json(folder / "results.json", summary | {"features": {"precision": "float32"}})


def mean_auroc(signals, seed):
    return np.mean([utils.auroc(np.array(LABELS), noisy(LABELS, signal, seed)) for signal in signals])


def test_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("s-one", {"gone": 9.0}, {})  # a class that the run's report does not name
    write_run("s-one", {"x": 6.0, "y": 5.0}, {"kNN": 0.5, "PaDiM": 0.3}, seeds=(0, 1))
    write_run("s-two", {"z": 4.0}, {"kNN": 0.2}, seeds=(0, 1))
    found = {name: suite.read_problems(suite.Path("runs") / f"s-{name}")[0] for name in ("one", "two")}
    header, lines = suite.make_table(found | {"bad": None}, draws=500)
    rows = {row[0]: dict(zip(header, row)) for row in lines}
    whole, per_seed = rows[suite.WHOLE], np.array(
        [[mean_auroc((6.0, 5.0), seed), mean_auroc((4.0,), seed)] for seed in (0, 1)]
    )  # fmt: skip
    assert [whole["one"], whole["two"]] == [suite.auroc_cell(per_seed[:, i]) for i in (0, 1)]
    assert whole["mean"] == suite.auroc_cell(per_seed.mean(1)) and "±" in whole["mean"]
    assert all(row["bad"] == "failed" for row in rows.values())
    knn, padim = [mean_auroc((0.5,), 30), mean_auroc((0.2,), 30)], mean_auroc((0.3,), 30)
    assert rows["kNN"]["mean"] == f"{np.mean(knn):.4f}"
    assert rows["PaDiM"]["two"] == "" and rows["PaDiM"]["mean"] == f"({padim:.4f})"
    assert (
        rows[suite.BEST]["one"] == f"{max(knn[0], padim):.4f}"
        and rows[suite.BEST]["two"] == rows["kNN"]["two"]
    )
    title, first = "whole score - it [95 %]", [mean_auroc((6.0, 5.0), 0), mean_auroc((4.0,), 0)]
    assert rows["kNN"][title].startswith(f"{np.mean(first) - np.mean(knn):+.4f} [+")
    assert rows["PaDiM"][title].startswith(f"({first[0] - padim:+.4f} [+") and not whole[title]


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
prepare = "python -c ''"
"""


def arguments(path, **more):
    given = {"preset": None, "only": None, "seeds": 1, "trial": False, "knobs": [], "name": "s", "out": None}
    return argparse.Namespace(suite=path, **(given | {"compare": None} | more))


def test_sets_that_fail_or_are_missing_stop_no_other(tmp_path, monkeypatch, capsys):
    """The fits themselves are replaced by runs that are finished or fail."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.toml").write_text(SUITE)
    write_run("s-one", {"x": 6.0}, {"kNN": 0.5})
    finished = {"one": "exit(0)", "broken": "exit(2)"}
    monkeypatch.setattr(suite, "command_of", lambda entry, *_: [sys.executable, "-c", finished[entry.name]])
    with pytest.raises(UserError, match="failed: broken, main.py ended with status 2"):
        suite.main(arguments(tmp_path / "suite.toml", knobs=["extractor=resnet10t"]))
    text, csv = (tmp_path / "results/s.md").read_text(), tmp_path / "results/s.csv"
    for told in ("| detector | one | broken | mean |", "left out: away, ", "failed: broken", "float32",
                 "preset paper, resnet10t, seeds 0", "| set | whole score - best simple |", "images): one."):  # fmt: skip
        assert told in text, told
    assert csv.read_text().splitlines()[:2] == [
        "detector,set,class,seed,auroc", f"whole score,one,x,0,{mean_auroc((6.0,), 0)}"
    ]  # fmt: skip
    capsys.readouterr()
    suite.main(arguments(None, compare=[csv]))
    assert capsys.readouterr().out.split("## Regret")[1].split("\n\n")[1] in text
    with pytest.raises(UserError, match="at least two sets"):
        suite.main(arguments(None, compare=[csv, tmp_path / "results" / ".." / "results" / "s.csv"]))
    with pytest.raises(UserError, match="`python -c ''` did not make no/such"):
        suite.main(arguments(tmp_path / "suite.toml", only="away"))


def test_the_command_of_a_set():
    entry = suite.Set("a", "mvtec", "data/a", knobs={"clamp": 2.0, "class_name": "x,y"})
    command = suite.command_of(entry, {"preset": "paper", "extractor": "e"}, "n", 3, {"clamp": "2.5"})
    given = dict(zip(command[2::2], command[3::2]))
    assert given["--modelname"] == "n-a" and given["--n_seeds"] == "3" and given["--baselines"] == "True"
    assert (
        given["--dataset_path"] == "data/a" and given["--clamp"] == "2.5" and given["--class_name"] == "x,y"
    )
    assert "--dataset_path" not in suite.command_of(suite.Set("a", "digits"), {}, "n", 1, {})


DIGITS = "[[set]]\nname = 'digits'\ndataset = 'digits'\n"
MISTAKES = {
    "set = 1 1": "suite.toml: ",
    "presett = 'paper'": "unknown key 'presett', did you mean preset",
    f"{DIGITS}knob = {{}}": "unknown key 'knob', did you mean knobs",
    "[[set]]\nname = 'a'": "needs a dataset",
    "set = ['digits']": "expected tables",
    DIGITS: "unknown set 'digit', did you mean digits",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_the_list_is_one_line(tmp_path, text):
    (tmp_path / "suite.toml").write_text(text)
    with pytest.raises(UserError, match=MISTAKES[text]):
        suite.read_suite(tmp_path / "suite.toml", "digit")


def test_the_committed_suite():
    """Its sets are data sets of this program, and what prepares them is there."""
    _, sets = suite.read_suite(ROOT / "benchmarks/suite.toml")
    assert {"digits", "textures", "cells", "cifar10"} < {entry.name for entry in sets}
    for entry in sets:
        assert entry.dataset in suite.knobs.DATASETS and entry.development
        assert not entry.prepare or (ROOT / entry.prepare.split()[1]).is_file()
