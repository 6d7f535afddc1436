"""Time and memory: ours beside a plain transcription of the released code (transcription.py), in one run.

python benchmarks/speed.py step                                  a training step at several batch sizes
python benchmarks/speed.py extraction --images 500 --busy 1      of CIFAR-10, alone and beside a busy core
python benchmarks/speed.py job --images 3000 --classes 3         from images to AUROC
python benchmarks/speed.py cache --cold                          reading features, beside one .npy
python benchmarks/speed.py run --script "main.py --preset quickstart" --busy 1      in an empty folder

What is compared runs in turns; a figure is the median of --repeats turns, in brackets the lowest and the
highest."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import transcription

import datasets
import extractor
import model
import train
import utils
from backbone import arithmetic, backbones
from backbone.extraction import Extraction
from backbone.identity import Identity, cache_identity
from config import Config, make_config
from reporting.tables import as_markdown
from shell.command_line import OneLineParser

ROOT = Path(__file__).resolve().parents[1]
Table = tuple[list[str], list[list[str]]]  # header, rows


# ---------------------------------------------------------------- measuring
def times(jobs: dict[str, Callable], repeats: int, settle: int = 0) -> dict[str, list[float]]:
    """Seconds of each job, which ends with its result on the CPU, run in turns after one warm-up turn, so
    that all see the same machine. settle: how often a job runs before it is timed in a turn, where steps
    follow steps of their own kind in use."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            for _ in range(settle):
                job()
            took = timeit.timeit(job, number=1)
            found[name] += [took] if turn else []
    return found


def shown(values: list[float], form: str = "{:.1f}") -> str:
    middle, low, high = map(form.format, np.quantile(values, [0.5, 0, 1]))
    return f"{middle} ({low} to {high})"


def beside(cores: int) -> str:
    return f"beside {cores} busy cores" if cores else "alone"


@contextmanager
def burning(cores: int) -> Iterator[None]:
    """In the block other programs keep so many cores busy."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measured(command: list[str], folder: Path) -> tuple[float, int]:
    """Run a script in a folder -> seconds, its start included, and peak memory in bytes, pages that it shares
    with its descendants counted once. Raises CalledProcessError, its last words on the screen."""
    peak, start = 0, time.perf_counter()
    process = psutil.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(psutil.Error):  # one ended in between
            family = (process, *process.children(recursive=True))
            peak = max(peak, sum(each.memory_full_info().pss for each in family))
        time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, peak


# ---------------------------------------------------------------- a training step
def same_flows(channels: int, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our flow and the transcription, C = H, K = 4, N = 64, with the same parameters."""
    theirs = transcription.Flow(channels).to(device)
    ours = model.build_flow(
        channels, (8, 8), n_tokens=64, n_blocks=4, hidden=channels, clamp=3.0, fusion="class_attention",
        identity_start=False, alpha=0.5, window=3,
    ).to(device)  # fmt: skip
    state = theirs.state_dict()
    ours.load_state_dict({name.replace("blocks.", "module_list."): state[name] for name in state})
    return ours, theirs


def our_step(flow: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """A step as train.py takes it, on tokens (B, 1 + N, C) -> the loss."""
    semantic, patches = tokens[:, 0].contiguous(), tokens[:, 1:].contiguous()
    with arithmetic.products(tokens.device):
        loss = model.loss_per_image(*flow(semantic, [patches])).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def compare_steps(args: argparse.Namespace, device: torch.device) -> Table:
    """Forward, backward and optimiser, and how far the losses of the first step are apart."""
    utils.keep_freed_memory()  # as training does; the transcription gains what ours gains
    rows = []
    for batch in args.batches:
        torch.manual_seed(0)
        ours, theirs = same_flows(args.channels, device)
        tokens = torch.randn(batch, 65, args.channels, device=device)
        adam = torch.optim.Adam(ours.parameters(), lr=Config.lr_init, **train.ADAM)
        plain_adam = transcription.make_optimizer(theirs)
        jobs = {
            "theirs": lambda: transcription.step(theirs, plain_adam, tokens),
            "ours": lambda: our_step(ours, adam, tokens),
        }
        plain_loss, loss = (job() for job in jobs.values())
        found = times(jobs, args.repeats, settle=2)
        theirs_s, ours_s = map(np.median, found.values())
        row = [str(batch), *(shown([1000 * value for value in values]) for values in found.values())]
        row += [f"{theirs_s / ours_s:.2f}", f"{batch / ours_s:.0f}"]
        rows.append([*row, f"{abs(loss - plain_loss) / abs(plain_loss):.1e}"])
    return ["batch", "transcription, ms", "ours, ms", "ratio", "ours, images/s", "losses apart"], rows


# ---------------------------------------------------------------- extraction
def config_of(args: argparse.Namespace, **more) -> Config:
    names = ("dataset", "dataset_path", "extractor", "weights_path")
    return make_config({**{name: getattr(args, name) for name in names}, **more})


def released_loop(identity: Identity, device: torch.device) -> Callable[..., torch.Tensor]:
    """The released loop, a function of a data set, a split and rows of it: every image opened, resized and
    normalised on its own, batches of 32, float32 -> (n, 1 + N, C) on the CPU."""
    size, fields = identity.img_size, identity.fields
    backbone = backbones.load_backbone(identity.extractor, size, identity.weights_path, identity.seed)
    backbone.to(device)
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    normalize = transforms.Normalize(fields["norm_mean"], fields["norm_std"])
    transform = transforms.Compose([resize, transforms.ToTensor(), normalize])

    @torch.inference_mode()
    def tokens(images: datasets.ImageSet, split: str, rows: Sequence[int]) -> torch.Tensor:
        found = []
        for start in range(0, len(rows), 32):
            batch = [transform(Image.fromarray(images.read(split, i))) for i in rows[start : start + 32]]
            found.append(backbone(torch.stack(batch).to(device)).cpu())
        return torch.cat(found)

    return tokens


def spread(images: datasets.ImageSet, counts: dict[str, int]) -> datasets.ImageSet:
    """The data set cut to so many images of each split, spread over its classes."""
    return images.kept(
        {split: np.linspace(0, len(images.images[split]) - 1, n, dtype=int) for split, n in counts.items()}
    )


def compare_extraction(args: argparse.Namespace, device: torch.device) -> Table:
    """Images per second from the files to the features in memory, but for the released loop tokens alone."""
    config = config_of(args, preset="accurate", mirror=False, img_size=None)  # bands and places, own size
    identity, count = cache_identity(config, device), args.images
    images = spread(datasets.images_of(config), {"train": count, "test": 0})
    ours, by_torch = (Extraction(identity, device) for _ in range(2))
    ours.compile()
    released = released_loop(identity, device)

    def extracted(job: Extraction) -> None:
        for batch in job.features(images.images["train"]):
            _ = [values.cpu() for values in batch.values()]

    jobs = {"the released loop": lambda: released(images, "train", range(count))}
    jobs |= {"PyTorch": lambda: extracted(by_torch), "ours": lambda: extracted(ours)}
    found = {}
    for cores in sorted({0, args.busy}):
        with burning(cores):
            found[beside(cores)] = times(jobs, args.repeats)
    rows = [[name, *(shown([count / s for s in own[name]]) for own in found.values())] for name in jobs]
    exact = released(images, "train", range(count))[:, 0]
    tokens = torch.cat([each["tokens"][:, 0].cpu() for each in ours.features(images.images["train"])]).float()
    off = f"{(tokens - exact).norm() / exact.norm():.1e}"
    rows.append(["ours, semantic tokens off the released ones", *[off] * len(found)])
    return [f"{count} images at {identity.img_size}, images/s", *found], rows


# ---------------------------------------------------------------- the whole job
def write_images(images: datasets.ImageSet, folder: Path) -> None:
    """train/ and test/ with a folder per class."""
    for split in datasets.SPLITS:
        for i, category in enumerate(images.labels.split(split).category):
            path = folder / split / images.labels.classes[category] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.read(split, i)).save(path)


def released_job(args: argparse.Namespace, device: torch.device) -> None:
    """Class after class, as the released scripts do it: extract the class's training images and all test
    images one at a time in float32, store both, train for an epoch, score -> auroc.json."""
    config, aurocs = config_of(args), {}
    images, released = datasets.images_of(config), released_loop(cache_identity(config, device), device)
    for name in images.labels.classes[: args.classes]:
        train_rows, test_rows, labels = images.labels.one_class(name)
        for split, rows in (("train", train_rows), ("test", test_rows)):
            np.save(f"{name}-{split}.npy", released(images, split, rows).numpy())
        tokens = {split: torch.from_numpy(np.load(f"{name}-{split}.npy")) for split in datasets.SPLITS}
        flow = transcription.fit(tokens["train"], config.batch_size, device)
        with torch.no_grad():
            batches = tokens["test"].to(device).split(config.batch_size)
            z = torch.cat([flow(batch[:, 0], batch[:, 1:])[0].cpu() for batch in batches])
        aurocs[name] = utils.auroc(labels, z.square().mean(1).numpy())
    Path("auroc.json").write_text(json.dumps({"mean": {"auroc": np.mean(list(aurocs.values()))}}))


def compare_jobs(args: argparse.Namespace, device: torch.device) -> Table:
    """main.py with the released method (all tokens, H = C, one epoch; every image extracted once, float16 on
    disk), report included, beside ``released_job``; each a process of its own in an empty folder."""
    images = datasets.images_of(config_of(args))
    classes = images.labels.classes[: args.classes]
    counts = {"train": round(args.images * 5 / 6), "test": round(args.images / 6)}
    given = ["--extractor", args.extractor, "--device", args.device, "--threads", str(args.threads)]
    given += ["--dataset", "folder"] + (["--weights_path", args.weights_path] if args.weights_path else [])
    method = "--fusion class_attention --normalize none --meta_epochs 1 --sub_epochs 1 --keep results"
    ours = [*method.split(), "--baselines", "False", "--modelname", "ours", "--class_name", ",".join(classes)]
    jobs = {  # name -> its command, and where its mean AUROC is
        "released": ([__file__, "released", "--classes", str(args.classes)], "auroc.json"),
        "ours": ([str(ROOT / "main.py"), *ours], "runs/ours/results.json"),
    }
    found: dict[str, list] = {name: [] for name in jobs}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        given += ["--dataset_path", str(Path(scratch, "images").absolute())]
        write_images(spread(images, counts), Path(scratch, "images"))
        for _ in range(args.repeats):
            for name, (command, result) in jobs.items():
                with tempfile.TemporaryDirectory(dir=scratch) as place:
                    cost = measured([*command, *given], Path(place))
                    disk = sum(file.stat().st_size for file in Path(place).rglob("*") if file.is_file())
                    auroc = json.loads(Path(place, result).read_text())["mean"]["auroc"]
                    found[name].append([*cost, disk, auroc])
    rows = []
    for name, turns in found.items():
        took, memory, disk, auroc = zip(*turns)
        sizes = [f"{max(values) / 1e9:.2f}" for values in (memory, disk)]
        rows.append([name, shown(took), *sizes, f"{auroc[-1]:.4f}"])
    return [f"{args.images} images, {len(classes)} classes", "s", "peak GB", "disk GB", "AUROC"], rows


# ---------------------------------------------------------------- reading features, and any script
def forget(*folders: Path) -> None:
    """Drop files from the system's cache: the next reading comes from the disk (Linux)."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare_reading(args: argparse.Namespace, device: torch.device) -> Table:
    """Seconds to read the training tokens of a data set, extracted first where they are not there, beside the
    same in one memory-mapped .npy."""
    features = extractor.ensure_features(config_of(args), device)
    ours, rows = features.arrays("train")["tokens"], []
    batches = np.random.default_rng(0).integers(0, len(ours), (300, 32))

    def read(array, parts) -> None:
        for part in parts:
            np.array(array[part])

    ways = {
        "in order": lambda array: read(array, [slice(i, i + 64) for i in range(0, len(array), 64)]),
        "300 random batches of 32": lambda array: read(array, batches),
        "all semantic tokens": lambda array: array.semantic() if array is ours else np.array(array[:, 0]),
    }
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        np.save(Path(scratch, "plain.npy"), ours[:])
        for name, way in ways.items():
            found: dict[str, list[float]] = {"one .npy": [], "ours": []}
            for _ in range(args.repeats):
                plain = np.load(Path(scratch, "plain.npy"), mmap_mode="r")
                for values, array in zip(found.values(), (plain, ours)):
                    if args.cold:
                        forget(Path(scratch), features.folder)
                    values.append(timeit.timeit(lambda: way(array), number=1))
            rows.append([name, *(shown(values, "{:.3f}") for values in found.values())])
    return [f"{' x '.join(map(str, ours.shape))} float16, s", "one .npy", "ours"], rows


def measure_script(args: argparse.Namespace, device: torch.device) -> Table:
    """A script of the repository in an empty folder, alone and beside busy cores."""
    (script, *options), rows = shlex.split(args.script), []
    for cores in sorted({0, args.busy}):
        with burning(cores), tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            places = [Path(tempfile.mkdtemp(dir=scratch)) for _ in range(args.repeats)]
            took, memory = zip(*(measured([str(ROOT / script), *options], place) for place in places))
        rows.append([beside(cores), shown(took), f"{max(memory) / 1e9:.2f}"])
    return [f"python {args.script}", "s", "peak GB"], rows


# ---------------------------------------------------------------- the script
COMMANDS = {
    "step": compare_steps, "extraction": compare_extraction, "job": compare_jobs,
    "released": released_job, "cache": compare_reading, "run": measure_script,
}  # fmt: skip


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--repeats", type=int, default=5, help="turns [5]")
    parser.add_argument("--device", default="auto", help="[auto]")
    parser.add_argument("--threads", type=int, default=0, help="[all]")
    parser.add_argument("--busy", type=int, default=0, help="extraction, run: and beside so many busy cores")
    parser.add_argument("--channels", type=int, default=768, help="step: C = H [768]")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64, 128], help="step: sizes")
    parser.add_argument("--dataset", default="cifar10", help="[cifar10]")
    parser.add_argument("--dataset_path", default="data/cifar10", help="[data/cifar10]")
    parser.add_argument("--extractor", default="efficientnet_lite0", help="[efficientnet_lite0]")
    parser.add_argument("--weights_path", help="an absolute path, or random [published ones]")
    parser.add_argument("--images", type=int, default=1000, help="extraction, job: so many of the set [1000]")
    parser.add_argument("--classes", type=int, default=3, help="job: so many of the set [3]")
    parser.add_argument("--cold", action="store_true", help="cache: from the disk, not the system's cache")
    parser.add_argument("--scratch", help="folder for what is written [the system's]")
    parser.add_argument("--script", default="main.py --preset quickstart", help="run: with its options")
    args = parser.parse_args()
    table = COMMANDS[args.what](args, utils.set_up(args.device, args.threads))
    if table:
        made = ", ".join(f"{name} {value}" for name, value in utils.versions().items())
        print(f"medians of {args.repeats}; {made}\n\n{as_markdown(*table)}")


if __name__ == "__main__":
    main()
