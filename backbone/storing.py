"""Tokens -> cache: the writer of a data set's features, and smaller grids made out of a full one."""

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import datasets
import utils
from backbone.identity import cache_identity, token_grid
from cache import growth
from cache.cache_writer import CacheWriter, ShardFeatures
from cache.feature_cache import CacheIdentity, FeatureCache
from cache.reuse import State, part_key, reopen_lost
from cache.shards import Damaged, Shard
from config import Config, UserError
from shell.command_line import to_go_on
from shell.signals import Interrupted

SHARD_ROWS = 0  # images per file of a new cache; 0: files of 128 to 256 MB
CHUNK = 64  # images of a full cache that are pooled at a time


def new_writer(
    config: Config,
    images: datasets.ImageSet,
    folder: Path,
    fields: dict,
    shapes: dict[str, tuple[int, ...]],
    there: State,
) -> CacheWriter:
    """A writer of these images' cache, of which ``there`` is what is there already. Raises UserError."""
    reopen_lost(folder, there, fields)
    skip = config.unreadable == "skip"
    writer = CacheWriter(folder, fields, images.labels, shapes, SHARD_ROWS, part_key(images), skip)
    growth.remember(images, folder)  # before the last shard makes the cache whole
    return writer


def fill(config: Config, writer: CacheWriter, features: ShardFeatures, count: int, at_once: int = 1) -> None:
    """Write what is missing, so many shards at once; say what is kept when that is stopped or the disk is
    full."""
    try:
        with tqdm(total=count, unit="img", disable=utils.no_bar(), smoothing=0.05) as bar:
            writer.fill(features, utils.ranks(config), bar.update, at_once)
    except Interrupted as interrupted:
        interrupted.told = f"{writer.kept()}; to go on: {to_go_on()}"
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{reason} ({writer.folder}): {writer.kept()}; then: {to_go_on()}") from None


def check_disk(folder: Path, labels: datasets.Labels, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError when the part of a cache that is not there yet would not fit on the disk."""
    size = 2 * labels.count() * sum(math.prod(shape) for shape in shapes.values())
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    size -= sum(path.stat().st_size for path in folder.glob("*.npy"))
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UserError(
            f"the features need {size / 1e9:.2f} GB, the disk of {existing} has {free / 1e9:.2f} GB free; "
            "free some, or choose a smaller token_grid"
        )


def pool_full_cache(
    config: Config, images: datasets.ImageSet, identity: CacheIdentity, there: State
) -> FeatureCache | None:
    """Make a smaller grid's cache out of the same images' full-grid cache, without the backbone; None without
    one that is sound."""
    full = cache_identity(dataclasses.replace(config, token_grid="full", feature_path=None))
    if config.token_grid == "full":
        return None
    by_pictures = {"img_size", "place_grid", "pixel_scale"} & set(identity.fields)
    of_this_size = {name: identity.fields[name] for name in by_pictures}
    try:
        source = FeatureCache(CacheIdentity(full.folder, full.fields | of_this_size).with_images(images))
    except UserError:
        return None
    grid = token_grid(config)
    shape = grid.cached_shape(source.grid)
    n_tokens = 1 + grid.n_tokens(shape)
    shapes = source.shapes | {"tokens": (n_tokens, source.channels)}
    check_disk(identity.folder, images.labels, shapes)
    fields = source.manifest.fields | identity.fields | {"grid": shape, "tokens": n_tokens}
    writer = new_writer(config, images, identity.folder, fields, shapes, there)
    missing = writer.missing()
    print(
        f"features: pooling {full.folder} to {n_tokens} tokens per image, "
        f"{writer.manifest.size(missing) / 1e9:.2f} GB in {identity.folder}",
        flush=True,
    )
    rows_of = {split: source.image_rows(split) for split in datasets.SPLITS}

    def pooled(shard: Shard, skipped: list[int]) -> Iterator[dict[str, np.ndarray]]:
        arrays = source.arrays(shard.split)
        first, last = np.searchsorted(rows_of[shard.split], (shard.start, shard.stop))
        there = set(rows_of[shard.split][first:last].tolist())
        skipped += [i for i in range(shard.start, shard.stop) if i not in there]
        for start in range(first, last, CHUNK):
            rows = {name: array[start : min(start + CHUNK, last)] for name, array in arrays.items()}
            tokens = grid.pool(torch.from_numpy(rows["tokens"]).float(), source.grid).half()
            yield rows | {"tokens": tokens.numpy()}

    try:
        fill(config, writer, pooled, sum(shard.stop - shard.start for shard in missing))
    except Damaged as damage:  # found as its rows are read
        print(f"features: not pooled: {damage}", flush=True)
        return None
    return FeatureCache(identity)
