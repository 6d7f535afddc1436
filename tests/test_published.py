"""The published binary files of data sets, written here in their true form, and what is said of broken
ones."""

import gzip
import hashlib
import io
import pickle
import re
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets as tv

import datasets
import utils
from config import Config, UserError
from datasets import SPLITS, load_images
from images import published

N_TRAIN, N_TEST = 10, 4
GENERATOR = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test waits for one; a download that is tried is an error."""
    monkeypatch.setattr(utils, "reachable", lambda url: False)
    monkeypatch.setattr(published, "download_url", None)


def noise(n: int, side: int) -> np.ndarray:
    return GENERATOR.randint(0, 256, (n, side, side, 3), dtype=np.uint8)


def written(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


# ---------------------------------------------------------------- writers of the true formats
# Each gives the files, the pixels {split: (n, H, W, 3)} and the numbers of the classes {split: (n)}.
def planes(pixels: np.ndarray) -> np.ndarray:
    """As CIFAR stores images: a row each, the red plane first, row by row."""
    return pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)


def made(side: int, n_classes: int, n_train: int = N_TRAIN, n_test: int = N_TEST):
    pixels = {"train": noise(n_train, side), "test": noise(n_test, side)}
    labels = {s: GENERATOR.randint(0, n_classes, len(pixels[s])) for s in SPLITS}
    labels["train"][0] = n_classes - 1
    return pixels, labels


def python2(value) -> bytes:
    """A value as Python 2's pickle wrote it at protocol 2, as in the published files: texts are byte
    strings, which Python 3 no longer writes."""
    if isinstance(value, bytes):
        return b"T" + len(value).to_bytes(4, "little") + value
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(part) for item in value.items() for part in item) + b"u"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\1btR"
    dtype = b"cnumpy\ndtype\n(U\2u1K\0K\1tR(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    shape = b"(" + b"".join(map(python2, value.shape)) + b"t"
    return empty + b"(K\1" + shape + dtype + b"\x89" + python2(value.tobytes()) + b"tb"


def pickled(value) -> bytes:
    return b"\x80\2" + python2(value) + b"."


def cifar10_python(monkeypatch):
    pixels, labels = made(32, 10)
    files = {}
    for i, rows in enumerate(np.split(np.arange(N_TRAIN), 5)):
        files[f"data_batch_{i + 1}"] = (pixels["train"][rows], labels["train"][rows])
    files["test_batch"] = (pixels["test"], labels["test"])
    files = {
        name: pickled({b"data": planes(x), b"labels": y.tolist(), b"batch_label": b"training batch"})
        for name, (x, y) in files.items()
    }
    names = [name.encode() for name in published.CIFAR10_CLASSES]
    files["batches.meta"] = pickled({b"label_names": names, b"num_vis": 3072})
    trust(monkeypatch, tv.CIFAR10, files)
    return {f"cifar-10-batches-py/{name}": content for name, content in files.items()}, pixels, labels


FINE = [f"fine_{i:02d}" for i in range(100)]  # in alphabetical order, as the true ones


def cifar100_python(monkeypatch):
    pixels, labels = made(32, 100)
    files = {
        split: pickled(
            {
                b"data": planes(pixels[split]),
                b"fine_labels": labels[split].tolist(),
                b"coarse_labels": [published.SUPERCLASS_OF[i] for i in labels[split]],
            }
        )
        for split in SPLITS
    }
    files["meta"] = pickled({b"fine_label_names": [name.encode() for name in FINE]})
    trust(monkeypatch, tv.CIFAR100, files)
    return {f"cifar-100-python/{name}": content for name, content in files.items()}, pixels, labels


def trust(monkeypatch, kind, files: dict[str, bytes]) -> None:
    """Make torchvision take these files for the published ones: their MD5s in its lists."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(kind, attribute, [[name, md5[name]] for name, _ in getattr(kind, attribute)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5[kind.meta["filename"]]})


def cifar10_binary(monkeypatch):
    monkeypatch.setattr(published, "ROWS", {"data_batch": N_TRAIN // 5, "test_batch": N_TEST})
    pixels, labels = made(32, 10)
    rows = {s: np.column_stack([labels[s].astype(np.uint8), planes(pixels[s])]) for s in SPLITS}
    files = {f"data_batch_{i + 1}.bin": part.tobytes() for i, part in enumerate(np.split(rows["train"], 5))}
    files["test_batch.bin"] = rows["test"].tobytes()
    return {f"cifar-10-batches-bin/{name}": content for name, content in files.items()}, pixels, labels


def cifar100_binary(monkeypatch):
    monkeypatch.setattr(published, "ROWS", {"train": N_TRAIN, "test": N_TEST})
    pixels, labels = made(32, 100)
    coarse = {s: np.asarray(published.SUPERCLASS_OF, np.uint8)[labels[s]] for s in SPLITS}
    files = {
        f"{s}.bin": np.column_stack([coarse[s], labels[s].astype(np.uint8), planes(pixels[s])]).tobytes()
        for s in SPLITS
    }
    files["fine_label_names.txt"] = ("\n".join(FINE) + "\n\n").encode()
    return {f"cifar-100-binary/{name}": content for name, content in files.items()}, pixels, labels


def idx(values: np.ndarray) -> bytes:
    """An idx file: 0, 0, type 8 (uint8), dimensions, each as a big-endian int32, the values."""
    header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.astype(np.uint8).tobytes()


def fashion(folder: str, pattern: str):
    def write(monkeypatch):
        pixels, labels = made(28, 10)
        pixels = {s: np.repeat(x[..., :1], 3, 3) for s, x in pixels.items()}
        files = {}
        for split, stem in (("train", "train"), ("test", "t10k")):
            files[pattern.format(stem, "images", 3)] = idx(pixels[split][..., 0])
            files[pattern.format(stem, "labels", 1)] = idx(labels[split])
        if pattern.endswith(".gz"):
            files = {name: gzip.compress(content) for name, content in files.items()}
        return {f"{folder}{name}": content for name, content in files.items()}, pixels, labels

    return write


def stl10(folder: str):
    def write(monkeypatch):
        """Planes in column order, labels from 1."""
        pixels, labels = made(96, 10)
        files = {}
        for s in SPLITS:
            files[f"{folder}{s}_X.bin"] = pixels[s].transpose(0, 3, 2, 1).tobytes()
            files[f"{folder}{s}_y.bin"] = (labels[s] + 1).astype(np.uint8).tobytes()
        return files, pixels, labels

    return write


TRUE_FORMS = {
    "cifar10 python": cifar10_python,
    "cifar10 binary": cifar10_binary,
    "CIFAR100 python": cifar100_python,
    "CIFAR100 binary": cifar100_binary,
    "fashion gz": fashion("FashionMNIST/raw/", "{}-{}-idx{}-ubyte.gz"),
    "fashion raw": fashion("FashionMNIST/raw/", "{}-{}-idx{}-ubyte"),
    "fashion flat gz": fashion("", "{}-{}-idx{}-ubyte.gz"),
    "fashion flat": fashion("", "{}-{}.idx{}-ubyte"),
    "STL10 folder": stl10("stl10_binary/"),
    "STL10 flat": stl10(""),
}
every_form = pytest.mark.parametrize("form", TRUE_FORMS)


def read(dataset: str, root: Path, **options) -> datasets.ImageSet:
    return load_images(dataset, str(root), **options)


# ---------------------------------------------------------------- read right
@every_form
def test_pixels_and_labels(tmp_path, monkeypatch, form):
    dataset = form.split()[0]
    files, pixels, labels = TRUE_FORMS[form](monkeypatch)
    written(tmp_path, files)
    images = read(dataset, tmp_path)
    wanted = {
        s: np.asarray(published.SUPERCLASS_OF)[y] if dataset == "CIFAR100" else y for s, y in labels.items()
    }
    for split in SPLITS:
        got = [images.read(split, i) for i in range(len(pixels[split]))]
        assert (np.array(got) == pixels[split]).all() and got[0].dtype == np.uint8
        assert images.labels.split(split).category.tolist() == wanted[split].tolist()
        assert len(images.labels.split(split).names) == len(pixels[split])
    assert len(images.labels.classes) == (20 if dataset == "CIFAR100" else 10) and not images.from_files


@pytest.mark.parametrize("form", ["CIFAR100 python", "CIFAR100 binary"])
def test_fine_classes(tmp_path, monkeypatch, form):
    files, _, labels = TRUE_FORMS[form](monkeypatch)
    written(tmp_path, files)
    images = read("CIFAR100_fine", tmp_path)
    assert images.labels.classes == tuple(FINE)
    assert images.labels.train.category.tolist() == labels["train"].tolist()
    assert read("CIFAR100", tmp_path).labels.classes == published.SUPERCLASSES
    configs = [Config(dataset=name, dataset_path=str(tmp_path)) for name in ("CIFAR100", "CIFAR100_fine")]
    assert len({datasets.images_of(config).labels.classes for config in configs}) == 2
    assert len({datasets.name_of(config) for config in configs}) == 2


def test_superclasses():
    """Five classes in each, and a few that anybody can place (torchvision's 100 classes are in alphabetical
    order)."""
    assert (
        np.bincount(published.SUPERCLASS_OF).tolist() == [5] * 20 and len(set(published.SUPERCLASSES)) == 20
    )
    alphabetical = {
        0: "apple",
        1: "aquarium_fish",
        2: "baby",
        3: "bear",
        8: "bicycle",
        21: "chimpanzee",
        41: "lawn_mower",
        96: "willow_tree",
        99: "worm",
    }
    wanted = {
        "apple": "fruit_and_vegetables",
        "aquarium_fish": "fish",
        "baby": "people",
        "bear": "large_carnivores",
        "bicycle": "vehicles_1",
        "chimpanzee": "large_omnivores_and_herbivores",
        "lawn_mower": "vehicles_2",
        "willow_tree": "trees",
        "worm": "non-insect_invertebrates",
    }
    for number, name in alphabetical.items():
        assert published.SUPERCLASSES[published.SUPERCLASS_OF[number]] == wanted[name]


def test_class_names():
    assert "T-shirt_top" in [name.replace("/", "_") for name in tv.FashionMNIST.classes]
    assert len(published.CIFAR10_CLASSES) == len(published.STL10_CLASSES) == 10
    assert published.STL10_CLASSES[2] == "car" and published.CIFAR10_CLASSES[1] == "automobile"


@pytest.mark.parametrize(
    "form", ["cifar10 python", "cifar10 binary", "CIFAR100 binary", "fashion raw", "STL10 folder"]
)
def test_the_folder_of_the_files_may_be_named(tmp_path, monkeypatch, form):
    files, pixels, _ = TRUE_FORMS[form](monkeypatch)
    written(tmp_path, files)
    images = read(form.split()[0], (tmp_path / next(iter(files))).parent)
    assert (images.read("test", 1) == pixels["test"][1]).all()


@pytest.mark.parametrize("form", ["cifar10 python", "cifar10 binary", "CIFAR100 python", "STL10 folder"])
def test_an_archive_that_lies_there_is_unpacked(tmp_path, monkeypatch, form):
    """Only what is needed of it; without a network."""
    files, pixels, _ = TRUE_FORMS[form](monkeypatch)
    dataset, packed = form.split()[0], io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in {"stl10_binary/unlabeled_X.bin": b"2.6 GB", **files}.items():
            member = tarfile.TarInfo(f"./{name}" if dataset == "STL10" else name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    forms = [f for f in published.FORMS[dataset] if f.folders[0] == next(iter(files)).split("/")[0]]
    source = forms[0].sources[0]
    archive_there(monkeypatch, tmp_path, dataset, source, packed.getvalue())
    assert (read(dataset, tmp_path).read("test", 0) == pixels["test"][0]).all()
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {*files, source.path}, "the unlabelled images are not written"


def archive_there(monkeypatch, root, dataset, source, content):
    """Put an archive where it is looked for and make its MD5 the published one."""
    (root / source.path).write_bytes(content)
    known = source._replace(md5=hashlib.md5(content).hexdigest())
    forms = tuple(
        published.dataclasses.replace(form, sources=tuple(known if s == source else s for s in form.sources))
        for form in published.FORMS[dataset]
    )
    monkeypatch.setitem(published.FORMS, dataset, forms)


# ---------------------------------------------------------------- missing, in the wrong place, cut off
@pytest.mark.parametrize("dataset", published.FORMS)
def test_nothing_there(tmp_path, dataset):
    """The paths that were looked for, what was found, what to put there; no folder is left behind."""
    for root, found in ((tmp_path / "no" / "where", "is not there"), (tmp_path, "holds a.txt, no/")):
        with pytest.raises(UserError, match="not reachable") as told:
            read(dataset, root)
        source, form = published.FORMS[dataset][0].sources[0], published.FORMS[dataset][0]
        for word in (str(root / form.folders[0] / form.files[0]), source.url, str(root / source.path), found):
            assert word in str(told.value)
        assert not (tmp_path / "no").exists() or root == tmp_path
        (tmp_path / "a.txt").touch()
        (tmp_path / "no").mkdir(exist_ok=True)


@every_form
def test_in_the_wrong_place(tmp_path, monkeypatch, form):
    """One folder too deep: the right --dataset_path is named."""
    files, _, _ = TRUE_FORMS[form](monkeypatch)
    written(tmp_path / "deep", files)
    with pytest.raises(UserError) as told:
        read(form.split()[0], tmp_path)
    if "/" in next(iter(files)):
        assert f"--dataset_path {tmp_path / 'deep'}" in str(told.value)


@every_form
def test_a_missing_file_is_named(tmp_path, monkeypatch, form):
    files, _, _ = TRUE_FORMS[form](monkeypatch)
    written(tmp_path, files)
    for name in list(files):
        (tmp_path / name).rename(tmp_path / "kept")
        fetched = "put it at " if form == "fashion gz" else "in part: "  # the one that comes file by file
        with pytest.raises(UserError, match=fetched + re.escape(str(tmp_path / name))):
            read(form.split()[0], tmp_path)
        (tmp_path / "kept").rename(tmp_path / name)


@every_form
def test_a_truncated_file_is_named(tmp_path, monkeypatch, form):
    """A download that broke off: "there, but", never "not there"; the files are not pickles to be tried."""
    files, _, _ = TRUE_FORMS[form](monkeypatch)
    written(tmp_path, files)
    for name, content in files.items():
        if name.endswith(".txt"):
            continue
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="is there, but") as told:
            read(form.split()[0], tmp_path)
        blamed = name.replace("_y.bin", "_X.bin")  # which of the two is cut cannot be told
        assert str(tmp_path / blamed) in str(told.value) and "fetch it" in str(told.value)
        (tmp_path / name).write_bytes(content)
    read(form.split()[0], tmp_path)


@pytest.mark.parametrize("form", ["cifar10 python", "CIFAR100 python"])
def test_nothing_unchecked_is_unpickled(tmp_path, monkeypatch, form):
    """A pickle of another checksum could run anything."""
    files, _, _ = TRUE_FORMS[form](monkeypatch)

    class Bang:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for name in files:
        written(tmp_path, files | {name: pickle.dumps(Bang())})
        with pytest.raises(UserError, match="checksum differs"):
            read(form.split()[0], tmp_path)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dataset", ["cifar10", "CIFAR100", "STL10"])
def test_a_truncated_archive(tmp_path, monkeypatch, dataset):
    source = published.FORMS[dataset][0].sources[0]
    (tmp_path / source.path).write_bytes(gzip.compress(b"half of it")[:-5])
    with pytest.raises(UserError, match="is there, but its checksum differs") as told:
        read(dataset, tmp_path)
    assert str(tmp_path / source.path) in str(told.value) and source.url in str(told.value)
    archive_there(monkeypatch, tmp_path, dataset, source, gzip.compress(b"no archive"))
    with pytest.raises(UserError, match="is there, but it (cannot be unpacked|lacks)"):
        read(dataset, tmp_path)


def test_batches_in_a_folder_of_another_name(tmp_path, monkeypatch):
    files, _, _ = cifar10_python(monkeypatch)
    written(tmp_path, {name.split("/")[1]: content for name, content in files.items()})
    with pytest.raises(UserError, match="folder called cifar-10-batches-py"):
        read("cifar10", tmp_path)


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "does not start"),
        (b"\0\0\x08\x01\0\0", "announces"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "holds 11 bytes instead of the 13"),
        (b"\0\0\x08\x01\0\0\0\x05abcdefg", "holds 15 bytes instead of the 13"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "does not start"),
        (b"\0\0\x08\x01\xff\xff\xff\xff", "announces"),
    ],
)
def test_idx_files(tmp_path, content, told):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=told):
        published.read_idx(tmp_path / "a", 1)


def test_labels_that_are_no_classes(tmp_path, monkeypatch):
    files, _, _ = TRUE_FORMS["STL10 flat"](monkeypatch)
    written(tmp_path, files | {"test_y.bin": bytes([0] * N_TEST)})
    with pytest.raises(UserError, match="test_y.bin is there, but it has labels"):
        read("STL10", tmp_path)


# ---------------------------------------------------------------- downloads
def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    def fails(url, folder, name, md5):
        (Path(folder) / name).write_bytes(b"half")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(utils, "reachable", lambda url: True)
    monkeypatch.setattr(published, "download_url", fails)
    for dataset in published.FORMS:
        with pytest.raises(UserError, match="the download failed .*corrupted"):
            read(dataset, tmp_path / "a" / "b")
        assert not list(tmp_path.iterdir())


def test_a_download(tmp_path, monkeypatch):
    """Fetched once, under the checksum that torchvision knows, then read like what lies there."""
    files, pixels, _ = TRUE_FORMS["fashion gz"](monkeypatch)
    fetched = []

    def fetch(url, folder, name, md5):
        fetched.append((url.rsplit("/")[-1], md5))
        (Path(folder) / name).write_bytes(files[f"FashionMNIST/raw/{fetched[-1][0]}"])

    monkeypatch.setattr(utils, "reachable", lambda url: True)
    monkeypatch.setattr(published, "download_url", fetch)
    first = next(iter(files))  # is there already: a download that broke off goes on
    written(tmp_path / "new", {first: files[first]})
    for _ in range(2):
        assert (read("fashion", tmp_path / "new").read("test", 0) == pixels["test"][0]).all()
    assert sorted(fetched) == sorted(tv.FashionMNIST.resources[1:])


@pytest.mark.skipif(not hasattr(utils.socket, "AF_INET"), reason="no network stack")
def test_reachable(monkeypatch):
    """A port that listens, one that does not, a name that does not resolve in time; a proxy is asked
    instead."""
    monkeypatch.undo()
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with utils.socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert utils.reachable(f"http://127.0.0.1:{port}/x")
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{port}")
        assert utils.reachable("https://nowhere.invalid/x")
        monkeypatch.setenv("no_proxy", "nowhere.invalid")
        assert not utils.reachable("https://nowhere.invalid/x", 0.5)
    assert not utils.reachable(f"http://127.0.0.1:{port}/x", 0.5)

    def slow(*_, **__):
        time.sleep(0.5)
        raise OSError

    monkeypatch.setattr(utils.socket, "create_connection", slow)
    start = time.monotonic()
    assert not utils.reachable("http://127.0.0.1/", 0.1) and time.monotonic() - start < 0.4
