"""A Dask cluster of a test's own: a scheduler and workers, each a process that can be killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


class Cluster:
    """A scheduler, as started by hand, in a folder that is not the repository."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "scheduler.json"
        folder.mkdir()
        self.started: list[subprocess.Popen] = []
        self.scheduler = self.start("scheduler", "--port", "0", "--scheduler-file", self.file)
        while not self.file.exists() or not self.file.read_text().endswith("}"):
            assert self.scheduler.poll() is None, (folder / "0.log").read_text()
            time.sleep(0.02)
        self.address = json.loads(self.file.read_text())["address"]

    def start(self, *command) -> subprocess.Popen:
        log = self.folder / f"{len(self.started)}.log"
        run = [Path(sys.executable).with_name("dask"), *command, "--host", "127.0.0.1", "--no-dashboard"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] = "1"  # workers that a task may cost
        with log.open("w") as output:
            self.started.append(
                subprocess.Popen(run, cwd=self.folder, env=environment, stdout=output, stderr=output)
            )
        return self.started[-1]

    def add(self, count: int = 1, threads: int = 1) -> list[subprocess.Popen]:
        """Start workers."""
        options = ("--nthreads", str(threads), "--no-nanny", "--memory-limit", "0")
        return [self.start("worker", self.address, *options) for _ in range(count)]

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
