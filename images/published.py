"""CIFAR-10, CIFAR-100, Fashion-MNIST and STL-10 as they are published, read by torchvision -> arrays.

What lies in the folder is read (nothing is unpickled before its checksum is right), an archive that lies
there is unpacked, what is absent is downloaded where there is a network."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision import datasets as tv

import utils
from config import UserError
from images.layouts import SPLITS, not_as_expected

# CIFAR-100's 20 superclasses (Krizhevsky 2009, table in section 3), and the superclass of each of the 100
# classes in alphabetical order.
SUPERCLASSES = (
    "aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices "
    "household_furniture insects large_carnivores large_man-made_outdoor_things "
    "large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals non-insect_invertebrates "
    "people reptiles small_mammals trees vehicles_1 vehicles_2"
).split()
SUPERCLASS_OF = np.array(
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 5 19 8 "
    "8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13 16 19 "
    "2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13".split(),
    int,
)
STL10_CLASSES = "airplane bird car cat deer dog horse monkey ship truck".split()


class LabelledSTL10(tv.STL10):
    """Without its 2.6 GB of unlabelled images."""

    train_list = tv.STL10.train_list[:2]


FORMS: dict[str, Any] = {
    "cifar10": tv.CIFAR10,
    "CIFAR100": tv.CIFAR100,
    "CIFAR100_fine": tv.CIFAR100,  # its 100 classes, not the 20 superclasses
    "fashion": tv.FashionMNIST,
    "STL10": LabelledSTL10,
}


class Arrays(NamedTuple):
    """All images of a data set: per split, pixels (n, H, W, 3) uint8 and category (n), an index into
    classes."""

    classes: list[str]
    pixels: dict[str, np.ndarray]
    category: dict[str, np.ndarray]


def load(dataset: str, root: Path) -> Arrays:
    """A data set in its published form. Raises UserError where it is absent, cut off or changed and cannot
    be fetched."""
    kind = FORMS[dataset]
    try:
        found = {split: _read(kind, root, split) for split in SPLITS}
    except Exception:  # absent or changed; of Fashion-MNIST, which has no checksums, also cut off
        _refuse_without_source(dataset, root)
        try:
            found = {split: _read(kind, root, split, download=True) for split in SPLITS}
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"dataset_path: {dataset} in {root} can be neither read nor fetched ({reason}); delete it "
                f"there and fetch it from {_source(kind)[0]} again"
            ) from None
    pixels, category, classes = (dict(zip(SPLITS, part)) for part in zip(*found.values()))
    if dataset == "CIFAR100":
        return Arrays(SUPERCLASSES, pixels, {split: SUPERCLASS_OF[fine] for split, fine in category.items()})
    return Arrays([name.replace("/", "_").replace(" ", "_") for name in classes["train"]], pixels, category)


def _read(kind: Any, root: Path, split: str, download: bool = False) -> tuple[np.ndarray, np.ndarray, list]:
    """Pixels, categories and the names of these. Raises whatever torchvision does."""
    if kind is LabelledSTL10:
        stl10 = kind(str(root), split=split, download=download)
        return stl10.data.transpose(0, 2, 3, 1), stl10.labels.astype(np.int64), STL10_CLASSES
    loaded = kind(str(root), train=split == "train", download=download)
    pixels = np.asarray(loaded.data)
    if pixels.ndim == 3:  # gray
        pixels = np.broadcast_to(pixels[..., None], (*pixels.shape, 3))
    if len(pixels) != len(loaded.targets):
        raise ValueError(f"{len(loaded.targets)} labels for {len(pixels)} images")
    return pixels, np.asarray(loaded.targets, np.int64), loaded.classes


def _source(kind: Any) -> tuple[str, str, list[str]]:
    """Where a data set comes from, and below its folder the place of its files and of its archives."""
    if kind is tv.FashionMNIST:
        return kind.mirrors[0], "FashionMNIST/raw", [f"FashionMNIST/raw/{name}" for name, _ in kind.resources]
    return kind.url, kind.base_folder, [kind.filename]


def _refuse_without_source(dataset: str, root: Path) -> None:
    """Raise UserError unless the archives lie there or their host can be reached."""
    url, folder, archives = _source(FORMS[dataset])
    if all((root / name).is_file() for name in archives) or utils.reachable(url):
        return
    raise not_as_expected(
        root,
        f"{dataset} whole in {root / folder}, or, to unpack, {root / archives[0]} (from {url}, which is not "
        f"reachable), or image folders {root}/{{train,test}}/<class>/*",
        lambda place: (place / folder).is_dir(),
    )
