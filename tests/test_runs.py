"""The folder of a run: one writer, one configuration, what is finished and what has failed."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import make_cache
from fabricated import CLASSES, JOINED, N_TRAIN, settings

import main
import train
from config import Config, UserError
from datasets import SPLITS, Labels, Split
from detector import checkpoints, detector, runs
from shell.files import sha256_of_file, write_sealed


@pytest.fixture
def run(cache, tmp_path, monkeypatch):
    """run(knob=value, ...) -> results.json of main.main on a fabricated cache, in tmp_path. ``run.cache`` may
    be another cache; ``run.fitted`` lists the cells that were fitted since it was last cleared."""
    monkeypatch.chdir(tmp_path)
    real = train.fit

    def fit(config, cache, sources, pair):
        go.fitted.append(pair)
        return real(config, cache, sources, pair)

    def go(**more) -> dict:
        config = settings(**{"modelname": "run", "keep": "weights", **more})
        main.main(config)
        return results(config)

    go.fitted, go.cache = [], cache
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(main.extractor, "ensure_features", lambda *_, **__: go.cache)
    return go


def results(config: Config) -> dict:
    return json.loads((checkpoints.run_folder(config.modelname) / "results.json").read_text())


def table(results: dict) -> dict:
    """The figures of a run, without its name and times."""
    rows = results["classes"] | {"mean": results["mean"]}
    figures = {
        name: {column: value for column, value in row.items() if column not in ("run", "runs", "seconds")}
        for name, row in rows.items()
    }
    return figures | {"found": results["found"]}


def files(folder="runs/run/classes"):
    return sorted(os.listdir(folder))


# ---------------------------------------------------------------- going on
def test_a_run_goes_on_bit_for_bit(run):
    options = {"baselines": True, "n_seeds": 2, **JOINED}
    whole = run(**options)
    first, last = run.fitted[0], run.fitted[-1]
    run.fitted.clear()
    for name, seed in (first, last):
        os.unlink(f"runs/run/classes/{name}-seed{seed}.json")
    os.unlink("runs/run/results.json")
    resumed = run(**options)
    assert run.fitted == [first, last] and table(resumed) == table(whole)
    for name in CLASSES:  # the kept ones are kept with all that they were
        assert [r["class"] for r in resumed["classes"][name]["runs"]] == [name, name]


@pytest.mark.slow
def test_processes_come_to_the_table_of_one(run, capsys):
    """Two classes at a time, each by a process with one thread: the same to the last digit."""
    options = {"pretrained": True, **JOINED}
    alone, _ = run(threads=1, **options), capsys.readouterr()
    run.fitted.clear()
    together = run(threads=2, modelname="together", **options)
    told = capsys.readouterr().out
    assert table(together) == table(alone) and not run.fitted, "by processes of their own"
    assert "2 at a time" in told and "for 2 more" in told and "[3/3]" in told
    for path in Path("runs/run/classes").glob("*.safetensors"):
        assert sha256_of_file(path) == sha256_of_file(f"runs/together/classes/{path.name}")


DAMAGE = {
    "weights missing": lambda path: path.with_suffix(".safetensors").unlink(),
    "weights changed": lambda path: path.with_suffix(".safetensors").write_bytes(
        (content := path.with_suffix(".safetensors").read_bytes())[:-1] + bytes([content[-1] ^ 1])
    ),
    "record cut": lambda path: os.truncate(path, 100),
    "record of another class": lambda path: path.write_bytes(path.with_name("a-seed0.json").read_bytes()),
}


def test_what_is_damaged_is_not_finished(run):
    run(class_name="a,b")
    config, pair = settings(modelname="run", keep="weights"), runs.ClassSeed("b", 0)
    path = Path("runs/run/classes/b-seed0.json")
    files_before = {file: file.read_bytes() for file in checkpoints.checkpoint_files(path)}
    for damage, harm in DAMAGE.items():
        assert pair in runs.settle(config, run.cache, [pair])
        harm(path)
        assert pair not in runs.settle(config, run.cache, [pair]), damage
        for file, content in files_before.items():
            file.write_bytes(content)


def test_what_is_asked_for_later_is_made(run):
    """Weights, and what the baselines need, where the first run kept none."""
    run(keep="results", class_name="a")
    assert files() == ["a-seed0.json"]
    run(keep="weights", class_name="a")
    assert len(run.fitted) == 2 and len(files()) == 2
    assert run(baselines=True, class_name="a")["baselines"] and len(run.fitted) == 3
    run(baselines=True, keep="results", threads=0, class_name="a", unreadable="skip")
    assert len(run.fitted) == 3, "knobs that change no outcome do not count"


def test_restart(run):
    """Of one class it keeps the others, unless they are of another configuration."""
    run(class_name="a,b")
    run.fitted.clear()
    run(restart=True, class_name="b")
    assert run.fitted == [("b", 0)] and {name[0] for name in files()} == {"a", "b"}
    run(restart=True, class_name="b", lr_init=2e-3)
    assert {name[0] for name in files()} == {"b"}
    runs.drop(Path("runs/run"), None)
    left = {path.name for path in Path("runs/run").iterdir()}
    assert left <= {"classes", "figures", "run.json"} and files() == [], "no table or page of the old run"


# ---------------------------------------------------------------- one configuration
def test_another_configuration_is_refused(run):
    run(class_name="a")
    before = {name: sha256_of_file(f"runs/run/classes/{name}") for name in files()}
    run.fitted.clear()
    with pytest.raises(UserError) as mistake:
        run(lr_init=2e-3)
    line = str(mistake.value)
    assert "lr_init 0.001 there, 0.002 now" in line and "\n" not in line
    assert "--modelname" in line and "--restart" in line and run.fitted == []
    os.unlink("runs/run/run.json")
    with pytest.raises(UserError, match="earlier version.*--restart"):
        run()
    assert {name: sha256_of_file(f"runs/run/classes/{name}") for name in files()} == before
    run(restart=True, lr_init=2e-3, class_name="a")
    assert len(run.fitted) == 1


def test_the_rate_of_false_alarms_holds_pictures_out_of_folders(run):
    """Of one's own: with another rate others are held out, and the fits are others."""
    run(dataset="folder", holdout=0.1, class_name="a")
    with pytest.raises(UserError, match="false_alarms 0.05 there, 0.2 now"):
        run(dataset="folder", holdout=0.1, false_alarms=0.2)
    published = {"modelname": "published", "dataset": "mvtec", "holdout": 0.1, "class_name": "a"}
    run(**published)
    run.fitted.clear()
    run(**published, false_alarms=0.2)
    assert run.fitted == []


def rewrite(path: str, change) -> None:
    """Change what a sealed file says, and seal it again."""
    content = json.loads(Path(path).read_text())
    change(content)
    write_sealed(Path(path), {k: v for k, v in content.items() if k != "checksum"})


def test_a_checkpoint_of_an_earlier_version_is_refused(run):
    """One with a knob that is gone, and one whose record had other parts."""
    run(class_name="a,b")
    path = "runs/run/classes/{}-seed0.json"
    rewrite(path.format("a"), lambda content: content["config"].update(gone=True))
    rewrite(path.format("b"), lambda content: content.pop("simple_scores"))
    for name, told in (("a", "made with .*gone.*train it again"), ("b", "simple_scores")):
        with pytest.raises(UserError, match=told):
            detector.load_detector(path.format(name))


def test_train_keeps_and_refuses_as_main_does(run, capsys):
    one = settings(modelname="run", class_name="b")
    train.main(one)
    train.main(one)
    assert run.fitted == [("b", 0)] and "kept from an earlier run" in capsys.readouterr().out
    run()
    assert run.fitted == [("b", 0), ("a", 0), ("c", 0)]
    with pytest.raises(UserError, match="clamp"):
        train.main(dataclasses.replace(one, clamp=1.0))
    held = settings(modelname="held", class_name="b", holdout=0.25)
    train.main(held)
    train.main(dataclasses.replace(held, false_alarms=0.4))
    assert "rate of the fit, 0.05: give it --false_alarms 0.4" in capsys.readouterr().out


# ---------------------------------------------------------------- one writer
def test_one_writer(run):
    config = settings(modelname="run")
    with runs.writing(Path("runs/run")):
        with pytest.raises(
            UserError, match=rf"runs/run is being written by process {os.getpid()}.*--modelname"
        ):
            run()
        with pytest.raises(UserError, match="being written"):
            train.main(dataclasses.replace(config, class_name="a"))
    run()
    assert ".writer" not in str(os.listdir("runs/run"))


@pytest.mark.parametrize("place", ["runs", "runs/run/classes"])
def test_a_folder_that_cannot_be_written(run, tmp_path, place):
    """It is found before anything is read or trained. (A file in its way: root may write everywhere.)"""
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("in the way")
    run.cache = None
    with pytest.raises(UserError, match="runs/run cannot be written"):
        run()
    assert (tmp_path / place).read_text() == "in the way"


# ---------------------------------------------------------------- classes that cannot be fitted
def test_classes_that_cannot_be_fitted_do_not_lose_the_others(run, tmp_path, capsys):
    """Two training images are no class, and images that are all the same are none."""
    good, cache = run(), run.cache
    tokens = {split: cache.arrays(split)["tokens"][:].astype(float) for split in SPLITS}
    tokens["train"][2 : 2 * N_TRAIN] = tokens["train"][2]
    category = np.array([0] * 2 + [1] * (2 * N_TRAIN - 2) + [2] * N_TRAIN)
    labels = Labels(CLASSES, Split.of(cache.labels.train.names, category), cache.labels.test)
    run.cache = make_cache(tmp_path / "damaged", labels, tokens, grid=(3, 3), band_channels=(4, 6))
    with pytest.raises(UserError, match="2 of 3 classes could not be fitted: class a: 2 training"):
        run(modelname="bad")
    found = results(settings(modelname="bad"))["classes"]
    assert all(found[name]["auroc"] is None for name in "ab") and "all the same" in found["b"]["undefined"]
    assert found["c"]["auroc"] == good["classes"]["c"]["auroc"]
    assert "all the same" in capsys.readouterr().out and not Path("runs/bad/classes/b-seed0.json").exists()
    run.fitted.clear()
    with pytest.raises(UserError, match="1 of 2 classes"):
        run(modelname="bad", class_name="b,c")
    assert run.fitted == [("b", 0)], "it is tried again, the other is kept"


# ---------------------------------------------------------------- the committed table
def test_a_run_is_checked_against_the_committed_table(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "TABLE", tmp_path / "quickstart.csv")
    with pytest.raises(UserError, match="committed table of the preset quickstart alone"):
        run(check=True)
    assert not run.fitted, "told before anything is fitted"
    run()
    text = Path("runs/run/results.csv").read_text()
    main.TABLE.write_text(text)
    capsys.readouterr()
    run(check=True, preset="quickstart")
    assert "equal within ± .0005" in capsys.readouterr().out
    lines = text.splitlines(keepends=True)
    place = lines[0].split(",").index("auroc")
    fields = lines[1].split(",")
    fields[place] = str(float(fields[place]) - 0.001)
    main.TABLE.write_text("".join([lines[0], ",".join(fields), *lines[3:]]))
    with pytest.raises(SystemExit, match="1"):
        run(check=True, preset="quickstart")
    told = capsys.readouterr().out.splitlines()[-2:]
    assert told[0].startswith("a: AUROC ") and "in the table" in told[0]
    assert told[1].startswith("b: AUROC ") and told[1].endswith(", - in the table")
