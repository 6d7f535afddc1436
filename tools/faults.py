"""Do to an extraction what machines do to it, and count what it cost: a Markdown table.

python tools/faults.py                  100 kills, and the other faults in proportion (about five minutes)
python tools/faults.py --times 1000     the same with 1,000
python tools/faults.py --times 10 --seed 3

Each extraction is a process of its own (forked: what it imports is loaded once), over generated images with
a small untrained backbone. Lost: finished shards that had to be made again. Wrong: features that are not
those of an uninterrupted run, also of an unfinished one, and processes that end otherwise than they should:
with a traceback, too late, or not at all."""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

import extractor
from backbone import storing
from cache.feature_cache import ImageList
from cache.store import CacheIdentity, Store
from config import Config
from shell.command_line import run_script
from tools.processes import start

storing.SHARD_ROWS = 7  # many small shards
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Row(NamedTuple):
    fault: str
    times: int
    lost: int
    wrong: int


class Child:
    """A process that runs extractor.py's main."""

    def __init__(self, config: Config, log: Path):
        self.log = log
        self.status: int | None = None
        log.unlink(missing_ok=True)
        self.pid = start(partial(run_script, extractor.main, config), log)

    def wait(self, seconds: float = 60) -> int | None:
        """The exit status, negative for a signal; None when it still runs after so many seconds."""
        end = time.monotonic() + seconds
        while self.status is None and time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.002)
        return self.status

    def signal(self, number: int) -> None:
        if self.status is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()


class Bench:
    """Generated images, their features as an uninterrupted run makes them, and how long that takes.

    longest: seconds in which a process that is asked to end must do so."""

    def __init__(self, root: Path, rng: random.Random, longest: float):
        self.root, self.rng, self.longest, self.count = root, rng, longest, 0
        noise = np.random.default_rng(0)
        for split, count in (("train", 50), ("test", 20)):
            for name in "abc":
                (root / "images" / split / name).mkdir(parents=True)
                for i in range(count):
                    pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / "images" / split / name / f"{i:03d}.png")
        folder = self.new_folder()
        self.finish(folder)  # the first reads the images from the disk
        shutil.rmtree(folder)
        start = time.monotonic()
        self.finish(folder)
        self.seconds, self.reference = time.monotonic() - start, rows_of(folder)

    def new_folder(self) -> Path:
        self.count += 1
        return self.root / "caches" / str(self.count)

    def start(self, folder: Path, log: int = 0) -> Child:
        settings: dict[str, Any] = {
            "dataset": "folder",
            "dataset_path": str(self.root / "images"),
            "extractor": "test_resnet",
            "weights_path": "random",
            "img_size": (32, 32),
            "precision": "float32",
            "threads": 1,
            "device": "cpu",
            "feature_path": str(folder),
        }
        return Child(Config(**settings), self.root / f"log-{log}")

    def finish(self, folder: Path) -> str:
        """Run an extraction to its end -> what it printed. Raises RuntimeError when it fails."""
        child = self.start(folder)
        if (status := child.wait()) != 0:
            raise RuntimeError(f"status {status}: {child.log.read_text()}")
        return child.log.read_text()

    def moment(self) -> float:
        """Seconds after the start, anywhere in a run and a little beyond."""
        return self.rng.uniform(0, 1.2 * self.seconds)

    def wrong(self, folder: Path) -> int:
        """1 if features that should be whole are not as they should be."""
        return int(rows_of(folder).keys() != self.reference.keys() or self.misread(folder))

    def misread(self, folder: Path) -> int:
        """1 if any image has other features than it should, whatever has happened to the store."""
        found = rows_of(folder)
        return int(any(not np.allclose(found[image], self.reference[image], 1e-2, 1e-2) for image in found))


def stores(folder: Path) -> list[Store]:
    return [Store(CacheIdentity(path, {})) for path in folder.glob("test_resnet-*")]


def rows_of(folder: Path) -> dict[str, np.ndarray]:
    """{hash of an image: its tokens} of all sound shards."""
    found: dict[str, np.ndarray] = {}
    for store in stores(folder):
        for shard in store.shards:
            if not shard.damage(thorough=True):
                found |= zip(shard.images, np.load(shard.files["tokens"].path).astype(np.float32))
    return found


def finished(folder: Path) -> dict[str, int]:
    """The shards that are done: {name: inode of the record}; one that is written again has another."""
    return {path.parent.name: path.stat().st_ino for path in folder.glob("test_resnet-*/[!.]*/record.json")}


def lost_of(before: dict[str, int], folder: Path) -> int:
    now = finished(folder)
    return sum(now.get(name) != inode for name, inode in before.items())


# ---------------------------------------------------------------- the faults
def kills(bench: Bench, times: int) -> Row:
    """SIGKILL at a random moment, again and again until the cache is finished; then a new one."""
    lost = wrong = done = 0
    folder = bench.new_folder()
    while done < times:
        before, child = finished(folder), bench.start(folder)
        status = child.wait(bench.moment())
        if status is None:
            child.kill()
            done += 1
        lost, wrong = lost + lost_of(before, folder), wrong + bench.misread(folder)
        if status is not None:
            wrong += status != 0 or bench.wrong(folder)
            shutil.rmtree(folder)
            folder = bench.new_folder()
    bench.finish(folder)
    return Row("SIGKILL of an extraction at a random moment", times, lost, wrong + bench.wrong(folder))


def asked_to_end(bench: Bench, times: int) -> Row:
    """SIGTERM, SIGINT and SIGHUP: each must end the process in two seconds with one line on what is kept."""
    lost = wrong = done = 0
    folder = bench.new_folder()
    while done < times:
        before, child, number = finished(folder), bench.start(folder), SIGNALS[done % len(SIGNALS)]
        if child.wait(0.05 + bench.moment()) is None:
            child.signal(number)
            status = child.wait(bench.longest)
            if status is None:
                child.kill()
            told = child.log.read_text().strip().splitlines()[-1]
            ended_well = status == 128 + number and told.startswith("interrupted: ")
            if not (ended_well or status == 0):  # it may have been at its end already
                print(f"{number.name} ended it with status {status}: {told}", file=sys.stderr)
                wrong += 1
            done += 1
        lost, wrong = lost + lost_of(before, folder), wrong + bench.misread(folder)
        if rows_of(folder).keys() == bench.reference.keys():
            bench.finish(folder)
            wrong += bench.wrong(folder)
            shutil.rmtree(folder)
    bench.finish(folder)
    return Row("SIGTERM, SIGINT or SIGHUP at a random moment", times, lost, wrong + bench.wrong(folder))


def together(bench: Bench, times: int) -> Row:
    """Two, three or five processes at once, which know nothing of each other; one is killed."""
    lost = wrong = 0
    for turn in range(times):
        folder, size = bench.new_folder(), (2, 3, 5)[turn % 3]
        children = [bench.start(folder, number) for number in range(size)]
        victim = bench.rng.randrange(size)
        children[victim].wait(bench.moment())
        before = finished(folder)
        for number, child in enumerate(children):
            if number == victim:
                child.kill()
            else:
                wrong += child.wait() != 0
        lost, wrong = lost + lost_of(before, folder), wrong + bench.wrong(folder)
        shutil.rmtree(folder)
    return Row("one of 2, 3 or 5 processes killed", times, lost, wrong)


def all_together(bench: Bench, times: int) -> Row:
    """All processes killed together, as when a machine is switched off: the next run goes on."""
    lost = wrong = 0
    for _ in range(times):
        folder = bench.new_folder()
        children = [bench.start(folder, number) for number in range(3)]
        children[0].wait(bench.moment())
        for child in children:
            child.kill()
        before = finished(folder)
        bench.finish(folder)
        lost, wrong = lost + lost_of(before, folder), wrong + bench.wrong(folder)
        shutil.rmtree(folder)
    return Row("all of three processes killed at once", times, lost, wrong)


def flips(bench: Bench, times: int) -> Row:
    """One bit anywhere in any file: found, and only its shard made again."""
    lost = wrong = 0
    folder = bench.new_folder()
    bench.finish(folder)
    for turn in range(times):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = files[turn % len(files)]
        data = bytearray(path.read_bytes())
        data[bench.rng.randrange(len(data))] ^= 1 << bench.rng.randrange(8)
        path.write_bytes(data)
        before = finished(folder)
        try:
            bench.finish(folder)
        except RuntimeError:
            wrong += 1
        lost += max(0, lost_of(before, folder) - (path.parent.name in before))
        listed = next(iter(ImageList.read(file) for file in folder.glob("datasets/*.json")))
        wrong += bench.wrong(folder) or listed is None or any(store.damaged for store in stores(folder))
    return Row("one bit flipped in a file, every file in turn", times, lost, wrong)


def full_disk(bench: Bench, times: int) -> Row:
    """A small tmpfs that fills up while the extraction writes; then there is room again."""
    lost = wrong = 0
    for _ in range(times):
        place = bench.new_folder()
        place.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", place], check=True)
        try:
            folder = place / "cache"
            child = bench.start(folder)
            child.wait(bench.moment())
            fill(place / "filler")
            status = child.wait()
            told = child.log.read_text().strip().splitlines()[-1]
            full = status == 2 and "No space left" in told or "has 0.00 GB free" in told
            wrong += not (full or status == 0) or bench.misread(folder)
            (place / "filler").unlink()
            before = finished(folder)
            bench.finish(folder)
            lost, wrong = lost + lost_of(before, folder), wrong + bench.wrong(folder)
        finally:
            subprocess.run(["umount", "-l", place], check=True)
    return Row("disk full while writing, then room again", times, lost, wrong)


def fill(path: Path) -> None:
    """A file that takes what is free."""
    try:
        with open(path, "wb", buffering=0) as stream:
            for block in (1 << 16, 512):
                try:
                    while True:
                        stream.write(bytes(block))
                except OSError:
                    continue
    except OSError:
        pass


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
        )
        return tried.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


# ---------------------------------------------------------------- all of them
def plan(times: int) -> dict[Callable[[Bench, int], Row], int]:
    """How often each fault is done, for so many kills."""
    part = max(1, times // 10)
    faults: dict[Callable[[Bench, int], Row], int] = {
        kills: times,
        asked_to_end: max(3, part),
        together: max(3, part),
        all_together: part,
        flips: max(5, part),
    }
    return faults | ({full_disk: part} if can_mount() else {})


def main(arguments: argparse.Namespace) -> int:
    """Print the table -> how much was lost or wrong."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    total = 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        bench, start = Bench(Path(root), random.Random(arguments.seed), arguments.longest), time.monotonic()
        print(
            f"{len(bench.reference)} images, {storing.SHARD_ROWS} a shard; an uninterrupted run takes "
            f"{bench.seconds:.2f} s; seed {arguments.seed}\n"
        )
        print("| fault | times | lost | wrong |\n|---|---|---|---|", flush=True)
        for fault, times in plan(arguments.times).items():
            if arguments.only in fault.__name__:
                row = fault(bench, times)
                print(f"| {row.fault} | {row.times} | {row.lost} | {row.wrong} |", flush=True)
                total += row.lost + row.wrong
        print(f"\n{time.monotonic() - start:.0f} s")
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=100, help="kills; a tenth of it of most other faults")
    parser.add_argument("--longest", type=float, default=2.0, help="seconds in which a signal must be obeyed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", help="faults whose name holds this word: kills, together, flips ..."
    )
    parser.add_argument(
        "--folder", default=None, help="where to work; the system's temporary folder otherwise"
    )
    sys.exit(main(parser.parse_args()) > 0)
