"""The benchmarks run, at a tiny size: every comparison of speed.py, and the course on a GPU."""

import pytest

pytestmark = pytest.mark.slow

TINY = ("--repeats", 1, "--device", "cpu", "--threads", 1, "--weights_path", "random")
EXPECTED = {  # command -> its options, how its rows begin
    "step": (("--channels", 32, "--batches", 2, 4), ("2", "4")),
    "extraction": (("--images", 18, "--busy", 1), ("the released loop", "PyTorch", "ours", "ours, semantic")),
    "cache": (("--cold",), ("in order", "300 random batches", "all semantic tokens")),
    "run": (("--script", "train.py -h"), ("alone",)),
}  # fmt: skip


def rows_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]


@pytest.mark.parametrize("command", EXPECTED)
def test_comparisons_of_speed(run_script, texture_folder, command):
    options, firsts = EXPECTED[command]
    images = ("--dataset", "folder", "--dataset_path", texture_folder, "--extractor", "test_resnet")
    done = run_script("benchmarks/speed.py", *TINY, *images, command, *options, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert len(rows) == len(firsts) and all(row[0].startswith(first) for row, first in zip(rows, firsts))
    if command == "step":
        assert all(float(row[-1]) < 1e-5 for row in rows), "the losses of the first step"
    elif command == "extraction":
        assert float(rows[-1][1]) < 0.01, "the tokens"


@pytest.mark.long
def test_the_course_on_a_gpu_in_small(run_script, tmp_path):
    """On the CPU; and a phase that fails is a row, the others are tried."""
    given = ("benchmarks/gpu.py", "--small", "--threads", 1, "--output", "gpu.md")
    done = run_script(*given, "--device", "cpu", "--only", "machine", "correctness", "step", timeout=500)
    assert done.returncode == 0, done.stderr
    rows = {row[1]: row[2] for row in rows_of((tmp_path / "gpu.md").read_text())}
    assert rows["resize 32 to 224"].startswith("0 ") and "batch: 128" in rows
    assert rows["loss apart after 1 and 10 steps"] == "0.0e+00, 0.0e+00"
    assert run_script(*given, "--device", "cuda:99", "--only", "machine", "step").returncode == 1
    rows = rows_of((tmp_path / "gpu.md").read_text())
    assert [row[:2] for row in rows] == [["machine", "**failed**"], ["step", "**failed**"]]
