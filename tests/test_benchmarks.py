"""The benchmarks run, at a tiny size; what the whole job computes from what it measured."""

import sys

import numpy as np
import pytest
from conftest import ROOT, new_process, script

sys.path.insert(0, str(ROOT / "benchmarks"))

import first_run  # noqa: E402
import whole_job  # noqa: E402


def test_computed_from_what_was_measured():
    """Seconds that are so much per image and so much per start are told exactly, for any other size."""

    def found(images, classes):
        return {
            job: {
                phase: 0.5 * amount + 3 * starts
                for phase, (amount, starts) in whole_job.amounts(job, images, classes).items()
            }
            for job in whole_job.JOBS
        }

    measured = {size: found(*size) for size in ((120, 1), (600, 1), (600, 3))}
    for job in whole_job.JOBS:
        wanted = sum(found(60000, 10)[job].values())
        assert abs(whole_job.computed(measured, job, (60000, 10)) - wanted) < 1e-6 * wanted


def test_computed_memory():
    """A start, so much per image, and a part of it that comes with the second class."""

    def found(images, classes):
        return {"ours": {"memory": 2e9 + 1e4 * images + 5e8 * (classes > 1)}}

    measured = {size: found(*size) for size in ((120, 1), (600, 1), (600, 3))}
    for to in ((60000, 10), (60000, 1)):
        wanted = found(*to)["ours"]["memory"]
        assert abs(whole_job.computed_memory(measured, "ours", to) - wanted) < 1e-6 * wanted


def test_the_released_job_extracts_the_test_images_once_per_class():
    """CIFAR-10: 60,000 images here, 150,000 there."""
    assert whole_job.amounts("ours", 60000, 10)["extraction"] == (60000, 1)
    assert np.isclose(whole_job.amounts("released", 60000, 10)["extraction"][0], 150000)


def test_the_median_of_several_runs():
    runs = [
        {what: value for what in (*whole_job.PHASES, "seconds", "memory", "disk")} | {"auroc": {"a": value}}
        for value in (3.0, 9.0, 1.0)
    ]
    found = whole_job.in_the_middle(runs)
    assert found["extraction"] == found["seconds"] == found["memory"] == 3.0
    assert found["range"] == (1.0, 9.0) and found["auroc"] == {"a": 1.0}


@pytest.mark.slow
def test_both_jobs_at_a_tiny_size(tmp_path, texture_folder):
    done = script("benchmarks/whole_job.py", "--dataset", "folder", "--dataset_path", texture_folder,
                  "--extractor", "test_resnet", "--weights", "random", "--images", 60, "--classes", 1,
                  "--repeats", 1, "--device", "cpu", "--threads", 1, "--scratch", tmp_path,
                  cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| 60 | 1")]
    assert [row[2] for row in rows[:2]] == ["ours", "released"] and rows[2][-1] == "measured |"
    assert "| 60000 | 10 |" in done.stdout
    assert list(tmp_path.iterdir()) == []  # nothing stays


@pytest.mark.slow
def test_extraction_and_flow_at_a_tiny_size(tmp_path, texture_folder):
    done = new_process("benchmarks/extraction.py", "--dataset", "folder", "--dataset_path", texture_folder,
                  "--extractor", "test_resnet", "--weights", "random", "--images", 18, "--repeats", 1,
                  "--device", "cpu", "--threads", 2, "--busy", 1, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ours, the model alone") == 2 and "of it" in done.stdout
    off = float(done.stdout.split("off those of the released loop: ")[1])
    assert off < 0.01
    done = script("benchmarks/flow.py", "--device", "cpu", "--threads", 1, "--channels", 32, "--batches", 2,
                  "--repeats", 1, "--classes", 2, "--images", 8, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "x the transcription" in done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_first_run_at_a_small_size(tmp_path):
    """A row for each that it is measured beside, with what was run and where; the other program ends."""
    options = ("--small", "--only", "idle", "busy", "--output", "table.md")
    done = script("benchmarks/first_run.py", *options, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text.strip() in done.stdout and "| idle | " in text and "| busy | " in text
    assert "--preset quickstart" in text and "torch" in text and "cores" in text and "commit" in text


@pytest.mark.slow
@pytest.mark.long
def test_tiles_at_a_small_size(tmp_path):
    """A row for each surface and side of tiles."""
    options = ("--size", 256, "--tiles", "0,128", "--train", 5, "--good", 2, "--defect", 1)
    done = script("benchmarks/tiles.py", *options, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[1] for row in rows] == ["none", "128"] * 2
    assert all(0 <= float(row[2]) <= 1 for row in rows) and list(tmp_path.iterdir()) == []


def test_a_program_beside_ends_with_the_block():
    with first_run.beside(first_run.compute):
        child = first_run.multiprocessing.active_children()[0]
        assert child.is_alive()
    assert not child.is_alive()
