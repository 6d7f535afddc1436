"""Names: of runs, of classes, of files; what they may hold and where they lead."""

import numpy as np
import pytest
from fabricated import make, settings

import datasets
import train
from config import Config, UserError
from datasets import Labels, Split
from detector import checkpoints, detector
from shell.command_line import from_command_line
from shell.files import file_name
from shell.signals import guarded

STRANGE = ["v1.5.json", "-x", ".. ..", "two words", "a,b", 'say "a"', "ä/ß 🐱", "\\", "all"]


def labels_of(*classes: str) -> Labels:
    names = [f"{name}/{i}" for name in classes for i in (0, 1)]
    split = Split.of(names, np.repeat(np.arange(len(classes)), 2))
    return Labels(classes, split, split)


# ---------------------------------------------------------------- of classes
def test_every_class_has_files_of_its_own():
    names = [*STRANGE, "line\nbreak", "a/b", "a\\b", "a_b", "x" * 300, "x" * 301, "~", "ä" * 100]
    run = checkpoints.run_folder(Config.modelname)
    paths = [checkpoints.checkpoint_path(run, name, seed) for name in names for seed in (0, 1)]
    files = [file for path in paths for file in checkpoints.checkpoint_files(path)]
    assert len(set(files)) == 4 * len(names)
    for file in files:
        assert file.parent == run / "classes" and file.name.isprintable()
        assert len(file.name.encode()) < 200 and file.name[0] not in ".-"
    assert file_name("two words ü") == "two words ü", "a plain name stays readable"


def test_checkpoints_of_strange_classes(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared = make(cache)
    record = train.train(prepared)
    for name in STRANGE:
        record.result["class"] = name
        path = checkpoints.save_fitted(settings(), cache.meta, prepared.detector, record)
        assert detector.load_detector(path)[1].result["class"] == name
    assert [found.name for found in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("name", STRANGE)
def test_class_given_on_the_command_line(name):
    labels = labels_of(*STRANGE, "b")
    assert datasets.choose_classes(labels, name) == ([*labels.classes] if name == "all" else [name])
    assert "," in name or datasets.choose_classes(labels, f"b, {name}") == ["b", name]
    assert from_command_line("test", [f"--class_name={name}"]).class_name == name


def test_a_name_that_is_no_text(capsys):
    with pytest.raises(UserError, match="UTF-8.*rename"):
        datasets.choose_classes(labels_of("a", "\udcffb"), "a")
    with pytest.raises(SystemExit):
        guarded(lambda: "\udcff.png".encode())
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------- of runs and folders
@pytest.mark.parametrize(
    "name", ["", " ", "..", "../x", "/tmp/x", "a\\b", "-x", ".x", "a\nb", "\udcff", "x" * 101, "figures"]
)
def test_a_run_stays_in_its_folder(capsys, name):
    with pytest.raises(SystemExit):
        from_command_line("test", [f"--modelname={name}"])
    error = capsys.readouterr().err
    assert "modelname" in error and error.count("\n") == 1
    with pytest.raises(UserError, match="modelname"):
        Config(modelname=f"grid/{name}")  # one folder deeper
