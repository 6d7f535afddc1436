"""The time of `make run`'s main job, from images to report: idle, and beside a program that takes a core.

python benchmarks/first_run.py --repeats 5        half an hour; a Markdown table
python benchmarks/first_run.py --small            the same course in seconds

Each run starts in an empty folder: nothing is kept from the one before. Busy: one other program computes
without end; reading: one reads files without end."""

import argparse
import contextlib
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import common  # noqa: F401  the repository on the path

import utils
from reporting.tables import as_markdown
from shell.files import write_text

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--extractor test_efficientnet --weights_path random --img_size 64 --class_name 0 --fusion none "
    "--meta_epochs 1 --least_steps 0 --keep weights --baselines False --threads 1"
).split()


def compute() -> None:
    while True:
        pass


def read_files() -> None:
    while True:
        for path in Path(sys.prefix).rglob("*.py"):
            with contextlib.suppress(OSError):
                path.read_bytes()


OTHERS: dict[str, Callable[[], None] | None] = {"idle": None, "busy": compute, "reading": read_files}


@contextlib.contextmanager
def beside(program: Callable[[], None] | None) -> Iterator[None]:
    """In the block another process runs ``program``."""
    if program is None:
        yield
        return
    child = multiprocessing.get_context("spawn").Process(target=program, daemon=True)
    child.start()
    try:
        yield
    finally:
        child.kill()
        child.join()


def seconds(options: list[str]) -> float:
    """Wall time of one run in an empty folder. Raises CalledProcessError, with its last words on the screen,
    when it fails."""
    command = [sys.executable, str(ROOT / "main.py"), "--preset", "quickstart", *options]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def table(times: dict[str, list[float]], options: list[str]) -> str:
    rows = [
        [name, f"{statistics.median(found):.0f}", ", ".join(f"{value:.0f}" for value in found)]
        for name, found in times.items()
    ]
    made = ", ".join(f"{name} {value}" for name, value in utils.versions().items())
    command = " ".join(["python main.py --preset quickstart", *options])
    return (
        f"`{command}`, from images to report; {made}\n\n{as_markdown(['beside', 'median s', 'all'], rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--only", nargs="+", choices=OTHERS, default=list(OTHERS))
    parser.add_argument("--output", type=Path, default=None, help="a file for the table, too")
    args = parser.parse_args()
    options = SMALL if args.small else []
    times: dict[str, list[float]] = {name: [] for name in args.only}
    for turn in range(args.repeats):
        for name, found in times.items():
            with beside(OTHERS[name]):
                found.append(seconds(options))
            print(f"turn {turn + 1}, {name}: {found[-1]:.1f} s", file=sys.stderr, flush=True)
    text = table(times, options)
    print(text)
    if args.output:
        write_text(args.output, text)


if __name__ == "__main__":
    main()
