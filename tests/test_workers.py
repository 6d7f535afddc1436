"""Processes that share tasks: outcomes, errors, and an end with the one that started them."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from shell.workers import in_processes

from config import ClassError, UserError

pytestmark = pytest.mark.slow


def task(number: int) -> tuple[int, int]:
    if number == 7:
        raise ClassError("seven")
    if number == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.getpid()


def test_every_task_is_done_once():
    before = os.environ["OMP_NUM_THREADS"]
    found = list(in_processes(2, task, range(6), 3))
    assert sorted(number for number, _ in found) == list(range(6))
    assert os.getpid() not in {pid for _, pid in found}
    assert os.environ["OMP_NUM_THREADS"] == before


def test_an_error_is_the_tasks_own():
    with pytest.raises(ClassError, match="seven"):
        list(in_processes(2, task, range(6, 8), 1))


def test_a_killed_process_is_a_line():
    with pytest.raises(UserError, match="ended from outside"):
        list(in_processes(2, task, [8], 1))


PROGRAM = """
import os, sys, time
sys.path[:0] = [{root!r}]
from shell.signals import guarded
from shell.workers import in_processes

def task(_):
    print(os.getpid(), os.environ["OMP_NUM_THREADS"], flush=True)
    time.sleep(60)

if __name__ == "__main__":
    guarded(lambda: list(in_processes(2, task, range(4), 3)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path, number):
    """Ctrl-C reaches all processes of a terminal; the workers leave it to the parent, which ends them."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(root=str(ROOT)))
    program = subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert program.stdout and program.stderr
    told = [program.stdout.readline().split() for _ in range(2)]
    assert [threads for _, threads in told] == ["3", "3"]
    workers = [int(pid) for pid, _ in told]
    if number == signal.SIGKILL:
        program.kill()
    else:
        os.killpg(program.pid, number)
    assert program.wait(10) == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in program.stderr.read()
    until = time.monotonic() + 10
    while time.monotonic() < until and any(map(running, workers)):
        time.sleep(0.1)
    assert not any(map(running, workers))


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
