"""Seeds, devices, memory, metrics and versions: what every script shares."""

import ctypes
import hashlib
import math
import os
import platform
import random
import re
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
import psutil
import torch
from joblib import cpu_count  # knows a container's share of the machine

from config import UserError
from shell.signals import is_guest

THREADS_PER_CORE = 8  # at most
MOST_NAMED = 20  # images or shards in one line
CGROUP = Path("/sys/fs/cgroup")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_up(device_name: str, threads: int) -> torch.device:
    """The device of a name (auto, cpu, cuda, cuda:N), and torch's threads set; float32 convolutions on a GPU
    are float32, not TF32. Raises UserError on an absent device, on more threads than the machine has use for,
    and where torch's default dtype is not float32."""
    check_default_dtype()
    cores = cpu_count()
    most = THREADS_PER_CORE * cores
    if not 0 <= threads <= most:
        raise UserError(f"threads: this machine has {cores} cores; expected 0 (all) to {most}, got {threads}")
    torch.set_num_threads(threads or cores)
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch("cpu|cuda(:[0-9]{1,3})?", device_name):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {device_name!r}")
    device, available = torch.device(device_name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= available:
        raise UserError(f"device {device_name}: this machine has {available} CUDA devices; set auto or cpu")
    torch.backends.cudnn.allow_tf32 = False  # torch's default is True
    return device


def check_default_dtype() -> None:
    """Raise UserError unless new tensors are float32, as a notebook may have changed."""
    if (dtype := torch.get_default_dtype()) != torch.float32:
        raise UserError(f"torch.set_default_dtype: expected torch.float32, it is {dtype}")


def keep_freed_memory() -> None:
    """Let this process keep half a gigabyte of freed memory for what comes next. A training step frees all
    that it took; glibc gives that back to the system, and the next step meets every page anew: a tenth of
    the time (benchmarks/RESULTS.md). Nothing where there is no glibc."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most that glibc takes: larger arrays are the system's
        mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD


def no_bar() -> bool | None:
    """tqdm's ``disable``: True where TQDM_DISABLE is set; None, which hides a bar where the output is no
    terminal, otherwise."""
    return os.environ.get("TQDM_DISABLE", "0") not in ("", "0") or None


def readable_time(seconds: float) -> str:
    """A duration to the precision that an estimate has: 40 s, 12 min, 3.3 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def first_named(names: Sequence[str], separator: str = ", ") -> str:
    """Names in one line, the first MOST_NAMED of them."""
    return separator.join(names[:MOST_NAMED]) + (" and others" if len(names) > MOST_NAMED else "")


def counted(number: int, what: str) -> str:
    """As in "1 image" and "2 images"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def reachable(url: str, seconds: float = 3.0) -> bool:
    """Whether the host of a URL, or the proxy to it, takes a connection within so many seconds."""
    host = urlsplit(url)
    proxy = None if proxy_bypass(host.hostname or "") else getproxies().get(host.scheme)
    if proxy:
        host = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError, ValueError):
            port = host.port or (80 if host.scheme == "http" else 443)
            socket.create_connection((host.hostname or "", port), timeout=seconds).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name cannot be given a time limit
    thread.start()
    thread.join(seconds)
    return answered.is_set()


# ---------------------------------------------------------------- memory and threads
def available_memory() -> float:
    """Bytes that this process may still take: what the system has free, or what its container leaves it."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no container, or one without a limit
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        parts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = int(parts["active_file"]) + int(parts["inactive_file"])  # given back when it is wanted
        free = min(free, limit - used + cached)
    return free


def check_memory(what: str, needed: float, advice: str) -> None:
    """Raise UserError when ``what`` needs more bytes than there are."""
    free = available_memory()
    if needed > free:
        told = f"{needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} are free"
        raise UserError(f"{what} needs about {told}; {advice}")


@contextmanager
def thread_pool(threads: int, start: Callable[[], object] | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that begin with ``start()``. At the end of the block what they have begun is waited for, and
    the rest dropped; nothing is waited for when the script is asked to end, unless in a notebook, which goes
    on."""
    pool = ThreadPoolExecutor(threads, initializer=start)
    try:
        yield pool
    finally:
        asked_to_end = isinstance(sys.exc_info()[1], KeyboardInterrupt) and not is_guest()
        pool.shutdown(not asked_to_end, cancel_futures=True)


def in_order(pool: ThreadPoolExecutor, task: Callable, items: Iterable, ahead: int) -> Iterator:
    """task(item) of every item by the pool's threads, in order, ``ahead`` of them before they are asked
    for."""
    pending: deque[Future] = deque()
    for item in items:
        pending.append(pool.submit(task, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# -------------------------------------- metrics: labels 0 normal, 1 anomalous; scores higher = more anomalous
# scikit-learn, which counts ties, is slow to import: who only predicts does not wait
def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; ties count half. NaN where only one label occurs."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else math.nan


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve, anomalies positive; NaN where only one label occurs."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores)) if len(np.unique(labels)) == 2 else math.nan


def fpr_at_95_tpr(labels: np.ndarray, scores: np.ndarray) -> float:
    """False positive rate at the first threshold that finds 95 % of the anomalies; NaN with one label."""
    from sklearn.metrics import roc_curve

    if len(np.unique(labels)) < 2:
        return math.nan
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
    """Every metric of METRICS by name; NaN with one label only."""
    return {name: metric.function(labels, scores) for name, metric in METRICS.items()}


def placements(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Of an anomalous image the share of normal ones below it, of a normal one the share of anomalous ones
    above it, ties counted half: (n), (n) -> (n). The mean over the images of either label is the AUROC."""
    found = np.empty(len(scores))
    for label, sign in ((1, 1.0), (0, -1.0)):
        own, others = sign * scores[labels == label], np.sort(sign * scores[labels != label])
        below = np.searchsorted(others, own, "left") + np.searchsorted(others, own, "right")
        found[labels == label] = below / (2 * len(others))
    return found


def paired_difference(labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """AUROC of ``ours`` minus that of ``theirs`` on the same test images, with its 95 % interval (low, high)
    by DeLong's variance (DeLong, DeLong and Clarke-Pearson 1988). NaN with fewer than two images of
    either label."""
    if min(np.sum(labels == label) for label in (0, 1)) < 2:
        return dict.fromkeys(("difference", "low", "high"), float("nan"))
    gains = placements(labels, ours) - placements(labels, theirs)
    kinds = [gains[labels == label] for label in (0, 1)]
    variance = sum(kind.var(ddof=1) / len(kind) for kind in kinds)
    difference, half = auroc(labels, ours) - auroc(labels, theirs), 1.96 * math.sqrt(variance)
    return {"difference": difference, "low": difference - half, "high": difference + half}


# ---------------------------------------------------------------- what made a result
def sha256_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of the names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions and the machine behind a result."""
    packages = ["torch", "torchvision", "timm", "FrEIA", "numpy", "scikit-learn"]
    packages += ["openvino"] if find_spec("openvino") else []  # torch does its work where it is not there
    installed = {name: metadata.version(name) for name in packages}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = f"{cpu_count()} cores, {processor()}, GPU: {gpu}"
    return {"python": platform.python_version(), **installed, "commit": commit(), "machine": machine}


def commit() -> str:
    """The commit of the repository that runs, with + where files differ from it; unknown outside of one."""
    command = "git describe --always --dirty=+ --abbrev=10 --exclude=*".split()
    try:
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with suppress(OSError):
        if found := re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()
