"""Tasks by processes and by a cluster: outcomes, errors, and an end with the script that started them."""

import math
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import ROOT, forked

from shell import engine
from shell.signals import guarded

pytestmark = pytest.mark.slow


# ---------------------------------------------------------------- processes
PROGRAM = f"""
import os, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}]
from config import ClassError
from shell import engine
from shell.signals import guarded

def task(name):
    if name == "mistake":
        raise ClassError("told")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("long"):
        inherited = os.environ["OMP_NUM_THREADS"], os.environ["TQDM_DISABLE"]
        print(os.getpid(), *inherited, file=sys.stderr, flush=True)
        print("on standard output")
        time.sleep(60)
    return os.getpid()

def main():
    before = dict(os.environ)
    with engine.in_processes(2, 3) as executor:
        found = dict(engine.outcomes(executor, task, sys.argv[1:]))
    assert dict(os.environ) == before and os.getpid() not in found.values()
    print(*sorted(found))

if __name__ == "__main__":
    guarded(main)
"""


@pytest.fixture
def program(tmp_path):
    """program(name, ...) -> a script, started, that has two processes do the tasks of these names."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)

    def start(*names: str) -> subprocess.Popen:
        command = [sys.executable, str(path), *names]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, start_new_session=True, **pipes)

    return start


@pytest.mark.parametrize("name, told", [("mistake", "told"), ("killed", "ended from outside")])
def test_a_task_that_fails_is_a_line(program, name, told):
    running = program("a", name)
    _, errors = running.communicate(timeout=300)
    assert running.returncode == 2 and told in errors and errors.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent(program, number):
    """Ctrl-C reaches all processes of a terminal; the workers leave it to the parent, which ends them."""
    running = program("long 1", "long 2", "long 3")
    told = [running.stderr.readline().split() for _ in range(2)]
    assert [inherited for _, *inherited in told] == [["3", "1"]] * 2
    workers = [int(pid) for pid, *_ in told]
    if number == signal.SIGKILL:
        running.kill()
    else:
        os.killpg(running.pid, number)
    assert running.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in running.stderr.read() and running.stdout.read() == ""
    until = time.monotonic() + 60
    while any(map(psutil.pid_exists, workers)):
        assert time.monotonic() < until
        time.sleep(0.1)


# ---------------------------------------------------------------- a cluster
def by(scheduler, function, *items, cwd=ROOT, before=lambda executor: None) -> subprocess.CompletedProcess:
    """What a script comes to that has a cluster compute function(item) of the items, and prints them.
    ``before(executor)`` is called first."""

    def main() -> None:
        with engine.on_cluster(str(scheduler)) as executor:
            before(executor)
            for item, result in engine.outcomes(executor, function, items):
                print(item, result, flush=True)

    return forked(lambda: guarded(main), ["script"], cwd)


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_cluster_does_tasks_where_the_script_was_started(cluster, tmp_path):
    cluster.add(2)
    done = by(cluster.address, os.path.abspath, "a", "b", "c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told, *lines = done.stdout.splitlines()
    assert told.startswith(f"cluster {cluster.address}: ")
    assert sorted(lines) == [f"{name} {tmp_path / name}" for name in "abc"]
    assert "math domain error" in by(cluster.file, math.sqrt, -1).stderr, "a task's own error"


def test_what_a_killed_worker_had_in_work_is_done_by_another(cluster):
    """Unless it kills that one, too."""
    first, _ = cluster.add(2)
    seconds = [0.3 + i / 100 for i in range(8)]

    def kill_halfway(executor) -> None:
        executor.client.wait_for_workers(2, timeout=300)
        threading.Timer(0.5, os.kill, (first.pid, signal.SIGKILL)).start()

    done = by(cluster.file, time.sleep, *seconds, before=kill_halfway)
    assert done.returncode == 0 and first.wait(1) == -signal.SIGKILL, done.stderr
    assert sorted(done.stdout.splitlines()[1:]) == [f"{each} None" for each in seconds]
    cluster.add()
    done = by(cluster.file, exec, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "lost with several workers" in one_line(done)


def test_a_worker_that_would_do_something_else_is_refused(cluster, tmp_path):
    """One that lacks the script's folder; one that has read the code before it was changed; one of several
    threads, whose tasks would share its seeds."""
    (worker,) = cluster.add()
    assert by(cluster.file, abs, 1).returncode == 0
    (tmp_path / "gone").mkdir()
    done = by(cluster.file, abs, 1, cwd=tmp_path / "gone", before=lambda _: os.rmdir(os.getcwd()))
    assert f"does not see a folder of this script's: {tmp_path / 'gone'}" in one_line(done)

    def change(executor) -> None:
        executor.run = engine._anywhere(str(ROOT), os.getcwd(), "other code")

    assert "runs other code" in one_line(by(cluster.file, abs, 1, before=change))
    worker.kill()
    cluster.add(threads=2)
    assert "has 2 threads" in (line := one_line(by(cluster.file, abs, 1))) and "--nthreads 1" in line


def test_no_scheduler_there_is_a_line(monkeypatch):
    monkeypatch.setattr(engine, "CONNECTING", 1)
    line = one_line(by("tcp://127.0.0.1:1", abs))
    assert line.startswith("error: cluster: expected the address of a running Dask scheduler")
