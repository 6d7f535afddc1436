"""The detector of one normal class: from cached tokens to scores; loaded from its checkpoint."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import model
from backbone.arithmetic import products
from backbone.token_grid import Bands, TokenGrid, centred_window, place_grid_of
from cache import feature_cache
from config import Config, UserError
from detector import memory
from detector.checkpoints import SCORING, checkpoint_files, config_of, read_record, weights_fault
from detector.class_data import EVAL_BATCH, Features, in_batches
from detector.normalization import ENERGY_FLOOR, JointNormalizer, PatchNormalizer, PlaceGaussians


def normalization_in_effect(config: Config, features: dict) -> str:
    """The normalisation that the knob ``normalize`` comes to. auto: the tokens of a transformer pass its
    final layer norm and are taken as they are, as released; a CNN's map (which the paper does not use) is
    badly scaled for a flow."""
    if config.normalize != "auto":
        return config.normalize
    return "power_l2+whiten" if features["kind"] == "map" else "none"


LOW_DEPTHS = 2  # how many of the deepest depths give their low band to the joint token
ALIKE = 0.32  # spread of a class's semantic tokens below which its images show one scene, and places are read
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
    sub-band energies of several depths. The score "joined" is the image's log-energy; where the class's
    normal images show one scene, its most unusual places are added, and the flow counts for more
    (docs/method.md, eq. 14)."""

    def __init__(self, config: Config, features: dict, n_images: int | None = None):
        """features: the sidecar of the cache; n_feat, grid (rows, columns), tokens, kind (map or tokens) and,
        with bands, band_channels, with places, place_shape are read. n_images: how many it is fitted to,
        which bounds the directions of a whitened token. Raises UserError on settings that do not fit the
        features."""
        super().__init__()
        memory.check_detector(config, features)
        self.score_name, self.base, self.fused = config.score, config.base, config.fusion != "none"
        name, grid = normalization_in_effect(config, features), tuple(features["grid"])
        groups = self._size_joint_token(config, features, name.endswith("whiten"), n_images)
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

    def _size_joint_token(
        self, config: Config, features: dict, whitened: bool, n_images: int | None
    ) -> list[range]:
        """Set how many channels the joint token has, its directions once it is normalised, and the leading
        ones that the flow moves -> the channels that are normalised together: semantic token, each band."""
        widths = [features["n_feat"]]
        self.band_columns: list[range] = []
        if config.bands:
            self.band_columns = joined_bands(config, tuple(features["band_channels"]))
            widths += map(len, self.band_columns)
        self.channels = self.directions = sum(widths)
        if whitened and n_images:
            self.directions = max(1, min(self.channels, n_images - 1))
        wanted = config.flow_channels if whitened and config.flow_channels else self.directions
        self.leading = min(wanted, self.directions)
        ends = np.cumsum(widths)
        return [range(end - width, end) for end, width in zip(ends, widths)]

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
        return model.kernel_energy(distances, self.gain(latents), self.bandwidth, self.channels)

    def gain(self, latents: Latents) -> Tensor:
        """The flow's log-likelihood of its directions less that of the normal density it starts from (B)."""
        before = 0.5 * latents.tokens[:, : self.leading].square().sum(1)
        return before - self.leading * self.flow_loss(latents)

    def log_energy(self, latents: Latents, energy: Tensor) -> Tensor:
        """The image's part of the score "joined" (B): the logarithm of its energy. Where the normal images
        show one scene, so that places are read, the flow's gain counts as under its own base density
        (docs/method.md, eq. 14)."""
        if self.base == "normal" or not self.uses_places:
            return energy.clamp_min(ENERGY_FLOOR).log()
        gain = 2 * self.gain(latents) / self.channels
        kernels = energy + self.bandwidth * gain
        return kernels.clamp_min(ENERGY_FLOOR).log() - gain / self.bandwidth

    def score(self, latents: Latents, name: str | None = None, energy: Tensor | None = None) -> Tensor:
        """The anomaly score ``name`` (config.SCORES; None: the knob's) of images, without places: higher =
        more anomalous -> (B). energy (B): theirs, where it is known."""
        name = name or self.score_name
        if name == "latent":
            return latents.z.square().mean(1)
        if name == "latent_knn":
            return model.nearest_neighbours(self.distances(latents.z, latents.outside))
        if energy is None:
            energy = self.energy(latents)
        if name == "likelihood":
            return model.negative_log_likelihood(energy, self.bandwidth)
        return self.log_energy(latents, energy)

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
        with products(features.semantic.device):
            return self._finite(self.scores(features).cpu().numpy())

    @torch.no_grad()
    def place_map(self, places: Tensor) -> np.ndarray:
        """How unusual every place is (B, P), in standard deviations of the place's own log-energy beyond
        the three that few places of a normal picture reach, from raw place tokens (B, P, E)."""
        assert self.places is not None
        with products(places.device):
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


# ---------------------------------------------------------------- from a checkpoint
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
    if not fault and record.get("scoring") != SCORING:
        fault = "it was fitted by a version whose scores are others"
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


def place_maps(fitted: Detector, cache: feature_cache.FeatureCache, rows: np.ndarray) -> np.ndarray:
    """How unusual every place of the test images ``rows`` is (n, P), from their cached features."""
    places = cache.arrays("test")["places"]
    batches = in_batches(rows, EVAL_BATCH["cpu"])
    return np.concatenate([fitted.place_map(torch.from_numpy(places[batch]).float()) for batch in batches])
