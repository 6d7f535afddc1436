"""Images whose features are missing -> shards of a store, by this process or by those of an executor."""

import contextlib
import functools
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

import datasets
import utils
from backbone.backbones import outline
from backbone.extraction import COMPILED_FROM, MOST_IN_BATCH, SHARDS_AT_ONCE, Extraction
from backbone.identity import Identity
from backbone.resizing import Unreadable
from cache.feature_cache import Wanted, feature_folder
from cache.store import DTYPE, Store, write_shard
from config import Config, UserError
from datasets import ImageSet
from shell.engine import outcomes

SHARD_ROWS, SHARD_SECONDS = MOST_IN_BATCH, 30.0  # of one shard, at most: what a kill costs

Batch = tuple[list[int], list[dict[str, np.ndarray]]]  # numbers of images, and their rows in parts


def extract(
    config: Config,
    identity: Identity,
    images: ImageSet,
    store: Store,
    wanted: list[Wanted],
    device: torch.device,
    check: Callable[[dict], object] | None,
    executor: Executor | None,
) -> list[Wanted]:
    """Compute and write the features of images by this process or, where there is one, by an executor's, once
    it is said what will be done -> those that cannot be read. Raises UserError, also where the features do
    not fit on the disk; what is done is kept.

    check: called with the fields that tell what an image leaves, to refuse them."""
    backbone = outline(identity.extractor, identity.img_size)
    shapes, fields = backbone.what_is_kept(identity.grid, identity.of_maps)
    if check is not None:
        check(fields)
    folder = store.folder
    size = len(wanted) * DTYPE.itemsize * sum(map(math.prod, shapes.values()))
    free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
    if size > free:
        raise UserError(
            f"the features need {size / 1e9:.2f} GB, the disk of {folder} has {free / 1e9:.2f} GB free; "
            "free some, or choose a smaller token_grid"
        )
    where = "by other processes" if executor else f"on {device}"
    height, width = identity.img_size
    print(
        f"extracting {len(wanted)} images with {identity.extractor} at {height}x{width} {where} in "
        f"{identity.fields['precision']}: {fields['tokens']} tokens of {fields['n_feat']} channels each, "
        f"{size / 1e9:.2g} GB in {folder}",
        flush=True,
    )
    rows = SHARD_ROWS if executor else -(-len(wanted) // SHARDS_AT_ONCE[device.type])
    parts = [wanted[first : first + rows] for first in range(0, len(wanted), rows)]
    unreadable: list[Wanted] = []
    with tqdm(total=len(wanted), unit="img", disable=utils.NO_BAR, smoothing=0.05) as bar:
        if executor:
            task = functools.partial(extract_elsewhere, config, identity, uuid.uuid4().hex)
        else:
            job = Extraction(identity, device, config.extract_batch, config.workers)
            store.begin(job.fields)
            task = functools.partial(extract_images, job, images, store, advance=bar.update)
        threads = len(parts) > 1 and not executor
        with utils.Threads(len(parts)) if threads else contextlib.nullcontext(executor) as pool:
            for part, left_out in outcomes(pool, task, parts):
                unreadable += left_out
                bar.update(len(part) if executor else 0)
    store.look()
    return unreadable


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
    store = Store(feature_folder(config.feature_path) / identity.name)
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
    advance: called with the number of images done. Raises UserError, also on an image that has changed."""
    if len(wanted) >= job.batch and sum(map(len, images.images.values())) >= COMPILED_FROM:
        job.compile()
    chosen = images.listed([image[:2] for image in wanted])
    unreadable: list[Wanted] = []

    def shards() -> Iterator[Batch]:
        numbers: list[int] = []
        parts: list[dict[str, np.ndarray]] = []
        done, began = 0, time.monotonic()
        for rows in job.features(chosen):
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
        now = {i: chosen.images["train"][i].identify() for i in numbers}
        if changed := [wanted[i].name for i in numbers if now[i] != wanted[i].hash]:
            raise UserError(f"{changed[0]} has changed while its features were extracted; run it again")
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        write_shard(store.folder, store.of, [wanted[i].hash for i in numbers], arrays)

    # On a GPU one part's rows are copied while another's are computed.
    stream = torch.cuda.Stream(job.device) if job.device.type == "cuda" else None
    with torch.cuda.stream(stream), ThreadPoolExecutor(1) as pool:  # what it has begun is ended in any case
        for _ in utils.in_order(pool, write, shards(), 1):
            pass
    return unreadable
