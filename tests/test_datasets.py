"""Labels of own pictures, and what labels and images are known by."""

import dataclasses
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from conftest import PIXELS, content, counts, load_images, tree, truth
from fabricated import settings
from sklearn.datasets import load_digits

import extractor
from config import Config, UserError
from datasets import SPLITS, choose_classes, name_of
from detector import class_data
from images.images import pixels_of


# ---------------------------------------------------------------- digits
def test_digits():
    """Every digit is in one of the halves, 0..16 is stretched to 0..255."""
    found, digits = load_images("digits", None), load_digits()
    assert found.labels.classes == tuple("0123456789")
    for i in range(10):
        halves = [counts(found.labels, split)[str(i)] for split in SPLITS]
        assert sum(halves) == (digits.target == i).sum() and abs(halves[0] - halves[1]) <= 1
    read = [found.read(split, i) for split in SPLITS for i in range(len(found.labels.split(split).names))]
    assert {image.tobytes() for image in read} == {
        np.repeat((image * 255 / 16).round().astype(np.uint8)[..., None], 3, -1).tobytes()
        for image in digits.images
    }
    hashes = found.hashes("train") + found.hashes("test")
    assert len(set(hashes)) == len({image.tobytes() for image in read})
    assert content(load_images("digits", None).labels) == content(found.labels)


# ---------------------------------------------------------------- folders
def test_folder_labels(tmp_path):
    """What is of no class is anomalous for all. Image folders serve for a set that torchvision knows, too."""
    root = tree(tmp_path, *(f"{split}/{name}/{i}.png" for split in SPLITS for name in "ab" for i in range(2)))
    tree(root, "test/odd/1.png")
    found = load_images("folder", str(root))
    labels = found.labels
    assert labels.classes == ("a", "b") and not labels.per_category
    train, _, _ = labels.one_class("b")
    assert [labels.train.names[i] for i in train] == ["train/b/0.png", "train/b/1.png"]
    for name in labels.classes:
        assert truth(labels, name) == {test: int(f"/{name}/" not in test) for test in labels.test.names}
    assert labels.test.kind == [""] * 4 + ["odd"]
    for i, name in enumerate(labels.train.names):
        assert (found.read("train", i) == pixels_of(root / name)).all()
    for name in ("cifar10", "STL10", "CatsvsDogs"):
        assert content(load_images(name, str(root)).labels) == content(labels)


@pytest.mark.parametrize("dataset, below", [("folder", ""), ("lbot", "train/")])
def test_normal_pictures_only(tmp_path, dataset, below):
    """Pictures and nothing else: one class of the folder's name, no test split."""
    root = tree(tmp_path / "bolt", *(f"{below}{i}.png" for i in range(3)), f"{below}.hidden.png")
    found = load_images(dataset, str(root))
    assert found.labels.classes == ("bolt",) and found.labels.test.names == []
    assert found.labels.train.names == [f"{below}{i}.png" for i in range(3)]
    train, test, anomalous = found.labels.one_class("bolt")
    assert train.tolist() == [0, 1, 2] and len(test) == len(anomalous) == 0
    assert (found.read("train", 2) == PIXELS + 2).all()


def test_what_is_not_taken_is_told(tmp_path, capsys):
    root = tree(tmp_path / "set", "train/a/1.png", "train/a/.cache/1.png", "train/2.png", "test/a/deep/3.JPG")
    (root / "train/a/notes.txt").write_text("no image")
    assert load_images("folder", str(root)).labels.train.names == ["train/a/1.png"]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "2 files or folders" in told and ".txt 1" in told
    assert f"pictures beside the folders in {root / 'train'} 1" in told
    load_images("folder", str(tree(tmp_path / "flat", "1.png", "bad/2.png")))
    assert "(bad/ 1)" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds bad/, good/"):
        load_images("folder", str(tree(tmp_path / "x", "good/1.png", "bad/2.png")))


KAESE = [unicodedata.normalize(form, "käse") for form in ("NFC", "NFD")]


@pytest.mark.parametrize(
    "train, test", [("normal", "Normal"), ("Good", "good"), ("good ", "good"), ("good", " good"), KAESE]
)
def test_a_folder_spelt_otherwise_is_the_same_class(tmp_path, train, test):
    names = (f"Train/{train}/1.png", f"test/{test}/2.png", f"test/{train}/4.png", "test/bad/3.png")
    labels = load_images("folder", str(tree(tmp_path, *names))).labels
    assert labels.classes == (train,)
    assert truth(labels, train) == {names[1]: 0, names[2]: 0, names[3]: 1}
    assert choose_classes(labels, test) == [train]


def test_a_split_without_images(tmp_path):
    tree(tmp_path, "train/a/1.png")
    empty = f"per class in {tmp_path / 'test'}, but .* is empty"
    for folder, told in (("test", empty), ("test/a", "no images in .*a")):
        (tmp_path / folder).mkdir()
        with pytest.raises(UserError, match=told):
            load_images("folder", str(tmp_path))


# ---------------------------------------------------------------- what labels and images are known by
def test_what_a_data_set_holds_out_does_not_train(cache):
    """Of a class without such pictures a share is held out as ever."""
    sources = [class_data.TokenSource(cache.arrays(split), torch.device("cpu")) for split in SPLITS]
    held = np.isin(np.arange(len(cache.labels.train.names)), (1, 3))
    flagged = dataclasses.replace(cache.labels, train=dataclasses.replace(cache.labels.train, held=held))
    listed = dataclasses.replace(cache.images, labels=flagged)
    assert listed.fingerprint() != cache.images.fingerprint(), "what was fitted before is not taken for it"
    for holdout, usual in ((0.0, 0), (0.2, 8)):
        own, other = (
            class_data.class_data(settings(holdout=holdout), flagged, name, 0, *sources) for name in "ab"
        )
        assert own.held_rows.tolist() == [1, 3] and len(own.fit_rows) == 38
        before = class_data.class_data(settings(holdout=holdout), cache.labels, "b", 0, *sources)
        assert len(other.held_rows) == usual and (other.held_rows == before.held_rows).all()


@pytest.mark.parametrize("tiles", [0, 32])
def test_copies_of_a_picture_are_held_out_together(cache, tiles):
    """A threshold does not rest on pictures that were fitted to."""
    names = [f"{name}#0,0" for name in cache.labels.train.names]
    labels = dataclasses.replace(cache.labels, train=dataclasses.replace(cache.labels.train, names=names))
    train, test = (class_data.TokenSource(cache.arrays(split), torch.device("cpu")) for split in SPLITS)
    first, second = np.split(cache.labels.one_class("a")[0], 2)
    train.semantic = train.semantic.clone()
    train.semantic[second] = train.semantic[first]
    found = class_data.class_data(settings(holdout=0.2, tiles=tiles), labels, "a", 0, train, test)
    held, fitted = np.isin(first, found.held_rows), np.isin(first, found.fit_rows)
    assert held.sum() == 4 and (held != fitted).all() and (held == np.isin(second, found.held_rows)).all()
    assert set(found.held_pictures) == set(first[held])


def test_the_same_picture_in_both_splits_or_under_two_labels_is_told(tmp_path, capsys):
    """By every script that asks for features."""
    root = tree(tmp_path / "set", "train/good/1.png", "test/good/2.png", "test/hole/3.png")
    shutil.copy(root / "train/good/1.png", root / "train/good/again.png")  # nothing wrong with that
    options = {"extractor": "resnet10t", "weights_path": "random", "img_size": (32, 32), "workers": 0}
    options |= {"dataset": "mvtec", "dataset_path": str(root), "feature_path": str(tmp_path / "features")}

    def told() -> str:
        extractor.ensure_features(Config(device="cpu", threads=1, **options), torch.device("cpu"))
        return capsys.readouterr().err

    assert "two labels" not in told()
    shutil.copy(root / "train/good/1.png", root / "test/good/2.png")
    line = "note: {} in two splits or under two labels, too: test/good/2.png is train/good/1.png"
    assert line.format("1 pictures") in told()
    shutil.copy(root / "train/good/1.png", root / "test/hole/3.png")
    assert line.format("2 pictures") + "; test/hole/3.png is train/good/1.png\n" in told()
    for name in ("test/good/2.png", "validation/good/4.png"):
        shutil.copy(root / "test/hole/3.png", tree(root, name) / name)
    assert "3 pictures in two splits" in told()


def test_image_folders_have_lists_of_their_own(tmp_path):
    """Those of a data set that is published as arrays, too, but in its default place."""
    roots = [tree(tmp_path / name, "train/a/1.png", "test/a/2.png") for name in "ab"]
    names = [name_of(Config(dataset="cifar10", dataset_path=str(root))) for root in (*roots, tmp_path)]
    assert len({*names}) == 3 and names[2] == name_of(Config(dataset="cifar10")) == "cifar10"
