"""The detector of one normal class: from cached tokens to scores; loaded from its checkpoint."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import model
from backbone.arithmetic import products
from backbone.token_grid import Bands, TokenGrid, centred_window, place_grid_of
from cache import feature_cache
from config import Config, UserError
from detector import memory
from detector.checkpoints import SCORING, checkpoint_files, config_of, read_record, weights_fault
from detector.class_data import EVAL_BATCH, Features, in_batches
from detector.image_density import ImageDensity, Standardized
from detector.normalization import JointNormalizer, PatchNormalizer, power_groups
from detector.places import Places


def normalization_in_effect(config: Config, features: dict) -> str:
    """The normalisation that the knob ``normalize`` comes to. auto: the tokens of a transformer pass its
    final layer norm and are taken as they are, as released; a CNN's map (which the paper does not use) is
    badly scaled for a flow."""
    if config.normalize != "auto":
        return config.normalize
    return "power_l2+whiten" if features["kind"] == "map" else "none"


LOW_DEPTHS = 2  # how many of the deepest depths give their low band to the joint token
USUAL = 3.0  # standard deviations at which a heat map begins


class Inputs(NamedTuple):
    """What the flow takes of images: their joint tokens (B, k); the squared length (B) of what lies in none
    of their directions; the patch tokens (B, N, C) that the fusion sees."""

    tokens: Tensor
    outside: Tensor
    patches: Tensor


class Latents(NamedTuple):
    """What the flow makes of images: z (B, k) and the log-determinant (B); and outside (B), as in
    ``Inputs``."""

    z: Tensor
    log_det: Tensor
    outside: Tensor


class Detector(nn.Module):
    """What the detectors of one class share: the joint token, and scores of cached features that are finite.
    ``make_detector`` makes the one that a configuration asks for."""

    flow: nn.Module
    uses_places = False

    def __init__(self, config: Config, features: dict, n_images: int | None = None):
        """features: the sidecar of the cache; n_feat, grid (rows, columns), tokens, kind (map or tokens) and,
        with bands, band_channels, with places, place_shape are read. n_images: how many it is fitted to,
        which bounds the directions of a whitened token. Raises UserError on settings that do not fit the
        features."""
        super().__init__()
        memory.check_detector(config, features)
        grid = tuple(features["grid"])
        window = centred_window(grid, config.centre_pool) if config.centre_pool else None
        self.register_buffer("window", window, persistent=False)
        widths = [features["n_feat"]]
        self.band_columns: list[range] = []
        if config.bands:
            self.band_columns = joined_bands(config, tuple(features["band_channels"]))
            widths += map(len, self.band_columns)
        ends = np.cumsum(widths)
        self.groups = [range(end - width, end) for end, width in zip(ends, widths)]  # normalised together
        self.channels = sum(widths)  # of the joint token

    def directions(self, n_images: int | None) -> int:
        """In how many directions the joint tokens of so many images differ."""
        return max(1, min(self.channels, n_images - 1)) if n_images else self.channels

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

    def scores(self, features: Features) -> Tensor:
        """Anomaly scores (n) of images from their cached features, on the device: what an exported file
        computes."""
        raise NotImplementedError

    @torch.no_grad()
    def score_features(self, features: Features) -> np.ndarray:
        """The same, each image by itself. Raises UserError when a score is not finite: it would pass for a
        verdict."""
        with products(features.semantic.device):
            scores = self.scores(features).cpu().numpy()
        broken = np.flatnonzero(~np.isfinite(scores))
        if len(broken):
            raise UserError(
                f"{len(broken)} of {len(scores)} scores are not finite, image {broken[0]} first: its "
                "features or the detector's weights are damaged"
            )
        return scores

    def place_map(self, places: Tensor) -> np.ndarray:
        """How unusual every place is (B, P), where ``uses_places``, from raw place tokens (B, P, E)."""
        raise NotImplementedError

    def load_saved(self, state: dict[str, Tensor]) -> None:
        """Load a state dict, some of whose buffers may have any number of rows."""
        for name in state.keys() & dict(self.named_buffers()).keys():
            owner, _, buffer = name.rpartition(".")
            setattr(self.get_submodule(owner), buffer, torch.empty_like(state[name]))
        self.load_state_dict(state)


class ImageFlow(Detector):
    """The paper's detector: the flow moves the image's token, and its coupling layers see the fused patch
    tokens. Scores: mean z², the likelihood, or neighbours in latent space (docs/method.md, section 4)."""

    def __init__(self, config: Config, features: dict, n_images: int | None = None):
        super().__init__(config, features, n_images)
        self.score_name = config.score
        name, grid = normalization_in_effect(config, features), tuple(features["grid"])
        self.leading = self.directions(n_images if name.endswith("whiten") else None)
        self.normalizer = JointNormalizer(name, self.groups, self.leading)
        fused = config.fusion != "none"
        self.patch_normalizer = PatchNormalizer(name, features["n_feat"], self.leading) if fused else None
        self.flow = build_flow(config, self.leading, grid, features["tokens"] - 1 if fused else 0)
        # latents of the training images, for the score latent_knn
        self.register_buffer("reference", torch.zeros(0, self.leading, dtype=torch.float16))

    def patches(self, features: Features) -> Tensor:
        """The patch tokens (B, N, C) that the fusion sees."""
        if self.patch_normalizer is None:
            return features.semantic.new_zeros(features.semantic.shape[0], 0, self.leading)
        return self.patch_normalizer(features.patches)

    def inputs(self, features: Features) -> Inputs:
        """What the flow takes of cached features."""
        tokens, outside = self.normalizer(self.joint(features))
        return Inputs(tokens, outside, self.patches(features))

    def latents(self, inputs: Inputs) -> Latents:
        z, log_det = self.flow(inputs.tokens, [inputs.patches])
        return Latents(z, log_det, inputs.outside)

    def score(self, latents: Latents, name: str | None = None) -> Tensor:
        """The anomaly score ``name`` (config.SCORES; None: the knob's) of images: higher = more anomalous ->
        (B)."""
        name = name or self.score_name
        if name == "latent":
            return latents.z.square().mean(1)
        if name == "latent_knn":
            distances = model.squared_distances(latents.z, self.reference.float())
            return model.nearest_neighbours(distances + latents.outside.unsqueeze(1))
        return model.negative_log_likelihood(
            model.normal_energy(latents.z, latents.log_det, latents.outside, self.channels)
        )

    def scores(self, features: Features) -> Tensor:
        return self.score(self.latents(self.inputs(features)))


class PlaceFlow(Detector):
    """The detector of the score "joined": one flow for all places of the image, which sees at each place two
    frequency bands of the others, and densities of the joint token without a flow (docs/method.md, section
    5)."""

    def __init__(self, config: Config, features: dict, n_images: int | None = None):
        super().__init__(config, features, n_images)
        self.place_grid, channels = place_grid_of(features), features["place_shape"][1]
        flow = build_flow(config, channels, (1, SEEN), SEEN)
        self.places = Places(self.place_grid, channels, flow)
        self.image = ImageDensity(self.channels, self.directions(n_images))
        self.place_unit = Standardized()
        self.register_buffer("one_scene", torch.ones(()))  # the weight of image_density.one_scene
        self.uses_places = True

    @property
    def flow(self) -> nn.Module:  # type: ignore[override]
        return self.places.flow

    def image_part(self, features: Features) -> Tensor:
        """How unusual the image is as a whole (B), in standard deviations: under the Gaussian where the class
        shows one scene, under the kernels where it shows several."""
        return self.weighted(self.image(power_groups(self.joint(features), self.groups)))

    def weighted(self, both: Tensor) -> Tensor:
        """The same from both densities' (B, 2)."""
        return self.one_scene * both[:, 0] + (1 - self.one_scene) * both[:, 1]

    def places_part(self, losses: Tensor) -> Tensor:
        """How unusual its most unusual places are (B), in standard deviations, from the places' losses (B,
        P)."""
        return self.place_unit(self.places.most_unusual(losses))

    def scores(self, features: Features) -> Tensor:
        score = self.image_part(features)
        if self.uses_places:
            latents = self.places.latents(self.places.whiten(features.places))
            score = score + self.one_scene * self.places_part(self.places.losses(*latents))
        return score

    @torch.no_grad()
    def place_map(self, places: Tensor) -> np.ndarray:
        """How unusual every place is (B, P), in standard deviations of the place's own log-likelihood beyond
        the three that few places of a normal picture reach, from raw place tokens (B, P, E)."""
        with products(places.device):
            return (self.places(places) - USUAL).cpu().numpy()

    def read_places(self, one_scene: float) -> None:
        """Weigh the parts: 1 where the class's normal images show one scene, 0 where places are not read."""
        self.one_scene.fill_(one_scene)
        self.uses_places = one_scene > 0

    def load_saved(self, state: dict[str, Tensor]) -> None:
        super().load_saved(state)
        self.read_places(float(self.one_scene))


SEEN = 3  # tokens that a place sees of its image: two bands and its position


def make_detector(config: Config, features: dict, n_images: int | None = None) -> Detector:
    """The detector that a configuration asks for; arguments and errors as of ``Detector``."""
    return (PlaceFlow if config.score == "joined" else ImageFlow)(config, features, n_images)


def joined_bands(config: Config, channels: tuple[int, ...]) -> list[range]:
    """The columns of the band token that the joint token takes: the low bands of the deepest depths, rings
    and peaks of all."""
    bands, depths = Bands(), range(len(channels))
    low = bands.columns(channels, ("low",), depths[-LOW_DEPTHS:])
    return low + bands.columns(channels, bands.statistics[1:], depths)


def build_flow(config: Config, channels: int, grid: tuple[int, int], n_tokens: int) -> nn.Module:
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
            bands=config.score != "joined" and TokenGrid.named(config.token_grid, config.window).bands,
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
        detector = make_detector(config_of(record), record["features"], record["result"]["n_train"])
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
