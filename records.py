"""The JSON record of a checkpoint: sealed with a checksum when it is written, checked when it is read."""

import hashlib
import json
from pathlib import Path

import utils

# What a record must hold: name -> its type. What else is there is kept and covered by the checksum.
SHAPE = {
    "result": dict,
    "history": list,
    "config": dict,
    "features": dict,
    "test": dict,
    "held_out_scores": list,
    "own_input_scores": dict,
    "weights": (dict, type(None)),
}
FEATURES = {"kind": str, "grid": list, "tokens": int, "n_feat": int}


def checksum(content: dict) -> str:
    """sha256 of a record without its own field ``checksum``, over its sorted keys: the layout of the file
    does not matter, every value does."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write(path: Path, content: dict) -> None:
    """Write a record with its checksum, whole or not at all; a number that is not finite becomes null."""
    content = utils.as_strict_json(content)
    utils.write_json(path, content | {"checksum": checksum(content)})


def read(path: Path) -> dict:
    """A record as it was written. Raises OSError when it is not there, and ValueError, with the reason in one
    line, when it is no JSON, was changed, or is not shaped like a record."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise ValueError(f"{path} has no checksum: it is no record, or one of an earlier version")
    if content["checksum"] != checksum(content):
        raise ValueError(f"{path} was changed after it was written: its checksum differs")
    for part, shape in ((content, SHAPE), (content.get("features"), FEATURES)):
        _check(path, part, shape)
    grid = content["features"]["grid"]
    if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise ValueError(f"{path}: expected a grid of rows and columns, got {grid}")
    lengths = {len(content["test"].get(name) or ()) for name in ("rows", "labels", "scores")}
    if len(lengths) != 1:
        raise ValueError(f"{path}: test holds rows, labels and scores of different lengths")
    if not all(isinstance(entry, dict) for entry in content["history"]):
        raise ValueError(f"{path}: history is no list of epochs")
    return content


def _check(path: Path, part, shape: dict) -> None:
    for name, kind in shape.items():
        if not isinstance(part, dict) or not isinstance(part.get(name), kind):
            raise ValueError(f"{path} is not shaped like a record: {name} is missing or of another kind")
