"""A folder in which pictures arrive: which of them are whole and not yet taken."""

import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from config import UserError
from images.images import image_files, note_once

INTERVAL = 0.5  # seconds between two looks at the folder
SETTLED = 1.0  # seconds that a file has to stay as it is before it is taken for whole
PATIENCE = 30.0  # seconds in which one that cannot be read, as what is half written, is tried again


class Seen(NamedTuple):
    """A file as last seen. state: time of change and size. since: first look at it as it is; inf if done."""

    state: tuple[int, int]
    since: float


class Arrivals:
    """The pictures in a folder and its subfolders, those that lie there already first, each once, and again
    when it is written anew. What is kept of a picture is what was ``Seen``, as long as it lies there."""

    def __init__(self, folder: Path):
        """Raises UserError unless it is a folder that can be read."""
        image_files(folder, Counter())
        self.folder = folder
        self.seen: dict[Path, Seen] = {}

    def ready(self) -> list[Path]:
        """Look once -> the pictures that are whole by now, the earliest first; of no readable folder none."""
        try:
            found = {path: self._look(path) for path in image_files(self.folder, Counter())}
        except UserError as error:
            note_once(f"{error}; looking for it again")
            return []
        self.seen = {path: seen for path, seen in found.items() if seen}
        settled = time.monotonic() - SETTLED
        whole = [(seen.state, path) for path, seen in self.seen.items() if seen.since <= settled]
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
