"""Files that are whole or absent, JSON with a checksum, and names that every file system takes."""

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_of(path: Path) -> Path:
    """Where this process writes a file until it is whole: beside its place."""
    host = socket.gethostname()[-40:]  # a file's name has 255 bytes in all
    return path.with_name(f".{path.name}.{host}-{os.getpid()}.partial")


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """In the block an OSError without a file's name, as of a write to a full disk, or with that of a partial
    file, gets the name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(".partial"):
            error.filename = str(path)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to beside ``path``, a file or a new folder; it takes its place, on the disk, only when
    the block ends without an error. A file has the mode of an ordinary new one, whoever writes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with naming(path):
            partial.touch()
            mode = partial.stat().st_mode  # by the umask
            partial.unlink()  # so that a block that writes nothing leaves nothing
            yield partial
            if partial.is_file():
                partial.chmod(mode)
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # where it is a folder
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that do not sync folders
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # of names that are no UTF-8


# ---------------------------------------------------------------- JSON
def write_json(path: Path, content) -> None:
    """Strict JSON: a number that is not finite is written as null."""
    write_text(path, json.dumps(as_strict_json(content), indent=1) + "\n")


def as_strict_json(content):
    """What a content is once ``write_json`` has written it and it was read again: arrays are lists."""
    text = json.dumps(content, default=lambda array: array.tolist())
    return json.loads(text, parse_constant=lambda _: None)


def checksum(content: dict) -> str:
    """sha256 of what JSON can hold, without its own field ``checksum``, over its sorted keys: the layout of a
    file does not matter, every value does."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_sealed(path: Path, content: dict) -> None:
    """Write JSON with its checksum, whole or not at all; a number that is not finite becomes null."""
    content = as_strict_json(content)
    write_json(path, content | {"checksum": checksum(content)})


def read_sealed(path: Path) -> dict:
    """What ``write_sealed`` wrote. Raises OSError when it is not there, and ValueError, with the reason in
    one line, when it is no JSON or was changed."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "checksum" not in content:
        raise ValueError(f"{path} has no checksum: it is no record, or one of an earlier version")
    if content["checksum"] != checksum(content):
        raise ValueError(f"{path} was changed after it was written: its checksum differs")
    return content


# ---------------------------------------------------------------- names and hashes
LONGEST_FILE_NAME = 150  # bytes of a class's name: seed, ending and a partial's mark come on top


def file_name(name: str, longest: int = LONGEST_FILE_NAME) -> str:
    """A class's name as part of a file's name: as it is where it is plain, otherwise with what a file system
    or a terminal may stumble over replaced, cut to a length, and told apart by a hash of the whole name."""
    plain = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name)
    plain = f"_{plain[1:]}" if plain[:1] in ".-" else plain
    short = plain.encode()[:longest].decode(errors="ignore")
    if short == name:
        return name
    return f"{short}~{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
