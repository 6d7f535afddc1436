"""Stores of features: rows by the images' hashes, all that is refused, and what is noticed of damage."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, content, flip, hashes_of

from cache import store
from cache.feature_cache import FeatureCache, ImageList
from cache.store import Store, write_shard
from config import UserError
from datasets import OTHER, SPLITS, Labels, Split

N, C = 3, 5
SHAPES = {"tokens": (1 + N, C), "bands": (2,)}
FIELDS = {
    "extractor": "tiny", "img_size": [32, 48], "norm_mean": [0.5, 0.5, 0.5], "token_grid": "full",
    "shapes": {name: list(shape) for name, shape in SHAPES.items()}, "precision": "float32",
    "weights_sha256": "abc", "n_feat": C, "grid": [1, N],
}  # fmt: skip
LABELS = Labels(
    ("cat", "dög"),
    Split.of(["train/cat/1.png", *(f"train/dög/{i}.png" for i in range(6))], [0, 1, 1, 1, 1, 1, 1]),
    Split.of(["test/x/1.png", "test/cat/1.png"], [OTHER, 0], [False, True], ["", "bent"]),
    per_category=True,
)
IMAGES = ImageList(LABELS, {split: hashes_of(LABELS.split(split).names) for split in SPLITS})


def row_of(image: str) -> dict[str, np.ndarray]:
    """What is made of an image."""
    rng = np.random.RandomState(int(image[:8], 16))
    return {name: rng.randn(*shape).astype(np.float16) for name, shape in SHAPES.items()}


def rows(images: list[str]) -> dict[str, np.ndarray]:
    found = [row_of(image) for image in images]
    return {name: np.array([row[name] for row in found]).reshape(-1, *SHAPES[name]) for name in SHAPES}


def add(folder: Path, *images: str, **fields) -> None:
    found = Store(folder)
    found.begin(FIELDS | fields)
    write_shard(folder, found.of, list(images), rows(list(images)))


def cached(folder: Path, listed: ImageList = IMAGES) -> FeatureCache:
    return FeatureCache(Store(folder), listed)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A store in three shards, its rows in another order than the images, with some of other images."""
    images = IMAGES.all_hashes[::-1]
    for part in (images[:4], [*images[4:6], *hashes_of(["other"])], images[6:]):
        add(tmp_path / "deep" / "store", *part)
    return tmp_path / "deep" / "store"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- the round trip
def test_round_trip(folder):
    cache = cached(folder)
    for split in SPLITS:
        for name, wanted in rows(IMAGES.hashes[split]).items():
            array = cache.arrays(split)[name]
            assert array.shape == wanted.shape and len(array) == len(wanted)
            assert (array[:] == wanted).all() and array[:].dtype == np.float16
    assert cache.meta["count"] == {"train": 7, "test": 2} and cache.meta["skipped"] == []
    assert content(cache.labels) == content(LABELS)
    assert (cache.arrays("train")["tokens"].semantic() == rows(IMAGES.hashes["train"])["tokens"][:, 0]).all()


def test_images_without_a_row_are_left_out(folder):
    hashes = {split: list(IMAGES.hashes[split]) for split in SPLITS}
    hashes["train"][1] = hashes["train"][4] = hashes["test"][1] = "unreadable"
    cache = cached(folder, ImageList(LABELS, hashes))
    assert cache.skipped == ["train/dög/0.png", "train/dög/3.png", "test/cat/1.png"] == cache.meta["skipped"]
    assert cache.labels.train.names == [LABELS.train.names[i] for i in (0, 2, 3, 5, 6)]
    kept = [IMAGES.hashes["train"][i] for i in (0, 2, 3, 5, 6)]
    assert (cache.arrays("train")["tokens"][:] == rows(kept)["tokens"]).all()
    assert len(cache.labels.one_class("dög")[0]) == 4


def test_meta_follows_images_labels_and_features(folder, tmp_path):
    """Not the images' names, and not the shards that they lie in."""
    content = cached(folder).meta["content"]
    add(tmp_path / "other", *IMAGES.all_hashes)
    assert cached(tmp_path / "other").meta == cached(folder).meta

    def content_of(train: Split, hashes: dict = IMAGES.hashes) -> str:
        listed = ImageList(Labels(LABELS.classes, train, LABELS.test, True), hashes)
        return cached(folder, listed).meta["content"]

    assert content_of(Split.of([f"x{i}" for i in range(7)], LABELS.train.category)) == content
    assert content_of(Split.of(LABELS.train.names, 1 - LABELS.train.category)) != content
    assert content_of(LABELS.train, IMAGES.hashes | {"train": IMAGES.hashes["train"][::-1]}) != content
    add(tmp_path / "third", *IMAGES.all_hashes, weights_sha256="other")
    assert cached(tmp_path / "third").meta["content"] != content
    with pytest.raises(UserError, match="third do not fit: weights_sha256 is other there, abc is wanted"):
        add(tmp_path / "third", weights_sha256="abc")


def test_a_store_of_which_nothing_is_left_takes_other_features(folder):
    again = {*IMAGES.all_hashes, *hashes_of(["other"])}
    Store(folder, again=again).begin(FIELDS | {"weights_sha256": "other"})
    assert Store(folder).fields["weights_sha256"] == "other" and not Store(folder).shards


# ---------------------------------------------------------------- lists of images
def test_lists_are_kept(tmp_path):
    listed = ImageList(LABELS, IMAGES.hashes, {"tiny auto": [32, 48]}, ["abc"])
    listed.write(tmp_path / "x.json")
    found = ImageList.read(tmp_path / "x.json")
    assert found is not None and found.content() == listed.content()
    assert found.fingerprint() == IMAGES.fingerprint()
    flip(tmp_path / "x.json", 40)
    assert ImageList.read(tmp_path / "x.json") is None, "damaged: made anew"


def test_a_store_of_this_format_reads_for_good():
    """tests/data/store-format-4 was written when the format was new: later versions must read it, or raise
    FORMAT and say so."""
    root = ROOT / "tests" / "data" / "store-format-4"
    listed = ImageList.read(root / "images.json")
    assert listed is not None and content(listed.labels) == content(LABELS)
    cache = FeatureCache(Store(root / "store"), listed)
    assert cache.skipped == []
    for split in SPLITS:
        assert (cache.arrays(split)["tokens"][:] == rows(listed.hashes[split])["tokens"]).all()


# ---------------------------------------------------------------- damage
def test_any_flipped_byte_is_found(folder, capsys):
    """At once, or, of rows, before one is used; what is then missing are the shard's own images."""
    for path in files_of(folder):
        for at in (0, 20, 70, path.stat().st_size // 2, -1):
            before = path.read_bytes()
            flip(path, at)
            capsys.readouterr()
            found = Store(folder, verified=set(IMAGES.all_hashes))
            told = capsys.readouterr().out
            if path.name == store.IDENTITY:
                assert not found.fields and not found.shards and "identity.json" in told
                found.begin(FIELDS)
                assert len(Store(folder).shards) == 3, "the shards know what they are of"
            elif path.read_bytes() != before and (told or path.name != store.RECORD):
                assert f"damaged shards in {folder}" in told and f": {path.parent.name}/{path.name}: " in told
                assert found.gone == [path.parent] and len(found.shards) == 2
            path.write_bytes(before)
    assert len(Store(folder).shards) == 3 and not capsys.readouterr().out


# ---------------------------------------------------------------- writing
def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    found, images = Store(tmp_path / "store"), hashes_of("ab")
    found.begin(FIELDS)
    good = rows(images)
    broken = good["tokens"].copy()
    broken[1, 2, 3] = np.inf
    with pytest.raises(UserError, match="not finite"):
        write_shard(found.folder, found.of, images, good | {"tokens": broken})
    write_shard(found.folder, found.of, images, good)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(found.folder, found.of, images, good)
    assert len(Store(found.folder).shards) == 1 and len(list(found.folder.iterdir())) == 2


def test_what_killed_writers_left_is_removed_after_a_while(folder):
    """What another process may still be writing is not."""
    for name in (".0123.host-1.partial", ".4567.host-1.partial"):
        (folder / name).mkdir()
        (folder / name / "tokens.npy").write_text("x")
    old = folder / ".0123.host-1.partial"
    store.os.utime(old, (0, 0))
    found = Store(folder)
    assert len(found.shards) == 3
    found.begin(FIELDS)
    assert [path.name for path in folder.glob(".*")] == [".4567.host-1.partial"]
