"""Raw images with one-class labels and splits, of files (images/layouts.py) or of published arrays
(images/published.py): docs/data.md."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

import utils
from config import Config, UserError, unknown
from images import images, layouts, published
from images.images import PixelScale, Tile, tiles_of
from images.layouts import SPLITS, Row

OTHER = -1  # the category of test images of no class that one can train on: always anomalous
HASHING_THREADS = 8  # threads that hash files: a shared folder answers many at a time


# ---------------------------------------------------------------- labels
@dataclasses.dataclass(frozen=True)
class Split:
    """What is known of the images of one split, a column each. names: stable ones. category: index into the
    classes, or OTHER. defect: whether it is a defective specimen of its category. kind: what is wrong with
    it, in the data set's words, or "". held: whether the data set holds it out of training."""

    names: list[str]
    category: np.ndarray
    defect: np.ndarray
    kind: list[str]
    held: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str], category, defect=False, kind="", held=False) -> "Split":
        """From sequences, or one value for all. Raises ValueError where they are not of one length."""
        names = list(names)
        full = functools.partial(np.full, len(names))
        kinds = full(kind, object).tolist()
        return cls(names, full(category, np.int64), full(defect, bool), kinds, full(held, bool))

    def kept(self, rows: Sequence[int] | np.ndarray) -> "Split":
        """These images of the split, in the order of ``rows``."""
        return Split.of(*(np.array(column, object)[rows] for column in vars(self).values()))


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of a data set. classes: those that can be normal. per_category: a class is tested on the
    test images of its own category (MVTec) instead of on the whole test set."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    per_category: bool = False

    def split(self, name: str) -> Split:
        return {"train": self.train, "test": self.test}[name]

    def kept(self, rows: dict[str, np.ndarray]) -> "Labels":
        """The labels of these images of each split, in the order of ``rows``."""
        train, test = (self.split(split).kept(rows[split]) for split in SPLITS)
        return dataclasses.replace(self, train=train, test=test)

    def one_class(self, class_name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the normal training images and of the test images, test labels (0 normal, 1 anomalous)."""
        chosen = self.classes.index(class_name)
        train = np.flatnonzero((self.train.category == chosen) & ~self.train.defect)
        own = self.test.category == chosen
        test = np.flatnonzero(own | (not self.per_category))
        return train, test, (~own | self.test.defect)[test].astype(np.int64)


# ---------------------------------------------------------------- images
class RawImage(NamedTuple):
    """An image file, or pixels (H, W, 3) uint8; of it a tile, or all. mask: marks its defect."""

    source: Path | np.ndarray
    mask: Path | None = None
    tile: Tile | None = None

    def identify(self) -> str:
        """A hash of the content, of a file's bytes or of pixels, whatever names and places are."""
        if isinstance(self.source, np.ndarray):
            return hashlib.sha256(np.ascontiguousarray(self.source).data).hexdigest()[:32]
        content = images.content_hash(self.source)
        tiled = json.dumps([content, self.tile]).encode()
        return hashlib.sha256(tiled).hexdigest()[:32] if self.tile else content

    def size(self) -> tuple[int, int]:
        """Height and width. Raises UserError on an unreadable file."""
        if self.tile:
            return self.tile.height, self.tile.width
        return self.source.shape[:2] if isinstance(self.source, np.ndarray) else images.size_of(self.source)

    def read(self, scale: PixelScale) -> np.ndarray:
        """Its pixels, (H, W, 3) uint8. Raises UserError that names an unreadable file."""
        if self.tile is None:
            return images.pixels_of(self.source, scale)
        return self.tile.of(_decoded(self.source, scale))  # type: ignore[arg-type]  # tiles are of files alone


_decoded = functools.lru_cache(maxsize=4)(images.pixels_of)  # whose tiles are asked for one after the other


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A data set's labels and its images, of each split in the order of its labels. The ranges of scale are
    unknown until they are ``images.measured``."""

    labels: Labels
    images: dict[str, list[RawImage]]
    scale: PixelScale = dataclasses.field(default_factory=PixelScale)

    def read(self, split: str, i: int) -> np.ndarray:
        """An image, (H, W, 3) uint8. Raises UserError that names an unreadable one."""
        return self.images[split][i].read(self.scale)

    def hashes(self, split: str) -> list[str]:
        """The content hash of every image of a split, in order; HASHING_THREADS files are read at a time."""
        with ThreadPool(HASHING_THREADS) as pool:
            return pool.map(RawImage.identify, self.images[split])

    def kept(self, rows: dict[str, np.ndarray]) -> "ImageSet":
        """These images of each split, in the order of ``rows``."""
        kept = {split: [self.images[split][i] for i in rows[split]] for split in SPLITS}
        return ImageSet(self.labels.kept(rows), kept, self.scale)

    def named(self, chosen: Iterable[tuple[str, str]]) -> list[RawImage]:
        """The images ``chosen`` by split and name."""
        there = {split: dict(zip(self.labels.split(split).names, self.images[split])) for split in SPLITS}
        return [there[split][name] for split, name in chosen]

    def sizes(self, most: int) -> list[tuple[int, int]]:
        """Height and width of at most so many training images, evenly spaced, that can be read."""
        train, found = self.images["train"], []
        for i in np.linspace(0, len(train) - 1, min(most, len(train))).astype(int):
            with contextlib.suppress(UserError):
                found.append(train[i].size())
        return found


def choose_classes(labels: Labels, class_name: str) -> list[str]:
    """The classes that the knob class_name asks for: all, one, or several separated by commas; one with a
    comma in its name alone. Raises UserError on an unknown one, and on a name that is no text."""
    if strange := [name for name in labels.classes if re.search("[\ud800-\udfff]", name)]:
        raise UserError(f"class {strange[0]!r}: the name of its folder is not valid UTF-8; rename it")
    if class_name == "all":
        return list(labels.classes)
    known = {layouts.folded(name): name for name in labels.classes}
    asked = [class_name] if layouts.folded(class_name) in known else class_name.split(",")
    wanted = {layouts.folded(name): name.strip() for name in asked}
    if absent := [name for folded, name in wanted.items() if folded not in known]:
        raise UserError(unknown("class", absent[0], ["all", *labels.classes]))
    return [known[folded] for folded in wanted]


def repeated(labels: Labels, hashes: dict[str, list[str]]) -> str:
    """The line on images of the same hash in two splits, or under two labels; "" without any."""
    first: dict[str, tuple] = {}
    twice: list[str] = []
    for split in SPLITS:
        rows = labels.split(split)
        for image, name, *label in zip(hashes[split], rows.names, rows.category, rows.defect, rows.held):
            other, *there = first.setdefault(image, (name, split, label))
            if image != images.UNREADABLE and there != [split, label]:
                twice.append(f"{name} is {other}")
    told = f"{len(twice)} pictures in two splits or under two labels, too"
    return f"{told}: {utils.first_named(twice, '; ')}" if twice else ""


# ---------------------------------------------------------------- raw images
def images_of(config: Config) -> ImageSet:
    """The images a configuration asks for. Raises UserError when they are not where ``dataset_path`` says."""
    dataset, root = config.dataset, Path(config.dataset_path or _home(config.dataset))
    if dataset == "digits":
        found = _array_set(published.digits())
    elif _as_published(dataset, root):
        found = _array_set(published.load(dataset, root))
    else:
        found = _file_set(dataset, root)
    return tiled(found, config.tiles) if config.tiles else found


def _home(dataset: str) -> Path:
    """Where a data set lies unless ``dataset_path`` says otherwise."""
    return Path("data", dataset.removesuffix("_fine"))  # they are CIFAR100's


def _as_published(dataset: str, root: Path) -> bool:
    """Whether a data set is there as the arrays that it is published as, not as image folders."""
    return dataset in published.FORMS and not all((root / split).is_dir() for split in SPLITS)


def name_of(config: Config) -> str:
    """What the images of a configuration are called beside those of others: the data set, for image folders
    elsewhere than in their default place the folder's name and a hash of its place, and the tiles' side."""
    name, home = config.dataset, _home(config.dataset).resolve()
    tiles = f"-tiles{config.tiles}" if config.tiles else ""
    place = Path(config.dataset_path or home).resolve()
    if name == "digits" or _as_published(name, place) or place == home:
        return name + tiles
    folder = re.sub(r"[^\w-]", "_", place.name)[:40]
    place_hash = hashlib.sha256(str(place).encode(errors="surrogateescape")).hexdigest()[:6]
    return f"{name}-{folder}-{place_hash}{tiles}"


def _array_set(arrays: dict[str, published.Arrays]) -> ImageSet:
    pictures = {split: [RawImage(image) for image in pixels] for split, (_, pixels, _) in arrays.items()}
    names = {split: [f"{split}/{i}" for i in range(len(pictures[split]))] for split in SPLITS}
    train, test = (Split.of(names[split], arrays[split][2]) for split in SPLITS)
    return ImageSet(Labels(tuple(arrays["train"][0]), train, test), pictures)


def _file_set(dataset: str, root: Path) -> ImageSet:
    """The images of a set of files, what is held out among the training images; names begin at its folder.
    Classes are those of the training images, sorted; those that ``layouts.folded`` makes one are one. Raises
    UserError on a test image of a class that is tested on its own and has no training images."""
    skipped = Counter[str]()
    table = list(layouts.READERS.get(dataset, layouts.folders)(root, skipped))
    images.tell_skipped(root, skipped)
    rows = {split: [row for row in table if (row.split == "test") == (split == "test")] for split in SPLITS}
    classes: dict[str, str] = {}
    for name in sorted({row.label.partition("/")[0] for row in rows["train"]}):
        classes.setdefault(layouts.folded(name), name)
    number = {name: i for i, name in enumerate(classes)}
    per_category = any("/" in row.label for row in table)
    folder = root if root.is_dir() else root.parent

    @functools.cache
    def meaning(label: str) -> tuple[int, bool, str]:
        """Category, defect and kind (``Split``)."""
        name, _, condition = label.partition("/")
        category = number.get(layouts.folded(name), OTHER)
        if per_category and category == OTHER:
            raise UserError(f"dataset_path: expected training pictures of {name}, which test pictures are of")
        defect = condition != "" and layouts.folded(condition) not in layouts.NORMAL_NAMES
        return category, defect, condition if defect else label if category == OTHER else ""

    def split_of(rows: list[Row]) -> Split:
        category, defect, kind = ([meaning(row.label)[part] for row in rows] for part in range(3))
        names = [row.path.as_posix().removeprefix(f"{folder.as_posix()}/") for row in rows]
        return Split.of(names, category, defect, kind, [row.split == "validation" for row in rows])

    labels = Labels(tuple(classes.values()), split_of(rows["train"]), split_of(rows["test"]), per_category)
    masks = [row.mask for row, kind in zip(rows["test"], labels.test.kind) if kind]
    if any(masks) and not all(masks):
        images.note_once(f"masks for {len(masks) - masks.count(None)} of {len(masks)} defects in {folder}")
    return ImageSet(labels, {s: [RawImage(row.path, row.mask) for row in rows[s]] for s in SPLITS})


def tiled(pictures: ImageSet, side: int) -> ImageSet:
    """The tiles (``images.tiles_of``) of training pictures, each an image of its picture's class. Raises
    UserError on a set with test images: theirs would be tiles with the labels of whole pictures."""
    if tested := len(pictures.labels.test.names):
        told = f"tiles: expected a folder of good pictures alone, got {tested} test images, too"
        raise UserError(f"{told}; give that of the good ones, and score the others with predict.py")
    train = pictures.labels.train
    found: list[tuple[int, RawImage]] = []
    for i, picture in enumerate(pictures.images["train"]):
        tiles: list = [None]
        with contextlib.suppress(UserError):  # raised again when it is read
            tiles = tiles_of(picture.size(), side)
        found += [(i, picture._replace(tile=tile)) for tile in tiles]
    places = [f"{image.tile.top},{image.tile.left}" if image.tile else "" for _, image in found]
    names = [f"{train.names[i]}#{place}" for (i, _), place in zip(found, places)]
    train = dataclasses.replace(train.kept([i for i, _ in found]), names=names)
    labels = dataclasses.replace(pictures.labels, train=train)
    return ImageSet(labels, {"train": [image for _, image in found], "test": []})


def picture_of(name: str) -> str:
    """The name of the picture that a tile is of."""
    return name.rpartition("#")[0]
