"""The feature cache: its round trip, everything it refuses, and what it notices and mends."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import utils
from cache import cache_writer, manifest, shards
from cache.cache_writer import CacheWriter, lost_shards, reopen, start_again
from cache.feature_cache import CacheIdentity, FeatureCache, cache_folder
from cache.manifest import Manifest
from cache.shards import CachedArray, Damaged, StoredArray
from config import Config, UserError
from datasets import OTHER, SPLITS, Labels, Split
from reporting import report
from shell.locks import Lock

N, C = 3, 5
FIELDS = {
    "dataset": "folder",
    "extractor": "tiny",
    "timm_model": "tiny.in1k",
    "weights": "timm hub",
    "img_size": (32, 48),
    "norm_mean": (0.5, 0.5, 0.5),
    "norm_std": (0.25, 0.5, 0.5),
    "token_grid": "full",
    "window": None,
    "pooling": "correct",
}
FOUND = {
    "precision": "float32",
    "weights_sha256": "abc",
    "n_feat": C,
    "grid": (1, N),
    "tokens": 1 + N,
    "images": "def",
}
LABELS = Labels(
    ("cat", "dög"),
    Split.of(["train/cat/1.png", *(f"train/dög/{i}.png" for i in range(6))], [0, 1, 1, 1, 1, 1, 1]),
    Split.of(["test/x/1.png", "test/cat/1.png"], [OTHER, 0], [False, True], ["", "bent"]),
    per_category=True,
)
SHAPES = {"tokens": (1 + N, C), "bands": (2,)}
SHARDS = ["train-00000", "train-00001", "train-00002", "test-00000"]  # of three rows


def values() -> dict[str, dict[str, np.ndarray]]:
    """{array: {split: rows}}."""
    rng = np.random.RandomState(0)
    counts = {s: len(LABELS.split(s).names) for s in SPLITS}
    return {
        name: {s: rng.randn(n, *shape).astype(np.float16) for s, n in counts.items()}
        for name, shape in SHAPES.items()
    }


def rows_of(shard, skipped=()):
    """The rows of a shard, in two pieces."""
    rows = [i for i in range(shard.start, shard.stop) if i not in skipped]
    for piece in np.array_split(np.array(rows, int), 2):
        yield {name: splits[shard.split][piece] for name, splits in values().items()}


def writer(folder: Path, fields: dict = FIELDS | FOUND, **more) -> CacheWriter:
    return CacheWriter(folder, fields, LABELS, SHAPES, **{"shard_rows": 3, **more})


def write_cache(folder: Path, **more) -> Path:
    writer(folder, **more).fill(rows_of)
    return folder


def cached(folder: Path, fields: dict = FIELDS) -> FeatureCache:
    return FeatureCache(CacheIdentity(folder, fields))


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_cache(tmp_path / "deep" / "cache")


# ---------------------------------------------------------------- the round trip
def test_round_trip(folder):
    cache = cached(folder)
    for name, splits in values().items():
        for split, wanted in splits.items():
            array = cache.arrays(split)[name]
            assert array.shape == wanted.shape and len(array) == len(wanted)
            assert (array[:] == wanted).all() and array[:].dtype == np.float16
    assert cache.grid == (1, N) and cache.channels == C and cache.shapes == SHAPES
    assert cache.meta["count"] == {"train": 7, "test": 2} and cache.meta["skipped"] == []
    assert [p.name for p in folder.parent.iterdir()] == ["cache"]


def test_files_of_a_finished_cache(folder):
    files = [f"{name}.json" for name in SHARDS]
    files += [f"{s}-{a}-{n}.npy" for a in SHAPES for s, n in (name.split("-") for name in SHARDS)]
    assert sorted(content(folder)) == sorted(["manifest.json", "labels.json", *files])
    assert np.load(folder / "train-tokens-00002.npy").shape == (1, 1 + N, C), "any reader of .npy takes them"


INDICES = [
    *(
        slice(None),
        slice(2, 5),
        slice(3, 3),
        slice(5, 2),
        slice(None, None, 2),
        slice(-2, None),
        slice(6, 99),
    ),
    *(0, -1, np.array([6, 0, 6, 3, 2]), np.array([], int), np.array([-1, -7]), np.arange(7) % 2 == 0),
    np.array([[1, 5], [3, 0]]),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_is_numpys(folder, index):
    tokens, wanted = cached(folder).tokens("train"), values()["tokens"]["train"]
    assert tokens[index].shape == wanted[index].shape and (tokens[index] == wanted[index]).all()
    for outside in (np.array([7]), np.array([-8])):
        with pytest.raises(IndexError):
            tokens[outside]


def test_semantic_tokens(folder):
    assert (cached(folder).tokens("train").semantic() == values()["tokens"]["train"][:, 0]).all()


def test_rows_are_copies(folder):
    tokens = cached(folder).tokens("train")
    for index in (np.array([0]), slice(0, 1)):
        rows = tokens[index]
        rows[:] = 0
        assert (tokens[np.array([0])] != 0).any()


def test_more_shards_than_open_files(folder, monkeypatch):
    """The maps of a cache of thousands of shards are opened and closed as they are needed."""
    monkeypatch.setattr(shards, "OPEN_SHARDS", 1)
    tokens = cached(folder).tokens("train")
    for _ in range(2):
        assert (tokens[np.array([0, 6, 3])] == values()["tokens"]["train"][[0, 6, 3]]).all()
    assert tokens._open.cache_info().currsize == 1


def test_labels_are_kept(folder):
    found = cached(folder).labels
    assert found.fingerprint() == LABELS.fingerprint()
    for name in LABELS.classes:
        for got, wanted in zip(found.one_class(name), LABELS.one_class(name)):
            assert got.tolist() == wanted.tolist()


def test_rows_per_shard():
    """Files of about 128 to 256 MB, but no more rows than a slow backbone does in minutes."""
    assert shards.rows_per_shard({"tokens": (577, 768)}) == 256
    assert shards.rows_per_shard({"tokens": (65, 768), "bands": (10,)}) == 2048
    assert shards.rows_per_shard({"tokens": (2, 1280)}) == 4096
    assert shards.rows_per_shard({"tokens": (10**6, 1024)}) == 1


# ---------------------------------------------------------------- what does not fit
OTHERS = {
    "dataset": "digits",
    "extractor": "other",
    "timm_model": "other",
    "weights": "random, seed 0",
    "img_size": (48, 32),
    "norm_mean": (0.1, 0.5, 0.5),
    "norm_std": (0.5, 0.5, 0.5),
    "token_grid": "2",
    "window": 3,
    "pooling": "released",
    "precision": "bfloat16",
    "weights_sha256": "x",
    "n_feat": 7,
    "images": "x",
}


@pytest.mark.parametrize("field", OTHERS)
def test_the_field_that_differs_is_named(folder, field):
    cached(folder, FIELDS | FOUND)
    for attempt in (cached, writer):
        with pytest.raises(UserError, match=rf"{field} is .* there") as refused:
            attempt(folder, FIELDS | FOUND | {field: OTHERS[field]})
        assert str(folder) in str(refused.value)


def test_every_field_of_a_configuration_is_checked(tmp_path):
    """None of what extractor.py asks for may differ unseen."""
    from backbone.identity import cache_identity

    asked = cache_identity(Config(extractor="efficientnet_lite0", precision="float32")).fields
    assert len(asked) >= len(FIELDS)
    write_cache(tmp_path / "cache", fields=FOUND | asked)
    cached(tmp_path / "cache", asked)
    for field in asked:
        with pytest.raises(UserError, match=rf"{field} is .* there"):
            cached(tmp_path / "cache", asked | {field: "something else"})


def test_a_cache_of_the_earlier_format_is_refused(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({"format": 2, "finished": True}))
    for attempt in (cached, writer):
        with pytest.raises(UserError, match="earlier version.*delete that folder"):
            attempt(tmp_path, FIELDS)
    assert [p.name for p in tmp_path.iterdir()] == ["meta.json"]


def test_a_cache_of_a_later_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr(manifest, "CACHE_FORMAT", manifest.CACHE_FORMAT + 1)
    with pytest.raises(UserError, match="format 3, this version reads 4"):
        cached(folder)


def test_a_manifest_of_this_format_reads_for_good():
    """tests/data/cache-format-3 was written when the format was new: later versions must read it, or raise
    CACHE_FORMAT and say so."""
    cache = cached(ROOT / "tests" / "data" / "cache-format-3")
    assert cache.all_labels.fingerprint() == LABELS.fingerprint() and cache.skipped == ["train/dög/1.png"]
    wanted = np.delete(values()["tokens"]["train"], 2, 0)
    assert (cache.tokens("train")[:] == wanted).all() and cache.meta["count"] == {"train": 6, "test": 2}


@pytest.mark.parametrize("there", ["a file", "other files", "a cache's file and others"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path, there):
    place = tmp_path / "x"
    if there == "a file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "thesis.tex").write_text("mine")
        if there != "other files":
            (place / "labels.json").write_text("{}")
    before = content(tmp_path)
    with pytest.raises((UserError, FileExistsError)):
        writer(place)
    assert content(tmp_path) == before


def test_cache_folder():
    """One folder per data set, backbone, size and grid, unless the user names it."""
    base = Config(dataset="digits", extractor="hf_hub:x/y")
    folder = cache_folder(base, (32, 48), "full")
    assert folder.parent == Path("features") and "/" not in folder.name
    others = {
        cache_folder(base, (48, 32), "full"),
        cache_folder(base, (32, 48), "2"),
        *(
            cache_folder(dataclasses.replace(base, **change), (32, 48), "full")
            for change in (
                {"dataset": "folder"},
                {"dataset": "folder", "dataset_path": "a/bolt"},
                {"dataset": "folder", "dataset_path": "b/bolt"},
                {"extractor": "other"},
            )
        ),
    }
    assert len(others | {folder}) == 7
    assert cache_folder(dataclasses.replace(base, feature_path="/x/y"), (32, 48), "full") == Path("/x/y")


# ---------------------------------------------------------------- going on
class Stop(Exception):
    pass


def stopped_after(count: int):
    """Features that end in an error after so many shards, in the middle of the next."""
    done = []

    def features(shard, skipped):
        rows = rows_of(shard)
        yield next(rows)
        if len(done) == count:
            raise Stop
        done.append(shard)
        yield from rows

    return features


@pytest.mark.parametrize("count", range(4))
def test_goes_on_from_the_last_finished_shard(tmp_path, folder, count):
    """And ends with the bytes of an uninterrupted run."""
    place, made = tmp_path / "cache", []
    with pytest.raises(Stop):
        writer(place).fill(stopped_after(count))
    with pytest.raises(UserError, match="not finished.*python extractor.py"):
        cached(place)
    again = writer(place)
    assert f"{count} of 4 shards are kept" in again.kept()
    assert [s.name for s in again.missing()] == SHARDS[count:]
    again.fill(lambda shard, skipped: (made.append(shard.name), rows_of(shard))[1])
    assert made == SHARDS[count:] and content(place) == content(folder)


def test_a_finished_cache_is_not_touched(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    writer(folder).fill(lambda shard, skipped: pytest.fail("made again"))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_shard_rows_are_those_of_the_cache(tmp_path, folder):
    with pytest.raises(Stop):
        writer(tmp_path / "cache").fill(stopped_after(1))
    writer(tmp_path / "cache", shard_rows=2).fill(rows_of)
    assert content(tmp_path / "cache") == content(folder)


def test_ranks_make_the_same_bytes(tmp_path, folder):
    """Each begins at its own shards, and finishes what the others leave."""
    for size in (2, 5):
        place = tmp_path / str(size)
        order = []
        with pytest.raises(Stop):
            writer(place).fill(stopped_after(1), utils.Ranks(1, size))
        writer(place).fill(
            lambda shard, skipped: (order.append(shard.name), rows_of(shard))[1], utils.Ranks(0, size)
        )
        assert order[0] == SHARDS[0] and SHARDS[1] not in order
        assert content(place) == content(folder)


def test_a_shard_in_work_elsewhere_is_waited_for_and_taken_over(tmp_path, folder, capsys):
    place = tmp_path / "cache"
    other = Lock(place / ".train-00001.lock")
    made = []

    def features(shard, skipped):
        made.append(shard.name)
        if len(made) == 3:
            other.release()  # its process has ended
        return rows_of(shard)

    first = writer(place)
    assert other.take()
    first.fill(features)
    assert made == [SHARDS[0], SHARDS[2], SHARDS[3], SHARDS[1]] and content(place) == content(folder)


def test_what_another_process_has_finished_is_taken(tmp_path, folder):
    place = tmp_path / "cache"
    first, second = writer(place), writer(place)
    first.fill(rows_of)
    second.fill(lambda shard, skipped: pytest.fail("made again"))
    assert content(place) == content(folder)


def test_leftovers_of_killed_writers_are_removed(tmp_path, folder):
    place = tmp_path / "cache"
    place.mkdir()
    for name in (
        ".manifest.json.host-1.partial",
        ".train-tokens-00001.npy.host-1.partial",
        ".train-00001.json.host-1.partial",
        ".train-00002.lock",
        ".lock",
        "train-00000.unreadable.json",
    ):
        (place / name).write_text("x")
    write_cache(place)
    assert content(place) == content(folder)


def test_leftovers_of_finished_shards_are_removed_too(tmp_path, folder):
    """A process may be killed between a shard's record and the release of its lock."""
    place = tmp_path / "cache"
    with pytest.raises(Stop):
        writer(place).fill(stopped_after(2))
    for name in (".train-00000.lock", ".train-tokens-00001.npy.host-1.partial"):
        (place / name).write_text("x")
    write_cache(place)
    assert content(place) == content(folder)


def test_foreign_files_stay(folder):
    """Whatever happens to a cache, files that the program did not write are left as they are."""
    (folder / "notes").mkdir()
    mine = [
        folder / "notes" / "a.txt",
        folder / ".hidden",
        folder / "train-thoughts.npy",
        folder / "tokens.json",
    ]
    for path in mine:
        path.write_text("mine")
    flip(folder / "train-tokens-00000.npy", -1)
    reopen(folder, seen := Manifest.read(folder), lost_shards(folder, seen, None, thorough=True))
    write_cache(folder)
    start_again(folder)
    write_cache(folder)
    assert all(path.read_text() == "mine" for path in mine)


def test_a_folder_that_is_a_link_stays_one(tmp_path, folder):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lost+found").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    write_cache(tmp_path / "cache")
    assert (tmp_path / "cache").is_symlink() and content(tmp_path / "elsewhere") == content(folder)


def test_what_lies_beside_a_finished_cache_is_put_in_order(folder):
    before = content(folder)
    for name in (
        ".train-tokens-00001.npy.host-1.partial",
        ".train-00002.lock",
        "train-00000.unreadable.json",
    ):
        (folder / name).write_text("x")
    (folder / "test-00000.json").unlink()
    cache_writer.restore(folder, Manifest.read(folder))
    assert content(folder) == before


def test_start_again(folder):
    before, made = content(folder), []
    start_again(folder)
    with pytest.raises(UserError, match="not finished"):
        cached(folder)
    writer(folder).fill(lambda shard, skipped: (made.append(shard.name), rows_of(shard))[1])
    assert made == SHARDS and content(folder) == before


def test_start_again_beside_a_writer_is_refused(folder):
    other = Lock(folder / ".train-00001.lock")
    other.take()
    with pytest.raises(UserError, match=r"being written to by process \d+"):
        start_again(folder)
    other.release()
    cached(folder)


# ---------------------------------------------------------------- unreadable images
BAD = {("train", 1), ("train", 4), ("test", 1)}


def with_bad(shard, skipped):
    skipped += [i for i in range(shard.start, shard.stop) if (shard.split, i) in BAD]
    return rows_of(shard, skipped)


def test_unreadable_images_are_all_named_and_the_rest_is_kept(tmp_path, monkeypatch, capsys):
    """In the one line of the mistake, or, where they are more, a line each before it."""
    names = "train/dög/0.png", "train/dög/3.png", "test/cat/1.png"
    with pytest.raises(UserError, match="3 unreadable images") as stopped:
        writer(tmp_path / "cache").fill(with_bad)
    for name in (*names, "1 of 4 shards are kept"):
        assert name in str(stopped.value)
    assert not capsys.readouterr().err
    monkeypatch.setattr(utils, "MOST_NAMED", 2)
    with pytest.raises(UserError, match="3 unreadable images: .* and others"):
        writer(tmp_path / "other").fill(with_bad)
    assert set(capsys.readouterr().err.splitlines()) == set(names)


def test_repaired_images_cost_their_shards_only(tmp_path, folder):
    place, made = tmp_path / "cache", []
    with pytest.raises(UserError, match="unreadable"):
        writer(place).fill(with_bad)
    writer(place).fill(lambda shard, skipped: (made.append(shard.name), rows_of(shard))[1])
    assert made == [SHARDS[0], SHARDS[1], SHARDS[3]] and content(place) == content(folder)


def test_skipped_images_have_no_row(tmp_path):
    place = tmp_path / "cache"
    writer(place, skip=True).fill(with_bad)
    cache = cached(place)
    assert cache.skipped == ["train/dög/0.png", "train/dög/3.png", "test/cat/1.png"]
    assert cache.meta["count"] == {"train": 5, "test": 1} and cache.meta["skipped"] == cache.skipped
    assert cache.image_rows("train").tolist() == [0, 2, 3, 5, 6]
    assert cache.labels.train.names == [LABELS.train.names[i] for i in cache.image_rows("train")]
    assert (cache.tokens("train")[:] == values()["tokens"]["train"][[0, 2, 3, 5, 6]]).all()
    assert len(cache.labels.one_class("dög")[0]) == 4


def test_reports_name_the_images_that_are_left_out():
    for count in (0, 2, 30):
        features = {"skipped": [f"train/cat/{i}.png" for i in range(count)]}
        summary = {
            "config": vars(Config()),
            "seeds": [0],
            "baselines": {},
            "classes": {},
            "mean": {"auroc": 0.5},
        }
        told = " ".join(report.notes(summary | {"features": features}))
        assert (f"Left out: {count} unreadable images: train/cat/0.png, " in told) is (count > 0)
        assert ("and others" in told) is (count == 30)


def test_a_shard_of_unreadable_images_alone(tmp_path):
    def features(shard, skipped):
        if shard.split == "test":
            skipped += [0, 1]
            return iter(())
        return rows_of(shard)

    writer(tmp_path / "cache", skip=True).fill(features)
    cache = cached(tmp_path / "cache")
    assert cache.tokens("test")[:].shape == (0, 1 + N, C) and len(cache.tokens("train")) == 7


def test_skipped_images_are_asked_for_again_unless_they_may_be_skipped(tmp_path):
    with pytest.raises(Stop):
        writer(tmp_path / "cache", skip=True).fill(
            lambda shard, skipped: (
                with_bad(shard, skipped) if shard.number == 0 else stopped_after(0)(shard, skipped)
            )
        )
    assert "1 of 4" in writer(tmp_path / "cache", skip=True).kept()
    assert "0 of 4" in writer(tmp_path / "cache").kept()


# ---------------------------------------------------------------- damage
DATA = [
    name
    for name in SHARDS
    for name in (f"{name[:-6]}-tokens{name[-6:]}.npy", f"{name[:-6]}-bands{name[-6:]}.npy")
]


def read_all(folder: Path) -> None:
    cache = cached(folder)
    for split in SPLITS:
        for array in cache.arrays(split).values():
            array[:]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("at", [0, 20, 70, 127, 128, -1])
def test_a_flipped_bit_is_found_and_its_shard_alone_made_again(folder, name, at):
    before, made = content(folder), []
    flip(folder / name, at)
    with pytest.raises(Damaged, match=rf"{name} are damaged.*python extractor.py with the same settings"):
        read_all(folder)
    lost = lost_shards(folder, seen := Manifest.read(folder), None, thorough=True)
    reopen(folder, seen, lost)
    writer(folder).fill(lambda shard, skipped: (made.append(shard.name), rows_of(shard))[1])
    assert made == [s.name for s in lost] and len(made) == 1 and content(folder) == before


def test_damage_is_found_before_a_row_is_used(folder):
    """Whichever way the rows are read."""
    flip(folder / "train-tokens-00001.npy", -1)
    tokens = cached(folder).tokens("train")
    tokens[:3]
    for read in (lambda: tokens[3:4], lambda: tokens[np.array([4])], tokens.semantic):
        with pytest.raises(Damaged, match="checksum"):
            read()


def test_a_file_is_checked_once_in_a_process(folder, monkeypatch):
    calls, check = [], StoredArray.full_damage
    monkeypatch.setattr(
        StoredArray, "full_damage", lambda self: (calls.append(self.path.name), check(self))[1]
    )
    for _ in range(2):
        cached(folder).tokens("train")[np.array([0, 5, 1])]
    assert sorted(calls) == ["train-tokens-00000.npy", "train-tokens-00001.npy"]


@pytest.mark.parametrize("keep", [0, 40, 128, -1, -C * 2])
def test_cut_files_are_found_at_once(folder, keep):
    path = folder / "train-tokens-00000.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Damaged, match="train-tokens-00000.npy"):
        cached(folder)
    assert [s.name for s in lost_shards(folder, Manifest.read(folder), None, thorough=False)] == [
        "train-00000"
    ]


def test_missing_files_are_found_at_once(folder):
    (folder / "test-bands-00000.npy").unlink()
    with pytest.raises(Damaged, match="test-bands-00000.npy"):
        cached(folder)


@pytest.mark.parametrize("change", ["zeroed", "reordered", "swapped files"])
def test_rows_that_are_not_where_they_were(folder, change):
    path = folder / "train-tokens-00000.npy"
    rows = np.load(path)
    if change == "swapped files":
        shutil.copy(folder / "train-tokens-00001.npy", path)
    else:
        np.save(path, np.zeros_like(rows) if change == "zeroed" else rows[::-1].copy())
    with pytest.raises(Damaged, match="train-tokens-00000.npy"):
        read_all(folder)


def test_values_that_are_not_finite(folder):
    """They cannot be written; in a file with the right checksum they are found all the same."""
    for value in (np.nan, np.inf, -np.inf):
        assert not shards.finite(np.array([0, value], np.float16))
    assert shards.finite(np.array([65504, -65504, 6e-8], np.float16)) and shards.finite(
        np.zeros(0, np.float16)
    )
    with pytest.raises(UserError, match="not finite"):
        writer(folder.parent / "new").fill(
            lambda shard, skipped: (
                {n: v * np.float16("nan") for n, v in rows.items()} for rows in rows_of(shard)
            )
        )
    path = folder / "train-bands-00000.npy"
    rows = np.load(path)
    rows[0] = np.nan
    np.save(path, rows)
    good = Manifest.read(folder).records["train-00000"]
    crc = f"{shards.zlib.crc32(rows.tobytes()):08x}"
    stored = StoredArray(path, rows.shape, good["files"]["bands"]["bytes"], crc)
    with pytest.raises(Damaged, match="NaN"):
        stored.open()


@pytest.mark.parametrize("name", ["manifest.json", "labels.json"])
def test_any_changed_byte_of_the_sidecars_is_noticed(folder, name):
    whole = (folder / name).read_bytes()
    for at in range(0, len(whole), 41):
        flip(folder / name, at)
        with pytest.raises(UserError):
            cached(folder)
        (folder / name).write_bytes(whole)
    cached(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"format": 3}', "[" * 100_000, '{"format": [2]}']
)
@pytest.mark.parametrize("name", ["manifest.json", "labels.json", "train-00000.json"])
def test_sidecars_of_other_content(folder, name, text):
    """One line, and the shards are not lost."""
    before = content(folder)
    (folder / name).write_text(text)
    if name == "train-00000.json":  # a finished cache is read without it
        cache_writer.restore(folder, Manifest.read(folder))
    else:
        with pytest.raises(UserError):
            cached(folder)
        if name == "labels.json":
            reopen(folder, Manifest.read(folder), [])
        elif text == '{"format": [2]}':
            return  # another version's: not to be touched
        writer(folder).fill(lambda shard, skipped: pytest.fail("made again"))
    assert content(folder) == before


@pytest.mark.parametrize("text", [None, "damaged"])
def test_shards_without_a_manifest_are_known_by_their_records(folder, text):
    """Those of other features are neither taken nor replaced; those of the same are taken."""
    before, path = content(folder), folder / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match="of other settings.*restart"):
        writer(folder, fields=FIELDS | FOUND | {"precision": "bfloat16"})
    writer(folder).fill(lambda shard, skipped: pytest.fail("made again"))
    assert content(folder) == before


def test_reversed_labels_and_permuted_classes_are_noticed(folder):
    labels = json.loads((folder / "labels.json").read_text())
    labels["classes"] = labels["classes"][::-1]
    (folder / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(Damaged, match="labels"):
        cached(folder)


def test_a_cache_that_was_finished_meanwhile_is_not_reopened(folder):
    """By a process that saw an earlier state of it."""
    seen = Manifest.read(folder)
    first = seen.shards[0]
    reopen(folder, seen, [first])
    key = {first: "other images"}
    writer(folder, part_key=lambda shard: key.get(shard, "")).fill(lambda shard, skipped: rows_of(shard))
    before = content(folder)
    reopen(folder, seen, seen.shards)
    assert content(folder) == before and Manifest.read(folder).finished


def test_a_changed_kind_is_noticed(folder):
    """Sealed again without the fields' own knowledge, a changed field is one that does not fit."""
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"precision": "float32"', '"precision": "float16"'))
    with pytest.raises(Damaged, match="checksum differs"):
        cached(folder)


def test_changed_images_cost_their_shards_only(tmp_path):
    keys = {name: name for name in SHARDS}
    place, made = tmp_path / "cache", []
    write_cache(place, part_key=lambda shard: keys[shard.name])
    keys["train-00001"] = "other"
    lost = lost_shards(place, seen := Manifest.read(place), lambda shard: keys[shard.name], thorough=False)
    assert lost == {cached(place).manifest.shards[1]: cache_writer.CHANGED}
    reopen(place, seen, lost)
    writer(place, part_key=lambda shard: keys[shard.name]).fill(
        lambda shard, skipped: (made.append(shard.name), rows_of(shard))[1]
    )
    assert made == ["train-00001"]
    cached(place)


def test_content_follows_the_rows(folder, tmp_path):
    other = tmp_path / "other"
    writer(other).fill(
        lambda shard, skipped: ({n: v + 1 for n, v in rows.items()} for rows in rows_of(shard))
    )
    one, two = cached(folder).meta, cached(other).meta
    assert one.pop("content") != two.pop("content") and one == two


def test_wrong_rows_are_refused(tmp_path):
    """A caller's mistake, not a user's."""
    for wrong in (
        {"tokens": np.zeros((3, 1 + N, C), np.float32), "bands": np.zeros((3, 2), np.float16)},
        {"tokens": np.zeros((3, N, C), np.float16), "bands": np.zeros((3, 2), np.float16)},
        {"tokens": np.zeros((3, 1 + N, C), np.float16), "bands": np.zeros((2, 2), np.float16)},
        {"tokens": np.zeros((2, 1 + N, C), np.float16), "bands": np.zeros((2, 2), np.float16)},
        {"tokens": np.zeros((3, 1 + N, C), np.float16)},
    ):
        with pytest.raises(ValueError, match="expected"):
            writer(tmp_path / "cache").fill(lambda shard, skipped: iter([wrong]))  # noqa: B023
    assert not list((tmp_path / "cache").glob("*.npy*")) and not list((tmp_path / "cache").glob(".*partial"))


def test_a_disk_that_loses_what_was_written_ends_the_work(tmp_path, monkeypatch):
    """Instead of making the same shard for ever."""
    monkeypatch.setattr(shards.ArrayWriter, "put", lambda self: None)
    with pytest.raises(UserError, match="train-00000 in .* is not there as it was written; check the disk"):
        writer(tmp_path / "cache").fill(rows_of)


def test_an_array_without_shards():
    assert CachedArray([], (2, 3))[:].shape == (0, 2, 3)
