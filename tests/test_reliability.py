"""Runs that are killed, shared and interrupted, in processes of their own: nothing is lost, nothing wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_folder, script, texture, write_image
from fabricated import CLASSES, JOINED, fabricate, settings

import main
from config import Config
from datasets import SPLITS
from detector import checkpoints, detector
from shell.signals import guarded
from tools.processes import kill_after, start, wait

KILLS = int(os.environ.get("FOAD_KILLS", "10"))  # tools/faults.py asks for more
LASTING = {"n_seeds": 2, "meta_epochs": 2, "fusion": "hilo"}  # a run that takes a moment
LONGER = LASTING | {"meta_epochs": 20}


@pytest.fixture
def begin(cache, tmp_path, monkeypatch):
    """begin(knob=value, ...) -> the id of a process that runs main.py's course on a fabricated cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.extractor, "ensure_features", lambda *_, **__: cache)

    def go(**more) -> int:
        config = settings(**{"modelname": "run", "keep": "weights", **more})
        return start(lambda: guarded(main.main, config), tmp_path / "log")

    return go


def table(modelname: str = "run") -> dict:
    """The figures of a run's report, and the results of every class and seed, without times."""
    content = json.loads((Path("runs") / modelname / "results.json").read_text())
    runs = [
        {k: v for k, v in run.items() if k not in ("seconds", "began", "ended")}
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
@pytest.mark.slow
def test_a_cluster_comes_to_the_table_of_one_process(begin, cluster, tmp_path):
    """Of 1, 2 and 5 workers, started by hand in a folder of their own."""
    options = LASTING | {"baselines": True}
    assert wait(begin(modelname="alone", **options)) == 0
    for more, count in ((1, 1), (1, 2), (3, 5)):
        cluster.add(more)
        assert wait(begin(modelname=f"by-{count}", cluster=str(cluster.file), **options)) == 0, log(tmp_path)
        assert table(f"by-{count}") == table("alone")
        check_whole(f"by-{count}")
    assert "[6/6]" in log(tmp_path) and "Traceback" not in log(tmp_path)


def log(folder: Path) -> str:
    return (folder / "log").read_text()


def wait_for_a_class() -> int:
    """Wait until a class is finished -> how many are."""
    while not (kept := list(Path("runs/run/classes").glob("*.json"))):
        time.sleep(0.01)
    return len(kept)


@pytest.mark.slow
def test_a_worker_that_dies(begin, cluster, tmp_path):
    """Another does what it had in work."""
    assert wait(begin(modelname="alone", **LONGER)) == 0
    first, _ = cluster.add(2)
    pid = begin(cluster=cluster.address, **LONGER)
    assert wait_for_a_class() < 5
    first.kill()
    assert wait(pid) == 0, log(tmp_path)
    assert table() == table("alone")
    check_whole()


@pytest.mark.slow
def test_asked_to_end_while_a_cluster_works(begin, cluster, tmp_path):
    """One line, in time; what is in work is still kept, and the next run goes on."""
    assert wait(begin(modelname="alone", **LONGER)) == 0
    cluster.add(2)
    pid = begin(cluster=cluster.address, **LONGER)
    assert wait_for_a_class() < 5
    began = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert wait(pid) == 128 + signal.SIGINT and time.monotonic() - began < 2 + 3
    told = log(tmp_path)
    assert told.count("interrupted: ") == 1 and " of 6 classes are kept; go on with: python" in told
    assert wait(begin(cluster=cluster.address, **LONGER)) == 0, log(tmp_path)
    assert " kept\n" in log(tmp_path) and "Traceback" not in log(tmp_path)
    assert table() == table("alone")
    check_whole()


@pytest.mark.slow
def test_a_cluster_tells_a_class_that_fails(begin, cluster, tmp_path, monkeypatch):
    """The others are fitted."""
    features = fabricate(tmp_path / "features", same="b")
    monkeypatch.setattr(main.extractor, "ensure_features", lambda *_, **__: features)
    cluster.add()
    for place in (None, cluster.address):
        assert wait(begin(modelname="cluster" if place else "alone", cluster=place)) == 2
        assert "1 of 3 classes could not be fitted: class b: the cached features" in log(tmp_path)
    assert table("cluster") == table("alone")
    found = json.loads(Path("runs/cluster/results.json").read_text())["classes"]
    assert found["b"]["auroc"] is None and "all the same" in found["b"]["undefined"]
    assert found["a"]["auroc"] is not None and found["c"]["auroc"] is not None


@pytest.mark.slow
def test_a_worker_that_sees_another_folder(begin, cluster, tmp_path, monkeypatch):
    """It would keep the classes where the script does not look for them."""
    cluster.add()
    monkeypatch.setattr(main.runs, "settle", lambda *_: None)  # as if the worker did not see what it wrote
    assert wait(begin(cluster=cluster.address)) == 2
    assert f"does not see {tmp_path / 'runs/run'} as" in log(tmp_path) and "Traceback" not in log(tmp_path)
    assert not list(Path("runs").rglob("*.json"))


SMALL = "--extractor resnet10t --weights_path random --img_size 32 --threads 1 --precision float32"


@pytest.mark.slow
def test_the_script_with_a_cluster(cluster, tmp_path, monkeypatch):
    """From the images on; workers know nothing of the script's folder."""
    make_folder(tmp_path / "images", n_train=12, n_test=6)
    options = f"{SMALL} --dataset folder --dataset_path images --fc_internal 16 --fusion none".split()
    shared = ["--modelname", "run", "--feature_path", "shared", "--cluster", cluster.file]
    cluster.add()
    for arguments in (["--modelname", "alone"], shared):
        done = script("main.py", *options, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert table() == table("alone")
    assert Path("runs/run/report.html").read_text().count("<img") > 3
    for seed in (8, 9):  # workers look for the images again
        write_image(tmp_path / f"images/train/apple/new{seed}.png", texture(0, np.random.RandomState(seed)))
        done = script("extractor.py", *options[:-4], *shared[2:], cwd=tmp_path)
        assert done.returncode == 0 and "extracting 1 images" in done.stdout, done.stderr


@pytest.mark.slow
def test_extraction_by_a_cluster_one_of_whose_workers_dies(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = f"{SMALL} --dataset digits --feature_path".split()
    first, _ = cluster.add(2)
    arguments = (*options, "shared", "--cluster", cluster.address)
    command = [sys.executable, ROOT / "extractor.py", *arguments]
    extracting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list(Path("shared").glob("*/*/*.json"))) < 2:
        time.sleep(0.01)
    first.kill()
    assert extracting.wait(120) == 0, extracting.communicate()
    assert script("extractor.py", *options, "alone", cwd=tmp_path).returncode == 0
    settings = {"dataset": "digits", "extractor": "resnet10t", "weights_path": "random", "img_size": (32, 32)}
    shared, alone = (
        main.extractor.ensure_features(
            Config(**settings, precision="float32", pretrained=True, feature_path=path), torch.device("cpu")
        )
        for path in ("shared", "alone")
    )
    for split in SPLITS:
        assert shared.labels.split(split).names == alone.labels.split(split).names
        assert (shared.tokens(split)[:] == alone.tokens(split)[:]).all()
