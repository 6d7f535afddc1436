"""The lines of the README's notebook example work from a folder that has modules of the same names, and in
several processes; a script that a notebook runs leaves it alive."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, texture, write_image
from fabricated import settings

import train

pytestmark = pytest.mark.slow

NOTEBOOK = """
import sys
import utils
sys.path.append({root!r})
from foad_mfff import Detector, UserError
import config, utils as same
assert same is utils and utils.MINE and config.MINE and "mine" in config.__file__
d = Detector.load("runs/foad_mfff/classes/product-seed0", device="cpu", threads=1)
score = d.score("new.png")
print(score, d.p_value(score), d.verdict(score), d.threshold.score, d.heat_map("new.png").shape)
try:
    d.score("nowhere.png")
except UserError as told:
    print(told)
"""

POOL = """
import multiprocessing
import sys
import torch
sys.path.append({root!r})
from foad_mfff import Detector, UserError

if __name__ == "__main__":
    d = Detector.load("runs/foad_mfff/classes/product-seed0", device="cpu", threads=2)
    scores = [d.score(name) for name in ("new.png", "product/0.png")]
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        print(scores, pool.map(d.score, ["new.png", "product/0.png"]))
        assert pool.apply(type(d).calibrate, (d, ["new.png"])).n == 1
        try:
            pool.apply(d.score, ("nowhere.png",))
        except UserError as told:
            print(told)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with a fitted class, a new picture, and modules of the repository's names."""
    folder = tmp_path_factory.mktemp("mine")
    generator = np.random.RandomState(0)
    for i in range(12):
        write_image(folder / "product" / f"{i}.png", texture(0, generator))
    write_image(folder / "new.png", texture(1, generator))
    for name in ("utils", "config", "model", "datasets", "detector"):
        (folder / f"{name}.py").write_text("MINE = True\n")
    with contextlib.chdir(folder):
        train.main(settings(dataset="folder", dataset_path="product", img_size=(32, 32), holdout=0.3))
    return folder


def lines_of(folder, code: str) -> list[str]:
    """What a script of the folder prints."""
    (folder / "script.py").write_text(code.format(root=str(ROOT)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "script.py"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_the_notebook_lines_beside_a_utils_and_a_config(mine):
    *_, told, last = lines_of(mine, NOTEBOOK)
    assert last == "no image nowhere.png: there is no such file"
    score, p_value, verdict, threshold, *shape = told.split(maxsplit=4)
    assert float(score) > 0 and shape == ["(32, 32)"]
    assert verdict == ("anomalous" if float(score) > float(threshold) else "normal")


def test_a_detector_goes_to_another_process_and_back(mine):
    """By spawn, after scores by two threads; what it returns and raises comes back whole."""
    *_, told, last = lines_of(mine, POOL)
    here, there = (json.loads(f"[{part}]") for part in told.strip("[]").split("] ["))
    assert here == pytest.approx(there, rel=1e-4)
    assert last == "no image nowhere.png: there is no such file"


HOST = """
import builtins, os, runpy, signal, sys, time

class Impatient:
    def find_spec(name, *_):
        if name == at:
            os.kill(os.getpid(), signal.SIGINT)

kept, at = "kept", sys.argv.pop(1)
sys.meta_path.insert(0, Impatient)
builtins.__IPYTHON__ = True  # as a notebook has it
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as %run does
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except KeyboardInterrupt:
    print("interrupted", flush=True)
time.sleep(2)
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
except KeyboardInterrupt:
    print(kept)
"""


@pytest.mark.parametrize("name, moment", [("extractor.py", "work"), ("predict.py", "imports")])
def test_a_script_that_is_interrupted_leaves_the_program_that_runs_it(tmp_path, name, moment):
    """A notebook: while modules are imported, and at work; later signals are the program's as before."""
    (tmp_path / "host.py").write_text(HOST)
    options = ["--dataset", "digits", "--extractor", "resnet18", "--weights_path", "random", "--threads", "1"]
    options = ["run", "folder"] if name == "predict.py" else [*options, "--img_size", "96"]
    at = "datasets" if moment == "imports" else "nowhere"
    command = [sys.executable, "host.py", at, str(ROOT / name), *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as host:
        lines = iter(host.stdout)
        if moment == "work":
            while "extracting" not in next(lines):
                pass
            host.send_signal(signal.SIGINT)
        said = list(lines)
    assert host.returncode == 0 and said[-2:] == ["interrupted\n", "kept\n"], said


def test_scripts_find_their_modules_under_pythonsafepath(tmp_path):
    """Python then leaves the script's own folder out of the path."""
    for name in ("main", "extractor", "train", "predict", "export", "report"):
        command = [sys.executable, "-P", ROOT / f"{name}.py", "-h"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0 and "usage:" in ran.stdout, ran.stderr
