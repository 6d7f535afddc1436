"""The scale of pixels of more than eight bits, from the training pictures to the verdict."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import extractor
import train
from config import Config
from detector.picture_detector import PictureDetector

CPU = torch.device("cpu")


def grain(generator: np.random.RandomState, bits: int) -> np.ndarray:
    """A dark picture of so many bits in a file of 16."""
    gray = generator.randint(0, 128, (48, 48))
    gray[0, 0] = 255
    return (gray * (2**bits - 1) / 255).round().astype(np.uint16)


def settings(dataset_path: Path, **more) -> Config:
    options = {
        "dataset": "folder", "dataset_path": str(dataset_path), "extractor": "resnet10t", "threads": 1,
        "weights_path": "random", "img_size": (64, 64), "precision": "float32", "workers": 0, "device": "cpu",
        "fc_internal": 8, "n_coupling_blocks": 1, "fusion": "none", "holdout": 0.2,
    }  # fmt: skip
    return Config(**(options | more))


@pytest.fixture
def sets(tmp_path, monkeypatch) -> dict[int, Path]:
    """The same twelve pictures in 8, 10, 12 and 16 bits."""
    monkeypatch.chdir(tmp_path)
    folders = {bits: tmp_path / f"of{bits}" for bits in (8, 10, 12, 16)}
    for bits, folder in folders.items():
        folder.mkdir()
        generator = np.random.RandomState(0)
        for i in range(12):
            values = grain(generator, bits)
            Image.fromarray(values.astype(np.uint8) if bits == 8 else values).save(folder / f"{i}.png")
    return folders


def test_the_same_grain_has_the_same_features(sets, capsys):
    caches = {bits: extractor.ensure_features(settings(folder), CPU) for bits, folder in sets.items()}
    told = capsys.readouterr().err
    for bits, cache in caches.items():
        assert (cache.tokens("train")[:] == caches[8].tokens("train")[:]).all()
        scale = {} if bits == 8 else {"integer": [0, 2**bits - 1]}
        assert cache.meta.get("pixel_scale", {}) == scale
        assert (f"{2**bits - 1} white" in told) == (bits > 8)


def test_the_scale_stays_with_the_features(sets, capsys):
    """Whatever comes to the folder later: what exceeds it is clipped, and counted."""
    extractor.ensure_features(settings(sets[12]), CPU)
    Image.fromarray(np.full((48, 48), 65535, np.uint16)).save(sets[12] / "later.png")
    capsys.readouterr()
    cache = extractor.ensure_features(settings(sets[12]), CPU, thorough=True)
    assert cache.meta["pixel_scale"] == {"integer": [0, 4095]} and cache.labels.count() == 13
    assert "1 picture with pixels beyond [0, 4095]" in capsys.readouterr().err


def test_a_detector_keeps_the_scale_of_its_training_pictures(sets):
    """A single dark picture, a file of another number of bits, a float: none is stretched."""
    for bits in (8, 12):
        train.main(settings(sets[bits], modelname=f"of{bits}", class_name="all"))
    scores = []
    for bits in (8, 12):
        fitted = PictureDetector.load(f"runs/of{bits}/classes/of{bits}-seed0", "cpu", 1)
        dark = (np.arange(48 * 48).reshape(48, 48) % 32 * (2**bits - 1) / 255).round()
        Image.fromarray(dark.astype(np.uint8 if bits == 8 else np.uint16)).save("new.png")
        scores.append([fitted.score("new.png"), fitted.score(Image.open("new.png"))])
        assert fitted.pixels("new.png").max() == 31
    assert np.ptp(scores) < 1e-4 * np.max(scores)
    Image.fromarray(np.full((48, 48), 5000, np.uint16)).save("bright.png")
    fitted.score("bright.png")
    assert fitted.backbone.scale.beyond().startswith("1 picture ") and fitted.heat_map("bright.png").any()
