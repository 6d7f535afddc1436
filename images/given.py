"""Images as they are named on a command line: files, folders, globs, a list on standard input."""

import codecs
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
            images += [Path(line) for line in lines_of(sys.stdin.buffer.read())]
        elif path.is_dir():
            images += images_below(path)
        elif path.exists():
            images.append(path)
        elif found := matching(name):
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


def lines_of(content: bytes) -> list[str]:
    """The lines of a list of names, in UTF-8 or, with its mark, UTF-16, ended as on any system; empty ones
    left out. Raises UserError on what is no such list."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16", errors="replace")
    else:
        text = os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
    if "\0" in text:
        raise UserError(
            "standard input: expected a name a line in UTF-8, or in UTF-16 with a byte-order mark, got NUL "
            "bytes (find takes no -print0 here)"
        )
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def matching(pattern: str) -> list[Path]:
    """The files that match a pattern, sorted. A part of it that is there as it is written stands for itself:
    a folder may have brackets in its name."""
    found = [Path()]
    for part in Path(pattern).parts:
        found = [
            place / name
            for place in found
            for name in (
                [part] if (place / part).exists() else [*[""] * (part == "**"), *_globbed(part, place)]
            )
        ]
    return sorted({path for path in found if path.is_file()}, key=str)


def _globbed(part: str, place: Path) -> list[str]:
    return glob.glob(part, root_dir=place, recursive=True)
