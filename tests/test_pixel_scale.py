"""The scale of pixels of more than eight bits, from the training pictures to the verdict."""

from pathlib import Path

import numpy as np
import torch
from fabricated import small_run
from PIL import Image

import extractor
import train
from detector.picture_detector import PictureDetector


def save(path: Path, gray: np.ndarray, bits: int) -> None:
    """A picture of 0..255 in so many bits; in a file of 16 where these are more than 8."""
    values = (gray * (2**bits - 1) / 255).round()
    Image.fromarray(values.astype(np.uint8 if bits == 8 else np.uint16)).save(path)


def test_a_data_set_and_its_detector_keep_the_scale_of_the_training_pictures(tmp_path, monkeypatch):
    """Twelve dark pictures in 8 and 12 bits. A single darker one, a file of another number of bits: none is
    stretched. A picture that is added later and exceeds the scale leaves it as it is."""
    monkeypatch.chdir(tmp_path)
    options, scores = {"fusion": "none", "holdout": 0.2}, []
    configs = {n: small_run(**options, dataset_path=f"of{n}", modelname=f"of{n}") for n in (8, 12)}
    for bits, config in configs.items():
        Path(config.dataset_path).mkdir()
        generator = np.random.RandomState(0)
        for i in range(12):
            gray = generator.randint(0, 128, (48, 48))
            gray[0, 0] = 255
            save(Path(config.dataset_path, f"{i}.png"), gray, bits)
        train.main(config)
        fitted = PictureDetector.load(f"runs/of{bits}/classes/of{bits}-seed0", "cpu", 1)
        save(Path("new.png"), np.arange(48 * 48).reshape(48, 48) % 32, bits)
        scores.append([fitted.score("new.png"), fitted.score(Image.open("new.png"))])
        assert fitted.pixels("new.png").max() == 31
    assert np.ptp(scores) < 1e-4 * np.max(scores)
    save(Path("of12/later.png"), np.full((48, 48), 255), 16)
    assert fitted.pixels("of12/later.png").min() == 255
    cache = extractor.ensure_features(configs[12], torch.device("cpu"), thorough=True)
    assert cache.meta["pixel_scale"] == {"integer": [0, 4095]} and len(cache.labels.train.names) == 13
