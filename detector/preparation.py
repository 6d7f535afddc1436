"""One class made ready for training: what is fitted before the flow, and its tokens as the flow takes
them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import model
import utils
from backbone.arithmetic import products
from cache import feature_cache
from config import ClassError, Config
from detector import memory
from detector.class_data import (
    EVAL_BATCH,
    ClassData,
    TokenSource,
    class_data,
    evenly,
    features_fault,
    in_batches,
)
from detector.detector import Detector, ImageFlow, Inputs, Latents, PlaceFlow, make_detector
from detector.image_density import one_scene
from detector.normalization import power_groups, spread
from detector.places import LOG_2PI

PLACE_SAMPLE = 500  # images whose places are fitted to
PLACE_BATCH = 25  # images whose places are held at once
PLACE_SCALE = 150  # images by which the scale of each place is taken
PATCH_SAMPLE = 256  # images whose patch tokens the normaliser's statistics come from
POOL_BATCH = 250  # images whose patch tokens are held at once when semantic tokens are re-pooled
EXTREME = 30.0  # times the median squared length of the tokens: of so much an image is left out of training
WHOLE = "whole score"


class FlowInputs(NamedTuple):
    """What the flow takes of a training batch: tokens (B, C), and the tokens that they see (B, N, C)."""

    tokens: Tensor
    seen: Tensor


class PreparedClass:
    """One class, ready for training: its detector with all that is fitted before the flow, which is at its
    start; its tokens as the flow takes them.

    Images are in three parts: "fit" and "held", the normal training images that are fitted to and held out,
    and "test". Within a part they are numbered from 0."""

    trains = True  # whether there is anything for the flow to be trained on

    def __init__(self, config: Config, data: ClassData, seed: int, device: torch.device, detector: Detector):
        """Raises ClassError on features that cannot be normalised."""
        self.config, self.data, self.seed, self.device = config, data, seed, device
        self.sources = {"fit": data.train, "held": data.train, "test": data.test}
        self.rows = {"fit": data.fit_rows, "held": data.held_rows, "test": data.test_rows}
        self.usual = {part: np.arange(len(self.rows[part])) for part in ("fit", "held")}
        self.joint: dict[str, Tensor] = {}  # power-normalised joint tokens, kept for the simple detectors
        self.detector = detector
        try:
            self.fit()
        except (ValueError, torch.linalg.LinAlgError) as error:
            name, reason = data.class_name, str(error).splitlines()[0]
            raise ClassError(
                features_fault(data) or f"class {name}: its features cannot be normalised ({reason})"
            ) from None

    def fit(self) -> None:
        """Fit what comes before the flow to normal training images, and move the detector to the device."""
        raise NotImplementedError

    @property
    def steps_per_epoch(self) -> int:
        raise NotImplementedError

    def epoch(self, order: np.random.RandomState) -> list[np.ndarray]:
        """The batches of one epoch, numbers of what is trained on in a new order."""
        raise NotImplementedError

    def inputs(self, batch: np.ndarray) -> FlowInputs:
        """What the flow takes of a training batch."""
        raise NotImplementedError

    def loss(self, z: Tensor, log_det: Tensor) -> Tensor:
        """The training loss () of a batch's latents (B, C) and log-determinants (B)."""
        return model.loss_per_image(z, log_det).mean()

    def scores(self, part: str) -> dict[str, Tensor]:
        """Scores (n) of the images of a part as the flow now is, by their names; ``WHOLE`` is the knob's."""
        raise NotImplementedError

    def joint_tokens(self, part: str) -> Tensor:
        """The joint tokens (n, D) of the images of a part, on the CPU."""
        source, detector = self.sources[part], self.detector
        batches = in_batches(self.rows[part], POOL_BATCH)
        return torch.cat([detector.joint(source.on_cpu(batch)).clone() for batch in batches])

    def extremes(self) -> np.ndarray:
        """The rows of the normal training images that are left out for the length of their tokens."""
        return np.concatenate([np.delete(self.rows[part], usual) for part, usual in self.usual.items()])

    @property
    def compares(self) -> bool:
        """Whether simple detectors are fitted beside the flow: with the first seed, whose figures the table
        has."""
        return self.config.baselines and self.seed == self.config.seed and len(self.data.test_rows) > 0


class PreparedImages(PreparedClass):
    """A class whose flow moves the images' tokens."""

    detector: ImageFlow

    def fit(self) -> None:
        self.tokens: dict[str, tuple[Tensor, Tensor]] = {}  # whitened once, for all epochs
        self._fit_tokens()
        self._fit_patches()
        self.detector.to(self.device)
        self.usual = {part: self._usual(part) for part in ("fit", "held")}

    def _fit_tokens(self) -> None:
        normalizer = self.detector.normalizer
        if not normalizer.steps:
            return
        joint = self.joint_tokens("fit")
        normalizer.fit(joint)
        if normalizer.whitens:  # a matrix product of its own for every image: done once
            for part in self.rows:
                found = joint if part == "fit" else self.joint_tokens(part)
                tokens, outside = normalizer(found)
                self.tokens[part] = tokens.to(self.device), outside.to(self.device)
                if self.compares:
                    self.joint[part] = normalizer.power(found)

    def _fit_patches(self) -> None:
        normalizer = self.detector.patch_normalizer
        if normalizer is not None and (normalizer.steps or normalizer.reduces):
            sample = self.data.train.on_cpu(evenly(self.data.fit_rows, PATCH_SAMPLE))
            normalizer.fit(sample.patches.flatten(0, 1))

    def _usual(self, part: str) -> np.ndarray:
        """The numbers of the images of a part whose tokens are not of extreme length. One that is (a damaged
        picture, say) would decide gradients and held-out likelihoods alone: it takes part in neither."""
        rows, normalizer = self.rows[part], self.detector.normalizer
        if not normalizer.steps:
            lengths = self.sources[part].semantic(rows).square().sum(1)
        elif normalizer.whitens and part == "held":
            tokens, outside = self.tokens[part]
            lengths = tokens.square().sum(1) + outside
        else:  # bounded by the normalisation
            return np.arange(len(rows))
        limit = EXTREME * lengths.nanmedian() if len(rows) else 0.0
        extreme = (lengths > limit) & lengths.isfinite()  # what is not finite is named when the loss shows it
        return (~extreme).nonzero().squeeze(1).cpu().numpy()

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.usual["fit"]) / self.config.batch_size)

    def epoch(self, order: np.random.RandomState) -> list[np.ndarray]:
        return in_batches(order.permutation(self.usual["fit"]), self.config.batch_size)

    def inputs(self, batch: np.ndarray) -> FlowInputs:
        tokens, _, seen = self._inputs("fit", batch)
        return FlowInputs(tokens, seen)

    def _inputs(self, part: str, batch: np.ndarray) -> Inputs:
        """What the flow takes of images of a part, by their numbers (B) in it."""
        source, rows, detector = self.sources[part], self.rows[part][batch], self.detector
        with torch.no_grad():
            if part not in self.tokens:
                return detector.inputs(source[rows])
            tokens, outside = (values[torch.from_numpy(batch)] for values in self.tokens[part])
            if detector.patch_normalizer is None:
                return Inputs(tokens, outside, tokens.new_zeros(len(tokens), 0, detector.leading))
            return Inputs(tokens, outside, detector.patch_normalizer(source.patches(rows)))

    @torch.no_grad()
    def measure(self, part: str) -> Latents:
        """What the flow makes of all images of a part."""
        batches = in_batches(np.arange(len(self.rows[part])), EVAL_BATCH[self.device.type])
        found = [self.detector.latents(self._inputs(part, batch)) for batch in batches]
        return Latents(*(torch.cat(parts) for parts in zip(*found)))

    def scores(self, part: str) -> dict[str, Tensor]:
        detector = self.detector
        if detector.score_name == "latent_knn" and part == "held":  # evaluation asks for these first
            detector.reference = self.measure("fit").z.half()
        latents = self.measure(part)
        named = {name: detector.score(latents, name) for name in ("latent", "likelihood")}
        return {WHOLE: detector.score(latents), **named}


class PreparedPlaces(PreparedClass):
    """A class whose flow moves the places of its images."""

    detector: PlaceFlow

    def fit(self) -> None:
        self.at_start = self.config.identity_start  # the flow is the identity until it is trained
        detector, data = self.detector, self.data
        for part in self.rows:
            self.joint[part] = power_groups(self.joint_tokens(part), detector.groups)
        detector.image.fit(self.joint["fit"])
        detector.read_places(one_scene(spread(data.train.semantic(data.fit_rows))))
        self.trains = detector.uses_places
        if self.trains:
            sample = data.train.one_on_cpu("places", evenly(data.fit_rows, PLACE_SAMPLE))
            whiten = detector.places.whiten.fit(sample)
            self.whitened = whiten.left_out(torch.cat([whiten(each) for each in sample.split(PLACE_BATCH)]))
            self.tokens = self.whitened.flatten(0, 1).to(self.device)
            seen = [detector.places.inputs(each).seen.half() for each in self.whitened.split(PLACE_BATCH)]
            self.seen = torch.cat(seen).to(self.device)
        detector.to(self.device)
        with torch.no_grad(), products(self.device):
            both = {part: detector.image(self.joint[part].to(self.device)) for part in ("held", "test")}
            self.image = {part: detector.weighted(each) for part, each in both.items()}
        if not self.compares:
            self.joint.clear()

    @property
    def steps_per_epoch(self) -> int:
        """The steps asked for, shared out among the evaluations: an epoch of places is no pass over all."""
        config = self.config
        return math.ceil(config.least_steps / (config.meta_epochs * config.sub_epochs))

    def epoch(self, order: np.random.RandomState) -> list[np.ndarray]:
        shape = (self.steps_per_epoch, self.config.batch_size)
        return list(order.randint(len(self.tokens), size=shape))

    def inputs(self, batch: np.ndarray) -> FlowInputs:
        self.at_start = False
        chosen = torch.from_numpy(batch).to(self.device)
        return FlowInputs(self.tokens[chosen], self.seen[chosen].float())

    def loss(self, z: Tensor, log_det: Tensor) -> Tensor:
        """In nats per place: Adam's ε of 10⁻⁴ is large beside gradients per channel."""
        return super().loss(z, log_det) * z.shape[1]

    @torch.no_grad()
    def _measure(self, batches: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """The losses (n, P) and the mean z² (n) of images' places, from batches of whitened tokens, as the
        flow now is."""
        places, losses, latent = self.detector.places, [], []
        for tokens in batches:
            z, log_det = (
                (tokens, tokens.new_zeros(tokens.shape[:2])) if self.at_start else places.latents(tokens)
            )
            losses.append(places.losses(z, log_det))
            latent.append(z.square().mean((1, 2)))
        return torch.cat(losses), torch.cat(latent)

    def _measure_part(self, part: str) -> tuple[Tensor, Tensor]:
        source, whiten = self.sources[part], self.detector.places.whiten
        batches = in_batches(self.rows[part], PLACE_BATCH)
        return self._measure(whiten(source.one("places", batch)) for batch in batches)

    def _fit_scales(self) -> tuple[Tensor, Tensor]:
        """Standardise places by training images, each as if left out, and their sum by held-out ones -> what
        these were measured to be."""
        detector = self.detector
        chosen = torch.from_numpy(evenly(np.arange(len(self.whitened)), PLACE_SCALE))
        known = (each.to(self.device) for each in self.whitened[chosen].split(PLACE_BATCH))
        detector.places.fit_scale(self._measure(known)[0])
        held = self._measure_part("held")
        detector.place_unit.fit(detector.places.most_unusual(held[0]))
        return held

    def scores(self, part: str) -> dict[str, Tensor]:
        detector, image = self.detector, self.image[part]
        if not detector.uses_places:
            return {WHOLE: image, "image part": image}
        # evaluation asks for the held-out ones first
        losses, latent = self._fit_scales() if part == "held" else self._measure_part(part)
        places = detector.places_part(losses)
        named = {
            "image part": image,
            "places": places,
            "likelihood": losses.mean(1) + 0.5 * LOG_2PI,
            "latent": latent,
        }
        return {WHOLE: image + detector.one_scene * places, **named}


def prepare_data(
    config: Config, data: ClassData, features: dict, seed: int, device: torch.device
) -> PreparedClass:
    """The same class ready for training. features: the sidecar of the cache, as ``Detector`` takes it. Seeds
    all random generators. Raises UserError on settings that do not fit the features or the memory,
    ClassError on features that cannot be normalised."""
    memory.check_training(config, features, len(data.fit_rows))
    utils.keep_freed_memory()
    utils.seed_everything(seed)
    detector = make_detector(config, features, len(data.fit_rows))
    prepared = PreparedPlaces if isinstance(detector, PlaceFlow) else PreparedImages
    return prepared(config, data, seed, device, detector)


def prepare(
    config: Config,
    cache: feature_cache.FeatureCache,
    class_name: str,
    seed: int,
    train: TokenSource,
    test: TokenSource,
) -> PreparedClass:
    """A class and seed of a cache, ready for training; a note on images that are left out. What it comes to
    does not depend on what ran before. Raises ClassError and UserError: ``class_data``, ``PreparedClass``."""
    data = class_data(config, cache.labels, class_name, seed, train, test)
    prepared = prepare_data(config, data, cache.meta, seed, train.device)
    if len(rows := prepared.extremes()):
        first = cache.labels.train.names[rows[0]]
        print(
            f"note: class {class_name}: the features of {utils.counted(len(rows), 'training image')} are "
            f"over {EXTREME:g} times as large as usual, {first} first; look at it: it is left out of "
            "training and of held-out likelihoods",
            flush=True,
        )
    return prepared
