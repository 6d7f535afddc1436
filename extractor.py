"""Extract the features of a data set once: frozen backbone -> semantic and patch tokens of every
image -> a store on disk, in which every data set finds the images that it has.

python extractor.py --dataset folder --dataset_path product   # what is missing; checks the rest
python extractor.py --prune list                              # what the features take of the disk
python extractor.py --prune digits,cifar10                    # drops all that is of neither"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import from_command_line, run_script

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__)

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np
import torch

import datasets
import utils
from backbone import backbones, memory
from backbone.extraction import LONG_JOB, Extraction
from backbone.identity import cache_identity, settled, what_is_kept
from backbone.storing import Wanted, check_disk, extract_missing
from cache.feature_cache import FeatureCache, ImageList, feature_folder, list_file
from cache.pruning import prune
from cache.shards import DTYPE
from cache.store import Store
from config import Config, UserError, auto_pixels
from datasets import SPLITS
from images.images import note
from shell import engine

OLD = ("manifest.json", "meta.json")  # what a folder of features of earlier versions holds


def ensure_features(
    config: Config,
    device: torch.device,
    check: Callable[[dict], object] | None = None,
    thorough: bool = False,
    executor: Executor | None = None,
) -> FeatureCache:
    """The features of a configuration's images; what is missing is extracted first, unless ``pretrained``
    says that it is there.

    check: called with what ``FeatureCache.meta`` will say of the features before any is extracted, to refuse
    what will not go with them. thorough: as extractor.py does it: every byte that is there is checked,
    ``restart`` is obeyed. executor: of the processes that extract, if not this one. Raises UserError."""
    root = feature_folder(config)
    tell_of_old_features(root)
    path = list_file(root, datasets.name_of(config))
    before, images = ImageList.read(path), None
    if before is None or not config.pretrained:
        images = images_of(config, before is not None)
    listed = before if images is None else ImageList.of(images, before)
    assert listed is not None
    restart, chosen = thorough and config.restart, f"{config.extractor} {config.img_size}"
    if images is not None:
        if listed.pixel_scale is not None and not restart:
            images.scale.ranges = listed.pixel_scale
        listed = dataclasses.replace(listed, pixel_scale=images.scale.ranges)
        if line := datasets.repeated(listed.labels, listed.hashes):
            note(line)
    asked = settled(config, device, images, None if restart else listed.sizes.get(chosen))
    store = Store(cache_identity(asked, listed.pixel_scale), verified=listed.all_hashes() if thorough else ())
    if images is None or config.pretrained:
        refuse_missing(store, listed)
        print(f"features: {store.folder} (pretrained True: taken as they are)", flush=True)
    else:
        again = set(listed.all_hashes()) if restart else set[str]()
        store.remove(store.damaged + [s.folder for s in store.shards if not again.isdisjoint(s.images)])
        missing = absent_from(store, listed)
        if config.unreadable == "skip":
            missing = not_given_up(images, missing, set(listed.unreadable))
        if missing:
            extract(asked, images, store, missing, device, check, executor)
        else:
            print(f"features: {'all sound' if thorough else 'reusing the cache'}: {store.folder}", flush=True)
        if auto_pixels(config.img_size):
            listed.sizes[chosen] = list(backbones.image_size(asked))
        listed.unreadable[:] = [image.hash for image in absent_from(store, listed)]
        if before is None or before.content() != listed.content():
            listed.write(path)
    return as_wanted(config, FeatureCache(store, listed))


def images_of(config: Config, listed: bool) -> datasets.ImageSet:
    """The images of a configuration. Raises UserError, where there are none or a class is not there: before
    the long extraction, not after it."""
    try:
        images = datasets.images_of(config)
    except UserError as mistake:
        hint = "; features that are there can be used without the images: --pretrained True"
        raise UserError(f"{mistake}{hint if listed else ''}") from None
    datasets.choose_classes(images.labels, config.class_name)
    return images


def tell_of_old_features(root: Path) -> None:
    """One line for the features of earlier versions, which are not read."""
    places = [place for place in (root, *root.glob("*")) for name in OLD if (place / name).is_file()]
    if places:
        names = utils.first_named(list(map(str, places)))
        print(f"features: {names}: of an earlier version, not read; delete them", flush=True)


def as_wanted(config: Config, cache: FeatureCache) -> FeatureCache:
    """The same, once it is said which images are left out. Raises UserError where they are not to be."""
    if cache.skipped:
        told = f"{utils.counted(len(cache.skipped), 'unreadable image')}: {utils.first_named(cache.skipped)}"
        if config.unreadable == "stop":
            if len(cache.skipped) > utils.MOST_NAMED:
                print(*cache.skipped, sep="\n", file=sys.stderr)
            raise UserError(
                f"{told}; repair them or take them out, or leave them out with --unreadable skip; the "
                f"features of the others are kept in {cache.folder}"
            )
        print(f"features: left out, {told}", flush=True)
    return cache


# ---------------------------------------------------------------- what is there
def refuse_missing(store: Store, listed: ImageList) -> None:
    """Raise UserError where an image has no features but could be read."""
    missing = [image for image in absent_from(store, listed) if image.hash not in listed.unreadable]
    if missing or not store.fields:
        some = f"{len(missing)} of {utils.counted(listed.labels.count(), 'image')} have "
        raise UserError(
            f"{some if store.fields else ''}no features in {store.folder}; run python extractor.py with the "
            "same settings, or set pretrained False"
        )


def absent_from(store: Store, listed: ImageList) -> list[Wanted]:
    """The images without features, each content once."""
    absent: dict[str, Wanted] = {}
    for split in SPLITS:
        hashes, names = listed.hashes[split], listed.labels.split(split).names
        for i in np.flatnonzero(store.find(hashes).shard < 0):
            absent.setdefault(hashes[i], Wanted(split, names[i], hashes[i]))
    return list(absent.values())


def not_given_up(images: datasets.ImageSet, absent: list[Wanted], unreadable: set[str]) -> list[Wanted]:
    """The same without those that could not be read before and still cannot."""

    def can_read(number: int) -> bool:
        try:
            tried.read("train", number)
            return True
        except UserError:
            return False

    tried = images.listed([image[:2] for image in absent])
    return [image for i, image in enumerate(absent) if image.hash not in unreadable or can_read(i)]


# ---------------------------------------------------------------- what is missing
def extract(
    config: Config,
    images: datasets.ImageSet,
    store: Store,
    missing: list[Wanted],
    device: torch.device,
    check: Callable[[dict], object] | None = None,
    executor: Executor | None = None,
) -> None:
    """Extract what is missing, of a settled configuration, but for images that cannot be read; the rest as
    for ``ensure_features``. Raises UserError; what is done is kept."""
    shapes, fields = what_is_kept(config, backbones.outline(config))
    if check is not None:
        check(fields)
    count, size = len(missing), len(missing) * DTYPE.itemsize * sum(map(math.prod, shapes.values()))
    height, width = backbones.image_size(config)
    check_disk(store.folder, size)
    store.sweep()
    job, where, told = None, "by other processes", ""
    if executor is None:
        job, where = Extraction(config, images, store.identity, device), f"on {device}"
        store.begin(job.fields)
        if count >= LONG_JOB:
            seconds = utils.readable_time(count * job.seconds_per_image(count))
            told = f", about {seconds} on this machine, once"
    print(
        f"extracting {count} images with {config.extractor} at {height}x{width} {where} in "
        f"{config.precision}: {fields['tokens']} tokens of {fields['n_feat']} channels each, "
        f"{size / 1e9:.2g} GB in {store.folder}{told}",
        flush=True,
    )
    start = time.perf_counter()
    unreadable = {image.hash for image in extract_missing(store, missing, config, job, executor)}
    took = time.perf_counter() - start
    print(f"extracted {count} images in {took:.0f} s, {count / took:.0f} images/s", flush=True)
    if line := images.scale.beyond():
        note(line)
    store.look()
    written = [image.hash for image in missing if image.hash not in unreadable]
    if (store.find(written).shard < 0).any():
        raise UserError(f"features in {store.folder} are not there as they were written; check the disk")


def main(config: Config) -> None:
    if config.prune:
        prune(feature_folder(config), config.prune)
        return
    device = utils.set_up(config.device, config.threads)
    check = functools.partial(memory.check_features, config)
    with engine.on_cluster(config.cluster) as cluster:
        ensure_features(config, device, check, thorough=True, executor=cluster)


if __name__ == "__main__":
    run_script(main, CONFIG)
