"""Locks between processes."""

import errno
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Lock:
    """A file lock with an owner: the system gives it back when its process ends, however that ends, so that a
    lock file left by a killed process is taken over at once; on NFS the server does so after its lease. A
    forked child does not hold it (filelock).

    ``with Lock(path):`` waits for its turn, and says once for whom; ``take()`` does not wait. The file is
    removed on release. On a file system without locks every process is let in: what the locks guard here is
    written whole or not at all, so that only work is done twice."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._lock = FileLock(path, mode=0o644, thread_local=False, fallback_to_soft=False)

    def take(self) -> bool:
        """Whether the lock is now this process's. False: another one holds it (see ``owner``)."""
        if self._lock.is_locked:
            return True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            self.path.unlink(missing_ok=True)
            return True
        self.path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        return True

    def release(self) -> None:
        if self._lock.is_locked:
            self.path.unlink(missing_ok=True)
            self._lock.release()

    def owner(self) -> str:
        """Who holds the lock and for how long, as told by its file: process 12 on host, for 3 min."""
        try:
            text, since = self.path.read_text(errors="replace").strip(), self.path.stat().st_mtime
        except OSError:
            return "a process that has just ended"
        seconds = max(0, time.time() - since)
        return f"{text or 'another process'}, for {seconds / 60:.0f} min {seconds % 60:.0f} s"

    def __enter__(self) -> "Lock":
        told = False
        while not self.take():
            if not told:
                print(f"waiting for {self.path}, held by {self.owner()}", flush=True)
                told = True
            time.sleep(0.2)
        return self

    def __exit__(self, *_) -> None:
        self.release()
