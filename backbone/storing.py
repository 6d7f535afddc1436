"""Images whose features are missing -> shards of a store, by this process or by those of an executor."""

import dataclasses
import functools
import itertools
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import datasets
import utils
from backbone.extraction import Extraction, arriving
from backbone.identity import cache_identity
from cache.shards import write_shard
from cache.store import Store
from config import Config, UserError
from shell.command_line import to_go_on
from shell.engine import outcomes
from shell.signals import Interrupted

SHARD_ROWS, SHARD_SECONDS = 256, 30.0  # of one shard, at most: what a kill costs

Batch = tuple[list[int], dict[str, np.ndarray]]  # numbers of images, and their rows of each array


class Wanted(NamedTuple):
    """An image whose features are missing: its split, its name there, the hash of its content."""

    split: str
    name: str
    hash: str


class Task(NamedTuple):
    """Images for one call of ``extract_shard``. config: ``settled``. pixel_scale: of the data set, as JSON.
    job: which job they are of: another one may find other images, of the same configuration."""

    config: Config
    pixel_scale: str
    job: str
    wanted: list[Wanted]


def tasks_of(config: Config, wanted: list[Wanted], pixel_scale: dict) -> list[Task]:
    """The images of a settled configuration as tasks of a shard each, of one thread unless ``threads`` says
    more."""
    scale = json.dumps(pixel_scale)
    config, job = dataclasses.replace(config, threads=config.threads or 1), uuid.uuid4().hex
    return [Task(config, scale, job, wanted[i : i + SHARD_ROWS]) for i in range(0, len(wanted), SHARD_ROWS)]


def extract_shard(task: Task) -> list[Wanted]:
    """Compute and write the features of a task's images, in whatever process -> those that cannot be read.
    Raises UserError."""
    return extract_images(*_backbone_and_store(task.config, task.pixel_scale, task.job), task.wanted)


@functools.lru_cache(maxsize=1)
def _backbone_and_store(config: Config, pixel_scale: str, of: str) -> tuple[Extraction, Store]:
    """Kept from one task to the next."""
    images, device = datasets.images_of(config), utils.set_up(config.device, config.threads)
    images.scale.ranges = json.loads(pixel_scale)
    identity = cache_identity(config, images.scale.ranges)
    job, store = Extraction(config, images, identity, device), Store(identity)
    store.begin(job.fields)
    return job, store


def check_disk(folder: Path, size: int) -> None:
    """Raise UserError when so many bytes of features would not fit on the disk."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UserError(
            f"the features need {size / 1e9:.2f} GB, the disk of {existing} has {free / 1e9:.2f} GB free; "
            "free some, or choose a smaller token_grid"
        )


def extract_missing(
    store: Store, wanted: list[Wanted], config: Config, job: Extraction | None, executor: Executor | None
) -> list[Wanted]:
    """Compute and write the features of images by ``job`` or, without one, by an executor's processes ->
    those that cannot be read. Says what is kept when it is stopped or the disk is full."""
    try:
        with tqdm(total=len(wanted), unit="img", disable=utils.no_bar(), smoothing=0.05) as bar:
            if job is None:
                unreadable: list[Wanted] = []
                scale = store.identity.fields.get("pixel_scale", {})
                for task, left_out in outcomes(executor, extract_shard, tasks_of(config, wanted, scale)):
                    unreadable += left_out
                    bar.update(len(task.wanted))
                return unreadable
            size = -(-len(wanted) // job.shards_at_once)
            parts = [wanted[i : i + size] for i in range(0, len(wanted), size)]
            with utils.thread_pool(len(parts)) as pool:
                in_turn = map if len(parts) == 1 else pool.map
                found = in_turn(lambda part: extract_images(job, store, part, bar.update), parts)
                return [image for part in found for image in part]
    except Interrupted as interrupted:
        store.sweep()
        interrupted.told = f"{kept(store, wanted)}; to go on: {to_go_on()}"
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{reason} ({store.folder}): {kept(store, wanted)}; then: {to_go_on()}") from None


def kept(store: Store, wanted: list[Wanted]) -> str:
    """How many of the images that were missing have features now, in words."""
    store.look()
    there = int((store.find([image.hash for image in wanted]).shard >= 0).sum())
    return f"{there} of {utils.counted(len(wanted), 'image')} are kept in {store.folder}"


def extract_images(
    job: Extraction, store: Store, wanted: list[Wanted], advance: Callable[[int], object] = lambda count: None
) -> list[Wanted]:
    """Compute the features of images and write them while the next are computed -> those that cannot be read.
    advance: called with the number of images done. Raises UserError, also on an image that has changed since
    it was hashed."""
    images = job.images.listed([image[:2] for image in wanted])
    unreadable: list[int] = []

    def batches() -> Iterator[Batch]:
        readable = _others(len(wanted), unreadable)
        for rows in arriving(job.features("train", unreadable=unreadable, images=images), job.device):
            arrays = {name: values.numpy() for name, values in rows.items()}
            numbers = list(itertools.islice(readable, len(arrays["tokens"])))
            yield numbers, arrays
            advance(len(numbers))

    def write(shard: Batch) -> None:
        numbers, arrays = shard
        for i in numbers:
            if images.identify("train", i) != wanted[i].hash:
                name = wanted[i].name
                raise UserError(f"{name} has changed while its features were extracted; run it again")
        write_shard(store.folder, store.of, [wanted[i].hash for i in numbers], arrays)

    with ThreadPoolExecutor(1) as pool:  # what it has begun is ended, however this ends
        for _ in utils.in_order(pool, write, in_shards(batches()), 1):
            pass
    return [wanted[i] for i in unreadable]


def _others(count: int, left_out: list[int]) -> Iterator[int]:
    """The numbers below ``count`` but for those in a list that may grow, in order, ahead of them."""
    passed = 0
    for i in range(count):
        if passed < len(left_out) and left_out[passed] == i:
            passed += 1
        else:
            yield i


def in_shards(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same images put together: SHARD_ROWS at a time, fewer where they take longer than SHARD_SECONDS."""
    numbers: list[int] = []
    parts: list[dict[str, np.ndarray]] = []
    began = time.monotonic()
    for more, rows in batches:
        numbers, parts = numbers + more, [*parts, rows]
        while len(numbers) >= SHARD_ROWS or numbers and time.monotonic() - began > SHARD_SECONDS:
            arrays = _joined(parts)
            yield numbers[:SHARD_ROWS], {name: values[:SHARD_ROWS] for name, values in arrays.items()}
            numbers, parts = numbers[SHARD_ROWS:], [{n: v[SHARD_ROWS:] for n, v in arrays.items()}]
            began = time.monotonic()
    if numbers:
        yield numbers, _joined(parts)


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
