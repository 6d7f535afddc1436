"""Locks between processes: who waits, for whom, and what the dead leave."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from shell import locks
from shell.locks import Lock

HOLD = """
import sys, time
from shell.locks import Lock
lock = Lock(sys.argv[1])
print(lock.take(), flush=True)
time.sleep(60)
"""


def held_elsewhere(path) -> subprocess.Popen:
    """Another process that holds a lock."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    return other


def test_lock_excludes_names_its_owner_and_is_taken_over_from_the_dead(tmp_path):
    lock = Lock(tmp_path / "new" / "lock")
    other = held_elsewhere(lock.path)
    try:
        assert not lock.take()
        assert f"process {other.pid} on {socket.gethostname()}, for 0 min" in lock.owner()
    finally:
        other.kill()
        other.wait()
    assert lock.path.exists() and lock.take() and not Lock(lock.path).take()
    lock.release()
    assert list(lock.path.parent.iterdir()) == []


def test_lock_waits_and_says_for_whom(tmp_path, capsys):
    other = held_elsewhere(tmp_path / "lock")
    threading.Timer(0.3, other.kill).start()
    with Lock(tmp_path / "lock"):
        assert f"held by process {other.pid} " in capsys.readouterr().out
    other.wait()


def test_forked_children_hold_no_locks(tmp_path):
    """A worker that outlives its killed parent would keep its locks."""
    code = "import os, sys, time; from shell.locks import Lock\nlock = Lock(sys.argv[1]); lock.take()\n"
    code += "if os.fork() == 0: time.sleep(30)\nelse: print('held', flush=True); time.sleep(30)"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert other.stdout.readline() == "held\n"
    try:
        assert not Lock(tmp_path / "lock").take()
        other.kill()
        other.wait()
        deadline = time.monotonic() + 10  # the child, asleep for 30 s, may not have run since it was forked
        while not Lock(tmp_path / "lock").take():
            assert time.monotonic() < deadline, "the child holds the lock of its killed parent"
            time.sleep(0.05)
    finally:
        os.killpg(other.pid, signal.SIGKILL)


def test_a_child_takes_nothing_from_its_parent(tmp_path):
    """It may drop the lock object that it was forked with: the lock, and its file, stay the parent's."""
    lock = Lock(tmp_path / "lock")
    assert lock.take() and lock.take(), "taken twice is taken"
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0 if not Lock(lock.path).take() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert f"process {os.getpid()} " in lock.owner() and not Lock(lock.path).take()
    lock.release()
    assert Lock(lock.path).take()


def test_one_at_a_time_counts_right(tmp_path):
    """Four processes add to a number under the lock, whose file each of them removes."""
    code = """
import pathlib, sys
from shell.locks import Lock
place = pathlib.Path(sys.argv[1])
for _ in range(25):
    with Lock(place / "lock"):
        count = int((place / "count").read_text())
        (place / "count").write_text(str(count + 1))
"""
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", code, tmp_path]
    others = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [other.wait() for other in others] == [0] * 4
    assert (tmp_path / "count").read_text() == "100"


@pytest.mark.parametrize("number, let_in", [(errno.ENOLCK, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_file_systems_without_locks_let_everyone_in(tmp_path, monkeypatch, number, let_in):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    if let_in:
        assert first.take() and second.take()
        first.release()
    else:
        with pytest.raises(OSError):
            first.take()
