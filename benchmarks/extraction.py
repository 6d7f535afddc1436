"""Extraction: ours, PyTorch on the same threads, and the released loop, in one run on one machine; the whole
way from image files to tokens, bands and places, and the model alone.

python benchmarks/extraction.py --dataset folder --dataset_path FOLDER --images 500 --busy 1
    idle, and beside another program that burns one core
python benchmarks/extraction.py --extractor VIT --weights random --images 2000 --device cuda
    a GPU: share of its matmul peak
"""

import argparse
import subprocess
import sys
from collections import deque
from contextlib import contextmanager

import numpy as np
import torch
from common import matmul_peak, medians, print_machine
from joblib import cpu_count
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import datasets
import utils
from backbone import backbones, extraction
from backbone.identity import cache_identity
from config import make_config

RELEASED = "the released loop: float32, one image loader"


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


def compute(job, count):
    """The same of blank images that need no reading, ``count`` of them."""
    blank = torch.zeros(job.batch, 3, *job.img_size, dtype=torch.uint8)
    batches = [job.batch] * (count // job.batch) + [count % job.batch][: count % job.batch]
    deque(extraction.arriving(job.computed(lambda n: [blank[:n]], batches), job.device), maxlen=0)


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
    base = idle[RELEASED]
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
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--busy", type=int, default=0, help="then again beside so many burning programs")
    return parser.parse_args()


def main():
    args = arguments()
    device = utils.set_up(args.device, args.threads)
    print_machine()
    config = make_config(
        {
            **{"preset": "accurate", "mirror": False, "img_size": None},  # bands and places, at its own size
            **{"dataset": args.dataset, "dataset_path": args.dataset_path, "extractor": args.extractor},
            **{"weights_path": args.weights, "compile": args.compile, "precision": args.precision},
        }
    )
    identity = cache_identity(config)
    fields = identity.fields
    images = chosen_images(datasets.load_images(args.dataset, args.dataset_path), args.images)
    ours, by_torch = (extraction.Extraction(config, images, identity, device) for _ in range(2))
    ours.compile()
    by_torch.compile = lambda: None  # type: ignore[method-assign]
    plain = backbones.load_backbone(config, fields["weights"]).to(device)
    jobs = {
        RELEASED: lambda: plain_extraction(plain, images, args.images, fields, device),
        "PyTorch, from the files": lambda: write(by_torch),
        "ours, from the files": lambda: write(ours),
        "PyTorch, the model alone": lambda: compute(by_torch, args.images),
        "ours, the model alone": lambda: compute(ours, args.images),
    }
    size = "x".join(map(str, fields["img_size"]))
    precision = ours.fields["precision"]
    print(f"\n{args.extractor} at {size} in {precision}, {args.images} images, medians of {args.repeats}")
    seconds = report_speed(args, jobs, device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain(torch.zeros(1, 3, *fields["img_size"], device=device))
    peak = matmul_peak(device, ours.dtype)
    rate = counter.get_total_flops() * args.images / seconds["ours, the model alone"]
    print(f"{rate / 1e9:.0f} GFLOP/s of a matmul peak of {peak / 1e9:.0f} GFLOP/s: {rate / peak:.0%}")
    exact = plain_extraction(plain, images, args.images, fields, device)[:, 0]
    found = torch.cat([rows["tokens"][:, 0].cpu() for rows in ours.features("train")]).float()
    print(f"semantic tokens off those of the released loop: {(found - exact).norm() / exact.norm():.1e}")


if __name__ == "__main__":
    main()
