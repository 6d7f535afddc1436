"""The folders that data sets are published in, and what is said when they are not as expected."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import PIXELS, counts, tree, write_image
from PIL import Image
from test_datasets import MVTEC

from config import UserError
from datasets import SPLITS, Labels, labels_of, load_images
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


MASK = np.array([[0, 0, 255, 0]] * 3, np.uint8)


@pytest.mark.parametrize(
    "name", ["b5_mask.PNG", "B5_Mask.jpg", "B5.tif", "b5_mask.bmp", "B5/a.png", "b5_mask/a.png"]
)
@pytest.mark.parametrize("place", ["ground_truth/hole", "Masks/Hole", "test/hole/gt"])
def test_masks_are_found_in_any_case_format_and_place(tmp_path, place, name):
    root = tree(tmp_path / "bottle", "train/good/1.png", "test/hole/B5.png")
    write_image(root / place / name, MASK)
    for dataset in ("mvtec", "folder"):
        images = load_images(dataset, str(root))
        assert images.labels.test.names == ["test/hole/B5.png"] and (images.mask(0) == (MASK > 0)).all()


def test_masks_that_are_not_found_are_told(tmp_path, capsys):
    root = tree(tmp_path / "bottle", *MVTEC, *(f"test/hole/{i}.png" for i in range(6, 11)))
    load_images("mvtec", str(root))
    assert capsys.readouterr().err == "", "a set may have none at all"
    write_image(root / "ground_truth/scratch/4_mask.png", MASK)
    write_image(root / "ground_truth/hole/another.png", MASK)
    load_images("mvtec", str(root))
    assert (
        f"note: {root}: 6 defects in hole, no mask for any in ground_truth/hole\n" == capsys.readouterr().err
    )
    write_image(root / "ground_truth/hole/7_mask.png", MASK)
    load_images("mvtec", str(root))
    assert f"note: {root}: masks for 1 of 6 defects in bottle/hole\n" == capsys.readouterr().err


def test_folders_of_masks_and_depth_are_no_pictures(tmp_path, capsys):
    names = (f"{place}/x/9.png" for place in ("test", "test/hole", "train/good"))
    root = tree(tmp_path / "bottle", *MVTEC, *(n.replace("x", "xyz") for n in names), "test/GT/hole/5.png")
    assert sorted(by_kind(load_images("mvtec", str(root)).labels)) == ["", "hole", "scratch"]
    assert "passed over" in (told := capsys.readouterr().err) and "xyz/ 2" in told
    for name in ("ground_truth", "masks", "depth"):
        tree(root / "test", f"{name}/1.png")
    labels = load_images("folder", str(root)).labels
    assert sorted(set(labels.test.kind)) == ["", "hole", "scratch"] and len(labels.train.names) == 2


def test_a_class_may_be_called_mask(tmp_path):
    """Where it trains: pictures of people with and without one."""
    root = tree(tmp_path, *(f"{split}/{name}/1.png" for split in SPLITS for name in ("mask", "none")))
    assert counts(load_images("folder", str(root)).labels, "test") == {"mask": 1, "none": 1}


# ---------------------------------------------------------------- later MVTec sets
def test_mvtec_ad_2(tmp_path, capsys):
    """validation trains, test_public is tested, with its masks; the private tests have no labels."""
    names = ("train/good/0.png", "validation/good/1.png", "test_public/good/2.png", "test_public/bad/3.png")
    root = tree(tmp_path, *(f"can/{name}" for name in (*names, "test_private/4.png")))
    write_image(root / "can/test_public/ground_truth/bad/3_mask.png", MASK)
    images = load_images("mvtec", str(root))
    train, test, anomalous = images.labels.one_class("can")
    assert images.labels.train.names == ["can/train/good/0.png", "can/validation/good/1.png"]
    assert [images.labels.test.names[i] for i in test] == [f"can/{names[3]}", f"can/{names[2]}"]
    assert len(train) == 2 and anomalous.tolist() == [1, 0] and capsys.readouterr().err == ""
    assert (images.mask(0) == (MASK > 0)).all() and images.mask(1) is None


def test_mvtec_loco(tmp_path):
    """A folder of masks for each picture: what is marked in any of them is."""
    names = ("train/good/0.png", "validation/good/1.png", "test/good/0.png", "test/logical_anomalies/0.png")
    root = tree(tmp_path, *(f"juice_bottle/{name}" for name in names))
    for i in range(2):
        mask = np.roll(MASK, i, 1)
        write_image(root / f"juice_bottle/ground_truth/logical_anomalies/0/{i}.png", mask)
    images = load_images("mvtec", str(root))
    assert len(images.labels.train.names) == 2 and images.labels.test.kind == ["", "logical_anomalies"]
    assert images.mask(0) is None and images.mask(1)[0].tolist() == [False, False, True, True]


def test_mvtec_3d_ad(tmp_path):
    """The colour pictures alone; a mask lies beside them, depth is not read."""
    kinds = ("train/good", "validation/good", "test/good", "test/hole")
    root = tree(tmp_path, *(f"bagel/{kind}/rgb/0.png" for kind in kinds))
    for kind in kinds:
        write_image(root / f"bagel/{kind}/gt/0.png", MASK * ("hole" in kind))
        (root / f"bagel/{kind}/xyz").mkdir()
        (root / f"bagel/{kind}/xyz/0.tiff").write_bytes(b"three floats a pixel, which Pillow cannot read")
    images = load_images("mvtec", str(root))
    assert images.labels.test.names == ["bagel/test/good/rgb/0.png", "bagel/test/hole/rgb/0.png"]
    assert images.labels.count() == 4 and images.labels.test.kind == ["", "hole"]
    assert images.mask(0) is None and (images.mask(1) == (MASK > 0)).all()
    labels = load_images("folder", str(root / "bagel")).labels
    assert labels.count() == 3 and all("/rgb/" in name for name in labels.test.names)


# ---------------------------------------------------------------- Real-IAD
def real_iad(root: Path) -> None:
    """An object as it is published, and one whose pictures were not fetched."""
    ok, ng = ("OK/S0001/jack_1_C{}.jpg", "NG/AK/S0003/jack_3_C{}.jpg")
    listed = [
        {"category": "jack", "anomaly_class": "OK", "image_path": ok.format(i), "mask_path": None}
        for i in range(3)
    ]
    mask = ng.format(1).replace("jpg", "png")
    bad = {"category": "jack", "anomaly_class": "AK", "image_path": ng.format(1), "mask_path": mask}
    for row in (*listed, bad):
        write_image(root / "realiad_256/jack" / row["image_path"], PIXELS)
    write_image(root / "realiad_256/jack" / mask, MASK)
    for name in ("jack", "zipper"):
        content = {
            "meta": {"normal_class": "OK", "prefix": f"{name}/"},
            "train": listed[:2],
            "test": [listed[2], bad],
        }
        table = root / f"realiad_jsons/realiad_jsons/{name}.json"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(json.dumps(content))


def test_real_iad(tmp_path):
    real_iad(tmp_path)
    images = load_images("RealIAD", str(tmp_path))
    assert images.labels.classes == ("jack",)
    train, test, anomalous = images.labels.one_class("jack")
    assert len(train) == 2 and anomalous.tolist() == [0, 1] and images.labels.test.kind == ["", "AK"]
    assert images.mask(0) is None and (images.mask(1) == (MASK > 0)).all()
    table = tmp_path / "realiad_jsons/realiad_jsons/jack.json"
    table.write_text(table.read_text()[:-9])
    assert f"{table} cannot be read" in refused("RealIAD", tmp_path)


def test_normal_pictures_in_nested_folders(tmp_path):
    """Real-IAD's: the advice is followed, and taken; masks beside defects are none of them."""
    real_iad(tmp_path)
    advice = refused("folder", tmp_path / "realiad_256/jack").split("--dataset_path ")[1]
    assert load_images("folder", advice).labels.train.names == [f"S0001/jack_1_C{i}.jpg" for i in range(3)]
    tree(tmp_path / "z", "a/deep/1.png", "b/deep/2.png")
    assert "--dataset_path" not in refused("folder", tmp_path / "z"), "neither could be taken"


# ---------------------------------------------------------------- a table in a file
def test_a_table_of_classes(tmp_path):
    """Labels like the names of folders; masks for some; paths below the table, or whole ones."""
    root = tree(tmp_path / "set", "a/1.png", "a/2.png", "b/1.png")
    write_image(tmp_path / "m.png", MASK)
    away = tree(tmp_path / "away", "3.png") / "3.png"
    rows = [("a/1.png", "train", "cat"), ("b/1.png", "train", "dog"), ("a/2.png", "Test", "Cat ")]
    listed = [dict(zip(("path", "split", "label"), row)) | {"mask": ""} for row in rows]
    table(
        root / "labels.csv", [*listed, {"path": away, "split": "test", "label": "hole", "mask": "../m.png"}]
    )
    for named in (root, root / "labels.csv"):
        images = load_images("csv", str(named))
        labels = images.labels
        assert labels.classes == ("cat", "dog") and not labels.per_category
        assert labels.test.names == ["a/2.png", away.as_posix()] and labels.test.kind == ["", "hole"]
        assert labels.one_class("cat")[2].tolist() == [0, 1] and labels.one_class("dog")[2].tolist() == [1, 1]
        assert images.mask(0) is None and (images.mask(1) == (MASK > 0)).all()


def test_a_table_of_categories(tmp_path):
    """<class>/<condition>: each class is tested on its own; without mask column."""
    root = tree(tmp_path, *(f"{i}.png" for i in range(5)))
    labels = ("bolt/good", "nut", "bolt/ok", "bolt/bent", "nut/Normal")
    rows = [{"path": f"{i}.png", "split": SPLITS[i > 1], "label": label} for i, label in enumerate(labels)]
    table(root / "labels.csv", rows)
    found = load_images("csv", str(root)).labels
    assert found.classes == ("bolt", "nut") and found.per_category
    assert found.one_class("bolt")[2].tolist() == [0, 1] and found.one_class("nut")[2].tolist() == [0]
    assert found.test.kind == ["", "bent", ""]
    table(root / "labels.csv", [*rows, rows[4] | {"label": "screw/good"}])
    assert "expected training pictures of screw" in refused("csv", root)


def test_a_table_of_any_layout_says_the_same(tmp_path):
    root = tree(tmp_path, *(f"bottle/{name}" for name in MVTEC), "bottle/ground_truth/hole/5_mask.png")
    for reader in (layouts.mvtec, layouts.folders):
        read = layouts.read_table(reader, root if reader is layouts.mvtec else root / "bottle")
        table(read.root / "labels.csv", [row._asdict() for row in read.rows])
        again = layouts.read_table(layouts.labels_file, read.root)
        assert labels_of(again).as_json() == labels_of(read).as_json()
        assert [row.mask for row in again.rows] == [row.mask for row in read.rows]


@pytest.mark.parametrize(
    "row, told",
    [
        ("1.png,train", "expected the columns path, split, label"),
        ("1.png,val,a", "gives 1.png the split 'val' and the label 'a'; expected train or test"),
        ("1.png,test,", "the label ''"),
        ("2.png,train,a", "2.png, which is not there, nor are 0 others of its 1"),
        ("1.png,train,a,m.png", "m.png, which is not there"),
    ],
)
def test_mistakes_in_a_table(tmp_path, row, told):
    tree(tmp_path, "1.png")
    (tmp_path / "labels.csv").write_text(f"path,split,label,mask\n{row}\n")
    assert told in refused("csv", tmp_path)
    assert f"{tmp_path}/x is not there" in refused("csv", tmp_path / "x")


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
    table(where, [row | {"image": row["image"].replace("/", "\\\\")} for row in rows])
    assert load_images("VisA", str(tmp_path)).labels.count() == 8, "as Windows names its folders"
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
        ("RealIAD", "realiad_jsons/<object>.json"),
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
    "RealIAD": ("realiad_jsons/a.json",),
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
