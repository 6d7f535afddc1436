"""img_size auto: pictures keep their shape, and small ones are enlarged."""

import numpy as np
import pytest
from conftest import write_image
from fabricated import small_run

import datasets
from backbone.backbones import size_for, size_in_shape


def size_of(**options) -> tuple[int, int]:
    config = small_run(img_size="auto", **options)
    return size_for(config.extractor, datasets.images_of(config), {})


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


def test_small_images_are_enlarged_for_a_cnn_alone(tmp_path):
    """Of every data set, in files or arrays, five times (28 pixels: 128 is the nearest), at least to 96 x 96;
    a transformer has them at its own size."""
    for i in range(3):
        write_image(tmp_path / f"train/cat/{i}.png", np.zeros((28, 28, 3), np.uint8))
        write_image(tmp_path / f"test/cat/{i}.png", np.zeros((28, 28, 3), np.uint8))
    assert size_of(dataset="cifar10", dataset_path=str(tmp_path)) == (128, 128)
    assert size_of(dataset="digits") == (96, 96)
    assert size_of(dataset="digits", extractor="test_vit") == (160, 160)


def test_a_backbone_of_one_size_keeps_it(tmp_path, capsys):
    """Its attention learns a number for each distance."""
    write_image(tmp_path / "train/cat/1.png", np.zeros((100, 250, 3), np.uint8))
    write_image(tmp_path / "test/cat/1.png", np.zeros((100, 250, 3), np.uint8))
    assert size_of(dataset_path=str(tmp_path), extractor="levit_128s") == (224, 224)
    assert "levit_128s takes 224x224 only" in capsys.readouterr().out
