"""The detector of one normal class: where its tokens come from, how it scores them, what a fit leaves behind,
save and load."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import datasets
import model
import utils
from backbone.arithmetic import products
from backbone.token_grid import Bands, TokenGrid, centred_window, place_grid_of
from cache import feature_cache
from config import ClassError, Config, UserError, make_config
from detector import calibration, heat_map, memory, pictures, records
from detector.normalization import ENERGY_FLOOR, JointNormalizer, PatchNormalizer, PlaceGaussians
from images import images
from shell.files import file_name, sha256_of_file, whole_file, write_sealed

EVAL_BATCH = {"cpu": 100, "cuda": 500}  # images per forward pass in evaluation: a CPU's caches hold these
LEFT_FREE = 0.2  # share of a GPU's memory that tokens leave to training


# ---------------------------------------------------------------- features of one class
class Features(NamedTuple):
    """What is cached of some images, float32: semantic (n, C), patches (n, N, C) and, where kept, bands (n,
    D) and places (n, P, E)."""

    semantic: Tensor
    patches: Tensor
    bands: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def of(cls, rows: dict[str, Tensor]) -> "Features":
        """From cached rows: tokens (n, 1 + N, C) and, where kept, bands (n, D) and places (n, P, E),
        float16."""
        tokens = rows["tokens"]
        kept = {name: rows[name].float() for name in ("bands", "places") if name in rows}
        return cls(tokens[:, 0].float(), tokens[:, 1:].float(), **kept)  # without gaps: products are quicker

    def split(self, size: int) -> "list[Features]":
        """Consecutive parts of ``size`` images."""
        parts = [[None] * math.ceil(len(self.semantic) / size) if t is None else t.split(size) for t in self]
        return [Features(*part) for part in zip(*parts)]


Index: TypeAlias = np.ndarray | Tensor  # row numbers


class TokenSource:
    """Rows of a cached split by index: read out of the mapped files, or out of the device's memory where they
    fit there."""

    def __init__(self, arrays: dict[str, feature_cache.CachedArray], device: torch.device):
        self.device, self.arrays = device, arrays
        self.resident: dict[str, Tensor] | None = None
        size = 2 * sum(math.prod(array.shape) for array in arrays.values())
        if device.type == "cuda" and fits_beside_training(size, *torch.cuda.mem_get_info(device)):
            self.make_resident()

    def make_resident(self) -> None:
        """Copy every array to the device's memory, to be read there from now on."""
        self.resident = {name: self._load(array) for name, array in self.arrays.items()}

    def _load(self, array: feature_cache.CachedArray) -> Tensor:
        resident = torch.empty(array.shape, dtype=torch.float16, device=self.device)
        for start in range(0, len(array), 1024):
            rows = slice(start, start + 1024)
            resident[rows].copy_(torch.from_numpy(array[rows]))
        return resident

    def index(self, rows: np.ndarray) -> Index:
        """Row numbers as ``[...]`` takes them without a copy to the device: to be made once an epoch."""
        return rows if self.resident is None else torch.from_numpy(rows).to(self.device)

    def _rows(self, name: str, index: Index) -> Tensor:
        """The rows ``index`` of an array, float16, on the device."""
        if self.resident is None:
            return torch.from_numpy(self.arrays[name][np.asarray(index)]).to(self.device)
        chosen = self.index(index) if isinstance(index, np.ndarray) else index
        return self.resident[name].index_select(0, chosen)

    def __getitem__(self, index: Index) -> Features:
        """The features of the images ``index``, on the device, but for the places: few classes need them."""
        return Features.of({name: self._rows(name, index) for name in self.arrays if name != "places"})

    @functools.cached_property
    def _semantic(self) -> Tensor:
        return torch.from_numpy(self.arrays["tokens"].semantic())

    def semantic(self, index: np.ndarray) -> Tensor:
        """The semantic tokens (n, C) of the images ``index``, float32, on the CPU; those of all images are
        read once."""
        return self._semantic[torch.from_numpy(index)].float()

    def patches(self, index: Index) -> Tensor:
        """The patch tokens (n, N, C) of the images ``index``, float32, on the device, without gaps."""
        return self._rows("tokens", index)[:, 1:].float()

    def one(self, name: str, index: Index) -> Tensor:
        """One array of the images ``index``, float32, on the device, without reading the rest."""
        return self._rows(name, index).float()

    def on_cpu(self, index: np.ndarray) -> Features:
        """The same, read from the files to the CPU."""
        names = [name for name in self.arrays if name != "places"]
        return Features.of({name: torch.from_numpy(self.arrays[name][index]) for name in names})

    def one_on_cpu(self, name: str, index: np.ndarray) -> Tensor:
        """One array of the images ``index``, float32, read from the files to the CPU."""
        return torch.from_numpy(self.arrays[name][index]).float()


def fits_beside_training(size: int, free: int, total: int) -> bool:
    """Whether so many bytes of tokens may stay on a GPU with so many bytes free of all it has."""
    return size <= free - LEFT_FREE * total


def in_batches(index: Index, size: int) -> list:
    """Row numbers cut into consecutive batches, ``size`` long but the last; of none, one empty batch."""
    return [index[i : i + size] for i in range(0, max(1, len(index)), size)]


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]


FEWEST = 3  # images that a flow can be fitted to: two have one direction and no spread around it


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
    per_category: bool = False  # a surface or an object and its defects (MVTec) instead of one class of many


def class_data(
    config: Config, labels: datasets.Labels, class_name: str, seed: int, train: TokenSource, test: TokenSource
) -> ClassData:
    """The rows of a class, a share of the normal training images held out at random; there may be no test
    images. Raises ClassError on too few, and on features that are all the same.

    Of a folder of one's own, where verdicts count, as many are held out as the false-alarm rate needs, up to
    a fifth."""
    train_rows, test_rows, test_labels = labels.one_class(class_name)
    shuffled = np.random.RandomState(seed).permutation(train_rows)
    n_held = math.ceil(config.holdout * len(shuffled))
    if config.dataset == "folder" and n_held:
        n_held = max(n_held, min(calibration.needed(config.false_alarms), len(shuffled) // 5))
    fit_rows, held_rows = np.sort(shuffled[n_held:]), np.sort(shuffled[:n_held])
    if len(fit_rows) < FEWEST or not (len(test_rows) or len(held_rows)):
        counts = f"{len(fit_rows)} training, {len(held_rows)} held-out and {len(test_rows)} test images"
        raise ClassError(
            f"class {class_name}: {counts}; expected at least {FEWEST} to train on and one of the others "
            "(--holdout 0.1 holds some out)"
        )
    rows = (fit_rows, held_rows, test_rows)
    data = ClassData(class_name, train, test, *rows, test_labels, labels.per_category)
    sample = train[evenly(fit_rows, 64)].semantic
    if (sample == sample[0]).all():
        raise ClassError(
            f"class {class_name}: the cached features of its training images are all the same; so are its "
            "images, or the cache is damaged"
        )
    return data


def features_fault(data: ClassData) -> str | None:
    """Where a class's cached features are not finite; None where all are. Reads them all: asked only once
    something has gone wrong."""
    for what, source, rows in (
        ("training", data.train, np.sort(np.concatenate([data.fit_rows, data.held_rows]))),
        ("test", data.test, data.test_rows),
    ):
        broken = []
        for batch in in_batches(rows, EVAL_BATCH["cpu"]):
            kinds = [source.one_on_cpu(name, batch) for name in source.arrays]
            broken += batch[
                ~torch.stack([k.flatten(1).isfinite().all(1) for k in kinds]).all(0).numpy()
            ].tolist()
        if broken:
            return (
                f"class {data.class_name}: the cached features of {len(broken)} of its {what} images are not "
                f"finite, row {broken[0]} of that split first; the cache is damaged: extract them again"
            )
    return None


# ---------------------------------------------------------------- the detector
def normalization_in_effect(config: Config, features: dict) -> str:
    """The normalisation that the knob ``normalize`` comes to. auto: the tokens of a transformer pass its
    final layer norm and are taken as they are, as released; a CNN's map (which the paper does not use) is
    badly scaled for a flow."""
    if config.normalize != "auto":
        return config.normalize
    return "power_l2+whiten" if features["kind"] == "map" else "none"


LOW_DEPTHS = 2  # how many of the deepest depths give their low band to the joint token
ALIKE = 0.35  # spread of a class's semantic tokens below which its images show one scene, and places are read
MOST_UNUSUAL = 0.03  # share of an image's places that the joined score takes the mean of
USUAL = 3.0  # standard deviations at which a heat map begins


class Inputs(NamedTuple):
    """What the flow takes: tokens (B, k), of which it moves the leading ones; the squared length (B) of what
    lies in none of their directions; the patch tokens (B, N, C) that the fusion sees."""

    tokens: Tensor
    outside: Tensor
    patches: Tensor


class Latents(NamedTuple):
    """What the flow makes of images: z (B, k), its leading directions moved, and the log-determinant (B); and
    of what: tokens (B, k) and outside (B), as in ``Inputs``."""

    z: Tensor
    log_det: Tensor
    tokens: Tensor
    outside: Tensor


class Detector(nn.Module):
    """Normaliser and fused flow: cached tokens -> latent z and log-determinant -> anomaly score.

    The flow moves the leading directions of one token: the semantic one, with ``bands`` joined by the
    sub-band energies of several depths. Under the score "joined" the image's log-energy and its most unusual
    places are added (docs/method.md, eq. 14), where the class's normal images show one scene."""

    def __init__(self, config: Config, features: dict, n_images: int | None = None):
        """features: the sidecar of the cache; n_feat, grid (rows, columns), tokens, kind (map or tokens) and,
        with bands, band_channels, with places, place_shape are read. n_images: how many it is fitted to,
        which bounds the directions of a whitened token. Raises UserError on settings that do not fit the
        features."""
        super().__init__()
        memory.check_detector(config, features)
        self.score_name, self.base, self.fused = config.score, config.base, config.fusion != "none"
        name, grid = normalization_in_effect(config, features), tuple(features["grid"])
        widths = [features["n_feat"]]
        self.band_columns: list[range] = []
        if config.bands:
            self.band_columns = joined_bands(config, tuple(features["band_channels"]))
            widths += map(len, self.band_columns)
        self.channels = sum(widths)  # of the joint token
        ends = np.cumsum(widths)
        groups = [range(end - width, end) for end, width in zip(ends, widths)]
        whitened = name.endswith("whiten")
        self.directions = self.channels
        if whitened and n_images:
            self.directions = max(1, min(self.channels, n_images - 1))
        wanted = config.flow_channels if whitened and config.flow_channels else self.directions
        self.leading = min(wanted, self.directions)
        window = centred_window(grid, config.centre_pool) if config.centre_pool else None
        self.register_buffer("window", window, persistent=False)
        self.normalizer = JointNormalizer(name, groups, self.directions, self.leading, config.whiten_ridge)
        self.middle = self.fused and config.fusion_tokens == "middle"
        self.place_grid = place_grid_of(features) if config.places else (0, 0)
        n_tokens, width = features["tokens"] - 1, features["n_feat"]
        if self.middle:
            grid = tuple(max(1, math.ceil(side / 2)) for side in self.place_grid)
            n_tokens, width = math.prod(grid), features["place_shape"][1]
        self.fusion_grid = grid
        self.patch_normalizer = PatchNormalizer(name, width, self.leading) if self.fused else None
        self.flow = build_flow(config, self.leading, grid, n_tokens if self.fused else 0, self.middle)
        # the kernels' centres, or latents of the training images for the score latent_knn
        self.register_buffer("reference", torch.zeros(0, self.directions, dtype=torch.float16))
        self.register_buffer("bandwidth", torch.ones(()))  # of the base density: 1 of the normal one
        self.places: PlaceGaussians | None = None
        if config.places and config.score == "joined":
            self.places = PlaceGaussians(*features["place_shape"])
            count = math.prod(self.place_grid)
            self.n_unusual = max(1, round(MOST_UNUSUAL * count))
        self.register_buffer("alike", torch.zeros((), dtype=torch.bool))
        self.uses_places = False

    # ------------------------------------------------------------ tokens
    def joint(self, features: Features) -> Tensor:
        """The joint token (B, D), as it is cached: the semantic token (re-pooled under ``centre_pool``) and,
        with bands, the chosen sub-band energies."""
        semantic = features.semantic
        if self.window is not None:
            semantic = torch.matmul(self.window, features.patches[:, : len(self.window)])
        if not self.band_columns:
            return semantic
        assert features.bands is not None, "bands are cached"
        chosen = [features.bands[:, group.start : group.stop] for group in self.band_columns]
        return torch.cat([semantic, *chosen], 1)

    def raw_patches(self, features: Features) -> Tensor:
        """The patch tokens (B, N, E) that the fusion takes, as they are cached: of the last map, or of middle
        depths, two by two places together."""
        if not self.middle:
            return features.patches
        assert features.places is not None, "places are cached"
        return self.middle_patches(features.places)

    def middle_patches(self, places: Tensor) -> Tensor:
        """Place tokens (B, P, E) two by two together -> (B, N, E)."""
        maps = places.transpose(1, 2).unflatten(2, self.place_grid)
        return F.adaptive_avg_pool2d(maps, self.fusion_grid).flatten(2).transpose(1, 2)

    def patches(self, features: Features) -> Tensor:
        """The patch tokens (B, N, C) that the fusion sees."""
        if self.patch_normalizer is None:
            return features.semantic.new_zeros(features.semantic.shape[0], 0, self.leading)
        return self.patch_normalizer(self.raw_patches(features))

    def inputs(self, features: Features) -> Inputs:
        """What the flow takes of cached features."""
        tokens, outside = self.normalizer(self.joint(features))
        return Inputs(tokens, outside, self.patches(features))

    # ------------------------------------------------------------ latents and scores
    def latents(self, inputs: Inputs) -> Latents:
        """The flow on the leading directions, the others as they are."""
        z, log_det = self.flow(inputs.tokens[:, : self.leading], [inputs.patches])
        if self.leading < self.directions:
            z = torch.cat([z, inputs.tokens[:, self.leading :]], 1)
        return Latents(z, log_det, inputs.tokens, inputs.outside)

    def forward(
        self, semantic: Tensor, patches: Tensor, bands: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Raw tokens -> z (B, k) and log-determinant (B), where the fusion takes the last map."""
        latents = self.latents(self.inputs(Features(semantic, patches, bands)))
        return latents.z, latents.log_det

    def distances(self, rows: Tensor, outside: Tensor) -> Tensor:
        """Squared distances (B, n) of tokens or latents (B, k) to the reference."""
        return model.squared_distances(rows, self.reference.float()) + outside.unsqueeze(1)

    def flow_loss(self, latents: Latents) -> Tensor:
        """The flow's own negative log-likelihood of its directions (B): model.py."""
        return model.loss_per_image(latents.z[:, : self.leading], latents.log_det)

    def energy(self, latents: Latents, distances: Tensor | None = None) -> Tensor:
        """The image's energy (B), per channel of the joint token: model.py. distances (B, n): of its tokens
        to the kernels' centres, where they are known."""
        z, log_det, tokens, outside = latents
        if self.base == "normal":
            return model.normal_energy(z, log_det, outside, self.channels)
        if distances is None:
            distances = self.distances(tokens, outside)
        before = 0.5 * tokens[:, : self.leading].square().sum(1)
        gain = before - self.leading * self.flow_loss(latents)
        return model.kernel_energy(distances, gain, self.bandwidth, self.channels)

    def score(self, latents: Latents, name: str | None = None, distances: Tensor | None = None) -> Tensor:
        """The anomaly score ``name`` (model.SCORES; None: the knob's) of images, without places: higher =
        more anomalous -> (B). distances: as in ``energy``."""
        name = name or self.score_name
        if name == "latent":
            return latents.z.square().mean(1)
        if name == "latent_knn":
            return model.nearest_neighbours(self.distances(latents.z, latents.outside))
        energy = self.energy(latents, distances)
        if name == "likelihood":
            return model.negative_log_likelihood(energy, self.bandwidth)
        return energy.clamp_min(ENERGY_FLOOR).log()

    def unusual_places(self, places: Tensor) -> Tensor:
        """How unusual an image's most unusual places are, on average, from raw place tokens (B, P, E) ->
        (B)."""
        assert self.places is not None
        return self.places(places).topk(self.n_unusual, dim=1).values.mean(1)

    def scores(self, features: Features) -> Tensor:
        """Anomaly scores (n) of images from their cached features, on the device: what an exported file
        computes."""
        score = self.score(self.latents(self.inputs(features)))
        if self.uses_places:
            score = score + self.unusual_places(features.places)
        return score

    @torch.no_grad()
    def score_features(self, features: Features) -> np.ndarray:
        """The same, each image by itself. Raises UserError when a score is not finite."""
        with products("highest", features.semantic.device):
            return self._finite(self.scores(features).cpu().numpy())

    @torch.no_grad()
    def place_map(self, places: Tensor) -> np.ndarray:
        """How unusual every place is (B, P), in standard deviations of the place's own log-energy beyond
        the three that few places of a normal picture reach, from raw place tokens (B, P, E)."""
        assert self.places is not None
        with products("highest", places.device):
            return (self.places(places) - USUAL).cpu().numpy()

    @staticmethod
    def _finite(scores: np.ndarray) -> np.ndarray:
        """The scores, all finite: one that is not would pass for a verdict. Raises UserError."""
        broken = np.flatnonzero(~np.isfinite(scores))
        if len(broken):
            raise UserError(
                f"{len(broken)} of {len(scores)} scores are not finite, image {broken[0]} first: its "
                "features or the detector's weights are damaged"
            )
        return scores

    # ------------------------------------------------------------ fitting and loading
    def read_places_if(self, alike: bool) -> None:
        """Whether the score reads places: where the class's normal images show one scene."""
        self.alike.fill_(alike)
        self.uses_places = bool(alike) and self.places is not None

    def read(self, source: TokenSource, rows: np.ndarray) -> Features:
        """All that scoring the images ``rows`` takes: the places, too, where they are read."""
        features = source[rows]
        if self.uses_places or self.middle:
            features = features._replace(places=source.one("places", rows))
        return features

    @staticmethod
    def load(
        path: str | Path,
        device: str = "auto",
        threads: int = 0,
        false_alarms: float | None = None,
        weights_path: str | Path | None = None,
    ) -> "PictureDetector":
        """A fitted class that scores pictures, from its checkpoint: ``Detector.load(path).score(picture)``.

        false_alarms: the share of normal pictures that ``verdict`` may call anomalous; None: the run's knob.
        weights_path: the file that a fit with weights_path took; None: looked for where it was and beside the
        checkpoint. Raises UserError when the checkpoint or the device is not there."""
        return PictureDetector.load(path, utils.set_up(device, threads), false_alarms, weights=weights_path)

    def load_saved(self, state: dict[str, Tensor]) -> None:
        """Load a state dict, whose reference and whitening of places may have any number of rows."""
        for name, values in state.items():
            if name in ("reference", "places.whitening"):
                owner, _, buffer = name.rpartition(".")
                setattr(self.get_submodule(owner), buffer, torch.empty_like(values))
        self.load_state_dict(state)
        self.read_places_if(bool(self.alike))


def joined_bands(config: Config, channels: tuple[int, ...]) -> list[range]:
    """The columns of the band token that the joint token takes: the low bands of the deepest depths, rings
    and peaks of all."""
    bands, depths = Bands(), range(len(channels))
    low = bands.columns(channels, ("low",), depths[-LOW_DEPTHS:])
    return low + bands.columns(channels, bands.statistics[1:], depths)


def build_flow(
    config: Config, channels: int, grid: tuple[int, int], n_tokens: int, middle: bool
) -> nn.Module:
    """The flow of the configuration's size. Raises UserError on sizes that do not fit."""
    try:
        return model.build_flow(
            channels,
            grid,
            n_tokens=n_tokens,
            n_blocks=config.n_coupling_blocks,
            hidden=config.fc_internal or channels,
            clamp=config.clamp,
            fusion=config.fusion,
            use_gamma=True,
            identity_start=config.identity_start,
            heads=0,  # as many as the fusion takes by itself
            alpha=config.alpha,
            window=config.window,
            bands=not middle and TokenGrid.named(config.token_grid, config.window).bands,
        )
    except ValueError as error:
        raise UserError(f"{error}; choose another fusion, fc_internal or token_grid") from None


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
    # on the test images, without places: "likelihood", and under a kernel base "flow alone", at the chosen
    # epoch and "..., before training"
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


def load_detector(path: Path) -> tuple[Detector, dict]:
    """The detector of a checkpoint (either of its two files) and what its JSON says. Unpickles nothing.
    Raises UserError unless both are what was written together, and every weight is finite."""
    record_file, weights = checkpoint_files(Path(path))
    expected = f"expected a checkpoint {record_file} with its .safetensors beside it"
    try:
        record = read_record(record_file)
    except (OSError, ValueError) as error:
        raise UserError(f"{expected} ({error})") from None
    fault = weights_fault(record, weights)
    if fault:
        raise UserError(f"{expected}: {fault}; train it again")
    try:
        detector = Detector(config_of(record), record["features"], record["result"]["n_train"])
        detector.load_saved(load_file(weights))
    except UserError as error:
        raise UserError(f"{record_file}: {error}") from None
    except (
        Exception
    ) as error:  # a foreign safetensors file, or one of another flow: each fails in its own way
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        fault = f"holds no weights of this version's detector ({reason})"
        raise UserError(f"{weights} {fault}; train it again") from None
    broken = [name for name, t in detector.state_dict().items() if not torch.isfinite(t).all()]
    if broken:
        raise UserError(f"{weights} holds weights that are not finite ({broken[0]}): train it again")
    return detector.eval(), record


def trained_records(config: Config, classes: list[str]) -> Iterator[tuple[str, dict]]:
    """The checkpoints' records of a run's first seed, class by class."""
    for class_name in classes:
        yield class_name, read_record(checkpoint_path(config, class_name, config.seed))


def place_maps(fitted: Detector, cache: feature_cache.FeatureCache, rows: np.ndarray) -> np.ndarray:
    """How unusual every place of the test images ``rows`` is (n, P), from their cached features."""
    places = cache.arrays("test")["places"]
    batches = in_batches(rows, EVAL_BATCH["cpu"])
    return np.concatenate([fitted.place_map(torch.from_numpy(places[batch]).float()) for batch in batches])


# ---------------------------------------------------------------- from pictures
class PictureDetector:
    """A fitted class as it is used: pictures in; scores, p-values, verdicts and heat maps out.

    A picture is a path, a Pillow image or an array (H, W, 3) or (H, W) of uint8. held_out: scores of held-out
    normal pictures, which p-values and verdicts rest on; may be empty."""

    def __init__(self, fitted: Detector, record: dict, eye: pictures.Eye, false_alarms: float | None = None):
        self.fitted, self.record, self.eye = fitted.to(eye.device).eval(), record, eye
        self.class_name, self.seed = record["result"]["class"], record["result"]["seed"]
        self.held_out = np.array(record["held_out_scores"], float)
        config = config_of(record)
        self.false_alarms = config.false_alarms if false_alarms is None else false_alarms

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device,
        false_alarms: float | None = None,
        eye: pictures.Eye | None = None,
        weights: str | Path | None = None,
    ) -> "PictureDetector":
        """From a checkpoint; ``eye``: of a detector that was fitted to the same features; ``weights``: the
        file of a fit with weights_path."""
        fitted, record = load_detector(Path(path))
        file = None if weights is None else Path(weights)
        eye = eye or pictures.Eye(
            config_of(record), record["features"], device, weights=file, checkpoint=Path(path)
        )
        return cls(fitted, record, eye, false_alarms)

    def score(self, picture: Any) -> Any:
        """The anomaly score of a picture (float), or of several (n): higher is more anomalous. Raises
        UserError on one that cannot be read."""
        several = pictures.are_several(picture)
        scores: list[np.ndarray] = []
        for rows in self.eye.rows(picture if several else [picture]):
            if isinstance(rows, pictures.Unreadable):
                raise UserError(rows.reason)
            scores.append(self.score_rows(rows))
        joined = np.concatenate(scores) if scores else np.empty(0)
        return joined if several else float(joined[0])

    def score_rows(self, rows: pictures.Rows) -> np.ndarray:
        """Scores (n) from rows of features, as ``Eye.rows`` gives them."""
        return self.fitted.score_features(Features.of(rows)).astype(float)

    def heat_map(self, picture: Any) -> np.ndarray:
        """How unusual each place of a picture is, (H, W) float32 at its size. Raises UserError on a picture
        that cannot be read.

        Where the score reads places: in standard deviations beyond ``USUAL``, which few places of a normal
        picture reach. Else by occlusion: how much the score falls when a part is blurred."""
        pixels = images.pixels_of(picture)
        if not self.fitted.uses_places:
            return heat_map.by_occlusion(self.score, pixels)
        rows = next(iter(self.eye.rows([pixels])))
        assert not isinstance(rows, pictures.Unreadable), "pixels can be read"
        values, grid = self.fitted.place_map(Features.of(rows).places)[0], place_grid_of(self.eye.features)
        return heat_map.of_places(values, grid, pixels.shape[:2])

    def p_value(self, score: Any) -> Any:
        """How many normal pictures score as high or higher, as a share, of a score or an array of them; NaN
        where none were held out (calibration.p_values)."""
        if not len(self.held_out):
            return np.full(np.shape(score), np.nan) if np.ndim(score) else float("nan")
        values = calibration.p_values(self.held_out, score)
        return values if np.ndim(score) else float(values)

    @property
    def threshold(self) -> calibration.Threshold:
        """Where ``verdict`` draws the line. Raises UserError where no pictures were held out."""
        return calibration.threshold(self.held_out, self.false_alarms)

    def verdict(self, score: Any) -> Any:
        """ "anomalous" or "normal", of a score or an array of them. Raises UserError where no pictures were
        held out."""
        verdicts = np.where(np.asarray(score) > self.threshold.score, "anomalous", "normal")
        return verdicts if np.ndim(score) else str(verdicts)

    def calibrate(self, good: Any) -> calibration.Threshold:
        """Let p-values and verdicts rest on fresh normal pictures instead -> the new threshold."""
        return self.calibrate_to(np.atleast_1d(self.score(good)))

    def calibrate_to(self, scores: Any) -> calibration.Threshold:
        """The same, from the pictures' scores (n)."""
        self.held_out = np.array(scores, float)
        return self.threshold
