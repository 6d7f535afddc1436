"""The detector of one normal class: from cached tokens to scores; loaded from its checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import model
import utils
from backbone.arithmetic import products
from backbone.token_grid import Bands, centred_window, place_grid_of
from cache.store import CachedArray
from config import Config, UserError
from detector.checkpoints import Record, checkpoint_files, config_of, read_record
from detector.class_data import EVAL_BATCH, Features, in_batches
from detector.image_density import ImageDensity, Standardized
from detector.normalization import NORMALIZATIONS, PatchNormalizer, power_l2
from detector.places import SEEN, Places
from model import Inputs

WHOLE = "whole score"  # its name in tables: the score that the knob asks for
LOW_DEPTHS = 2  # how many of the deepest depths give their low band to the joint token
PLACES_WEIGHT = 1.5  # of the places in the whole score where the image's weight is 1 (docs/method.md, eq. 23)
USUAL = 3.0  # standard deviations at which a heat map begins


class Detector(nn.Module):
    """What the detectors of one class share: the joint token, and the way from cached features to scores."""

    flow: nn.Module
    powered = whitens = True  # whether groups of the joint token are power-normalised, the whole whitened
    uses_places = False
    at_start = False  # whether the flow is known to be the identity: places need not pass it

    def __init__(self, config: Config, features: dict, n_images: int | None = None):
        """features: the sidecar of the cache. n_images: how many it is fitted to, which bounds the directions
        of a whitened token. Raises UserError on settings that do not fit the features."""
        super().__init__()
        grid = tuple(features["grid"])
        window = centred_window(grid, config.centre_pool) if config.centre_pool else None
        self.register_buffer("window", window, persistent=False)
        self.band_columns: list[range] = []  # of the band token
        if config.bands:  # low bands of the deepest depths, rings and peaks of all
            bands, by_depth = Bands(), tuple(features["band_channels"])
            depths = range(len(by_depth))
            self.band_columns += bands.columns(by_depth, ("low",), depths[-LOW_DEPTHS:])
            self.band_columns += bands.columns(by_depth, bands.statistics[1:], depths)
        self.channels = features["n_feat"] + sum(map(len, self.band_columns))  # of the joint token
        self.directions = max(1, min(self.channels, n_images - 1)) if n_images else self.channels

    def joint(self, features: Features) -> Tensor:
        """The joint token (B, D): the semantic token (re-pooled under ``centre_pool``) and chosen sub-band
        energies, each group by ``power_l2`` unless nothing is normalised."""
        semantic = features.semantic
        if self.window is not None:
            semantic = torch.matmul(self.window, features.patches[:, : len(self.window)])
        groups = [semantic]
        for columns in self.band_columns:
            assert features.bands is not None, "bands are cached"
            groups.append(features.bands[:, columns.start : columns.stop])
        return torch.cat([power_l2(group) for group in groups] if self.powered else groups, 1)

    def inputs(self, features: Features) -> tuple[Any, Tensor]:
        """What ``scores`` takes: of what the flow takes, and what is known of the images (B) beside it."""
        raise NotImplementedError

    def scores(self, inputs: Any, beside: Tensor) -> dict[str, Tensor]:
        """The anomaly scores (B) of images, higher = more anomalous, by the names that tables have."""
        raise NotImplementedError

    def score(self, features: Features, name: str = WHOLE) -> Tensor:
        """The score (B) of that name, from cached features on the device."""
        return self.scores(*self.inputs(features))[name]

    @torch.no_grad()
    def score_features(self, features: Features) -> np.ndarray:
        """The whole score (n). Raises UserError when one is not finite: it would pass for a verdict."""
        with products(features.semantic.device):
            scores = self.score(features).cpu().numpy()
        broken = np.flatnonzero(~np.isfinite(scores))
        if len(broken):
            which = f"{len(broken)} of {len(scores)} scores are not finite, image {broken[0]} first"
            raise UserError(f"{which}: its features or the detector's weights are damaged")
        return scores


class ImageFlow(Detector):
    """The paper's detector: the flow moves the image's token, and its coupling layers see the fused patch
    tokens. Scores: mean z², or the likelihood (docs/method.md, section 4)."""

    def __init__(self, config: Config, features: dict, n_images: int | None = None):
        super().__init__(config, features, n_images)
        self.score_name, name, fused = config.score, config.normalize, config.fusion != "none"
        if name == "auto":  # a CNN's map is badly scaled for a flow; tokens have passed a layer norm
            name = "power_l2+whiten" if features["kind"] == "map" else "none"
        self.powered, self.whitens = name != "none", name.endswith("whiten")
        channels = self.directions if self.whitens else self.channels
        self.normalizer: nn.Module = NORMALIZATIONS[name](self.channels, channels)
        self.patch_normalizer = PatchNormalizer(self.powered, features["n_feat"], channels) if fused else None
        n_tokens = features["tokens"] - 1 if fused else 0
        self.flow = build_flow(config, channels, tuple(features["grid"]), n_tokens)

    def inputs(self, features: Features) -> tuple[Inputs, Tensor]:
        """The joint tokens (B, k) and what they see (B, N, k), normalised; and the squared length (B) of what
        lies in none of the k directions."""
        tokens, outside = self.normalizer(self.joint(features))
        if self.patch_normalizer is None:
            return Inputs(tokens, tokens.new_zeros(tokens.shape[0], 0, tokens.shape[1])), outside
        return Inputs(tokens, self.patch_normalizer(features.patches)), outside

    def scores(self, inputs: Inputs, outside: Tensor) -> dict[str, Tensor]:
        z, log_det = self.flow(inputs.tokens, [inputs.seen])
        scores = {
            "likelihood": model.negative_log_likelihood(z, log_det, outside, self.channels),
            "latent": z.square().mean(1),
        }
        return {WHOLE: scores[self.score_name], **scores}


class PlaceFlow(Detector):
    """The detector of the score "joined": one flow for all places of the image, which sees at each place two
    frequency bands of the others, and densities of the joint token without a flow (docs/method.md, section
    5; ``scores``: eq. 23)."""

    def __init__(self, config: Config, features: dict, n_images: int | None = None):
        super().__init__(config, features, n_images)
        channels = features["place_shape"][1]
        self.flow = build_flow(config, channels, (1, SEEN), SEEN)
        self.places = Places(place_grid_of(features), channels)
        self.place_unit = Standardized()
        self.image = ImageDensity(self.channels, self.directions)
        self.register_buffer("one_scene", torch.ones(()))  # the weight of image_density.one_scene
        self.uses_places = True

    def inputs(self, features: Features) -> tuple[Tensor | None, Tensor]:
        """The place tokens (B, P, E), None where they are not read, and the image part (B)."""
        return features.places if self.uses_places else None, self.image_part(self.joint(features))

    def image_part(self, joint: Tensor) -> Tensor:
        """How unusual the image is as a whole (B), in standard deviations, from its power-normalised joint
        token (B, D): under the Gaussian where the class shows one scene, under the kernels where several."""
        gaussian, kernels = self.image(joint).unbind(1)
        return self.one_scene * gaussian + (1 - self.one_scene) * kernels

    def latents(self, whitened: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened places (B, P, E) -> z (B, P, E) and negative log-likelihoods (B, P) of all of them."""
        z, seen = self.places.inputs(whitened)
        log_det = z.new_zeros(z.shape[0])
        if not self.at_start:
            z, log_det = self.flow(z, [seen])
        z = z.view(whitened.shape)
        return z, model.negative_log_likelihood(z, log_det.view(z.shape[:2]))

    def scores(self, places: Tensor | None, image: Tensor) -> dict[str, Tensor]:
        if places is None:
            return {WHOLE: image, "image part": image}
        z, likelihoods = self.latents(self.places.whiten(places))
        most_unusual = self.place_unit(self.places.most_unusual(likelihoods))
        return {
            WHOLE: image + PLACES_WEIGHT * self.one_scene * most_unusual,
            "image part": image,
            "places": most_unusual,
            "likelihood": likelihoods.mean(1),
            "latent": z.square().mean((1, 2)),
        }

    @torch.no_grad()
    def place_map(self, places: Tensor) -> np.ndarray:
        """Place tokens (B, P, E) -> how unusual every place is (B, P), in standard deviations of its own
        log-likelihood beyond ``USUAL``."""
        with products(places.device):
            _, likelihoods = self.latents(self.places.whiten(places))
            return (self.places.unusual(likelihoods) - USUAL).cpu().numpy()

    def place_maps(self, places: CachedArray, rows: np.ndarray) -> np.ndarray:
        """The same of the images ``rows`` (n) of a cached array -> (n, P), read a batch at a time."""
        batches = (torch.from_numpy(places[batch]).float() for batch in in_batches(rows, EVAL_BATCH["cpu"]))
        return np.concatenate([self.place_map(batch) for batch in batches])

    def read_places(self, one_scene: float) -> None:
        """Weigh the parts: 1 where the class's normal images show one scene, 0 where places are not read."""
        self.one_scene.fill_(one_scene)
        self.uses_places = one_scene > 0

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Of a state that may have any number of kernels, and of places that were whitened."""
        self.image.centres = torch.empty_like(state_dict["image.centres"])
        self.places.whiten.whitening = torch.empty_like(state_dict["places.whiten.whitening"])
        self.read_places(float(state_dict["one_scene"]))
        return super().load_state_dict(state_dict, strict, assign)


DETECTORS = {"latent": ImageFlow, "likelihood": ImageFlow, "joined": PlaceFlow}  # by the knob score


def make_detector(config: Config, features: dict, n_images: int | None = None, batch: int = 0) -> Detector:
    """The detector that a configuration asks for. Raises UserError as ``Detector`` does, and where it, or
    training it by batches of so many images, is more than the memory holds."""
    utils.check_memory(
        f"a detector of {features['n_feat']} channels and {config.n_coupling_blocks} coupling layers"
        + (f" and its training in batches of {batch}" if batch else ""),
        needed_bytes(config, features, batch),
        "choose a smaller fc_internal, n_coupling_blocks, batch_size or token_grid",
    )
    return DETECTORS[config.score](config, features, n_images)


def needed_bytes(config: Config, features: dict, batch: int = 0) -> int:
    """The bytes of a detector. With a batch of so many images, roughly those of fitting it: four times as
    many, with gradients and Adam's two moments of weights, and eigenvectors in float64 of matrices; and of
    each image its tokens, as they are, normalised and with their gradients, and what coupling layers keep for
    the backward pass, the queries of their attention heads the most of it."""
    with torch.device("meta"):  # sizes without numbers
        detector = DETECTORS[config.score](config, features)
    held = sum(tensor.nbytes for tensor in (*detector.parameters(), *detector.buffers()))
    if isinstance(detector, PlaceFlow):
        held += detector.places.whiten.mean.nbytes * detector.places.whiten.mean.shape[1]  # (P, E, E)
    an_image = 4 * features["n_feat"] * (3 * features["tokens"] + 84 * config.n_coupling_blocks)
    return 4 * held + batch * an_image if batch else held


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
            identity_start=config.identity_start,
            alpha=config.alpha,
            window=config.window,
        )
    except ValueError as error:
        raise UserError(f"{error}; choose another fusion, fc_internal or token_grid") from None


# ---------------------------------------------------------------- from a checkpoint
def load_detector(path: str | Path) -> tuple[Detector, Record]:
    """The detector of a checkpoint (either of its two files) and its record. Unpickles nothing.
    Raises UserError unless both are what was written together."""
    record_file, weights = checkpoint_files(Path(path))
    try:
        record = read_record(record_file, whole=True)
        detector = make_detector(config_of(record), record.features, record.result["n_train"])
        detector.load_state_dict(load_file(weights))
    except UserError as error:
        raise UserError(f"{record_file}: {error}") from None
    except Exception as error:  # files that somebody made: each fails in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        expected = f"expected a checkpoint of this version, {record_file} with its .safetensors beside it"
        raise UserError(f"{expected} ({reason})") from None
    return detector.eval(), record
