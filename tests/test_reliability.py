"""Runs that are killed, shared and interrupted, in processes of their own: nothing is lost, nothing wrong."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import make_folder, script
from fabricated import CLASSES, JOINED, settings

import config as knobs
import main
from config import Config
from detector import checkpoints, detector
from shell.signals import LATEST, guarded
from tools.processes import kill_after, start, wait

KILLS = int(os.environ.get("FOAD_KILLS", "10"))  # tools/faults.py asks for more
LASTING = {"n_seeds": 2, "meta_epochs": 2, "fusion": "hilo"}  # a run that takes a moment


@pytest.fixture
def begin(cache, tmp_path, monkeypatch):
    """begin(knob=value, ...) -> the id of a process that runs main.py's course on a fabricated cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.extractor, "ensure_features", lambda *_: cache)

    def go(**more) -> int:
        config = settings(**{"modelname": "run", "keep": "weights", **more})
        return start(lambda: guarded(main.main, config), tmp_path / "log")

    return go


def table(modelname: str = "run") -> dict:
    """The figures of a run's report, and the results of every class and seed, without times."""
    content = json.loads((Path("runs") / modelname / "results.json").read_text())
    runs = [
        {k: v for k, v in run.items() if k not in ("seconds", "wall_time_s", "ended")}
        for entry in content["classes"].values()
        for run in entry["runs"]
    ]
    return {"runs": runs, "mean": content["mean"], "baselines": content["baselines"]}


def leftovers(modelname: str = "run") -> list[str]:
    return [path.name for path in (Path("runs") / modelname).rglob(".*")]


def check_whole(modelname: str = "run", seeds: int = 2) -> None:
    """Every checkpoint loads, and nothing half-made lies about."""
    for name in CLASSES:
        for seed in range(seeds):
            path = checkpoints.checkpoint_path(Config(modelname=modelname), name, seed)
            detector.load_detector(path)
    assert leftovers(modelname) == []


# ---------------------------------------------------------------- killed
@pytest.mark.parametrize(
    "options", [LASTING, LASTING | JOINED | {"baselines": True}], ids=["latent", "joined"]
)
def test_killed_at_any_moment(begin, tmp_path, options):
    """SIGKILL, again and again, until a run gets through: the table is that of a run left alone."""
    began = time.monotonic()
    assert wait(begin(modelname="whole", **options)) == 0, (tmp_path / "log").read_text()
    lasts, moments = time.monotonic() - began, random.Random(0)
    killed, expected = 0, table("whole")
    while killed < KILLS // 2:
        status = kill_after(begin(**options), moments.uniform(0, lasts))
        killed += status == -signal.SIGKILL
        if status == 0:  # it got through: the next one starts from nothing
            assert table() == expected
            shutil.rmtree("runs/run")
        assert status in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
    assert wait(begin(**options)) == 0, (tmp_path / "log").read_text()
    assert table() == expected
    check_whole()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end(begin, tmp_path, kind):
    """One line that says what is kept and how to go on, within two seconds."""
    pid = begin(n_seeds=2, meta_epochs=10**5)
    while not Path("runs/run/run.json").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(pid, kind)
    assert wait(pid) == 128 + kind
    assert time.monotonic() - began < 2 + 3  # a busy machine may stall it
    log = (tmp_path / "log").read_text()
    assert log.count("interrupted: ") == 1 and "0 of 6 classes are kept; go on with: python" in log
    assert "Traceback" not in log and leftovers() == []


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_in_one_long_call(tmp_path, kind):
    """Python answers no signal before such a call comes back."""

    def long() -> None:
        (tmp_path / "began").touch()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)

    pid = start(lambda: guarded(long, told="what is said"), tmp_path / "log")
    while not (tmp_path / "began").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(pid, kind)
    assert wait(pid, timeout=30) == 128 + kind
    assert (tmp_path / "log").read_text() == "interrupted: what is said\n"


def test_signals_after_the_end_are_nobodys(tmp_path):
    """What was set up for a script goes with it, and a child's signal does not end its parent."""

    def parent() -> None:
        pid = start(lambda: time.sleep(60), tmp_path / "child")
        time.sleep(0.2)
        os.kill(pid, signal.SIGINT)
        wait(pid)
        time.sleep(LATEST + 0.5)

    assert wait(start(lambda: guarded(parent), tmp_path / "log")) == 0, (tmp_path / "log").read_text()


def test_a_disk_that_is_full(begin, tmp_path):
    """One line, nothing is taken for finished, and the run goes on once there is room."""
    Path("runs").mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", "runs"]
    if not shutil.which("mount") or subprocess.run(small, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        assert wait(begin(**LASTING)) == 2
        log = (tmp_path / "log").read_text()
        assert log.count("\nerror: ") == 1 and "No space left" in log and "Traceback" not in log
        done = len(list(Path("runs/run/classes").glob("*.json")))
        assert done < 6 and leftovers() == []
        subprocess.run(["mount", "-o", "remount,size=30m", "runs"], check=True)
        assert wait(begin(**LASTING)) == 0
        check_whole()
        assert (tmp_path / "log").read_text().count("kept\n") == done
        first = table()
    finally:
        subprocess.run(["umount", "-l", "runs"], check=True)
    assert wait(begin(**LASTING)) == 0 and table() == first


# ---------------------------------------------------------------- shared
@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_come_to_the_table_of_one(begin, tmp_path, world_size):
    options = LASTING | {"baselines": True}
    assert wait(begin(modelname="alone", **options)) == 0
    ranks = [begin(worker=f"{rank}/{world_size}", **options) for rank in range(world_size)]
    assert [wait(pid) for pid in ranks] == [0] * world_size, (tmp_path / "log").read_text()
    assert table() == table("alone")
    check_whole()
    log = (tmp_path / "log").read_text()
    assert log.count("another one reports") == world_size - 1
    fitted = [
        line for line in log.splitlines() if line.startswith("[") and ("AUROC 0" in line or "AUROC 1" in line)
    ]
    assert len({line.split("]")[1].split("AUROC")[0] for line in fitted}) == 6


def test_every_cell_is_fitted_once(begin, cache, tmp_path, monkeypatch):
    real = main.train.make_trainer

    def counted(config, cache, class_name, seed, *sources):
        (tmp_path / f"fitted-{class_name}-{seed}-{os.getpid()}").touch()
        time.sleep(0.1)
        return real(config, cache, class_name, seed, *sources)

    monkeypatch.setattr(main.train, "make_trainer", counted)
    assert [wait(pid) for pid in [begin(worker=f"{rank}/3", n_seeds=4) for rank in range(3)]] == [0] * 3
    fitted = [path.name.split("-")[1:] for path in tmp_path.glob("fitted-*")]
    assert len(fitted) == 12 and len({(name, seed) for name, seed, _ in fitted}) == 12
    assert len({pid for *_, pid in fitted}) == 3, "every rank had its share"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies(begin, tmp_path, victim):
    """The others finish its cells; where rank 0 itself died, the last one reports, or the next run does."""
    assert wait(begin(modelname="alone", **LASTING)) == 0
    pids = {rank: begin(worker=f"{rank}/3", **LASTING) for rank in range(3)}
    kill_after(pids.pop(victim), 0.3)
    assert [wait(pid) for pid in pids.values()] == [0, 0], (tmp_path / "log").read_text()
    if victim == 0:
        assert wait(begin(worker="0/3", **LASTING)) == 0
    assert table() == table("alone")
    check_whole()


def test_ranks_report_a_class_that_fails(begin, cache, tmp_path, monkeypatch):
    real = main.train.make_trainer

    def failing(config, cache, class_name, *rest):
        if class_name == "b":
            (tmp_path / f"tried-{os.getpid()}").touch()
            raise knobs.ClassError("class b: it is as it is")
        return real(config, cache, class_name, *rest)

    monkeypatch.setattr(main.train, "make_trainer", failing)
    statuses = [wait(pid) for pid in [begin(worker=f"{rank}/2") for rank in range(2)]]
    assert statuses == [2, 0], (tmp_path / "log").read_text()
    assert len(list(tmp_path.glob("tried-*"))) == 1, "one rank's failure is all ranks'"
    found = json.loads(Path("runs/run/results.json").read_text())["classes"]
    assert found["b"]["auroc"] is None and found["b"]["undefined"] == "it is as it is"
    assert found["a"]["auroc"] is not None


@pytest.mark.slow
def test_ranks_by_hand(tmp_path, monkeypatch):
    """The scripts themselves, one rank by its knob and one by torchrun's variables, from the images on."""
    folder = make_folder(tmp_path / "images", n_train=12, n_test=6)
    options = (
        "--dataset folder --extractor resnet10t --weights_path random --img_size 32 --fc_internal 16 "
        "--fusion none --threads 1 --workers 0 --keep weights --precision float32"
    ).split() + ["--dataset_path", folder]
    shared = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for arguments, environment in (
        (["--modelname", "alone"], {}),
        (["--modelname", "run", "--worker", "1/2"], {}),
        (["--modelname", "run"], shared),
    ):
        done = script("main.py", *options, *arguments, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert table() == table("alone")
