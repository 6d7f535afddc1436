"""The JSON record of a checkpoint: sealed with a checksum when it is written, checked when it is read, and
found in a run's folder."""

from pathlib import Path

import config as knobs
from config import UserError
from shell.files import file_name, read_sealed
from shell.values import class_names

# What a record must hold: name -> its type. What else is there is kept and covered by the checksum.
SHAPE = {
    "result": dict,
    "history": list,
    "config": dict,
    "features": dict,
    "test": dict,
    "held_out_scores": list,
    "simple_scores": dict,
    "weights": (dict, type(None)),
}
PARTS: dict[str, dict[str, type]] = {  # and what its parts must
    "result": {"class": str, "seed": int},
    "features": {"kind": str, "grid": list, "tokens": int, "n_feat": int},
    "test": {"rows": list, "labels": list, "scores": list},
}


def read(path: Path) -> dict:
    """A record as it was written. Raises OSError when it is not there, and ValueError, with the reason in one
    line, when it is no JSON, was changed, or is not shaped like a record."""
    content = read_sealed(path)
    _check(path, content, SHAPE)
    for part, shape in PARTS.items():
        _check(path, content[part], shape)
    grid = content["features"]["grid"]
    if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise ValueError(f"{path}: expected a grid of rows and columns, got {grid}")
    lengths = {len(content["test"][name]) for name in PARTS["test"]}
    if len(lengths) != 1:
        raise ValueError(f"{path}: test holds rows, labels and scores of different lengths")
    if not all(isinstance(entry, dict) for entry in content["history"]):
        raise ValueError(f"{path}: history is no list of epochs")
    return content


def _check(path: Path, part: dict, shape: dict) -> None:
    for name, kind in shape.items():
        if not isinstance(part.get(name), kind):
            raise ValueError(f"{path} is not shaped like a record of this version: {name} is missing")


def find_checkpoints(path: Path, class_name: str | None, seed: int | None) -> list[Path]:
    """The checkpoints of a run's folder, or the one that is named. Raises UserError when there are none."""
    if not path.is_dir():
        if class_name is not None or seed is not None:
            raise UserError(
                f"{path} is one class and seed already: leave --class_name and --seed out, or give its run"
            )
        return [path]
    records = sorted(path.glob("classes/*.json"))
    parts = [(file, *file.stem.rpartition("-seed")[::2]) for file in records]
    numbered = [(file, name, int(number)) for file, name, number in parts if number.isdigit()]
    if not numbered:
        raise UserError(f"expected a run with classes/<class>-seed<n>.json in {path}, found none")
    first = min(number for _, _, number in numbered) if seed is None else seed
    found = {name: file for file, name, number in numbered if number == first}
    if not found:
        raise UserError(f"{path} holds no class of seed {seed}")
    if class_name in (None, "all"):
        return list(found.values())
    chosen = [name.strip() for name in class_names(class_name)]
    for name in chosen:
        if file_name(name) not in found:
            raise UserError(knobs.unknown("class", name, found))
    return [found[file_name(name)] for name in chosen]
