"""Training the flow: ours against the plain transcription of the released step, in one run on one machine.

python benchmarks/flow.py
    one training step at several batch sizes (C = H = 768, N = 64, K = 4)
python benchmarks/flow.py --classes 10 --epochs 10 --images 5000
    whole trainings as well: ours, class after class, and the transcription
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import matmul_peak, medians, print_machine
from torch.utils.flop_counter import FlopCounterMode
from transcription import Flow, fit, make_optimizer, step

import datasets
import model
import train
import utils
from backbone.arithmetic import products
from backbone.storing import SHARD_ROWS
from cache import feature_cache, store
from cache.shards import write_shard
from config import Config
from detector import class_data


def our_step(flow, optimizer, features):
    """A step as train.Trainer takes it, on the semantic and the patch tokens as Features.of gives them."""
    semantic, patches = features
    with products(semantic.device):
        loss = model.loss_per_image(*flow(semantic, [patches])).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def in_parts(tokens):
    """Tokens (B, 1 + N, C) -> semantic (B, C) and patch tokens (B, N, C), without gaps."""
    return tokens[:, 0].contiguous(), tokens[:, 1:].contiguous()


def same_flows(channels, hidden, device):
    """Our flow and the transcription with the same parameters."""
    theirs = Flow(channels, hidden).to(device)
    ours = model.build_flow(
        channels,
        (8, 8),
        n_tokens=64,
        n_blocks=4,
        hidden=hidden,
        clamp=3.0,
        fusion="class_attention",
        identity_start=False,
        alpha=0.5,
        window=3,
        bands=False,
    ).to(device)
    ours.load_state_dict(
        {name.replace("blocks.", "module_list."): value for name, value in theirs.state_dict().items()}
    )
    return ours, theirs


def count_flops(flow, optimizer, features):
    """FLOPs of our step."""
    with FlopCounterMode(display=False) as counter:
        our_step(flow, optimizer, features)
    return counter.get_total_flops()


def compare_steps(args, device):
    """Seconds of a training step (forward, backward, optimiser), both at once, and how far the outcomes are
    apart."""
    channels, grid = args.channels, 8
    print(
        f"\ntraining step, C = H = {channels}, N = {grid * grid}, K = 4, float32, {device}, "
        f"{torch.get_num_threads()} threads, medians of {args.repeats}"
    )
    print(
        "batch  transcription ms  ours ms  ratio  ours images/s  ours GFLOP/s  share of peak  |dz| rel  "
        "|dloss| rel"
    )
    peak = matmul_peak(device, torch.float32)
    utils.keep_freed_memory()  # as prepare_data does; the transcription gains what ours gains
    for batch in args.batches:
        torch.manual_seed(0)
        ours, theirs = same_flows(channels, channels, device)
        tokens = torch.randn(batch, 1 + grid * grid, channels, device=device)
        semantic, patches = features = in_parts(tokens)
        with torch.no_grad():
            (z, _), (z_plain, _) = ours(semantic, [patches]), theirs(semantic, patches)
            dz = ((z - z_plain).abs().max() / z_plain.abs().max()).item()
        ours_adam, theirs_adam = train.make_optimizer(ours, Config()), make_optimizer(theirs)
        losses = our_step(ours, ours_adam, features), step(theirs, theirs_adam, tokens)
        flops = count_flops(ours, ours_adam, features)
        step(theirs, theirs_adam, tokens)
        jobs = {
            "theirs": lambda: step(theirs, theirs_adam, tokens),
            "ours": lambda: our_step(ours, ours_adam, features),
        }
        seconds = medians(
            jobs,
            args.repeats,
            device,
            settle=2,  # steps follow steps of their own kind in training
        )
        rate = flops / seconds["ours"]
        print(
            f"{batch:5d}  {1e3 * seconds['theirs']:16.1f}  {1e3 * seconds['ours']:7.1f}  "
            f"{seconds['theirs'] / seconds['ours']:5.2f}  "
            f"{batch / seconds['ours']:13.0f}  {rate / 1e9:12.0f}  {rate / peak:13.0%}  {dz:8.1e}  "
            f"{abs(losses[0] - losses[1]) / abs(losses[1]):11.1e}",
            flush=True,
        )
    print(f"float32 matmul peak {peak / 1e9:.0f} GFLOP/s")


def write_random_cache(folder, classes, images, channels):
    """A cache of random features, the form that training reads."""
    counts = {"train": classes * images, "test": classes}
    splits = {
        name: datasets.Split.of(map(str, range(n)), np.arange(n) % classes) for name, n in counts.items()
    }
    labels = datasets.Labels(tuple(map(str, range(classes))), **splits)
    shapes = {"tokens": (65, channels)}
    rng, found = np.random.default_rng(0), store.Store(store.CacheIdentity(folder, {}))
    found.begin({"n_feat": channels, "kind": "tokens", "grid": (8, 8), "tokens": 65, "shapes": shapes})
    images = {name: [f"{name}-{i}" for i in range(n)] for name, n in counts.items()}
    for names in images.values():
        for start in range(0, len(names), SHARD_ROWS):
            part = names[start : start + SHARD_ROWS]
            rows = rng.standard_normal((len(part), 65, channels), dtype=np.float32).astype(np.float16)
            write_shard(folder, found.of, part, {"tokens": rows})
    found.look()
    return feature_cache.FeatureCache(found, feature_cache.ImageList(labels, images))


def compare_trainings(args, device):
    """Median seconds of fitting all classes, one after the other, by ours and by the transcription."""
    config = Config(
        batch_size=args.batch_size,
        fusion="class_attention",
        meta_epochs=1,
        sub_epochs=args.epochs,
    )
    print(
        f"\n{args.classes} classes x {args.epochs} epochs of {args.images} images, C = H = {args.channels}, "
        f"N = 64, batch {args.batch_size}, {device}, medians of {args.repeats}"
    )
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        cache = write_random_cache(Path(scratch) / "cache", args.classes, args.images, args.channels)
        sources = {split: class_data.TokenSource(cache.arrays(split), device) for split in datasets.SPLITS}

        def ours():
            for name in cache.labels.classes:
                trainer = train.make_trainer(config, cache, name, 0, sources["train"], sources["test"])
                for _ in range(args.epochs):
                    trainer.train_epoch()

        def transcription():
            for number in range(args.classes):
                tokens = torch.from_numpy(
                    cache.tokens("train")[np.flatnonzero(cache.labels.train.category == number)]
                )
                fit(tokens, args.channels, args.epochs, args.batch_size, device)

        jobs = {"ours": ours, "transcription": transcription}
        seconds = medians(jobs, args.repeats, device)
        for name, value in seconds.items():
            print(f"{name:14s} {value:8.1f} s   {seconds['transcription'] / value:5.2f} x the transcription")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--classes", type=int, default=0, help="also fit this many classes")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--scratch", default=None, help="folder for the random cache")
    args = parser.parse_args()
    device = utils.set_up(args.device, args.threads)
    print_machine()
    compare_steps(args, device)
    if args.classes:
        compare_trainings(args, device)


if __name__ == "__main__":
    main()
