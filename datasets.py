"""Raw images with one-class labels, and the feature cache: the only module that knows the cache's paths and format.

Layouts (README, "Data"): torchvision's own files, ``{train,test}/<class>/**`` image folders, MVTec-style trees
(``<category>/train/good``, ``<category>/test/<good or defect>``), and scikit-learn's digits.
"""

import dataclasses
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS

from config import Config, UserError, unknown

SPLITS = ("train", "test")
OTHER = -1  # the category of test images that belong to no class one can train on: always anomalous

# CIFAR-100's 20 superclasses (Krizhevsky 2009, table in section 3), and the superclass of each of the 100 classes in alphabetical order.
SUPERCLASSES = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices",
    "household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things", "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates", "people", "reptiles", "small_mammals", "trees",
    "vehicles_1", "vehicles_2",
)  # fmt: skip
SUPERCLASS_OF = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9,
    11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16,
    12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
)  # fmt: skip


# ---------------------------------------------------------------- labels
@dataclasses.dataclass(frozen=True)
class Labels:
    """What is known of the images of a data set, without the images.

    classes: the classes that can be normal. names, category, defect: per split, per image: a stable name, its index into
    classes (or OTHER), and whether it is a defective specimen of its category. per_category: a class is tested on the test
    images of its own category (MVTec) instead of on the whole test set.
    """

    classes: tuple[str, ...]
    names: dict[str, list[str]]
    category: dict[str, np.ndarray]
    defect: dict[str, np.ndarray]
    per_category: bool = False

    def one_class(self, class_name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Indices of the normal training images, indices of the test images, and test labels (0 normal, 1 anomalous)."""
        chosen = self.classes.index(class_name)
        train = np.flatnonzero((self.category["train"] == chosen) & ~self.defect["train"])
        if self.per_category:
            test = np.flatnonzero(self.category["test"] == chosen)
        else:
            test = np.arange(len(self.category["test"]))
        anomalous = (self.category["test"][test] != chosen) | self.defect["test"][test]
        return train, test, anomalous.astype(np.int64)

    def fingerprint(self) -> str:
        """A hash of the names and labels, in order."""
        per_split = [[self.names[s], self.category[s].tolist(), self.defect[s].tolist()] for s in SPLITS]
        return _hash(self.classes, self.per_category, per_split)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A data set's labels and its images. read(split, i) -> (H, W, 3) uint8; raises UserError that names an unreadable image.

    content: a hash that changes with the images: of the pixels, or of the files' sizes.
    """

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
    """The images of a data set. Raises UserError when they are not where ``dataset_path`` (None: data/<dataset>) says."""
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
    raise UserError(f"dataset_path: expected {dataset} images as {root}/{{train,test}}/<class>/*, but {missing}")


def images_of(config: Config) -> ImageSet:
    """The images a configuration asks for: a data set's own, or its validation set. Raises UserError."""
    images = load_images(config.dataset, config.dataset_path)
    return validation_set(images) if config.validate else images


def _digits() -> ImageSet:
    """scikit-learn's 1,797 digits, 8 x 8; a fixed stratified split into halves (SPEC 5)."""
    digits = load_digits()
    pixels = np.repeat((digits.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3)
    halves = train_test_split(np.arange(len(pixels)), test_size=0.5, random_state=0, stratify=digits.target)
    index = {split: np.sort(half) for split, half in zip(SPLITS, halves)}
    return _array_set([str(digit) for digit in range(10)], {s: pixels[i] for s, i in index.items()}, {s: digits.target[i] for s, i in index.items()})


def _array_set(classes, pixels, category) -> ImageSet:
    names = {split: [f"{split}/{i}" for i in range(len(pixels[split]))] for split in SPLITS}
    category = {split: np.asarray(category[split], dtype=np.int64) for split in SPLITS}
    labels = Labels(tuple(classes), names, category, {split: np.zeros(len(pixels[split]), bool) for split in SPLITS})
    content = _hash(*(hashlib.sha256(np.ascontiguousarray(pixels[split])).hexdigest() for split in SPLITS))
    return ImageSet(labels, partial(_from_array, pixels), content, from_files=False)


def _from_array(pixels: dict[str, np.ndarray], split: str, i: int) -> np.ndarray:
    return pixels[split][i]


_TORCHVISION = {  # name -> (train and test arguments of the torchvision class, the class)
    "cifar10": (tv.CIFAR10, {"train": True}, {"train": False}),
    "CIFAR100": (tv.CIFAR100, {"train": True}, {"train": False}),
    "fashion": (tv.FashionMNIST, {"train": True}, {"train": False}),
    "STL10": (tv.STL10, {"split": "train"}, {"split": "test"}),
}


def _torchvision(dataset: str, root: Path) -> ImageSet:
    """A data set in torchvision's own files, downloaded where the network allows and checked by torchvision."""
    kind, *arguments = _TORCHVISION[dataset]
    pixels, category = {}, {}
    for split, argument in zip(SPLITS, arguments):
        try:
            try:
                found = kind(str(root), **argument)  # checked by torchvision; RuntimeError when absent or corrupt
            except RuntimeError:
                found = kind(str(root), **argument, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"dataset_path: expected {dataset} in {root} as image folders {{train,test}}/<class>/* or torchvision's files; neither is "
                f"there and the download failed ({error}). Put either there, or give its folder with --dataset_path"
            ) from None
        pixels[split] = _rgb(np.asarray(found.data), channels_first=dataset == "STL10")
        category[split] = np.asarray(found.labels if dataset == "STL10" else found.targets)
    classes = found.classes
    if dataset == "CIFAR100":
        classes, category = SUPERCLASSES, {split: np.asarray(SUPERCLASS_OF)[fine] for split, fine in category.items()}
    return _array_set([name.replace("/", "_").replace(" ", "_") for name in classes], pixels, category)


def _rgb(pixels: np.ndarray, channels_first: bool) -> np.ndarray:
    """(n, H, W), (n, 3, H, W) or (n, H, W, 3) uint8 -> (n, H, W, 3)."""
    if pixels.ndim == 3:
        return np.broadcast_to(pixels[..., None], (*pixels.shape, 3))
    return pixels.transpose(0, 2, 3, 1) if channels_first else pixels


def _folders(root: Path) -> ImageSet:
    """``{train,test}/<class>/**``. A test folder without a train folder of its name is anomalous for every class."""
    classes = _subfolders(root / "train")
    files = {split: [(path, name) for name in _subfolders(root / split) for path in images_below(root / split / name)] for split in SPLITS}
    category = {split: np.array([classes.index(name) if name in classes else OTHER for _, name in files[split]]) for split in SPLITS}
    return _file_set(root, classes, {s: [path for path, _ in files[s]] for s in SPLITS}, category, {s: np.zeros(len(files[s]), bool) for s in SPLITS})


def _mvtec(root: Path) -> ImageSet:
    """``<category>/train/good``, ``<category>/test/<good or defect>``; root may also be one such category."""
    if not root.is_dir():
        raise UserError(
            f"dataset_path: {root} is no folder; expected MVTec-style categories in it, <category>/train/good and <category>/test/<defect>"
        )
    single = (root / "train" / "good").is_dir()
    categories = {root.resolve().name: root} if single else {p.name: p for p in sorted(root.iterdir()) if (p / "train" / "good").is_dir()}
    if not categories:
        raise UserError(f"dataset_path: expected MVTec-style categories in {root} (<category>/train/good), found none")
    files, category, defect = {s: [] for s in SPLITS}, {s: [] for s in SPLITS}, {s: [] for s in SPLITS}
    for number, folder in enumerate(categories.values()):
        for split in SPLITS:
            for kind in _subfolders(folder / split):
                found = images_below(folder / split / kind)
                files[split] += found
                category[split] += [number] * len(found)
                defect[split] += [kind != "good"] * len(found)
    return _file_set(root, list(categories), files, {s: np.array(category[s]) for s in SPLITS}, {s: np.array(defect[s], bool) for s in SPLITS}, True)


def _subfolders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []
    if not names:
        raise UserError(f"dataset_path: expected a folder of images per class in {folder}, found none")
    return names


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, sorted. Raises UserError when there are none."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and not p.name.startswith("."))
    if not found:
        raise UserError(f"dataset_path: no images in {folder}; expected files ending in {', '.join(IMG_EXTENSIONS)}")
    return found


def _file_set(root, classes, files, category, defect, per_category=False) -> ImageSet:
    names = {split: [path.relative_to(root).as_posix() for path in files[split]] for split in SPLITS}
    labels = Labels(tuple(classes), names, category, defect, per_category)
    content = _hash([[path.stat().st_size for path in files[split]] for split in SPLITS])
    return ImageSet(labels, partial(_from_file, files), content)


def _from_file(files: dict[str, list[Path]], split: str, i: int) -> np.ndarray:
    return read_image(files[split][i])


def unlabelled(files: list[Path]) -> ImageSet:
    """Image files without labels, as a test split."""
    category = {"train": np.zeros(0, np.int64), "test": np.full(len(files), OTHER)}
    names = {"train": [], "test": [str(path) for path in files]}
    labels = Labels((), names, category, {split: np.zeros(len(names[split]), bool) for split in SPLITS})
    return ImageSet(labels, partial(_from_file, {"train": [], "test": files}))


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8. Raises UserError that names it when it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"unreadable image {path} ({type(error).__name__}); mend it or take it out of the folder") from None


# ---------------------------------------------------------------- validation without anomalies
HELD_OUT, MOST_HELD_OUT = 0.1, 250  # share of the normal training images that stand for normal test images, and at most so many
MOST_FITTED = 2000  # normal training images per class that are kept to fit: choosing must be quick
OUTLIERS = ("rotated", "pasted", "blended")


def validation_set(images: ImageSet) -> ImageSet:
    """A test set for choosing settings, made from normal training images alone: nothing of the real test set is read.

    Per class, a fixed tenth of the normal training images (at most 250) is held out; at most 2,000 of the others are there to fit. The
    held-out ones are the normal test images; each also gives three synthetic outliers: turned by 90, 180 or 270 degrees, with a
    rectangle pasted in from another one, and averaged with another one.
    """
    labels = images.labels
    names, category, defect, recipe = ({split: [] for split in SPLITS} for _ in range(4))
    for number in range(len(labels.classes)):
        normal = np.flatnonzero((labels.category["train"] == number) & ~labels.defect["train"])
        shuffled = np.random.RandomState(0).permutation(normal)
        n_held = max(2, min(MOST_HELD_OUT, round(HELD_OUT * len(shuffled))))
        held, fitted = shuffled[:n_held], shuffled[n_held : n_held + MOST_FITTED]
        entries = [("train", row, "", row) for row in np.sort(fitted)]
        entries += [("test", row, kind, held[i - 1]) for kind in ("", *OUTLIERS) for i, row in enumerate(held)]
        for split, row, kind, other in entries:
            names[split].append(labels.names["train"][row] + (f" {kind}" if kind else ""))
            category[split].append(number)
            defect[split].append(bool(kind))
            recipe[split].append((int(row), kind, int(other)))
    arrays = {s: np.array(category[s], np.int64) for s in SPLITS}, {s: np.array(defect[s], bool) for s in SPLITS}
    made = Labels(labels.classes, names, *arrays, per_category=True)
    return ImageSet(made, partial(_make, images, recipe), images.content, images.from_files)


def _make(images: ImageSet, recipe: dict[str, list[tuple]], split: str, i: int) -> np.ndarray:
    """An image of the validation set: (row, kind of outlier or nothing, other row) of the training split."""
    row, kind, other = recipe[split][i]
    image = images.read("train", row)
    return outlier(image, images.read("train", other), kind, np.random.RandomState(i)) if kind else image


def outlier(image: np.ndarray, other: np.ndarray, kind: str, rng: np.random.RandomState) -> np.ndarray:
    """A synthetic outlier of a kind (OUTLIERS) from a normal image and another one: (H, W, 3), (h, w, 3) uint8 -> (H, W, 3)."""
    rows, columns = image.shape[:2]
    if kind == "rotated":
        turned = np.rot90(image, 1 + rng.randint(3))
        return turned if turned.shape == image.shape else np.asarray(Image.fromarray(turned).resize((columns, rows)))
    other = np.asarray(Image.fromarray(other).resize((columns, rows))) if other.shape != image.shape else other
    if kind == "blended":
        return ((image.astype(np.uint16) + other) // 2).astype(np.uint8)
    height, width = (max(1, int(side * rng.uniform(0.45, 0.75))) for side in (rows, columns))
    top, left, other_top, other_left = (rng.randint(side - size + 1) for side, size in ((rows, height), (columns, width)) * 2)
    pasted = image.copy()
    pasted[top : top + height, left : left + width] = other[other_top : other_top + height, other_left : other_left + width]
    return pasted


# ---------------------------------------------------------------- the feature cache
# <folder>/meta.json      what the features are (the fields below), and finished: true, written last
# <folder>/labels.json    names, categories and defects of the images
# <folder>/{train,test}.npy   float16 (images, 1 + N, C): the semantic token, then the patch tokens
CACHE_FORMAT = 1


def cache_folder(config: Config, img_size: tuple[int, int]) -> Path:
    """Where the features of a configuration lie: feature_path, or a folder named after data set, backbone, size and grid."""
    if config.feature_path:
        return Path(config.feature_path)
    extractor = config.extractor.replace("/", "_").replace(":", "_")
    validation = "-validation" if config.validate else ""
    grid = f"compact{config.window}" if config.token_grid == "compact" else config.token_grid
    return Path("features") / f"{config.dataset}-{extractor}-{img_size[0]}x{img_size[1]}-{grid}{validation}"


def has_features(folder: Path) -> bool:
    """Whether a folder holds a cache, fitting or not. Raises UserError when it holds something else."""
    if (folder / "meta.json").exists():
        return True
    if folder.is_dir() and any(folder.iterdir()) or folder.is_file():
        raise UserError(f"feature_path: {folder} is there and holds no features; give a folder that is new, empty or a cache")
    return False


class CacheWriter:
    """Writes a cache beside its final folder and moves it there whole when its ``with`` block ends well; otherwise nothing stays.

    Splits are appended in order, row by row.
    """

    def __init__(self, folder: Path, fields: dict, labels: Labels, tokens_per_image: int, channels: int):
        self.folder, self.partial = folder, folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        self.fields, self.labels, self.row = fields, labels, (tokens_per_image, channels)
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, error_type, error, trace) -> None:
        if error_type is None:
            self.finish()
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def open_split(self, split: str):
        """A stream to which the rows of a split are appended, behind the .npy header for all of them."""
        stream = open(self.partial / f"{split}.npy", "wb")
        shape = (len(self.labels.names[split]), *self.row)
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f2", "fortran_order": False, "shape": shape})
        return stream

    def finish(self) -> None:
        labels = self.labels
        content = {"classes": labels.classes, "per_category": labels.per_category, "names": labels.names}
        content |= {"category": {s: labels.category[s].tolist() for s in SPLITS}, "defect": {s: labels.defect[s].tolist() for s in SPLITS}}
        (self.partial / "labels.json").write_text(json.dumps(content))
        counts = {split: len(labels.names[split]) for split in SPLITS}
        meta = self.fields | {"count": counts, "dtype": "float16", "format": CACHE_FORMAT, "finished": True}
        (self.partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)


class FeatureCache:
    """A finished cache, checked against the fields that are expected. Raises UserError that says which field differs."""

    def __init__(self, folder: Path, expected: dict):
        self.folder, self.meta = folder, read_meta(folder)
        for field, wanted in {"format": CACHE_FORMAT, **expected}.items():
            found = self.meta.get(field)
            if found != as_json(wanted):
                if field == "image_list":
                    raise UserError(
                        f"the features in {folder} are of other images than those now there; delete that folder or give another --feature_path"
                    )
                raise UserError(
                    f"the features in {folder} do not fit: {field} is {_short(found)} there, {_short(wanted)} is wanted; "
                    f"delete that folder or give another --feature_path"
                )
        try:
            content = json.loads((folder / "labels.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"the labels in {folder}/labels.json cannot be read ({error}); delete {folder} and extract again") from None
        arrays = {key: {s: np.array(content[key][s], kind) for s in SPLITS} for key, kind in (("category", np.int64), ("defect", bool))}
        self.labels = Labels(tuple(content["classes"]), content["names"], per_category=content["per_category"], **arrays)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch tokens (of the windows, when compact)."""
        return tuple(self.meta["grid"])

    @property
    def channels(self) -> int:
        return self.meta["n_feat"]

    def tokens(self, split: str) -> "Tokens":
        return Tokens(self.folder / f"{split}.npy", (self.meta["count"][split], self.meta["tokens"], self.meta["n_feat"]))


class Tokens:
    """The tokens of one split, memory-mapped: ``tokens[index]`` copies the rows (n, 1 + N, C), float16, out of the file."""

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        try:
            self._map = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"the features in {path} cannot be read ({error}); delete {path.parent} and extract again") from None
        if self._map.shape != shape or self._map.dtype != np.float16:
            raise UserError(
                f"the features in {path} are {self._map.dtype} {self._map.shape}, expected float16 {shape}; delete {path.parent} and extract again"
            )
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        rows = self._map[index]
        rows = np.array(rows) if isinstance(index, slice) else np.asarray(rows)  # an index array copies already
        self._give_back()
        return rows

    def semantic(self) -> np.ndarray:
        """The semantic tokens of all images (n, C), float16, without reading the patch tokens."""
        semantic = np.empty((self.shape[0], self.shape[2]), np.float16)
        for start in range(0, len(self), 1000):
            semantic[start : start + 1000] = self._map[start : start + 1000, 0]
            self._give_back()
        return semantic

    def _give_back(self) -> None:
        """Give the pages that were read back to the system's cache: resident memory stays small."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map._mmap.madvise(mmap.MADV_DONTNEED)


def read_meta(folder: Path) -> dict:
    """The sidecar of a finished cache. Raises UserError when there is none, or it is not finished."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except OSError:
        raise UserError(f"no features in {folder}; run python extractor.py with the same settings, or set pretrained False") from None
    except ValueError:
        meta = {}
    if meta.get("finished") is not True:
        raise UserError(f"the features in {folder} are not finished; delete that folder and extract again")
    return meta


def as_json(value):
    """What a value is after it has been through JSON."""
    return json.loads(json.dumps(value))


def _short(value) -> str:
    return "absent" if value is None else str(value)
