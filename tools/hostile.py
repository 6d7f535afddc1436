"""Give every knob values that nobody should give, and see that each is one line: no traceback, no hang,
nothing written outside the working folder. Values are made from the knobs' types, ranges and choices.

python tools/hostile.py                 all of them, in forked processes: a Markdown table
python tools/hostile.py --sample 40     a seeded sample
python tools/hostile.py --scripts 20    and so many of them as scripts of their own
"""

import argparse
import dataclasses
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that timm knows shall not wait for a network

import numpy as np
import torch
from PIL import Image

import config as knobs
import main
from shell.command_line import from_command_line, run_script
from tools.processes import start, wait

TIMEOUT = 60.0  # seconds: more is a hang
MEMORY = 8 << 30  # bytes that a process may take: more is an error, and shall be one line
SMALL = (
    "--dataset folder --dataset_path ../images --extractor resnet10t --weights_path random --img_size 32 "
    "--token_grid 1 --fusion none --n_coupling_blocks 1 --fc_internal 8 --threads 1 --workers 0 "
    "--precision float32 --keep weights --normalize power_l2 --holdout 0.2"
).split()

NUMBERS = (
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "-1",
    "-0",
    "1e309",
    "1e-320",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "1_0",
    "٣",
    "1.5",
    "1e3",
    "zero",
    "None",
    "[1]",
    "1,2",
    "--1",
    "\0",
    "\udcff",
)
TEXTS = (
    "",
    " ",
    ".",
    "..",
    "../../x",
    "/",
    "/proc/self/mem",
    "/dev/null",
    "-x",
    "--",
    "a\nb",
    "\x1b[31m",
    "\0",
    "\udcff",
    "ä" * 200,
    "x" * 300,
    "x" * 100_000,
    "%s%n{}",
    "$(touch pwned)",
    "; rm -rf x",
    "a,b;c=d",
    "none",
    "nan",
    "\u202e",
    "con",
    "*",
    "a\\",
    "'\"",
)
MORE = {  # what only one knob's reader would stumble over
    "extractor": (
        "resnet18.",
        ".resnet18",
        "resnet18.a.b",
        "hf-hub:x/y",
        "timm/resnet18",
        "inception_next_tiny",
    ),
    "weights_path": ("../images", ".", "random ", "RANDOM", "features/meta.json"),
    "img_size": (
        "0",
        "1",
        "1x1",
        "4097",
        "4097x1",
        "32x32x32",
        "x",
        "32x",
        "-32",
        "auto:",
        "auto:0",
        "auto:99999999",
    ),
    "pixel_norm": ("0,0,0,0,0,0", "1e300,0,0,1,1,1", "nan,0,0,1,1,1", "0,0,0,1e-320,1,1", "0,0,0", "a,b,c"),
    "token_grid": ("0", "2", "9999", "centre", "compact", "full", "١", "released", "released1"),
    "device": ("cuda", "cuda:99", "cuda:" + "9" * 20, "cpu:1", "cpu:-1", "meta", "mps", "xla"),
    "class_name": ("all,all", "a,a", "A", "\\", ",", "a\\,b"),
    "sweep": (
        "=",
        ";",
        "fusion=",
        "fusion=none,,none",
        "modelname=x",
        "seed=-1",
        "sweep=sweep",
        "clamp=1;clamp=2",
        "lr_init=nan",
        "class_name=a,b",
        "fusion=none,none",
    ),
    "modelname": ("a/../b", "runs", "classes", "x/", "~", "NUL", "a" * 255),
    "feature_path": ("a/../b", "images/x", "x/" * 200),
    "centre_pool": ("1e-320", "1e-9", "0.01", "1e99"),
    "cluster": ("0", "tcp://", "tcp://127.0.0.1:99999", "ucx://x:1", "/", "host:-1", "ftp://127.0.0.1:1"),
}
NOT_HOSTILE = {
    "compile": ("True", "1", "yes", "true"),  # they only take their time
    "feature_path": ("../../x",),  # outside, as its user says
}


class Value(NamedTuple):
    """A knob and the text that it is given."""

    knob: str
    text: str


class Outcome(NamedTuple):
    kind: str  # accepted, refused, or what went wrong in capitals
    line: str  # what was told


def hostile_values() -> list[Value]:
    """Every knob's hostile values, made from its field."""
    values = []
    for field in dataclasses.fields(knobs.Config):
        kind, meta = knobs.plain_type(field.type), field.metadata
        texts = list(TEXTS if kind is str else NUMBERS)
        if kind is bool:
            texts = ["maybe", "2", "-1", "", "TRUE ", "nan", "\0", "\udcff", "True,False", "None"]
        for bound, beyond in ((meta["low"], -1), (meta["high"], 1)):
            if bound is not None:
                texts += [str(bound + beyond), str(bound + beyond * abs(bound) * 10**6)]
        if meta["choices"]:
            texts += [
                str(meta["choices"][0]).upper(),
                f"{meta['choices'][0]} ",
                ",".join(map(str, meta["choices"])),
            ]
        texts += MORE.get(field.name, ())
        texts = [text for text in texts if text not in NOT_HOSTILE.get(field.name, ())]
        values += [Value(field.name, text) for text in dict.fromkeys(texts)]
    return values


# ---------------------------------------------------------------- one value
class Place:
    """A folder in folders, with a few images beside it, in which a value is tried."""

    def __init__(self, root: Path):
        self.root, self.work = root, root / "outer" / "inner" / "work"
        self.work.mkdir(parents=True)
        self.log = root / "log"
        generator = np.random.RandomState(0)
        for split, count in (("train", 8), ("test", 3)):
            for number, name in enumerate("ab"):
                folder = self.work.parent / "images" / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = generator.randint(0, 120, (32, 32, 3)) + 100 * number
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        self.before = self.outside()

    def outside(self) -> dict[str, int]:
        """Everything that lies around the working folder, with its size."""
        found = {str(path): path.lstat().st_size for path in self.root.rglob("*") if path.is_file()}
        return {
            path: size
            for path, size in found.items()
            if Path(path) != self.log and self.work not in Path(path).parents
        }

    def clear(self) -> None:
        for path in self.work.iterdir():
            if path.name != "features":  # the plain ones serve many values
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.log.unlink(missing_ok=True)


def arguments_of(value: Value) -> list[str]:
    return [*SMALL, f"--{value.knob}={value.text}"]


def attempt(place: Place, value: Value) -> Outcome:
    """Run main.py's course with a value, in a forked process."""
    place.clear()

    def run() -> None:
        os.chdir(place.work)
        os.environ["HOME"] = str(place.root)
        if Path("/proc/self/statm").exists():  # on Linux
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["main.py", *arguments_of(value)]
        run_script(main.main, from_command_line(main.__doc__))

    pid = start(run, place.log)
    try:
        status = wait(pid, TIMEOUT)
    except TimeoutError:
        return Outcome("HANG", f"more than {TIMEOUT:.0f} s")
    return judge(place, status, place.log.read_text(errors="replace"))


def attempt_script(place: Place, value: Value) -> Outcome:
    """Run main.py itself with a value. NUL cannot be given on a command line."""
    place.clear()
    command = [os.fsencode(part) for part in (sys.executable, str(ROOT / "main.py"), *arguments_of(value))]
    try:
        done = subprocess.run(command, cwd=place.work, capture_output=True, timeout=2 * TIMEOUT)
    except subprocess.TimeoutExpired:
        return Outcome("HANG", f"more than {2 * TIMEOUT:.0f} s")
    return judge(place, done.returncode, (done.stdout + done.stderr).decode(errors="replace"))


def judge(place: Place, status: int, log: str) -> Outcome:
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    if place.outside() != place.before:
        return Outcome("OUTSIDE", str(set(place.outside()) ^ set(place.before)))
    if list(place.work.rglob("*.partial")):
        return Outcome("LEFTOVER", str(list(place.work.rglob("*.partial"))[0]))
    if "Traceback" in log or status not in (0, 2):
        kind = "TRACEBACK" if "Traceback" in log else f"STATUS {status}"
        return Outcome(kind, (log.strip().splitlines() or [""])[-1][:200])
    if status == 2 and len(lines) != 1:
        return Outcome("NO LINE", log[-200:])
    return Outcome("refused", lines[0]) if status else Outcome("accepted", "")


# ---------------------------------------------------------------- all of them
def outcomes(values: list[Value], run=attempt) -> Iterator[tuple[Value, Outcome]]:
    with tempfile.TemporaryDirectory(prefix="hostile") as root:
        place = Place(Path(root))
        for value in values:
            yield value, run(place, value)


def shown(text: str) -> str:
    text = ascii(text)[1:-1].replace("|", "\\|")
    return text if len(text) < 40 else f"{text[:30]}... ({len(text)})"


def main_of_tool() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--scripts", type=int, default=0)
    parser.add_argument("--knob", default="", help="only this knob's values")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, counts, bad = time.monotonic(), Counter[tuple[str, str]](), []
    values = [value for value in hostile_values() if arguments.knob in ("", value.knob)]
    if arguments.sample:
        values = random.Random(0).sample(values, arguments.sample)
    given = [value for value in values if "\0" not in value.text]
    scripts = random.Random(1).sample(given, min(arguments.scripts, len(given)))
    for kind, chosen, run in (("forked", values, attempt), ("script", scripts, attempt_script)):
        for value, outcome in outcomes(chosen, run):
            counts[kind, outcome.kind] += 1
            if outcome.kind.isupper() or outcome.kind.startswith("STATUS"):
                bad.append((value, outcome))
                print(
                    f"{value.knob} {shown(value.text)}: {outcome.kind} {outcome.line}",
                    file=sys.stderr,
                    flush=True,
                )
    print("| run as | outcome | values |\n|---|---|---|")
    for (kind, how), count in sorted(counts.items()):
        print(f"| {kind} | {how} | {count} |")
    about = f"{len(values)} values of {len({value.knob for value in values})} knobs"
    print(f"\n{about}, {time.monotonic() - began:.0f} s; wrong: {len(bad)}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main_of_tool()
