"""Data sets of image files: which file is of which category, in which split, and what is wrong with it.

Each reader takes the folder that the user named and gives a ``Listing``, or raises UserError that says
where it looked, what it found there and what it expected."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import images
from config import UserError

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
    try:
        return sorted(p.name for p in folder.iterdir() if images.is_searched(p.name) and p.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(
            f"dataset_path: the folder {folder} cannot be read ({error.strerror}); allow it"
        ) from None


def what_is_there(folder: Path) -> str:
    """What a message says was found at a path: "... is no folder", "... holds a, b and 3 more"."""
    if not folder.is_dir():
        return f"{folder.resolve()} is {'a file, no folder' if folder.exists() else 'not there'}"
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if images.is_searched(p.name))
    if not names:
        return f"{folder.resolve()} is empty"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{folder.resolve()} holds {', '.join(names[:4])}{more}"


# ---------------------------------------------------------------- folders per class
def folders(root: Path) -> Listing:
    """``{train,test}/<class>/**``; without test/, an empty test split. A test folder without a train folder
    of its name is anomalous for every class, and its name is the kind."""
    search, classes = Search(root), subfolders(root / "train")
    if not classes and not (root / "test").is_dir():
        return normal_only(root / "train", root.resolve().name)
    if not classes:
        raise UserError(
            f"dataset_path: expected a folder of images per class in {root / 'train'}, found none; "
            f"{what_is_there(root / 'train')}"
        )
    tested = subfolders(root / "test")
    if (root / "test").is_dir() and not tested:
        raise UserError(
            f"dataset_path: expected a folder of images per class in {root / 'test'}, found none; put the "
            f"normal test images into test/<class>, or take test/ away to train on normal pictures only"
        )
    number = {name: i for i, name in enumerate(classes)}
    entries = {
        split: [
            Entry(path, number.get(name, OTHER), kind="" if name in number else name)
            for name in names
            for path in search.images(root / split / name)
        ]
        for split, names in zip(SPLITS, (classes, tested))
    }
    search.tell()
    return Listing(root, classes, entries)


def normal_only(root: Path, name: str | None = None) -> Listing:
    """Pictures of one thing that lie in a folder itself, all normal: one class of the folder's name (or of
    ``name``), and an empty test split. Subfolders are not searched. Raises UserError when no pictures lie
    there."""
    here = sorted(p for p in root.iterdir() if images.is_searched(p.name) and not p.is_dir())
    skipped = Counter(reason for path in here if (reason := images.why_skipped(path)))
    pictures = [path for path in here if not images.why_skipped(path)]
    if not pictures:
        below = subfolders(root)
        advice = (
            f"; put normal pictures into {root}/train/<class> (and test pictures into {root}/test/<class>), "
            f"or give the folder of the normal ones: --dataset_path {root / below[0]}"
            if below
            else ""
        )
        raise UserError(
            f"dataset_path: expected images as {root}/{{train,test}}/<class>/*, or normal pictures in {root} "
            f"itself, but {what_is_there(root)}{advice}"
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
        )
    search = Search(root)
    entries: dict[str, list[Entry]] = {
        split: [
            Entry(path, number)
            if kind in NORMAL_NAMES
            else Entry(
                path, number, True, kind, _mask(path, folder / split / kind, folder / "ground_truth" / kind)
            )
            for number, folder in enumerate(categories.values())
            for kind in subfolders(folder / split)
            for path in search.images(folder / split / kind)
        ]
        for split in SPLITS
    }
    search.tell()
    return Listing(root, list(categories), entries, per_category=True)


def _categories(root: Path) -> dict[str, Path]:
    """{name: folder} of the MVTec-style categories that root is or holds."""
    if _normal_folder(root):
        return {root.resolve().name: root}
    return {name: root / name for name in subfolders(root) if _normal_folder(root / name)}


def _normal_folder(category: Path) -> bool:
    return any((category / "train" / name).is_dir() for name in NORMAL_NAMES)


def _mask(path: Path, folder: Path, masks: Path) -> Path | None:
    """Where the defect of an image below ``folder`` is marked below ``masks``; None where nothing is
    there."""
    beside = masks / path.relative_to(folder).parent
    return next((file for name in MASK_NAMES if (file := beside / name.format(path.stem)).is_file()), None)


def read_mask(path: Path) -> np.ndarray:
    """A mask of a defect, (H, W) bool: True where the file is not black. Raises UserError."""
    try:
        with Image.open(path, formats=images.formats()) as image:
            images.bounded(image)
            one = image.mode in ("1", "L", "P", "F") or image.mode.startswith("I")
            return np.asarray(image if one else image.convert("L")) > 0
    except Exception as error:  # every format fails in its own way
        raise UserError(f"unreadable mask {path} ({type(error).__name__})") from None
