"""What machines and people do that they should not: kills, signals, flipped bits, a full disk; values that
nobody should give. Nothing that was finished is lost, nothing wrong is taken for right, a mistake is a line.

FAULTS=1000 python -m pytest tests/test_faults.py -k interrupted     so many examples, others every time"""

import csv
import dataclasses
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
from conftest import ROOT, make_folder
from hypothesis import Phase, given
from hypothesis import strategies as st
from processes import signalled, start, wait

import main  # noqa: F401  so that processes that are forked have its modules
from backbone import storing
from config import Config

FAULTS = int(os.environ.get("FAULTS", "2"))
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SMALL = {  # script -> its options
    "extractor.py": "--dataset folder --extractor test_resnet --weights_path random --img_size 32 "
    "--token_grid 1 --precision float32 --threads 1 --workers 0",
    "main.py": "--fusion none --n_coupling_blocks 1 --fc_internal 8 --meta_epochs 1 --sub_epochs 1 "
    "--baselines False --modelname run --keep weights",
}


def examples(count: int):
    """Not made smaller when one fails: a moment is not the same twice."""
    options = {"derandomize": "FAULTS" not in os.environ, "database": None, "phases": (Phase.generate,)}
    return hypothesis.settings(max_examples=count, deadline=None, **options)


class Bench(NamedTuple):
    """Images, a folder in which main.py was left alone, its table, and its seconds."""

    images: Path
    place: Path
    table: list
    seconds: float

    def begin(self, place: Path, script: str = "main.py", more: tuple = ()):
        """Start a script in a process of its own; main.py's words go to the log beside its folder."""

        def run() -> None:
            os.chdir(place)
            resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))  # want of memory is a line, too
            storing.SHARD_ROWS = 7  # many small shards
            options = f"{SMALL['extractor.py']} {SMALL['main.py'] if script == 'main.py' else ''}".split()
            sys.argv = [script, "--dataset_path", str(self.images), *options, *more]
            runpy.run_path(str(ROOT / script), run_name="__main__")

        place.mkdir(parents=True, exist_ok=True)
        log = log_of(place) if script == "main.py" else place.with_name(script)
        log.unlink(missing_ok=True)
        return start(run, log)

    def finish(self, place: Path) -> None:
        """Let a run go on to its end: its table is that of the one left alone."""
        assert wait(self.begin(place)) == 0, log_of(place).read_text()
        assert table_of(place) == self.table and not list((place / "runs").rglob(".*"))


def log_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.log")


def table_of(place: Path) -> list[dict]:
    """A run's table, without times."""
    lines = csv.DictReader((place / "runs/run/results.csv").read_text().splitlines())
    return [line | {"seconds": ""} for line in lines]


def finished(place: Path) -> dict[Path, int]:
    """The arrays of finished shards: {path: its inode}; one that is written again has another."""
    found = (path for path in place.glob("features/**/*.npy") if not path.parent.name.startswith("."))
    return {path: path.stat().st_ino for path in found}


def refused(place: Path, begins: str = "error: ") -> bool:
    """Whether a script told one line of its kind, and no traceback."""
    log = log_of(place).read_text(errors="replace")
    return "Traceback" not in log and sum(line.startswith(begins) for line in log.splitlines()) == 1


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    images = make_folder(root / "images", classes=("a", "b"), n_train=24, n_test=9)
    made, began = Bench(images, root / "alone", [], 0), time.monotonic()
    assert wait(made.begin(made.place)) == 0, log_of(made.place).read_text()
    assert len(finished(made.place)) > 5
    return made._replace(table=table_of(made.place), seconds=time.monotonic() - began)


# ---------------------------------------------------------------- what machines do
FAULT = st.tuples(st.floats(0, 1.2), st.sampled_from((signal.SIGKILL, *ENDING)))  # when, of a run; what


@pytest.mark.slow
@examples(FAULTS)
@given(faults=st.lists(FAULT, min_size=1, max_size=3), others=st.integers(0, 2))
def test_interrupted_at_any_moment(bench, tmp_path_factory, faults, others):
    """Again and again, beside extractions that go on: finished shards stay, the table is that of a run left
    alone; who asks is answered by a line."""
    place = tmp_path_factory.mktemp("interrupted") / "place"
    beside = [bench.begin(place, "extractor.py") for _ in range(others)]
    for moment, kind in faults:
        before = finished(place)
        status = signalled(bench.begin(place), 0.1 + moment * bench.seconds, kind)
        answered = status == 128 + kind and refused(place, "interrupted: ")
        too_early = status == -kind and not log_of(place).read_text()
        assert answered or too_early or status in (0, -signal.SIGKILL), (status, log_of(place).read_text())
        assert before.items() <= finished(place).items()
    assert [wait(other) for other in beside] == [0] * others
    bench.finish(place)


@pytest.mark.slow
@examples(FAULTS)
@given(part=st.sampled_from(("features", "runs")), data=st.data())
def test_a_flipped_bit(bench, tmp_path_factory, part, data):
    """Mended: in features by extractor.py, in a run by main.py, which may refuse it with a line."""
    place = tmp_path_factory.mktemp("flipped") / "place"
    for name in dict.fromkeys(("features", part)):
        shutil.copytree(bench.place / name, place / name)
    path = data.draw(st.sampled_from(sorted(path for path in (place / part).rglob("*") if path.is_file())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    if part == "features":
        assert wait(bench.begin(place, "extractor.py")) == 0, place.with_name("extractor.py").read_text()
    elif wait(bench.begin(place)):
        assert refused(place)
        shutil.rmtree(place / "runs")
    bench.finish(place)


@pytest.mark.slow
@examples(FAULTS)
@given(kilobytes=st.integers(30, 1500))
def test_a_full_disk(bench, tmp_path_factory, kilobytes):
    """One line, and once there is room the run goes on."""
    place = tmp_path_factory.mktemp("full") / "place"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        status = wait(bench.begin(place))
        assert status == 0 or status == 2 and refused(place), log_of(place).read_text()
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        bench.finish(place)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


# ---------------------------------------------------------------- what people give
INSIDE = [field.name for field in dataclasses.fields(Config) if field.name != "feature_path"]
HOSTILE = (
    "", " ", "nan", "inf", "-1", "1e309", "1e-320", "9" * 5000, "0x10", "1_0", "٣", "1,2", "zero", "None",
    "--1", "a,b;c=d", ".", "../../x", "/proc/self/mem", "/dev/null", "-x", "--", "'\"", "a\nb", "\x1b[31m",
    "\0", "\udcff", "ä" * 200, "x" * 100_000, "%s%n{}", "$(touch pwned)", "\u202e", "*", "cuda:99",
    "4097x1", "0,0,0,1e-320,1,1", "resnet18.a.b", "tcp://",
)  # fmt: skip


@pytest.mark.slow
@examples(5 * FAULTS)
@given(knob=st.sampled_from(INSIDE), text=st.sampled_from(HOSTILE))
def test_hostile_command_lines(bench, tmp_path_factory, knob, text):
    """A table or one line; no hang, nothing outside the folder, nothing half-written."""
    root = tmp_path_factory.mktemp("hostile")
    shutil.copytree(bench.place / "features", root / "outer/place/features")
    place = root / "outer/place"
    status = wait(bench.begin(place, more=(f"--{knob}={text}",)))
    assert status == 0 or status == 2 and refused(place), log_of(place).read_text(errors="replace")
    around = {path.name for path in (*root.iterdir(), *place.parent.iterdir())}
    assert around == {"outer", "place", "place.log"} and not list(place.rglob("*.partial"))
