"""A data set's folder that is whole or absent, for the tools that make one."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config import UserError


@contextmanager
def new_set(folder: Path, seed: int) -> Iterator[Path]:
    """An empty folder's name beside ``folder``, to write a set to that ``seed`` decides; it takes its place
    when the block ends well. Raises UserError where the folder exists, and on a seed below 0."""
    if folder.exists():
        raise UserError(f"{folder} exists; give a folder that does not")
    if seed < 0:
        raise UserError(f"--seed: expected a whole number from 0, got {seed}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was ended, perhaps with another seed
    yield partial
    partial.rename(folder)
