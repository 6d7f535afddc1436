"""The folders that data sets are published in, and what is said when they are not as expected."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import load_images, tree, truth, write_image
from PIL import Image

from config import UserError
from datasets import ImageSet
from images import layouts
from shell.files import write_text

MVTEC = ("train/good/1.png", "train/good/2.png", "test/good/3.png", "test/scratch/4.png", "test/hole/5.png")
MASK = np.array([[0, 0, 255, 0]] * 3, np.uint8)


def refused(dataset: str, root: Path) -> str:
    """The line that is said of a folder."""
    with pytest.raises(UserError) as told:
        load_images(dataset, str(root))
    return str(told.value)


def kinds(found: ImageSet) -> dict[str, str]:
    """{name: kind} of the test images."""
    return dict(zip(found.labels.test.names, found.labels.test.kind))


def marked(found: ImageSet) -> dict[str, bool]:
    """{name: whether its mask is MASK} of the test images that have one."""
    masks = dict(zip(found.labels.test.names, (image.mask for image in found.images["test"])))
    return {name: np.array_equal(layouts.read_mask(mask), MASK > 0) for name, mask in masks.items() if mask}


# ---------------------------------------------------------------- as they are published
VISA = """object,split,label,image,mask
01,train,normal,01\\Data\\Images\\Normal\\0.JPG,
01,test,anomaly,01/Data/Images/Anomaly/2.JPG,01/Data/Masks/Anomaly/2.png
01,test,normal,01/Data/Images/Normal/1.JPG,
"""
ANNOTATED = 'image,label,mask\n01/Data/Images/Anomaly/2.JPG,"melt,scratch",\n'
OK = {"anomaly_class": "OK", "mask_path": None}
BAD = {"anomaly_class": "AK", "image_path": "NG/AK/2.jpg", "mask_path": "NG/AK/2.png"}
REAL_IAD = {"train": [OK | {"image_path": "OK/0.jpg"}], "test": [OK | {"image_path": "OK/1.jpg"}, BAD]}
LAYOUTS = {  # data set, a mask, {picture of the class 01: what it is, nothing where it is left out}
    "MVTec": ("mvtec", "ground_truth/hole/5_mask.png", {
        "train/good/1.png": "train", "train/dent/2.png": "", "test/good/3.png": "normal",
        "test/scratch/4.png": "scratch", "test/hole/5.png": "hole, masked",
    }),
    "BTAD": ("BTAD", "ground_truth/ko/2.png", {
        "train/ok/0.bmp": "train", "test/ok/1.bmp": "normal", "test/ko/2.bmp": "ko, masked",
    }),
    "VisA, converted": ("VisA", "ground_truth/bad/2.png", {
        "train/good/0.JPG": "train", "test/good/1.JPG": "normal", "test/bad/2.JPG": "bad, masked",
    }),
    "MVTec AD 2": ("mvtec", "test_public/ground_truth/bad/3_mask.png", {
        "train/good/0.png": "train", "validation/good/1.png": "held out", "test_private/4.png": "",
        "test_public/good/2.png": "normal", "test_public/bad/3.png": "bad, masked",
    }),
    "MVTec LOCO": ("mvtec", "ground_truth/logical/0/0.png", {
        "train/good/0.png": "train", "validation/good/1.png": "held out",
        "test/good/0.png": "normal", "test/logical/0.png": "logical, masked",
    }),
    "MVTec 3D-AD": ("mvtec", "test/hole/gt/0.png", {
        "train/good/rgb/0.png": "train", "validation/good/rgb/0.png": "held out",
        "test/good/rgb/0.png": "normal", "test/hole/rgb/0.png": "hole, masked", "test/hole/xyz/0.tiff": "",
    }),
    "VisA": ("VisA", "Data/Masks/Anomaly/2.png", {
        "Data/Images/Normal/0.JPG": "train", "Data/Images/Normal/1.JPG": "normal",
        "Data/Images/Anomaly/2.JPG": "melt,scratch, masked",
    }),
    "Real-IAD": ("RealIAD", "NG/AK/2.png", {
        "OK/0.jpg": "train", "OK/1.jpg": "normal", "NG/AK/2.jpg": "AK, masked",
    }),
    "magnetic tiles": ("MTD", "MT_Crack/Imgs/exp1_num_4.png", {
        **{f"MT_Free/Imgs/exp1_num_{i}.jpg": "train" for i in range(4)},
        "MT_Free/Imgs/exp1_num_4.jpg": "normal", "MT_Crack/Imgs/exp1_num_4.jpg": "crack, masked",
        "MT_Fray/Imgs/exp2_num_4.jpg": "fray",
    }),
}  # fmt: skip
FILES = {  # beside the pictures: their place, {file: content}
    "VisA": ("VisA_20220922/01", {
        "VisA_20220922/split_csv/1cls.csv": VISA,
        "VisA_20220922/01/image_anno.csv": ANNOTATED,
    }),
    "Real-IAD": ("realiad_256/01", {
        "realiad_jsons/realiad_jsons/01.json": json.dumps(REAL_IAD),
        "realiad_jsons/realiad_jsons/an object that was not fetched.json": json.dumps(REAL_IAD),
    }),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_each_picture_of_a_layout_is(tmp_path, layout):
    dataset, mask, pictures = LAYOUTS[layout]
    place, files = FILES.get(layout, ("01", {}))
    for name, content in files.items():
        write_text(tmp_path / name, content)
    tree(tmp_path / place, *pictures)
    write_image(tmp_path / place / mask, MASK)
    found = load_images(dataset, str(tmp_path))
    assert found.labels.per_category
    rows, tested, anomalous = found.labels.one_class("magnetic_tile" if dataset == "MTD" else "01")
    train, test = found.labels.train, found.labels.test
    told = {train.names[i]: "held out" if train.held[i] else "train" for i in rows}
    for i, odd in zip(tested, anomalous):
        masked = ", masked" if found.images["test"][i].mask else ""
        told[test.names[i]] = (test.kind[i] if odd else "normal") + masked
    assert told == {f"{place}/{name}": meaning for name, meaning in pictures.items() if meaning}


def test_mvtec_categories(tmp_path):
    """All, one of them alone, or the only folder that holds them."""
    for category in ("bottle", "cable"):
        tree(tmp_path / "sets" / category, *MVTEC)
    tree(tmp_path / "sets/licence", "1.png")
    for root in (tmp_path, tmp_path / "sets"):
        assert load_images("mvtec", str(root)).labels.classes == ("bottle", "cable")
    assert load_images("mvtec", str(tmp_path / "sets/bottle")).labels.classes == ("bottle",)
    tree(tmp_path / "sets/capsule", "test/good/1.png", "test/crack/2.png")
    with pytest.raises(UserError, match="train/good .*capsule holds test/"):
        load_images("mvtec", str(tmp_path / "sets"))


def test_what_any_mask_of_a_picture_marks_is_marked(tmp_path):
    root = tree(tmp_path, "juice/train/good/0.png", "juice/test/bad/0.png")
    for i in range(2):
        write_image(root / f"juice/ground_truth/bad/0/{i}.png", np.roll(MASK, i, 1))
    (image,) = load_images("mvtec", str(root)).images["test"]
    assert layouts.read_mask(image.mask)[0].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    "place, name",
    [("ground_truth/hole", "b5_mask.PNG"), ("Masks/Hole", "B5.tif"), ("test/hole/gt", "B5/a.png")],
)
def test_masks_are_found_in_any_case_format_and_place(tmp_path, place, name):
    root = tree(tmp_path / "bottle", "train/good/1.png", "test/hole/B5.png", "test/hole/deep/6.png")
    for mask in (name, "deep/6_mask.png", "mask.png"):
        write_image(root / place / mask, MASK)
    for dataset in ("mvtec", "folder"):
        found = load_images(dataset, str(root))
        assert marked(found) == {"test/hole/B5.png": True, "test/hole/deep/6.png": True}
        assert marked(found).keys() == kinds(found).keys()


def test_masks_that_are_not_found_are_told(tmp_path, capsys):
    root = tree(tmp_path / "bottle", *MVTEC)
    load_images("mvtec", str(root))
    assert capsys.readouterr().err == "", "a set may have none at all"
    write_image(root / "ground_truth/scratch/4_mask.png", MASK)
    write_image(root / "ground_truth/hole/another.png", MASK)
    load_images("mvtec", str(root))
    assert "masks for 1 of 2 defects" in capsys.readouterr().err


def test_folders_of_masks_and_depth_are_no_pictures(tmp_path, capsys):
    names = (f"{place}/xyz/9.png" for place in ("test", "test/hole", "train/good"))
    root = tree(tmp_path / "bottle", *MVTEC, *names, "test/GT/hole/5.png")
    assert sorted(set(kinds(load_images("mvtec", str(root))).values())) == ["", "hole", "scratch"]
    assert "passed over" in (told := capsys.readouterr().err) and "xyz/ 2" in told
    tree(root / "test", *(f"{name}/1.png" for name in ("ground_truth", "masks", "depth")))
    labels = load_images("folder", str(root)).labels
    assert sorted(set(labels.test.kind)) == ["", "hole", "scratch"] and len(labels.train.names) == 2


# ---------------------------------------------------------------- a table in a file
def test_a_table_of_classes(tmp_path):
    """Labels like the names of folders; masks for some; paths below the table, or whole ones."""
    root = tree(tmp_path / "set", "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    write_image(tmp_path / "m.png", MASK)
    away = (tree(tmp_path / "away", "3.png") / "3.png").as_posix()
    rows = ("a/1.png,train,cat,", "b/1.png,Validation,cat,", "b/2.png,train,dog,", "a\\2.png,Test,Cat ,")
    lines = ("path,split,label,mask", *rows, f"{away},test,hole,../m.png")
    write_text(root / "labels.csv", "\r\n".join(lines))
    for named in (root, root / "labels.csv"):
        found = load_images("csv", str(named))
        assert found.labels.classes == ("cat", "dog") and not found.labels.per_category
        assert found.labels.train.held.tolist() == [False, True, False]
        assert truth(found.labels, "cat") == {"a/2.png": 0, away: 1}
        assert truth(found.labels, "dog") == {"a/2.png": 1, away: 1}
        assert kinds(found)[away] == "hole" and marked(found) == {away: True}


def test_a_table_of_categories(tmp_path):
    """<class>/<condition>: each class is tested on its own; without mask column."""
    root = tree(tmp_path, *(f"{i}.png" for i in range(5)))
    rows = ["0.png,train,bolt/good", "1.png,train,nut", "2.png,test,bolt/ok", "3.png,test,bolt/bent"]
    lines = ["path,split,label", *rows, "4.png,test,nut/Normal"]
    write_text(root / "labels.csv", "\n".join(lines))
    labels = load_images("csv", str(root)).labels
    assert labels.classes == ("bolt", "nut") and labels.per_category
    assert truth(labels, "bolt") == {"2.png": 0, "3.png": 1} and truth(labels, "nut") == {"4.png": 0}
    assert labels.test.kind == ["", "bent", ""]
    write_text(root / "labels.csv", "\n".join([*lines, "4.png,test,screw/good"]))
    assert "expected training pictures of screw" in refused("csv", root)


@pytest.mark.parametrize(
    "row, told",
    [
        ("1.png,train", "expected the columns path, split, label"),
        ("1.png,val,a", "gives 1.png the split 'val' and the label 'a'"),
        ("1.png,test,", "the label ''"),
        ("1.png,train,a,m.png", "m.png, which is not there"),
    ],
)
def test_mistakes_in_a_table(tmp_path, row, told):
    tree(tmp_path, "1.png")
    (tmp_path / "labels.csv").write_text(f"path,split,label,mask\n{row}\n")
    assert told in refused("csv", tmp_path)


# ---------------------------------------------------------------- masks
@pytest.mark.parametrize(
    "mode, values, palette",
    [("1", (0, 255), ()), ("L", (0, 1), ()), ("LA", (0, 9), ()), ("I;16", (0, 300), ())]
    + [("P", (0, 1), (0,) * 6), ("P", (1, 0), (255, 255, 255, 0, 0, 0))],  # of blacks alone; white first
)
def test_masks_of_every_mode(tmp_path, mode, values, palette):
    """Palettes by their colours, whatever their order; of blacks alone by their numbers."""
    image = Image.fromarray(np.array([values], np.uint16 if mode == "I;16" else np.uint8))
    if palette:
        image.putpalette(palette)
    (image if mode in ("I;16", "P") else image.convert(mode)).save(tmp_path / "m.png")
    assert layouts.read_mask(tmp_path / "m.png").tolist() == [[False, True]]
    (tmp_path / "m.png").write_bytes(b"no mask")
    with pytest.raises(UserError, match="m.png"):
        layouts.read_mask(tmp_path / "m.png")


# ---------------------------------------------------------------- missing, or in the wrong place
LOOKED = {  # data set -> what was looked for
    "folder": "{train,test}/<class>/*",
    "csv": "a folder with labels.csv",
    "mvtec": "<category>/train/good",
    "VisA": "split_csv/1cls.csv",
    "RealIAD": "realiad_jsons/<object>.json",
    "MTD": "MT_Free/Imgs",
}


@pytest.mark.parametrize("dataset", LOOKED)
def test_what_was_looked_for_and_found(tmp_path, dataset):
    absent = tmp_path / "absent"
    line = refused(dataset, absent)
    assert LOOKED[dataset] in line and f"{absent} is not there" in line and not absent.exists()
    tree(tmp_path / "full", *(f"{name}/pictures/1.png" for name in "ba"))
    assert LOOKED[dataset] in (line := refused(dataset, tmp_path / "full")) and "holds a/, b/" in line
