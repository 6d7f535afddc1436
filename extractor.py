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
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
import torch

import datasets
import utils
from backbone import backbones
from backbone.identity import Identity, cache_identity, size_for
from backbone.storing import Wanted, extract
from cache.feature_cache import FeatureCache, ImageList, feature_folder, list_file, prune
from cache.shards import DTYPE
from cache.store import Store
from config import Config, UserError
from datasets import SPLITS
from images.images import note
from shell import engine

EXTRACT = "run python extractor.py with the same settings, or set pretrained False"


def ensure_features(
    config: Config,
    device: torch.device,
    check: Callable[[dict], object] | None = None,
    thorough: bool = False,
    executor: Executor | None = None,
) -> FeatureCache:
    """The features of a configuration's images. What is missing is extracted first; with ``pretrained``
    nothing is, and the images need not be there.

    check: called with what ``FeatureCache.meta`` will say of the features before any is extracted, to refuse
    what will not go with them. thorough: as extractor.py does it: every byte that is there is checked,
    ``restart`` is obeyed. executor: of the processes that extract, if not this one. Raises UserError."""
    path = list_file(feature_folder(config.feature_path), datasets.name_of(config))
    restart = thorough and config.restart and not config.pretrained
    before = None if restart else ImageList.read(path)
    images = None if config.pretrained else datasets.images_of(config)
    if not (listed := ImageList.of(images, before) if images else before):
        raise UserError(f"no features are listed in {path}; {EXTRACT}")
    if images:
        datasets.choose_classes(images.labels, config.class_name)  # a mistake shows before the extraction
        if listed.pixel_scale is not None:
            images.scale.ranges = listed.pixel_scale
        listed.pixel_scale = images.scale.ranges
        if line := datasets.repeated(listed.labels, listed.hashes):
            note(line)
    size, chosen = None, f"{config.extractor} {config.img_size}"
    if config.img_size == "auto":
        if chosen not in listed.sizes:
            listed.sizes[chosen] = list(size_for(config.extractor, images))
        size = listed.sizes[chosen]
    identity = cache_identity(config, device, size, listed.pixel_scale)
    store = Store(identity.folder, identity.fields, verified=listed.all_hashes() if thorough else ())
    if images:
        again = set(listed.all_hashes()) if restart else set[str]()
        store.remove(store.damaged + [s.folder for s in store.shards if not again.isdisjoint(s.images)])
        missing = absent_from(store, listed, but=listed.unreadable if config.unreadable == "skip" else ())
        if missing:
            where = "by other processes" if executor else f"on {device}"
            announce(identity, store.folder, len(missing), where, check)
            found = extract(config, identity, images, store, missing, device, executor)
            listed.unreadable += [image.hash for image in found]
            if line := images.scale.beyond():
                note(line)
        else:
            print(f"features: {'all sound' if thorough else 'reusing the cache'}: {store.folder}", flush=True)
        absent = {image.hash for image in absent_from(store, listed)}
        listed.unreadable = sorted(absent.intersection(listed.unreadable))
        if before is None or before.content() != listed.content():
            listed.write(path)
    else:
        print(f"features: {store.folder} (pretrained True: taken as they are)", flush=True)
    return complete(store, listed, config.unreadable)


# ---------------------------------------------------------------- what is there
def complete(store: Store, listed: ImageList, unreadable: str) -> FeatureCache:
    """The features of the images, once it is said which cannot be read and are left out. Raises UserError on
    an image that could be read and has none, and, where ``unreadable`` is stop, on one that cannot be."""
    missing = absent_from(store, listed, but=listed.unreadable)
    if missing or not store.fields:
        some = f"{len(missing)} of {listed.labels.count()} images"
        raise UserError(f"{some} have no features in {store.folder}; {EXTRACT}")
    cache = FeatureCache(store, listed)
    told = f"unreadable images: {utils.first_named(cache.skipped)}"
    if cache.skipped and unreadable == "stop":
        if len(cache.skipped) > utils.MOST_NAMED:
            print(*cache.skipped, sep="\n", file=sys.stderr)
        raise UserError(
            f"{told}; repair them or take them out, or leave them out with --unreadable skip; the "
            f"features of the others are kept in {cache.folder}"
        )
    if cache.skipped:
        print(f"features: left out, {told}", flush=True)
    return cache


def absent_from(store: Store, listed: ImageList, but: Sequence[str] = ()) -> list[Wanted]:
    """The images without features, each content once, but those of the hashes ``but``."""
    absent: dict[str, Wanted] = {}
    for split in SPLITS:
        hashes, names = listed.hashes[split], listed.labels.split(split).names
        for i in np.flatnonzero(store.find(hashes)[0] < 0):
            absent.setdefault(hashes[i], Wanted(split, names[i], hashes[i]))
    return [image for image in absent.values() if image.hash not in but]


# ---------------------------------------------------------------- what is missing
def announce(
    identity: Identity, folder: Path, count: int, where: str, check: Callable[[dict], object] | None
) -> None:
    """Say what will be extracted of so many images, once it is checked. Raises UserError where ``check``
    does, and where it does not fit on the disk."""
    shapes, fields = identity.what_is_kept(backbones.outline(identity.extractor, identity.img_size))
    if check is not None:
        check(fields)
    size = count * DTYPE.itemsize * sum(map(math.prod, shapes.values()))
    free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
    if size > free:
        raise UserError(
            f"the features need {size / 1e9:.2f} GB, the disk of {folder} has {free / 1e9:.2f} GB free; "
            "free some, or choose a smaller token_grid"
        )
    height, width = identity.img_size
    print(
        f"extracting {count} images with {identity.extractor} at {height}x{width} {where} in "
        f"{identity.precision}: {fields['tokens']} tokens of {fields['n_feat']} channels each, "
        f"{size / 1e9:.2g} GB in {folder}",
        flush=True,
    )


def main(config: Config) -> None:
    if config.prune:
        prune(feature_folder(config.feature_path), config.prune)
        return
    device = utils.set_up(config.device, config.threads)
    with engine.on_cluster(config.cluster) as cluster:
        ensure_features(config, device, thorough=True, executor=cluster)


if __name__ == "__main__":
    run_script(main, CONFIG)
