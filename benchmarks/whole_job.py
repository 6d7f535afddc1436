"""The whole job, from images to the table of ten classes: ours beside the transcription of the released one.

python benchmarks/whole_job.py --dataset_path data/cifar10 --images 1000 3000 --classes 1 3

The released job, class after class: extract the class's training images and all test images, one image at a
time in float32, store both, train, score. Ours: every image once, batched, float16 on disk; then class by
class. Both have the same backbone, flow (class attention, all tokens, H = C), batch size and one epoch. Each
run is a process of its own, which tells its seconds and its peak memory; both jobs run in turns, and what is
told is the median of ``--repeats`` turns. Larger jobs are computed from those that were measured, phase by
phase."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import extracted, print_machine
from extraction import PlainImages
from scipy.optimize import nnls
from torch.utils.data import DataLoader, Subset
from transcription import fit

import datasets
import train
import utils
from backbone import backbones
from backbone.identity import cache_identity
from config import Config
from detector import class_data

TRAIN, TEST, CLASSES = 5 / 6, 1 / 6, 10  # shares of CIFAR-10's images, and its classes
SCALE = [(images, classes) for images in (1000, 6000, 20000, 60000) for classes in (1, 3, 10)]
PHASES = ("extraction", "training", "scoring")


# ---------------------------------------------------------------- the images
def subset(images: datasets.ImageSet, total: int) -> datasets.ImageSet:
    """The data set cut to ``total`` images, spread over classes and splits as they are."""
    counts = {"train": round(total * TRAIN), "test": round(total * TEST)}
    return images.kept(
        {
            split: np.linspace(0, len(images.labels.split(split).names) - 1, count).astype(int)
            for split, count in counts.items()
        }
    )


# ---------------------------------------------------------------- the two jobs
class Watch:
    """Seconds of each phase."""

    def __init__(self):
        self.seconds, self._last = dict.fromkeys(PHASES, 0.0), time.perf_counter()

    def done(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


def ours(config: Config, images: datasets.ImageSet, classes: list[str], device: torch.device) -> dict:
    """{class: AUROC} by this repository, and the seconds of each phase."""
    watch, found = Watch(), {}
    cache = extracted(config, images, device)
    watch.done("extraction")
    sources = [class_data.TokenSource(cache.arrays(split), device) for split in datasets.SPLITS]
    for name in classes:
        trainer = train.make_trainer(config, cache, name, 0, *sources)
        loss = trainer.train_epoch()
        watch.done("training")
        trainer.evaluate(1, loss)
        found[name] = trainer.history[-1]["auroc"]
        del trainer  # before the next one takes its memory
        watch.done("scoring")
    return {"auroc": found, **watch.seconds}


def released(config: Config, images: datasets.ImageSet, classes: list[str], device: torch.device) -> dict:
    """The same by the transcription of the released scripts."""
    watch, found, fields = Watch(), {}, cache_identity(config).fields
    backbone = backbones.load_backbone(config, fields["weights"]).to(device)
    folder = Path(config.feature_path or "")
    folder.mkdir(parents=True)
    for name in classes:
        train_rows, test_rows, labels = images.labels.one_class(name)
        for split, rows in (("train", train_rows), ("test", test_rows)):
            np.save(
                folder / f"{name}-{split}.npy", plain_tokens(backbone, images, split, rows, fields, device)
            )
        watch.done("extraction")
        tokens = {
            split: torch.from_numpy(np.load(folder / f"{name}-{split}.npy")) for split in datasets.SPLITS
        }
        flow = fit(tokens["train"], tokens["train"].shape[2], 1, config.batch_size, device)
        watch.done("training")
        with torch.no_grad():
            batches = DataLoader(tokens["test"], config.batch_size)
            z = torch.cat([flow(b[:, 0].to(device), b[:, 1:].to(device))[0].cpu() for b in batches])
        found[name] = utils.auroc(labels, z.square().mean(1).numpy())
        watch.done("scoring")
    return {"auroc": found, **watch.seconds}


@torch.inference_mode()
def plain_tokens(backbone, images, split, rows, fields, device) -> np.ndarray:
    """Tokens of images (n, 1 + N, C), float32: one loader, one image at a time, batches of 32."""
    everything = PlainImages(images, len(images.labels.split(split).names), fields, split)
    loader = DataLoader(Subset(everything, rows.tolist()), 32)
    return torch.cat([backbone(batch.to(device)).cpu() for batch in loader]).numpy()


JOBS = {"ours": ours, "released": released}


def run_job(args: argparse.Namespace) -> None:
    """One job in this process; what came of it is the last line, as JSON."""
    device = utils.set_up(args.device, args.threads)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        config = Config(
            **{"dataset": args.dataset, "dataset_path": args.dataset_path, "extractor": args.extractor},
            **{"weights_path": args.weights, "feature_path": f"{scratch}/features", "normalize": "none"},
            **{"fusion": "class_attention"},
        )
        images = subset(datasets.images_of(config), args.images[0])
        start = time.perf_counter()
        outcome = JOBS[args.job](config, images, list(images.labels.classes[: args.classes[0]]), device)
        outcome["seconds"] = time.perf_counter() - start
        outcome["disk"] = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
    outcome["memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(outcome))


# ---------------------------------------------------------------- side by side
def measure(args: argparse.Namespace, job: str, images: int, classes: int) -> dict:
    """A job in a process of its own -> what came of it."""
    command = [sys.executable, __file__, "--job", job, "--images", str(images), "--classes", str(classes)]
    for name in ("dataset", "dataset_path", "extractor", "weights", "device", "threads", "scratch"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def in_the_middle(runs: list[dict]) -> dict:
    """Several runs of one job -> the medians of its seconds, memory and disk, the shortest and the longest
    run, and the AUROC of the last."""
    middle = {
        what: statistics.median(run[what] for run in runs) for what in (*PHASES, "seconds", "memory", "disk")
    }
    seconds = [run["seconds"] for run in runs]
    return middle | {"range": (min(seconds), max(seconds)), "auroc": runs[-1]["auroc"]}


def amounts(job: str, images: int, classes: int) -> dict[str, tuple[float, int]]:
    """How many images each phase of a job works on, and how often it starts."""
    per_class = {"training": images * TRAIN / CLASSES, "scoring": images * TEST}
    extracted = (images, 1) if job == "ours" else (classes * sum(per_class.values()), classes)
    return {"extraction": extracted} | {phase: (classes * n, classes) for phase, n in per_class.items()}


def carried_on(known: list[tuple], values: list[float], to: tuple) -> float:
    """The value at ``to`` of a sum of its entries, each times a cost that is not negative: the costs are
    fitted to the values at ``known``."""
    costs, _ = nnls(np.array(known, float), np.array(values))
    return float(costs @ np.array(to, float))


def computed(measured: dict[tuple[int, int], dict], job: str, to: tuple[int, int]) -> float:
    """Seconds of a job of other images and classes: each phase by its images and its starts, whose costs are
    fitted to the runs that were measured."""
    total = 0.0
    for phase in PHASES:
        known = [amounts(job, *size)[phase] for size in measured]
        values = [found[job][phase] for found in measured.values()]
        total += carried_on(known, values, amounts(job, *to)[phase])
    return total


def computed_memory(measured: dict[tuple[int, int], dict], job: str, to: tuple[int, int]) -> float:
    """Peak bytes of a job of other images and classes: so much for any job, per image, and for having more
    than one class, fitted likewise."""
    *known, wanted = ((1, images, classes > 1) for images, classes in (*measured, to))
    return carried_on(known, [found[job]["memory"] for found in measured.values()], wanted)


def line(cells: list) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def measure_all(args: argparse.Namespace) -> dict[tuple[int, int], dict[str, dict]]:
    """{(images, classes): {job: its medians}}, told in a table as they come."""
    print(f"medians of {args.repeats}\n")
    print(
        line(
            [
                "images",
                "classes",
                "job",
                *(f"{phase} s" for phase in PHASES),
                "in all s (lowest to highest)",
                "peak GB",
                "disk GB",
                "AUROC",
            ]
        )
    )
    print(line(["---"] * 10))
    measured: dict[tuple[int, int], dict[str, dict]] = {}
    for images in sorted(args.images):
        for classes in sorted(args.classes):
            turns = [{job: measure(args, job, images, classes) for job in JOBS} for _ in range(args.repeats)]
            measured[images, classes] = {job: in_the_middle([turn[job] for turn in turns]) for job in JOBS}
            for job, found in measured[images, classes].items():
                seconds = [f"{found[phase]:.1f}" for phase in (*PHASES, "seconds")]
                seconds[-1] += " ({:.1f} to {:.1f})".format(*found["range"])
                size = [f"{found[what] / 1e9:.2f}" for what in ("memory", "disk")]
                auroc = np.mean(list(found["auroc"].values()))
                print(line([images, classes, job, *seconds, *size, f"{auroc:.4f}"]), flush=True)
    return measured


def tell_scale(measured: dict[tuple[int, int], dict[str, dict]]) -> None:
    """The scaling table: what was measured, and what is computed from it."""
    print("\nComputed from these, phase by phase, by images and starts:\n")
    print(line(["images", "classes", "ours", "released", "ratio", "ours, peak GB", "released, peak GB", ""]))
    print(line(["---"] * 8))
    for to in sorted({*SCALE, *measured}):
        if to in measured:
            seconds, memory = (
                {job: found[what] for job, found in measured[to].items()} for what in ("seconds", "memory")
            )
        else:
            seconds, memory = (
                {job: guess(measured, job, to) for job in JOBS} for guess in (computed, computed_memory)
            )
        cells = [utils.readable_time(seconds[job]) for job in JOBS]
        ratio = f"{seconds['released'] / seconds['ours']:.1f} x"
        cells += [ratio, *(f"{memory[job] / 1e9:.1f}" for job in JOBS)]
        print(line([*to, *cells, "measured" if to in measured else "computed"]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--dataset_path", default="data/cifar10")
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--weights", default=None, help="weights file, or random")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 3000])
    parser.add_argument("--classes", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--scratch", default=None, help="folder for the features")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        run_job(args)
    else:
        print_machine()
        tell_scale(measure_all(args))


if __name__ == "__main__":
    main()
