"""Sizes that no machine has are one line, before anything is taken."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_folder
from fabricated import JOINED, C, make, settings

import datasets
import extractor
import utils
from backbone import extraction
from backbone.identity import cache_identity
from config import Config, UserError
from detector import class_data, memory
from shell import signals


@pytest.mark.parametrize(
    "change",
    [
        {"fc_internal": 10**6},
        {"fc_internal": 10**5, "n_coupling_blocks": 1000},
        {"n_coupling_blocks": 1000, "fc_internal": 20_000, "fusion": "none"},
    ],
    ids=str,
)
def test_sizes_beyond_the_machine(cache, change):
    with pytest.raises(UserError, match="GB of memory.*fc_internal"):
        make(cache, **change)


def test_batch_beyond_the_machine(cache, monkeypatch):
    """What a batch takes is counted, though the detector itself would fit."""
    config = settings(batch_size=40)
    need = memory.FLOAT * 4 * memory.detector_floats(config, cache.meta)
    monkeypatch.setattr(utils, "available_memory", lambda: need + 1000)
    with pytest.raises(UserError, match="batches of 40.*batch_size"):
        make(cache, batch_size=40)
    monkeypatch.setattr(utils, "available_memory", lambda: 100 * need)
    make(cache, batch_size=10**7)  # no batch is larger than the class


@pytest.mark.parametrize("fusion", ["class_attention", "hilo", "none"])
@pytest.mark.parametrize("more", [{}, {"fc_internal": 8}, JOINED], ids=str)
def test_estimate_is_near_what_is_built(cache, fusion, more):
    """Between half and three times the numbers of a detector in fact, whatever it is made of."""
    options = {"fc_internal": 64, **more, "fusion": fusion}
    detector = make(cache, **options).detector
    held = sum(tensor.numel() for tensor in (*detector.parameters(), *detector.buffers()))
    assert held / 2 < memory.detector_floats(settings(**options), cache.meta) < 3 * held + 2000


def test_memory_is_found():
    assert utils.available_memory() > 1e6


def test_a_limit_of_address_space_is_one_line():
    """Of ``ulimit -v``: before imports that fail, or hang, under it; what it leaves is counted."""
    command = f"ulimit -v 3500000; {sys.executable} {ROOT}/predict.py nowhere x.png"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and ran.stderr.startswith("error: not enough memory: ulimit -v allows 3.6 GB")
    code = "import utils; print(utils.available_memory())"
    command = f"cd {ROOT}; ulimit -v 8000000; {sys.executable} -c '{code}'"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert 1e8 < float(ran.stdout) < 7e9


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator:\ncan't allocate memory: 12 bytes"), KeyError()],
)
def test_want_of_memory_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(KeyError if isinstance(error, KeyError) else SystemExit):
        signals.guarded(main)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [] or len(lines) == 1 and lines[0].startswith("error: not enough memory (")


def test_what_a_container_caches_of_files_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 500000\nactive_file 50000\nfile 7\n")
    assert utils.available_memory() == 650_000


def test_wide_windows_are_the_whole_grid(cache):
    """A window wider than the grid holds no more patches than the grid, and takes no more memory."""
    wide, whole = (make(cache, fusion="hilo", window=window).detector for window in (1000, 3))
    rows = class_data.Features(torch.randn(4, C), torch.randn(4, 9, C))
    wide.load_state_dict(whole.state_dict())
    with torch.no_grad():
        found, wanted = (detector.score(rows) for detector in (wide, whole))
    assert torch.equal(found, wanted)
    assert sum(buffer.numel() for buffer in wide.buffers()) < 10_000


@pytest.mark.parametrize(
    "values",
    [
        {"threads": 10**4},
        {"window": 10**9},
        {"n_coupling_blocks": 10**9},
        {"batch_size": 10**20},
        {"img_size": (10**5, 8)},
        {"centre_pool": 1e-320},
        {"clamp": 1e300},
        {"token_grid": "9" * 5000},
    ],
    ids=lambda values: next(iter(values)),
)
def test_ranges(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Config(**values)


def test_batches_of_images_beyond_the_machine(tmp_path, monkeypatch):
    """Asked before the first image is read."""
    folder = make_folder(tmp_path / "images", classes=("a",), n_train=8, n_test=4)
    config = settings(dataset="folder", dataset_path=str(folder), img_size=(32, 32), extractor="resnet10t")
    images, identity = datasets.images_of(config), cache_identity(config)
    monkeypatch.setattr(utils, "available_memory", lambda: 8 * 32 * 32 * extraction.PIXEL)
    extraction.Extraction(config, images, identity, torch.device("cpu"))
    large = dataclasses.replace(config, extract_batch=10)
    with pytest.raises(UserError, match="10 images of 32x32.*extract_batch"):
        extraction.Extraction(large, images, identity, torch.device("cpu"))


def test_a_grid_that_every_fit_refuses_is_refused_before_the_extraction(tmp_path, monkeypatch):
    """By extractor.py as by the fit, whatever its knobs are."""
    images = make_folder(tmp_path / "images", n_train=3, n_test=1)
    config = Config(
        dataset="folder", dataset_path=str(images), feature_path=str(tmp_path / "f"), extractor="resnet18",
        weights_path="random", img_size=(1024, 1024), device="cpu", threads=1,
    )  # fmt: skip
    monkeypatch.setattr(utils, "available_memory", lambda: 17 * memory.FLOAT * 32**4)
    with pytest.raises(UserError, match="32 x 32 patch tokens.*token_grid"):
        extractor.main(config)
    assert not (tmp_path / "f").exists()
