"""A folder in which pictures arrive: which of them are whole and not yet taken."""

import errno
import fcntl
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from config import UserError
from images.images import find_below, note_once

INTERVAL = 0.5  # seconds between two looks at the folder
SETTLED = 1.0  # seconds that a file has to stay as it is before it is taken for whole
# Seconds after its last change in which a file that cannot be read is tried again, and one that a process
# holds open for writing is waited for.
PATIENCE = 30.0


class Seen(NamedTuple):
    """A file as it was last seen. state: its time of change and size. since: the time of the first look at it
    as it is; infinite once it is done."""

    state: tuple[int, int]
    since: float


class Arrivals:
    """The pictures in a folder and its subfolders, each once, and again when it is written anew. Those that
    lie there already are the first. What is kept of a picture is its name, size and time of change, as long
    as it lies there."""

    def __init__(self, folder: Path):
        """Raises UserError unless it is a folder that can be read."""
        self.folder = folder
        self.seen: dict[Path, Seen] = {}
        if not folder.is_dir():
            raise UserError(f"watch: expected a folder, got {folder}")
        find_below(folder, Counter())

    def ready(self) -> list[Path]:
        """Look once -> the pictures that are whole by now, the earliest first. A folder that cannot be read
        for a while has none."""
        try:
            states = {path: state_of(path) for path in find_below(self.folder, Counter())}
        except (UserError, OSError) as error:
            note_once(f"{error}; looking for it again")
            return []
        before, self.seen = self.seen, {}
        for path, state in states.items():
            if state:
                new = Seen(state, time.monotonic())
                known = before.get(path, new)
                self.seen[path] = known if known.state == state else new
        whole = [(seen.state, path) for path, seen in self.seen.items() if is_whole(path, seen.since)]
        return [path for _, path in sorted(whole)]

    def settles(self, path: Path, unreadable: bool = False) -> bool:
        """Whether what was found of a ready picture counts; it then needs no further look, until it changes.
        It does not where the picture has changed since it was ready; one that is ``unreadable`` is tried
        again for as long as it may still be in the writing, and passed over once it has gone."""
        last, state = self.seen[path], state_of(path)
        if state is None:  # moved on once it was read
            return not unreadable
        counts = state == last.state and not (unreadable and time.monotonic() - last.since < PATIENCE)
        if counts:
            self.seen[path] = last._replace(since=math.inf)
        return counts


def is_whole(path: Path, since: float) -> bool:
    """Whether a file that is as it is since then can be taken for whole."""
    age = time.monotonic() - since
    return age >= PATIENCE or age >= SETTLED and not being_written(path)


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
