"""Whether features that are there can be used again: of the kind that is wanted, finished, of the same
images, undamaged; and what of them has to be made again."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import datasets
import utils
from cache import growth
from cache.cache_writer import CHANGED, lost_shards, reopen, restore
from cache.feature_cache import CacheIdentity, FeatureCache, labels_damage
from cache.manifest import Manifest, has_features
from cache.shards import Damaged, Shard, shards_of
from config import UserError


def part_key(images: datasets.ImageSet) -> Callable[[Shard], str]:
    """What the images of a shard are known by."""
    return lambda shard: images.part_key(shard.split, shard.start, shard.stop)


def fits(identity: CacheIdentity) -> bool:
    """Whether the folder holds features of this kind, finished or not. Raises UserError when it holds
    others, or anything else."""
    if not has_features(identity.folder):
        return False
    with contextlib.suppress(Damaged):  # its shards are still known by their records
        Manifest.read(identity.folder).refuse_others(identity.folder, identity.fields)
    return True


def is_finished(folder: Path) -> bool:
    """Whether a cache is whole; one with a damaged manifest is not."""
    try:
        return Manifest.read(folder).finished
    except Damaged:
        return False


def grown(images: datasets.ImageSet, identity: CacheIdentity) -> growth.KnownFeatures | None:
    """What a finished cache holds of images that are all still there, where others have come; its shards that
    change are no longer finished then. None otherwise."""
    if not is_finished(identity.folder):
        return None
    try:
        known = growth.known_before(images, FeatureCache(identity))
    except Damaged:
        return None
    if known is not None:
        manifest = Manifest.read(identity.folder)
        counts = {split: len(images.labels.split(split).names) for split in datasets.SPLITS}
        wanted = shards_of(counts, manifest.shard_rows)
        lost = lost_shards(identity.folder, manifest, part_key(images), thorough=False)
        reopen(identity.folder, {*lost, *set(manifest.shards) - set(wanted)})
    return known


def mend(images: datasets.ImageSet, folder: Path, thorough: bool) -> bool:
    """Whether anything of a finished cache has to be extracted again; it is then no longer finished.

    thorough: by the checksum of every row, else by sizes and headers. Raises UserError when no shard is of
    these images: the folder may be the wrong one."""
    manifest = Manifest.read(folder)
    lost = lost_shards(folder, manifest, part_key(images), thorough)
    if lost and all(CHANGED in damage for damage in lost.values()) and len(lost) == len(manifest.shards):
        raise UserError(
            f"the features in {folder} are of other images than those now there; give another "
            f"--feature_path, or python extractor.py --restart to replace them"
        )
    relabelled = manifest.fields["image_list"] != images.fingerprint()
    if not (lost or relabelled or labels_damage(folder, manifest)):
        if thorough:
            restore(folder, manifest)
        return False
    again = f"{len(lost)} of {len(manifest.shards)} shards are made again {listed(lost)}"
    print(f"features: {again if lost else 'all shards are kept, the labels are written again'}", flush=True)
    reopen(folder, lost)
    return True


def listed(lost: dict[Shard, str]) -> str:
    """Lost shards with the reason, the first few of them."""
    shown = [f"{shard.name}: {damage}" for shard, damage in lost.items()]
    return f"({utils.first_named(shown, '; ')})"
