"""The day a GPU is there: is it right, and how quick? One command, under ten minutes, a Markdown table.

python benchmarks/gpu.py                          all phases -> results/gpu.md
python benchmarks/gpu.py --only correctness step
python benchmarks/gpu.py --device cpu --small     the same course in a minute, on any machine

The table is written anew with every row: a course that is ended keeps its rows, and where a phase fails, its
error stands in the last one. step, extraction and job are those of speed.py, with untrained weights on
digits."""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import speed
import torch

import config as knobs
import train
import utils
from backbone import arithmetic, resizing
from backbone.extraction import Extraction
from backbone.identity import cache_identity
from reporting.tables import as_markdown
from shell.command_line import OneLineParser
from shell.files import write_text

CPU = torch.device("cpu")
WHOLE = {"extractor": "VIT", "channels": 768, "images": 1500, "classes": 2, "repeats": 3}
SMALL = {"extractor": "test_vit", "channels": 16, "images": 24, "classes": 1, "repeats": 1}
SMALL_DIGITS = "--extractor test_efficientnet --img_size 64 --fusion none --sub_epochs 1".split()
ON_DIGITS = dict(dataset="digits", dataset_path=None, weights_path="random", batches=[32, 128], busy=0)

Tell = Callable[[str, str], None]  # a row of the table: what, value


def machine(args: argparse.Namespace, device: torch.device, tell: Tell) -> None:
    for name, value in utils.versions().items():
        tell(name, value)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        tell("memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    for dtype in (torch.bfloat16, torch.float32):
        peak = matmul_peak(device, dtype, 256 if args.small else 8192)
        tell(f"matmul peak, {str(dtype).removeprefix('torch.')}", f"{peak / 1e12:.3g} TFLOP/s")


def matmul_peak(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of a square matrix product (n x n): the best of ten, half of them as training takes them."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    took: list[float] = []
    with torch.inference_mode():
        for arithmetics in (nullcontext(), arithmetic.products(device)):
            with arithmetics:
                took += timeit.repeat(lambda: torch.matmul(a, b)[0, 0].item(), number=1)  # item: waits
    return 2 * n**3 / min(took)


# ---------------------------------------------------------------- is it right?
def correctness(args: argparse.Namespace, device: torch.device, tell: Tell) -> None:
    """The CPU against the device: resize, tokens, training steps, AUROC of two digits."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (8, 3, 32, 32)).astype(np.uint8))
    exact, ours = (resizing.resized(pixels.to(d), (224, 224)).cpu().float() for d in (CPU, device))
    tell("resize 32 to 224", f"{(exact - ours).abs().max():.2g} grey levels apart at most")
    exact = tokens(args, CPU, "float32")
    for precision in ("float32", "bfloat16"):
        ours = tokens(args, device, precision)
        cosine = torch.nn.functional.cosine_similarity(exact, ours, dim=2)
        apart = (exact - ours).abs().max() / exact.abs().max()
        told = f"{apart:.1e} apart, cosine {cosine.mean():.5f}, lowest {cosine.min():.5f}"
        tell(f"tokens in {precision} against the CPU's float32", told)
    apart = [abs(a - b) / abs(a) for a, b in zip(losses(args, CPU), losses(args, device))]
    tell("loss apart after 1 and 10 steps", f"{apart[0]:.1e}, {apart[-1]:.1e}")
    for place in dict.fromkeys((CPU, device)):
        tell(f"AUROC of digits 0 and 1 on {place}", digits(args, place))


def tokens(args: argparse.Namespace, device: torch.device, precision: str) -> torch.Tensor:
    """Of eight digits (8, 1 + N, C), float32."""
    config = speed.config_of(args, precision=precision)
    images = speed.spread(speed.datasets.images_of(config), {"train": 8, "test": 0})
    rows = Extraction(cache_identity(config, device), device).features(images.images["train"])
    return torch.cat([each["tokens"].cpu().float() for each in rows])


def losses(args: argparse.Namespace, device: torch.device) -> list[float]:
    """Of ten training steps on the same tokens, from the same parameters."""
    torch.manual_seed(0)
    flow, _ = speed.same_flows(args.channels, CPU)
    tokens, flow = torch.randn(32, 65, args.channels).to(device), flow.to(device)
    optimizer = torch.optim.Adam(flow.parameters(), lr=knobs.Config.lr_init, **train.ADAM)
    return [speed.our_step(flow, optimizer, tokens) for _ in range(10)]


def digits(args: argparse.Namespace, device: torch.device) -> str:
    """AUROC of digits 0 and 1 by the preset quickstart. Raises CalledProcessError."""
    given = "--preset quickstart --class_name 0,1 --baselines False --keep results --weights_path random"
    command = [sys.executable, str(speed.ROOT / "main.py"), *given.split(), "--modelname", "digits"]
    command += ["--device", str(device), *(SMALL_DIGITS if args.small else [])]
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        subprocess.run(command, cwd=scratch, stdout=subprocess.DEVNULL, check=True)
        found = json.loads(Path(scratch, "runs/digits/results.json").read_text())["classes"]
    return " ".join(f"{entry['auroc']:.4f}" for entry in found.values())


# ---------------------------------------------------------------- how quick is it?
def timed(name: str, args: argparse.Namespace, device: torch.device, tell: Tell) -> None:
    """A comparison of speed.py, row by row."""
    header, rows = speed.COMMANDS[name](args, device)
    for first, *values in rows:
        tell(f"{header[0]}: {first}", "; ".join(f"{value} {what}" for what, value in zip(header[1:], values)))
    if device.type == "cuda":
        tell("peak memory", f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB")


PHASES = {"machine": machine, "correctness": correctness}
PHASES |= {name: functools.partial(timed, name) for name in ("step", "extraction", "job")}


def main() -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="[cuda]")
    parser.add_argument("--threads", type=int, default=0, help="[all]")
    parser.add_argument("--small", action="store_true", help="a minute instead of ten")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES), help="these phases")
    parser.add_argument("--output", type=Path, default=Path("results/gpu.md"), help="[results/gpu.md]")
    parser.add_argument("--scratch", help="folder for features and images; 6 GB [the system's]")
    args = parser.parse_args()
    vars(args).update(ON_DIGITS | (SMALL if args.small else WHOLE))
    table: list[list[str]] = []
    command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])

    def tell(phase: str, what: str, value: str) -> None:
        table.append([phase, what, value])
        text = as_markdown(["phase", "what", "value"], table)
        write_text(args.output, f"# The GPU path, measured\n\n`{command}`\n\n{text}\n")
        print(f"{phase}: {what}: {value}", flush=True)

    for name in args.only:
        start = time.perf_counter()
        try:
            PHASES[name](args, utils.set_up(args.device, args.threads), functools.partial(tell, name))
            tell(name, "seconds", f"{time.perf_counter() - start:.0f}")
        except Exception as error:  # whatever it is: the other phases shall be tried
            tell(name, "**failed**", f"{type(error).__name__}: {error}")
    return any(what == "**failed**" for _, what, _ in table)


if __name__ == "__main__":
    sys.exit(main())
