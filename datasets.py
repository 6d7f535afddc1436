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
    where nothing is."""

    names: list[str]
    category: np.ndarray
    defect: np.ndarray
    kind: list[str]

    @classmethod
    def of(cls, names: Iterable[str], category, defect=None, kind=None) -> "Split":
        """From any sequences; without ``defect`` no image is defective, without ``kind`` none has one."""
        names = list(names)
        defect = np.zeros(len(names), bool) if defect is None else np.asarray(defect, bool)
        kind = [""] * len(names) if kind is None else list(kind)
        return cls(names, np.asarray(category, np.int64), defect, kind)

    def kept(self, rows: Sequence[int] | np.ndarray) -> "Split":
        """These images of the split, in the order of ``rows``."""
        index = np.asarray(rows, np.int64)
        names, kind = ([values[i] for i in index] for values in (self.names, self.kind))
        return Split(names, self.category[index], self.defect[index], kind)

    def as_json(self) -> dict:
        """What ``from_json`` takes, made of lists."""
        return {
            "names": self.names,
            "category": self.category.tolist(),
            "defect": self.defect.tolist(),
            "kind": self.kind,
        }

    @classmethod
    def from_json(cls, content: dict) -> "Split":
        """The split of ``as_json``. Raises UserError on any other content."""
        try:
            split = cls.of(**content)
            lengths = {len(split.names), len(split.category), len(split.defect), len(split.kind)}
            texts = all(isinstance(text, str) for text in (*split.names, *split.kind))
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"expected the labels of images, got other content ({error})") from None
        if len(lengths) != 1 or split.category.ndim != 1 or split.defect.ndim != 1 or not texts:
            raise UserError(
                f"expected a name, category, defect and kind per image, got {sorted(lengths)} of them"
            )
        return split


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

    def as_json(self) -> dict:
        """What ``from_json`` takes, made of lists."""
        content = {"classes": list(self.classes), "per_category": self.per_category}
        return content | {split: self.split(split).as_json() for split in SPLITS}

    @classmethod
    def from_json(cls, content: dict) -> "Labels":
        """The labels of ``as_json``. Raises UserError on any other content."""
        try:
            train, test = (Split.from_json(content[split]) for split in SPLITS)
            return cls(tuple(content["classes"]), train, test, content["per_category"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"expected labels, got other content ({error!r})") from None


def _nothing(split: str, i: int) -> str:
    return ""


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
    identify: Callable[[str, int], str] = _nothing
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
        train, test = (self.labels.split(split).kept(rows[split]) for split in SPLITS)
        labels = dataclasses.replace(self.labels, train=train, test=test)
        masks = tuple(self.masks[i] for i in rows["test"]) if self.masks else ()
        read, identify = (partial(_at_row, take, rows) for take in (self.read, self.identify))
        size = self.size and partial(_at_row, self.size, rows)
        return ImageSet(labels, read, identify, self.from_files, masks, size, self.scale)

    def sizes(self, most: int) -> dict[str, list[tuple[int, int]]]:
        """Height and width of training images by class, of at most so many, evenly spaced, without those that
        cannot be read."""
        train, found = self.labels.train, defaultdict(list)
        for i in np.linspace(0, len(train.names) - 1, min(most, len(train.names))).astype(int):
            with contextlib.suppress(UserError):
                size = self.size("train", int(i)) if self.size else self.read("train", int(i)).shape[:2]
                found[self.labels.classes[train.category[i]]].append(size)
        return dict(found)

    def listed(self, chosen: Sequence[tuple[str, str]]) -> "ImageSet":
        """The images ``chosen`` (split, name), of both splits, as one training split without labels. Raises
        UserError on one that is not there."""
        if gone := [name for split, name in chosen if (split, name) not in self._numbers]:
            raise UserError(f"{gone[0]} has gone since the images were listed; run it again")
        labels = Labels((), Split.of([name for _, name in chosen], [OTHER] * len(chosen)), Split.of([], []))
        listed = [(split, self._numbers[split, name]) for split, name in chosen]
        read, identify = (partial(_of_list, take, listed) for take in (self.read, self.identify))
        return ImageSet(labels, read, identify, self.from_files, scale=self.scale)

    @functools.cached_property
    def _numbers(self) -> dict[tuple[str, str], int]:
        """The number of each image by its split and name."""
        return {(s, name): i for s in SPLITS for i, name in enumerate(self.labels.split(s).names)}

    def mask(self, i: int) -> np.ndarray | None:
        """Where the defect of test image i is, (H, W) bool; None where the data set does not say. Raises
        UserError on an unreadable mask."""
        return layouts.read_mask(path) if self.masks and (path := self.masks[i]) else None


def _at_row(take: Callable, rows: dict[str, np.ndarray], split: str, i: int):
    return take(split, int(rows[split][i]))


def _of_list(take: Callable, chosen: Sequence[tuple[str, int]], split: str, i: int):
    return take(*chosen[i])


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
    tested, relabelled, pairs = 0, 0, []
    for split in SPLITS:
        rows = labels.split(split)
        for image, name, *label in zip(
            hashes[split], rows.names, rows.category.tolist(), rows.defect.tolist()
        ):
            other_split, other, other_label = first.setdefault(image, (split, name, label))
            if image != images.UNREADABLE and (other_split != split or other_label != label):
                tested, relabelled = tested + (other_split != split), relabelled + (other_label != label)
                pairs.append(f"{name} is {other}")
    counts = f"{tested} in train and test, {relabelled} under two labels"
    return f"the same picture twice: {counts}; {pairs[0]}" if pairs else ""


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
    images = load_images(config.dataset, config.dataset_path)
    return tiled(images, config.tiles) if config.tiles else images


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
    return ImageSet(labels, partial(_from_array, pixels), partial(_array_hash, pixels), from_files=False)


def _array_hash(pixels: dict[str, np.ndarray], split: str, i: int) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels[split][i]).data).hexdigest()[:32]


def _from_array(pixels: dict[str, np.ndarray], split: str, i: int) -> np.ndarray:
    return pixels[split][i]


def _file_set(table: Table) -> ImageSet:
    """The images of a table; their names are relative to its root."""
    rows = {split: [row for row in table.rows if row.split == split] for split in SPLITS}
    files = {split: [row.path for row in rows[split]] for split in SPLITS}
    masks = tuple(row.mask for row in rows["test"])
    scale = PixelScale(measure=partial(images.measured, files["train"]))
    read, identify, size = (
        partial(_from_file, files, scale),
        partial(_file_hash, files),
        partial(_file_size, files),
    )
    return ImageSet(labels_of(table), read, identify, masks=masks, size=size, scale=scale)


def labels_of(table: Table) -> Labels:
    """The labels of a table (images/layouts.py). Its classes are those of the training images, sorted; names
    that differ in case, Unicode form or spaces only are one. Raises UserError on a test image of a class that
    is tested on its own and has no training images."""
    parts = {row.label: row.label.partition("/") for row in table.rows}
    per_category = any(slash for _, slash, _ in parts.values())
    trained = sorted({parts[row.label][0] for row in table.rows if row.split == "train"})
    classes: dict[str, str] = {}
    for name in trained:
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
    for split in SPLITS:
        rows = [row for row in table.rows if row.split == split]
        categories, defects, kinds = zip(*(meanings[row.label] for row in rows)) if rows else ((), (), ())
        names = [row.path.as_posix().removeprefix(below) for row in rows]
        splits[split] = Split.of(names, categories, defects, kinds)
    return Labels(tuple(classes.values()), **splits, per_category=per_category)


def _from_file(files: dict[str, list[Path]], scale: PixelScale, split: str, i: int) -> np.ndarray:
    return images.read_image(files[split][i], scale)


def _file_hash(files: dict[str, list[Path]], split: str, i: int) -> str:
    return images.content_hash(files[split][i])


def _file_size(files: dict[str, list[Path]], split: str, i: int) -> tuple[int, int]:
    return images.size_of(files[split][i])


# ---------------------------------------------------------------- tiles
PICTURES_KEPT = 4  # decoded, while their tiles are asked for one after the other


class _Tiles:
    """The tiles of a set's training pictures, asked for as its images are."""

    def __init__(self, images: ImageSet, side: int):
        self.images, self.tiles = images, list[tuple[int, tiles.Tile | None]]()
        self.picture_size = images.size or (lambda split, i: images.read(split, i).shape[:2])
        for i in range(len(images.labels.train.names)):
            try:
                self.tiles += [(i, tile) for tile in tiles.tiles_of(self.picture_size("train", i), side)]
            except UserError:  # raised again when it is read
                self.tiles.append((i, None))
        self.picture = functools.lru_cache(PICTURES_KEPT)(partial(images.read, "train"))

    def read(self, split: str, i: int) -> np.ndarray:
        picture, tile = self.tiles[i]
        pixels = self.picture(picture)
        if tile and (part := tile.of(pixels)).shape[:2] != tile[2:]:
            name, most = self.images.labels.train.names[picture], images.MOST_PIXELS // 10**6
            raise UserError(
                f"tiles: {name} has more than {most} million pixels, too many to cut; cut it before"
            )
        return part if tile else pixels

    def identify(self, split: str, i: int) -> str:
        picture, tile = self.tiles[i]
        content = self.images.identify("train", picture)
        if content == images.UNREADABLE:
            return content
        return hashlib.sha256(json.dumps([content, tile]).encode()).hexdigest()[:32]

    def size(self, split: str, i: int) -> tuple[int, int]:
        picture, tile = self.tiles[i]
        return tile[2:] if tile else self.picture_size("train", picture)

    def names(self) -> list[str]:
        pictures = self.images.labels.train.names
        return [
            f"{pictures[i]}#{tile.top},{tile.left}" if tile else f"{pictures[i]}#" for i, tile in self.tiles
        ]


def tiled(images: ImageSet, side: int) -> ImageSet:
    """The tiles (images/tiles.py) of training pictures, each an image of its picture's class. Raises
    UserError on a set with test images: theirs would be tiles with the labels of whole pictures."""
    if tested := len(images.labels.test.names):
        raise UserError(
            f"tiles: expected a folder of good pictures alone, got {tested} test images, too; give that of "
            "the good ones, and score the others with predict.py"
        )
    cut = _Tiles(images, side)
    train = images.labels.train.kept([i for i, _ in cut.tiles])
    labels = dataclasses.replace(images.labels, train=dataclasses.replace(train, names=cut.names()))
    return ImageSet(labels, cut.read, cut.identify, images.from_files, size=cut.size, scale=images.scale)


def picture_of(name: str) -> str:
    """The name of the picture that a tile is of."""
    return name.rpartition("#")[0]


def unlabelled(files: list[Path]) -> ImageSet:
    """Image files without labels, as a test split."""
    labels = Labels((), Split.of([], []), Split.of([str(path) for path in files], [OTHER] * len(files)))
    listed: dict[str, list[Path]] = {"train": [], "test": files}
    return ImageSet(labels, partial(_from_file, listed, PixelScale()), partial(_file_hash, listed))
