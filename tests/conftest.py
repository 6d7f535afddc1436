"""What the tests share: the repository on the path, one thread, tiny synthetic data, scripts as subprocesses."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's linear algebra, too; before it is imported

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


def texture(kind: int, generator: np.random.RandomState, size: int = 32) -> np.ndarray:
    """One image of class ``kind``: its own colour, stripe direction and stripe width, plus noise. (size, size, 3) uint8."""
    rows, columns = np.mgrid[:size, :size]
    wave = np.sin((rows * (kind % 2) + columns * (1 - kind % 2)) * (0.4 + 0.5 * kind) + generator.uniform(0, 6))
    colour = np.array([(200, 60, 40), (40, 180, 70), (60, 70, 210), (200, 200, 50)][kind % 4])
    image = colour + 40 * wave[..., None] + generator.normal(0, 12, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8)


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_folder(
    root: Path, classes=("apple", "leaf", "sky"), n_train: int = 24, n_test: int = 12, signal: bool = True, size: int = 32, seed: int = 0
) -> Path:
    """{train,test}/<class>/NN.png under root; with ``signal`` False all classes come from one distribution."""
    generator = np.random.RandomState(seed)
    for number, name in enumerate(classes):
        for split, count in (("train", n_train), ("test", n_test)):
            for i in range(count):
                write_image(root / split / name / f"{i:02d}.png", texture(number if signal else 0, generator, size))
    return root


def script(name: str, *arguments, cwd: Path, code_root: Path = ROOT, timeout: float = 120, **environment) -> subprocess.CompletedProcess:
    """Run a script of the repository in the folder ``cwd``, where features/ and runs/ then go, with one thread and no network."""
    env = os.environ | {"COLUMNS": "100"} | environment
    command = [sys.executable, str(code_root / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def texture_folder(tmp_path_factory) -> Path:
    """Three clearly different classes, 24 training and 12 test images each, 32 x 32."""
    return make_folder(tmp_path_factory.mktemp("textures") / "images")


@pytest.fixture
def run_script(tmp_path):
    """run_script("main.py", "--knob", value, ...) -> CompletedProcess, run in tmp_path."""
    return lambda name, *arguments, cwd=tmp_path, **options: script(name, *arguments, cwd=cwd, **options)
