"""The detector of one normal class: where its tokens come from, how it scores them, what a fit leaves behind,
save and load."""

import copy
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

import calibration
import datasets
import feature_cache
import heat_map
import images
import memory
import model
import packing
import pictures
import records
import utils
from arithmetic import products
from config import ClassError, Config, UserError, make_config
from normalization import BandNormalizer, Normalizer, PlaceNormalizer, spread
from shell.files import file_name, sha256_of_file, whole_file, write_sealed
from token_grid import Bands, TokenGrid, place_grid_of

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
            kinds = [kind for kind in source.on_cpu(batch) if kind is not None]
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


LOW_RIDGE, TEXTURE_RIDGE = (
    1.0,
    0.0,
)  # of the whitening of low bands and of rings and peaks: see results/choosing.md
NEGLIGIBLE = 0.1  # a head whose weight is less stays at its start: training it would not show
HEADS = ("semantic", "texture", "local")  # the flows of the detector, each with its evidence


class Inputs(NamedTuple):
    """What one flow takes: tokens (B, C), normalised, and the patch tokens (B, N, C) that its fusion sees."""

    tokens: Tensor
    patches: Tensor


REFERENCES = {"reference": 1.0, "own_reference": 0.5}  # kinds of tokens with neighbours -> what each counts


class Evidence(nn.Module):
    """How unusual one flow finds an image, against held-out normal images (docs/method.md, section 4): the
    standardised negative log-likelihood plus ``weight`` times the standardised distances to the nearest
    normal images, in tokens of one kind (the flow's input) or two (the backbone's own semantic token, which
    counts half), of ``channels`` channels each; there may be none."""

    def __init__(self, channels: tuple[int, ...], weight: float):
        super().__init__()
        self.kinds = list(REFERENCES)[: len(channels)]
        for name, width in zip(self.kinds, channels):  # normal images' tokens
            self.register_buffer(name, torch.zeros(0, width, dtype=torch.float16))
        shares = torch.tensor([weight * REFERENCES[name] for name in self.kinds])
        self.register_buffer("shares", shares, persistent=False)
        for name, shape in (("likelihood", ()), ("neighbours", (len(channels),))):
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_std", torch.ones(shape))

    def remember(self, tokens: list[Tensor]) -> None:
        """Take normal images' tokens (n, C) of each kind to look for neighbours in."""
        for name, values in zip(self.kinds, tokens, strict=True):
            setattr(self, name, values.half())

    def distances(self, tokens: list[Tensor]) -> Tensor:
        """Mean distances (B, kinds) from tokens (B, C) of each kind to the nearest reference tokens."""
        pairs = zip(self.kinds, tokens, strict=True)
        return torch.stack([model.nearest_neighbours(getattr(self, name).float(), t) for name, t in pairs], 1)

    def calibrate(self, name: str, held_out: Tensor) -> None:
        """Take mean and standard deviation of ``name``, likelihood (n) or neighbours (n, kinds), from
        held-out normals' values."""
        getattr(self, f"{name}_mean").copy_(held_out.mean(0))
        several = len(held_out) > 1 and held_out.numel() > 0
        getattr(self, f"{name}_std").copy_(held_out.std(0).clamp_min(1e-6) if several else torch.ones(()))

    def forward(self, likelihood: Tensor, distances: Tensor) -> Tensor:
        """The evidence (B) of likelihood scores (B) and distances (B, kinds)."""
        standard = (likelihood - self.likelihood_mean) / self.likelihood_std
        near = torch.matmul((distances - self.neighbours_mean) / self.neighbours_std, self.shares)
        return (standard + near) / (1 + self.shares.sum())


class Detector(nn.Module):
    """Normaliser and flow: cached tokens -> latent z and log-determinant -> anomaly score.

    With band tokens there are two flows, called heads, and with place tokens three. ``flow`` sees meaning:
    the semantic token joined with the low bands of the deepest depths, patch tokens fused in. ``texture``
    sees rings and peaks of the whole image, ``local`` one place at a time. The score "spectrum" weighs their
    evidence by how alike the class's normal images are in meaning (docs/method.md, section 4)."""

    def __init__(self, config: Config, features: dict):
        """features: the sidecar of the cache; n_feat, grid (rows, columns), tokens, kind (map or tokens) and,
        with bands, band_channels, with places, place_shape are read. Raises UserError on settings that do not
        fit the features."""
        super().__init__()
        memory.check_detector(config, features)
        channels, grid = features["n_feat"], tuple(features["grid"])
        self.score_name, self.fused = config.score, config.fusion != "none"
        self.spread_at_balance = config.spread_at_balance
        self.spread_of_surfaces = config.spread_of_surfaces
        normalization = normalization_in_effect(config, features)
        normalizer = functools.partial(
            Normalizer, normalization, channels, ridge=config.whiten_ridge, grid=grid
        )
        self.normalizer = normalizer(centre_pool=config.centre_pool, patches_used=self.fused)
        self.own: Normalizer | None = None  # of the backbone's semantic token, where the flow's is re-pooled
        if config.knows_own_token:
            self.own = normalizer(centre_pool=0.0, patches_used=False)
        self.low: BandNormalizer | None = None
        self.rings: BandNormalizer | None = None
        self.texture: Any = None
        n_low = self._build_bands(config, tuple(features["band_channels"])) if config.bands else 0
        self.channels = channels + n_low
        n_tokens = features["tokens"] - 1 if self.fused else 0
        self.flow = _flow(config, self.channels, grid, config.fusion, n_tokens)
        self.register_buffer("reference", torch.zeros(0, self.channels))  # latents of the training images
        self.register_buffer("weights", torch.tensor([1.0, 0.0, 0.0]))  # of HEADS in the score "spectrum"
        self.heads = HEADS[:3] if config.places else HEADS[:2]
        if config.places:
            places, width = features["place_shape"]
            self.place_normalizer = PlaceNormalizer(places, width)
            self.local = _flow(config, width, (1, 1), "none", 0)
        if config.score == "spectrum":
            kinds: dict[str, tuple[int, ...]] = {
                "semantic": (self.channels, channels) if self.own else (self.channels,),
                "texture": (self.texture_channels,),
                "local": (),  # a place's neighbours would be as many as the places of all images
            }
            self.evidence = nn.ModuleDict(
                {name: Evidence(kinds[name], config.neighbours_weight) for name in self.heads}
            )

    def _build_bands(self, config: Config, channels: tuple[int, ...]) -> int:
        """The normalisers of the band token and the texture flow -> channels of the low bands."""
        bands, depths = Bands(config.rings, config.low_sigma), range(len(channels))
        deepest = depths[max(0, len(channels) - config.low_depths) :]
        low = bands.columns(channels, ("low",), deepest)
        rest = bands.columns(channels, bands.statistics[1:], depths)
        self.low = BandNormalizer(low, LOW_RIDGE) if low else None
        self.rings = BandNormalizer(rest, TEXTURE_RIDGE)
        self.texture_channels = sum(map(len, rest))
        self.texture = _flow(config, self.texture_channels, (1, 1), "none", 0)
        return sum(map(len, low))

    def inputs(
        self, semantic: Tensor, patches: Tensor, bands: Tensor | None = None, places: Tensor | None = None
    ) -> Inputs:
        """What ``flow`` takes of raw tokens (B, C), (B, N, C) and, with bands, (B, D), without the places."""
        tokens, patches = self.normalizer(semantic, patches)
        tokens = self._with_low_bands(tokens, bands)
        if not self.fused:
            return Inputs(tokens, tokens.new_zeros(tokens.shape[0], 0, self.channels))
        return Inputs(tokens, F.pad(patches, (0, self.channels - patches.shape[2])))  # low bands have none

    def tokens(
        self, semantic: Tensor, patches: Tensor, bands: Tensor | None = None, places: Tensor | None = None
    ) -> Tensor:
        """The tokens (B, C) of ``inputs`` alone: a small part of the work."""
        return self._with_low_bands(self.normalizer.semantic(semantic, patches), bands)

    def _with_low_bands(self, tokens: Tensor, bands: Tensor | None) -> Tensor:
        return tokens if self.low is None or bands is None else torch.cat([tokens, self.low(bands)], 1)

    def known_by(self, head: str, tokens: Tensor, features: Features) -> list[Tensor]:
        """What a head looks for neighbours in (REFERENCES): its flow's input ``tokens`` (B, C), and the
        backbone's own semantic token where the semantic flow's is re-pooled."""
        if head != "semantic" or self.own is None:
            return [tokens]
        return [tokens, self.own.semantic(features.semantic, features.patches)]

    def texture_inputs(self, bands: Tensor) -> Inputs:
        """What ``texture`` takes of raw band tokens (B, D)."""
        assert self.rings is not None, "there are no band tokens"
        tokens = self.rings(bands)
        return Inputs(tokens, tokens.new_zeros(tokens.shape[0], 0, tokens.shape[1]))

    def local_inputs(self, places: Tensor) -> Inputs:
        """What ``local`` takes of raw place tokens (B, P, E): every place by itself, (B P, E)."""
        tokens = self.place_normalizer(places).flatten(0, 1)
        return Inputs(tokens, tokens.new_zeros(tokens.shape[0], 0, tokens.shape[1]))

    def place_scores(self, places: Tensor) -> Tensor:
        """The negative log-likelihood of every place (B, P) from raw place tokens (B, P, E)."""
        tokens, none = self.local_inputs(places)
        return model.likelihood_score(*self.local(tokens, [none])).view(places.shape[:2])

    @torch.no_grad()
    def place_map(self, places: Tensor) -> np.ndarray:
        """How unusual every place is (B, P), standardised as the score's evidence is, from raw place tokens
        (B, P, E)."""
        known = self.evidence["local"]
        with products("highest", places.device):
            return ((self.place_scores(places) - known.likelihood_mean) / known.likelihood_std).cpu().numpy()

    def forward(
        self, semantic: Tensor, patches: Tensor, bands: Tensor | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Raw tokens -> z (B, C) and log-determinant (B) of the semantic flow."""
        tokens, fused = self.inputs(semantic, patches, bands)
        return self.flow(tokens, [fused])

    def score(self, z: Tensor, log_det: Tensor, name: str | None = None) -> np.ndarray:
        """The anomaly score ``name`` (model.SCORES; None: the knob's), higher = more anomalous: (n, C), (n)
        -> (n)."""
        return model.SCORES[name or self.score_name].function(z, log_det, self.reference).cpu().numpy()

    def weight(self, head: str) -> float:
        """How much a head (HEADS) counts in the score "spectrum"; the weights of all sum to 1."""
        return self.weights[HEADS.index(head)].item()

    def combine(self, findings: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The score "spectrum" (n) from each head's likelihood scores and neighbour distances (n)."""
        evidence = [self.weight(name) * self.evidence[name](*found) for name, found in findings.items()]
        return torch.stack(evidence).sum(0)

    @torch.no_grad()
    def score_features(self, features: Features) -> np.ndarray:
        """The anomaly scores (n) of images from their cached features, each image by itself. Raises UserError
        when one is not finite."""
        with products("highest", features.semantic.device):
            return self._finite(self.scores(features).cpu().numpy())

    def scores(self, features: Features) -> Tensor:
        """The same (n), unchecked, on the device: what an exported file computes."""
        if self.score_name != "spectrum":
            z, log_det = self(*features)
            return model.SCORES[self.score_name].function(z, log_det, self.reference)
        inputs = {"semantic": self.inputs(*features), "texture": self.texture_inputs(features.bands)}
        findings = {}
        for name, (tokens, patches) in inputs.items():
            likelihood = model.likelihood_score(*self.flow_of(name)(tokens, [patches]))
            findings[name] = (
                likelihood,
                self.evidence[name].distances(self.known_by(name, tokens, features)),
            )
        if self.uses_places:
            findings["local"] = self.local_finding(self.place_scores(features.places))
        return self.combine(findings)

    def read(self, source: TokenSource, rows: np.ndarray) -> Features:
        """All that scoring the images ``rows`` takes: the places, too, where they count."""
        features = source[rows]
        return features._replace(places=source.one("places", rows)) if self.uses_places else features

    @property
    def uses_places(self) -> bool:
        """Whether the score reads place tokens: a class that its meaning tells apart does not."""
        return "local" in self.heads and self.weight("local") > 0

    @staticmethod
    def local_finding(scores: Tensor) -> tuple[Tensor, Tensor]:
        """An image's likelihood score is its least likely place's: (B, P) -> (B), and no neighbours, (B,
        0)."""
        return scores.amax(1), scores.new_zeros(scores.shape[0], 0)  # len: a number in an exported graph

    def flow_of(self, head: str) -> nn.Module:
        return {"semantic": self.flow, "texture": self.texture, "local": getattr(self, "local", None)}[head]

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
        """Load a state dict whose references, and whitening of places, may have any number of rows."""
        for name, values in state.items():
            owner, _, buffer = name.rpartition(".")
            if buffer in REFERENCES or name == "place_normalizer.whitening":
                setattr(self.get_submodule(owner), buffer, torch.empty_like(values))
        self.load_state_dict(state)

    def own_input(self, features: Features) -> Tensor:
        """What the detector takes of images, in one token (n, C): each kind of token (``known_by``) scaled by
        the root of what it counts."""
        tokens = self.tokens(*features)
        if self.score_name != "spectrum":
            return tokens
        rings, meaning = self.texture_inputs(features.bands).tokens, self.weights[0]
        kinds = zip(REFERENCES.values(), self.known_by("semantic", tokens, features))
        joined = [(meaning * share).sqrt() * kind for share, kind in kinds]
        return torch.cat([*joined, (1 - meaning).sqrt() * rings], 1)

    def weigh(self, semantic: Tensor) -> None:
        """Set the weights of the heads from the normal images' semantic tokens (n, C), as the backbone gives
        them (docs/method.md, eq. 12)."""
        alike = spread(semantic)
        surface = 1 / (1 + (alike / self.spread_at_balance) ** 4)
        ratio = 2 / (1 + (alike / self.spread_of_surfaces) ** 4) if "local" in self.heads else 0.0
        local = surface * ratio / (1 + ratio)
        local = local if local >= NEGLIGIBLE else 0.0
        self.weights.copy_(torch.tensor([1 - surface, surface - local, local]))


def _flow(config: Config, channels: int, grid: tuple[int, int], fusion: str, n_tokens: int) -> nn.Module:
    """A flow of the configuration's size. Raises UserError on sizes that do not fit."""
    try:
        return model.build_flow(
            channels,
            grid,
            n_tokens=n_tokens,
            n_blocks=config.n_coupling_blocks,
            hidden=config.fc_internal or channels,
            clamp=config.clamp,
            fusion=fusion,
            use_gamma=config.use_gamma,
            identity_start=config.identity_start,
            heads=config.n_heads,
            alpha=config.alpha,
            window=config.window,
            bands=TokenGrid(config.token_grid, config.pooling, config.window).bands,
        )
    except ValueError as error:
        raise UserError(f"{error}; choose another fusion, n_heads or token_grid") from None


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
    own_input_scores: dict[str, np.ndarray] = dataclasses.field(
        default_factory=dict
    )  # of simple detectors there


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
    if config.save_model:
        save_weights(kept_weights(fitted, cache), weights)
    content = {
        "result": fitted.result,
        "history": fitted.history,
        "config": dataclasses.asdict(config),
        "features": cache.meta,
        "weights": fingerprint(weights) if config.save_model else None,
        "test": {
            "rows": fitted.test_rows.tolist(),
            "labels": fitted.labels.tolist(),
            "scores": fitted.scores.astype(float).tolist(),
        },
        "held_out_scores": fitted.held_scores.astype(float).tolist(),
        "own_input_scores": {k: v.astype(float).tolist() for k, v in fitted.own_input_scores.items()},
    }
    write_sealed(record, content)
    return path


SAME = 1e-4  # how far packed weights may move a score, in shares of it or of the scores' deviation
COMPARED = 100  # images on which that is seen to


def kept_weights(fitted: Fitted, cache: feature_cache.FeatureCache) -> dict[str, Tensor]:
    """The weights as they are written: packed (packing.py) where the scores of some test images, or of
    training images where there are none, stay the same by ``SAME``; in full precision otherwise."""
    state = fitted.detector.state_dict()
    packed = packing.pack(state)
    split, rows = ("test", fitted.test_rows) if len(fitted.test_rows) else ("train", np.arange(COMPARED))
    arrays = cache.arrays(split)
    rows = rows[rows < len(arrays["tokens"])]
    chosen = evenly(rows, COMPARED)
    device = fitted.detector.weights.device
    features = fitted.detector.read(TokenSource(arrays, torch.device("cpu")), chosen)
    features = Features(*(None if values is None else values.to(device) for values in features))
    rounded = copy.deepcopy(fitted.detector)
    rounded.load_saved(packing.unpack(packed))
    before, after = (each.score_features(features) for each in (fitted.detector, rounded))
    same = (np.abs(after - before) <= SAME * np.maximum(np.abs(before), before.std())).all()
    return packed if same else state


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
        return f"no weights were kept in {path} (save_model was False)"
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
    return make_config(values)


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
        detector = Detector(config_of(record), record["features"])
        detector.load_saved(packing.unpack(load_file(weights)))
    except UserError:
        raise
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

        Where the score reads places: standardised, so that 0 is as unusual as the most unusual place of a
        usual normal picture. Else by occlusion: how much the score falls when a part is blurred."""
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
