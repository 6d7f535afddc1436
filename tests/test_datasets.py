"""Labels of every layout, and what labels and images are known by."""

import json
import re
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from conftest import PIXELS, ROOT, counts, make_folder, tree
from sklearn.datasets import load_digits

import datasets
import extractor
from config import Config, UserError
from datasets import OTHER, SPLITS, Split, choose_classes, load_images
from images.images import read_image


# ---------------------------------------------------------------- digits
def test_digits_split():
    images = load_images("digits", None)
    labels, digits = images.labels, load_digits()
    assert labels.classes == tuple("0123456789")
    assert sorted(len(labels.split(s).names) for s in SPLITS) == [898, 899]
    for i in range(10):
        halves = [counts(labels, split)[str(i)] for split in SPLITS]
        assert sum(halves) == (digits.target == i).sum() and abs(halves[0] - halves[1]) <= 1
    seen = {
        images.read(split, i).tobytes() for split in SPLITS for i in range(len(labels.split(split).names))
    }
    assert len(seen) == len({image.tobytes() for image in digits.images}), (
        "every digit is in one of the halves"
    )
    assert load_images("digits", None).labels.as_json() == labels.as_json()


def test_digits_images():
    images = load_images("digits", None)
    pixels = images.read("train", 0)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8 and (pixels[..., 0] == pixels[..., 2]).all()
    assert max(images.read("test", i).max() for i in range(50)) == 255, "0..16 is stretched to 0..255"


# ---------------------------------------------------------------- folders
def test_folder_labels(texture_folder):
    images = load_images("folder", str(texture_folder))
    labels = images.labels
    assert labels.classes == ("apple", "leaf", "sky") and not labels.per_category
    assert counts(labels, "train") == dict.fromkeys(labels.classes, 24) and counts(
        labels, "test"
    ) == dict.fromkeys(labels.classes, 12)
    train, test, anomalous = labels.one_class("leaf")
    assert {labels.train.names[i].split("/")[1] for i in train} == {"leaf"} and len(train) == 24
    assert test.tolist() == list(range(36))
    assert anomalous.tolist() == [int("/leaf/" not in labels.test.names[i]) for i in test]


def test_folder_images_match_their_names(texture_folder):
    images = load_images("folder", str(texture_folder))
    for i in (0, 30, 71):
        wanted = read_image(texture_folder / images.labels.train.names[i])
        assert (images.read("train", i) == wanted).all()


def test_test_only_folder_is_anomalous_for_all(tmp_path):
    root = tree(
        tmp_path,
        "train/a/1.png",
        "train/b/1.png",
        "test/a/1.png",
        "test/b/1.png",
        "test/weird/1.png",
        "test/weird/2.png",
    )
    labels = load_images("folder", str(root)).labels
    assert labels.classes == ("a", "b") and (labels.test.category == OTHER).sum() == 2
    for name in labels.classes:
        _, test, anomalous = labels.one_class(name)
        assert {labels.test.names[i]: int(a) for i, a in zip(test, anomalous)} == {
            f"test/{folder}/{i}.png": int(folder != name)
            for folder, i in (("a", 1), ("b", 1), ("weird", 1), ("weird", 2))
        }


def test_lbot_layout(tmp_path):
    root = tree(
        tmp_path, "train/normal/1.png", "train/normal/2.png", "test/normal/3.png", "test/abnormal/4.png"
    )
    labels = load_images("lbot", str(root)).labels
    train, test, anomalous = labels.one_class("normal")
    assert labels.classes == ("normal",) and len(train) == 2
    assert {labels.test.names[i]: a for i, a in zip(test, anomalous)} == {
        "test/normal/3.png": 0,
        "test/abnormal/4.png": 1,
    }


def test_kinds_of_anomalies(tmp_path):
    root = tree(tmp_path, "train/a/1.png", "test/a/1.png", "test/dent/1.png")
    assert load_images("folder", str(root)).labels.test.kind == ["", "dent"]


@pytest.mark.parametrize("below", ["", "train/"])
@pytest.mark.parametrize("dataset", ["folder", "lbot"])
def test_normal_pictures_only(tmp_path, capsys, dataset, below):
    """Pictures and nothing else: one class of the folder's name, no test split."""
    root = tree(tmp_path / "bolt", *(f"{below}{i}.png" for i in range(3)), f"{below}.hidden.png")
    (root / below / "notes.txt").write_text("no image")
    images = load_images(dataset, str(root))
    assert images.labels.classes == ("bolt",) and images.labels.test.names == []
    assert images.labels.train.names == ["0.png", "1.png", "2.png"]
    train, test, anomalous = images.labels.one_class("bolt")
    assert train.tolist() == [0, 1, 2] and len(test) == len(anomalous) == 0
    assert "notes" not in capsys.readouterr().out and (images.read("train", 2) == PIXELS + 2).all()


def test_normal_folders_without_test(tmp_path):
    labels = load_images("folder", str(tree(tmp_path, "train/a/1.png", "train/b/2.png"))).labels
    assert labels.classes == ("a", "b") and labels.test.names == []


def test_normal_pictures_beside_folders(tmp_path, capsys):
    """Those in folders are not taken, and that is said."""
    load_images("folder", str(tree(tmp_path, "1.png", "bad/2.png")))
    assert "not those in bad" in capsys.readouterr().err


def test_folders_that_are_no_split(tmp_path):
    """The advice is the folder whose name says that it is normal, else a choice."""
    with pytest.raises(UserError, match="holds bad/, good/.*--dataset_path [^ ]*/good$"):
        load_images("folder", str(tree(tmp_path / "x", "good/1.png", "bad/2.png")))
    with pytest.raises(UserError, match="--dataset_path [^ ]*/Normal$"):
        load_images("lbot", str(tree(tmp_path / "y", "Normal/1.png", "Abnormal/2.png")))
    with pytest.raises(UserError, match="--dataset_path [^ ]*/<one of a, b>$"):
        load_images("folder", str(tree(tmp_path / "z", "a/1.png", "b/2.png")))


KAESE = [unicodedata.normalize(form, "käse") for form in ("NFC", "NFD")]


@pytest.mark.parametrize(
    "train, test", [("normal", "Normal"), ("Good", "good"), ("good ", "good"), ("good", " good"), KAESE]
)
def test_a_folder_spelt_otherwise_is_the_same_class(tmp_path, train, test):
    root = tree(tmp_path, f"train/{train}/1.png", f"test/{test}/2.png", "test/bad/3.png")
    labels = load_images("folder", str(root)).labels
    assert labels.classes == (train,) and labels.test.kind == ["bad", ""] or labels.test.kind == ["", "bad"]
    _, rows, anomalous = labels.one_class(train)
    found = {labels.test.names[i]: a for i, a in zip(rows, anomalous)}
    assert found == {f"test/{test}/2.png": 0, "test/bad/3.png": 1}
    assert choose_classes(labels, test) == [train]


@pytest.mark.parametrize("names", [("A", "a"), ("good", "good "), KAESE], ids=ascii)
@pytest.mark.parametrize("split", SPLITS)
def test_two_folders_of_one_name_are_refused_by_name(tmp_path, split, names):
    root = tree(tmp_path, "train/x/1.png", "test/x/1.png", *(f"{split}/{name}/1.png" for name in names))
    with pytest.raises(UserError) as told:
        load_images("folder", str(root))
    assert all(ascii(name) in str(told.value) for name in names) and "rename" in str(told.value)


def test_splits_in_capitals_are_read(tmp_path):
    labels = load_images("folder", str(tree(tmp_path, "Train/a/1.png", "Test/a/2.png"))).labels
    assert labels.test.names == ["Test/a/2.png"]


def test_what_is_passed_over_is_told_once(tmp_path, capsys):
    root = tree(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", "train/.ipynb_checkpoints/1.png")
    for name in ("train/a/1.txt", "train/b/2.txt", "test/a/Thumbs.db"):
        (root / name).write_text("no image")
    assert load_images("folder", str(root)).labels.classes == ("a", "b")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "3 files that are no images (.txt 2, .db 1)" in told


def test_nested_hidden_and_other_files(tmp_path):
    root = tree(
        tmp_path,
        "train/a/deep/er/1.JPG",
        "train/a/2.bmp",
        "train/a/.hidden.png",
        "test/a/1.png",
        "train/.cache/1.png",
    )
    (root / "train/a/notes.txt").write_text("no image")
    labels = load_images("folder", str(root)).labels
    assert labels.classes == ("a",) and labels.train.names == ["train/a/2.bmp", "train/a/deep/er/1.JPG"]


def test_any_dataset_name_takes_folders(texture_folder):
    """Image folders serve for a data set that torchvision knows, too."""
    wanted = load_images("folder", str(texture_folder)).labels.as_json()
    for name in ("cifar10", "STL10", "CatsvsDogs"):
        assert load_images(name, str(texture_folder)).labels.as_json() == wanted


# ---------------------------------------------------------------- MVTec
MVTEC = ("train/good/1.png", "train/good/2.png", "test/good/3.png", "test/scratch/4.png", "test/hole/5.png")


def test_mvtec_layout(tmp_path):
    root = tree(
        tmp_path,
        *(f"{category}/{name}" for category in ("bottle", "cable") for name in MVTEC),
        "bottle/ground_truth/hole/5_mask.png",
        "licence/1.png",
    )
    labels = load_images("mvtec", str(root)).labels
    assert labels.classes == ("bottle", "cable") and labels.per_category
    for name in labels.classes:
        train, test, anomalous = labels.one_class(name)
        assert [labels.train.names[i] for i in train] == [
            f"{name}/train/good/1.png",
            f"{name}/train/good/2.png",
        ]
        found = {labels.test.names[i]: a for i, a in zip(test, anomalous)}
        assert found == {
            f"{name}/test/good/3.png": 0,
            f"{name}/test/hole/5.png": 1,
            f"{name}/test/scratch/4.png": 1,
        }


def test_mvtec_in_other_letters(tmp_path):
    names = ("Train/good/1.png", "test/Good/3.png", "test/Hole/5.png", "Ground_Truth/hole/5_mask.png")
    images = load_images("mvtec", str(tree(tmp_path / "bottle", *names)))
    assert images.labels.one_class("bottle")[2].tolist() == [0, 1] and images.labels.test.kind == ["", "Hole"]
    assert images.mask(1) is not None


def test_mvtec_single_category(tmp_path):
    labels = load_images("mvtec", str(tree(tmp_path / "bottle", *MVTEC))).labels
    assert labels.classes == ("bottle",)
    assert sorted(labels.one_class("bottle")[2]) == [0, 1, 1]


def test_mvtec_defects_do_not_train(tmp_path):
    labels = load_images("mvtec", str(tree(tmp_path / "bottle", *MVTEC, "train/dent/6.png"))).labels
    assert len(labels.train.names) == 3 and len(labels.one_class("bottle")[0]) == 2


@pytest.mark.parametrize("names", [(), ("bottle/1.png",)])
def test_mvtec_without_categories(tmp_path, names):
    with pytest.raises(UserError, match="train/good"):
        load_images("mvtec", str(tree(tmp_path, *names)))
    with pytest.raises(UserError, match="absent"):
        load_images("mvtec", str(tmp_path / "absent"))


# ---------------------------------------------------------------- real images
REAL_CIFAR = ROOT / "data" / "cifar10"


@pytest.mark.skipif(
    not (REAL_CIFAR / "train").is_dir(), reason=f"the CIFAR-10 images are not in {REAL_CIFAR}"
)
def test_real_cifar10():
    images = load_images("cifar10", str(REAL_CIFAR))
    labels = images.labels
    assert len(labels.classes) == 10
    assert set(counts(labels, "train").values()) == {5000} and set(counts(labels, "test").values()) == {1000}
    _, _, anomalous = labels.one_class(labels.classes[3])
    assert len(anomalous) == 10000 and anomalous.sum() == 9000
    assert images.read("test", 9999).shape == (32, 32, 3)


# ---------------------------------------------------------------- mistakes
def test_choose_classes(texture_folder):
    labels = load_images("folder", str(texture_folder)).labels
    assert choose_classes(labels, "all") == ["apple", "leaf", "sky"]
    assert choose_classes(labels, "sky, apple,sky") == ["sky", "apple"]
    with pytest.raises(UserError, match="did you mean leaf"):
        choose_classes(labels, "apple,leef")
    assert choose_classes(labels, "APPLE") == ["apple"], "as the folders of two splits are paired"
    for text in ("", ",", "apples and pears"):
        with pytest.raises(UserError):
            choose_classes(labels, text)


def test_missing_folder(tmp_path):
    for dataset in ("folder", "CatsvsDogs", "lbot", "mvtec"):
        with pytest.raises(UserError, match="nowhere"):
            load_images(dataset, str(tmp_path / "nowhere"))


def test_folder_without_splits(tmp_path):
    with pytest.raises(UserError, match="train"):
        load_images("folder", str(tree(tmp_path, "cats/1.png")))


def test_folder_without_classes_or_images(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "train"))):
        load_images("folder", str(tmp_path))
    tree(tmp_path, "train/a/1.png")
    (tmp_path / "test/a/readme.txt").write_text("none here")
    with pytest.raises(UserError, match="no images in .*a"):
        load_images("folder", str(tmp_path))


# ---------------------------------------------------------------- what labels and images are known by
def test_split_round_trip():
    split = Split.of(["a", "b"], [0, OTHER], [False, True], ["", "dent"])
    again = Split.from_json(json.loads(json.dumps(split.as_json())))
    assert again.as_json() == split.as_json() and again.kind == ["", "dent"]
    assert again.category.dtype == np.int64 and again.defect.dtype == bool
    older = {name: value for name, value in split.as_json().items() if name != "kind"}
    assert Split.from_json(older).kind == ["", ""]


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["a"]},
        {"category": [0, "x"]},
        {"kind": ["", 3]},
        {"defect": [[True], [False]]},
        {"more": []},
    ],
    ids=str,
)
def test_split_of_other_content(change):
    good = Split.of(["a", "b"], [0, 1]).as_json()
    with pytest.raises(UserError):
        Split.from_json(good | change)
    with pytest.raises(UserError):
        Split.from_json({"names": []})


def test_hashes_follow_content(tmp_path):
    """An image replaced by another of the same size is noticed; a copy of the whole folder elsewhere is the
    same."""
    for place in ("a", "b"):
        make_folder(tmp_path / place, n_train=2, n_test=1, size=4)
    first, second = (load_images("folder", str(tmp_path / place)) for place in "ab")
    assert first.hashes("train") == second.hashes("train")
    changed = tmp_path / "b/train/leaf/01.png"
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    differing = [a != b for a, b in zip(first.hashes("train"), second.hashes("train"))]
    assert differing == [name == "train/leaf/01.png" for name in first.labels.train.names]


def repeats(root) -> str:
    images = load_images("mvtec", str(root))
    return datasets.repeated(images.labels, {split: images.hashes(split) for split in SPLITS})


def test_the_same_picture_in_both_splits_or_under_two_labels_is_told(tmp_path):
    root = tree(tmp_path / "bottle", *MVTEC)
    assert repeats(root) == ""
    shutil.copy(root / "train/good/1.png", root / "train/good/again.png")
    assert repeats(root) == "", "nothing is learnt from it that should not be"
    shutil.copy(root / "train/good/1.png", root / "test/good/again.png")
    told = "the same picture twice: {} in train and test, {} under two labels; {} is {}"
    assert repeats(root) == told.format(1, 0, "test/good/again.png", "train/good/1.png")
    (root / "test/good/again.png").unlink()
    shutil.copy(root / "test/hole/5.png", root / "test/good/again.png")
    assert repeats(root) == told.format(0, 1, "test/hole/5.png", "test/good/again.png")
    shutil.copy(root / "train/good/1.png", root / "test/scratch/4.png")
    assert repeats(root) == told.format(1, 2, "test/hole/5.png", "test/good/again.png")


def test_every_script_tells_of_the_same_picture_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tree(tmp_path / "set", "train/a/1.png", "test/a/2.png")
    shutil.copy(root / "train/a/1.png", root / "test/a/2.png")
    options = {"extractor": "resnet10t", "weights_path": "random", "img_size": (32, 32), "workers": 0}
    config = Config(dataset="folder", dataset_path=str(root), device="cpu", threads=1, **options)
    extractor.ensure_features(config, torch.device("cpu"))
    assert "note: the same picture twice: 1 in train and test, 0 under" in capsys.readouterr().err


def test_hashes_of_arrays():
    digits = load_images("digits", None)
    hashes = digits.hashes("test")
    assert len(set(hashes)) == len({digits.read("test", i).tobytes() for i in range(len(hashes))})


def test_listed_images_are_those_of_both_splits(texture_folder):
    whole, chosen = load_images("folder", str(texture_folder)), [("test", 5), ("train", 0), ("train", 9)]
    names = [(split, whole.labels.split(split).names[i]) for split, i in chosen]
    listed = whole.listed(names)
    assert listed.labels.train.names == [name for _, name in names]
    for row, image in enumerate(chosen):
        assert (listed.read("train", row) == whole.read(*image)).all()
        assert listed.identify("train", row) == whole.identify(*image)
    with pytest.raises(UserError, match="train/sky/x.png has gone"):
        whole.listed([("train", "train/sky/x.png")])


def test_name_tells_two_products_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def name(dataset, path):
        return datasets.name_of(Config(dataset=dataset, dataset_path=path))

    first, second = (name("folder", str(tmp_path / place / "pro duct")) for place in "ab")
    assert first != second and first.startswith("folder-pro_duct-")
    assert name("folder", "a/pro duct") == name("folder", "a/../a/pro duct/") == first
    assert name("mvtec", None) == name("mvtec", "data/mvtec") == "mvtec"
    assert name("cifar10", "/anywhere") == "cifar10" and name("digits", "/anywhere") == "digits"
