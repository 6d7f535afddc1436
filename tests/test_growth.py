"""Pictures that come, go, are renamed, copied, shared: what is missing is extracted, and nothing else."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import content, make_folder, texture, write_image
from fabricated import small_run

import datasets
import extractor
from backbone import extraction, storing
from cache.store import Store
from config import Config, UserError
from datasets import SPLITS

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_folder(Path("images"), classes=("a", "b"), n_train=5, n_test=3)


def settings(**more) -> Config:
    return small_run(**{"dataset_path": "images", "img_size": (32, 32)} | more)


@pytest.fixture
def extracted(monkeypatch):
    """The names of the images that the backbone sees."""
    seen: list[str] = []
    plain = storing.extract_images

    def extract_images(load, part, **more):
        seen.extend(image.name for image in part[1])
        return plain(load, part, **more)

    monkeypatch.setattr(storing, "extract_images", extract_images)
    return seen


def add(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        write_image(folder / name, texture(2, np.random.RandomState(90 + seed)))


def assert_as_anew(config: Config) -> None:
    """The features of a configuration are those of a store made anew."""
    cache = extractor.ensure_features(config, CPU)
    anew = extractor.ensure_features(dataclasses.replace(config, feature_path="anew"), CPU)
    assert content(cache.labels) == content(anew.labels) and cache.meta == anew.meta
    for split in SPLITS:
        got, wanted = (c.arrays(split)["tokens"][:].astype(float) for c in (cache, anew))
        assert np.allclose(got, wanted, rtol=2e-3, atol=2e-3)


def test_a_folder_that_changes_in_every_way(folder, extracted):
    """Pictures are removed, renamed, copied, moved to the other split, added: those are extracted."""
    config = settings()
    extractor.ensure_features(config, CPU)
    extracted.clear()
    (folder / "train/a/00.png").unlink()
    (folder / "train/a/01.png").rename(folder / "train/a/zz.png")
    (folder / "train/b/01.png").rename(folder / "test/b/01b.png")
    shutil.copy(folder / "train/b/02.png", folder / "train/b/02 copy.png")
    add(folder, "train/a/01b.png", "train/b/99.png", "test/a/00a.png")
    extractor.main(config)
    assert sorted(extracted) == ["test/a/00a.png", "train/a/01b.png", "train/b/99.png"]
    assert_as_anew(config)
    extracted.clear()
    extractor.ensure_features(config, CPU)
    assert not extracted


def test_a_renamed_picture_keeps_its_place(folder, extracted):
    """What was fitted to the features stays what it is: its rows are of the same pictures."""
    before = extractor.ensure_features(settings(), CPU)
    (folder / "test/a/00.png").rename(folder / "test/a/zz.png")
    renamed = extractor.ensure_features(settings(), CPU)
    assert renamed.meta == before.meta and renamed.labels.test.names[0] == "test/a/zz.png"
    assert (renamed.arrays("test")["tokens"][:] == before.arrays("test")["tokens"][:]).all()
    for cache in (before, renamed):
        rows = cache.in_rows(datasets.images_of(settings()))
        assert rows.labels.test.names[:2] == ["test/a/zz.png", "test/a/01.png"]
    (folder / "test/a/zz.png").unlink()
    with pytest.raises(UserError, match="the images have changed since they were extracted"):
        renamed.in_rows(datasets.images_of(settings()))
    assert extractor.ensure_features(settings(), CPU).meta["content"] != before.meta["content"]


def test_unreadable_pictures_are_named_and_left_out_on_request(folder, extracted, capsys):
    """In every run, without trying to extract them again; until they can be read."""
    good = (folder / "train/a/00.png").read_bytes()
    (folder / "train/a/zz.png").write_bytes(b"no picture")
    (folder / "train/a/99.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="unreadable images: train/a/99.png, train/a/zz.png; repair.*kept"):
        extractor.ensure_features(settings(), CPU)
    assert len(extracted) == 16 + 1, "the same bytes once"
    extracted.clear()
    for pretrained in (False, True):
        cache = extractor.ensure_features(settings(unreadable="skip", pretrained=pretrained), CPU)
        assert cache.skipped == ["train/a/99.png", "train/a/zz.png"] and len(cache.labels.train.names) == 10
        assert content(cache.in_rows(datasets.images_of(settings())).labels) == content(cache.labels)
        assert "left out, unreadable images: train/a/99.png, train/a/zz.png" in capsys.readouterr().out
    assert not extracted
    with pytest.raises(UserError, match="unreadable images"):
        extractor.ensure_features(settings(pretrained=True), CPU)
    (folder / "train/a/zz.png").write_bytes(good)
    cache = extractor.ensure_features(settings(unreadable="skip"), CPU)
    assert cache.skipped == ["train/a/99.png"] and len(cache.arrays("train")["tokens"]) == 11


def test_a_picture_that_changes_while_it_is_extracted_is_no_other_one(folder, monkeypatch):
    plain = extraction.Extraction.features

    def features(*arguments, **more):
        write_image(folder / "train/b/00.png", texture(1, np.random.RandomState(5)))
        yield from plain(*arguments, **more)

    monkeypatch.setattr(extraction.Extraction, "features", features)
    with pytest.raises(UserError, match="train/b/00.png has changed while its features were extracted"):
        extractor.ensure_features(settings(), CPU)


# ---------------------------------------------------------------- img_size auto
def test_a_folder_that_grows_keeps_its_size(folder, extracted):
    """The one that its first pictures asked for; of other pictures altogether, with restart, a new one."""
    config = settings(img_size="auto", unreadable="skip")
    size = extractor.ensure_features(config, CPU).meta["img_size"]
    for i in range(20):
        write_image(folder / f"train/a/long {i}.png", np.full((20, 200, 3), i, np.uint8))
    extracted.clear()
    grown = extractor.ensure_features(config, CPU)
    assert grown.meta["img_size"] == size and len(extracted) == 20
    extractor.main(dataclasses.replace(config, restart=True))
    assert (anew := extractor.ensure_features(config, CPU).meta["img_size"]) != size
    shutil.rmtree(folder)
    make_folder(folder, classes=("a", "b"), n_train=5, n_test=3, seed=5)
    assert extractor.ensure_features(config, CPU).meta["img_size"] == size != anew


# ---------------------------------------------------------------- restart and prune
def test_prune_drops_what_no_named_data_set_has(folder, extracted, capsys):
    """And what two processes have written."""
    config = settings()
    extractor.main(settings(prune="list"))
    assert capsys.readouterr().out == "no features in features\n"
    extractor.main(config)
    shutil.copytree("images/train/a", "product")
    add(Path("product"), "more.png")
    product = settings(dataset_path="product")
    extracted.clear()
    extractor.main(product)
    assert extracted == ["more.png"], "a picture of two data sets is extracted once"
    extractor.main(dataclasses.replace(product, token_grid="1"))
    capsys.readouterr()
    extractor.main(settings(prune="list"))
    told = capsys.readouterr().out
    name = next(Path("features/datasets").glob("folder-product-*.json")).stem
    images = next(Path("features/datasets").glob("folder-images-*.json")).stem
    assert f"MB ({images} 5, {name} 6)\n" in told and f"MB ({images} 16, {name} 6)\n" in told
    with pytest.raises(UserError, match="unknown data set 'other'"):
        extractor.main(settings(prune=f"{name},other"))
    extracted.clear()
    shard = next(Path("features").glob("resnet10t-*-full-*/*/tokens.npy")).parent
    shutil.copytree(shard, shard.with_name("twice"))
    extractor.main(settings(prune=name))
    rows = [np.load(file).shape[0] for file in Path("features").glob("resnet10t-*-full-*/*/tokens.npy")]
    assert sum(rows) == 6
    extractor.main(product)
    assert not extracted
    assert {path.stem for path in Path("features/datasets").iterdir()} == {name}
    extractor.main(config)
    assert len(extracted) == 11
    Store(Path("features/begun")).begin({"a": 1})
    extractor.main(settings(prune=name))
    assert Store(Path("features/begun")).fields, "an extraction that has just begun needs it"


def test_prune_touches_nothing_that_is_damaged(folder):
    extractor.main(settings())
    product = settings(dataset_path="product")
    shutil.copytree("images/train/a", "product")
    extractor.main(product)
    listed = next(Path("features/datasets").glob("folder-product-*.json"))
    kept = listed.read_bytes()
    listed.write_bytes(kept + b"x")
    for names in ("list", next(Path("features/datasets").glob("folder-images-*.json")).stem):
        with pytest.raises(UserError, match=f"{listed} is damaged: run extractor.py on its data set"):
            extractor.main(settings(prune=names))
    extractor.main(product)
    assert listed.read_bytes() == kept
    identity = next(Path("features").glob("*/identity.json"))
    identity.write_text("damaged")
    extractor.main(settings(prune=listed.stem))
    assert identity.exists() and list(identity.parent.glob("*/tokens.npy"))


def test_what_an_interrupted_extraction_leaves_is_of_its_data_set(folder, monkeypatch):
    """For --prune, which would drop it else; it is not taken for finished."""

    def features(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(extraction.Extraction, "features", features)
    with pytest.raises(KeyboardInterrupt):
        extractor.main(settings())
    assert list(Path("features/datasets").glob("folder-images-*.json"))
    with pytest.raises(UserError, match="images have no features"):
        extractor.ensure_features(settings(pretrained=True), CPU)
