"""Seeds, devices, metrics and files that are whole or absent: what every script shares."""

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
import torch
from joblib import cpu_count  # knows a container's share of the machine

from config import Config, Interrupted, UserError


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


THREADS_PER_CORE = 8


def set_up(device_name: str, threads: int) -> torch.device:
    """The device of a name (auto, cpu, cuda, cuda:N), and torch's threads set. Of several processes on one
    machine (torchrun's LOCAL_RANK) each takes a GPU of its own. Raises UserError on an absent device, or on
    more threads than the machine has use for."""
    cores = cpu_count()
    if threads > THREADS_PER_CORE * cores:
        raise UserError(
            f"threads: this machine has {cores} cores; expected at most {THREADS_PER_CORE * cores}, or 0 for "
            f"all cores, got {threads}"
        )
    torch.set_num_threads(threads or cores)
    local = _from_environment("LOCAL_RANK", 0)
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if device_name == "cuda" and local and torch.cuda.device_count():
        device_name = f"cuda:{local % torch.cuda.device_count()}"
    try:
        device = torch.device(device_name)
    except RuntimeError:
        device = torch.device("meta")  # neither of those that are accepted
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {device_name!r}")
    available = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= available:
        raise UserError(
            f"device {device_name}: this machine has {available} CUDA devices; set device to cpu or auto"
        )
    return device


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_FROM_HEAP = 32 << 20  # bytes, the most that glibc takes: larger arrays come from the system as before
KEPT_FREE = 512 << 20  # bytes


def keep_freed_memory() -> None:
    """Let this process keep half a gigabyte of freed memory for what comes next. A training step frees all
    that it took; glibc gives that back to the system, and the next step meets every page anew: a tenth of
    the time (benchmarks/RESULTS.md). Nothing where there is no glibc."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
        mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


def no_bar(hidden: bool) -> bool | None:
    """tqdm's ``disable``: True where the bar is hidden; None, which hides it where the output is no terminal,
    otherwise."""
    return True if hidden else None


def readable_time(seconds: float) -> str:
    """A duration to the precision that an estimate has: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    minutes = 10 * round(minutes / 10)
    return f"{minutes // 60} h {minutes % 60:02} min"


def counted(number: int, what: str) -> str:
    """As in "1 image" and "2 images"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class Ranks(NamedTuple):
    """Which of how many processes this is: they share the work over a folder, without talking."""

    rank: int
    world_size: int

    def own_first(self, items: Sequence) -> list:
        """All items, those of this rank (every world_size-th) first: ranks begin at different ones, and each
        can finish what another has left."""
        turns = range(self.rank, self.rank + self.world_size)
        return [item for turn in turns for item in items[turn % self.world_size :: self.world_size]]


ALONE = Ranks(0, 1)


def ranks(config: Config) -> Ranks:
    """The knobs rank and world_size, or what torchrun set (RANK, WORLD_SIZE), or 0 of 1. Raises UserError."""
    rank = _from_environment("RANK", 0) if config.rank is None else config.rank
    size = _from_environment("WORLD_SIZE", 1) if config.world_size is None else config.world_size
    if rank >= size:
        raise UserError(f"rank {rank}: expected 0 to {size - 1}, below world_size")
    return Ranks(rank, size)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} in the environment: expected a whole number, got {text!r}")
    return int(text)


def reachable(url: str, seconds: float = 3.0) -> bool:
    """Whether the host of a URL, or the proxy to it, takes a connection within so many seconds."""
    host = urlsplit(url)
    proxy = None if proxy_bypass(host.hostname or "") else getproxies().get(host.scheme)
    if proxy:
        host = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    answered = threading.Event()

    def connect() -> None:
        try:
            address = (host.hostname or "", host.port or {"http": 80}.get(host.scheme, 443))
            socket.create_connection(address, timeout=seconds).close()
            answered.set()
        except (OSError, ValueError, UnicodeError):
            pass

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name cannot be given a time limit
    thread.start()
    thread.join(seconds)
    return answered.is_set()


# ---------------------------------------------------------------- memory
def available_memory() -> float:
    """Bytes that this process may still take: what the system has free, or what its container may have; inf
    where neither is told."""
    free = math.inf
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    except (OSError, StopIteration, ValueError):  # no Linux, no container, or a container without a limit
        pass
    return free


def check_memory(what: str, needed: float, advice: str) -> None:
    """Raise UserError when ``what`` needs more bytes than there are."""
    free = available_memory()
    if needed > free:
        raise UserError(
            f"{what} needs about {needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} are free; {advice}"
        )


@contextmanager
def thread_pool(threads: int, start: Callable[[], object] | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that begin with ``start()``. At the end of the block what they have begun is waited for, and
    the rest dropped; not so when the script is asked to end: a batch may be longer than the two seconds it
    has."""
    pool, wait = ThreadPoolExecutor(threads, initializer=start), True
    try:
        yield pool
    except Interrupted:
        wait = False
        raise
    finally:
        pool.shutdown(wait, cancel_futures=True)


# -------------------------------------- metrics: labels 0 normal, 1 anomalous; scores higher = more anomalous
def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; ties count half. NaN where only one label occurs."""
    from sklearn.metrics import roc_auc_score  # slow to import, as below: who only predicts does not wait

    return float(roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else float("nan")


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve, anomalies positive; NaN where only one label occurs."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores)) if len(np.unique(labels)) == 2 else float("nan")


def fpr_at_95_tpr(labels: np.ndarray, scores: np.ndarray) -> float:
    """False positive rate at the first threshold that finds 95 % of the anomalies; NaN where only one label
    occurs."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(fpr[np.searchsorted(tpr, 0.95)])


class Metric(NamedTuple):
    title: str
    function: Callable[[np.ndarray, np.ndarray], float]  # labels, scores -> value


METRICS = {
    "auroc": Metric("AUROC", auroc),
    "aupr": Metric("AUPR", average_precision),
    "fpr95": Metric("FPR95", fpr_at_95_tpr),
}


def detection_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Every metric of METRICS by name, as scikit-learn counts ties; NaN with one label only."""
    return {name: metric.function(labels, scores) for name, metric in METRICS.items()}


def paired_bootstrap(
    labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray, draws: int = 500, seed: int = 0
) -> dict[str, float]:
    """AUROC of ``ours`` minus that of ``theirs`` on the same test images, with its 95 % interval (low, high)
    over ``draws`` bootstrap samples, drawn from normal and anomalous images separately. NaN with one label
    only."""
    difference = auroc(labels, ours) - auroc(labels, theirs)
    normal, anomalous = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    if not (len(normal) and len(anomalous)):
        return {"difference": difference, "low": difference, "high": difference}
    generator = np.random.RandomState(seed)
    differences = []
    for _ in range(draws):
        chosen = np.concatenate([generator.choice(group, len(group)) for group in (normal, anomalous)])
        differences.append(_rank_auroc(ours[chosen], len(normal)) - _rank_auroc(theirs[chosen], len(normal)))
    low, high = np.quantile(differences, [0.025, 0.975])
    return {"difference": difference, "low": float(low), "high": float(high)}


def _rank_auroc(scores: np.ndarray, n_normal: int) -> float:
    """AUROC by the Mann-Whitney statistic, of scores whose first ``n_normal`` are normal images'."""
    n_anomalous = len(scores) - n_normal
    from scipy.stats import rankdata

    ranks = rankdata(scores)[n_normal:].sum()
    return float((ranks - n_anomalous * (n_anomalous + 1) / 2) / (n_normal * n_anomalous))


# ---------------------------------------------------------------- files
LONGEST_HOST = 40  # characters of a host's name, from its end: a file's name has 255 bytes in all


def partial_of(path: Path) -> Path:
    """Where this process writes a file until it is whole: beside its place."""
    host = socket.gethostname()[-LONGEST_HOST:]
    return path.with_name(f".{path.name}.{host}-{os.getpid()}.partial")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to beside ``path``; it takes its place, on the disk, only when the block ends without
    an error. It has the mode of an ordinary new file, whoever writes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode  # by the umask
        partial.unlink()  # so that a block that writes nothing leaves nothing
        yield partial
        if partial.is_file():
            partial.chmod(mode)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that do not sync folders
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content) -> None:
    """Strict JSON: a number that is not finite is written as null."""
    write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def as_strict_json(content):
    """What a content is once ``write_json`` has written it and it was read again."""
    return json.loads(json.dumps(_finite(content), allow_nan=False))


def _finite(content):
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


# ---------------------------------------------------------------- locks
class Lock:
    """A file lock with an owner: the system gives it back when its process ends, however that ends, so that a
    lock file left by a killed process is taken over at once; on NFS the server does so after its lease.

    ``with Lock(path):`` waits for its turn, and says once for whom; ``take()`` does not wait. The file is
    removed on release. On a file system without locks every process is let in: what the locks guard here is
    written whole or not at all, so that only work is done twice."""

    def __init__(self, path: Path):
        self.path, self._file = Path(path), -1

    def take(self) -> bool:
        """Whether the lock is now this process's. False: another one holds it (see ``owner``)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self._file < 0:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    os.close(handle)
                    return False
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    os.close(handle)
                    raise
            if not _is_file(handle, self.path):  # its last owner removed it in between: a lock on nothing
                os.close(handle)
                continue
            self._file = handle
            _HELD.add(handle)
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return True

    def release(self) -> None:
        if self._file >= 0:
            self.path.unlink(missing_ok=True)
            _HELD.discard(self._file)
            os.close(self._file)
            self._file = -1

    def owner(self) -> str:
        """Who holds the lock and for how long, as told by its file: process 12 on host, for 3 min."""
        try:
            text, since = self.path.read_text(errors="replace").strip(), self.path.stat().st_mtime
        except OSError:
            return "a process that has just ended"
        seconds = max(0, time.time() - since)
        return f"{text or 'another process'}, for {seconds / 60:.0f} min {seconds % 60:.0f} s"

    def __enter__(self) -> "Lock":
        told = False
        while not self.take():
            if not told:
                print(f"waiting for {self.path}, held by {self.owner()}", flush=True)
                told = True
            time.sleep(0.2)
        return self

    def __exit__(self, *_) -> None:
        self.release()


_HELD: set[int] = set()  # the open lock files of this process


def _forget_locks() -> None:
    """In a forked child: it would hold its parent's locks for as long as it lives."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _is_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


LONGEST_NAME = 150  # bytes of a class's name in a file's name: seed, ending and a partial's mark come on top


def file_name(name: str, longest: int = LONGEST_NAME) -> str:
    """A class's name as part of a file's name: as it is where it is plain, otherwise with what a file system
    or a terminal may stumble over replaced, cut to a length, and told apart by a hash of the whole name."""
    plain = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name)
    plain = f"_{plain[1:]}" if plain[:1] in ".-" else plain
    short = plain.encode()[:longest].decode(errors="ignore")
    return short if short == name else f"{short}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def checksum(content: dict) -> str:
    """sha256 of what JSON can hold, without its own field ``checksum``, over its sorted keys: the layout of a
    file does not matter, every value does."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return sha256_of_text(json.dumps(rest, sort_keys=True, allow_nan=False))


def write_sealed(path: Path, content: dict) -> None:
    """Write JSON with its checksum, whole or not at all; a number that is not finite becomes null."""
    content = as_strict_json(content)
    write_json(path, content | {"checksum": checksum(content)})


def read_json(path: Path):
    """Raises OSError when it is not there, and ValueError when it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def read_sealed(path: Path) -> dict:
    """What ``write_sealed`` wrote. Raises OSError when it is not there, and ValueError, with the reason in
    one line, when it is no JSON or was changed."""
    content = read_json(path)
    if not isinstance(content, dict) or "checksum" not in content:
        raise ValueError(f"{path} has no checksum: it is no record, or one of an earlier version")
    if content["checksum"] != checksum(content):
        raise ValueError(f"{path} was changed after it was written: its checksum differs")
    return content


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of the names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions and the machine behind a result."""
    packages = ("torch", "torchvision", "timm", "FrEIA", "numpy", "scikit-learn")
    installed = {name: metadata.version(name) for name in packages}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = f"{cpu_count()} cores, {processor()}, GPU: {gpu}"
    return {"python": platform.python_version(), **installed, "commit": commit(), "machine": machine}


def commit() -> str:
    """The commit of the repository that runs, with + where files differ from it; unknown outside a
    repository."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
