"""Where is it: maps in the picture's shape, AUPRO against a plain transcription, overlays on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_image
from fabricated import JOINED, small_run
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

import main
import predict
from config import UserError
from detector import heat_map
from detector.detector import PlaceFlow
from detector.picture_detector import PictureDetector
from reporting import overlays


def plain_aupro(maps, masks, most_false):
    """Every threshold in turn, every region in turn."""
    values = np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]
    normal = sum((~mask).sum() for mask in masks)
    points = [(0.0, 0.0)]
    for value in values:
        overlaps = []
        for m, mask in zip(maps, masks):
            regions, count = ndimage.label(mask, np.ones((3, 3)))
            overlaps += [(m[regions == r] >= value).mean() for r in range(1, count + 1)]
        false = sum(((m >= value) & ~mask).sum() for m, mask in zip(maps, masks)) / normal
        points.append((false, np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 >= most_false:
            break
        end = min(x1, most_false)
        y_end = y1 if x1 <= most_false else y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / most_false


@pytest.mark.parametrize("levels", [3, 100], ids=["ties", "few ties"])
@pytest.mark.parametrize("most_false", [0.05, 0.3])
def test_aupro_is_the_plain_one(levels, most_false, monkeypatch):
    monkeypatch.setattr(heat_map, "MOST_FALSE", most_false)
    generator = np.random.RandomState(0)
    masks = [ndimage.binary_dilation(generator.rand(14, 11) > 0.97) for _ in range(4)] + [
        np.zeros((9, 9), bool)
    ]
    maps = [np.round((generator.rand(*mask.shape) + 0.5 * mask) * levels) for mask in masks]
    found = heat_map.localisation(maps, masks)
    assert found["aupro"] == pytest.approx(plain_aupro(maps, masks, most_false), abs=1e-9)
    labels, values = (np.concatenate([each.ravel() for each in all_of]) for all_of in (masks, maps))
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(labels, values), abs=1e-9)
    assert np.isnan(list(heat_map.localisation(maps[-1:], masks[-1:]).values())).all(), "no defect at all"


def test_map_of_places_keeps_its_places():
    scores = np.zeros((4, 2))
    scores[1, 1] = 1
    values = heat_map.of_places(scores.ravel(), (4, 2), (40, 80))
    assert values.shape == (40, 80) and values.dtype == np.float32
    assert np.unravel_index(values.argmax(), values.shape)[0] in range(10, 20)
    assert values[10:20, 60:].mean() > 0.5 and values[25:, :40].max() == 0


def test_overlay():
    """The picture, and the same under its map."""
    picture, under = overlays.overlaid(np.zeros((30, 50, 3), np.uint8), np.full((30, 50), 3.0))
    assert picture.size == under.size == (50, 30) and not np.any(picture) and np.any(under)


# ---------------------------------------------------------------- of a run
GOOD = "set/belt/test/good/0.png"
SIZE = (100, 250)  # of the pictures: resnet10t, made for 176 x 176, takes 96 x 288 of them


def surface(generator: np.random.RandomState) -> np.ndarray:
    stripes = 100 + 60 * np.sin(np.arange(SIZE[1]) / 4 + generator.uniform(0, 6))
    return (stripes[None, :, None] + generator.normal(0, 8, (*SIZE, 3))).clip(0, 255).astype(np.uint8)


def spoilt(pixels: np.ndarray) -> np.ndarray:
    """With a defect at the upper right."""
    pixels = pixels.copy()
    pixels[8:28, 200:225] = np.random.RandomState(1).randint(0, 256, (20, 25, 3))
    return pixels


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A long surface with defects, their masks, and a run on it, in its shape, whose score reads places."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("heat"))
    generator, belt = np.random.RandomState(0), Path("set/belt")
    mask = np.zeros(SIZE, np.uint8)
    mask[8:28, 200:225] = 255
    for i in range(20):
        write_image(belt / f"train/good/{i:02d}.png", surface(generator))
    for i in range(3):
        write_image(belt / f"test/good/{i}.png", surface(generator))
        write_image(belt / f"test/spot/{i}.png", spoilt(surface(generator)))
        write_image(belt / f"ground_truth/spot/{i}_mask.png", mask)
    options = JOINED | {"fusion": "none", "places": 6, "img_size": "auto", "keep": "weights"}
    main.main(small_run(dataset="mvtec", dataset_path="set", modelname="heat", **options))
    yield
    patch.undo()


@pytest.mark.slow
def test_run_says_where_the_defects_are(run):
    found = json.loads(Path("runs/heat/results.json").read_text())["found"]["belt"]["localisation"]
    assert 0.7 < found["pixel_auroc"] < 1 and 0 <= found["aupro"] <= 1


@pytest.mark.slow
def test_heat_map_of_a_picture(run, tmp_path):
    loaded = PictureDetector.load("runs/heat/classes/belt-seed0", "cpu", 1)
    assert loaded.fitted.uses_places and loaded.backbone.job.img_size == (96, 288)
    picture = np.asarray(Image.open(GOOD).convert("RGB"))
    values = loaded.heat_map(GOOD)
    assert values.shape == picture.shape[:2] and np.array_equal(values, loaded.heat_map(picture))
    grown = loaded.heat_map(spoilt(picture)) - values
    row, column = np.unravel_index(grown.argmax(), grown.shape)
    assert abs(row - 18) < 20 and abs(column - 212) < 25
    asked = ["runs/heat", GOOD, GOOD, "--heat_maps", str(tmp_path), "--threads", "1"]
    for _ in range(2):  # the second run's take the place of the first's
        assert predict.main(predict.parse_arguments(asked)) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"0-2.png", "0.png"}


@pytest.mark.slow
def test_a_detector_that_reads_no_places_says_so(run, tmp_path, capsys, monkeypatch):
    """Once, and scores all the same."""
    read_places = PlaceFlow.read_places
    monkeypatch.setattr(PlaceFlow, "read_places", lambda self, _: read_places(self, 0.0))
    asked = ["runs/heat", GOOD, GOOD, "--heat_maps", str(tmp_path), "--threads", "1"]
    assert predict.main(predict.parse_arguments(asked)) == 0 and not list(tmp_path.iterdir())
    told = capsys.readouterr()
    assert told.err.count("no heat maps: its score reads no places") == 1 and told.out.count(GOOD) == 2
    with pytest.raises(UserError, match="no heat maps by belt: its score reads no places"):
        PictureDetector.load("runs/heat/classes/belt-seed0", "cpu", 1).heat_map(GOOD)
