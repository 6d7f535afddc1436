"""Sizes that no machine has are one line, before anything is taken."""

import pytest
from fabricated import JOINED, make, settings

import utils
from config import UserError
from detector.detector import detector_floats
from shell import signals


def test_sizes_beyond_the_machine(cache):
    with pytest.raises(UserError, match="GB of memory.*fc_internal"):
        make(cache, fc_internal=10**6)


@pytest.mark.parametrize("fusion", ["class_attention", "hilo", "none"])
@pytest.mark.parametrize("more", [{}, {"fc_internal": 8}, JOINED], ids=str)
def test_estimate_is_near_what_is_built(cache, fusion, more):
    """Between half and three times the numbers of a detector in fact, whatever it is made of."""
    options = {"fc_internal": 64, **more, "fusion": fusion}
    detector = make(cache, **options).detector
    held = sum(tensor.numel() for tensor in (*detector.parameters(), *detector.buffers()))
    assert held / 2 < detector_floats(settings(**options), cache.meta) < 3 * held + 2000


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_want_of_memory_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit):
        signals.guarded(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: not enough memory (")


def test_what_a_container_caches_of_files_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\nfile 600000\nkernel 7\n")
    assert utils.available_memory() == 700_000
