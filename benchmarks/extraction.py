"""Extraction: ours against float32 eager with one image loader, in one run on one machine; and what half
precision changes.

python benchmarks/extraction.py --dataset_path data/cifar10 --images 500 --busy 1
    idle, and beside another program that burns one core
python benchmarks/extraction.py --extractor VIT --weights random --images 2000 --device cuda
    a GPU: share of its matmul peak
"""

import argparse
import dataclasses
import subprocess
import sys
from collections import deque
from contextlib import contextmanager

import numpy as np
import torch
from common import matmul_peak, medians, print_machine
from joblib import cpu_count
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import datasets
import utils
from backbone import backbones, extraction
from backbone.identity import cache_identity
from config import Config
from detector import baselines


class PlainImages(Dataset):
    """The released way: every image is opened, resized and normalised on its own."""

    def __init__(self, images, count, fields, split="train"):
        self.images, self.count, self.split = images, count, split
        self.transform = transforms.Compose(
            [
                transforms.Resize(fields["img_size"], transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(fields["norm_mean"], fields["norm_std"]),
            ]
        )

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images.read(self.split, i)))


@torch.inference_mode()
def plain_extraction(backbone, images, count, fields, device, batch=32):
    """Float32, eager, one loader in the same process -> (count, 1 + N, C) float32."""
    loader = DataLoader(PlainImages(images, count, fields), batch)
    return torch.cat([backbone(part.to(device)).cpu() for part in loader])


def chosen_images(images, count):
    """The data set cut to so many training images, spread over the classes."""
    chosen = np.linspace(0, len(images.labels.train.names) - 1, count).astype(int)
    return images.kept({"train": chosen, "test": chosen[:0]})


def write(job):
    """What extraction does with a split, but for the disk."""
    deque(extraction.arriving(job.features("train"), job.device), maxlen=0)


def collect(job):
    """All rows of the first split, as extraction would write them."""
    return torch.cat([rows["tokens"].cpu() for rows in job.features("train")]).float()


def auroc_difference(images, exact, ours):
    """Mean AUROC (k-nearest neighbours, each class against the rest, half of the images as test) from either
    features."""
    category = images.labels.train.category
    fit, test = np.arange(0, len(category), 2), np.arange(1, len(category), 2)
    found = []
    for tokens in (exact[:, 0], ours[:, 0]):
        scores = [
            (c, baselines.cosine_neighbours(tokens[fit[category[fit] == c]], tokens[test]))
            for c in np.unique(category)
        ]
        found.append(
            float(np.mean([utils.auroc((category[test] != c).astype(int), score) for c, score in scores]))
        )
    return found


@contextmanager
def burning(cores: int):
    """Other programs that each keep one core busy."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def report_speed(args, jobs, device) -> dict[str, float]:
    """Images per second of every way, idle and, on a CPU, beside a program that burns one core -> seconds."""
    idle = medians(jobs, args.repeats, device)
    base = idle["float32 eager, one image loader"]
    for name, value in idle.items():
        print(f"{name:52s} {args.images / value:8.1f} images/s  {base / value:5.2f} x", flush=True)
    if device.type == "cpu" and args.busy:
        cores = cpu_count()
        share = max(1, cores - args.busy) / cores
        with burning(args.busy):
            busy = medians(jobs, args.repeats, device)
        print(f"beside {args.busy} other programs; a fair share is {share:.0%} of what it is alone")
        for name, value in busy.items():
            print(
                f"{name:52s} {args.images / value:8.1f} images/s  {idle[name] / value / share:4.0%} of it",
                flush=True,
            )
    return idle


def report_likeness(args, plain, images, fields, job, device) -> None:
    """What half precision changes: cosines to float32, and nearest neighbours."""
    exact, ours = plain_extraction(plain, images, args.images, fields, device), collect(job)
    for name, part in (("semantic", slice(0, 1)), ("patch", slice(1, None))):
        cosine = F.cosine_similarity(exact[:, part], ours[:, part], dim=2)
        print(
            f"cosine similarity to float32, {name} tokens: mean {cosine.mean():.5f}, lowest "
            f"{cosine.min():.5f}"
        )
    first, second = auroc_difference(images, exact, ours)
    print(
        f"mean AUROC of nearest neighbours on these images: float32 {first:.4f}, ours {second:.4f}, "
        f"difference {second - first:+.4f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--weights", default=None, help="weights file, or random")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--dataset_path", default="data/cifar10")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--busy", type=int, default=0, help="then again beside so many burning programs")
    return parser.parse_args()


def main():
    args = arguments()
    device = utils.set_up(args.device, args.threads)
    print_machine()
    config = Config(
        dataset=args.dataset,
        dataset_path=args.dataset_path,
        extractor=args.extractor,
        weights_path=args.weights,
        compile=args.compile,
    )
    identity = cache_identity(config)
    fields = identity.fields
    images = chosen_images(datasets.load_images(args.dataset, args.dataset_path), args.images)

    def job_with(**more):
        return extraction.Extraction(dataclasses.replace(config, **more), images, identity, device)

    job, exact_job = job_with(), job_with(precision="float32", compile=False)
    plain = backbones.load_backbone(config, fields["weights"]).to(device)
    precision = job.fields["precision"]
    jobs = {
        "float32 eager, one image loader": lambda: plain_extraction(
            plain, images, args.images, fields, device
        ),
        "ours, float32": lambda: write(exact_job),
        f"ours, {precision}": lambda: write(job),
    }
    if device.type == "cpu" and torch.get_num_threads() > 1:
        in_step = job_with(workers=0)
        jobs[f"ours, {precision}, all threads on one batch"] = lambda: write(in_step)
    size = "x".join(map(str, fields["img_size"]))
    print(f"\n{args.extractor} at {size}, {args.images} images, medians of {args.repeats}")
    seconds = report_speed(args, jobs, device)

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain(torch.zeros(1, 3, *fields["img_size"], device=device))
    peak = matmul_peak(device, job.dtype)
    rate = counter.get_total_flops() * args.images / seconds[f"ours, {precision}"]
    print(
        f"{rate / 1e9:.0f} GFLOP/s of a {precision} matmul peak of {peak / 1e9:.0f} GFLOP/s: "
        f"{rate / peak:.0%}"
    )
    report_likeness(args, plain, images, fields, job, device)


if __name__ == "__main__":
    main()
