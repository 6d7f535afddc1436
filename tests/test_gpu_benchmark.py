"""The course for the day a GPU is there runs on the CPU at a small size, and keeps what a failed phase
told."""

import sys

import pytest
import torch
from conftest import ROOT, script

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402


def told(phase: str, scratch) -> dict[str, str]:
    rows: dict[str, str] = {}
    gpu.PHASES[phase][0](gpu.Job(torch.device("cpu"), gpu.SMALL, scratch, rows.__setitem__))
    return rows


EXPECTED = {
    "correctness": {"resize 32 to 224", "tokens in float32 against the CPU's float32"},
    "extraction": {"images/s, tokens left on the device", "images/s, to the disk, start included"},
    "training": {"transcription / ours", "peak memory"},
    "default_job": {"extraction", "reading the tokens", "fitting", "evaluation", "peak memory"},
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", EXPECTED)
def test_phases_at_a_small_size(tmp_path, phase):
    found = told(phase, tmp_path)
    assert EXPECTED[phase] <= set(found)
    if phase == "correctness":  # the CPU against itself
        assert found["resize 32 to 224"].startswith("0 ")
        steps = found["loss apart after 1 and 10 steps, scores after 10"]
        assert steps == "0.0e+00, 0.0e+00, 0.0e+00"


@pytest.mark.slow
def test_a_phase_that_is_ended_or_fails_keeps_its_rows(tmp_path):
    """Both courses in processes of their own: one that ends too late, one that no device is there for."""
    late = script("benchmarks/gpu.py", "--device", "cpu", "--small", "--only", "machine", "--limit", 0.05,
                  "--output", "late.md", cwd=tmp_path)  # fmt: skip
    assert (
        late.returncode == 1 and "| machine | **failed** | ended after" in (tmp_path / "late.md").read_text()
    )
    absent = script("benchmarks/gpu.py", "--device", "cuda:99", "--small", "--only", "machine",
                    "--output", "absent.md", cwd=tmp_path)  # fmt: skip
    assert absent.returncode == 1 and "CUDA devices" in (tmp_path / "absent.md").read_text()


def test_table():
    text = gpu.table({"machine": [("a", "1 | 2"), ("**failed**", "why")]})
    assert text.splitlines()[2:] == ["| machine | a | 1 / 2 |", "| machine | **failed** | why |"]
