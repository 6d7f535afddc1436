"""Extract the features of a data set once: frozen backbone -> semantic and patch tokens of every
image -> cache on disk."""

from shell.command_line import from_command_line, run_script

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__, script="extractor.py")

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

import datasets
import utils
from backbone import backbones, memory
from backbone.extraction import LONG_JOB, Extraction, arriving
from backbone.identity import at_size, cache_identity, sized, what_is_kept
from backbone.storing import check_disk, fill, new_writer, pool_full_cache
from cache import growth
from cache.cache_writer import lost_shards, start_again
from cache.feature_cache import CacheIdentity, FeatureCache
from cache.manifest import Manifest
from cache.reuse import fits, grown, is_finished, listed, mend
from cache.shards import REPAIR, Damaged, Shard
from config import Config, UserError


def extract(
    config: Config,
    images: datasets.ImageSet,
    identity: CacheIdentity,
    device: torch.device,
    known: growth.KnownFeatures | None = None,
) -> FeatureCache:
    """Extract what is missing of the images of a data set into their cache, but for those whose features are
    known. Raises UserError; finished shards are kept."""
    config = at_size(config, identity)
    shapes, _ = what_is_kept(config, backbones.outline(config))
    check_disk(identity.folder, images.labels, shapes)
    job = Extraction(config, images, identity, device)
    writer = new_writer(config, images, identity.folder, job.fields, shapes)
    missing = writer.missing()
    count = sum(shard.stop - shard.start for shard in missing)
    size = "{}x{}".format(*job.img_size) + (" (img_size auto)" if "img_pixels" in identity.fields else "")
    print(
        f"extracting {count} images with {config.extractor} at {size} on {device} in "
        f"{job.fields['precision']}: {job.fields['tokens']} tokens of {job.fields['n_feat']} channels each, "
        f"{writer.manifest.size(missing) / 1e9:.2g} GB in {identity.folder}",
        end="",
        flush=True,
    )
    told = count >= LONG_JOB or count and "img_pixels" in identity.fields
    expected = utils.readable_time(count * job.seconds_per_image(count)) if told else ""
    print(f", about {expected} on this machine, once" if told else "", flush=True)

    def features(shard: Shard, skipped: list[int]) -> Iterator[dict[str, np.ndarray]]:
        def compute(part: Shard) -> Iterator[dict[str, np.ndarray]]:
            for rows in arriving(job.features(part.split, part.start, part.stop, skipped), device):
                yield {name: values.numpy() for name, values in rows.items()}

        return compute(shard) if known is None else known.features(images, shard, compute)

    start = time.perf_counter()
    fill(config, writer, features, count, job.shards_at_once)
    seconds = time.perf_counter() - start
    print(f"extracted {count} images in {seconds:.0f} s, {count / seconds:.0f} images/s", flush=True)
    return FeatureCache(identity)


# ---------------------------------------------------------------- the two ways in
def ensure_features(
    config: Config, device: torch.device, check: Callable[[dict], object] | None = None
) -> FeatureCache:
    """The cache of a configuration; what is missing is extracted first unless ``pretrained`` says it is
    there.

    check: called with what the sidecar will say of the features before any is extracted, to refuse what will
    not go with them. Raises UserError."""
    identity = cache_identity(config)
    folder = identity.folder
    if config.pretrained:
        print(f"features: {folder} (pretrained True: taken as they are)", flush=True)
        return as_wanted(config, FeatureCache(identity))
    there = fits(identity)  # a mistake shows before the images are looked at
    try:
        images = datasets.images_of(config)
    except UserError as mistake:
        hint = f"; the features in {folder} can be used without the images: --pretrained True"
        raise UserError(f"{mistake}{hint if there else ''}") from None
    datasets.choose_classes(
        images.labels, config.class_name
    )  # a mistake shows before the long extraction, not after it
    known = grown(images, identity) if there else None
    if there and known is None and is_finished(folder):
        Manifest.read(folder).refuse_others(folder, identity.with_images(images).fields)
        if not mend(images, folder, thorough=False):
            print(f"features: reusing the cache {folder}", flush=True)
            return as_wanted(config, FeatureCache(identity))
    identity = sized(config, images, identity)
    if check is not None:
        _, features = what_is_kept(config, backbones.outline(at_size(config, identity)))
        check(features)
    return make_features(config, images, identity, device, known)


def make_features(
    config: Config,
    images: datasets.ImageSet,
    identity: CacheIdentity,
    device: torch.device,
    known: growth.KnownFeatures | None,
) -> FeatureCache:
    """What is missing of a cache, from a larger one or from the images."""
    return pool_full_cache(config, images, identity) or extract(config, images, identity, device, known)


def as_wanted(config: Config, cache: FeatureCache) -> FeatureCache:
    """A finished cache, whose images that are left out are to be. Raises UserError."""
    if cache.skipped and config.unreadable == "stop":
        left_out = utils.counted(len(cache.skipped), "unreadable image")
        raise UserError(
            f"the features in {cache.folder} leave out {left_out}, "
            f"{cache.skipped[0]} first; --unreadable skip takes them as they are"
        )
    return cache


def check_rows(cache: FeatureCache) -> None:
    """Raise UserError when any row of a finished cache is damaged."""
    lost = lost_shards(cache.folder, cache.manifest, None, thorough=True)
    if lost:
        raise Damaged(f"{len(lost)} shards of {cache.folder} are damaged {listed(lost)}; {REPAIR}")
    tell_sound(cache)


def tell_sound(cache: FeatureCache) -> None:
    print(f"features: all {len(cache.manifest.shards)} shards of {cache.folder} are sound", flush=True)


def main(config: Config) -> None:
    device = utils.set_up(config.device, config.threads)
    identity = cache_identity(config)
    if config.pretrained:
        return check_rows(as_wanted(config, FeatureCache(identity)))
    folder, there = identity.folder, fits(identity)
    images = datasets.images_of(config)
    known = grown(images, identity) if there and not config.restart else None
    if there and config.restart:
        if utils.ranks(config).world_size > 1:
            raise UserError("restart: expected one process, which others may join without restart")
        start_again(folder)
    elif there and known is None and is_finished(folder) and not mend(images, folder, thorough=True):
        cache = as_wanted(config, FeatureCache(identity))
        growth.remember(images, folder)
        return tell_sound(cache)
    identity = sized(config, images, identity)
    memory.check_features(config, what_is_kept(config, backbones.outline(at_size(config, identity)))[1])
    print(f"features written to {make_features(config, images, identity, device, known).folder}", flush=True)


if __name__ == "__main__":
    run_script(main, CONFIG)
