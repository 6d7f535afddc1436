"""The generated textures: good images are good, defects are where their masks say."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import datasets

sys.path.insert(0, str(ROOT / "tools"))
import textures


@pytest.mark.parametrize("defect", textures.DEFECTS)
@pytest.mark.parametrize("texture", textures.TEXTURES)
def test_a_defect_changes_the_surface_under_its_mask_alone(texture, defect):
    rng = np.random.default_rng(5)
    image = textures.surface(texture, rng)
    damaged, mask = textures.damage(image, defect, rng)
    changed = np.abs(damaged - image).max(2)
    assert 10 < mask.sum() < 0.25 * mask.size
    assert changed[mask].max() > 0.02, "drawn"
    assert changed[~mask].max() <= 0.05 + 1e-9, "nothing outside the mask but its soft edge"


def test_set_on_disk(tmp_path):
    run = [
        sys.executable,
        str(ROOT / "tools" / "textures.py"),
        "t",
        "--train",
        "2",
        "--good",
        "1",
        "--defect",
        "1",
    ]
    assert subprocess.run(run, cwd=tmp_path, capture_output=True).returncode == 0
    images = datasets.load_images("mvtec", str(tmp_path / "t"))
    assert set(images.labels.classes) == set(textures.TEXTURES)
    train, test, anomalous = images.labels.one_class("bricks")
    assert len(train) == 2 and anomalous.sum() == len(textures.DEFECTS) and len(test) == 1 + anomalous.sum()
    masks = {p.parent.name for p in Path(tmp_path / "t" / "bricks" / "ground_truth").glob("*/*_mask.png")}
    assert masks == set(textures.DEFECTS)
    again = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert (
        again.returncode == 2
        and again.stderr.startswith("error: t exists")
        and "Traceback" not in again.stderr
    )
