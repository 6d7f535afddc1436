"""Images whose features are missing -> shards of a store, by this process or by those of an executor."""

import contextlib
import functools
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import utils
from backbone.extraction import COMPILED_FROM, MOST_IN_BATCH, SHARDS_AT_ONCE, Extraction
from backbone.identity import Identity
from backbone.resizing import Unreadable
from cache.feature_cache import Wanted
from cache.store import DTYPE, Store, write_shard
from config import Config, UserError
from datasets import ImageSet, RawImage
from shell.engine import outcomes

SHARD_ROWS, SHARD_SECONDS = MOST_IN_BATCH, 30.0  # of one shard, at most: what a kill costs

Part = tuple[list[RawImage], list[Wanted]]  # images, and what each is known by
Batch = tuple[list[int], list[dict[str, np.ndarray]]]  # numbers of images, and their rows in parts


def extract(
    config: Config,
    identity: Identity,
    images: ImageSet,
    store: Store,
    wanted: list[Wanted],
    device: torch.device,
    check: Callable[[dict], object],
    executor: Executor | None,
) -> list[Wanted]:
    """Compute and write the features of images by this process or, where there is one, by an executor's, once
    it is said what will be done -> those that cannot be read. Raises UserError, also where the features do
    not fit on the disk; what is done is kept.

    check: called with the store's fields, to refuse them."""
    job = Extraction(identity, device, config.extract_batch, config.workers)
    folder, fields = store.folder, job.fields
    check(fields)
    store.begin(fields)
    size = len(wanted) * DTYPE.itemsize * sum(map(math.prod, fields["shapes"].values()))
    if size > (free := shutil.disk_usage(folder).free):
        told = f"the features need {size / 1e9:.2f} GB, the disk of {folder} has {free / 1e9:.2f} GB free"
        raise UserError(f"{told}; free some, or choose a smaller token_grid")
    where = "by other processes" if executor else f"on {device}"
    told = f"{fields['tokens']} tokens of {fields['n_feat']} channels each, {size / 1e9:.2g} GB in {folder}"
    print(f"extracting {len(wanted)} images {where} in {fields['precision']}: {told}", flush=True)
    compiled = len(wanted) >= job.batch and sum(map(len, images.images.values())) >= COMPILED_FROM
    pictures = images.named(image[:2] for image in wanted)
    rows = SHARD_ROWS if executor else -(-len(wanted) // SHARDS_AT_ONCE[device.type])
    parts = [(pictures[i : i + rows], wanted[i : i + rows]) for i in range(0, len(wanted), rows)]
    unreadable: list[Wanted] = []
    with tqdm(total=len(wanted), unit="img", disable=utils.NO_BAR, smoothing=0.05) as bar:
        if executor:
            load = functools.partial(load_elsewhere, config, identity, folder, compiled, uuid.uuid4().hex)
            task = functools.partial(extract_images, load)
        else:
            if compiled:
                job.compile()
            task = functools.partial(extract_images, lambda: (job, store), advance=bar.update)
        threads = len(parts) > 1 and not executor
        with utils.Threads(len(parts)) if threads else contextlib.nullcontext(executor) as pool:
            for (_, part), left_out in outcomes(pool, task, parts):
                unreadable += left_out
                bar.update(len(part) if executor else 0)
    return unreadable


@functools.lru_cache(maxsize=1)
def load_elsewhere(
    config: Config, identity: Identity, folder: Path, compiled: bool, of: str
) -> tuple[Extraction, Store]:
    """The backbone and the store in whatever process, with one thread unless ``threads`` says more, for all
    tasks of one job ``of``. Raises UserError where it gives other features than those that are there."""
    device, store = utils.set_up(config.device, config.threads or 1), Store(folder)
    job = Extraction(identity, device, config.extract_batch, config.workers)
    store.begin(job.fields)
    if compiled:
        job.compile()
    return job, store


def extract_images(
    load: Callable[[], tuple[Extraction, Store]],
    part: Part,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Wanted]:
    """Compute the features of images and write them while the next are computed -> those that cannot be read.
    advance: called with the number of images done. Raises UserError, also on an image that has changed."""
    (job, store), (images, wanted) = load(), part
    unreadable: list[Wanted] = []

    def shards() -> Iterator[Batch]:
        numbers, parts = list[int](), list[dict[str, np.ndarray]]()
        done, began = 0, time.monotonic()
        for rows in job.features(images):
            if isinstance(rows, Unreadable):
                unreadable.append(wanted[done])
                count = 1
            else:
                parts.append({name: values.cpu().numpy() for name, values in rows.items()})
                count = len(rows["tokens"])
                numbers += range(done, done + count)
            done += count
            advance(count)
            late = time.monotonic() - began > SHARD_SECONDS
            if numbers and (late or len(numbers) + job.batch > SHARD_ROWS):
                yield numbers, parts
                numbers, parts, began = [], [], time.monotonic()
        if numbers:
            yield numbers, parts

    def write(shard: Batch) -> None:
        numbers, parts = shard
        if changed := [wanted[i].name for i in numbers if images[i].identify() != wanted[i].hash]:
            raise UserError(f"{changed[0]} has changed while its features were extracted; run it again")
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        write_shard(store.folder, store.of, [wanted[i].hash for i in numbers], arrays)

    # On a GPU one part's rows are copied while another's are computed.
    stream = torch.cuda.Stream(job.device) if job.device.type == "cuda" else None
    with torch.cuda.stream(stream), ThreadPoolExecutor(1) as pool:  # what it has begun is ended in any case
        for _ in utils.in_order(pool, write, shards(), 1):
            pass
    return unreadable
