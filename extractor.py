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

from collections.abc import Callable
from concurrent.futures import Executor

import torch

import datasets
import utils
from backbone.identity import cache_identity
from backbone.storing import extract
from cache.feature_cache import EXTRACT, FeatureCache, ImageList, complete, list_file, prune
from cache.store import Store
from config import Config, UserError
from images.images import measured, note
from shell import engine

FEATURES = "features"  # the folder of the features of all data sets and backbones


def ensure_features(
    config: Config,
    device: torch.device,
    check: Callable[[dict], object] = lambda fields: None,
    thorough: bool = False,
    executor: Executor | None = None,
    one_class: bool = False,
) -> FeatureCache:
    """The features of a configuration's images. What is missing is extracted first; with ``pretrained``
    nothing is, and the images need not be there. Raises UserError.

    check: called with what ``FeatureCache.meta`` will say of the features before any is extracted, to refuse
    what will not go with them. thorough: every byte that is there is checked, ``restart`` is obeyed.
    executor: of the processes that extract, if not this one. one_class: of several none is extracted."""
    name = datasets.name_of(config)
    images = None if config.pretrained else datasets.images_of(config)
    if (root := Path(config.feature_path or FEATURES)).is_file():
        raise UserError(f"feature_path: expected a folder, {root} is a file")
    path, restart = list_file(root, name), thorough and config.restart and not config.pretrained
    before = None if restart else ImageList.read(path)
    if not (known := images or before):
        raise UserError(f"no features are listed in {path}; {EXTRACT}")
    classes = datasets.choose_classes(known.labels, config.class_name)  # a mistake shows before all is hashed
    if one_class and len(classes) > 1:
        raise UserError(f"train.py fits one class: give it with --class_name (now {config.class_name!r})")
    listed = known if isinstance(known, ImageList) else ImageList.of(known, before)
    if images:
        if listed.pixel_scale is None:
            listed.pixel_scale = measured([raw.source for raw in images.images["train"]])
        if line := datasets.repeated(listed.labels, listed.hashes):
            note(line)
    hashes = frozenset(listed.all_hashes if thorough else ())
    identity = cache_identity(config, device, images, listed)
    store = Store(root / identity.name, verified=hashes, again=hashes if restart else frozenset())
    cache, left_out = FeatureCache(store, listed), listed.unreadable if config.unreadable == "skip" else ()
    missing = [image for image in cache.absent.values() if image.hash not in left_out]

    def begin(fields: dict) -> None:
        check(fields)
        listed.write(path, before)  # what a signal leaves is of this data set

    if images and missing:
        found = extract(config, identity, images, store, missing, device, begin, executor)
        tried, unreadable = ({image.hash for image in each} for each in (missing, found))
        listed.unreadable = sorted({*listed.unreadable} - tried | unreadable)
        cache = FeatureCache(Store(store.folder), listed)
    else:
        told = "all sound" if thorough else "reusing the cache"
        print(f"features: {told if images else 'pretrained, taken as they are'}: {store.folder}", flush=True)
    listed.write(path, None if images and missing else before)
    return complete(cache, config.unreadable)


def main(config: Config) -> None:
    if config.prune is not None:
        prune(Path(config.feature_path or FEATURES), config.prune)
        return
    device = utils.set_up(config.device, config.threads)
    with engine.on_cluster(config.cluster) as cluster:
        ensure_features(config, device, thorough=True, executor=cluster)


if __name__ == "__main__":
    run_script(main, CONFIG)
