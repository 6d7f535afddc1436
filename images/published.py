"""Data sets in their published binary files: CIFAR-10, CIFAR-100, Fashion-MNIST and STL-10 -> arrays.

What lies in the folder is read; an archive that lies there is unpacked; what is absent is downloaded where
the host can be reached. Nothing is unpickled but CIFAR's Python batches, by torchvision, once their
checksums are right."""

import dataclasses
import gzip
import io
import shutil
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from torchvision import datasets as tv
from torchvision.datasets.utils import calculate_md5, download_url

import utils
from config import UserError
from images import layouts
from images.layouts import SPLITS
from shell.files import whole_file

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
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
STL10_CLASSES = "airplane bird car cat deer dog horse monkey ship truck".split()  # 1 to 10 in its files
BROKEN = "its checksum differs from the published one (a broken download?)"
ROWS = {
    "data_batch": 10_000,
    "test_batch": 10_000,
    "train": 50_000,
    "test": 10_000,
}  # of CIFAR's binary files


class Arrays(NamedTuple):
    """All images of a data set: per split, pixels (n, H, W, 3) uint8 and category (n), an index into
    classes."""

    classes: list[str]
    pixels: dict[str, np.ndarray]
    category: dict[str, np.ndarray]


class Source(NamedTuple):
    """A file on the net, its MD5, and where it goes below the data set's folder."""

    url: str
    md5: str
    path: str


@dataclasses.dataclass(frozen=True)
class PublishedForm:
    """One form in which a data set is published.

    folders: where its files may lie below the data set's folder, the usual place first. read: from the
    folder they lie in. sources: what to fetch; archives are unpacked."""

    folders: tuple[str, ...]
    files: tuple[str, ...]
    read: Callable[[Path], Arrays]
    sources: tuple[Source, ...] = ()

    def goes_on(self, root: Path, folder: Path) -> bool:
        """Whether what lacks in a folder is fetched file by file: a download that broke off goes on."""
        fetched = {root / source.path for source in self.sources}
        return all(folder / name in fetched for name in self.files)


def load(dataset: str, root: Path) -> Arrays:
    """A data set in one of its published forms. Raises UserError that says what was looked for, and what is
    missing, cut off or changed there."""
    arrays = _read(dataset, root) or (_fetch(dataset, root) and _read(dataset, root))
    if not arrays:
        raise UserError(
            f"dataset_path: {dataset} was fetched, but {root} still lacks its files; empty that folder"
        )
    if dataset == "CIFAR100":
        category = {split: np.asarray(SUPERCLASS_OF)[fine] for split, fine in arrays.category.items()}
        return Arrays(list(SUPERCLASSES), arrays.pixels, category)
    return arrays


def _read(dataset: str, root: Path) -> Arrays | None:
    """What lies in a folder; None where none of a data set's files do. Raises UserError where only some
    do."""
    partly = None
    for form in FORMS[dataset]:
        for folder in dict.fromkeys(root / name for name in form.folders):
            missing = [name for name in form.files if not (folder / name).is_file()]
            if not missing:
                return form.read(folder)
            if len(missing) < len(form.files) and not form.goes_on(root, folder):
                partly = partly or folder / missing[0]
    if partly and not any(_archives(dataset, root)):
        raise UserError(
            f"dataset_path: {dataset} is there in part: {partly.resolve()} is missing, while "
            f"{layouts.what_is_there(partly.parent)}; add it, or delete that folder and fetch all again"
        )
    return None


# ---------------------------------------------------------------- fetching
def _archives(dataset: str, root: Path) -> list[tuple[PublishedForm, Source]]:
    """The archives of a data set that lie in a folder, not yet unpacked."""
    pairs = [(form, source) for form in FORMS[dataset] for source in form.sources]
    return [(f, s) for f, s in pairs if s.path.endswith(".tar.gz") and (root / s.path).is_file()]


def _fetch(dataset: str, root: Path) -> bool:
    """Unpack the archive that lies there, or download. Raises UserError."""
    there = _archives(dataset, root)
    form = there[0][0] if there else FORMS[dataset][0]
    for source in form.sources:
        path = root / source.path
        if not path.is_file():
            _download(dataset, root, source)
        if path.name.endswith(".tar.gz"):
            if calculate_md5(path) != source.md5:
                raise damaged(path, BROKEN, source.url)
            _unpack(path, root / form.folders[0], form.files)
    return True


def _download(dataset: str, root: Path, source: Source) -> None:
    """Fetch a file whole, or leave nothing behind. Raises UserError, at once where the host cannot be
    reached."""
    first = [Path(form.folders[0], form.files[0]) for form in FORMS[dataset][:2]]
    told = (
        f"dataset_path: expected {dataset} as {' or '.join(str(root / name) for name in first)}, or as image "
        f"folders {root}/{{train,test}}/<class>/*, but {layouts.what_is_there(root)}"
    )
    deeper = next((path for name in first for path in root.rglob(str(name)) if path != root / name), None)
    if deeper:
        raise UserError(
            f"{told}; {deeper} is there: give --dataset_path {deeper.parents[len(first[0].parts) - 1]}"
        )
    advice = (
        f"fetch {source.url} where there is a network and put it at {root / source.path}, or name its folder "
    )
    advice += "with --dataset_path"
    if not utils.reachable(source.url):
        host = urlsplit(source.url).hostname
        raise UserError(f"{told}; {host} is not reachable to download it: {advice}")
    absent = [folder for folder in (root / source.path).parents if not folder.exists()]
    try:
        with whole_file(root / source.path) as partial_file:
            download_url(source.url, str(partial_file.parent), partial_file.name, source.md5)
    except Exception as error:  # of urllib, of the network, of the checksum
        for folder in absent:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise UserError(f"{told}; the download failed ({type(error).__name__}: {error}): {advice}") from None


def _unpack(archive: Path, folder: Path, files: tuple[str, ...]) -> None:
    """The named files of an archive into a folder, each whole; nothing else of it (STL-10's unlabelled 2.6
    GB)."""
    wanted = set(files)
    try:
        with tarfile.open(archive, "r|gz") as content:
            for member in content:
                name = Path(member.name).name
                if member.isfile() and name in wanted:
                    with whole_file(folder / name) as partial_file, open(partial_file, "wb") as out:
                        shutil.copyfileobj(content.extractfile(member) or io.BytesIO(), out)
                    wanted.discard(name)
                if not wanted:
                    return
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise damaged(archive, f"it cannot be unpacked ({error})") from None
    raise damaged(archive, f"it lacks {sorted(wanted)[0]}")


def damaged(path: Path, reason: str, url: str | None = None) -> UserError:
    """The line for a file that is there and not what it should be."""
    again = f"from {url}" if url else "again"
    return UserError(f"dataset_path: {path.resolve()} is there, but {reason}; delete it and fetch it {again}")


# ---------------------------------------------------------------- CIFAR
def _cifar_python(kind, folder: Path) -> Arrays:
    """The Python batches, unpickled by torchvision, which checks them first."""
    if folder.resolve().name != kind.base_folder:
        raise UserError(
            f"dataset_path: CIFAR's Python batches lie in {folder.resolve()}; put them into a folder called "
            f"{kind.base_folder} there"
        )
    folder, pixels, category = folder.resolve(), {}, {}
    try:
        for split in SPLITS:
            loaded = kind(str(folder.parent), train=split == "train")
            pixels[split], category[split] = np.asarray(loaded.data), np.asarray(loaded.targets)
    except RuntimeError:  # absent or corrupt, it says
        checked = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        wrong = next((name for name, md5 in checked if calculate_md5(folder / name) != md5), folder.name)
        raise damaged(folder / wrong, BROKEN, kind.url) from None
    return Arrays(list(loaded.classes), pixels, category)


def _cifar_binary(train: list[str], n_labels: int, names: str | None, folder: Path) -> Arrays:
    """The binary files: rows of n_labels label bytes, the last of them the class, and 3 x 32 x 32 pixels."""
    files = {"train": train, "test": ["test.bin" if names else "test_batch.bin"]}
    rows = {
        split: np.concatenate([_cifar_rows(folder / name, n_labels + 3072) for name in files[split]])
        for split in SPLITS
    }
    classes = (folder / names).read_text().split() if names else CIFAR10_CLASSES
    pixels = {s: r[:, n_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for s, r in rows.items()}
    category = {s: _labels(r[:, n_labels - 1], len(classes), folder / files[s][0]) for s, r in rows.items()}
    return Arrays(list(classes), pixels, category)


def _cifar_rows(path: Path, width: int) -> np.ndarray:
    """A binary file's rows (n, width)."""
    expected = ROWS[path.stem.rstrip("_12345")] * width
    if path.stat().st_size != expected:
        raise damaged(path, f"it has {path.stat().st_size} bytes instead of {expected}")
    return np.fromfile(path, np.uint8).reshape(-1, width)


def _labels(values: np.ndarray, n_classes: int, path: Path) -> np.ndarray:
    """Categories (n) int64. Raises UserError on one that is no class."""
    category = values.astype(np.int64)
    if len(category) and not (0 <= category.min() and category.max() < n_classes):
        raise damaged(path, f"it has labels that are none of the {n_classes} classes")
    return category


# ---------------------------------------------------------------- Fashion-MNIST
IDX = {  # what is in the files, in the order of ``_idx_files``
    "train": ("train-images", "train-labels"),
    "test": ("t10k-images", "t10k-labels"),
}


def _idx_files(ending: str) -> tuple[str, ...]:
    """The four names, as in train-images-idx3-ubyte for the ending "-idx{}-ubyte"."""
    return tuple(stem + ending.format(3 if "images" in stem else 1) for pair in IDX.values() for stem in pair)


def _fashion(ending: str, folder: Path) -> Arrays:
    names = dict(zip((stem for pair in IDX.values() for stem in pair), _idx_files(ending)))
    pixels, category = {}, {}
    for split, (image_stem, label_stem) in IDX.items():
        gray, labels = read_idx(folder / names[image_stem], 3), read_idx(folder / names[label_stem], 1)
        if len(gray) != len(labels):
            raise damaged(folder / names[label_stem], f"it has {len(labels)} labels for {len(gray)} images")
        pixels[split] = np.broadcast_to(gray[..., None], (*gray.shape, 3))
        category[split] = _labels(labels, 10, folder / names[label_stem])
    return Arrays(
        [name.replace("/", "_").replace(" ", "_") for name in tv.FashionMNIST.classes], pixels, category
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of uint8, gzipped where its name ends in .gz: two zero bytes, type 8, the number of
    dimensions, each dimension as a big-endian int32, the values. Raises UserError on anything else."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            content = stream.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(path, f"it cannot be unpacked ({error})") from None
    if content[:4] != bytes((0, 0, 8, dimensions)):
        raise damaged(path, f"it does not start as an idx file of {dimensions} dimensions does")
    shape = np.frombuffer(content, ">i4", dimensions, 4) if len(content) >= 4 + 4 * dimensions else [-1]
    expected = 4 + 4 * dimensions + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise damaged(
            path, f"it holds {len(content)} bytes instead of the {expected} that its header announces"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


# ---------------------------------------------------------------- STL-10
def _stl10(folder: Path) -> Arrays:
    """Pixels as three planes in column order, 3 x 96 x 96; labels from 1. The unlabelled file is not asked
    for."""
    pixels, category = {}, {}
    for split in SPLITS:
        planes, labels = folder / f"{split}_X.bin", np.fromfile(folder / f"{split}_y.bin", np.uint8)
        size, expected = planes.stat().st_size, len(labels) * 3 * 96 * 96
        if size != expected:
            raise damaged(
                planes, f"it has {size} bytes instead of {expected} for the {len(labels)} labels beside it"
            )
        pixels[split] = np.fromfile(planes, np.uint8).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        category[split] = _labels(labels.astype(np.int64) - 1, 10, folder / f"{split}_y.bin")
    return Arrays(STL10_CLASSES, pixels, category)


# ---------------------------------------------------------------- the forms
def _cifar(kind, binary: PublishedForm) -> tuple[PublishedForm, PublishedForm]:
    names = [name for name, _ in (*kind.train_list, *kind.test_list)]
    archive = Source(kind.url, kind.tgz_md5, kind.filename)
    files = (*names, kind.meta["filename"])
    return PublishedForm((kind.base_folder, ""), files, partial(_cifar_python, kind), (archive,)), binary


def _cifar_archive(name: str, md5: str) -> Source:
    return Source(f"https://www.cs.toronto.edu/~kriz/{name}", md5, name)


TRAIN_BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)]
FASHION_FOLDERS = ("FashionMNIST/raw", "raw", "")
FORMS: dict[str, tuple[PublishedForm, ...]] = {
    "cifar10": _cifar(
        tv.CIFAR10,
        PublishedForm(
            ("cifar-10-batches-bin", ""),
            (*TRAIN_BATCHES, "test_batch.bin"),
            partial(_cifar_binary, TRAIN_BATCHES, 1, None),
            (_cifar_archive("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
        ),
    ),
    "CIFAR100": _cifar(
        tv.CIFAR100,
        PublishedForm(
            ("cifar-100-binary", ""),
            ("train.bin", "test.bin", "fine_label_names.txt"),
            partial(_cifar_binary, ["train.bin"], 2, "fine_label_names.txt"),
            (_cifar_archive("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),),
        ),
    ),
    "fashion": tuple(
        PublishedForm(
            FASHION_FOLDERS,
            _idx_files(ending),
            partial(_fashion, ending),
            tuple(
                Source(tv.FashionMNIST.mirrors[0] + name, md5, f"{FASHION_FOLDERS[0]}/{name}")
                for name, md5 in tv.FashionMNIST.resources
            ),
        )
        for ending in ("-idx{}-ubyte.gz", "-idx{}-ubyte", ".idx{}-ubyte", ".idx{}-ubyte.gz")
    ),
    "STL10": (
        PublishedForm(
            (tv.STL10.base_folder, ""),
            ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"),
            _stl10,
            (Source(tv.STL10.url, tv.STL10.tgz_md5, tv.STL10.filename),),
        ),
    ),
}
FORMS["CIFAR100_fine"] = FORMS["CIFAR100"]  # its 100 classes, not the 20 superclasses
