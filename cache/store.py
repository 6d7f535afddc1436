"""A store: the features that one backbone gives, of whatever images, in a folder of shards.

    features/                            the knob feature_path
        datasets/<data set>.json         the images of each data set (cache/feature_cache.py)
        <backbone, size, grid>-<hash>/   a store; the hash is of all that the features depend on
            identity.json                which features these are; sealed
            <random name>/               a shard (cache/shards.py)

An image is known by the hash of its bytes, and its features depend on it and on the identity alone. So what
is missing is what no shard names: growth, renaming, removal, copies, a second data set of the same pictures
and going on after a kill are no cases of their own. A damaged shard counts as missing."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import utils
from cache.shards import Damaged, Shard, read_shard, write_shard
from config import UserError
from shell.files import checksum, read_sealed, sweep, write_sealed

FORMAT = 4
IDENTITY = "identity.json"
EXAMPLE = "example"  # the field that holds what the backbone gave of a fixed picture
FARTHEST = {True: 0.02, False: 0.1}  # of its size, that machines may move it, where both compute in float32
ABANDONED = 3600  # seconds after which what a killed process has left half written is removed


class Store:
    """A store as it was when it was last looked at (``look``).

    fields: which features these are, flat, as JSON has them; empty where there are none yet. shards: the
    sound ones. damaged: the folders of the others. Raises UserError on a store of another version."""

    def __init__(self, folder: Path, verified: Iterable[str] = ()):
        self.folder = folder
        self.look(verified)

    def look(self, verified: Iterable[str] = ()) -> None:
        """See what there is: sizes of files are checked, of the shards that hold any of the images
        ``verified`` every byte. Damaged shards are told of."""
        self.fields: dict = {}
        path = self.folder / IDENTITY
        try:
            content = read_sealed(path)
            refuse_others(self.folder, content, {"format": FORMAT})
            self.fields = content["fields"]
        except FileNotFoundError:
            pass
        except ValueError as error:
            print(f"features: {path} is damaged ({error}); the next extraction mends it", flush=True)
        self.of, self.shards, damaged = identity_hash(self.fields), list[Shard](), {}
        thorough = set(verified)
        for folder in sorted(path for path in self.folder.glob("[!.]*") if path.is_dir()):
            try:
                shard = read_shard(folder, thorough)
            except Damaged as damage:
                damaged[folder] = f"{folder.name}/{damage}"
            else:
                self.shards += [shard] if shard.of == self.of else []
        self.damaged = list(damaged)
        if damaged:
            told = utils.first_named(list(damaged.values()), "; ")
            print(f"features: damaged shards in {self.folder}, which count as missing: {told}", flush=True)
        self._places: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(self.shards):
            for row, image in enumerate(shard.images):
                self._places.setdefault(image, (number, row))

    def find(self, images: list[str]) -> np.ndarray:
        """The number of the shard, and the row in it (n, 2), of images by their hashes; -1: nowhere."""
        found = [self._places.get(image, (-1, -1)) for image in images]
        return np.array(found, np.int64).reshape(-1, 2)

    def begin(self, fields: dict) -> None:
        """Make an empty store one of these features. Raises UserError where it is one of others."""
        if self.fields:
            refuse_others(self.folder, self.fields, fields)
        else:
            write_sealed(self.folder / IDENTITY, {"format": FORMAT, "fields": fields})
            self.look()

    def remove(self, folders: list[Path]) -> None:
        """Remove shards, with the last one the store's identity, and what was left half written long ago."""
        sweep(self.folder, ABANDONED)
        if not folders:
            return
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        self.look()
        if not self.shards and not self.damaged:
            (self.folder / IDENTITY).unlink(missing_ok=True)
            self.fields = {}

    def keep_only(self, images: set[str]) -> None:
        """Keep one row of each of these images; a shard that keeps some of its rows is written anew."""
        self.look(verified=images)
        gone, images = list(self.damaged), set(images)
        for shard in self.shards:
            rows = [i for i, image in enumerate(shard.images) if image in images]
            if len(rows) < len(shard.images):
                gone.append(shard.folder)
                if rows:
                    arrays = {name: np.load(file.path)[rows] for name, file in shard.files.items()}
                    write_shard(self.folder, self.of, [shard.images[i] for i in rows], arrays)
            images.difference_update(shard.images)  # which two processes may have written
        self.remove(gone)

    def size(self) -> int:
        """Bytes of the shards' files."""
        return sum(file.size for shard in self.shards for file in shard.files.values())


def identity_hash(fields: dict) -> str:
    """Which features these are, on whatever machine they were made."""
    return checksum({name: fields[name] for name in fields if name != EXAMPLE})[:16]


def refuse_others(folder: Path, recorded: dict, expected: dict) -> None:
    """Raise UserError that names the first of the ``expected`` fields that is another one in the store."""
    for field, value in expected.items():
        fault = None
        if field == EXAMPLE:
            fault = example_fault(recorded.get(field), value)
        elif recorded.get(field) != value:
            fault = f"{field} is {recorded.get(field, 'absent')} there, {value} is wanted"
        if fault:
            raise UserError(
                f"the features in {folder} do not fit: {fault}; delete that folder or give another "
                "--feature_path"
            )


def example_fault(recorded: dict | None, now: dict) -> str | None:
    """How far what the backbone gives of the fixed picture is from what it gave, where that is more than
    rounding; None where it is not, and where none was recorded."""
    if recorded is None:
        return None
    before, after = (np.array(example["values"], float) for example in (recorded, now))  # (arrays, numbers)
    far, exact = np.inf, all(example["precision"] == "float32" for example in (recorded, now))
    if after.shape == before.shape:
        sizes = np.linalg.norm(before, axis=1).clip(1e-9)
        far = (np.linalg.norm(after - before, axis=1) / sizes).max()
    told = (
        f"with timm {recorded['timm']} the backbone gave other features of a fixed picture than with timm "
        f"{now['timm']} now ({far:.0%} off): install timm {recorded['timm']}, or make the features again"
    )
    return told if far > FARTHEST[exact] else None
