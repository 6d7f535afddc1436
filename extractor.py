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

import math
import time
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np
import torch

import datasets
import utils
from backbone import backbones
from backbone.identity import Identity, cache_identity, size_for
from backbone.storing import Wanted, check_disk, extract_missing
from cache.feature_cache import FeatureCache, ImageList, feature_folder, list_file, prune
from cache.shards import DTYPE
from cache.store import Store
from config import Config, UserError
from datasets import SPLITS, ImageSet
from images.images import note
from shell import engine


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
    path = list_file(feature_folder(config.feature_path), datasets.name_of(config))
    before, restart = ImageList.read(path), thorough and config.restart
    images = None if before and config.pretrained else datasets.images_of(config)
    listed = ImageList.of(images, before) if images else before
    assert listed is not None
    if images:
        datasets.choose_classes(images.labels, config.class_name)  # a mistake shows before the extraction
        if listed.pixel_scale is not None and not restart:
            images.scale.ranges = listed.pixel_scale
        listed.pixel_scale = images.scale.ranges
        if line := datasets.repeated(listed.labels, listed.hashes):
            note(line)
    size, chosen = None, f"{config.extractor} {config.img_size}"
    if config.img_size == "auto":
        if restart or chosen not in listed.sizes:
            listed.sizes[chosen] = list(size_for(config.extractor, images))
        size = listed.sizes[chosen]
    identity = cache_identity(config, device, size, listed.pixel_scale)
    store = Store(identity.folder, identity.fields, verified=listed.all_hashes() if thorough else ())
    if images and not config.pretrained:
        again = set(listed.all_hashes()) if restart else set[str]()
        store.remove(store.damaged + [s.folder for s in store.shards if not again.isdisjoint(s.images)])
        missing = absent_from(store, listed)
        if config.unreadable == "skip" and not restart:
            missing = [image for image in missing if image.hash not in listed.unreadable]
        if missing:
            found = extract(config, identity, images, store, missing, device, check, executor)
            listed.unreadable += [image.hash for image in found]
        else:
            print(f"features: {'all sound' if thorough else 'reusing the cache'}: {store.folder}", flush=True)
        absent = {image.hash for image in absent_from(store, listed)}
        listed.unreadable = sorted(absent.intersection(listed.unreadable))
        if before is None or before.content() != listed.content():
            listed.write(path)
    else:
        print(f"features: {store.folder} (pretrained True: taken as they are)", flush=True)
    refuse_missing(store, listed)
    return as_wanted(FeatureCache(store, listed), config.unreadable)


def as_wanted(cache: FeatureCache, unreadable: str) -> FeatureCache:
    """The same, once it is said which images are left out. Raises UserError where they are not to be."""
    if cache.skipped:
        told = f"{utils.counted(len(cache.skipped), 'unreadable image')}: {utils.first_named(cache.skipped)}"
        if unreadable == "stop":
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
        for i in np.flatnonzero(store.find(hashes)[0] < 0):
            absent.setdefault(hashes[i], Wanted(split, names[i], hashes[i]))
    return list(absent.values())


# ---------------------------------------------------------------- what is missing
def extract(
    config: Config,
    identity: Identity,
    images: ImageSet,
    store: Store,
    missing: list[Wanted],
    device: torch.device,
    check: Callable[[dict], object] | None = None,
    executor: Executor | None = None,
) -> list[Wanted]:
    """Extract what is missing -> the images that cannot be read; the rest as for ``ensure_features``. Raises
    UserError; what is done is kept."""
    height, width = identity.img_size
    shapes, fields = identity.what_is_kept(backbones.outline(identity.extractor, identity.img_size))
    if check is not None:
        check(fields)
    count, size = len(missing), len(missing) * DTYPE.itemsize * sum(map(math.prod, shapes.values()))
    check_disk(store.folder, size)
    store.sweep()
    where = "by other processes" if executor else f"on {device}"
    print(
        f"extracting {count} images with {identity.extractor} at {height}x{width} {where} in "
        f"{identity.precision}: {fields['tokens']} tokens of {fields['n_feat']} channels each, "
        f"{size / 1e9:.2g} GB in {store.folder}",
        flush=True,
    )
    start = time.perf_counter()
    unreadable = extract_missing(config, identity, images, store, missing, device, executor)
    took = time.perf_counter() - start
    print(f"extracted {count} images in {took:.0f} s, {count / took:.0f} images/s", flush=True)
    if line := images.scale.beyond():
        note(line)
    store.look()
    return unreadable


def main(config: Config) -> None:
    if config.prune:
        prune(feature_folder(config.feature_path), config.prune)
        return
    device = utils.set_up(config.device, config.threads)
    with engine.on_cluster(config.cluster) as cluster:
        ensure_features(config, device, thorough=True, executor=cluster)


if __name__ == "__main__":
    run_script(main, CONFIG)
