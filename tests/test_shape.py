"""img_size auto: pictures keep their shape, from extraction to heat map and exported file."""

import shutil

import numpy as np
import pytest
import torch
from conftest import write_image

import datasets
import train
from backbone.backbones import size_for, size_in_shape
from config import Config
from detector.picture_detector import PictureDetector

CPU = torch.device("cpu")
HEIGHT, WIDTH = 100, 250  # of the pictures: resnet10t, made for 176 x 176, takes 96 x 288 of them
SIZE = (96, 288)


def surface(generator: np.random.RandomState, size=(HEIGHT, WIDTH)) -> np.ndarray:
    stripes = 100 + 60 * np.sin(np.arange(size[1]) / 4 + generator.uniform(0, 6))
    return (stripes[None, :, None] + generator.normal(0, 8, (*size, 3))).clip(0, 255).astype(np.uint8)


def spoilt(pixels: np.ndarray) -> np.ndarray:
    """With a defect at the upper right."""
    pixels = pixels.copy()
    pixels[8:28, 200:225] = np.random.RandomState(1).randint(0, 256, (20, 25, 3))
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In MVTec layout, with masks."""
    root, generator = tmp_path_factory.mktemp("shape"), np.random.RandomState(0)
    for i in range(20):
        write_image(root / f"set/belt/train/good/{i:02d}.png", surface(generator))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[8:28, 200:225] = 255
    for i in range(4):
        write_image(root / f"set/belt/test/good/{i}.png", surface(generator))
        write_image(root / f"set/belt/test/spot/{i}.png", spoilt(surface(generator)))
        write_image(root / f"set/belt/ground_truth/spot/{i}_mask.png", mask)
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    yield root
    patch.undo()


def settings(**more) -> Config:
    options = {
        "dataset": "mvtec", "dataset_path": "set", "extractor": "resnet10t", "weights_path": "random",
        "img_size": "auto", "precision": "float32", "threads": 1, "workers": 0,
        "device": "cpu", "fc_internal": 16, "n_coupling_blocks": 1, "fusion": "none",
    }  # fmt: skip
    return Config(**(options | more))


def size_of(config: Config) -> tuple[int, int]:
    return size_for(config.extractor, datasets.images_of(config), {})


PLACES = {
    "bands": True, "places": 6, "score": "joined", "holdout": 0.2, "least_steps": 9,
    "modelname": "belt", "class_name": "belt",
}  # fmt: skip


# ---------------------------------------------------------------- the size
@pytest.mark.parametrize(
    "sizes, pixels, size",
    [
        ([(630, 250)], 2 * 224**2, (512, 192)),
        ([(1024, 1024)], 2 * 224**2, (320, 320)),
        ([(300, 300)], 448**2, (288, 288)),  # enlarging adds nothing
        ([(64, 64)], 2 * 224**2, (224, 224)),  # but for what the backbone was made for
        ([(32, 32)], 2 * 224**2, (160, 160)),  # small ones five times
        ([(8, 8)], 2 * 224**2, (96, 96)),  # at least
        ([(3000, 1), (3000, 1)], 224**2, (4096, 32)),
        ([(400, 200), (400, 200), (90, 900)], 224**2, (320, 160)),  # the median, not the mean
    ],
)
def test_size_in_the_pictures_shape(sizes, pixels, size):
    assert size_in_shape(np.array(sizes), pixels, (224, 224), 32, 5) == size


def test_classes_of_another_shape_are_told(tmp_path, capsys):
    """Two long and one square class: the square one is squeezed, and said to be."""
    for name, width in (("belt", 40), ("board", 100), ("rail", 110)):
        for i in range(3):
            write_image(tmp_path / f"train/{name}/{i}.png", np.zeros((40, width, 3), np.uint8))
    height, width = size_of(settings(dataset="folder", dataset_path=str(tmp_path)))
    assert width / height > 2
    told = f"img_size auto: pictures of belt are squeezed into {height}x{width}; a class of another"
    assert told in capsys.readouterr().out
    shutil.rmtree(tmp_path / "train/belt")
    size_of(settings(dataset="folder", dataset_path=str(tmp_path)))
    assert "squeezed" not in capsys.readouterr().out


def test_small_images_are_enlarged_for_a_cnn_alone(tmp_path):
    """Of every data set, in files or arrays, five times (28 pixels: 128 is the nearest), at least to 96 x 96;
    a transformer has them at its own size."""
    for i in range(3):
        write_image(tmp_path / f"train/cat/{i}.png", np.zeros((28, 28, 3), np.uint8))
        write_image(tmp_path / f"test/cat/{i}.png", np.zeros((28, 28, 3), np.uint8))
    cifar10 = settings(dataset="cifar10", dataset_path=str(tmp_path))
    assert size_of(cifar10) == (128, 128)
    digits = settings(dataset="digits", dataset_path=None)
    assert size_of(digits) == (96, 96)
    transformer = settings(dataset="digits", dataset_path=None, extractor="test_vit")
    assert size_of(transformer) == (160, 160)


def test_a_backbone_of_one_size_keeps_it(folder, capsys):
    config = settings(extractor="levit_128s")  # its attention learns a number for each distance
    assert size_of(config) == (224, 224)
    assert "levit_128s takes 224x224 only" in capsys.readouterr().out


# ---------------------------------------------------------------- a run
@pytest.mark.slow
def test_heat_map_has_the_pictures_shape(folder):
    train.main(settings(**PLACES))
    loaded = PictureDetector.load("runs/belt/classes/belt-seed0", "cpu", 1)
    assert loaded.fitted.uses_places and loaded.backbone.job.img_size == SIZE
    good = surface(np.random.RandomState(9))
    values = loaded.heat_map(spoilt(good)) - loaded.heat_map(good)
    assert values.shape == (HEIGHT, WIDTH)
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert abs(row - 18) < 20 and abs(column - 212) < 25
