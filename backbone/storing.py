"""Images whose features are missing -> shards of a store, by this process or by those of an executor."""

import functools
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import datasets
import utils
from backbone.extraction import COMPILED_FROM, MOST_IN_BATCH, SHARDS_AT_ONCE, Extraction
from backbone.identity import Identity
from backbone.resizing import Unreadable
from cache.shards import write_shard
from cache.store import Store
from config import Config, UserError
from datasets import ImageSet
from shell.engine import outcomes

SHARD_ROWS, SHARD_SECONDS = MOST_IN_BATCH, 30.0  # of one shard, at most: what a kill costs

Batch = tuple[list[int], dict[str, np.ndarray]]  # numbers of images, and their rows of each array


class Wanted(NamedTuple):
    """An image whose features are missing: its split, its name there, the hash of its content."""

    split: str
    name: str
    hash: str


def extract(
    config: Config,
    identity: Identity,
    images: ImageSet,
    store: Store,
    wanted: list[Wanted],
    device: torch.device,
    executor: Executor | None,
) -> list[Wanted]:
    """Compute and write the features of images by this process or, where there is one, by an executor's ->
    those that cannot be read. Raises UserError; what is done is kept."""
    store.sweep()
    unreadable: list[Wanted] = []
    with tqdm(total=len(wanted), unit="img", disable=utils.NO_BAR, smoothing=0.05) as bar:
        if executor:
            task = functools.partial(extract_elsewhere, config, identity, uuid.uuid4().hex)
            for part, left_out in outcomes(executor, task, in_parts(wanted, SHARD_ROWS)):
                unreadable += left_out
                bar.update(len(part))
        else:
            job = Extraction(identity, device, config.extract_batch, config.workers)
            store.begin(job.fields)
            parts = in_parts(wanted, -(-len(wanted) // SHARDS_AT_ONCE[device.type]))
            here = functools.partial(extract_images, job, images, store, advance=bar.update)
            with utils.thread_pool(len(parts)) as pool:
                for _, left_out in outcomes(pool if len(parts) > 1 else None, here, parts):
                    unreadable += left_out
    store.look()
    return unreadable


def in_parts(wanted: list[Wanted], size: int) -> list[list[Wanted]]:
    return [wanted[first : first + size] for first in range(0, len(wanted), size)]


def extract_elsewhere(config: Config, identity: Identity, of: str, wanted: list[Wanted]) -> list[Wanted]:
    """``extract_images`` in whatever process, with one thread unless ``threads`` says more. of: which job it
    is of; another one may find other images, of the same configuration."""
    return extract_images(*_loaded(config, identity, of), wanted)


@functools.lru_cache(maxsize=1)
def _loaded(config: Config, identity: Identity, of: str) -> tuple[Extraction, ImageSet, Store]:
    """Kept from one task to the next."""
    device, images = utils.set_up(config.device, config.threads or 1), datasets.images_of(config)
    images.scale.ranges = identity.fields.get("pixel_scale", {})
    job = Extraction(identity, device, config.extract_batch, config.workers)
    store = Store(identity.folder, identity.fields)
    store.begin(job.fields)
    return job, images, store


def extract_images(
    job: Extraction,
    images: ImageSet,
    store: Store,
    wanted: list[Wanted],
    advance: Callable[[int], object] = lambda count: None,
) -> list[Wanted]:
    """Compute the features of images and write them while the next are computed -> those that cannot be read.
    advance: called with the number of images done. Raises UserError, also on an image that has changed since
    it was hashed."""
    if len(wanted) >= job.batch and images.labels.count() >= COMPILED_FROM:
        job.compile()
    chosen = images.listed([image[:2] for image in wanted])
    unreadable: list[Wanted] = []

    def batches() -> Iterator[Batch]:
        first = 0
        for rows in job.features(chosen):
            count = 1
            if isinstance(rows, Unreadable):
                unreadable.append(wanted[rows.row])
            else:
                arrays = {name: values.cpu().numpy() for name, values in rows.items()}
                count = len(arrays["tokens"])
                yield list(range(first, first + count)), arrays
            first += count
            advance(count)

    def write(shard: Batch) -> None:
        numbers, arrays = shard
        for i in numbers:
            if chosen.identify("train", i) != wanted[i].hash:
                name = wanted[i].name
                raise UserError(f"{name} has changed while its features were extracted; run it again")
        write_shard(store.folder, store.of, [wanted[i].hash for i in numbers], arrays)

    # On a GPU one part's rows are copied while another's are computed.
    stream = torch.cuda.Stream(job.device) if job.device.type == "cuda" else None
    with torch.cuda.stream(stream), ThreadPoolExecutor(1) as pool:  # what it has begun is ended in any case
        for _ in utils.in_order(pool, write, in_shards(batches(), job.batch), 1):
            pass
    return unreadable


def in_shards(batches: Iterator[Batch], largest: int) -> Iterator[Batch]:
    """The same images, in batches of ``largest`` at most, put together: SHARD_ROWS at most, fewer where they
    take longer than SHARD_SECONDS."""
    numbers: list[int] = []
    parts: list[dict[str, np.ndarray]] = []
    began = time.monotonic()
    for more, rows in batches:
        numbers, parts = numbers + more, [*parts, rows]
        if len(numbers) + largest > SHARD_ROWS or time.monotonic() - began > SHARD_SECONDS:
            yield numbers, _joined(parts)
            numbers, parts, began = [], [], time.monotonic()
    if numbers:
        yield numbers, _joined(parts)


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
