"""Pictures added to a folder whose features are cached."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder, texture, write_image

import extractor
from backbone import extraction, storing
from cache import growth, manifest
from config import Config, UserError
from datasets import SPLITS
from shell.files import write_sealed
from shell.locks import Lock

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_folder(Path("images"), classes=("a", "b"), n_train=5, n_test=3)


def settings(**more) -> Config:
    options = {
        "dataset": "folder", "dataset_path": "images", "extractor": "resnet10t", "img_size": (32, 32),
        "weights_path": "random", "precision": "float32", "feature_path": "kept",
    }  # fmt: skip
    return Config(**(options | more))


@pytest.fixture
def extracted(monkeypatch):
    """The images (split, row) that the backbone sees."""
    seen = []
    plain = extraction.Extraction.features

    def features(self, split, start=0, stop=None, unreadable=None):
        seen.extend((split, i) for i in range(start, stop))
        return plain(self, split, start, stop, unreadable)

    monkeypatch.setattr(extraction.Extraction, "features", features)
    return seen


def add(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        write_image(folder / name, texture(2, np.random.RandomState(90 + seed)))


def test_a_folder_of_good_pictures_grows_at_its_end(folder, extracted):
    """All shards that there were stay as they are, and none is among those that are wanted."""
    config = settings(dataset_path="images/train/a")
    before = extractor.ensure_features(config, CPU).tokens("train")[:]
    extracted.clear()
    add(folder, "train/a/later.png")
    grown = extractor.ensure_features(config, CPU)
    assert extracted == [("train", 5)] and np.array_equal(grown.tokens("train")[:5], before)


@pytest.mark.parametrize("way", ["train", "extractor"])
@pytest.mark.parametrize("shard_rows", [0, 4])
def test_only_new_pictures_are_extracted(folder, extracted, monkeypatch, way, shard_rows):
    """In between and behind, in both splits; all rows are those of a cache made anew."""
    monkeypatch.setattr(storing, "SHARD_ROWS", shard_rows)
    config = settings()
    extractor.ensure_features(config, CPU)
    extracted.clear()
    add(folder, "train/a/01b.png", "train/b/99.png", "test/a/00a.png")
    if way == "train":
        cache = extractor.ensure_features(config, CPU)
    else:
        extractor.main(config)
        cache = extractor.ensure_features(config, CPU)
    assert sorted(extracted) == [("test", 1), ("train", 2), ("train", 11)]
    anew = extractor.ensure_features(dataclasses.replace(config, feature_path="anew"), CPU)
    assert cache.labels.fingerprint() == anew.labels.fingerprint()
    for split in SPLITS:
        n = len(anew.labels.split(split).names)
        got, wanted = (c.tokens(split)[np.arange(n)].astype(float) for c in (cache, anew))
        assert np.allclose(got, wanted, rtol=2e-3, atol=2e-3)
    extracted.clear()
    extractor.ensure_features(config, CPU)
    assert not extracted, "it is whole now"


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_picture_that_changed_or_went_is_no_growth(folder, extracted, monkeypatch, change):
    monkeypatch.setattr(storing, "SHARD_ROWS", 4)
    config = settings()
    extractor.ensure_features(config, CPU)
    add(folder, "train/b/99.png")
    (folder / "train/a/00.png").unlink()
    if change == "changed":
        add(folder, "train/a/00.png")
    with pytest.raises(UserError, match="other images"):
        extractor.ensure_features(config, CPU)


def test_without_the_list_of_images_or_room_nothing_is_carried_over(folder, monkeypatch):
    config = settings()
    extractor.ensure_features(config, CPU)
    add(folder, "train/b/99.png")
    room = growth.MOST
    monkeypatch.setattr(growth, "MOST", 10)
    with pytest.raises(UserError, match="other images"):
        extractor.ensure_features(config, CPU)
    monkeypatch.setattr(growth, "MOST", room)
    whole = Path("kept/images.json").read_text()
    Path("kept/images.json").write_text(whole.replace("0", "1", 1))  # its checksum no longer fits
    with pytest.raises(UserError, match="other images"):
        extractor.ensure_features(config, CPU)
    Path("kept/images.json").write_text(whole)
    extractor.ensure_features(config, CPU)


def test_an_unreadable_newcomer_is_named_and_left_out_on_request(folder, extracted):
    config = settings(unreadable="skip")
    extractor.ensure_features(config, CPU)
    (folder / "train/a/zz.png").write_bytes(b"no picture")
    add(folder, "train/a/99.png")
    cache = extractor.ensure_features(config, CPU)
    assert len(cache.labels.train.names) == 11 and cache.skipped == ["train/a/zz.png"]
    shutil.rmtree("kept")
    anew = extractor.ensure_features(config, CPU)
    assert anew.labels.train.names == cache.labels.train.names


def test_growth_that_cannot_be_made_leaves_the_cache_whole(folder, capsys):
    """Features of another precision serve as they are, but none can be added to them."""
    extractor.ensure_features(settings(precision="bfloat16"), CPU)
    add(folder, "train/a/zz.png")
    for _ in range(2):
        with pytest.raises(UserError, match="precision is bfloat16 there, float32 is wanted"):
            extractor.ensure_features(settings(precision="auto"), CPU)
    (folder / "train/a/zz.png").unlink()
    capsys.readouterr()
    extractor.ensure_features(settings(precision="auto"), CPU)
    assert "reusing the cache" in capsys.readouterr().out


def test_a_copy_of_a_picture_is_a_new_one(folder, extracted):
    config = settings()
    before = extractor.ensure_features(config, CPU).tokens("train")[:]
    extracted.clear()
    shutil.copy(folder / "train/a/04.png", folder / "train/a/05.png")
    rows = extractor.ensure_features(config, CPU).tokens("train")[:]
    assert len(rows) == 11 and not extracted and np.array_equal(rows[5], before[4])


def test_restart_takes_other_features(folder):
    """What was chosen for the machine, or came with another timm, is no reason to keep the old ones."""
    extractor.main(settings(precision="bfloat16"))
    (folder / "train/a/mine.txt").write_text("no picture")
    Path("kept/mine.txt").write_text("no feature")
    extractor.main(settings(precision="auto", restart=True))
    cache = extractor.ensure_features(settings(precision="float32"), CPU)
    assert cache.meta["precision"] == "float32" and Path("kept/mine.txt").read_text() == "no feature"


def test_the_list_is_written_under_the_lock_of_the_folder(folder, monkeypatch):
    """A process that finishes the cache at that moment removes half-written files, under the same lock."""
    plain, free = write_sealed, []

    def write(path, content):
        if path.name == manifest.IMAGES:
            lock = Lock(path.with_name(".lock"))
            free.append(lock.take())
            lock.release()
        plain(path, content)

    monkeypatch.setattr(growth, "write_sealed", write)
    extractor.ensure_features(settings(), CPU)
    assert free == [False]
