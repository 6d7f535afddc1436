"""Devices, memory, metrics and versions: what every script shares."""

import ctypes
import math
import os
import platform
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from ssl import SSLError
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import psutil
import torch
from joblib import cpu_count  # knows a container's share of the machine

from config import UserError

MOST_NAMED = 20  # images or shards in one line
CGROUP = Path("/sys/fs/cgroup")
NO_BAR = os.environ.get("TQDM_DISABLE", "0") not in ("", "0") or None  # tqdm: None asks for a terminal


def set_up(device_name: str, threads: int) -> torch.device:
    """The device of a name (auto, cpu, cuda, cuda:N), and torch's threads set; float32 convolutions on a GPU
    are float32, not TF32. Raises UserError on an absent device, on more threads than the machine has use
    for, and where a notebook has changed torch's default dtype."""
    if (dtype := torch.get_default_dtype()) != torch.float32:
        raise UserError(f"torch.set_default_dtype: expected torch.float32, it is {dtype}")
    cores, most = cpu_count(), 8 * cpu_count()
    if not 0 <= threads <= most:
        raise UserError(f"threads: this machine has {cores} cores; expected 0 (all) to {most}, got {threads}")
    torch.set_num_threads(threads or cores)
    numbered = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = ["cuda", *numbered, "cpu"] if numbered else ["cpu"]
    name = devices[0] if device_name == "auto" else device_name
    if name not in devices:
        raise UserError(f"device: expected auto, {', '.join(devices)}, got {device_name!r}")
    torch.backends.cudnn.allow_tf32 = False  # torch's default is True
    return torch.device(name)


def first_named(names: Sequence[str], separator: str = ", ") -> str:
    """Names in one line, the first MOST_NAMED of them."""
    others = f" and {len(names) - MOST_NAMED} others" if len(names) > MOST_NAMED else ""
    return separator.join(names[:MOST_NAMED]) + others


def reachable(url: str) -> bool:
    """Whether a URL, by a proxy where there is one, answers within three seconds, if only by an error."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=3).close()
        return True
    except Exception as error:  # of certificates another client may know more
        return isinstance(error, HTTPError) or isinstance(getattr(error, "reason", None), SSLError)


# ---------------------------------------------------------------- memory and threads
def keep_freed_memory() -> None:
    """Have glibc, where there is one, keep half a gigabyte of freed memory: else each training step meets
    every page anew, a tenth of the time (benchmarks/RESULTS.md)."""
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most that glibc takes: larger arrays are the system's
        mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD


def available_memory() -> float:
    """Bytes that this process may still take: what the system has free, or what its container leaves it."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limit, stat = (CGROUP / "memory.max").read_text(), (CGROUP / "memory.stat").read_text()
        free = min(free, int(limit) - int(stat.split()[1]))  # of "anon N": cached files are given back
    return free


def check_memory(what: str, needed: float, advice: str) -> None:
    """Raise UserError when ``what`` needs more bytes than there are."""
    free = available_memory()
    if needed > free:
        raise UserError(f"{what} needs {needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} are free; {advice}")


class Threads(ThreadPoolExecutor):
    """When the block raises, what has not begun is dropped, and nothing is waited for."""

    def __exit__(self, raised, *_):
        self.shutdown(wait=raised is None, cancel_futures=True)


def in_order(pool: ThreadPoolExecutor, task: Callable, items: Iterable, ahead: int) -> Iterator:
    """task(item) of every item by a pool's threads, in order, ``ahead`` of them before they are asked for."""
    pending: deque[Future] = deque()
    for item in items:
        pending.append(pool.submit(task, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# -------------------------------------- metrics: labels 0 normal, 1 anomalous; scores higher = more anomalous
# scikit-learn, which counts ties, is slow to import: who only predicts does not wait
METRICS = ("auroc", "aupr", "fpr95")


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; ties count half. NaN where only one label occurs."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else math.nan


def detection_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """METRICS by name: AUROC, area under the precision-recall curve (anomalies positive), false positive rate
    at the first threshold that finds 95 % of the anomalies. NaN with one label only."""
    from sklearn.metrics import average_precision_score, roc_curve

    if len(np.unique(labels)) < 2:
        return dict.fromkeys(METRICS, math.nan)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    found = (auroc(labels, scores), average_precision_score(labels, scores), fpr[np.searchsorted(tpr, 0.95)])
    return dict(zip(METRICS, map(float, found)))


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
    counts = [np.sum(labels == label) for label in (0, 1)]
    if min(counts) < 2:
        return dict.fromkeys(("difference", "low", "high"), math.nan)
    gains = placements(labels, ours) - placements(labels, theirs)
    variance = sum(gains[labels == label].var(ddof=1) / counts[label] for label in (0, 1))
    difference, half = auroc(labels, ours) - auroc(labels, theirs), 1.96 * math.sqrt(variance)
    return {"difference": difference, "low": difference - half, "high": difference + half}


# ---------------------------------------------------------------- what made a result
def versions() -> dict[str, str]:
    """The versions and the machine behind a result; commit: with a + where files differ from it."""
    packages = ["torch", "torchvision", "timm", "FrEIA", "numpy", "scikit-learn"]
    packages += ["openvino"] if find_spec("openvino") else []  # torch does its work where it is not there
    installed = {name: metadata.version(name) for name in packages}
    describe = "git describe --always --dirty=+ --abbrev=10 --exclude='*' 2>/dev/null || echo unknown"
    commit = subprocess.check_output(describe, shell=True, text=True, cwd=Path(__file__).parent).strip()
    named = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())  # not of every ARM
    processor = named[1] if named else platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = f"{cpu_count()} cores, {processor}, GPU: {gpu}"
    return {"python": platform.python_version(), **installed, "commit": commit, "machine": machine}
