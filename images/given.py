"""Images as they are named on a command line: files, folders, globs, a list on standard input."""

import glob
import os
import sys
from pathlib import Path

from config import UserError
from images.images import images_below


def find_images(names: list[str]) -> list[Path]:
    """The files that names stand for, in order: files, images below folders, globs, - for lines of standard
    input. Raises UserError on a name that stands for nothing."""
    images: list[Path] = []
    for name in names:
        path = Path(name)
        if name == "-":
            lines = os.fsdecode(sys.stdin.buffer.read()).replace("\r\n", "\n").split("\n")
            found = [Path(line) for line in lines if line.strip()]
        elif path.exists():
            found = images_below(path) if path.is_dir() else [path]
        else:
            found = sorted(path for path in map(Path, glob.glob(name, recursive=True)) if path.is_file())
        if not found:
            raise UserError(f"{name}: expected files, folders, globs, or - and a line each on standard input")
        images += found
    return images


def refuse_among(folder: Path, searched: list[Path], files: list[Path]) -> None:
    """Raise UserError where PNGs written to ``folder`` would replace one of the files, or be taken for a
    picture the next time that the folders ``searched`` are."""
    place, beside = folder.resolve(), {file.parent.resolve() for file in files}
    if place in beside or any(place.is_relative_to(path.resolve()) for path in searched):
        raise UserError(f"expected a folder apart from the pictures in or above it, got {folder}")
