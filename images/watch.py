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
PATIENCE = 30.0  # seconds in which one that cannot be read is tried again, one open for writing waited for


class Seen(NamedTuple):
    """A file as last seen. state: time of change and size. since: first look at it as it is; inf if done."""

    state: tuple[int, int]
    since: float


class Arrivals:
    """The pictures in a folder and its subfolders, those that lie there already first, each once, and again
    when it is written anew. What is kept of a picture is what was ``Seen``, as long as it lies there."""

    def __init__(self, folder: Path):
        """Raises UserError unless it is a folder that can be read."""
        self.folder = folder
        self.seen: dict[Path, Seen] = {}
        if not folder.is_dir():
            raise UserError(f"watch: expected a folder, got {folder}")
        image_files(folder, Counter())

    def ready(self) -> list[Path]:
        """Look once -> the pictures that are whole by now, the earliest first; of no readable folder none."""
        try:
            found = {path: self._look(path) for path in image_files(self.folder, Counter())}
        except UserError as error:
            note_once(f"{error}; looking for it again")
            return []
        self.seen = {path: seen for path, seen in found.items() if seen}
        now = time.monotonic()
        whole = [(seen.state, path) for path, seen in self.seen.items() if is_whole(path, now - seen.since)]
        return [path for _, path in sorted(whole)]

    def settles(self, path: Path, unreadable: bool = False) -> bool:
        """Whether what was found of a ready picture counts; it then needs no further look, until it changes.
        It does not where the picture has changed since it was ready; one that is ``unreadable`` is tried
        again for as long as it may still be in the writing, and passed over once it has gone."""
        last, seen = self.seen[path], self._look(path)
        if seen is None:  # moved on once it was read
            return not unreadable
        counts = seen == last and not (unreadable and time.monotonic() - last.since < PATIENCE)
        if counts:
            self.seen[path] = last._replace(since=math.inf)
        return counts

    def _look(self, path: Path) -> Seen | None:
        """A file as it is now; None where it has gone."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        state, last = (found.st_mtime_ns, found.st_size), self.seen.get(path)
        return last if last and last.state == state else Seen(state, time.monotonic())


def is_whole(path: Path, age: float) -> bool:
    """Whether a file that has stayed as it is for so many seconds can be taken for whole: unless a process of
    this machine has it open for writing, when Linux refuses a lease on it. That cannot be told of files of
    others, and of writers on other machines."""
    if not SETTLED <= age < PATIENCE:
        return age >= PATIENCE
    try:
        with open(path, "rb") as stream:  # which ends the lease
            fcntl.fcntl(stream, fcntl.F_SETSIG, signal.SIGURG)  # to who holds one on what is opened: ignored
            fcntl.fcntl(stream, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno != errno.EAGAIN
    return True
