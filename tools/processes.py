"""Processes of a test's own that can be killed: forked from the test's, so that nothing is imported again."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def start(function: Callable[[], object], log: Path, errors: Path | None = None) -> int:
    """Run ``function`` in a forked process, its output in ``log``, its errors beside it or in a file of their
    own -> its id. Its exit status is 0, what SystemExit says, or 1 after an error."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number, path in ((1, log), (2, errors or log)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(kind, signal.default_int_handler if kind == signal.SIGINT else signal.SIG_DFL)
        function()
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int, timeout: float = 120) -> int:
    """The exit status of a process, or minus the signal that ended it; it is killed after ``timeout``
    seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} did not end in {timeout} s")


def kill_after(pid: int, seconds: float, kind: int = signal.SIGKILL) -> int:
    """Send a signal after a time, unless the process has ended -> as ``wait``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.002, max(0.0, end - time.monotonic())))
    os.kill(pid, kind)
    return wait(pid)
