"""Pictures that arrive in a folder are taken once they are whole, each once."""

import os

import pytest
from conftest import PIXELS, write_image

from config import UserError
from images import watch


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def arrivals(tmp_path, clock):
    """What arrives in a folder where a.png was seen just now."""
    write_image(tmp_path / "line" / "a.png", PIXELS)
    arrivals = watch.Arrivals(tmp_path / "line")
    assert arrivals.ready() == [], "it may be in the writing"
    return arrivals


def looked(arrivals, clock) -> list[str]:
    """The names that are ready a while after the last look."""
    clock[0] += watch.SETTLED
    return [path.relative_to(arrivals.folder).as_posix() for path in arrivals.ready()]


def test_a_picture_is_taken_once_it_has_stayed_as_it_is(arrivals, clock):
    folder = arrivals.folder
    (folder / "b.png").write_bytes(b"half")
    (folder / "b.tmp").write_bytes(b"no picture by its name")
    assert looked(arrivals, clock) == ["a.png"]
    arrivals.settles(folder / "a.png")
    (folder / "b.png").write_bytes(b"half and whole")
    assert looked(arrivals, clock) == []
    write_image(folder / "day 2" / "c.png", PIXELS)
    os.utime(folder / "b.png", (1, 1))
    assert looked(arrivals, clock) == []
    assert looked(arrivals, clock) == ["b.png", "day 2/c.png"], "the earliest first"
    for name in ("b.png", "day 2/c.png"):
        arrivals.settles(folder / name)
    assert looked(arrivals, clock) == []
    write_image(folder / "a.png", PIXELS + 1)  # written anew: taken again
    assert looked(arrivals, clock) == [] and looked(arrivals, clock) == ["a.png"]


def test_a_picture_that_changes_while_it_is_read(arrivals, clock):
    """Was not taken, and is ready anew."""
    path = arrivals.folder / "a.png"
    assert looked(arrivals, clock) == ["a.png"]
    os.utime(path, (1, 1))
    assert not arrivals.settles(path)
    assert looked(arrivals, clock) == [] and looked(arrivals, clock) == ["a.png"]
    assert arrivals.settles(path) and looked(arrivals, clock) == []


def test_a_picture_or_a_folder_that_has_gone(arrivals, clock, capsys):
    folder = arrivals.folder
    assert looked(arrivals, clock) == ["a.png"]
    arrivals.settles(folder / "a.png")
    away = folder.rename(folder.with_name("away"))
    assert looked(arrivals, clock) == looked(arrivals, clock) == []
    assert capsys.readouterr().err.count("note:") == 1
    away.rename(folder)
    assert looked(arrivals, clock) == looked(arrivals, clock) == [], "what was done stays done"
    write_image(folder / "a.png", PIXELS + 1)
    assert looked(arrivals, clock) == [] and looked(arrivals, clock) == ["a.png"]
    (folder / "a.png").unlink()
    clock[0] += watch.PATIENCE
    assert not arrivals.settles(folder / "a.png", unreadable=True)
    assert looked(arrivals, clock) == [] and arrivals.seen == {}, "nothing is kept of what has gone"
    with pytest.raises(UserError, match="a.png cannot be read"):
        watch.Arrivals(folder / "a.png")
