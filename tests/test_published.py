"""The published binary files of data sets, written here in their true form, and what is said of broken
ones."""

import hashlib
import io
import pickle
import tarfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import load_images
from torchvision import datasets as tv

import utils
from config import UserError
from datasets import SPLITS
from images import published

N_TRAIN, N_TEST = 10, 4
GENERATOR = np.random.RandomState(0)
FINE = [f"fine_{i:02d}" for i in range(100)]  # in alphabetical order, as the true ones
COARSE = ["aquatic mammals", "fish", *(f"coarse {i}" for i in range(2, 20))]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", lambda *_: None)  # nothing comes


def made(side: int, n_classes: int):
    """Pixels {split: (n, H, W, 3)} and the numbers of their classes {split: (n)}."""
    counts = {"train": N_TRAIN, "test": N_TEST}
    pixels = {s: GENERATOR.randint(0, 256, (n, side, side, 3), dtype=np.uint8) for s, n in counts.items()}
    labels = {s: GENERATOR.randint(0, n_classes, n) for s, n in counts.items()}
    labels["train"][0] = n_classes - 1
    return pixels, labels


def trust(monkeypatch, kind, files: dict[str, bytes]) -> None:
    """Make torchvision take these files for the published ones: their MD5s in its lists."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(kind, attribute, [[name, md5[name]] for name, _ in getattr(kind, attribute)])
    if hasattr(kind, "meta"):
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5[kind.meta["filename"]]})


# Each writer of a true format gives the files and what they hold.
def cifar(kind, key: str, names: list[str], per_file: int):
    def write(monkeypatch):
        pixels, labels = made(32, len(names))
        batches = [("train", i) for i in range(0, N_TRAIN, per_file)] + [("test", 0)]
        files = {}
        for (name, _), (split, start) in zip((*kind.train_list, *kind.test_list), batches):
            rows = slice(start, start + per_file if split == "train" else None)
            planes = pixels[split][rows].transpose(0, 3, 1, 2).reshape(-1, 3072)
            numbers = labels[split][rows]
            content = {"data": planes, key: numbers.tolist(), "coarse_labels": (numbers % 20).tolist()}
            files[name] = pickle.dumps(content)
        files[kind.meta["filename"]] = pickle.dumps({kind.meta["key"]: names, "coarse_label_names": COARSE})
        trust(monkeypatch, kind, files)
        return {f"{kind.base_folder}/{name}": content for name, content in files.items()}, pixels, labels

    return write


def idx(values: np.ndarray) -> bytes:
    """An idx file: 0, 0, type 8 (uint8), dimensions, each as a big-endian int32, the values."""
    header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.astype(np.uint8).tobytes()


def fashion(monkeypatch):
    pixels, labels = made(28, 10)
    pixels = {s: np.repeat(x[..., :1], 3, 3) for s, x in pixels.items()}
    files = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        files[f"FashionMNIST/raw/{stem}-images-idx3-ubyte"] = idx(pixels[split][..., 0])
        files[f"FashionMNIST/raw/{stem}-labels-idx1-ubyte"] = idx(labels[split])
    return files, pixels, labels


def stl10(monkeypatch):
    """Planes in column order, labels from 1."""
    pixels, labels = made(96, 10)
    files = {f"{s}_X.bin": pixels[s].transpose(0, 3, 2, 1).tobytes() for s in SPLITS}
    files |= {f"{s}_y.bin": (labels[s] + 1).astype(np.uint8).tobytes() for s in SPLITS}
    trust(monkeypatch, published.LabelledSTL10, files)
    return {f"stl10_binary/{name}": content for name, content in files.items()}, pixels, labels


WRITERS = {
    "cifar10": cifar(
        tv.CIFAR10, "labels", "airplane automobile bird cat deer dog frog horse ship truck".split(), 2
    ),
    "CIFAR100": cifar(tv.CIFAR100, "fine_labels", FINE, N_TRAIN),
    "CIFAR100_fine": cifar(tv.CIFAR100, "fine_labels", FINE, N_TRAIN),
    "fashion": fashion,
    "STL10": stl10,
}
every_set = pytest.mark.parametrize("dataset", WRITERS)


def written(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@every_set
def test_pixels_and_labels(tmp_path, monkeypatch, dataset):
    files, pixels, labels = WRITERS[dataset](monkeypatch)
    written(tmp_path, files)
    found = load_images(dataset, str(tmp_path))
    for split in SPLITS:
        got = [found.read(split, i) for i in range(len(pixels[split]))]
        assert (np.array(got) == pixels[split]).all() and got[0].dtype == np.uint8
        wanted = labels[split] % 20 if dataset == "CIFAR100" else labels[split]
        assert found.labels.split(split).category.tolist() == wanted.tolist()
        assert len(found.labels.split(split).names) == len(pixels[split])
    assert (found.labels.classes[1], len(found.labels.classes)) == {
        "cifar10": ("automobile", 10),
        "CIFAR100": ("fish", 20),
        "CIFAR100_fine": ("fine_01", 100),
        "fashion": ("Trouser", 10),
        "STL10": ("bird", 10),
    }[dataset]


@pytest.mark.parametrize("dataset", ["cifar10", "STL10"])
def test_an_archive_that_lies_there_is_unpacked(tmp_path, monkeypatch, dataset):
    """Without a network."""
    files, pixels, _ = WRITERS[dataset](monkeypatch)
    kind, stream = published.FORMS[dataset], io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    written(tmp_path, {kind.filename: stream.getvalue()})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(stream.getvalue()).hexdigest())
    assert (load_images(dataset, str(tmp_path)).read("test", 0) == pixels["test"][0]).all()


# ---------------------------------------------------------------- missing, cut off, changed
@every_set
def test_a_file_that_is_missing_or_cut_off(tmp_path, monkeypatch, dataset):
    """One line; what has changed is not unpickled: it could run anything."""

    class Bang:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    def refused() -> None:
        with pytest.raises(
            UserError, match=f"{dataset} in .* can be neither read nor fetched .*http"
        ) as told:
            load_images(dataset, str(tmp_path))
        assert "\n" not in str(told.value) and not (tmp_path / "ran").exists()

    refused()
    files, _, _ = WRITERS[dataset](monkeypatch)
    for name, content in files.items():
        for broken in (content[: len(content) // 2], pickle.dumps(Bang())):
            written(tmp_path, files | {name: broken})
            refused()
    (tmp_path / name).unlink()
    refused()


def test_reachable(monkeypatch):
    """A server that answers, if only by an error, and none; a proxy is asked instead."""
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert utils.reachable(address)
        monkeypatch.setenv("http_proxy", address)
        urllib.request.install_opener(None)  # which would know of no proxy
        assert utils.reachable("http://nowhere.invalid")
        server.shutdown()
    assert not utils.reachable(address)
