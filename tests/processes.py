"""Processes of a test's own that can be killed: forked from the test's, so that nothing is imported again."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path


def start(function: Callable[[], object], log: Path, errors: Path | None = None) -> ForkProcess:
    """Run ``function`` in a forked process, its output in ``log``, its errors beside it or in a file of their
    own. Its exit code is 0, what SystemExit says, 1 after an error, or minus the signal that ended it."""

    def run() -> None:
        for number, path in ((1, log), (2, errors or log)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for kind in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(kind, signal.SIG_DFL)
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait(process: ForkProcess, timeout: float = 300) -> int:
    """The exit code of a process. Raises TimeoutError, and kills it, after so many seconds."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"process {process.pid} did not end in {timeout} s")
    return process.exitcode


def signalled(process: ForkProcess, seconds: float, kind: int = signal.SIGKILL) -> int:
    """Send a signal after a time, unless the process has ended -> its exit code."""
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, kind)
    return wait(process)
