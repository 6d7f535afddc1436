"""The lines of the README's notebook example work from a folder that has modules of the same names, and in
several processes; scripts and notebooks are asked to end."""

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, texture, write_image
from fabricated import small_run

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
    assert score > 0 and 0 < d.p_value(score) <= 1
    assert d.verdict(score) == ("anomalous" if score > d.threshold.score else "normal")
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        threshold = pool.apply(type(d).calibrate, (d, ["new.png"]))
        assert threshold.n == 1 and abs(threshold.score - score) < 1e-4 * score
        for score_of in (d.score, lambda name: pool.apply(d.score, (name,))):
            try:
                score_of("nowhere.png")
            except UserError as told:
                print(told)
"""


def test_a_notebook_and_its_pool_beside_modules_of_the_same_names(tmp_path):
    """A fitted class, in a folder that has utils and config of its own; by spawn, after scores by threads;
    what is returned and raised comes back whole."""
    folder = tmp_path / "mine"
    generator = np.random.RandomState(0)
    for i in range(12):
        write_image(folder / "product" / f"{i}.png", texture(0, generator))
    write_image(folder / "new.png", texture(1, generator))
    for name in ("utils", "config", "model", "datasets", "detector"):
        (folder / f"{name}.py").write_text("MINE = True\n")
    with contextlib.chdir(folder):
        train.main(small_run(dataset_path="product", holdout=0.3, img_size=(32, 32)))
    (folder / "script.py").write_text(NOTEBOOK)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "script.py"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-2:] == ["no image nowhere.png: there is no such file"] * 2


ENDING = f"""
import os, signal, sys, time
sys.path.append({str(ROOT)!r})
from shell import command_line, signals

def asked():
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(60)

command_line.OneLineParser().parse_known_args()
for _ in range(2):
    try:
        signals.guarded(asked, told="what is kept")
    except KeyboardInterrupt:
        print("alive")
"""


NOTEBOOKS = "import builtins\nbuiltins.__IPYTHON__ = True\n"
TOLD = "interrupted: what is kept\n"


@pytest.mark.parametrize(
    "before, number, outcome",
    [("", number, (128 + number, "", TOLD)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    + [(NOTEBOOKS, signal.SIGINT, (0, "alive\nalive\n", ""))],
)
def test_asked_to_end(before, number, outcome):
    """A notebook outlives it, again and again: its signals stay its own."""
    command = [sys.executable, "-c", before + ENDING, str(int(number))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout, ran.stderr) == outcome


def test_a_signal_while_modules_are_imported(tmp_path):
    """A stub that takes its time stands in for NumPy."""
    (tmp_path / "numpy.py").write_text("import time; print('importing', flush=True); time.sleep(60)\n")
    command, pipes = [sys.executable, ROOT / "extractor.py"], {"stdout": -1, "stderr": -1, "text": True}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        running = subprocess.Popen(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, **pipes)
        assert running.stdout.readline() == "importing\n"
        running.send_signal(number)
        _, errors = running.communicate(timeout=300)
        assert (running.returncode, errors) == (-number, "")
