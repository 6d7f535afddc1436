"""What fitting a class leaves behind, and its checkpoint: a JSON and the weights beside it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import utils
from cache import feature_cache
from config import Config, UserError, make_config
from detector import records
from shell.files import file_name, sha256_of_file, whole_file, write_sealed

# Of the formulas that scores are made by: kept with what they made, and raised with every change of them.
SCORING = 3


@dataclasses.dataclass
class Fitted:
    """What fitting a class left: the detector at the chosen epoch, its scores, and how it came about."""

    detector: nn.Module  # a detector.detector.Detector
    scores: np.ndarray
    labels: np.ndarray
    test_rows: np.ndarray
    held_scores: np.ndarray  # of the held-out normal training images; empty where none were held out
    history: list[dict]
    result: dict
    # scores of the test images by their names (preparation.py): parts and others than ``scores`` at the
    # chosen epoch, and all "..., before training"
    flow_scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    simple_scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of simple detectors


def run_folder(config: Config) -> Path:
    return Path("runs") / config.modelname


def checkpoint_files(path: Path) -> tuple[Path, Path]:
    """The JSON and the weights of a checkpoint, given with or without the ending of either."""
    stem = path.name.removesuffix(".json").removesuffix(".safetensors")
    return path.with_name(f"{stem}.json"), path.with_name(f"{stem}.safetensors")


def checkpoint_path(config: Config, class_name: str, seed: int) -> Path:
    """Where a class and seed of a run is kept, without the ending."""
    return run_folder(config) / "classes" / f"{file_name(class_name)}-seed{seed}"


def save_fitted(config: Config, cache: feature_cache.FeatureCache, fitted: Fitted) -> Path:
    """Keep a fitted class: its result with configuration, history and scores (JSON, written last), and its
    weights, whose size and hash the JSON records. Raises UserError when they cannot be written."""
    path = checkpoint_path(config, fitted.result["class"], fitted.result["seed"])
    record, weights = checkpoint_files(path)
    record.unlink(missing_ok=True)  # an older run's: it would not fit what is written now
    weights.unlink(missing_ok=True)
    if config.keep != "results":
        save_weights(fitted.detector.state_dict(), weights)
    content = {
        "result": fitted.result,
        "history": fitted.history,
        "config": dataclasses.asdict(config),
        "features": cache.meta,
        "scoring": SCORING,
        "weights": fingerprint(weights) if config.keep != "results" else None,
        "test": {
            "rows": fitted.test_rows.tolist(),
            "labels": fitted.labels.tolist(),
            "scores": fitted.scores.astype(float).tolist(),
        },
        "held_out_scores": fitted.held_scores.astype(float).tolist(),
        **{
            kind: {name: values.astype(float).tolist() for name, values in found.items()}
            for kind, found in (("flow_scores", fitted.flow_scores), ("simple_scores", fitted.simple_scores))
        },
    }
    write_sealed(record, content)
    return path


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict, whole or not at all. Raises UserError on a full disk or a folder that may not be
    written."""
    with whole_file(path) as partial:
        try:
            save_file({name: t.contiguous().cpu() for name, t in state.items()}, partial)
        except SafetensorError as error:
            raise UserError(
                f"the weights {path} cannot be written ({error}); make space on its disk"
            ) from None


def fingerprint(path: Path) -> dict:
    """The size and the hash of a file, as a record keeps them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def weights_fault(record: dict, path: Path) -> str | None:
    """What is wrong with the weights beside a record (missing, cut, changed), or None when they are those
    that were written with it."""
    kept = record["weights"]
    if kept is None:
        return f"no weights were kept in {path} (keep was results)"
    if not path.is_file():
        return f"the weights {path} are missing"
    return None if fingerprint(path) == kept else f"the weights {path} are cut or were changed"


def undefined_as_nan(entry: dict) -> dict:
    """Metrics that were undefined (one label only) stand as null in JSON; here as NaN again."""
    undefined = (
        name for name, value in entry.items() if value is None and name.split("_")[-1] in utils.METRICS
    )
    return entry | dict.fromkeys(undefined, float("nan"))


def read_record(path: Path) -> dict:
    """What the JSON of a checkpoint says. Raises OSError or ValueError when it cannot be read, or was
    changed."""
    content = records.read(checkpoint_files(path)[0])
    content["history"] = [undefined_as_nan(entry) for entry in content["history"]]
    content["result"] = undefined_as_nan(content["result"])
    return content


def config_of(record: dict) -> Config:
    """The configuration that a checkpoint was made with. Raises UserError when it is none of this version."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()}
    try:
        return make_config(values)
    except UserError as error:
        raise UserError(f"made with settings of another version ({error}); train it again") from None


def trained_records(config: Config, classes: list[str]) -> Iterator[tuple[str, dict]]:
    """The checkpoints' records of a run's first seed, class by class."""
    for class_name in classes:
        yield class_name, read_record(checkpoint_path(config, class_name, config.seed))
