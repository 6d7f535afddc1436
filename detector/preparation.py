"""One class made ready for training: what is fitted before the flow, and its tokens as the flow takes
them."""

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
from detector.detector import ALIKE, Detector, Inputs, Latents
from detector.normalization import spread

PLACE_SAMPLE = 500  # images whose place tokens the Gaussians are fitted to
PLACE_BATCH = 25  # images whose places are scored at once
PATCH_SAMPLE = 256  # images whose patch tokens the normaliser's statistics come from
POOL_BATCH = 250  # images whose patch tokens are held at once when semantic tokens are re-pooled
EXTREME = 30.0  # times the median squared length of the tokens: of so much an image is left out of training


class PreparedClass:
    """One class, ready for training: its detector with normalisers, kernels and places fitted and the flow at
    its start; its tokens as the flow takes them.

    Images are in three parts: "fit" and "held", the normal training images that are fitted to and held out,
    and "test". Within a part they are numbered from 0."""

    def __init__(self, config: Config, data: ClassData, features: dict, seed: int, device: torch.device):
        """features: the sidecar of the cache, as ``Detector`` takes it. Seeds all random generators. Raises
        UserError on settings that do not fit the features or the memory, ClassError on features that cannot
        be normalised."""
        self.config, self.data, self.seed, self.device = config, data, seed, device
        memory.check_training(config, features, len(data.fit_rows))
        utils.keep_freed_memory()
        utils.seed_everything(seed)
        self.sources = {"fit": data.train, "held": data.train, "test": data.test}
        self.rows = {"fit": data.fit_rows, "held": data.held_rows, "test": data.test_rows}
        self.detector = Detector(config, features, len(data.fit_rows))
        self.joint: dict[str, Tensor] = {}  # power-normalised joint tokens, kept for the simple detectors
        self.tokens: dict[str, tuple[Tensor, Tensor]] = {}  # whitened once, for all epochs
        self._fit_normalizers()
        self.detector.to(device)
        self.usual = {part: self._usual(part) for part in ("fit", "held")}  # numbers of images: ``_usual``
        self.unusual_places = self._unusual_places()
        self.near: dict[str, Tensor] = {}  # distances (n, kernels) of the tokens of held-out and test images
        if config.base == "kernel":
            self._set_kernels()

    # ------------------------------------------------------------ what is fitted before the flow
    def _fit_normalizers(self) -> None:
        """Fit the normalisations and the places' Gaussians to normal training images. Raises ClassError where
        their features allow none."""
        try:
            self._fit_tokens()
            self._fit_patches()
            self._fit_places()
        except (ValueError, torch.linalg.LinAlgError) as error:
            name, reason = self.data.class_name, str(error).splitlines()[0]
            fault = features_fault(self.data)
            raise ClassError(fault or f"class {name}: its features cannot be normalised ({reason})") from None

    def _fit_tokens(self) -> None:
        normalizer = self.detector.normalizer
        if not normalizer.steps:
            return
        joint = self._joint("fit")
        normalizer.fit(joint)
        if normalizer.whitens:  # a matrix product of its own for every image: done once
            for part in self.rows:
                found = joint if part == "fit" else self._joint(part)
                tokens, outside = normalizer(found)
                self.tokens[part] = tokens.to(self.device), outside.to(self.device)
                if self.compares:
                    self.joint[part] = normalizer.power(found)

    def _joint(self, part: str) -> Tensor:
        """The joint tokens (n, D) of the images of a part, on the CPU."""
        source, detector = self.sources[part], self.detector
        batches = in_batches(self.rows[part], POOL_BATCH)
        return torch.cat([detector.joint(source.on_cpu(batch)).clone() for batch in batches])

    def _fit_patches(self) -> None:
        detector, rows = self.detector, evenly(self.data.fit_rows, PATCH_SAMPLE)
        normalizer = detector.patch_normalizer
        if normalizer is not None and (normalizer.steps or normalizer.reduces):
            features = self.data.train.on_cpu(rows)
            if detector.middle:
                features = features._replace(places=self.data.train.one_on_cpu("places", rows))
            normalizer.fit(detector.raw_patches(features).flatten(0, 1))

    def _fit_places(self) -> None:
        detector, source = self.detector, self.data.train
        if detector.places is None:
            return
        alike = spread(source.semantic(self.data.fit_rows)) < ALIKE
        detector.read_places_if(alike)
        if alike:
            detector.places.fit(source.one_on_cpu("places", evenly(self.data.fit_rows, PLACE_SAMPLE)))

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

    @torch.no_grad()
    def _unusual_places(self) -> dict[str, Tensor]:
        """How unusual the places (n) of held-out and test images are, where they are read."""
        if not self.detector.uses_places:
            return {}
        found = {}
        for part in ("held", "test"):
            batches = in_batches(self.rows[part], PLACE_BATCH)
            places = (self.sources[part].one("places", batch) for batch in batches)
            found[part] = torch.cat([self.detector.unusual_places(each) for each in places])
        return found

    @torch.no_grad()
    def _set_kernels(self) -> None:
        """Centres and bandwidth of the kernel density of the tokens, which training leaves as they are."""
        detector = self.detector
        with products(self.device):
            tokens = {part: self._all_tokens(part) for part in self.rows}
            detector.reference = (model.DRAWN * tokens["fit"][0]).half()
            self.near = {part: detector.distances(*tokens[part]) for part in ("held", "test")}
            usual = torch.from_numpy(self.usual["held"]).to(self.device)
            detector.bandwidth.copy_(model.best_bandwidth(self.near["held"][usual], detector.channels))

    def _all_tokens(self, part: str) -> tuple[Tensor, Tensor]:
        """Tokens (n, k) and outside (n) of all images of a part."""
        if part in self.tokens:
            return self.tokens[part]
        source, detector = self.sources[part], self.detector
        found = [
            detector.normalizer(detector.joint(source[b])) for b in in_batches(self.rows[part], POOL_BATCH)
        ]
        return torch.cat([tokens for tokens, _ in found]), torch.cat([outside for _, outside in found])

    # ------------------------------------------------------------ what training and evaluation take
    def inputs(self, part: str, batch: np.ndarray) -> Inputs:
        """What the flow takes of images of a part, by their numbers (B) in it."""
        source, rows, detector = self.sources[part], self.rows[part][batch], self.detector
        with torch.no_grad():
            if part not in self.tokens:
                features = source[rows]
                if detector.middle:
                    features = features._replace(places=source.one("places", rows))
                return detector.inputs(features)
            tokens, outside = (values[torch.from_numpy(batch)] for values in self.tokens[part])
            if detector.patch_normalizer is None:
                return Inputs(tokens, outside, tokens.new_zeros(len(tokens), 0, detector.leading))
            if detector.middle:
                raw = detector.middle_patches(source.one("places", rows))
            else:
                raw = source.patches(rows)
            return Inputs(tokens, outside, detector.patch_normalizer(raw))

    @torch.no_grad()
    def measure(self, part: str) -> Latents:
        """What the flow makes of all images of a part."""
        found = []
        for batch in in_batches(np.arange(len(self.rows[part])), EVAL_BATCH[self.device.type]):
            found.append(self.detector.latents(self.inputs(part, batch)))
        return Latents(*(torch.cat(parts) for parts in zip(*found)))

    def extremes(self) -> np.ndarray:
        """The rows of the normal training images that are left out for the length of their tokens."""
        return np.concatenate([np.delete(self.rows[part], usual) for part, usual in self.usual.items()])

    @property
    def compares(self) -> bool:
        """Whether simple detectors are fitted beside the flow: with the first seed, whose figures the table
        has."""
        return self.config.baselines and self.seed == self.config.seed and len(self.data.test_rows) > 0


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
    prepared = PreparedClass(config, data, cache.meta, seed, train.device)
    if len(rows := prepared.extremes()):
        first = cache.labels.train.names[rows[0]]
        print(
            f"note: class {class_name}: the features of {utils.counted(len(rows), 'training image')} are "
            f"over {EXTREME:g} times as large as usual, {first} first; look at it: it is left out of "
            "training and of held-out likelihoods",
            flush=True,
        )
    return prepared
