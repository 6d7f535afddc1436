"""Images added to a data set whose features are cached: those that were there keep their features."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cache.feature_cache import FeatureCache
from cache.manifest import IMAGES
from cache.shards import Shard
from datasets import SPLITS, ImageSet
from shell.files import read_sealed, write_sealed
from shell.locks import Lock

Rows = dict[str, np.ndarray]
MOST = 2e9  # bytes of features that are carried over in memory; a larger cache does its changed shards again


def remember(images: ImageSet, folder: Path) -> None:
    """Write which images a cache's rows are of, by their content; under the folder's lock, as a process that
    finishes the cache removes what others have half written."""
    keys = {split: images.keys(split) for split in SPLITS}
    if _remembered(folder) != keys:
        with Lock(folder / ".lock"):
            write_sealed(folder / IMAGES, keys)


def _remembered(folder: Path) -> dict[str, list[str]] | None:
    try:
        return read_sealed(folder / IMAGES)
    except (OSError, ValueError):
        return None


class KnownFeatures:
    """The features of a cache by the content of their images, held in memory."""

    def __init__(self, cache: FeatureCache, keys: dict[str, list[str]]):
        self.rows: dict[str, Rows] = {}
        for split in SPLITS:
            arrays = {name: array[:] for name, array in cache.arrays(split).items()}
            for row, image in enumerate(cache.image_rows(split)):
                self.rows[keys[split][image]] = {name: values[row] for name, values in arrays.items()}

    def features(
        self, images: ImageSet, shard: Shard, compute: Callable[[Shard], Iterator[Rows]]
    ) -> Iterator[Rows]:
        """The features of a shard's images in order: the known ones as they are, the others by ``compute``,
        which takes a part of the shard."""
        keys = {i: images.identify(shard.split, i) for i in range(shard.start, shard.stop)}
        for known, part in itertools.groupby(keys, lambda i: keys[i] in self.rows):
            places = list(part)
            if known:
                found = [self.rows[keys[i]] for i in places]
                yield {name: np.stack([rows[name] for rows in found]) for name in found[0]}
            else:
                yield from compute(shard._replace(start=places[0], stop=places[-1] + 1))


def known_before(images: ImageSet, cache: FeatureCache) -> KnownFeatures | None:
    """The features of a finished cache whose images are all still there, with others beside them; None where
    any of them has changed or gone, or none has come."""
    keys = _remembered(cache.folder)
    if keys is None or not images.from_files:
        return None
    before = Counter(key for split in SPLITS for key in keys[split])
    now = Counter(key for split in SPLITS for key in images.keys(split))
    if not before < now or cache.manifest.size(cache.manifest.shards) > MOST:
        return None
    print(f"features: {(now - before).total()} new images, {before.total()} keep theirs", flush=True)
    return KnownFeatures(cache, keys)
