"""Where tasks are computed: here, in processes of this machine, or by the workers of a Dask cluster.

Tasks go to a ``concurrent.futures.Executor``: a function that can be imported, and its arguments, pickled.
What they find out they write themselves, whole or not at all, to folders that all see."""

import contextlib
import functools
import hashlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ProcessPoolExecutor, as_completed
from pathlib import Path

from config import UserError
from shell.signals import ENDING

ROOT = Path(__file__).resolve().parents[1]
CONNECTING = 10  # seconds until a scheduler has to answer


def outcomes(executor: Executor | None, function: Callable, items: Iterable) -> Iterator[tuple]:
    """Every item with function(item), as they come; by this process, in order, where there is no executor."""
    if executor is None:
        yield from ((item, function(item)) for item in items)
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:  # processes that begin now leave these signals to this one: a terminal sends Ctrl-C to all
        futures = {executor.submit(function, item): item for item in items}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for future in as_completed(futures):
        yield futures[future], future.result()


# ---------------------------------------------------------------- processes of this machine
@contextlib.contextmanager
def in_processes(count: int, threads: int) -> Iterator[Executor | None]:
    """An executor of ``count`` processes (spawned), each with so many threads for linear algebra; none for
    one process. They write neither bars nor to standard output, end with this one, however it ends, and are
    ended at once when the block raises, Ctrl-C, too. Raises UserError when one of them is killed."""
    if count == 1:
        yield None
        return
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}  # they inherit it
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)
    try:
        yield pool
        pool.shutdown()
    except BrokenExecutor:
        raise UserError(
            "a process that fitted a class was ended from outside, for want of memory perhaps; finished "
            "classes are kept, --threads 1 goes on with one at a time"
        ) from None
    finally:
        for child in multiprocessing.active_children():  # where the block has raised
            child.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        os.environ.clear()
        os.environ |= before


def _begin() -> None:
    sys.stdout = open(os.devnull, "w")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


# ---------------------------------------------------------------- a Dask cluster
@contextlib.contextmanager
def on_cluster(scheduler: str | None) -> Iterator[Executor | None]:
    """An executor of the workers of a Dask cluster, given by the scheduler's address or its file; none
    without one. What a worker had in work when it was killed is computed again by another. When the block
    raises, tasks that are in work come to their end, and no others begin. Raises UserError."""
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise UserError("cluster: needs Dask's package distributed: pip install distributed") from None
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # what goes wrong is told here, in one line
    try:
        given = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
        client = Client(**given, timeout=CONNECTING)
    except Exception as error:  # whatever it is, there is no connection
        raise UserError(
            f"cluster: expected the address of a running Dask scheduler, as in tcp://host:8786, or the file "
            f"that it has written; {scheduler}: {str(error) or type(error).__name__}"
        ) from None
    try:
        workers = len(client.nthreads()) or "no worker yet (dask worker --nthreads 1)"
        print(f"cluster {scheduler}: workers: {workers}", flush=True)
        yield _Workers(client)
    except KilledWorker:
        raise UserError(
            "cluster: a task was lost with several workers, one after another, for want of memory perhaps; "
            "what is finished is kept, fewer workers (or dask worker --memory-limit 0) go on with the rest"
        ) from None
    except CancelledError:
        raise UserError(f"cluster: {scheduler} has ended, or dropped its tasks; go on later") from None
    finally:
        client.close(timeout=1)


class _Workers(Executor):
    """The workers of a cluster. They need nothing but the same packages and folders: a task brings where the
    code is, and where this script was started."""

    def __init__(self, client):
        self.client, self.executor = client, client.get_executor()
        self.run = _anywhere(str(ROOT), os.getcwd(), code())

    def submit(self, function, /, *arguments, **named):
        task = pickle.dumps(functools.partial(function, *arguments, **named))
        return self.executor.submit(self.run, task)


def _anywhere(root: str, folder: str, made_of: str) -> Callable[[bytes], object]:
    """A function that does a pickled task, in the script's ``folder`` with the code in ``root``. Dask sends
    it as it is: workers, and the scheduler, need not know this module. It refuses what it cannot do well."""

    def run(task: bytes) -> object:
        import os
        import pickle
        import sys

        from distributed import get_worker

        for needed in (root, folder):
            if not os.path.isdir(needed):
                raise FileNotFoundError(2, "cluster: a worker does not see a folder of this script's", needed)
        os.chdir(folder)
        if sys.path[0] != root:
            sys.path.insert(0, root)
        from config import UserError
        from shell import engine

        worker = get_worker()
        if worker.state.nthreads != 1:
            raise UserError(
                f"cluster: the worker {worker.address} has {worker.state.nthreads} threads, which share one "
                "process; start it with --nthreads 1, and --nworkers for several"
            )
        if engine.code() != made_of:
            raise UserError(
                f"cluster: the worker {worker.address} runs other code than this script, from before a "
                "change or of another folder; start it again"
            )
        return pickle.loads(task)()

    return run


@functools.cache
def code() -> str:
    """A hash of the repository's sources as this process found them first."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
