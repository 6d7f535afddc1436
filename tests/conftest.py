"""What the tests share: the repository on the path, one thread, tiny synthetic data, scripts as
subprocesses."""

import dataclasses
import hashlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = (
    "1"  # NumPy's linear algebra, too; before it is imported
)

import numpy as np
import processes
import pytest
import torch
from PIL import Image

import datasets
import freq_fusion
import model
from cache import feature_cache
from cache.store import Store, write_shard
from config import Config
from images.images import note_once
from shell.files import as_strict_json

torch.set_num_threads(1)
# Scripts that a test starts inherit this: a shell's background job and pytest-xdist may ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The first backward pass: made after a test has exported something, it would start threads, and tests that
# fork a process (processes.py) could not train in it any more.
torch.ones(1, requires_grad=True).sum().backward()


def texture(kind: int, generator: np.random.RandomState, size: int = 32) -> np.ndarray:
    """One image of class ``kind``: its own colour, stripe direction and stripe width, plus noise. (size,
    size, 3) uint8."""
    rows, columns = np.mgrid[:size, :size]
    wave = np.sin(
        (rows * (kind % 2) + columns * (1 - kind % 2)) * (0.4 + 0.5 * kind) + generator.uniform(0, 6)
    )
    colour = np.array([(200, 60, 40), (40, 180, 70), (60, 70, 210), (200, 200, 50)][kind % 4])
    image = colour + 40 * wave[..., None] + generator.normal(0, 12, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8)


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_folder(
    root: Path,
    classes=("apple", "leaf", "sky"),
    n_train: int = 24,
    n_test: int = 12,
    signal: bool = True,
    size: int = 32,
    seed: int = 0,
) -> Path:
    """{train,test}/<class>/NN.png under root; with ``signal`` False all classes come from one
    distribution."""
    generator = np.random.RandomState(seed)
    for number, name in enumerate(classes):
        for split, count in (("train", n_train), ("test", n_test)):
            for i in range(count):
                write_image(
                    root / split / name / f"{i:02d}.png", texture(number if signal else 0, generator, size)
                )
    return root


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


PIXELS = np.full((5, 4, 3), 90, np.uint8)


def load_images(dataset: str, folder: str | None) -> datasets.ImageSet:
    return datasets.images_of(Config(dataset=dataset, dataset_path=folder))


def counts(labels: datasets.Labels, split: str) -> dict:
    """{class: images} of a split."""
    return {name: int((labels.split(split).category == i).sum()) for i, name in enumerate(labels.classes)}


def content(labels: datasets.Labels) -> dict:
    """Labels as they are kept."""
    return as_strict_json(dataclasses.asdict(labels))


def truth(labels: datasets.Labels, class_name: str) -> dict[str, int]:
    """{name: 1 where anomalous} of the test images of a class."""
    _, rows, anomalous = labels.one_class(class_name)
    return {labels.test.names[i]: int(a) for i, a in zip(rows, anomalous)}


@pytest.fixture(autouse=True)
def nothing_told():
    """What is told once in a run is told once in a test."""
    note_once.cache_clear()


def tree(root: Path, *names: str) -> Path:
    """A folder with one image at each of the names."""
    for i, name in enumerate(names):
        write_image(root / name, PIXELS + i)
    return root


def script(
    name: str, *arguments, cwd: Path, timeout: float = 300, **environment
) -> subprocess.CompletedProcess:
    """Run a script of the repository in the folder ``cwd``, where features/ and runs/ then go, with one
    thread and no network: in a process forked from this one, so that nothing slow is imported again. One that
    takes more threads needs a new process: OpenMP's do not survive a fork."""
    path = str(ROOT / name)

    def run() -> None:
        os.environ.update({"COLUMNS": "100"} | environment)
        sys.path.insert(0, str(Path(path).parent))
        runpy.run_path(path, run_name="__main__")

    return forked(run, [path, *map(str, arguments)], cwd, timeout)


def forked(
    run: Callable[[], object], command: list[str], cwd: Path, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run a function in a process of its own, in the folder ``cwd``, ``command`` in sys.argv."""

    def begin() -> None:
        os.chdir(cwd)
        sys.argv = command
        warnings.resetwarnings()  # of pytest's own
        run()

    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        status = processes.wait(processes.start(begin, output, errors), timeout)
        return subprocess.CompletedProcess(command, status, output.read_text(), errors.read_text())


def new_process(name: str, *arguments, cwd: Path, code_root: Path = ROOT, **environment):
    """Run a script by a new interpreter: where it matters what is imported, of which code, or by how many
    threads."""
    env = os.environ | {"COLUMNS": "100"} | environment
    command = [sys.executable, str(code_root / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def texture_folder(tmp_path_factory) -> Path:
    """Three clearly different classes, 24 training and 12 test images each, 32 x 32."""
    return make_folder(tmp_path_factory.mktemp("textures") / "images")


@pytest.fixture
def run_script(tmp_path):
    """run_script("main.py", "--knob", value, ...) -> CompletedProcess, run in tmp_path."""
    return lambda name, *arguments, cwd=tmp_path, **options: script(name, *arguments, cwd=cwd, **options)


# ---------------------------------------------------------------- sizes left out, caches made up
FUSION_OPTIONS = {"alpha": 0.5, "window": 3}


def make_fusion(name: str, d: int, hidden: int, grid: tuple[int, int], **more):
    """``freq_fusion.build_fusion`` with the arguments that a test leaves open."""
    return freq_fusion.build_fusion(name, d, hidden, grid, **(FUSION_OPTIONS | {"channels": 2 * d} | more))


def make_flow(channels: int, grid: tuple[int, int], **more):
    """``model.build_flow`` with the arguments that a test leaves open: class attention, four blocks, width
    C."""
    start = {"fusion": "class_attention", "n_blocks": 4, "clamp": 3.0, "identity_start": False}
    sizes = {"n_tokens": grid[0] * grid[1], "hidden": channels}
    return model.build_flow(channels, grid, **(start | sizes | FUSION_OPTIONS | more))


def make_cache(
    folder: Path,
    labels: datasets.Labels,
    tokens: dict,
    bands: dict | None = None,
    places: dict | None = None,
    **fields,
) -> feature_cache.FeatureCache:
    """A cache of made-up tokens {split: (n, 1 + N, C)} and, if given, band tokens {split: (n, D)} and place
    tokens {split: (n, P, E)}; its grid is one row unless ``fields`` says otherwise."""
    row = tokens["train"].shape[1:]
    arrays = {"tokens": tokens} | ({"bands": bands} if bands else {}) | ({"places": places} if places else {})
    shapes = {name: splits["train"].shape[1:] for name, splits in arrays.items()}
    meta = {"n_feat": row[1], "grid": (1, row[0] - 1), "tokens": row[0], "kind": "tokens", "shapes": shapes}
    listed = feature_cache.ImageList(labels, {s: hashes_of(labels.split(s).names) for s in datasets.SPLITS})
    store = Store(folder)
    store.begin(meta | fields)
    for split, hashes in listed.hashes.items():
        rows = {name: splits[split].astype(np.float16) for name, splits in arrays.items()}
        write_shard(folder, store.of, hashes, rows)
    return feature_cache.FeatureCache(Store(folder), listed)


def hashes_of(names: list[str]) -> list[str]:
    """What images of these names might be known by."""
    return [hashlib.sha256(name.encode()).hexdigest()[:32] for name in names]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    from fabricated import fabricate

    return fabricate(tmp_path_factory.mktemp("features") / "clear")


@pytest.fixture(scope="session")
def blank(tmp_path_factory):
    from fabricated import fabricate

    return fabricate(tmp_path_factory.mktemp("features") / "blank", signal=0.0)


@pytest.fixture
def cluster(tmp_path):
    from clusters import Cluster

    made = Cluster(tmp_path / "cluster")
    yield made
    made.close()
