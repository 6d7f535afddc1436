"""What fitting a class leaves behind, and its checkpoint: a JSON record and the weights beside it."""

import dataclasses
from pathlib import Path

import numpy as np
import safetensors.torch
from torch import nn

import config as knobs
from config import Config, UserError, make_config
from images.layouts import folded
from shell.files import file_name, read_sealed, sha256_of_file, whole_file, write_sealed

# Of the formulas that scores are made by: kept with what they made, and raised with every change of them.
SCORING = 4


@dataclasses.dataclass
class Scored:
    """The test images of a class, an entry each."""

    rows: np.ndarray  # of the test split
    labels: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass
class Record:
    """What fitting a class came to beside its detector: a checkpoint's JSON, where arrays are lists."""

    result: dict  # a row of the table: class, seed, metrics, counts, times
    history: list[dict]  # of every evaluation
    test: Scored
    held_out_scores: np.ndarray  # of the held-out normal training images; empty where none were held out
    # scores of the test images by their names (``Detector.scores``): others than those of ``test`` at the
    # last epoch, and all "..., before training"
    flow_scores: dict[str, np.ndarray]
    simple_scores: dict[str, np.ndarray]  # of simple detectors
    # known once it is kept:
    config: dict = dataclasses.field(default_factory=dict)
    features: dict = dataclasses.field(default_factory=dict)  # the sidecar of those that it was fitted to
    weights: dict | None = None  # size and hash of the file beside it; None where none was kept
    scoring: int = SCORING


def run_folder(modelname: str) -> Path:
    return Path("runs") / modelname


def checkpoint_files(path: Path) -> tuple[Path, Path]:
    """The JSON and the weights of a checkpoint, given with or without the ending of either."""
    stem = path.name.removesuffix(".json").removesuffix(".safetensors")
    return path.with_name(f"{stem}.json"), path.with_name(f"{stem}.safetensors")


def checkpoint_path(run: Path, class_name: str, seed: int) -> Path:
    """Where a class and seed of a run's folder is kept, without the ending."""
    return run / "classes" / f"{file_name(class_name)}-seed{seed}"


def save_fitted(config: Config, features: dict, detector: nn.Module, record: Record) -> Path:
    """Keep a fitted class: its weights, then its record. features: the sidecar of the cache."""
    path = checkpoint_path(run_folder(config.modelname), record.result["class"], record.result["seed"])
    file, weights = checkpoint_files(path)
    file.unlink(missing_ok=True)  # an older run's: it would not fit what is written now
    weights.unlink(missing_ok=True)
    if config.keep != "results":
        state = {name: values.contiguous().cpu() for name, values in detector.state_dict().items()}
        with whole_file(weights) as partial:
            partial.write_bytes(safetensors.torch.save(state))
    record.weights = fingerprint(weights) if config.keep != "results" else None
    record.config, record.features = dataclasses.asdict(config), features
    write_sealed(file, dataclasses.asdict(record))
    return path


def fingerprint(path: Path) -> dict:
    """The size and the hash of a file, as a record keeps them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def read_record(path: Path, whole: bool = False) -> Record:
    """The record of a checkpoint. Raises OSError when it is not there, and ValueError, with the reason in one
    line, when it was changed or is of another version; and, where the checkpoint is to be ``whole``, when
    the weights beside it are not those that were written with it."""
    file, weights = checkpoint_files(path)
    content = {name: value for name, value in read_sealed(file).items() if name != "checksum"}
    try:
        record = Record(**content)
        for entry in (record.result, *record.history):  # metrics of one label only stand as null in JSON
            nulls = [name for name, value in entry.items() if value is None and "loss" not in name]
            entry |= dict.fromkeys(nulls, float("nan"))
        rows, labels, scores = (content["test"][name] for name in ("rows", "labels", "scores"))
        record.test = Scored(np.array(rows, int), np.array(labels, int), np.array(scores, float))
        record.held_out_scores = np.array(record.held_out_scores, float)
        for scores in (record.flow_scores, record.simple_scores):
            scores |= {name: np.array(values, float) for name, values in scores.items()}
    except (TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"{file} is no record of this version: {error}") from None
    if record.scoring != SCORING:
        raise ValueError(f"{file} was fitted by a version whose scores are others; train it again")
    if whole and record.weights is None:
        raise ValueError(f"no weights were kept in {weights}: keep was results")
    if whole and fingerprint(weights) != record.weights:
        raise ValueError(f"the weights {weights} are cut or were changed")
    return record


def config_of(record: Record) -> Config:
    """The configuration that a checkpoint was made with. Raises UserError when it is none of this version."""
    try:
        return make_config({k: tuple(v) if isinstance(v, list) else v for k, v in record.config.items()})
    except UserError as error:
        raise UserError(f"made with settings of another version ({error}); train it again") from None


def find_checkpoints(path: Path, class_name: str | None, seed: int | None) -> list[Path]:
    """The checkpoints of a run's folder, or the one that is named. Raises UserError when there are none."""
    if not path.is_dir():
        if class_name is not None or seed is not None:
            raise UserError(
                f"{path} is one class and seed already: leave --class_name and --seed out, or give its run"
            )
        return [path]
    parts = [(file, *file.stem.rpartition("-seed")[::2]) for file in sorted(path.glob("classes/*.json"))]
    numbered = [(file, name, int(number)) for file, name, number in parts if number.isdigit()]
    if not numbered:
        raise UserError(f"expected a run with classes/<class>-seed<n>.json in {path}, found none")
    first = min(number for _, _, number in numbered) if seed is None else seed
    files = {name: file for file, name, number in numbered if number == first}
    if not files:
        raise UserError(f"{path} holds no class of seed {seed}")
    if class_name in (None, "all"):
        return list(files.values())
    known = {folded(name): file for name, file in files.items()}
    whole = folded(file_name(class_name)) in known  # else several
    chosen = [class_name] if whole else [*map(str.strip, class_name.split(","))]
    keys = [folded(file_name(name)) for name in chosen]
    for name, key in zip(chosen, keys):
        if key not in known:
            raise UserError(knobs.unknown("class", name, files))
    return [known[key] for key in keys]
