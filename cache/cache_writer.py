"""Writing a feature cache, by one process or several at once, from where the last one was stopped."""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

import utils
from cache import shards
from cache.manifest import LEFT_OVER, RECORD, Manifest, has_features
from cache.shards import ArrayWriter, Damaged, Shard
from config import UserError
from datasets import SPLITS, Labels
from shell.files import (
    as_strict_json,
    read_json,
    read_sealed,
    sha256_of_text,
    sync,
    write_json,
    write_sealed,
    write_text,
)
from shell.locks import Lock

ShardFeatures = Callable[[Shard, list[int]], Iterator[dict[str, np.ndarray]]]


class CacheWriter:
    """A cache in the making. Goes on with what the folder holds of the same features; any number of processes
    may do so at once. Raises UserError when the folder holds other features.

    shapes: of each array, per image. shard_rows: of a new cache; 0: files of a good size. part_key: what the
    images of a shard are known by. skip: unreadable images are left out instead of leaving their shard
    unfinished."""

    def __init__(
        self,
        folder: Path,
        fields: dict,
        labels: Labels,
        shapes: dict[str, tuple[int, ...]],
        shard_rows: int = 0,
        part_key: Callable[[Shard], str] = lambda shard: "",
        skip: bool = False,
    ):
        self.folder, self.labels, self.part_key, self.skip = folder, labels, part_key, skip
        self._records: dict[str, dict] = {}
        folder.mkdir(parents=True, exist_ok=True)
        text, rows = json.dumps(labels.as_json()), shard_rows or shards.rows_per_shard(shapes)
        images = {split: len(labels.split(split).names) for split in SPLITS}
        new = Manifest(as_strict_json(fields), sha256_of_text(text), images, shapes, rows)
        with Lock(folder / ".lock"):
            for name in ("manifest.json", "labels.json"):
                shards.remove_partials(folder, name)
            self.manifest = self._joined(new)
            if not self.manifest.finished:
                self.manifest.write(folder)
                write_text(folder / "labels.json", text)
            for shard in self.manifest.shards:
                self._note(shard).unlink(missing_ok=True)

    def _joined(self, new: Manifest) -> Manifest:
        """The folder's own manifest, or the new one; an unfinished one takes the images as they are now."""
        try:
            found = Manifest.read(self.folder) if has_features(self.folder) else None
        except Damaged:
            found = None
        if found is None:
            self._refuse_others(new)
            return new
        if found.finished:
            found.refuse_others(self.folder, new.fields)
            return found
        if finished_records(self.folder):  # without one there is nothing that others could be mixed into
            found.refuse_other_features(self.folder, new.fields)
        joined = dataclasses.replace(new, shard_rows=found.shard_rows)
        self._refuse_others(joined)
        for shard in set(found.shards) - set(joined.shards):
            (self.folder / f"{shard.name}.json").unlink(missing_ok=True)
            if shard.name not in {kept.name for kept in joined.shards}:  # of images that are no longer there
                for array in found.shapes:
                    shard.file(self.folder, array).unlink(missing_ok=True)
        return joined

    def _refuse_others(self, joined: Manifest) -> None:
        """Raise UserError when there are finished shards, but none of these features and of the images as
        they are now: the folder, or the images, may be the wrong ones."""
        there = [shard for shard in joined.shards if self._recorded(shard, joined) is not None]
        recorded = finished_records(self.folder)
        if recorded and not there:
            raise UserError(
                f"the {len(recorded)} finished shards in {self.folder} are of other images than those now "
                f"there, or of other settings; give another --feature_path, or python extractor.py --restart "
                f"to replace them"
            )

    # ------------------------------------------------------------ what is there
    def missing(self) -> list[Shard]:
        """The shards that no process has finished yet, in order."""
        if self.manifest.finished:
            return []
        return [shard for shard in self.manifest.shards if self._record(shard) is None]

    def kept(self) -> str:
        """How much of the cache is there, in words."""
        total = len(self.manifest.shards)
        return f"{total - len(self.missing())} of {total} shards are kept in {self.folder}"

    def _record(self, shard: Shard) -> dict | None:
        """The record of a shard that is finished, as it is wanted and with its files; None without one."""
        if shard.name not in self._records:
            record = self._recorded(shard, self.manifest)
            if record is None or record["skipped"] and not self.skip:
                return None
            if any(stored.damage() for stored in self.manifest.stored(self.folder, shard, record).values()):
                return None
            self._records[shard.name] = record
        return self._records[shard.name]

    def _recorded(self, shard: Shard, manifest: Manifest) -> dict | None:
        """The record of a shard, if it is of these features and of the images as they are now."""
        try:
            record = read_sealed(self.folder / f"{shard.name}.json")
            return record if record["of"] == self._of(shard, manifest) else None
        except (OSError, ValueError, KeyError):
            return None

    def _of(self, shard: Shard, manifest: Manifest) -> dict:
        """The features, images and rows that a shard's record must name for the shard to be kept."""
        return {
            "features": manifest.features_sha256,
            "images": self.part_key(shard),
            "rows": [shard.start, shard.stop],
        }

    def _note(self, shard: Shard) -> Path:
        return self.folder / f"{shard.name}.unreadable.json"

    def _lock(self, shard: Shard) -> Lock:
        return Lock(self.folder / f".{shard.name}.lock")

    # ------------------------------------------------------------ making it
    def fill(
        self,
        features: ShardFeatures,
        ranks: utils.Ranks = utils.ALONE,
        advance: Callable[[int], object] = lambda images: None,
        at_once: int = 1,
    ) -> None:
        """Write the shards that are missing, beginning with this rank's, and finish the cache when all are
        there; what another process has in work is waited for, and taken over if that process ends.

        features(shard, skipped) gives a shard's rows in order and adds the images that it leaves out to
        ``skipped``. advance: called with the number of images done. at_once: shards in work at a time, above
        one each by a thread of its own, which asks for its features. Raises UserError that names all
        unreadable images, unless they are to be skipped, after everything else is done."""
        told = False
        while missing := self.missing():
            todo = [shard for shard in missing if not self._note(shard).exists()]
            if not todo:
                self._refuse_unreadable(missing)
            work, mine = partial(self._work, features=features, advance=advance), ranks.own_first(todo)
            if at_once == 1:
                worked = [work(shard) for shard in mine]
            else:
                with utils.thread_pool(at_once) as pool:
                    worked = list(pool.map(work, mine))
            if not any(worked):
                if not told:
                    print(f"waiting for {todo[0].name}, in work by {self._lock(todo[0]).owner()}", flush=True)
                told = True
                time.sleep(0.2)
        self.finish()

    def _work(self, shard: Shard, features: ShardFeatures, advance: Callable[[int], object]) -> bool:
        """Write a shard that no other process has written meanwhile. False: another one has it in work."""
        lock = self._lock(shard)
        if self._record(shard) is None:
            if not lock.take():
                return False
            try:
                if self._record(shard) is None and not self._note(shard).exists():
                    skipped: list[int] = []
                    self._write(shard, features(shard, skipped), skipped)
                    if self._record(shard) is None and not self._note(shard).exists():
                        raise UserError(
                            f"{shard.name} in {self.folder} is not there as it was written; check the disk"
                        )
            finally:
                lock.release()
        advance(shard.stop - shard.start)
        return True

    def _write(self, shard: Shard, features: Iterator[dict[str, np.ndarray]], skipped: list[int]) -> None:
        """The files of a shard, each beside its place until all are on the disk; then its record."""
        for name in [
            *(shard.file(self.folder, name).name for name in self.manifest.shapes),
            f"{shard.name}.json",
        ]:
            shards.remove_partials(self.folder, name)
        writers = {
            name: ArrayWriter(shard.file(self.folder, name), shape)
            for name, shape in self.manifest.shapes.items()
        }
        try:
            rows = _append_all(writers, features)
            if rows != shard.stop - shard.start - len(skipped):
                raise ValueError(f"expected the rows of {shard} but for {skipped}, got {rows}")
            if skipped and not self.skip:
                write_json(self._note(shard), skipped)
                return
            files = {name: writer.flush() for name, writer in writers.items()}
            for writer in writers.values():
                writer.put()
            sync(self.folder)
            record = {"of": self._of(shard, self.manifest), "rows": rows, "skipped": skipped, "files": files}
            write_sealed(self.folder / f"{shard.name}.json", record)
        finally:
            for writer in writers.values():
                writer.abandon()

    def _refuse_unreadable(self, missing: list[Shard]) -> NoReturn:
        """Raise UserError that names the unreadable images of these shards; all of them are listed before it
        where they are more than its line holds."""
        names = []
        for shard in missing:
            for i in read_json(self._note(shard)):
                names.append(self.labels.split(shard.split).names[i])
        if len(names) > utils.MOST_NAMED:
            print(*names, sep="\n", file=sys.stderr)
        shown = utils.first_named(names)
        count = utils.counted(len(names), "unreadable image")
        raise UserError(
            f"{count}: {shown}; repair them or take them out, or leave them out with "
            f"--unreadable skip; {self.kept()}"
        )

    def finish(self) -> None:
        """Write the manifest that makes the cache whole."""
        with Lock(self.folder / ".lock"):
            if self.manifest.finished or Manifest.read(self.folder).finished:
                return
            if not self.missing():
                tidy(self.folder)
                records = {shard.name: self._records[shard.name] for shard in self.manifest.shards}
                dataclasses.replace(self.manifest, records=records, finished=True).write(self.folder)


def finished_records(folder: Path) -> list[Path]:
    """The records of shards, of whatever features."""
    return [path for path in folder.iterdir() if RECORD.fullmatch(path.name)]


def _append_all(writers: dict[str, ArrayWriter], features: Iterator[dict[str, np.ndarray]]) -> int:
    """Append features to the files -> the number of rows. Writing overlaps with computing: one write may be
    pending. Raises ValueError when the arrays differ in their rows."""

    def append(rows: dict[str, np.ndarray]) -> None:
        if rows.keys() != writers.keys() or len({len(values) for values in rows.values()}) != 1:
            raise ValueError(f"expected as many rows of {list(writers)}, got {list(rows)}")
        for name, values in rows.items():
            writers[name].append(values)

    with utils.thread_pool(1) as pool:
        for _ in utils.in_order(pool, append, features, 1):
            pass
    return next(iter(writers.values())).rows


# ---------------------------------------------------------------- doing shards again
CHANGED = "its images have changed"


def lost_shards(
    folder: Path, manifest: Manifest, part_key: Callable[[Shard], str] | None, thorough: bool
) -> dict[Shard, str]:
    """The shards of a finished cache that must be made again, and why: damaged files or, with ``part_key``,
    images that have changed. thorough: by the checksum of every row, else by sizes and headers."""
    lost = {}
    for shard in manifest.shards:
        record = manifest.records[shard.name]
        told = []
        for stored in manifest.stored(folder, shard, record).values():
            damage = stored.full_damage() if thorough else stored.damage()
            told += [f"{stored.path.name}: {damage}"] if damage else []
        if part_key and record["of"]["images"] != part_key(shard):
            told.append(CHANGED)
        if told:
            lost[shard] = "; ".join(told)
    return lost


def tidy(folder: Path) -> None:
    """Remove what killed writers have left in a cache that has all its shards, under its lock."""
    for path in folder.iterdir():
        if LEFT_OVER.fullmatch(path.name):
            if path.suffix != ".lock":
                path.unlink(missing_ok=True)
            elif (lock := Lock(path)).take():
                lock.release()


def restore(folder: Path, manifest: Manifest) -> None:
    """Put what lies beside the rows of a finished cache in order: records that are gone or were changed,
    from the manifest, and leftovers."""
    with Lock(folder / ".lock"):
        restore_records(folder, manifest)
        tidy(folder)


def restore_records(folder: Path, manifest: Manifest) -> None:
    for name, record in manifest.records.items():
        path = folder / f"{name}.json"
        try:
            same = read_sealed(path) == record
        except (OSError, ValueError):
            same = False
        if not same:
            write_sealed(path, record)


def reopen(folder: Path, seen: Manifest, lost: Iterable[Shard]) -> None:
    """Make a finished cache, as it was ``seen``, an unfinished one that lacks some of its shards. Their files
    stay until new ones take their place."""
    with Lock(folder / ".lock"):
        manifest = Manifest.read(folder)
        if manifest != seen:  # another process was quicker
            return
        restore_records(folder, manifest)
        for shard in lost:
            (folder / f"{shard.name}.json").unlink(missing_ok=True)
        dataclasses.replace(manifest, records={}, finished=False).write(folder)


def start_again(folder: Path) -> None:
    """Make a cache, finished or not, one that has everything still to do. Raises UserError while another
    process writes to it."""
    with Lock(folder / ".lock"):
        for lock in folder.glob(".*-*.lock"):
            if (busy := Lock(lock)).take():
                busy.release()
            else:
                raise UserError(f"restart: {folder} is being written to by {busy.owner()}; end that first")
        with contextlib.suppress(Damaged):
            manifest = Manifest.read(folder)
            dataclasses.replace(manifest, records={}, finished=False).write(folder)
        for path in finished_records(folder):
            path.unlink()
