"""Data sets of image files: which file is of which category, in which split, and what is wrong with it.

Each reader takes the folder that the user named and gives a ``Listing``, or raises UserError that says
where it looked, what it found there and what it expected."""

import csv
import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from config import UserError
from images import images

SPLITS = ("train", "test")
OTHER = -1  # the category of test images that belong to no class one can train on: always anomalous
NORMAL_NAMES = ("good", "ok", "normal")  # folders of normal pictures in MVTec-style trees
MASK_NAMES = (
    "{}_mask.png",
    "{}.png",
    "{}_mask.bmp",
    "{}.bmp",
)  # of ground_truth/<kind>/, by the image's stem


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image file with its labels.

    category: index into the classes, or OTHER. defect: a defective specimen of its category. kind: what is
    wrong with it, in the words of the data set; "" where nothing is. mask: where its defect is marked."""

    path: Path
    category: int
    defect: bool = False
    kind: str = ""
    mask: Path | None = None


@dataclasses.dataclass(frozen=True)
class Listing:
    """All image files of a data set. root: what their names are relative to. per_category: a class is
    tested on the test images of its own category."""

    root: Path
    classes: list[str]
    entries: dict[str, list[Entry]]
    per_category: bool = False


class Search:
    """Finds the image files below folders; counts what it passes over, to be told once."""

    def __init__(self, root: Path):
        self.root, self.skipped = root, Counter[str]()

    def images(self, folder: Path) -> list[Path]:
        return images.images_below(folder, self.skipped)

    def tell(self) -> None:
        if self.skipped:
            images.note(f"passed over in {self.root}: {images.tell_skipped(self.skipped)}")


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, hidden ones left out; none where it is no folder. Raises
    UserError when it cannot be read."""
    return (
        [entry.name for entry in images.searched(folder) if images.is_folder(entry)]
        if folder.is_dir()
        else []
    )


def folded(name: str) -> str:
    """What names are compared by: case, the Unicode form of a letter (NFC, NFD) and spaces around the name
    make no difference."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def by_name(folder: Path) -> dict[str, str]:
    """{folded name: name} of the folders in a folder, sorted. Raises UserError that names two whose names
    differ in nothing that counts."""
    found: dict[str, str] = {}
    for name in subfolders(folder):
        if (other := found.setdefault(folded(name), name)) != name:
            raise UserError(
                f"dataset_path: {folder} holds the folders {ascii(other)} and {ascii(name)}, which differ in "
                "case, Unicode form or spaces only; rename one, or put their pictures together"
            )
    return found


def inside(folder: Path, name: str) -> Path:
    """The folder of that name in a folder, however it is spelt (``folded``), the one spelt so first."""
    same = [there for there in subfolders(folder) if folded(there) == folded(name)]
    return folder / (name if name in same or not same else same[0])


def what_is_there(folder: Path) -> str:
    """What a message says was found at a path: "... is not there", "... holds a, b and 3 more"."""
    if not folder.is_dir():
        return f"{folder.resolve()} is {'a file, no folder' if folder.exists() else 'not there'}"
    names = [entry.name + "/" * images.is_folder(entry) for entry in images.searched(folder)]
    if not names:
        return f"{folder.resolve()} is empty"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{folder.resolve()} holds {', '.join(names[:4])}{more}"


def where_instead(root: Path, holds: Callable[[Path], bool]) -> str:
    """The advice for a folder that does not hold a data set, where a folder at most three below it, or the
    one above it, does; "" otherwise."""
    level, near = [root], []
    for _ in range(3):
        level = [folder / name for folder in level[:1000] for name in subfolders(folder)]
        near += level
    found = next((folder for folder in [*near, root.resolve().parent] if holds(folder)), None)
    return f"; {found} does: give --dataset_path {found}" if found else ""


# ---------------------------------------------------------------- folders per class
def folders(root: Path) -> Listing:
    """``{train,test}/<class>/**``; without test/, an empty test split. A test folder without a train folder
    of its name is anomalous for every class, and its name is the kind."""
    search, (train, test) = Search(root), (inside(root, split) for split in SPLITS)
    classes, number = subfolders(train), {name: i for i, name in enumerate(by_name(train))}
    if not classes and not test.is_dir():
        return normal_only(train, root.resolve().name)
    if not classes:
        raise UserError(
            f"dataset_path: expected a folder of images per class in {train}, found none; "
            f"{what_is_there(train)}"
        )
    tested = list(by_name(test).values())
    if test.is_dir() and not tested:
        raise UserError(
            f"dataset_path: expected a folder of images per class in {test}, found none; put the "
            f"normal test images into test/<class>, or take test/ away to train on normal pictures only"
        )
    entries = {
        split: [
            Entry(path, number.get(folded(name), OTHER), kind="" if folded(name) in number else name)
            for name in names
            for path in search.images(folder / name)
        ]
        for split, folder, names in zip(SPLITS, (train, test), (classes, tested))
    }
    search.tell()
    for folder in (train, test):
        if folder.is_dir() and (beside := pictures_in(folder, Counter())):
            images.note(f"only the folders in {folder} are taken, not the {len(beside)} pictures beside them")
    return Listing(root, classes, entries)


def pictures_in(folder: Path, skipped: Counter) -> list[Path]:
    """The image files in a folder itself, sorted; ``skipped`` counts the others by ending."""
    here = [entry for entry in images.searched(folder) if not images.is_folder(entry)]
    skipped.update(reason for entry in here if (reason := images.why_skipped(entry)))
    return [folder / entry.name for entry in here if not images.why_skipped(entry)]


def normal_only(root: Path, name: str | None = None) -> Listing:
    """Pictures of one thing that lie in a folder itself, all normal: one class of the folder's name (or of
    ``name``), and an empty test split. Subfolders are not searched. Raises UserError when no pictures lie
    there."""
    skipped: Counter = Counter()
    pictures = pictures_in(root, skipped)
    if not pictures:
        raise UserError(
            f"dataset_path: expected images as {root}/{{train,test}}/<class>/*, or normal pictures in {root} "
            f"itself, but {what_is_there(root)}{_advice(root)}"
        )
    if skipped:
        images.note(f"passed over in {root}: {images.tell_skipped(skipped)}")
    if below := subfolders(root):
        images.note(f"only the pictures in {root} itself are taken, not those in {', '.join(below[:4])}")
    return Listing(
        root,
        [name or root.resolve().name or "normal"],
        {"train": [Entry(path, 0) for path in pictures], "test": []},
    )


def _advice(root: Path) -> str:
    """What to do about a folder without pictures that holds folders."""
    below = subfolders(root)
    elsewhere = where_instead(root, lambda folder: bool(subfolders(folder / "train")))
    if elsewhere or not below:
        return elsewhere
    normal = [name for name in below if folded(name) in NORMAL_NAMES] or below
    named = str(root / normal[0]) if len(normal) == 1 else f"{root}/<one of {', '.join(normal[:4])}>"
    return (
        f"; put normal pictures into {root}/train/<class> and test pictures into {root}/test/<class>, or "
        f"give the folder of the normal ones: --dataset_path {named}"
    )


# ---------------------------------------------------------------- categories with defective specimens
def mvtec(root: Path) -> Listing:
    """``<category>/train/good``, ``<category>/test/<good or defect>``,
    ``<category>/ground_truth/<defect>``; "ok" serves for "good" (BTAD). root may also be one such category,
    or a folder that holds nothing but their folder."""
    categories = _categories(root)
    if not categories:
        inner = subfolders(root)
        categories = _categories(root / inner[0]) if len(inner) == 1 else {}
    if not categories:
        raise UserError(
            f"dataset_path: expected MVTec-style categories in {root}, <category>/train/good (or ok) and "
            f"<category>/test/<good or defect>, but {what_is_there(root)}"
            f"{where_instead(root, lambda folder: bool(_categories(folder)))}"
        )
    search = Search(root)
    entries: dict[str, list[Entry]] = {
        split: [
            entry
            for number, folder in enumerate(categories.values())
            for entry in _category(search, folder, number, split)
        ]
        for split in SPLITS
    }
    search.tell()
    return Listing(root, list(categories), entries, per_category=True)


def _category(search: Search, category: Path, number: int, split: str) -> Iterator[Entry]:
    """The images of a split of one category."""
    place, marked = inside(category, split), inside(category, "ground_truth")
    for name, kind in by_name(place).items():
        masks = inside(marked, kind)
        for path in search.images(place / kind):
            if name in NORMAL_NAMES:
                yield Entry(path, number)
            else:
                yield Entry(path, number, True, kind, _mask(path, place / kind, masks))


def _categories(root: Path) -> dict[str, Path]:
    """{name: folder} of the MVTec-style categories that root is or holds."""
    if _normal_folder(root):
        return {root.resolve().name: root}
    return {name: root / name for name in subfolders(root) if _normal_folder(root / name)}


def _normal_folder(category: Path) -> bool:
    return any(folded(name) in NORMAL_NAMES for name in subfolders(inside(category, "train")))


def _mask(path: Path, folder: Path, masks: Path) -> Path | None:
    """Where the defect of an image below ``folder`` is marked below ``masks``; None where nothing is
    there."""
    beside = masks / path.relative_to(folder).parent
    return next((file for name in MASK_NAMES if (file := beside / name.format(path.stem)).is_file()), None)


# ---------------------------------------------------------------- VisA
def visa(root: Path) -> Listing:
    """VisA: ``split_csv/1cls.csv`` says which image of ``<object>/Data/Images/{Normal,Anomaly}`` is in
    which split, and which mask is its; ``<object>/image_anno.csv``, where it is there, says what is wrong.
    Also in its converted form, MVTec-style categories."""
    bases = [root, root / "VisA", *(root / name for name in subfolders(root)[:1])]
    base = next((b for b in bases if (b / "split_csv" / "1cls.csv").is_file()), None)
    if base is None:
        if _categories(root):
            return mvtec(root)
        raise UserError(
            f"dataset_path: expected VisA as {root / 'split_csv' / '1cls.csv'} and the folders "
            f"<object>/Data/Images that it names, but {what_is_there(root)}"
            f"{where_instead(root, lambda folder: (folder / 'split_csv' / '1cls.csv').is_file())}"
        )
    table = base / "split_csv" / "1cls.csv"
    rows = _read_table(table, ("object", "split", "label", "image", "mask"))
    missing = [row["image"] for row in rows if not (base / row["image"]).is_file()]
    if missing:
        raise UserError(
            f"dataset_path: {table} names {(base / missing[0]).resolve()}, which is not there, nor are "
            f"{len(missing) - 1} others of its {len(rows)} images; unpack VisA whole"
        )
    objects = sorted({row["object"] for row in rows})
    kinds = {
        kind["image"]: kind["label"] for name in objects for kind in _kinds(base / name / "image_anno.csv")
    }
    entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    for row in sorted(rows, key=lambda row: row["image"]):
        defect, number = folded(row["label"]) != "normal", objects.index(row["object"])
        mask = base / row["mask"] if row["mask"] else None
        kind = kinds.get(row["image"], "anomaly") if defect else ""
        if row["split"] not in entries:
            raise UserError(f"dataset_path: {table} has the split {row['split']!r}; expected train or test")
        entries[row["split"]].append(Entry(base / row["image"], number, defect, kind, mask))
    return Listing(base, objects, entries, per_category=True)


def _kinds(table: Path) -> list[dict[str, str]]:
    return _read_table(table, ("image", "label")) if table.is_file() else []


def _read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises UserError unless it has these columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"dataset_path: {path} cannot be read ({error})") from None
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise UserError(f"dataset_path: expected the columns {', '.join(columns)} in {path}, in every row")
    return rows


# ---------------------------------------------------------------- sets without a split of their own
TRAIN_SHARE = 0.8  # of each class's normal pictures


def split_by_rule(files: list[Path]) -> dict[str, list[Path]]:
    """A split for pictures that are published without one. Sorted by the number in their name, then by
    name, they are shuffled by numpy's RandomState(0).permutation; the first 80 % (rounded) train."""
    ordered = sorted(files, key=lambda path: (_number(path), path.name))
    shuffled = np.random.RandomState(0).permutation(len(ordered))
    n_train = round(TRAIN_SHARE * len(ordered))
    chosen = {"train": shuffled[:n_train], "test": shuffled[n_train:]}
    return {split: [ordered[i] for i in sorted(index)] for split, index in chosen.items()}


def _number(path: Path) -> int:
    digits = re.findall("[0-9]+", path.stem)
    return int(digits[-1]) if digits else -1


def cats_vs_dogs(root: Path) -> Listing:
    """Cats and dogs: ``{train,test}/<class>/*``, Kaggle's flat ``train/cat.0.jpg``, or Microsoft's
    ``PetImages/{Cat,Dog}/0.jpg``; the last two split by ``split_by_rule``, 10,000 of each class to train
    and 2,500 to test, the same pictures in both. Kaggle's test1/ has no labels and is not read."""
    if all(subfolders(root / split) for split in SPLITS):
        return folders(root)
    places = _pets(root)
    if not places:
        raise UserError(
            f"dataset_path: expected cats and dogs as {root}/{{train,test}}/{{cat,dog}}/*, "
            f"{root / 'train' / 'cat.0.jpg'} (Kaggle) or {root / 'PetImages' / 'Cat'} (Microsoft), but "
            f"{what_is_there(root)}{where_instead(root, lambda folder: bool(_pets(folder)))}"
        )
    search, halves = Search(root), []
    for name, (folder, start) in places.items():
        pictures = [path for path in search.images(folder) if path.name.startswith(start)]
        if not pictures:
            raise UserError(
                f"dataset_path: no pictures of a {name} in {folder}; expected {start}0.jpg and so on"
            )
        halves.append(split_by_rule(pictures))
    search.tell()
    entries = {s: [Entry(path, i) for i, half in enumerate(halves) for path in half[s]] for s in SPLITS}
    return Listing(root, list(PETS), entries)


def _pets(root: Path) -> dict[str, tuple[Path, str]]:
    """Where the pictures of each pet lie, and how their names start: Kaggle's form or Microsoft's; {} if in
    neither."""
    for folder in (root / "train", root):
        if any(folder.glob("cat.*.jpg")):
            return {name: (folder, f"{name}.") for name in PETS}
    for folder in (root / "PetImages", root):
        named = {name.lower(): folder / name for name in subfolders(folder)}
        if all(name in named for name in PETS):
            return {name: (named[name], "") for name in PETS}
    return {}


PETS = ("cat", "dog")


def magnetic_tiles(root: Path) -> Listing:
    """Magnetic tile defects: ``MT_Free/Imgs/*.jpg`` are normal, ``MT_<Kind>/Imgs/*.jpg`` are defective,
    their masks .png beside them. The free ones are split by ``split_by_rule``; all defective ones are
    tested."""
    inner = [root, *(root / name for name in subfolders(root))]
    base = next((folder for folder in inner if (folder / "MT_Free").is_dir()), None)
    if base is None:
        raise UserError(
            f"dataset_path: expected magnetic tiles as {root / 'MT_Free' / 'Imgs'}, and MT_Blowhole, "
            f"MT_Break, ... beside it, but {what_is_there(root)}"
            f"{where_instead(root, lambda folder: (folder / 'MT_Free').is_dir())}"
        )
    free = split_by_rule(_tiles(base / "MT_Free"))
    entries = {split: [Entry(path, 0) for path in free[split]] for split in SPLITS}
    for name in subfolders(base):
        if name.startswith("MT_") and name != "MT_Free":
            kind = name.removeprefix("MT_").lower()
            for path in _tiles(base / name):
                mask = path.with_suffix(".png")
                entries["test"].append(Entry(path, 0, True, kind, mask if mask.is_file() else None))
    return Listing(base, ["magnetic_tile"], entries, per_category=True)


def _tiles(folder: Path) -> list[Path]:
    """The photographs in a folder: the .png beside them are masks."""
    return [path for path in images.images_below(folder) if path.suffix.lower() in (".jpg", ".jpeg")]


def read_mask(path: Path) -> np.ndarray:
    """A mask of a defect, (H, W) bool: True where the file is not black. Raises UserError."""
    try:
        with Image.open(path, formats=images.formats()) as image:
            images.bounded(image)
            if image.mode == "P":  # by the colour; of a palette of blacks by the number
                coloured = np.asarray(image.convert("RGB")).max(2) > 0
                return coloured if coloured.any() else np.asarray(image) > 0
            one = image.mode in ("1", "L", "F") or image.mode.startswith("I")
            return np.asarray(image if one else image.convert("L")) > 0
    except Exception as error:  # every format fails in its own way
        raise UserError(f"unreadable mask {path} ({type(error).__name__})") from None


def own_pictures(root: Path) -> Listing:
    """Folders per class (``folders``), or normal pictures alone (``normal_only``)."""
    if not root.is_dir():
        raise UserError(
            f"dataset_path: expected images as {root}/{{train,test}}/<class>/*, or normal pictures in {root} "
            f"itself, but {what_is_there(root)}"
        )
    return folders(root) if inside(root, "train").is_dir() else normal_only(root)


READERS: dict[str, Callable[[Path], Listing]] = {
    "folder": own_pictures,
    "lbot": own_pictures,
    "CatsvsDogs": cats_vs_dogs,
    "mvtec": mvtec,
    "BTAD": mvtec,
    "VisA": visa,
    "MTD": magnetic_tiles,
}
