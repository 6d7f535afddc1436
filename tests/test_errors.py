"""Every mistake on a script's command line ends it with one line on stderr that says what is wrong; never
with a traceback."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, write_image

import main  # noqa: F401  so that processes that are forked have its modules

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


@pytest.mark.parametrize(
    "script, given, told",
    [
        ("main.py", "--dataset folder --dataset_path nowhere", "nowhere"),
        ("extractor.py", "--dataset folder --dataset_path nowhere", "nowhere"),
        ("main.py", "--dataset folder --dataset_path {few}", "class a.*at least 3.*give more"),
        ("main.py", "--dataset digits --class_name eleven", "eleven"),
        ("train.py", "--dataset digits", "class_name"),
        ("main.py", "--dataset digits --extractor resnet19", "resnet19.*resnet18"),
        ("main.py", "--dataset digits --weights_path none.pth", "none.pth"),
        ("main.py", "--dataset digits --pretrained True", "no features"),
        ("main.py", "--dataset digits --token_grid 99", "token_grid"),
        ("main.py", "--dataset digits --fusion spectral --img_size 64", "grid of at least 6x6, got 2x2"),
        ("main.py", "--dataset digits --device gpu", "gpu"),
    ],
)
def test_mistakes(run_script, tmp_path, tmp_path_factory, script, given, told):
    few = tmp_path_factory.mktemp("few")
    for gray, name in enumerate(("train/a/1.png", "test/a/1.png", "test/b/1.png")):
        write_image(few / name, np.full((8, 8, 3), gray, np.uint8))
    assert re.search(told, one_line(run_script(script, *SMALL, *given.format(few=few).split())))
    assert not list(tmp_path.iterdir()) or "{few}" in given, "nothing is left behind"


@pytest.mark.parametrize("script", ["main.py", "export.py"])
def test_scripts_find_their_modules_where_python_looks_nowhere(tmp_path, script):
    """As under PYTHONSAFEPATH."""
    ran = subprocess.run(
        [sys.executable, "-P", ROOT / script, "-h"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0 and not ran.stderr and ran.stdout.startswith("usage:")
