"""What the stores take of the disk, and dropping what no data set names any more."""

from pathlib import Path

import numpy as np

import config as knobs
from cache.feature_cache import ImageList, list_file
from cache.shards import write_shard
from cache.store import IDENTITY, CacheIdentity, Store
from config import UserError


def prune(root: Path, named: str) -> None:
    """Print what each store holds of each data set; then, unless ``named`` is "list", drop all features and
    lists but those of the data sets that it names. Raises UserError on a name that none has."""
    files = sorted(list_file(root, "*").parent.glob("*.json"))
    lists = {path.stem: found for path in files if (found := ImageList.read(path))}
    names = [] if named == "list" else [name.strip() for name in named.split(",")]
    if unknown := [name for name in names if name not in lists]:
        raise UserError(knobs.unknown("data set", unknown[0], ["list", *lists]))
    for path in sorted(root.glob(f"*/{IDENTITY}")):
        store = Store(CacheIdentity(path.parent, {}))
        counts = {name: (store.find(each.all_hashes()).shard >= 0).sum() for name, each in lists.items()}
        of = ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "of no data set"
        print(f"{path.parent}: {size_of(store) / 1e6:.1f} MB ({of})", flush=True)
        if names:
            before = size_of(store)
            keep_only(store, {image for name in names for image in lists[name].all_hashes()})
            print(f"  {(before - size_of(store)) / 1e6:.1f} MB dropped", flush=True)
    for name in lists:
        if names and name not in names:
            list_file(root, name).unlink(missing_ok=True)


def size_of(store: Store) -> int:
    """Bytes of the shards' files."""
    return sum(file.size for shard in store.shards for file in shard.files.values())


def keep_only(store: Store, images: set[str]) -> None:
    """Drop the rows that are not of these images, and any second row of one; a shard that keeps some of its
    rows is written anew."""
    kept: set[str] = set()
    gone = list(store.damaged)
    for shard in store.shards:
        rows = [i for i, image in enumerate(shard.images) if image in images and image not in kept]
        kept |= {shard.images[i] for i in rows}
        if len(rows) < len(shard.images):
            gone.append(shard.folder)
            if rows and not shard.damage(thorough=True):
                arrays = {name: np.load(file.path)[rows] for name, file in shard.files.items()}
                write_shard(store.folder, store.of, [shard.images[i] for i in rows], arrays)
    store.sweep()
    store.remove(gone)
