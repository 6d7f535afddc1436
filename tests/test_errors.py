"""Every mistake on a script's command line ends it with one line on stderr that says what is wrong; never
with a traceback.

Each script is run as a process of its own for one mistake; the others go the same way, command line to exit
status, in this process."""

import importlib
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, write_image

from shell.command_line import from_command_line, run_script

pytestmark = pytest.mark.slow

SMALL = (
    "--extractor test_resnet --weights_path random --img_size 32 --threads 1 --workers 0 --precision float32 "
    "--fc_internal 16 --keep weights"
).split()


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
            run_script(module.main, from_command_line(module.__doc__, arguments))
        except SystemExit as stopped:
            status = stopped.code
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=captured.out, stderr=captured.err)

    return run


@pytest.mark.parametrize(
    "script, given, told",
    [
        ("main.py", "--dataset folder --dataset_path nowhere", "nowhere"),
        ("main.py", "--dataset folder --dataset_path {few}", "class a.*at least 3.*give more"),
        ("main.py", "--dataset digits --class_name eleven", "eleven"),
        ("train.py", "--dataset digits", "class_name"),
        ("main.py", "--dataset digits --extractor resnet19", "resnet19.*resnet18"),
        ("main.py", "--dataset digits --weights_path none.pth", "none.pth"),
        ("main.py", "--dataset digits --pretrained True", "no features"),
        ("main.py", "--dataset digits --token_grid 99", "token_grid"),
        ("main.py", "--dataset digits --device gpu", "gpu"),
    ],
)
def test_mistakes(run_here, tmp_path, tmp_path_factory, script, given, told):
    few = tmp_path_factory.mktemp("few")
    for gray, name in enumerate(("train/a/1.png", "test/a/1.png", "test/b/1.png")):
        write_image(few / name, np.full((8, 8, 3), gray, np.uint8))
    assert re.search(told, one_line(run_here(script, *SMALL, *given.format(few=few).split())))
    assert not list(tmp_path.iterdir()) or "{few}" in given, "nothing is left behind"


@pytest.mark.parametrize("script", ["main.py", "train.py", "extractor.py"])
def test_mistakes_in_a_process(run_script, tmp_path, script):
    options = ("--dataset", "folder", "--dataset_path", "nowhere", "--threads", "1", "--class_name", "a")
    assert "nowhere" in one_line(run_script(script, *options)) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["main.py", "export.py"])
def test_scripts_find_their_modules_where_python_looks_nowhere(tmp_path, script):
    """As under PYTHONSAFEPATH."""
    ran = subprocess.run(
        [sys.executable, "-P", ROOT / script, "-h"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0 and not ran.stderr and ran.stdout.startswith("usage:")
