"""Every mistake on a script's command line ends it with one line on stderr that says what is wrong; never
with a traceback.

Each script is run as a process of its own for a mistake or two; the other mistakes go the same way, command
line to exit status, in this process: importing torch once more for each would take most of the time."""

import importlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_folder, write_image

import config as knobs
import datasets
import extractor
import utils
from backbone import backbones
from shell.command_line import from_command_line, run_script

pytestmark = pytest.mark.slow


SMALL = (
    "--extractor",
    "resnet18",
    "--weights_path",
    "random",
    "--img_size",
    "32",
    "--threads",
    "1",
    "--workers",
    "0",
    "--precision",
    "float32",
    "--fc_internal",
    "16",
    "--keep",
    "weights",
)


def folder_of(tmp_path, **options):
    return make_folder(tmp_path / "images", classes=("a", "b"), n_train=4, n_test=2, **options)


def one_line(done) -> str:
    """The line that a failed script left, checked for its form."""
    assert done.returncode not in (0, None)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error:"), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return lines[0]


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """As run_script, without a new process: the lines below ``if __name__ == "__main__"``."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        module, status = importlib.import_module(name.removesuffix(".py")), 0
        capsys.readouterr()
        try:
            run_script(
                module.main,
                from_command_line(module.__doc__, [str(argument) for argument in arguments]),
            )
        except SystemExit as stopped:
            status = stopped.code
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=captured.out, stderr=captured.err)

    return run


@pytest.mark.parametrize(
    "script, arguments, told",
    [
        ("main.py", ["--lr_inti", "1"], ["--lr_init"]),
        ("train.py", ["--lr_init", "-1"], ["lr_init", "-1"]),
        ("extractor.py", ["stray"], ["stray"]),
        ("main.py", ["--dataset", "cifar11"], ["cifar11", "cifar10"]),
        ("main.py", ["--dataset", "folder", "--dataset_path", "nowhere", *SMALL], ["nowhere"]),
        ("extractor.py", ["--dataset", "mvtec", "--dataset_path", "nowhere", *SMALL], ["nowhere"]),
        ("main.py", ["--dataset", "digits", "--class_name", "eleven", *SMALL], ["eleven"]),
        ("train.py", ["--dataset", "digits", *SMALL], ["class_name"]),
        ("main.py", ["--dataset", "digits", "--extractor", "resnet19"], ["resnet19", "resnet18"]),
        ("main.py", ["--dataset", "digits", *SMALL, "--n_feat", "99"], ["n_feat", "backbone's"]),
        ("main.py", ["--dataset", "digits", *SMALL, "--weights_path", "none.pth"], ["none.pth"]),
        ("main.py", ["--dataset", "digits", *SMALL, "--pretrained", "True"], ["no features"]),
        ("main.py", ["--dataset", "digits", *SMALL, "--token_grid", "99"], ["token_grid"]),
        ("main.py", ["--dataset", "digits", *SMALL, "--device", "gpu"], ["gpu"]),
        ("main.py", ["--dataset", "digits", "--extractor", "resnet18.no_such_tag"], ["no_such_tag"]),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else value,
)
def test_mistakes(run_here, tmp_path, script, arguments, told):
    line = one_line(run_here(script, *arguments))
    for word in told:
        assert word in line, line
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("dataset", sorted(set(knobs.DATASETS) - {"digits"}))
def test_data_sets_that_are_not_there(run_here, tmp_path, monkeypatch, dataset):
    """Each says the path and what was looked for, at once, and leaves no folder behind."""
    monkeypatch.setattr(utils, "reachable", lambda url: False)
    for path in ([], ["--dataset_path", "some/where"]):
        line = one_line(run_here("extractor.py", "--dataset", dataset, *path, *SMALL))
        place = tmp_path / (path[1] if path else f"data/{datasets.collection(dataset)}")
        assert f"{place} is not there" in line and "expected" in line
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["main.py", "train.py", "extractor.py"])
def test_mistakes_in_a_process(run_script, tmp_path, script):
    """One mistake that the command line shows at once, one that takes the data to see."""
    assert "--seed" in one_line(run_script(script, "--sed", "1"))
    options = ["--dataset", "folder", "--dataset_path", "nowhere", *SMALL]
    if script != "main.py":  # the others refuse knobs that they do not read
        options = ["--dataset", "folder", "--dataset_path", "nowhere", "--threads", "1"]
    options += ["--class_name", "a"] if script == "train.py" else []
    line = one_line(run_script(script, *options))
    assert "nowhere" in line and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda(run_here):
    assert "cuda" in one_line(run_here("main.py", "--dataset", "digits", *SMALL, "--device", "cuda"))


def test_images_that_are_not_there(run_here, tmp_path):
    """A class folder without images, then an unreadable image in it: each is named; the rest of the features
    is kept, and goes on when the image is mended."""
    folder = folder_of(tmp_path)
    broken = folder / "test" / "b" / "00.png"
    shutil.rmtree(folder / "test" / "b")
    broken.parent.mkdir()
    arguments = ("--dataset", "folder", "--dataset_path", folder, *SMALL)
    assert "no images" in one_line(run_here("main.py", *arguments))
    broken.write_bytes(b"no image")
    for workers in (0, 1):
        line = one_line(run_here("main.py", *arguments, "--workers", workers))
        assert "1 unreadable image: test/b/00.png" in line and "others are kept in features/" in line
    write_image(broken, np.zeros((9, 9, 3), np.uint8))
    assert "extracting 1 images" in run_here("extractor.py", *arguments).stdout


def test_broken_cache(run_here, tmp_path):
    folder = folder_of(tmp_path)
    arguments = ("--dataset", "folder", "--dataset_path", folder, *SMALL, "--feature_path", "kept")
    assert run_here("extractor.py", *arguments).returncode == 0
    tokens = next((tmp_path / "kept").glob("*/*/tokens.npy"))
    tokens.write_bytes(tokens.read_bytes()[:-100])
    assert "12 of 12 images have no features" in one_line(run_here("main.py", *arguments, "--pretrained"))
    told = run_here("extractor.py", *arguments).stdout
    assert f"({tokens.parent.name}/tokens.npy: " in told and "extracting 12 images" in told
    (tmp_path / "kept" / "file").write_text("")
    assert "is a file" in one_line(run_here("main.py", *arguments, "--feature_path", "kept/file"))


def test_loss_that_is_not_finite(run_here, tmp_path):
    folder = folder_of(tmp_path)
    done = run_here(
        "main.py",
        "--dataset",
        "folder",
        "--dataset_path",
        folder,
        *SMALL,
        "--fusion",
        "none",
        "--lr_init",
        "1e30",
        "--batch_size",
        "1",
    )
    assert "1e+30" in one_line(done)


def test_weights_not_reachable(monkeypatch, tmp_path, capsys):
    """In this process, so that no test waits for a network: what a hub client raises, and what the user
    sees."""

    create = backbones.timm.create_model

    def offline(*arguments, pretrained=False, **options):
        if pretrained:
            raise OSError("Cannot reach the hub")
        return create(*arguments, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backbones.timm, "create_model", offline)
    config = from_command_line("test", ["--dataset", "digits", "--extractor", "VIT", "--threads", "1"])
    with pytest.raises(SystemExit) as stopped:
        run_script(extractor.main, config)
    errors = capsys.readouterr().err
    assert stopped.value.code not in (0, None) and errors.count("\n") == 1 and errors.startswith("error:")
    assert "not reachable" in errors and "--weights_path" in errors and not list(tmp_path.iterdir())


def test_one_image_is_no_class(run_here, tmp_path):
    for gray, name in enumerate(("train/a/1.png", "test/a/1.png", "test/b/1.png")):
        write_image(tmp_path / "images" / name, torch.full((8, 8, 3), gray, dtype=torch.uint8).numpy())
    line = one_line(run_here("main.py", "--dataset", "folder", "--dataset_path", tmp_path / "images", *SMALL))
    assert "class a" in line and "at least 3" in line and "give more normal ones" in line


def test_no_mistake_no_error(run_here, tmp_path):
    """The same arguments without a mistake run to the end."""
    done = run_here(
        "main.py", "--dataset", "folder", "--dataset_path", folder_of(tmp_path), *SMALL, "--fusion", "none"
    )
    assert (
        done.returncode == 0
        and "error:" not in done.stderr
        and (tmp_path / "runs/foad_mfff/results.json").exists()
    )
