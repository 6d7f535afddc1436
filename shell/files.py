"""Files that are whole or absent, JSON with a checksum, and names that every file system takes."""

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to beside ``path``, a file or a new folder; it takes its place when the block ends
    without an error, once it, or the files that lie in the folder, are on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()[-40:]  # a file's name has 255 bytes in all
    partial = path.with_name(f".{path.name}.{host}-{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # of a killed process of the same number
    try:
        yield partial
        for file in filter(Path.is_file, (partial, *partial.glob("*"))):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename is None or str(partial) in str(error.filename):  # a full disk names none
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # where it is a folder
        partial.unlink(missing_ok=True)


def sweep(folder: Path, age: float = 0) -> None:
    """Remove what killed processes left half written, so many seconds ago at least."""
    for path in folder.glob(".*.partial"):
        with suppress(OSError):  # whoever writes it has finished it
            if not age or time.time() - path.stat().st_mtime > age:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # of names that are no UTF-8


# ---------------------------------------------------------------- JSON
def as_strict_json(content):
    """What a content is as strict JSON: arrays are lists, a number that is not finite is None."""
    text = json.dumps(content, default=lambda array: array.tolist())
    return json.loads(text, parse_constant=lambda _: None)


def checksum(content: dict) -> str:
    """sha256 of every value but the field ``checksum``, whatever the layout of the file."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_sealed(path: Path, content: dict) -> None:
    """Write JSON with its checksum, whole or not at all; a number that is not finite becomes null."""
    content = as_strict_json(content)
    write_text(path, json.dumps(content | {"checksum": checksum(content)}, indent=1) + "\n")


def read_sealed(path: Path) -> dict:
    """What ``write_sealed`` wrote. Raises OSError when it is not there, and ValueError, with the reason in
    one line, when it is no JSON or was changed."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("checksum") != checksum(content):
        raise ValueError(f"{path} was changed, or is of another version: its checksum is missing or differs")
    return content


# ---------------------------------------------------------------- names and hashes
def file_name(name: str) -> str:
    """A class's name as part of a file's name: as it is where it is plain, otherwise with what a file system
    or a terminal may stumble over replaced, cut to a length, and told apart by a hash of the whole name."""
    plain = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name)
    plain = re.sub("^[.-]", "_", plain)
    short = plain.encode()[:150].decode(errors="ignore")  # seed, ending and a partial's mark come on top
    if short == name:
        return name
    return f"{short}~{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
