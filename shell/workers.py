"""Tasks in processes of their own, which end with the one that started them, however that ends. Standard
library only."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for

from config import UserError
from shell.signals import ENDING, show_any_name

LOST = (
    "a process that fitted a class was ended from outside, for want of memory perhaps; finished classes are "
    "kept, --threads 1 goes on with one at a time"
)


def in_processes(count: int, task: Callable, items: Iterable, threads: int) -> Iterator:
    """task(item) of every item by ``count`` processes (spawned: task, items and results are pickled), each
    with so many threads for linear algebra; outcomes come as they are there. Raises what a task raises, and
    UserError when a process is killed; the others are then ended at once, as on Ctrl-C."""
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)
    items, running = iter(items), set[Future]()
    try:
        while True:
            with _starting(threads):
                running |= {pool.submit(task, i) for i in itertools.islice(items, count - len(running))}
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
        pool.shutdown()
    except BaseException as error:  # Ctrl-C, too
        for child in multiprocessing.active_children():
            child.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise UserError(LOST) from None
        raise


@contextlib.contextmanager
def _starting(threads: int) -> Iterator[None]:
    """Processes started in the block inherit the number of threads, and leave the signals that end a script
    to this one: a terminal sends Ctrl-C to all."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _begin() -> None:
    show_any_name()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
