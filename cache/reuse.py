"""Whether features that are there can be used again: of the kind that is wanted, finished, of the same
images, undamaged; and what of them has to be made again."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import utils
from cache import growth
from cache.cache_writer import CHANGED, lost_shards, reopen
from cache.feature_cache import CacheIdentity, FeatureCache
from cache.manifest import Manifest, has_features
from cache.shards import Damaged, Shard, shards_of
from config import UserError


def part_key(images: datasets.ImageSet) -> Callable[[Shard], str]:
    """What the images of a shard are known by."""
    return lambda shard: images.part_key(shard.split, shard.start, shard.stop)


class State(NamedTuple):
    """What there is of the features that are wanted. what: "absent"; "partial", begun or without a readable
    manifest; "whole"; "grown", whole, but images have come to those it is of; "damaged", finished, but shards
    or labels have to be made again."""

    what: str
    manifest: Manifest | None = None
    lost: dict[Shard, str] = {}  # what has to be made again of a finished cache, and why
    known: growth.KnownFeatures | None = None  # of a grown one: the features of the images that it had
    cache: FeatureCache | None = None  # a whole one, opened once it is known to be of these images


def begun(identity: CacheIdentity) -> State:
    """What the folder holds of features of this kind, whatever images they are of: "absent", "partial" or
    "whole". Raises UserError when it holds others, or anything else."""
    if not has_features(identity.folder):
        return State("absent")
    try:
        manifest = Manifest.read(identity.folder)
    except Damaged:  # its shards are still known by their records
        return State("partial")
    manifest.refuse_others(identity.folder, identity.fields)
    return State("whole" if manifest.finished else "partial", manifest)


def state(found: State, images: datasets.ImageSet, identity: CacheIdentity, thorough: bool) -> State:
    """What there is of the features of these images, after ``begun``; nothing is changed on the disk.

    thorough: damage is found by the checksum of every row, else by sizes and headers. Raises UserError when
    no shard of a whole cache is of these images: the folder may be the wrong one."""
    folder, manifest = identity.folder, found.manifest
    if found.what != "whole" or manifest is None:
        return found
    cache = None  # of damaged labels or files it stays so
    with contextlib.suppress(Damaged):
        cache = FeatureCache(identity, manifest)
        known = growth.known_before(images, cache)
        if known is not None:
            counts = {split: len(images.labels.split(split).names) for split in datasets.SPLITS}
            kept = shards_of(counts, manifest.shard_rows)
            lost = lost_shards(folder, manifest, part_key(images), thorough=False)
            lost |= dict.fromkeys(set(manifest.shards) - set(kept), CHANGED)
            return State("grown", manifest, lost, known)
    lost = lost_shards(folder, manifest, part_key(images), thorough)
    if lost and all(CHANGED in damage for damage in lost.values()) and len(lost) == len(manifest.shards):
        raise UserError(
            f"the features in {folder} are of other images than those now there; give another "
            f"--feature_path, or python extractor.py --restart to replace them"
        )
    relabelled = manifest.fields["image_list"] != images.fingerprint()
    if lost or relabelled or cache is None:
        return State("damaged", manifest, lost)
    return State("whole", manifest, cache=cache)


def reopen_lost(folder: Path, there: State, wanted: dict) -> None:
    """Make a grown or damaged cache one that lacks what is lost of it, to be made again as the fields
    ``wanted`` say. Raises UserError, and leaves it as it is, where the rest was made otherwise."""
    if there.manifest is None or there.what not in ("grown", "damaged"):
        return
    there.manifest.refuse_other_features(folder, wanted)
    if there.what == "damaged":
        lost, all_shards = there.lost, len(there.manifest.shards)
        again = f"{len(lost)} of {all_shards} shards are made again {listed(lost)}"
        kept = "all shards are kept, the labels are written again"
        print(f"features: {again if lost else kept}", flush=True)
    reopen(folder, there.manifest, there.lost)


def listed(lost: dict[Shard, str]) -> str:
    """Lost shards with the reason, the first few of them."""
    shown = [f"{shard.name}: {damage}" for shard, damage in lost.items()]
    return f"({utils.first_named(shown, '; ')})"
