"""Data sets of image files, in whatever folders they come: each reader yields the rows of one table.

The split is train, test or validation: training pictures that are held out. A label is a class: images of it
train, and every test image with another label is anomalous. Or it is ``<class>/<condition>``, where each
class is tested on images of its own: ``bottle/good`` (or ok, or normal) and ``bottle/hole``.

A reader takes the path that the user named, and a counter of what it passes over; it raises UserError."""

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import utils
from config import UserError
from images.images import image_files, images_below, is_hidden, opened

SPLITS = ("train", "test")
PLACES = {"train": "train", "validation": "validation", "test": "test", "test_public": "test"}  # their splits
NORMAL_NAMES = ("good", "ok", "normal")  # conditions, and folders, of normal pictures
MASK_FOLDERS = ("ground_truth", "gt", "mask", "masks")
NO_PICTURES = frozenset((*MASK_FOLDERS, "xyz", "depth"))  # folders inside a class's: masks, or depth


class Row(NamedTuple):
    """An image file with its labels. mask: where its defect is marked, by a picture or a folder of them."""

    path: Path
    split: str
    label: str
    mask: Path | None = None


# ---------------------------------------------------------------- names of folders
def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, hidden ones left out; none where it is no folder."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in there if path.is_dir() and not is_hidden(path.name))


def folded(name: str) -> str:
    """What names are compared by, whatever their case, Unicode form (NFC, NFD) and spaces around them."""
    return unicodedata.normalize("NFC", name.casefold()).strip()


def inside(folder: Path, name: str) -> Path:
    """The folder of that name in a folder, however it is spelt (``folded``), the one spelt so first."""
    same = [there for there in subfolders(folder) if folded(there) == folded(name)]
    return folder / (name if name in same or not same else same[0])


def not_as_expected(root: Path, expected: str) -> UserError:
    """The line for a folder that does not hold a data set: what was expected and what is there."""
    there = "is a file, no folder" if root.exists() else "is not there"
    if root.is_dir():
        names = sorted(f"{path.name}{'/' * path.is_dir()}" for path in root.iterdir())
        there = f"holds {utils.first_named(names)}" if names else "is empty"
    return UserError(f"dataset_path: expected {expected}, but {root.resolve()} {there}")


def place_of(root: Path, expected: str, holds: Callable[[Path], object]) -> Path:
    """The folder that ``holds`` a data set: root, or the only folder in it. Raises ``not_as_expected``."""
    below = subfolders(root)
    for place in [root, root / below[0]] if len(below) == 1 else [root]:
        if holds(place):
            return place
    raise not_as_expected(root, expected)


# ---------------------------------------------------------------- folders per class
def folders(root: Path, skipped: Counter) -> Iterable[Row]:
    """``{train,test}/<class>/**``, masks of what is no class in ``ground_truth/<its name>``; without test/,
    no test images. Or normal pictures alone, in ``root`` or its train/: one class of the name of ``root``;
    subfolders are searched where the name of the folder says that all in it is normal."""
    train, test = places = [inside(root, split) for split in SPLITS]
    trained = {folded(name) for name in subfolders(train)}
    if trained or train.is_dir() and test.is_dir():
        if empty := next((place for place in places if place.is_dir() and not subfolders(place)), None):
            raise not_as_expected(empty, f"a folder of images per class in {empty}")
        return _labelled(root, skipped, SPLITS, trained)
    place = train if train.is_dir() else root
    deep = folded(place.resolve().name) in NORMAL_NAMES
    pictures = image_files(place, skipped, NO_PICTURES, deep) if place.is_dir() else []
    if not pictures:
        expected = f"images as {place}/{{train,test}}/<class>/*, or normal pictures in {place} itself"
        raise not_as_expected(place, expected)
    return [Row(path, "train", root.resolve().name or "normal") for path in pictures]


def _labelled(
    root: Path, skipped: Counter, places: Iterable[str], normal: Container[str], before: str = ""
) -> Iterator[Row]:
    """The pictures in ``<place>/<kind>/**`` below ``root``, labelled by their kinds, behind ``before``; with
    the masks of those whose kinds are not among the ``normal`` ones, by what both are ``_known_by``: by name,
    or name and _mask, or a folder of several."""
    there = {inside(root, place): PLACES[place] for place in places}
    kinds = [(place / name, split) for place, split in there.items() for name in subfolders(place)]
    masks = {}
    for place in [root, *there, *(kind for kind, _ in kinds)]:
        for folder in (place / name for name in subfolders(place) if folded(name) in MASK_FOLDERS):
            for mask in image_files(folder, Counter()):
                *above, name = _known_by(mask, root)
                masks[*above,] = mask.parent
                masks[*above, name.removesuffix("_mask")] = mask
    for place in filter(Path.is_dir, there):
        if beside := image_files(place, Counter(), deep=False):
            skipped[f"pictures beside the folders in {place}"] = len(beside)
    for kind, split in kinds:
        is_normal = folded(kind.name) in normal
        if is_normal or folded(kind.name) not in NO_PICTURES:
            for path in images_below(kind, skipped, NO_PICTURES):
                marked = None if is_normal else masks.get(_known_by(path, root))
                yield Row(path, split, before + kind.name, marked)


def _known_by(path: Path, root: Path) -> tuple[str, ...]:
    """What the names of a picture and of its mask share, in any case and format (of 3D-AD beside rgb)."""
    *above, name = map(folded, path.relative_to(root).with_suffix("").parts)
    return *(folder for folder in above if folder not in (*PLACES, *MASK_FOLDERS, "rgb")), name


# ---------------------------------------------------------------- categories with defective specimens
def mvtec(root: Path, skipped: Counter) -> Iterator[Row]:
    """``<category>/train/good`` (or ok), ``<category>/test/<good or defect>``, masks in ``<category>/
    ground_truth/<defect>``; root may also be one such category, or hold nothing but their folder. The later
    MVTec sets, too: AD 2 (``test_public``, with ``ground_truth`` in it), LOCO (a folder of masks for each
    picture), 3D-AD (``<defect>/rgb``, masks in ``<defect>/gt``); ``validation`` pictures are held out."""
    expected = f"categories in {root}, <category>/train/good (or ok) and <category>/test/<good or defect>"
    base = place_of(root, expected, _categories)
    found = _categories(base)
    for name in subfolders(base) if base not in found.values() else ():
        if name not in found and inside(base / name, "test").is_dir():
            raise not_as_expected(base / name, "train/good (or ok) beside test in it")
    for name, category in found.items():
        yield from _labelled(category, skipped, PLACES, NORMAL_NAMES, f"{name}/")


def _categories(root: Path) -> dict[str, Path]:
    """{name: folder} of the MVTec-style categories that root is or holds."""

    def trains_normal(category: Path) -> bool:
        return any(folded(name) in NORMAL_NAMES for name in subfolders(inside(category, "train")))

    if trains_normal(root):
        return {root.resolve().name: root}
    return {name: root / name for name in subfolders(root) if trains_normal(root / name)}


def magnetic_tiles(root: Path, skipped: Counter) -> Iterator[Row]:
    """Magnetic tile defects: ``MT_Free/Imgs/*.jpg`` are normal, ``MT_<Kind>/Imgs/*.jpg`` are defective, and
    tested, their masks .png beside them. The free ones are published without a split: sorted by the number in
    their name, then by name, they are shuffled by numpy's RandomState(0); the first 80 % (rounded) train."""
    expected = f"magnetic tiles as {root / 'MT_Free' / 'Imgs'}, and MT_Blowhole, MT_Break, ... beside it"
    base = place_of(root, expected, lambda folder: (folder / "MT_Free").is_dir())
    for folder in sorted(base.glob("MT_*/Imgs")):
        kind, pictures = folder.parent.name.removeprefix("MT_").lower(), sorted(folder.glob("*.jpg"))
        if kind == "free":
            pictures.sort(key=lambda path: int((re.findall("[0-9]+", path.stem) or [-1])[-1]))
            trained = np.random.RandomState(0).permutation(len(pictures))[: round(0.8 * len(pictures))]
            for i, path in enumerate(pictures):
                yield Row(path, "train" if i in trained else "test", "magnetic_tile/good")
            continue
        for path in pictures:
            mask = path.with_suffix(".png")
            yield Row(path, "test", f"magnetic_tile/{kind}", mask if mask.exists() else None)


# ---------------------------------------------------------------- tables
def labels_file(path: Path, skipped: Counter) -> Iterator[Row]:
    """A CSV file with the columns path, split, label and perhaps mask; or a folder with labels.csv."""
    table = path / "labels.csv" if path.is_dir() else path
    if not table.is_file():
        expected = "a CSV file with the columns path, split, label, mask, or a folder with labels.csv"
        raise not_as_expected(path, expected)
    for row in _read_table(table, ("path", "split", "label")):
        yield _named(table.parent, row["path"], row["split"], row["label"], row.get("mask"))


def visa(root: Path, skipped: Counter) -> Iterator[Row]:
    """VisA: ``split_csv/1cls.csv`` has split and mask of images in ``<object>/Data/Images/{Normal,Anomaly}``;
    ``<object>/image_anno.csv``, if there, says what is wrong. Or converted, as MVTec-style categories."""
    if _categories(root):
        yield from mvtec(root, skipped)
        return
    where = Path("split_csv", "1cls.csv")
    expected = f"VisA as {root / where} and the folders <object>/Data/Images that it names"
    base = place_of(root, expected, lambda folder: (folder / where).is_file())
    listed = _read_table(base / where, ("object", "split", "label", "image", "mask"))
    noted = (row for note in base.glob("*/image_anno.csv") for row in _read_table(note, ("image", "label")))
    wrong = {row["image"]: row["label"] for row in noted}
    for row in sorted(listed, key=lambda row: row["image"]):
        label = f"{row['object']}/{wrong.get(row['image'], row['label'])}"
        yield _named(base, row["image"], row["split"], label, row["mask"])


def real_iad(root: Path, skipped: Counter) -> Iterator[Row]:
    """Real-IAD: ``realiad_jsons/<object>.json``, or a folder deeper, says which pictures of
    ``realiad_1024/<object>`` (or 512, or 256) are in which split. Objects without a folder are left out."""
    expected = f"Real-IAD as {root}/realiad_1024/<object> and {root}/realiad_jsons/<object>.json"
    for table, folder in _real_iad_objects(place_of(root, expected, _real_iad_objects)):
        try:
            content = json.loads(table.read_text(encoding="utf-8"))
            for split in SPLITS:
                for row in content[split]:
                    label = f"{table.stem}/{row['anomaly_class']}"
                    yield _named(folder, row["image_path"], split, label, row["mask_path"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"dataset_path: {table} cannot be read ({error!r})") from None


def _real_iad_objects(root: Path) -> list[tuple[Path, Path]]:
    """The table and the folder of each object."""
    bases = (root / f"realiad_{size}" for size in (1024, 512, 256))
    base = next(filter(Path.is_dir, bases), root)
    tables = sorted((root / "realiad_jsons").glob("**/*.json"))
    return [(table, base / table.stem) for table in tables if (base / table.stem).is_dir()]


def _read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises UserError unless it has these columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"dataset_path: {path} cannot be read ({error})") from None
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise UserError(f"dataset_path: expected the columns {', '.join(columns)} in every row of {path}")
    return rows


def _named(base: Path, path: str, split: str, label: str, mask: str | None) -> Row:
    """What a row in a file says. Its paths begin at ``base``, or are whole; Windows writes their folders with
    backslashes. Raises UserError where they name nothing, or the split none."""
    names = (name if (base / name).exists() else name.replace("\\", "/") for name in (path, mask or ""))
    image, marked = (base / name for name in names)
    if gone := [file.absolute() for file in (image, marked) if not file.exists()]:
        raise UserError(f"dataset_path: a table in {base} names {gone[0]}, which is not there")
    if folded(split) not in PLACES.values() or not label.strip():
        told = f"a table in {base} gives {path} the split {split!r} and the label {label!r}"
        raise UserError(f"dataset_path: {told}; expected train, validation or test, and a label")
    return Row(image, folded(split), label.strip(), marked if mask else None)


def read_mask(path: Path) -> np.ndarray:
    """A mask of a defect, (H, W) bool: True where the file is not black, of a JPEG where it is nearer to
    white; of a folder, where any file in it is. Raises UserError."""
    if path.is_dir():
        return np.logical_or.reduce([read_mask(part) for part in images_below(path, Counter())])
    with opened(path) as image:
        if image.mode == "P":  # by the colour; of a palette of blacks by the number
            coloured = np.asarray(image.convert("RGB")).max(2) > 0
            return coloured if coloured.any() else np.asarray(image) > 0
        one = image.mode in ("1", "L", "F") or image.mode.startswith("I")
        least = 127 if image.format == "JPEG" else 0  # its black is not quite black
        return np.asarray(image if one else image.convert("L")) > least


READERS: dict[str, Callable[[Path, Counter], Iterable[Row]]] = {
    **dict.fromkeys(("folder", "lbot", "CatsvsDogs"), folders),
    **dict.fromkeys(("mvtec", "BTAD"), mvtec),
    "csv": labels_file,
    "VisA": visa,
    "RealIAD": real_iad,
    "MTD": magnetic_tiles,
}
