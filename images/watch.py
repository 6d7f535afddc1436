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
from images.images import note, searched_whole

INTERVAL = 0.5  # seconds between two looks at the folder
SETTLED = 1.0  # seconds that a file has to stay as it is before it is taken for whole
# Seconds after its last change in which a file that cannot be read is tried again, and one that a process
# holds open for writing is waited for.
PATIENCE = 30.0


class Seen(NamedTuple):
    """A file as it was last seen. since: the time of the first look at it as it is; None once it is done."""

    size: int
    changed: int
    since: float | None


class Arrivals:
    """The pictures in a folder and its subfolders, each once, and again when it is written anew. Those that
    lie there already are the first. What is kept of a picture is its name, size and time of change, as long
    as it lies there."""

    def __init__(self, folder: Path):
        """Raises UserError unless it is a folder that can be read."""
        self.folder, self.seen, self.lost = folder, {}, False  # type: ignore[var-annotated]
        if not folder.is_dir():
            raise UserError(f"watch: expected a folder, got {folder}")
        searched_whole(folder, Counter())

    def ready(self) -> list[Path]:
        """Look once -> the pictures that are whole by now, the earliest first. A folder that cannot be read
        for a while has none."""
        try:
            names = [str(path) for path in searched_whole(self.folder, Counter())]
            self.lost = False
        except (UserError, OSError) as error:
            if not self.lost:
                note(f"{error}; looking for it again")
            self.lost = True
            return []
        now, before, self.seen = time.monotonic(), self.seen, {}
        ready = []
        for name in names:
            try:
                found = os.stat(name)
            except OSError:  # moved on in the meantime
                continue
            last = before.get(name)
            if last is None or last[:2] != (found.st_size, found.st_mtime_ns):
                last = Seen(found.st_size, found.st_mtime_ns, now)
            self.seen[name] = last
            if last.since is None or (age := now - last.since) < SETTLED:
                continue
            if age >= PATIENCE or not being_written(name):
                ready.append((last.changed, name))
        return [Path(name) for _, name in sorted(ready)]

    def done(self, path: Path) -> bool:
        """A picture was taken and needs no further look, until it changes. False: it has changed since it was
        ready, what was taken of it does not count."""
        last = self.seen[str(path)]
        try:
            found = os.stat(path)
        except OSError:  # moved on once it was read
            return True
        if last[:2] != (found.st_size, found.st_mtime_ns):
            return False
        self.seen[str(path)] = last._replace(since=None)
        return True

    def given_up(self, path: Path) -> bool:
        """Of a picture that could not be read: whether it will not be tried again. It will be for as long as
        it may still be in the writing; one that has gone will not, and is done without a word."""
        last = self.seen.get(str(path))
        if last is None or not path.exists() or last.since is None:
            return False
        if time.monotonic() - last.since < PATIENCE:
            return False
        self.done(path)
        return True


def being_written(path: str) -> bool:
    """Whether a process of this machine has a file open for writing: Linux then refuses a lease on it. False
    where that cannot be told: on other systems, for another user's file, for writers on other machines."""
    try:
        with open(path, "rb") as stream:  # which ends the lease
            fcntl.fcntl(
                stream, fcntl.F_SETSIG, signal.SIGURG
            )  # to who holds a lease on what is opened: ignored
            fcntl.fcntl(stream, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    except AttributeError:
        return False
    return False
