"""Raw images with one-class labels and splits.

Files of images are found by images/layouts.py and read by images/images.py, the binary files of published
data sets by images/published.py, scikit-learn's digits here (docs/data.md)."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import Config, UserError, unknown
from images import images, layouts, published, tiles
from images.layouts import SPLITS, Table
from images.pixel_scale import PixelScale
from shell.values import class_names

OTHER = -1  # the category of test images of no class that one can train on: always anomalous
HASHING_THREADS = 8  # threads that hash files: a shared folder answers many at a time


# ---------------------------------------------------------------- labels
@dataclasses.dataclass(frozen=True)
class Split:
    """What is known of the images of one split, without the images.

    names: a stable name per image. category (n): its index into the classes, or OTHER. defect (n): whether
    it is a defective specimen of its category. kind: what is wrong with it, in the data set's words; ""
    where nothing is. held (n): whether the data set holds it out of training."""

    names: list[str]
    category: np.ndarray
    defect: np.ndarray
    kind: list[str]
    held: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str], category, defect=None, kind=None, held=None) -> "Split":
        """From any sequences; those left out are of no defects and of nothing held out."""
        names = list(names)
        no = np.zeros(len(names), bool)
        return cls(
            names,
            np.asarray(category, np.int64),
            no if defect is None else np.asarray(defect, bool),
            [""] * len(names) if kind is None else list(kind),
            no if held is None else np.asarray(held, bool),
        )

    def kept(self, rows: Sequence[int] | np.ndarray) -> "Split":
        """These images of the split, in the order of ``rows``."""
        index = np.asarray(rows, np.int64)
        names, kind = ([values[i] for i in index] for values in (self.names, self.kind))
        return Split(names, self.category[index], self.defect[index], kind, self.held[index])

    def as_json(self) -> dict:
        """What ``of`` takes, made of lists."""
        return {name: v if isinstance(v, list) else v.tolist() for name, v in vars(self).items()}


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

    def kept(self, rows: dict[str, np.ndarray]) -> "Labels":
        """The labels of these images of each split, in the order of ``rows``."""
        train, test = (self.split(split).kept(rows[split]) for split in SPLITS)
        return dataclasses.replace(self, train=train, test=test)

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

    def as_json(self) -> dict:
        """What ``from_json`` takes, made of lists."""
        content = {"classes": list(self.classes), "per_category": self.per_category}
        return content | {split: self.split(split).as_json() for split in SPLITS}

    @classmethod
    def from_json(cls, content: dict) -> "Labels":
        """The labels of ``as_json``. Raises UserError on any other content."""
        try:
            train, test = (Split.of(**content[split]) for split in SPLITS)
            return cls(tuple(content["classes"]), train, test, content["per_category"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"expected labels, got other content ({error!r})") from None


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A data set's labels and its images.

    read(split, i) -> (H, W, 3) uint8; raises UserError that names an unreadable image. identify(split, i):
    a hash of the image's content, of a file's bytes or of pixels; it does not depend on names and places.
    masks: where the defect of each test image is marked, or None; () without any. size(split, i): height and
    width of an image in a file, without its pixels; raises UserError. scale: of pixels of more than eight
    bits, which the training images decide."""

    labels: Labels
    read: Callable[[str, int], np.ndarray]
    identify: Callable[[str, int], str] = lambda split, i: ""
    from_files: bool = True
    masks: tuple[Path | None, ...] = ()
    size: Callable[[str, int], tuple[int, int]] | None = None
    scale: PixelScale = dataclasses.field(default_factory=PixelScale)

    def hashes(self, split: str) -> list[str]:
        """The content hash of every image of a split, in order; HASHING_THREADS files are read at a time."""
        parts = np.array_split(np.arange(len(self.labels.split(split).names)), HASHING_THREADS)
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            found = pool.map(lambda rows: [self.identify(split, int(i)) for i in rows], parts)
            return [image for hashes in found for image in hashes]

    def kept(self, rows: dict[str, np.ndarray]) -> "ImageSet":
        """These images of each split, in the order of ``rows``."""
        masks = tuple(self.masks[i] for i in rows["test"]) if self.masks else ()
        numbers = {split: [(split, int(i)) for i in rows[split]] for split in SPLITS}
        return self._of(numbers, self.labels.kept(rows), masks)

    def listed(self, chosen: Sequence[tuple[str, str]]) -> "ImageSet":
        """The images ``chosen`` (split, name), of both splits, as one training split without labels. Raises
        UserError on one that is not there."""
        numbers = {(s, name): (s, i) for s in SPLITS for i, name in enumerate(self.labels.split(s).names)}
        if gone := [name for split, name in chosen if (split, name) not in numbers]:
            raise UserError(f"{gone[0]} has gone since the images were listed; run it again")
        labels = Labels((), Split.of([name for _, name in chosen], [OTHER] * len(chosen)), Split.of([], []))
        return self._of({"train": [numbers[image] for image in chosen]}, labels)

    def _of(self, rows: dict[str, list[tuple[str, int]]], labels: Labels, masks: tuple = ()) -> "ImageSet":
        """The set whose images are those of these splits and numbers here."""
        size = self.size
        return ImageSet(
            labels,
            lambda split, i: self.read(*rows[split][i]),
            lambda split, i: self.identify(*rows[split][i]),
            self.from_files,
            masks,
            size and (lambda split, i: size(*rows[split][i])),
            self.scale,
        )

    def size_of(self, split: str, i: int) -> tuple[int, int]:
        """Height and width of an image. Raises UserError on one that cannot be read."""
        height, width = self.size(split, i) if self.size else self.read(split, i).shape[:2]
        return height, width

    def sizes(self, most: int) -> dict[str, list[tuple[int, int]]]:
        """Height and width of training images by class, of at most so many, evenly spaced, without those that
        cannot be read."""
        train, found = self.labels.train, defaultdict(list)
        for i in np.linspace(0, len(train.names) - 1, min(most, len(train.names))).astype(int):
            with contextlib.suppress(UserError):
                size = self.size_of("train", int(i))
                found[self.labels.classes[train.category[i]]].append(size)
        return dict(found)

    def mask(self, i: int) -> np.ndarray | None:
        """Where the defect of test image i is, (H, W) bool; None where the data set does not say. Raises
        UserError on an unreadable mask."""
        return layouts.read_mask(path) if self.masks and (path := self.masks[i]) else None


def choose_classes(labels: Labels, class_name: str) -> list[str]:
    """The classes that the knob class_name asks for (shell/values.py). Raises UserError on an unknown
    one, and on a folder whose name is no text."""
    for name in labels.classes:
        if any(0xD800 <= ord(c) < 0xE000 for c in name):  # what Python makes of bytes that are not UTF-8
            raise UserError(f"class {name!r}: the name of its folder is not valid UTF-8; rename it")
    if class_name == "all":
        return list(labels.classes)
    if class_name in labels.classes:  # the whole text is one class, whatever it is made of
        return [class_name]
    known = {layouts.folded(name): name for name in labels.classes} | {name: name for name in labels.classes}
    chosen = []
    for name in class_names(class_name):
        found = known.get(name, known.get(layouts.folded(name)))
        if found is None:
            raise UserError(unknown("class", name.strip(), ["all", *labels.classes]))
        chosen.append(found)
    return list(dict.fromkeys(chosen))


def repeated(labels: Labels, hashes: dict[str, list[str]]) -> str:
    """The line on images of the same content (``ImageSet.hashes`` of each split) in both splits, or under two
    labels; "" without any."""
    first: dict[str, tuple] = {}
    tested, relabelled, example = 0, 0, ""
    for split in SPLITS:
        rows = labels.split(split)
        for image, name, *label in zip(hashes[split], rows.names, rows.category, rows.defect):
            other_split, other, other_label = first.setdefault(image, (split, name, label))
            if image != images.UNREADABLE and (other_split != split or other_label != label):
                tested, relabelled = tested + (other_split != split), relabelled + (other_label != label)
                example = example or f"{name} is {other}"
    counts = f"{tested} in train and test, {relabelled} under two labels"
    return f"the same picture twice: {counts}; {example}" if example else ""


# ---------------------------------------------------------------- raw images
def collection(dataset: str) -> str:
    """The name of the images of a data set: CIFAR100_fine has CIFAR100's, sorted into 100 classes."""
    return dataset.removesuffix("_fine")


def load_images(dataset: str, dataset_path: str | None) -> ImageSet:
    """The images of a data set. Raises UserError when they are not where ``dataset_path`` (None:
    data/<its collection>) says."""
    if dataset == "digits":
        return _digits()
    root = Path(dataset_path or f"data/{collection(dataset)}")
    if dataset not in published.FORMS:
        return _file_set(layouts.read_table(layouts.READERS[dataset], root))
    if not all((root / split).is_dir() for split in SPLITS):
        return _array_set(*published.load(dataset, root))
    if dataset != collection(dataset):
        raise UserError(f"{dataset}: in the image folders of {root} each folder is a class; take CIFAR100")
    return _file_set(layouts.read_table(layouts.folders, root))


def images_of(config: Config) -> ImageSet:
    """The images a configuration asks for. Raises UserError."""
    whole = load_images(config.dataset, config.dataset_path)
    return tiled(whole, config.tiles) if config.tiles else whole


def name_of(config: Config) -> str:
    """What the images of a configuration are called beside those of others: the data set, for image folders
    elsewhere than in their default place the folder's name and a hash of its place, and the tiles' side."""
    if config.tiles:
        return f"{name_of(dataclasses.replace(config, tiles=0))}-tiles{config.tiles}"
    name = config.dataset
    default = Path(f"data/{name}").resolve()
    place = Path(config.dataset_path).resolve() if config.dataset_path else default
    if name == "digits" or name in published.FORMS or place == default:
        return name
    folder = "".join(c if c.isalnum() or c in "-_" else "_" for c in place.name)[:40]
    return f"{name}-{folder}-{hashlib.sha256(str(place).encode(errors='surrogateescape')).hexdigest()[:6]}"


def _digits() -> ImageSet:
    """scikit-learn's 1,797 digits, 8 x 8; a fixed stratified split into halves (docs/method.md, section
    6)."""
    from sklearn.datasets import load_digits  # slow to import, and needed here alone
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.repeat((digits.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3)
    halves = train_test_split(np.arange(len(pixels)), test_size=0.5, random_state=0, stratify=digits.target)
    rows = {split: np.sort(half) for split, half in zip(SPLITS, halves)}
    by_split = ({split: values[i] for split, i in rows.items()} for values in (pixels, digits.target))
    return _array_set([str(digit) for digit in range(10)], *by_split)


def _array_set(
    classes: list[str], pixels: dict[str, np.ndarray], category: dict[str, np.ndarray]
) -> ImageSet:
    names = {split: [f"{split}/{i}" for i in range(len(pixels[split]))] for split in SPLITS}
    train, test = (Split.of(names[split], category[split]) for split in SPLITS)
    labels = Labels(tuple(classes), train, test)

    def identify(split: str, i: int) -> str:
        return hashlib.sha256(np.ascontiguousarray(pixels[split][i]).data).hexdigest()[:32]

    return ImageSet(labels, lambda split, i: pixels[split][i], identify, from_files=False)


class _Files(NamedTuple):
    """The image files of each split, in order, as an ``ImageSet`` asks for them; in another process, too."""

    paths: dict[str, list[Path]]
    scale: PixelScale

    def read(self, split: str, i: int) -> np.ndarray:
        return images.read_image(self.paths[split][i], self.scale)

    def identify(self, split: str, i: int) -> str:
        return images.content_hash(self.paths[split][i])

    def size(self, split: str, i: int) -> tuple[int, int]:
        return images.size_of(self.paths[split][i])


def _file_set(table: Table) -> ImageSet:
    """The images of a table; their names are relative to its root."""
    rows = _by_split(table)
    paths = {split: [row.path for row in rows[split]] for split in SPLITS}
    files = _Files(paths, PixelScale(measure=partial(images.measured, paths["train"])))
    masks = tuple(row.mask for row in rows["test"])
    return ImageSet(
        labels_of(table), files.read, files.identify, masks=masks, size=files.size, scale=files.scale
    )


def _by_split(table: Table) -> dict[str, list[layouts.Row]]:
    """The rows of each split; what is held out is of the training images."""
    test = [row for row in table.rows if row.split == "test"]
    return {"train": [row for row in table.rows if row.split != "test"], "test": test}


def labels_of(table: Table) -> Labels:
    """The labels of a table (images/layouts.py). Its classes are those of the training images, sorted; names
    that differ in case, Unicode form or spaces only are one. Raises UserError on a test image of a class that
    is tested on its own and has no training images."""
    parts = {row.label: row.label.partition("/") for row in table.rows}
    per_category = any(slash for _, slash, _ in parts.values())
    classes: dict[str, str] = {}
    for name in sorted({parts[row.label][0] for row in table.rows if row.split != "test"}):
        classes.setdefault(layouts.folded(name), name)
    number = {name: i for i, name in enumerate(classes)}
    meanings = {}
    for label, (name, _, condition) in parts.items():
        category = number.get(layouts.folded(name), OTHER)
        if per_category and category == OTHER:
            raise UserError(f"dataset_path: expected training pictures of {name}, which test pictures are of")
        defect = condition != "" and layouts.folded(condition) not in layouts.NORMAL_NAMES
        meanings[label] = category, defect, condition if defect else label if category == OTHER else ""
    splits, below = {}, f"{table.root.as_posix()}/"
    for split, rows in _by_split(table).items():
        categories, defects, kinds = zip(*(meanings[row.label] for row in rows)) if rows else ((), (), ())
        names = [row.path.as_posix().removeprefix(below) for row in rows]
        splits[split] = Split.of(names, categories, defects, kinds, [r.split == "validation" for r in rows])
    return Labels(tuple(classes.values()), **splits, per_category=per_category)


# ---------------------------------------------------------------- tiles
PICTURES_KEPT = 4  # decoded, while their tiles are asked for one after the other


def tiled(pictures: ImageSet, side: int) -> ImageSet:
    """The tiles (images/tiles.py) of training pictures, each an image of its picture's class. Raises
    UserError on a set with test images: theirs would be tiles with the labels of whole pictures."""
    if tested := len(pictures.labels.test.names):
        raise UserError(
            f"tiles: expected a folder of good pictures alone, got {tested} test images, too; give that of "
            "the good ones, and score the others with predict.py"
        )
    parts: list[tuple[int, tiles.Tile | None]] = []  # of a picture whose size cannot be read: None
    for i in range(len(pictures.labels.train.names)):
        try:
            parts += [(i, tile) for tile in tiles.tiles_of(pictures.size_of("train", i), side)]
        except UserError:  # raised again when it is read
            parts.append((i, None))
    whole = functools.lru_cache(PICTURES_KEPT)(partial(pictures.read, "train"))
    train = pictures.labels.train.kept([i for i, _ in parts])
    named = zip(train.names, parts)
    names = [f"{name}#{tile.top},{tile.left}" if tile else f"{name}#" for name, (_, tile) in named]

    def read(split: str, i: int) -> np.ndarray:
        picture, tile = parts[i]
        pixels = whole(picture)
        if tile and (part := tile.of(pixels)).shape[:2] != tile[2:]:
            raise UserError(f"tiles: {train.names[i]} has too many pixels to cut; cut it before")
        return part if tile else pixels

    def identify(split: str, i: int) -> str:
        content = pictures.identify("train", parts[i][0])
        if content == images.UNREADABLE:
            return content
        return hashlib.sha256(json.dumps([content, parts[i][1]]).encode()).hexdigest()[:32]

    def size(split: str, i: int) -> tuple[int, int]:
        picture, tile = parts[i]
        return tile[2:] if tile else pictures.size_of("train", picture)

    labels = dataclasses.replace(pictures.labels, train=dataclasses.replace(train, names=names))
    return ImageSet(labels, read, identify, pictures.from_files, size=size, scale=pictures.scale)


def picture_of(name: str) -> str:
    """The name of the picture that a tile is of."""
    return name.rpartition("#")[0]
