"""CIFAR-10, CIFAR-100, Fashion-MNIST and STL-10 as they are published, read by torchvision -> arrays.

What lies in the folder is read (nothing is unpickled before its checksum is right), an archive that lies
there is unpacked, what is absent is downloaded where there is a network."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets as tv

import utils
from config import UserError
from images.layouts import SPLITS, not_as_expected

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


def load(dataset: str, root: Path) -> tuple[list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A data set in its published form: its classes, and of each split pixels (n, H, W, 3) uint8 and
    categories (n), indices into the classes. Raises UserError where it is absent, cut off or changed and
    cannot be fetched."""
    try:
        found = [_read(dataset, root, split) for split in SPLITS]
    except Exception:  # absent or changed; of Fashion-MNIST, which has no checksums, also cut off
        url, folder, archives = _source(FORMS[dataset])
        if not all((root / name).is_file() for name in archives) and not utils.reachable(url):
            raise not_as_expected(
                root,
                f"{dataset} whole in {root / folder}, or, to unpack, {root / archives[0]} (from {url}, which "
                f"is not reachable), or image folders {root}/{{train,test}}/<class>/*",
                lambda place: (place / folder).is_dir(),
            ) from None
        try:
            found = [_read(dataset, root, split, download=True) for split in SPLITS]
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"dataset_path: {dataset} in {root} can be neither read nor fetched ({reason}); delete it "
                f"there and fetch it from {url} again"
            ) from None
    classes, pixels, category = zip(*found)
    names = [name.replace("/", "_").replace(" ", "_") for name in classes[0]]
    return names, dict(zip(SPLITS, pixels)), dict(zip(SPLITS, category))


def _read(
    dataset: str, root: Path, split: str, download: bool = False
) -> tuple[list, np.ndarray, np.ndarray]:
    """The classes, and pixels and categories of a split. Raises whatever torchvision does."""
    kind = FORMS[dataset]
    if dataset == "STL10":
        stl10 = kind(str(root), split=split, download=download)
        return STL10_CLASSES, stl10.data.transpose(0, 2, 3, 1), stl10.labels.astype(np.int64)
    loaded = kind(str(root), train=split == "train", download=download)
    classes, category, pixels = loaded.classes, loaded.targets, np.asarray(loaded.data)
    if dataset == "CIFAR100":  # torchvision, which has found the checksums right, passes over superclasses
        files = (root / kind.base_folder / name for name in ("meta", split))
        meta, content = (pickle.loads(file.read_bytes(), encoding="latin1") for file in files)
        classes, category = meta["coarse_label_names"], content["coarse_labels"]
    if pixels.ndim == 3:  # gray
        pixels = np.broadcast_to(pixels[..., None], (*pixels.shape, 3))
    return classes, pixels, np.asarray(category, np.int64)


def _source(kind: Any) -> tuple[str, str, list[str]]:
    """Where a data set comes from, and below its folder the place of its files and of its archives."""
    if kind is tv.FashionMNIST:
        return kind.mirrors[0], "FashionMNIST/raw", [f"FashionMNIST/raw/{name}" for name, _ in kind.resources]
    return kind.url, kind.base_folder, [kind.filename]
