"""The lines of the README's notebook example work from a folder that has modules of the same names."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, texture, write_image

import train
from config import Config

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


def test_the_notebook_lines_beside_a_utils_and_a_config(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    generator = np.random.RandomState(0)
    for i in range(12):
        write_image(mine / "product" / f"{i}.png", texture(0, generator))
    write_image(mine / "new.png", texture(1, generator))
    for name in ("utils", "config", "model", "datasets"):
        (mine / f"{name}.py").write_text("MINE = True\n")
    monkeypatch.chdir(mine)
    train.main(
        Config(
            dataset="folder",
            dataset_path="product",
            extractor="resnet18",
            weights_path="random",
            img_size=(32, 32),
            fc_internal=16,
            holdout=0.3,
            device="cpu",
            threads=1,
            workers=0,
        )  # fmt: skip
    )
    (mine / "notebook.py").write_text(NOTEBOOK.format(root=str(ROOT)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "notebook.py"], cwd=mine, env=environment, capture_output=True, text=True
    )
    lines = ran.stdout.splitlines()
    assert lines and lines[-1] == "no image nowhere.png: there is no such file", ran.stderr
    score, p_value, verdict, threshold, *shape = lines[-2].split(maxsplit=4)
    assert float(score) > 0 and shape == ["(32, 32)"]
    assert verdict == ("anomalous" if float(score) > float(threshold) else "normal")
