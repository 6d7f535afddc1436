"""The day a GPU is there: is it right, and how quick? One command, under ten minutes, a Markdown table.

python benchmarks/gpu.py                          all phases -> results/gpu.md
python benchmarks/gpu.py --only correctness training
python benchmarks/gpu.py --device cpu --small     the same course in seconds, on any machine

Every phase runs in a process of its own with a time limit and writes each row as soon as it is known: a phase
that fails or is ended keeps its rows, and its error stands in the last one."""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import extracted, matmul_peak, wait
from flow import in_parts, our_step, same_flows
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transcription import fit

import config as knobs
import datasets
import extractor
import train
import utils
from backbone import resizing
from backbone.extraction import Extraction
from backbone.identity import cache_identity
from detector import class_data, preparation
from shell.files import write_text

CPU = torch.device("cpu")
Row = tuple[str, str]  # what, value


class Sizes(NamedTuple):
    """How large the phases are."""

    backbone: dict  # knobs of the backbone that is timed
    digits: dict  # of the one that digits are detected with
    images: int  # extracted in memory
    folder: int  # per class, written as files for the default job
    channels: int
    grid: int
    per_class: int  # training images of a class in the comparison of trainings
    classes: int
    epochs: int


WHOLE = Sizes(
    {"extractor": "VIT"},
    {"extractor": "efficientnet_lite0", "weights_path": None},
    images=6000, folder=600, channels=768, grid=8, per_class=5000, classes=10, epochs=10,
)  # fmt: skip
SMALL = Sizes(
    {"extractor": "test_vit", "img_size": (32, 32)},
    {"extractor": "test_efficientnet", "img_size": (64, 64), "fusion": "none", "sub_epochs": 1},
    images=24, folder=6, channels=16, grid=8, per_class=20, classes=2, epochs=2,
)  # fmt: skip


class Job(NamedTuple):
    """What a phase is given: where, how large, a folder to write in, and where its rows go."""

    device: torch.device
    sizes: Sizes
    scratch: Path
    tell: Callable[[str, str], None]

    def seconds(self, task: Callable[[], object]) -> float:
        wait(self.device)
        start = time.perf_counter()
        task()
        wait(self.device)
        return time.perf_counter() - start


def peak_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return "no GPU"
    return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"


# ---------------------------------------------------------------- the machine
def machine(job: Job) -> None:
    for name, value in utils.versions().items():
        job.tell(name, value)
    if job.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(job.device)
        job.tell("memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    for dtype in (torch.bfloat16, torch.float32):
        peak = matmul_peak(job.device, dtype, n=None if job.sizes is WHOLE else 256)
        job.tell(f"matmul peak, {dtype}".replace("torch.", ""), f"{peak / 1e12:.3g} TFLOP/s")


# ---------------------------------------------------------------- is it right?
def random_images(count: int, size: int = 32) -> datasets.ImageSet:
    """Images of noise on a gradient, in memory, all for training."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 128, size)[None, :, None, None] + np.linspace(0, 64, size)[None, None, :, None]
    pixels = (ramp + generator.uniform(0, 63, (min(count, 500), size, size, 3))).astype(np.uint8)
    split = datasets.Split.of(map(str, range(count)), np.zeros(count, int))
    labels = datasets.Labels(("0",), split, datasets.Split.of([], []))
    return datasets.ImageSet(labels, lambda _, i: pixels[i % len(pixels)], lambda _, i: str(i))


def extraction_of(job: Job, device: torch.device, count: int, **more) -> Extraction:
    config = knobs.Config(weights_path="random", **(job.sizes.backbone | more))
    return Extraction(config, random_images(count), cache_identity(config), device)


def correctness(job: Job) -> None:
    """The CPU against the device: resize, tokens, training steps, scores, AUROC."""
    images = torch.stack([torch.from_numpy(random_images(8).read("train", i)) for i in range(8)]).permute(
        0, 3, 1, 2
    )
    resized = [resizing.resized(images.to(d), (224, 224)).cpu().float() for d in (CPU, job.device)]
    job.tell("resize 32 to 224", f"{(resized[0] - resized[1]).abs().max():.2g} grey levels apart at most")
    for precision in ("float32", "bfloat16"):
        exact, ours = (
            torch.cat([rows["tokens"].cpu().float() for rows in found.features("train")])
            for found in (
                extraction_of(job, CPU, 8, precision="float32"),
                extraction_of(job, job.device, 8, precision=precision),
            )
        )
        cosine = torch.nn.functional.cosine_similarity(exact, ours, dim=2)
        job.tell(
            f"tokens in {precision} against the CPU's float32",
            f"{(exact - ours).abs().max() / exact.abs().max():.1e} apart, cosine {cosine.mean():.5f}, "
            f"lowest {cosine.min():.5f}",
        )
    steps(job)
    digits(job)


def steps(job: Job) -> None:
    """Training steps with the same parameters and tokens on both sides."""
    sizes, found = job.sizes, []
    for device in (CPU, job.device):
        torch.manual_seed(0)
        flow, _ = same_flows(sizes.channels, sizes.channels, CPU)
        semantic, patches = in_parts(torch.randn(32, 1 + sizes.grid**2, sizes.channels).to(device))
        flow, losses = flow.to(device), []
        optimizer = train.make_optimizer(flow, knobs.Config())
        for _ in range(10):
            losses.append(our_step(flow, optimizer, (semantic, patches)))
        with torch.no_grad():
            z, _ = flow(semantic, [patches])
        found.append((losses, z.square().mean(1).cpu()))
    (wanted, scores), (got, other) = found
    apart = [abs(a - b) / abs(a) for a, b in zip(wanted, got)]
    job.tell(
        "loss apart after 1 and 10 steps, scores after 10",
        f"{apart[0]:.1e}, {apart[-1]:.1e}, {((scores - other).abs() / scores).max():.1e}",
    )


def digits(job: Job) -> None:
    """AUROC of two digits by the preset quickstart, on the CPU and on the device."""
    for device in dict.fromkeys((CPU, job.device)):
        given = {
            "preset": "quickstart",
            "weights_path": "random",
            "feature_path": str(job.scratch / f"{device}"),
        }
        config = knobs.make_config(given | {"baselines": False} | job.sizes.digits)
        cache = extractor.ensure_features(config, device)
        sources = [class_data.TokenSource(cache.arrays(split), device) for split in datasets.SPLITS]
        found = [train.make_trainer(config, cache, name, 0, *sources).run().result["auroc"] for name in "01"]
        job.tell(f"AUROC of digits 0 and 1 on {device}", " ".join(f"{auroc:.4f}" for auroc in found))


# ---------------------------------------------------------------- how quick is it?
def extraction(job: Job) -> None:
    """Images per second without and with the way to the disk, and the share of the peak."""
    count = job.sizes.images
    found = extraction_of(job, job.device, count)
    found.seconds_per_image(count)  # warms it up
    seconds = job.seconds(lambda: [None for _ in found.features("train")])
    plain = extraction_of(job, CPU, 1, precision="float32")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain.module.backbone(torch.zeros(1, 3, *plain.img_size))
    rate = counter.get_total_flops() * count / seconds
    job.tell("images/s, tokens left on the device", f"{count / seconds:.0f}")
    peak = matmul_peak(job.device, found.dtype, n=None if job.sizes is WHOLE else 256)
    job.tell("of the measured peak", f"{rate / 1e12:.3g} TFLOP/s, {rate / peak:.0%}")
    config = knobs.Config(weights_path="random", feature_path=str(job.scratch / "f"), **job.sizes.backbone)
    seconds = job.seconds(lambda: extracted(config, found.images, job.device))
    job.tell("images/s, to the disk, start included", f"{count / seconds:.0f}")
    job.tell("peak memory", peak_memory(job.device))


class Noise:
    """An array of a split as a cache has it, made up: row i depends on i alone."""

    def __init__(self, *shape: int):
        self.shape = shape
        self._rows = np.random.default_rng(0).standard_normal((97, *shape[1:])).astype(np.float16)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        rows = np.arange(len(self))[index] if isinstance(index, slice) else index
        return self._rows[rows % len(self._rows)]

    def semantic(self) -> np.ndarray:
        return self._rows[np.arange(len(self)) % len(self._rows), 0]


def trainings(job: Job, **more) -> list[train.Trainer]:
    """A trainer per class on made-up tokens."""
    sizes = job.sizes
    given = {"fusion": "class_attention"} | more
    config = knobs.Config(meta_epochs=1, sub_epochs=sizes.epochs, **given)
    tokens = 1 + sizes.grid**2
    features = {
        "n_feat": sizes.channels,
        "kind": "tokens",
        "grid": (sizes.grid, sizes.grid),
        "tokens": tokens,
    }
    count = sizes.classes * sizes.per_class
    source = class_data.TokenSource({"tokens": Noise(count, tokens, sizes.channels)}, job.device)  # type: ignore[dict-item]
    rows = np.arange(count).reshape(sizes.classes, -1)
    labels = np.arange(100) % 2
    found = []
    for i in range(sizes.classes):
        parts = rows[i], rows[i][:0], np.arange(100) % count
        data = class_data.ClassData(str(i), source, source, *parts, labels)
        prepared = preparation.prepare_data(config, data, features, 0, job.device)
        found.append(train.Trainer(prepared))
    return found


def training(job: Job) -> None:
    """All classes, one by one, by ours and by the transcription: what is measured on one epoch is told for
    all."""
    sizes = job.sizes
    share = sizes.classes * sizes.epochs

    def tell(name: str, seconds: float, measured: str) -> float:
        job.tell(f"{sizes.classes} classes x {sizes.epochs} epochs, {name}", f"{seconds:.1f} s ({measured})")
        return seconds

    def one_by_one(**more) -> float:
        trainer = trainings(job, **more)[0]
        trainer.train_epoch()
        return job.seconds(trainer.train_epoch) * share

    tokens = torch.from_numpy(Noise(min(sizes.per_class, 1000), 1 + sizes.grid**2, sizes.channels)[:])
    plain = (
        job.seconds(lambda: fit(tokens, sizes.channels, 1, 32, job.device))
        * sizes.per_class
        / len(tokens)
        * share
    )
    tell("transcription", plain, f"from {len(tokens)} images")
    ours = tell("ours", one_by_one(), "from an epoch of a class")
    job.tell("transcription / ours", f"{plain / ours:.1f}")
    job.tell("peak memory", peak_memory(job.device))
    if job.device.type == "cuda":
        ours = tell("ours, compiled", one_by_one(compile=True), "from an epoch of a class")
        job.tell("transcription / ours, compiled", f"{plain / ours:.1f}")


def default_job(job: Job) -> None:
    """`python main.py` with untrained weights, phase by phase, on a tenth of CIFAR-10's number of images."""
    folder, generator = job.scratch / "images", np.random.default_rng(0)
    for split, count in (("train", job.sizes.folder * 5 // 6), ("test", max(1, job.sizes.folder // 6))):
        for name in range(job.sizes.classes):
            place = folder / split / str(name)
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    given = {"dataset": "folder", "dataset_path": str(folder), "weights_path": "random"}
    config = knobs.Config(**given, feature_path=str(job.scratch / "features"), **job.sizes.backbone)
    total = job.sizes.classes * job.sizes.folder
    start = time.perf_counter()
    cache = extractor.ensure_features(config, job.device)
    phases = {"extraction": time.perf_counter() - start}
    start = time.perf_counter()
    sources = [class_data.TokenSource(cache.arrays(split), job.device) for split in datasets.SPLITS]
    wait(job.device)
    phases["reading the tokens"] = time.perf_counter() - start
    phases |= {"fitting": 0.0, "evaluation": 0.0}
    for name in cache.labels.classes:
        trainer = train.make_trainer(config, cache, name, 0, *sources)
        phases["fitting"] += job.seconds(trainer.train_epoch)
        phases["evaluation"] += job.seconds(lambda: trainer.evaluate(1, None))
    for name, seconds in phases.items():
        job.tell(name, f"{seconds:.1f} s for {total} images; {seconds * 60000 / total:.0f} s for 60,000")
    job.tell("peak memory", peak_memory(job.device))


PHASES = {  # name -> its function and its limit in seconds
    "machine": (machine, 60),
    "correctness": (correctness, 150),
    "extraction": (extraction, 110),
    "training": (training, 150),
    "default_job": (default_job, 110),
}


# ---------------------------------------------------------------- the course
def run_phase(name: str, args: argparse.Namespace, rows: Path) -> None:
    """In a process of its own: the phase's rows, appended to a file one by one."""

    def tell(what: str, value: str) -> None:
        with rows.open("a") as stream:
            stream.write(json.dumps([what, value]) + "\n")
        print(f"{what}: {value}", flush=True)

    sizes = SMALL if args.small else WHOLE
    device = utils.set_up(args.device, args.threads)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        PHASES[name][0](Job(device, sizes, Path(scratch), tell))


def child(name: str, args: argparse.Namespace, rows: Path, limit: float) -> tuple[float, str]:
    """Run a phase in a process -> its seconds, and what went wrong, in one line."""
    command = [sys.executable, __file__, "--phase", name, "--rows", str(rows), "--device", args.device]
    command += ["--threads", str(args.threads), *(["--small"] if args.small else [])]
    command += ["--scratch", args.scratch] if args.scratch else []
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=limit)
        lines = [line for line in said.splitlines() if line.strip()]
        wrong = "" if process.returncode == 0 else lines[-1] if lines else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wrong = f"ended after {limit:.0f} s"
    return time.perf_counter() - start, wrong


def table(results: dict[str, list[Row]]) -> str:
    """The rows of all phases as a Markdown table."""
    lines = ["| phase | what | value |", "|---|---|---|"]
    for phase, rows in results.items():
        lines += [f"| {phase} | {what} | {value.replace('|', '/')} |" for what, value in rows]
    return "\n".join(lines)


def course(args: argparse.Namespace) -> int:
    """All phases -> the number of those that failed; the table is written anew after each."""
    results: dict[str, list[Row]] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or PHASES:
            print(f"== {name}", flush=True)
            rows = Path(folder) / name
            seconds, wrong = child(name, args, rows, args.limit or PHASES[name][1])
            told = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
            results[name] = [(what, value) for what, value in told]
            results[name].append(("**failed**", wrong) if wrong else ("seconds", f"{seconds:.0f}"))
            failed += bool(wrong)
            command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
            text = f"# The GPU path, measured\n\n`{command}`\n\n{table(results)}\n"
            write_text(args.output, text)
    print(f"\n{table(results)}\n\nkept in {args.output}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--only", nargs="+", choices=PHASES, help="these phases")
    parser.add_argument("--limit", type=float, default=0, help="seconds per phase, instead of its own limit")
    parser.add_argument("--output", type=Path, default=Path("results/gpu.md"))
    parser.add_argument("--scratch", default=None, help="folder for caches and images; 6 GB")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        run_phase(args.phase, args, args.rows)
        return 0
    return 1 if course(args) else 0


if __name__ == "__main__":
    sys.exit(main())
