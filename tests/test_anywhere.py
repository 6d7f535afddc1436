"""The lines of the README's notebook example work from a folder that has modules of the same names, and in
several processes; a script that a notebook runs leaves it alive."""

import contextlib
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

NOTEBOOK = f"""
import multiprocessing
import sys
import torch
import utils
sys.path.append({str(ROOT)!r})
from foad_mfff import Detector, UserError

if __name__ == "__main__":
    import config, utils as same
    assert same is utils and utils.MINE and config.MINE and "mine" in config.__file__
    d = Detector.load("runs/foad_mfff/classes/product-seed0", device="cpu", threads=2)
    score = d.score("new.png")
    assert score > 0 and 0 < d.p_value(score) <= 1 and d.heat_map("new.png").shape == (32, 32)
    assert d.verdict(score) == ("anomalous" if score > d.threshold.score else "normal")
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        assert abs(pool.apply(d.score, ("new.png",)) - score) < 1e-4 * score
        assert pool.apply(type(d).calibrate, (d, ["new.png"])).n == 1
        for score_of in (d.score, lambda name: pool.apply(d.score, (name,))):
            try:
                score_of("nowhere.png")
            except UserError as told:
                print(told)
"""


def test_a_notebook_and_its_pool_beside_modules_of_the_same_names(tmp_path):
    """A fitted class, in a folder that has utils and config of its own; by spawn, after scores by threads;
    what is returned and raised comes back whole."""
    folder = tmp_path
    generator = np.random.RandomState(0)
    for i in range(12):
        write_image(folder / "product" / f"{i}.png", texture(0, generator))
    write_image(folder / "new.png", texture(1, generator))
    for name in ("utils", "config", "model", "datasets", "detector"):
        (folder / f"{name}.py").write_text("MINE = True\n")
    with contextlib.chdir(folder):
        train.main(settings(dataset="folder", dataset_path="product", img_size=(32, 32), holdout=0.3))
    (folder / "script.py").write_text(NOTEBOOK)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "script.py"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-2:] == ["no image nowhere.png: there is no such file"] * 2


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
