"""Sizes that no machine has are one line, before anything is taken."""

import pytest
from fabricated import JOINED, make, settings

import utils
from config import UserError
from detector.detector import needed_bytes
from shell import signals


def test_sizes_beyond_the_machine(cache):
    with pytest.raises(UserError, match="GB of memory.*fc_internal"):
        make(cache, fc_internal=10**6)


@pytest.mark.parametrize("fusion", ["class_attention", "hilo", "none"])
@pytest.mark.parametrize("more", [{}, {"fc_internal": 8}, JOINED], ids=str)
def test_a_detector_is_counted_before_it_is_built(cache, fusion, more):
    """And its fit, which takes several times as much."""
    options = {"fc_internal": 64, **more, "fusion": fusion}
    held = sum(tensor.nbytes for tensor in make(cache, **options).detector.state_dict().values())
    counted, in_training = (needed_bytes(settings(**options), cache.meta, batch) for batch in (0, 8))
    assert held <= counted < 3 * held and in_training > 4 * held


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
