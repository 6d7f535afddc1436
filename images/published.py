"""CIFAR-10, CIFAR-100, Fashion-MNIST and STL-10 as they are published, read by torchvision, and
scikit-learn's digits -> arrays. Nothing is unpickled before its checksum is right."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets as tv

import utils
from config import UserError
from images.layouts import SPLITS

STL10_CLASSES = "airplane bird car cat deer dog horse monkey ship truck".split()
Arrays = tuple[list[str], np.ndarray, np.ndarray]  # classes; of a split pixels (n, H, W, 3) uint8, categories


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


def load(dataset: str, root: Path) -> dict[str, Arrays]:
    """The arrays of both splits. Raises UserError if they are absent, cut off or changed, and not fetched."""
    kind = FORMS[dataset]
    url = getattr(kind, "url", None) or kind.mirrors[0]
    archive = getattr(kind, "filename", None) or kind.resources[0][0]
    for download in (False, True):
        try:
            if download and not any(root.rglob(archive)) and not utils.reachable(url):
                raise OSError("no network")
            return {split: _read(dataset, root, split, download) for split in SPLITS}
        except Exception as error:  # absent, changed, or (Fashion-MNIST has no checksums) cut off
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    told = f"dataset_path: {dataset} in {root} can be neither read nor fetched ({reason})"
    expected = f"its whole files from {url}, or image folders {root}/{{train,test}}/<class>/*"
    raise UserError(f"{told}; expected {expected}")


def _read(dataset: str, root: Path, split: str, download: bool) -> Arrays:
    """A split, whose categories are indices into the classes. Raises whatever torchvision does."""
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
    names = [name.replace("/", "_").replace(" ", "_") for name in classes]
    return names, pixels, np.asarray(category, np.int64)


def digits() -> dict[str, Arrays]:
    """scikit-learn's 1,797 digits, 8 x 8, in a fixed stratified split into halves (docs/method.md, 6)."""
    from sklearn.datasets import load_digits  # slow to import, and needed here alone
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.repeat((digits.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3)
    halves = train_test_split(np.arange(len(pixels)), test_size=0.5, random_state=0, stratify=digits.target)
    rows = zip(SPLITS, map(np.sort, halves))
    return {split: (list("0123456789"), pixels[half], digits.target[half]) for split, half in rows}
