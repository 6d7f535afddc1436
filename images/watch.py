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
from images.images import image_files, note_once

INTERVAL = 0.5  # seconds between two looks at the folder
SETTLED = 1.0  # seconds that a file has to stay as it is before it is taken for whole
# Seconds after its last change in which a file that cannot be read is tried again, and one that a process
# holds open for writing is waited for.
PATIENCE = 30.0


class Seen(NamedTuple):
    """A file as it was last seen. state: its time of change and size. since: the time of the first look at it
    as it is; infinite once it is done."""

    state: tuple[int, int] | None
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
        image_files(folder, Counter())

    def ready(self) -> list[Path]:
        """Look once -> the pictures that are whole by now, the earliest first. A folder that cannot be read
        for a while has none."""
        try:
            found = {path: state_of(path) for path in image_files(self.folder, Counter())}
        except (UserError, OSError) as error:
            note_once(f"{error}; looking for it again")
            return []
        now, before = time.monotonic(), self.seen
        same = {path: path in before and before[path].state == state for path, state in found.items()}
        self.seen = {p: before[p] if same[p] else Seen(state, now) for p, state in found.items() if state}
        whole = [(seen.state, path) for path, seen in self.seen.items() if is_whole(path, now - seen.since)]
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


def state_of(path: Path) -> tuple[int, int] | None:
    """Time of change and size of a file; None where it has gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def is_whole(path: Path, age: float) -> bool:
    """Whether a file that has stayed as it is for so many seconds can be taken for whole: unless a process of
    this machine has it open for writing, when Linux refuses a lease on it. That cannot be told on other
    systems, of another user's file, and of writers on other machines."""
    if not SETTLED <= age < PATIENCE:
        return age >= PATIENCE
    try:
        with open(path, "rb") as stream:  # which ends the lease
            fcntl.fcntl(stream, fcntl.F_SETSIG, signal.SIGURG)  # to who holds one on what is opened: ignored
            fcntl.fcntl(stream, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno != errno.EAGAIN
    except AttributeError:
        pass
    return True
