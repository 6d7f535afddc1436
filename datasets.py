"""Raw images with one-class labels and splits.

Layouts (README, "Data"): torchvision's own files, ``{train,test}/<class>/**`` image folders, MVTec-style
trees (``<category>/train/good``, ``<category>/test/<good or defect>``), and scikit-learn's digits."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS

import outliers
from config import Config, UserError, unknown

SPLITS = ("train", "test")
OTHER = -1  # the category of test images that belong to no class one can train on: always anomalous

# CIFAR-100's 20 superclasses (Krizhevsky 2009, table in section 3), and the superclass of each of the 100
# classes in alphabetical order.
SUPERCLASSES = tuple(
    "aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices "
    "household_furniture insects large_carnivores large_man-made_outdoor_things "
    "large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals non-insect_invertebrates "
    "people reptiles small_mammals trees vehicles_1 vehicles_2".split()
)
SUPERCLASS_OF = tuple(
    int(number)
    for number in (
        "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 "
        "5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 "
        "13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
    ).split()
)


# ---------------------------------------------------------------- labels
@dataclasses.dataclass(frozen=True)
class Split:
    """What is known of the images of one split, without the images.

    names: a stable name per image. category (n): its index into the classes, or OTHER. defect (n): whether it
    is a defective specimen of its category."""

    names: list[str]
    category: np.ndarray
    defect: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str], category, defect=None) -> "Split":
        """From any sequences; without ``defect`` no image is defective."""
        names = list(names)
        defect = np.zeros(len(names), bool) if defect is None else np.asarray(defect, bool)
        return cls(names, np.asarray(category, np.int64), defect)

    def as_json(self) -> dict:
        return {"names": self.names, "category": self.category.tolist(), "defect": self.defect.tolist()}


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of a data set's images.

    classes: the classes that can be normal. per_category: a class is tested on the test images of its own
    category (MVTec) instead of on the whole test set."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    per_category: bool = False

    def split(self, name: str) -> Split:
        return {"train": self.train, "test": self.test}[name]

    def count(self) -> int:
        """The number of images in both splits."""
        return len(self.train.names) + len(self.test.names)

    def one_class(self, class_name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Indices of the normal training images, indices of the test images, and test labels (0 normal, 1
        anomalous)."""
        chosen = self.classes.index(class_name)
        train = np.flatnonzero((self.train.category == chosen) & ~self.train.defect)
        if self.per_category:
            test = np.flatnonzero(self.test.category == chosen)
        else:
            test = np.arange(len(self.test.category))
        anomalous = (self.test.category[test] != chosen) | self.test.defect[test]
        return train, test, anomalous.astype(np.int64)

    def fingerprint(self) -> str:
        """A hash of the names and labels, in order."""
        splits = (self.train, self.test)
        return _hash(
            self.classes,
            self.per_category,
            [[s.names, s.category.tolist(), s.defect.tolist()] for s in splits],
        )


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A data set's labels and its images. read(split, i) -> (H, W, 3) uint8; raises UserError that names an
    unreadable image.

    content: a hash that changes with the images: of the pixels, or of the files' sizes."""

    labels: Labels
    read: Callable[[str, int], np.ndarray]  # picklable: readers may be other processes
    content: str = ""
    from_files: bool = True

    def fingerprint(self) -> str:
        """A hash of names, labels and content: equal for the same images, whatever folder they lie in."""
        return _hash(self.labels.fingerprint(), self.content)


def _hash(*contents) -> str:
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def choose_classes(labels: Labels, class_name: str) -> list[str]:
    """The classes that the knob class_name asks for. Raises UserError on an unknown one."""
    if class_name == "all":
        return list(labels.classes)
    chosen = list(dict.fromkeys(name.strip() for name in class_name.split(",")))
    for name in chosen:
        if name not in labels.classes:
            raise UserError(unknown("class", name, ["all", *labels.classes]))
    return chosen


# ---------------------------------------------------------------- raw images
def load_images(dataset: str, dataset_path: str | None) -> ImageSet:
    """The images of a data set. Raises UserError when they are not where ``dataset_path`` (None:
    data/<dataset>) says."""
    if dataset == "digits":
        return _digits()
    root = Path(dataset_path or f"data/{dataset}")
    if dataset == "mvtec":
        return _mvtec(root)
    if all((root / split).is_dir() for split in SPLITS):
        return _folders(root)
    if dataset in _TORCHVISION:
        return _torchvision(dataset, root)
    missing = f"{root} is no folder" if not root.is_dir() else f"{root} holds no train/ and test/ folders"
    raise UserError(
        f"dataset_path: expected {dataset} images as {root}/{{train,test}}/<class>/*, but {missing}"
    )


def images_of(config: Config) -> ImageSet:
    """The images a configuration asks for: a data set's own, or its validation set. Raises UserError."""
    images = load_images(config.dataset, config.dataset_path)
    return validation_set(images) if config.validate else images


def _digits() -> ImageSet:
    """scikit-learn's 1,797 digits, 8 x 8; a fixed stratified split into halves (docs/method.md, section
    6)."""
    digits = load_digits()
    pixels = np.repeat((digits.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3)
    halves = train_test_split(np.arange(len(pixels)), test_size=0.5, random_state=0, stratify=digits.target)
    index = {split: np.sort(half) for split, half in zip(SPLITS, halves)}
    classes = [str(digit) for digit in range(10)]
    return _array_set(
        classes, {s: pixels[i] for s, i in index.items()}, {s: digits.target[i] for s, i in index.items()}
    )


def _array_set(
    classes: list[str], pixels: dict[str, np.ndarray], category: dict[str, np.ndarray]
) -> ImageSet:
    names = {split: [f"{split}/{i}" for i in range(len(pixels[split]))] for split in SPLITS}
    train, test = (Split.of(names[split], category[split]) for split in SPLITS)
    labels = Labels(tuple(classes), train, test)
    content = _hash(
        *(hashlib.sha256(np.ascontiguousarray(pixels[split]).data).hexdigest() for split in SPLITS)
    )
    return ImageSet(labels, partial(_from_array, pixels), content, from_files=False)


def _from_array(pixels: dict[str, np.ndarray], split: str, i: int) -> np.ndarray:
    return pixels[split][i]


_TORCHVISION: dict[
    str, tuple[Callable, dict, dict]
] = {  # name -> (train and test arguments of the torchvision class, the class)
    "cifar10": (tv.CIFAR10, {"train": True}, {"train": False}),
    "CIFAR100": (tv.CIFAR100, {"train": True}, {"train": False}),
    "fashion": (tv.FashionMNIST, {"train": True}, {"train": False}),
    "STL10": (tv.STL10, {"split": "train"}, {"split": "test"}),
}


def _torchvision(dataset: str, root: Path) -> ImageSet:
    """A data set in torchvision's own files, downloaded where the network allows and checked by
    torchvision."""
    kind, *arguments = _TORCHVISION[dataset]
    pixels, category = {}, {}
    for split, argument in zip(SPLITS, arguments):
        try:
            try:
                loaded = kind(
                    str(root), **argument
                )  # checked by torchvision; RuntimeError when absent or corrupt
            except RuntimeError:
                loaded = kind(str(root), **argument, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"dataset_path: expected {dataset} in {root} as image folders {{train,test}}/<class>/* or "
                f"torchvision's files; neither is "
                f"there and the download failed ({error}). Put either there, or give its folder with "
                f"--dataset_path"
            ) from None
        pixels[split] = _rgb(np.asarray(loaded.data), channels_first=dataset == "STL10")
        category[split] = np.asarray(loaded.labels if dataset == "STL10" else loaded.targets)
    classes = loaded.classes
    if dataset == "CIFAR100":
        classes, category = (
            SUPERCLASSES,
            {split: np.asarray(SUPERCLASS_OF)[fine] for split, fine in category.items()},
        )
    return _array_set([name.replace("/", "_").replace(" ", "_") for name in classes], pixels, category)


def _rgb(pixels: np.ndarray, channels_first: bool) -> np.ndarray:
    """(n, H, W), (n, 3, H, W) or (n, H, W, 3) uint8 -> (n, H, W, 3)."""
    if pixels.ndim == 3:
        return np.broadcast_to(pixels[..., None], (*pixels.shape, 3))
    return pixels.transpose(0, 2, 3, 1) if channels_first else pixels


def _folders(root: Path) -> ImageSet:
    """``{train,test}/<class>/**``. A test folder without a train folder of its name is anomalous for every
    class."""
    classes = _subfolders(root / "train")
    number = {name: i for i, name in enumerate(classes)}
    listing: dict[str, list[Entry]] = {
        split: [
            Entry(path, number.get(name, OTHER))
            for name in _subfolders(root / split)
            for path in images_below(root / split / name)
        ]
        for split in SPLITS
    }
    return _file_set(root, classes, listing)


def _mvtec(root: Path) -> ImageSet:
    """``<category>/train/good``, ``<category>/test/<good or defect>``; root may also be one such category."""
    if not root.is_dir():
        raise UserError(
            f"dataset_path: {root} is no folder; expected MVTec-style categories in it, "
            f"<category>/train/good and "
            "<category>/test/<defect>"
        )
    if (root / "train" / "good").is_dir():
        categories = {root.resolve().name: root}
    else:
        categories = {p.name: p for p in sorted(root.iterdir()) if (p / "train" / "good").is_dir()}
    if not categories:
        raise UserError(
            f"dataset_path: expected MVTec-style categories in {root} (<category>/train/good), found none"
        )
    listing: dict[str, list[Entry]] = {
        split: [
            Entry(path, number, kind != "good")
            for number, folder in enumerate(categories.values())
            for kind in _subfolders(folder / split)
            for path in images_below(folder / split / kind)
        ]
        for split in SPLITS
    }
    return _file_set(root, list(categories), listing, per_category=True)


def _subfolders(folder: Path) -> list[str]:
    names = (
        sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if folder.is_dir()
        else []
    )
    if not names:
        raise UserError(f"dataset_path: expected a folder of images per class in {folder}, found none")
    return names


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted. Raises UserError when there are none."""
    files = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and not p.name.startswith(".")
    )
    if not files:
        raise UserError(
            f"dataset_path: no images in {folder}; expected files ending in {', '.join(IMG_EXTENSIONS)}"
        )
    return files


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image file with its labels."""

    path: Path
    category: int
    defect: bool = False


def _file_set(
    root: Path, classes: list[str], listing: dict[str, list[Entry]], per_category: bool = False
) -> ImageSet:
    train, test = (
        Split.of(
            [entry.path.relative_to(root).as_posix() for entry in listing[split]],
            [entry.category for entry in listing[split]],
            [entry.defect for entry in listing[split]],
        )
        for split in SPLITS
    )
    files = {split: [entry.path for entry in listing[split]] for split in SPLITS}
    content = _hash([[path.stat().st_size for path in files[split]] for split in SPLITS])
    return ImageSet(Labels(tuple(classes), train, test, per_category), partial(_from_file, files), content)


def _from_file(files: dict[str, list[Path]], split: str, i: int) -> np.ndarray:
    return read_image(files[split][i])


def unlabelled(files: list[Path]) -> ImageSet:
    """Image files without labels, as a test split."""
    labels = Labels((), Split.of([], []), Split.of([str(path) for path in files], [OTHER] * len(files)))
    return ImageSet(labels, partial(_from_file, {"train": [], "test": files}))


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8. Raises UserError that names it when it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"unreadable image {path} ({type(error).__name__}); repair it or take it out of the folder"
        ) from None


# ---------------------------------------------------------------- validation without anomalies
HELD_OUT, MOST_HELD_OUT = (
    0.1,
    250,
)  # share of the normal training images that stand for normal test images, and at most so many
MOST_FITTED = 2000  # normal training images per class that are kept to fit: choosing must be quick


def validation_set(images: ImageSet) -> ImageSet:
    """A test set for choosing settings, made from normal training images alone: nothing of the real test set
    is read.

    Per class, a fixed tenth of the normal training images (at most 250) is held out; at most 2,000 of the
    others are there to fit. The held-out ones are the normal test images; each also gives three synthetic
    outliers: turned by 90, 180 or 270 degrees, with a rectangle pasted in from another one, and averaged with
    another one."""
    labels = images.labels
    rows: dict[str, list[tuple[str, int, bool]]] = {split: [] for split in SPLITS}
    recipe: dict[str, list[tuple[int, str, int]]] = {split: [] for split in SPLITS}
    for number in range(len(labels.classes)):
        normal = np.flatnonzero((labels.train.category == number) & ~labels.train.defect)
        shuffled = np.random.RandomState(0).permutation(normal)
        n_held = max(2, min(MOST_HELD_OUT, round(HELD_OUT * len(shuffled))))
        held, fitted = shuffled[:n_held], shuffled[n_held : n_held + MOST_FITTED]
        entries = [("train", row, "", row) for row in np.sort(fitted)]
        entries += [
            ("test", row, kind, held[i - 1]) for kind in ("", *outliers.KINDS) for i, row in enumerate(held)
        ]
        for split, row, kind, other in entries:
            rows[split].append((labels.train.names[row] + (f" {kind}" if kind else ""), number, bool(kind)))
            recipe[split].append((int(row), kind, int(other)))
    train, test = (Split.of(*zip(*rows[split])) for split in SPLITS)
    made = Labels(labels.classes, train, test, per_category=True)
    return ImageSet(made, partial(_make, images, recipe), images.content, images.from_files)


def _make(images: ImageSet, recipe: dict[str, list[tuple]], split: str, i: int) -> np.ndarray:
    """An image of the validation set: (row, kind of outlier or nothing, other row) of the training split."""
    row, kind, other = recipe[split][i]
    image = images.read("train", row)
    return (
        outliers.outlier(image, images.read("train", other), kind, np.random.RandomState(i))
        if kind
        else image
    )
