"""A folder in which pictures arrive: which of them are whole and not yet taken."""

import errno
import fcntl
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from config import UserError
from images.images import find_below, note

INTERVAL = 0.5  # seconds between two looks at the folder
SETTLED = 1.0  # seconds that a file has to stay as it is before it is taken for whole
# Seconds after its last change in which a file that cannot be read is tried again, and one that a process
# holds open for writing is waited for.
PATIENCE = 30.0


class Seen(NamedTuple):
    """A file as it was last seen. since: the time of the first look at it as it is; None once it is done."""

    changed: int
    size: int
    since: float | None


class Arrivals:
    """The pictures in a folder and its subfolders, each once, and again when it is written anew. Those that
    lie there already are the first. What is kept of a picture is its name, size and time of change, as long
    as it lies there."""

    def __init__(self, folder: Path):
        """Raises UserError unless it is a folder that can be read."""
        self.folder, self.lost = folder, False
        self.seen: dict[Path, Seen] = {}
        if not folder.is_dir():
            raise UserError(f"watch: expected a folder, got {folder}")
        find_below(folder, Counter())

    def ready(self) -> list[Path]:
        """Look once -> the pictures that are whole by now, the earliest first. A folder that cannot be read
        for a while has none."""
        try:
            files = find_below(self.folder, Counter())
            self.lost = False
        except (UserError, OSError) as error:
            if not self.lost:
                note(f"{error}; looking for it again")
            self.lost = True
            return []
        before, self.seen = self.seen, {}
        for path in files:
            if state := state_of(path):
                known = before.get(path)
                same = known is not None and known[:2] == state
                self.seen[path] = known if known and same else Seen(*state, time.monotonic())
        whole = [(self.seen[path].changed, path) for path in self.seen if self._is_whole(path)]
        return [path for _, path in sorted(whole)]

    def _is_whole(self, path: Path) -> bool:
        since = self.seen[path].since
        age = 0 if since is None else time.monotonic() - since
        return age >= PATIENCE or age >= SETTLED and not being_written(path)

    def done(self, path: Path) -> bool:
        """A picture was taken and needs no further look, until it changes. False: it has changed since it was
        ready, what was taken of it does not count."""
        state, last = state_of(path), self.seen[path]
        if state and state == last[:2]:
            self.seen[path] = last._replace(since=None)
        return state in (None, last[:2])  # None: moved on once it was read

    def given_up(self, path: Path) -> bool:
        """Of a picture that could not be read: whether it will not be tried again. It will be for as long as
        it may still be in the writing; one that has gone will not, and is done without a word."""
        last = self.seen.get(path)
        if last is None or last.since is None or not path.exists():
            return False
        if time.monotonic() - last.since < PATIENCE:
            return False
        self.done(path)
        return True


def state_of(path: Path) -> tuple[int, int] | None:
    """Time of change and size of a file; None where it has gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def being_written(path: Path) -> bool:
    """Whether a process of this machine has a file open for writing: Linux then refuses a lease on it. False
    where that cannot be told: on other systems, for another user's file, for writers on other machines."""
    try:
        with open(path, "rb") as stream:  # which ends the lease
            fcntl.fcntl(stream, fcntl.F_SETSIG, signal.SIGURG)  # to who holds one on what is opened: ignored
            fcntl.fcntl(stream, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    except AttributeError:
        return False
    return False
