"""The set makers: textures whose defects are where their masks say, solar cells in MVTec layout."""

import argparse
import sys

import numpy as np
import pytest
from conftest import ROOT, load_images, tree

from config import UserError

sys.path.insert(0, str(ROOT / "tools"))
import cells
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


def test_textures_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(textures, "TEXTURES", dict(list(textures.TEXTURES.items())[:2]))
    asked = argparse.Namespace(folder=tmp_path / "t", train=2, good=1, defect=1, size=textures.SIZE, seed=0)
    textures.main(asked)
    labels = load_images("mvtec", str(asked.folder)).labels
    assert set(labels.classes) == set(textures.TEXTURES)
    train, test, anomalous = labels.one_class("weave")
    assert len(train) == 2 and anomalous.sum() == len(textures.DEFECTS) and len(test) == 1 + anomalous.sum()
    masks = {path.parent.name for path in asked.folder.glob("*/ground_truth/*/*_mask.png")}
    assert masks == set(textures.DEFECTS)
    with pytest.raises(UserError, match="t exists"):
        textures.main(asked)


def test_cells_become_a_set_of_two_categories(tmp_path):
    """Good is a probability of 0, four fifths of them for training, the same ones with the same seed."""
    chances = [0.0] * 10 + [0.33, 1]
    lines = [f"images/{kind}{i}.png {p} {kind}" for kind in cells.KINDS for i, p in enumerate(chances)]
    source = tree(tmp_path / "source", *(line.split()[0] for line in lines))
    (source / "labels.csv").write_text("\n".join(lines) + "\n")
    for name, seed in (("cells", 0), ("other", 1)):
        cells.write_set(tmp_path / name, source, seed)
        train, test, anomalous = load_images("mvtec", str(tmp_path / name)).labels.one_class("poly")
        assert len(train) == 8 and len(test) == 4 and anomalous.sum() == 2
        first = np.random.RandomState(seed).permutation(10)[:8]
        kept = {path.name for path in (tmp_path / name / "mono/train/good").iterdir()}
        assert kept == {f"mono{i}.png" for i in first}
    with pytest.raises(UserError, match="expected a whole number from 0, got -1"):
        cells.write_set(tmp_path / "third", source, -1)
