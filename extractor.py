"""Extract the features of a data set once: frozen backbone -> semantic and patch tokens of every
image -> cache on disk."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import from_command_line, run_script

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__, script="extractor.py")

import functools
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
from cache import growth, reuse
from cache.cache_writer import lost_shards, restore, start_again
from cache.feature_cache import CacheIdentity, FeatureCache
from cache.shards import REPAIR, Damaged, Shard
from config import Config, UserError

ABSENT = reuse.State("absent")


def extract(
    config: Config,
    images: datasets.ImageSet,
    identity: CacheIdentity,
    device: torch.device,
    there: reuse.State = ABSENT,
) -> FeatureCache:
    """Extract what is missing of the images of a data set into their cache, but for those whose features
    ``there`` knows. Raises UserError; finished shards are kept."""
    config = at_size(config, identity)
    shapes, _ = what_is_kept(config, backbones.outline(config))
    check_disk(identity.folder, images.labels, shapes)
    job = Extraction(config, images, identity, device)
    writer = new_writer(config, images, identity.folder, job.fields, shapes, there)
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

        return compute(shard) if there.known is None else there.known.features(images, shard, compute)

    start = time.perf_counter()
    fill(config, writer, features, count, job.shards_at_once)
    seconds = time.perf_counter() - start
    print(f"extracted {count} images in {seconds:.0f} s, {count / seconds:.0f} images/s", flush=True)
    return FeatureCache(identity)


# ---------------------------------------------------------------- the ways in
def ensure_features(
    config: Config,
    device: torch.device,
    check: Callable[[dict], object] | None = None,
    thorough: bool = False,
) -> FeatureCache:
    """The cache of a configuration; what is missing is extracted first unless ``pretrained`` says it is
    there.

    check: called with what the sidecar will say of the features before any is extracted, to refuse what will
    not go with them. thorough: as extractor.py does it: every row that is there is checked, images that have
    changed are extracted again, ``restart`` is obeyed. Raises UserError."""
    identity = cache_identity(config)
    folder = identity.folder
    if config.pretrained:
        return as_they_are(config, identity, thorough)
    begun = reuse.begun(identity)  # a mistake shows before the images are looked at
    images = images_of(config, identity, begun)
    if thorough and config.restart and begun.what != "absent":
        if utils.ranks(config).world_size > 1:
            raise UserError("restart: expected one process, which others may join without restart")
        start_again(folder)
        begun = reuse.State("partial")
    there = reuse.state(begun, images, identity, thorough)
    if there.manifest and there.what in ("whole", "damaged") and not thorough:
        there.manifest.refuse_others(folder, identity.with_images(images).fields)
    if there.cache is not None:
        cache = as_wanted(config, there.cache)
        if thorough:
            restore(folder, cache.manifest)
            growth.remember(images, folder)
        said = sound(cache) if thorough else f"reusing the cache {folder}"
        print(f"features: {said}", flush=True)
        return cache
    identity = sized(config, images, identity)
    if check is not None:
        check(what_is_kept(config, backbones.outline(at_size(config, identity)))[1])
    pooled = pool_full_cache(config, images, identity, there)
    return as_wanted(config, pooled or extract(config, images, identity, device, there))


def images_of(config: Config, identity: CacheIdentity, begun: reuse.State) -> datasets.ImageSet:
    """The images of a configuration. Raises UserError, where there are none or a class is not there: before
    the long extraction, not after it."""
    try:
        images = datasets.images_of(config)
    except UserError as mistake:
        hint = f"; the features in {identity.folder} can be used without the images: --pretrained True"
        raise UserError(f"{mistake}{hint if begun.what == 'whole' else ''}") from None
    datasets.choose_classes(images.labels, config.class_name)
    return images


def as_they_are(config: Config, identity: CacheIdentity, thorough: bool) -> FeatureCache:
    """The features that are said to be there; thorough: every row of them checked. Raises UserError."""
    cache, folder = as_wanted(config, FeatureCache(identity)), identity.folder
    if not thorough:
        print(f"features: {folder} (pretrained True: taken as they are)", flush=True)
        return cache
    if lost := lost_shards(folder, cache.manifest, None, thorough=True):
        raise Damaged(f"{len(lost)} shards of {folder} are damaged {reuse.listed(lost)}; {REPAIR}")
    print(f"features: {sound(cache)}", flush=True)
    return cache


def sound(cache: FeatureCache) -> str:
    return f"all {len(cache.manifest.shards)} shards of {cache.folder} are sound"


def as_wanted(config: Config, cache: FeatureCache) -> FeatureCache:
    """A finished cache; images that it leaves out are told of. Raises UserError unless they are to be."""
    if not cache.skipped:
        return cache
    left_out = f"{utils.counted(len(cache.skipped), 'unreadable image')}, {cache.skipped[0]} first"
    if config.unreadable == "stop":
        raise UserError(
            f"the features in {cache.folder} leave out {left_out}; --unreadable skip takes them as they are"
        )
    print(f"left out: {left_out}", flush=True)
    return cache


def main(config: Config) -> None:
    device = utils.set_up(config.device, config.threads)
    ensure_features(config, device, functools.partial(memory.check_features, config), thorough=True)


if __name__ == "__main__":
    run_script(main, CONFIG)
