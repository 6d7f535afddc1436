"""The folders that data sets are published in, and what is said when they are not as expected."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import PIXELS, counts, tree, write_image
from PIL import Image
from test_datasets import MVTEC

from config import UserError
from datasets import SPLITS, Labels, load_images
from images import layouts


def refused(dataset: str, root: Path) -> str:
    """The line that is said of a folder."""
    with pytest.raises(UserError) as told:
        load_images(dataset, str(root))
    return str(told.value)


def by_kind(labels: Labels) -> dict[str, list[str]]:
    """The names of the test images by kind of defect."""
    found: dict[str, list[str]] = {}
    for name, kind in zip(labels.test.names, labels.test.kind):
        found.setdefault(kind, []).append(name)
    return found


# ---------------------------------------------------------------- MVTec-style
@pytest.mark.parametrize("folder", ["", "BTech_Dataset_transformed/"])
def test_btad_layout(tmp_path, folder):
    """ "ok" for "good", numbers for names, masks of the image's own name; perhaps one folder deeper."""
    names = ("train/ok/0.bmp", "test/ok/1.bmp", "test/ko/2.bmp", "test/ko/3.bmp", "ground_truth/ko/2.png")
    labels = load_images("BTAD", str(tree(tmp_path, *(f"{folder}01/{name}" for name in names)))).labels
    assert labels.classes == ("01",) and labels.one_class("01")[2].tolist() == [1, 1, 0]
    assert labels.test.kind == ["ko", "ko", ""] and len(labels.one_class("01")[0]) == 1


def test_mvtec_without_test(tmp_path):
    labels = load_images("mvtec", str(tree(tmp_path / "bottle", "train/good/1.png"))).labels
    assert labels.test.names == [] and len(labels.one_class("bottle")[0]) == 1


def test_kinds_and_masks(tmp_path):
    """The mask of each defective image: beside its name, in subfolders too; none for the others."""
    root = tree(tmp_path / "bottle", *MVTEC, "test/hole/deep/6.png")
    mask = np.zeros((5, 4), np.uint8)
    mask[2, 3] = 255
    for name in ("hole/5_mask.png", "hole/deep/6_mask.png"):
        write_image(root / "ground_truth" / name, mask)
    images = load_images("mvtec", str(root))
    names, kinds = images.labels.test.names, images.labels.test.kind
    assert dict(zip(names, kinds)) == {
        "test/good/3.png": "",
        "test/hole/5.png": "hole",
        "test/hole/deep/6.png": "hole",
        "test/scratch/4.png": "scratch",
    }
    for i, kind in enumerate(kinds):
        found = images.mask(i)
        assert (found is None) if kind != "hole" else (found == (mask > 0)).all()
    assert load_images("digits", None).mask(0) is None


@pytest.mark.parametrize(
    "mode, value", [("1", 255), ("L", 1), ("P", 1), ("RGB", 9), ("LA", 9), ("I;16", 300)]
)
def test_masks_of_every_mode(tmp_path, mode, value):
    marked = Image.fromarray(np.array([[0, value]], np.uint16 if mode == "I;16" else np.uint8))
    marked = marked if mode in ("I;16", "P") else marked.convert(mode)
    if mode == "P":
        marked = Image.fromarray(np.array([[0, value]], np.uint8), "P")
        marked.putpalette([0] * 6)
    marked.save(tmp_path / "m.png")
    assert layouts.read_mask(tmp_path / "m.png").tolist() == [[False, True]]
    (tmp_path / "m.png").write_bytes(b"no mask")
    with pytest.raises(UserError, match="m.png"):
        layouts.read_mask(tmp_path / "m.png")


# ---------------------------------------------------------------- VisA
def visa(root: Path, kinds: bool = True) -> list[dict[str, str]]:
    """Two objects of a few images each, as VisA is published -> the rows of its table."""
    rows = []
    for name in ("candle", "pcb1"):
        for i, split in enumerate(("train", "train", "test")):
            image = f"{name}/Data/Images/Normal/{i:04d}.JPG"
            rows.append({"object": name, "split": split, "label": "normal", "image": image, "mask": ""})
        image, mask = (f"{name}/Data/{part}" for part in ("Images/Anomaly/000.JPG", "Masks/Anomaly/000.png"))
        rows.append({"object": name, "split": "test", "label": "anomaly", "image": image, "mask": mask})
        write_image(root / mask, np.array([[0, 2]], np.uint8))
        if kinds:
            table(root / name / "image_anno.csv", [{"image": image, "label": "melt,scratch", "mask": mask}])
    for row in rows:
        write_image(root / row["image"], PIXELS)
    table(root / "split_csv" / "1cls.csv", rows)
    return rows


def table(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("folder", ["", "VisA", "VisA_20220922"])
def test_visa(tmp_path, folder):
    rows = visa(tmp_path / folder)
    images = load_images("VisA", str(tmp_path))
    labels = images.labels
    assert labels.classes == ("candle", "pcb1") and labels.per_category
    for split in SPLITS:
        names = sorted(row["image"] for row in rows if row["split"] == split)
        assert labels.split(split).names == names
    train, test, anomalous = labels.one_class("pcb1")
    assert len(train) == 2 and {labels.test.names[i]: a for i, a in zip(test, anomalous)} == {
        "pcb1/Data/Images/Anomaly/000.JPG": 1,
        "pcb1/Data/Images/Normal/0002.JPG": 0,
    }
    assert [images.mask(i) is not None for i in test] == anomalous.astype(bool).tolist()
    assert images.mask(test[0]).tolist() == [[False, True]]
    assert by_kind(labels)["melt,scratch"] == [
        f"{name}/Data/Images/Anomaly/000.JPG" for name in labels.classes
    ]


def test_visa_without_its_notes(tmp_path):
    visa(tmp_path, kinds=False)
    assert set(by_kind(load_images("VisA", str(tmp_path)).labels)) == {"", "anomaly"}


def test_visa_converted(tmp_path):
    """As its authors' script leaves it: MVTec-style categories."""
    labels = load_images("VisA", str(tree(tmp_path, *(f"candle/{name}" for name in MVTEC)))).labels
    assert labels.classes == ("candle",)


def test_visa_broken(tmp_path):
    rows = visa(tmp_path)
    gone = tmp_path / rows[1]["image"]
    gone.unlink()
    line = refused("VisA", tmp_path)
    assert str(gone) in line and "0 others of its 8" in line
    write_image(gone, PIXELS)
    where = tmp_path / "split_csv/1cls.csv"
    where.write_bytes(where.read_bytes()[:-40])  # cut off
    assert f"in {where}, in every row" in refused("VisA", tmp_path)
    table(where, [row | {"split": "val"} for row in rows])
    assert "split 'val'" in refused("VisA", tmp_path)
    for content in (b"", b"\xff\xfe\0", b"image\nx\n"):
        where.write_bytes(content)
        assert str(where) in refused("VisA", tmp_path)
    where.unlink()
    assert f"{where}" in (line := refused("VisA", tmp_path)) and "holds candle/, pcb1/, split_csv/" in line


# ---------------------------------------------------------------- cats and dogs
def places(root: Path, pattern: str, n: int) -> dict[str, set[int]]:
    """The numbers of the images in each split, by class, after writing n of each with that pattern."""
    image = write_image(root / "one.png", PIXELS) or (root / "one.png").read_bytes()
    (root / "one.png").unlink()
    for name in layouts.PETS:
        for i in range(n):
            path = root / pattern.format(name, i, name.title())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    labels = load_images("CatsvsDogs", str(root)).labels
    assert labels.classes == ("cat", "dog") and not labels.per_category
    found = {}
    for split in SPLITS:
        rows = labels.split(split)
        for number, name in enumerate(layouts.PETS):
            named = [n for n, c in zip(rows.names, rows.category) if c == number]
            assert all(name in n.lower() for n in named)
            found[f"{split} {name}"] = {int(re.findall("[0-9]+", n)[-1]) for n in named}
    return found


PATTERNS = ("train/{}.{}.jpg", "{}.{}.jpg", "PetImages/{2}/{1}.jpg", "{2}/{1}.jpg")


def test_cats_and_dogs_are_split_alike_in_every_form(tmp_path):
    found = [places(tmp_path / str(i), pattern, 15) for i, pattern in enumerate(PATTERNS)]
    assert all(split == found[0] for split in found)
    assert found[0]["train cat"] | found[0]["test cat"] == set(range(15))
    assert {name: len(rows) for name, rows in found[0].items()} == {
        "train cat": 12, "train dog": 12, "test cat": 3, "test dog": 3,
    }  # fmt: skip


def test_the_stated_split():
    """12,500 of each class: 10,000 and 2,500, fixed for good."""
    files = [Path(f"cat.{i}.jpg") for i in range(12_500)]
    split = layouts.split_by_rule(list(reversed(files)))
    assert {name: len(part) for name, part in split.items()} == {"train": 10_000, "test": 2_500}
    assert sorted(split["train"] + split["test"]) == sorted(files)
    first = np.random.RandomState(0).permutation(12_500)[10_000:]
    assert [path.name for path in split["test"]] == [f"cat.{i}.jpg" for i in sorted(first)]


def test_cats_and_dogs_in_folders(tmp_path):
    root = tree(tmp_path, *(f"{split}/{name}/1.png" for split in SPLITS for name in layouts.PETS))
    assert counts(load_images("CatsvsDogs", str(root)).labels, "train") == {"cat": 1, "dog": 1}


def test_a_folder_in_the_folder_is_no_class(tmp_path):
    """As unpacking train.zip into train/ leaves it."""
    tree(tmp_path, *(f"train/train/{name}.{i}.jpg" for name in layouts.PETS for i in range(5)))
    assert f"--dataset_path {tmp_path / 'train'}" in refused("CatsvsDogs", tmp_path)
    assert load_images("CatsvsDogs", str(tmp_path / "train")).labels.classes == layouts.PETS


def test_kaggles_unlabelled_pictures_are_not_read(tmp_path):
    root = tree(
        tmp_path, *(f"train/{name}.{i}.jpg" for name in layouts.PETS for i in range(5)), "test1/1.jpg"
    )
    labels = load_images("CatsvsDogs", str(root)).labels
    assert labels.count() == 10 and not any("test1" in name for name in labels.test.names)


def test_no_cats(tmp_path):
    line = refused("CatsvsDogs", tmp_path / "nowhere")
    for words in (str(tmp_path / "nowhere/train/cat.0.jpg"), "PetImages/Cat", "not there"):
        assert words in line
    tree(tmp_path, "train/cat.0.jpg")
    assert "no pictures of a dog" in refused("CatsvsDogs", tmp_path)


# ---------------------------------------------------------------- magnetic tiles
@pytest.mark.parametrize("folder", ["", "Magnetic-tile-defect-datasets.-master/"])
def test_magnetic_tiles(tmp_path, folder):
    free = [f"{folder}MT_Free/Imgs/exp1_num_{i}.jpg" for i in range(10)]
    bad = [f"{folder}MT_{kind}/Imgs/exp1_num_{i}.jpg" for kind in ("Blowhole", "Crack") for i in (3, 4)]
    root = tree(tmp_path, *free, *bad, f"{folder}Other/1.jpg")
    for name in (*free, *bad):
        write_image((root / name).with_suffix(".png"), np.array([[0, 255 * (name in bad)]], np.uint8))
    images = load_images("MTD", str(root))
    labels = images.labels
    train, test, anomalous = labels.one_class("magnetic_tile")
    assert (len(train), len(test), anomalous.sum()) == (8, 6, 4)
    assert not any(name.endswith(".png") for split in SPLITS for name in labels.split(split).names)
    found = by_kind(labels)
    assert set(found) == {"", "blowhole", "crack"} and len(found[""]) == 2
    assert {*found[""], *labels.train.names} == {name.removeprefix(folder) for name in free}
    for i in test:
        assert (images.mask(i) is None) if not anomalous[i] else images.mask(i).tolist() == [[False, True]]


# ---------------------------------------------------------------- missing, or in the wrong place
@pytest.mark.parametrize(
    "dataset, looked",
    [
        ("folder", "{train,test}/<class>/*"),
        ("lbot", "{train,test}/<class>/*"),
        ("CatsvsDogs", "train/cat.0.jpg"),
        ("mvtec", "<category>/train/good"),
        ("BTAD", "<category>/train/good (or ok)"),
        ("VisA", "split_csv/1cls.csv"),
        ("MTD", "MT_Free/Imgs"),
    ],
)
def test_what_was_looked_for_and_found(tmp_path, dataset, looked):
    absent = tmp_path / "absent"
    line = refused(dataset, absent)
    assert looked in line and f"{absent} is not there" in line and not absent.exists()
    (tmp_path / "a file").touch()
    assert f"{tmp_path / 'a file'} is a file, no folder" in refused(dataset, tmp_path / "a file")
    (tmp_path / "a file").unlink()
    assert f"{tmp_path} is empty" in refused(dataset, tmp_path)
    tree(tmp_path, *(f"{name}/pictures/1.png" for name in "abcdef"))
    assert looked in (line := refused(dataset, tmp_path)) and "holds a/, b/, c/, d/ and 2 more" in line


DEEPER = {
    "folder": ("train/a/1.png", "test/a/1.png"),
    "lbot": ("train/normal/1.png",),
    "mvtec": ("bottle/train/good/1.png", "bottle/test/good/1.png"),
    "BTAD": ("01/train/ok/1.png", "02/train/ok/1.png"),
    "VisA": ("split_csv/1cls.csv",),
    "MTD": ("MT_Free/Imgs/1.jpg",),
    "CatsvsDogs": ("train/cat.0.jpg", "train/dog.0.jpg"),
}


@pytest.mark.parametrize("dataset", DEEPER)
def test_where_it_lies_instead(tmp_path, dataset):
    """Two folders deeper, or one folder up: the right --dataset_path is named."""
    for name in DEEPER[dataset]:
        (tmp_path / "un/packed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "un/packed" / name).touch()
    (tmp_path / "un/packed/empty").mkdir()
    for root in (tmp_path, tmp_path / "un/packed/empty"):
        assert f"--dataset_path {tmp_path / 'un/packed'}" in refused(dataset, root)
    assert "--dataset_path" not in refused(dataset, tmp_path / "un/packed/empty/absent")


@pytest.mark.parametrize("palette", [(0, 0, 0, 255, 255, 255), (255, 255, 255, 0, 0, 0), (0, 0, 0, 0, 0, 0)])
def test_a_mask_with_a_palette_is_read_by_its_colours(tmp_path, palette):
    """Whatever their order; of blacks alone by their numbers."""
    marked = np.zeros((5, 4), bool)
    marked[2, 3] = True
    image = Image.fromarray((marked != (palette[0] == 255)).astype(np.uint8), "P")
    image.putpalette(palette)
    image.save(tmp_path / "mask.png")
    assert np.array_equal(layouts.read_mask(tmp_path / "mask.png"), marked)


def test_pictures_beside_the_folders_of_classes_are_told_of(tmp_path, capsys):
    root = tree(tmp_path, "train/a/1.png", "train/2.png", "train/3.png", "test/a/4.png")
    assert counts(load_images("folder", str(root)).labels, "train") == {"a": 1}
    told = capsys.readouterr().err
    assert f"only the folders in {root / 'train'} are taken, not the 2 pictures beside them" in told
    assert str(root / "test") not in told
