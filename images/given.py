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
            images += [Path(line) for line in lines if line.strip()]
        elif path.is_dir():
            images += images_below(path)
        elif path.exists():
            images.append(path)
        elif found := sorted(Path(path) for path in glob.glob(name, recursive=True) if os.path.isfile(path)):
            images += found
        else:
            raise UserError(f"no file or folder {name}, and no files that it matches as a pattern")
    if not images:
        raise UserError("no pictures given: files, folders, globs or, for -, a line each on standard input")
    return images


def refuse_among(folder: Path, searched: list[Path], files: list[Path]) -> None:
    """Raise UserError where PNGs written to ``folder`` would replace one of the files, or be taken for a
    picture the next time that the folders ``searched`` are."""
    place = folder.resolve()
    among = [path for path in searched if place.is_relative_to(path.resolve())]
    among += [path for path in {file.parent for file in files} if path.resolve() == place]
    if among:
        raise UserError(f"expected a folder apart from the pictures in {among[0]}, got {folder}")
