"""The detector of one normal class: where its tokens come from, how it scores them, what a fit leaves behind,
save and load."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import datasets
import model
import utils
from config import Config, UserError
from normalization import Normalizer
from token_grid import TokenGrid

EVAL_BATCH = 100  # images per forward pass in evaluation: their tokens stay in a CPU's caches


# ---------------------------------------------------------------- features of one class
class TokenSource:
    """Rows of a cached split by index: read out of the mapped file, or out of the device's memory where they
    fit there."""

    def __init__(self, tokens: datasets.Tokens, device: torch.device):
        self.device, self.tokens = device, tokens
        self.resident: Tensor | None = None
        if device.type == "cuda" and 2 * math.prod(tokens.shape) < 0.5 * torch.cuda.mem_get_info(device)[0]:
            self.resident = torch.empty(tokens.shape, dtype=torch.float16, device=device)
            for rows in torch.arange(len(tokens)).split(1024):
                self.resident[rows] = torch.from_numpy(tokens[rows.numpy()]).to(device)

    def __getitem__(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Semantic (n, C) and patch tokens (n, N, C) of the images ``index``, float32 on the device."""
        if self.resident is None:
            return _split(torch.from_numpy(self.tokens[index]).to(self.device))
        return _split(self.resident[torch.from_numpy(index).to(self.device)])

    def on_cpu(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """The same, read from the file to the CPU."""
        return _split(torch.from_numpy(self.tokens[index]))


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 1 + N, C) float16 -> semantic (n, C) and patch tokens (n, N, C), float32."""
    rows = rows.float()
    return rows[:, 0], rows[:, 1:]


def in_batches(index: np.ndarray, size: int) -> list[np.ndarray]:
    """An index array cut into consecutive batches, ``size`` long but the last."""
    return [index[i : i + size] for i in range(0, len(index), size)]


@dataclasses.dataclass(frozen=True)
class ClassData:
    """One one-class problem: where its tokens are and which rows are for what."""

    class_name: str
    train: TokenSource
    test: TokenSource
    fit_rows: np.ndarray  # normal training images that the flow is fitted to
    held_rows: np.ndarray  # normal training images held out for likelihood
    test_rows: np.ndarray
    labels: np.ndarray  # of test_rows: 0 normal, 1 anomalous


def class_data(
    config: Config, labels: datasets.Labels, class_name: str, seed: int, train: TokenSource, test: TokenSource
) -> ClassData:
    """The rows of a class, a share of the normal training images held out at random. Raises UserError on too
    few."""
    train_rows, test_rows, test_labels = labels.one_class(class_name)
    shuffled = np.random.RandomState(seed).permutation(train_rows)
    n_held = math.ceil(config.holdout * len(shuffled))
    fit_rows, held_rows = np.sort(shuffled[n_held:]), np.sort(shuffled[:n_held])
    if len(fit_rows) < 2 or len(test_rows) == 0:
        counts = f"{len(fit_rows)} training and {len(test_rows)} test images"
        raise UserError(f"class {class_name}: {counts}; expected at least 2 and 1")
    return ClassData(class_name, train, test, fit_rows, held_rows, test_rows, test_labels)


# ---------------------------------------------------------------- the detector
def normalization_in_effect(config: Config, features: dict) -> str:
    """The normalisation that the knob ``normalize`` comes to. auto: the tokens of a transformer pass its
    final layer norm and are taken as they are, as released; a CNN's map (which the paper does not use) is
    badly scaled for a flow."""
    if config.normalize != "auto":
        return config.normalize
    return "power_l2+whiten" if features["kind"] == "map" else "none"


class Detector(nn.Module):
    """Normaliser and flow: cached tokens -> latent z and log-determinant -> anomaly score."""

    def __init__(self, config: Config, features: dict):
        """features: the sidecar of the cache; n_feat, grid (rows, columns), tokens and kind (map or tokens)
        are read.

        Raises UserError on settings that do not fit the features."""
        super().__init__()
        channels, grid = features["n_feat"], tuple(features["grid"])
        self.score_name = config.score
        self.normalizer = Normalizer(
            normalization_in_effect(config, features),
            channels,
            ridge=config.whiten_ridge,
            centre_pool=config.centre_pool,
            grid=grid,
            patches_used=config.fusion != "none",
        )
        try:
            self.flow = model.build_flow(
                channels,
                grid,
                n_tokens=features["tokens"] - 1,
                n_blocks=config.n_coupling_blocks,
                hidden=config.fc_internal or channels,
                clamp=config.clamp,
                fusion=config.fusion,
                use_gamma=config.use_gamma,
                identity_start=config.identity_start,
                heads=config.n_heads,
                alpha=config.alpha,
                window=config.window,
                bands=TokenGrid(config.token_grid, config.pooling, config.window).bands,
            )
        except ValueError as error:
            raise UserError(f"{error}; choose another fusion, n_heads or token_grid") from None
        self.register_buffer(
            "reference", torch.zeros(0, channels)
        )  # latents of the training images, for latent_knn

    def forward(self, semantic: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Raw tokens (B, C), (B, N, C) -> z (B, C), log-determinant (B)."""
        semantic, patches = self.normalizer(semantic, patches)
        return self.flow(semantic, [patches])

    @torch.no_grad()
    def latents(self, source: TokenSource, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """z (n, C) and log-determinant (n) of many images."""
        z, log_det = zip(*(self(*source[batch]) for batch in in_batches(rows, EVAL_BATCH)))
        return torch.cat(z), torch.cat(log_det)

    def score(self, z: Tensor, log_det: Tensor, name: str | None = None) -> np.ndarray:
        """The anomaly score ``name`` (model.SCORES; None: the knob's), higher = more anomalous: (n, C), (n)
        -> (n)."""
        return model.SCORES[name or self.score_name].function(z, log_det, self.reference).cpu().numpy()


# ---------------------------------------------------------------- what a fit leaves
@dataclasses.dataclass
class Fitted:
    """What fitting a class left: the detector at the chosen epoch, its scores, and how it came about."""

    detector: Detector
    scores: np.ndarray
    labels: np.ndarray
    test_rows: np.ndarray
    held_scores: np.ndarray  # of the held-out normal training images; empty where none were held out
    history: list[dict]
    result: dict


def run_folder(config: Config) -> Path:
    return Path("runs") / config.modelname


def checkpoint_files(path: Path) -> tuple[Path, Path]:
    """The JSON and the weights of a checkpoint, given with or without the ending of either."""
    stem = path.name.removesuffix(".json").removesuffix(".safetensors")
    return path.with_name(f"{stem}.json"), path.with_name(f"{stem}.safetensors")


def checkpoint_path(config: Config, class_name: str, seed: int) -> Path:
    """Where a class and seed of a run is kept, without the ending."""
    return run_folder(config) / "classes" / f"{class_name.replace('/', '_')}-seed{seed}"


def save_fitted(config: Config, cache: datasets.FeatureCache, fitted: Fitted) -> Path:
    """Keep a fitted class: its result with configuration, history and scores (JSON, written last), and its
    weights."""
    path = checkpoint_path(config, fitted.result["class"], fitted.result["seed"])
    record, weights = checkpoint_files(path)
    record.unlink(missing_ok=True)  # an older run's: it would not fit what is written now
    weights.unlink(missing_ok=True)
    if config.save_model:
        with utils.whole_file(weights) as partial:
            save_file(
                {name: t.contiguous().cpu() for name, t in fitted.detector.state_dict().items()}, partial
            )
    content = {
        "result": fitted.result,
        "history": fitted.history,
        "config": dataclasses.asdict(config),
        "features": cache.meta,
        "test": {
            "rows": fitted.test_rows.tolist(),
            "labels": fitted.labels.tolist(),
            "scores": fitted.scores.astype(float).tolist(),
        },
        "held_out_scores": fitted.held_scores.astype(float).tolist(),
    }
    utils.write_json(record, content)
    return path


def undefined_as_nan(entry: dict) -> dict:
    """Metrics that were undefined (one label only) stand as null in JSON; here as NaN again."""
    undefined = (
        name for name, value in entry.items() if value is None and name.split("_")[-1] in utils.METRICS
    )
    return entry | dict.fromkeys(undefined, float("nan"))


def read_record(path: Path) -> dict:
    """What the JSON of a checkpoint says. Raises OSError or ValueError when it cannot be read."""
    content = json.loads(checkpoint_files(path)[0].read_text())
    content["history"] = [undefined_as_nan(entry) for entry in content["history"]]
    content["result"] = undefined_as_nan(content["result"])
    return content


def config_of(record: dict) -> Config:
    """The configuration that a checkpoint was made with."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()}
    return Config(**values)


def load_detector(path: Path) -> tuple[Detector, dict]:
    """The detector of a checkpoint (either of its two files) and what its JSON says. Unpickles nothing.
    Raises UserError."""
    record_file, weights = checkpoint_files(Path(path))
    try:
        record, state = read_record(record_file), load_file(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"expected a checkpoint {record_file} with its .safetensors beside it ({error})"
        ) from None
    detector = Detector(config_of(record), record["features"])
    detector.reference = state["reference"]
    detector.load_state_dict(state)
    return detector.eval(), record


def trained_records(config: Config, classes: list[str]) -> Iterator[tuple[str, dict]]:
    """The checkpoints' records of a run's first seed, class by class."""
    for class_name in classes:
        yield class_name, read_record(checkpoint_path(config, class_name, config.seed))
