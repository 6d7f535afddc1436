"""Pictures in tiles: where these lie, one score and one map for the whole, whole pictures held out."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import texture, tree, write_image
from fabricated import JOINED, small_run

import datasets
import export
import train
from config import Config, UserError
from detector.picture_detector import PictureDetector
from images.images import OVERLAP, tiles_of, whole_map, whole_scores


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (100, 300), (40, 200), (500, 70)])
def test_tiles_cover_a_picture(size):
    """All of one size; what is no larger than the overlap lies whole in one of them."""
    tiles = tiles_of(size, 64)
    assert {(t.height, t.width) for t in tiles} == {(min(64, size[0]), min(64, size[1]))}
    small = int(64 * OVERLAP) - 1
    for top in range(0, size[0] - small, 3):
        for left in range(0, size[1] - small, 3):
            assert any(
                0 <= top - t.top <= t.height - small and 0 <= left - t.left <= t.width - small for t in tiles
            )
    counts = [1 if side <= 64 else int(np.ceil((side - 64) / 48)) + 1 for side in size]
    assert len(tiles) == np.prod(counts), "no more than that takes"
    assert tiles_of(size, 0) == [(0, 0, *size)]


def test_from_tiles_to_the_whole():
    assert whole_scores(np.array([1.0, 3, 2, 5, 4, 0]), ["b", "b", "b", "a", "a", "c"]).tolist() == [3, 5, 0]
    apart = whole_scores(np.array([9.0, 1, 2, 9]), np.array([5, 7, 8, 5]))
    assert apart.tolist() == [9, 1, 2], "copies of a picture need not follow one another"
    tiles = tiles_of((6, 4), 4)
    whole = whole_map([np.full((4, 4), value) for value in (1.0, 2.0)], tiles, (6, 4))
    assert whole[:, 0].tolist() == [1, 1, 2, 2, 2, 2]


def test_tiles_of_a_set_are_its_images(tmp_path):
    """Of the pictures' own pixels, known by content and place; an unreadable picture is one image."""
    for name, size in (("b", (100, 64)), ("a", (64, 130))):
        pixels = np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8)
        write_image(tmp_path / f"{name}.png", pixels)
    (tmp_path / "c.png").write_bytes(b"broken")
    (tmp_path / "d.png").write_bytes((tmp_path / "b.png").read_bytes())
    whole = datasets.images_of(Config(dataset="folder", dataset_path=str(tmp_path)))
    tiles = datasets.images_of(Config(dataset="folder", dataset_path=str(tmp_path), tiles=64))
    names = tiles.labels.train.names
    assert [datasets.picture_of(name) for name in names] == [f"{p}.png" for p in "aaabbcdd"]
    assert set(tiles.labels.train.category) == {0} and len(tiles.labels.train.defect) == 8
    assert (tiles.read("train", 1) == whole.read("train", 0)[:, 33:97]).all()
    assert tiles.images["train"][1].size() == (64, 64)
    hashes = tiles.hashes("train")
    assert hashes[3:5] == hashes[6:] and len(set(hashes)) == 6
    with pytest.raises(UserError, match="c.png"):
        tiles.read("train", 5)

    tree(tmp_path / "tested", "train/a/0.png", "test/a/0.png", "test/b/0.png")
    with pytest.raises(UserError, match="good pictures alone, got 2 test images"):
        datasets.images_of(Config(dataset="folder", dataset_path=str(tmp_path / "tested"), tiles=64))


@pytest.mark.slow
def test_a_detector_of_tiles(tmp_path, monkeypatch):
    """Held-out scores are those of whole pictures, each that of its worst tile, as a new picture is scored,
    and no tile of them is trained on. A small defect shows in score and heat map."""
    generator = np.random.RandomState(0)
    for i in range(12):
        write_image(tmp_path / "good" / f"{i}.png", texture(0, generator, 128)[:96])
    monkeypatch.chdir(tmp_path)
    options = JOINED | {"fusion": "none", "places": 6, "holdout": 0.3}
    train.main(small_run(dataset_path="good", extractor="resnet18", tiles=64, modelname="tiles", **options))
    path = Path("runs/tiles/classes/good-seed0")
    loaded, record = PictureDetector.load(path, "cpu", 1), json.loads(Path(f"{path}.json").read_text())
    assert record["result"]["n_train"] == 8 * 6 and record["result"]["n_held_out"] == 4 * 6
    scores = loaded.score([f"good/{i}.png" for i in range(12)])
    assert len(record["held_out_scores"]) == loaded.threshold.n == 4
    for held in record["held_out_scores"]:
        assert np.isclose(scores, held, rtol=5e-3).sum() == 1
    good = texture(0, np.random.RandomState(1), 128)[:96]
    spoilt = good.copy()
    spoilt[70:82, 100:112] = np.random.RandomState(2).randint(0, 256, (12, 12, 3))
    loaded.fitted.read_places(1.0)
    assert loaded.score(spoilt) > loaded.score(good)
    values = loaded.heat_map(spoilt)
    assert values.shape == (96, 128) and values[70:82, 100:112].mean() > values[:40, :50].mean()
    with pytest.raises(UserError, match="tiles of 64 pixels"):
        export.main(export.parse_arguments([str(path), "x.pt2", "--threads", "1"]))
