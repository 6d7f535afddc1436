"""Where is it: maps at the picture's size, AUPRO against a plain transcription, overlays on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import texture, write_image
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

import main
import predict
from config import Config, UserError
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
def test_aupro_is_the_plain_one(levels, most_false):
    generator = np.random.RandomState(0)
    masks = [ndimage.binary_dilation(generator.rand(14, 11) > 0.97) for _ in range(4)] + [
        np.zeros((9, 9), bool)
    ]
    maps = [np.round((generator.rand(*mask.shape) + 0.5 * mask) * levels) for mask in masks]
    found = heat_map.localisation(maps, masks, most_false)
    assert found["aupro"] == pytest.approx(plain_aupro(maps, masks, most_false), abs=1e-9)
    labels, values = (np.concatenate([each.ravel() for each in all_of]) for all_of in (masks, maps))
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(labels, values), abs=1e-9)


def test_aupro_by_hand():
    mask = np.zeros((10, 10), bool)
    mask[:2, :2] = mask[7:, 7:] = True

    def aupro(values, mask):
        return heat_map.localisation([values], [mask])["aupro"]

    assert aupro(mask.astype(float), mask) == pytest.approx(1)
    assert aupro(np.zeros((10, 10)), mask) == pytest.approx(0.15), "chance: half of 0.3"
    one = mask.copy()
    one[7:, 7:] = False  # one region of two is found, whatever its size
    assert aupro(one.astype(float), mask) == pytest.approx(0.5 + 0.5 * 0.15)
    found = heat_map.localisation([np.zeros((4, 4))], [np.zeros((4, 4), bool)])
    assert np.isnan(list(found.values())).all()


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
CONFIG = Config(
    dataset="mvtec", dataset_path="set", extractor="resnet10t", weights_path="random",
    img_size=(64, 64), precision="float32", threads=1, fc_internal=16, workers=0,
    n_coupling_blocks=1, fusion="none", bands=True, places=6, score="joined", least_steps=20,
    holdout=0.2, device="cpu", modelname="heat", keep="weights",
)  # fmt: skip
GOOD = "set/belt/test/good/0.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A surface with defects, their masks, and a run on it whose score reads places."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("heat"))
    generator, belt = np.random.RandomState(0), Path("set/belt")
    mask = np.zeros((64, 64), np.uint8)
    mask[8:24, 40:56] = 255
    for i in range(20):
        write_image(belt / f"train/good/{i:02d}.png", texture(0, generator, 64))
    for i in range(3):
        good, bad = (texture(0, generator, 64) for _ in range(2))
        bad[mask > 0] = generator.randint(0, 256, (256, 3))
        for place, pixels in (("test/good", good), ("test/spot", bad), ("ground_truth/spot", mask)):
            write_image(belt / place / (f"{i}_mask.png" if pixels is mask else f"{i}.png"), pixels)
    main.main(CONFIG)
    yield
    patch.undo()


@pytest.mark.slow
def test_run_says_where_the_defects_are(run):
    found = json.loads(Path("runs/heat/results.json").read_text())["found"]["belt"]["localisation"]
    assert 0.7 < found["pixel_auroc"] < 1 and 0 <= found["aupro"] <= 1


@pytest.mark.slow
def test_heat_map_of_a_picture(run, tmp_path):
    loaded = PictureDetector.load("runs/heat/classes/belt-seed0", "cpu", 1)
    assert loaded.fitted.uses_places
    picture = np.asarray(Image.open(GOOD).convert("RGB"))
    values = loaded.heat_map(GOOD)
    assert values.shape == picture.shape[:2] and np.array_equal(values, loaded.heat_map(picture))
    spoilt = picture.copy()
    spoilt[:16, -16:] = np.random.RandomState(0).randint(0, 256, (16, 16, 3))
    grown = loaded.heat_map(spoilt) - values
    assert grown[:16, -16:].mean() > 3 * abs(grown[32:, :32].mean())
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
