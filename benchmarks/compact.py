"""What the compact token grid costs and keeps, on the features of a full-grid cache (--feature_path FOLDER).

Detection with either grid: python main.py --preset accurate --fusion hilo --fusion_tokens last --sweep
"token_grid=full,compact" ..."""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import print_machine

from backbone.token_grid import split_bands, window_of
from cache.feature_cache import FeatureCache, ImageList
from cache.store import CacheIdentity, Store
from datasets import OTHER, Labels, Split


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True, help="a folder of features of the full grid")
    parser.add_argument("--window", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    print_machine()
    store = Store(CacheIdentity(args.store, {"token_grid": "full"}))
    images = [image for shard in store.shards for image in shard.images]
    labels = Labels((), Split.of(images, [OTHER] * len(images)), Split.of([], []))
    cache = FeatureCache(store, ImageList(labels, {"train": images, "test": []}))
    tokens = cache.tokens("train")
    rows = np.linspace(0, len(tokens) - 1, min(args.images, len(tokens))).astype(int)
    owner = window_of(cache.grid, args.window)
    sizes = torch.bincount(owner).float()[:, None]  # patches per window
    total = low_energy = high_energy = between = within = 0.0
    grand_mean = torch.from_numpy(tokens[rows].astype(np.float32))[:, 1:].mean((0, 1))
    for part in np.array_split(rows, max(1, len(rows) // 200)):
        patches = torch.from_numpy(tokens[part].astype(np.float32))[:, 1:]
        low, high = split_bands(patches, cache.grid, args.window).chunk(2, 1)
        total += patches.square().sum().item()
        low_energy += (sizes * low.square()).sum().item()
        high_energy += (sizes * high.square()).sum().item()
        between += (sizes * (low - grand_mean).square()).sum().item()
        within += (patches - low[:, owner]).square().sum().item()
    n_full, n_compact = cache.meta["tokens"], 1 + 2 * len(sizes)
    print(
        f"\n{args.store}: {len(images)} images, grid {cache.grid[0]}x{cache.grid[1]}, window "
        f"{args.window}, {cache.channels} channels"
    )
    for name, n in (("full", n_full), ("compact", n_compact)):
        print(
            f"{name:8s} {n:4d} tokens per image, {2 * n * cache.channels * len(images) / 1e9:6.2f} GB, "
            f"{n / n_full:.0%}"
        )
    print(
        f"energy of the patch tokens: low band {low_energy / total:.1%}, high band "
        f"{high_energy / total:.1%}, together {(low_energy + high_energy) / total:.1%}"
    )
    print(
        f"variance of the patch tokens: {between / (between + within):.1%} between windows, "
        f"{within / (between + within):.1%} inside them"
    )
    print(
        "(the low band keeps the former with its place and sign, the high band the latter's size per window "
        "and channel)"
    )


if __name__ == "__main__":
    main()
