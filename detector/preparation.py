"""One class made ready for training: what is fitted before the flow, and its images as flow and scores take
them."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import utils
from backbone.arithmetic import products
from config import ClassError, Config
from detector.class_data import EVAL_BATCH, ClassData, evenly, in_batches
from detector.detector import ImageFlow, PlaceFlow, make_detector
from detector.image_density import one_scene
from detector.normalization import spread
from detector.places import Places
from model import Inputs

PLACE_SAMPLE = 500  # images whose places are fitted to
PLACE_BATCH = 25  # images whose places are held at once
PLACE_SCALE = 150  # images by which the scale of each place is taken
PATCH_SAMPLE = 256  # images whose patch tokens the normaliser's statistics come from


class Prepared:
    """One class, ready for training, its flow at its start. Parts: ``ClassData.parts``."""

    steps_per_epoch = 0  # 0 where there is nothing to train
    loss_scale = 1  # what the loss is times

    def __init__(self, config: Config, data: ClassData, features: dict, seed: int, device: torch.device):
        self.config, self.data, self.seed, self.device = config, data, seed, device
        n = len(data.fit_rows)
        self.detector = make_detector(config, features, n, batch=min(config.batch_size, n))
        # whether simple detectors are fitted beside the flow: with the first seed, whose figures tables have
        self.compares = config.baselines and seed == config.seed and len(data.test_rows) > 0
        # power-normalised joint tokens (n, D) of every part, on the CPU, where simple detectors ask for them
        self.joint: dict[str, Tensor] = {}

    def joint_tokens(self, part: str) -> Tensor:
        """The joint tokens (n, D) of the images of a part, on the CPU, as is the detector."""
        source, rows = self.data.parts[part]
        batches = (source.on_cpu()[batch] for batch in in_batches(rows, EVAL_BATCH["cpu"]))
        return torch.cat([self.detector.joint(features) for features in batches])

    def refit(self) -> None:
        """Fit what comes after the flow, as the flow now is."""


class PreparedImages(Prepared):
    """A class whose flow moves the images' tokens."""

    detector: ImageFlow

    def fit(self) -> None:
        """Fit what comes before the flow, on the CPU."""
        detector, data = self.detector, self.data
        self.steps_per_epoch = math.ceil(len(data.fit_rows) / self.config.batch_size)
        if detector.powered:
            detector.normalizer.fit(self.joint_tokens("fit"))
            if detector.patch_normalizer:
                sample = data.train.on_cpu()[evenly(data.fit_rows, PATCH_SAMPLE)]
                detector.patch_normalizer.fit(sample.patches.flatten(0, 1))
        if detector.whitens and self.compares:
            self.joint = {part: self.joint_tokens(part) for part in data.parts}

    def epoch(self, order: np.random.RandomState) -> list[np.ndarray]:
        """The batches of one epoch: the numbers of all training images in a new order."""
        return in_batches(order.permutation(len(self.data.fit_rows)), self.config.batch_size)

    def inputs(self, batch: np.ndarray) -> Inputs:
        """What the flow takes of a training batch."""
        return self.detector.inputs(self.data.train[self.data.fit_rows[batch]])[0]

    def taken(self, part: str) -> Iterator[tuple[Inputs, Tensor]]:
        """What ``Detector.scores`` takes of the images of a part, in batches."""
        source, rows = self.data.parts[part]
        for batch in in_batches(rows, EVAL_BATCH[self.device.type]):
            yield self.detector.inputs(source[batch])


class PreparedPlaces(Prepared):
    """A class whose flow moves the places of its images."""

    detector: PlaceFlow

    def fit(self) -> None:
        """Fit what comes before the flow, on the CPU."""
        detector, data, device = self.detector, self.data, self.device
        joint = {part: self.joint_tokens(part) for part in data.parts}
        self.joint = joint if self.compares else {}
        detector.image.fit(joint["fit"])
        detector.read_places(one_scene(spread(data.train.semantic[data.fit_rows].float())))
        if detector.uses_places:
            self.fit_places(detector.places)
        detector.to(device)
        with products(device):
            self.image = {part: detector.image_part(joint[part].to(device)) for part in ("held", "test")}

    def fit_places(self, places: Places) -> None:
        """Whiten the places of the training images, each as if it had been left out of the fit."""
        config, whiten = self.config, places.whiten
        sample = self.data.train.on_cpu().one("places", evenly(self.data.fit_rows, PLACE_SAMPLE))
        whiten.fit(sample)
        self.whitened = whiten.left_out(torch.cat([whiten(each) for each in sample.split(PLACE_BATCH)]))
        seen = [places.inputs(each).seen.half() for each in self.whitened.split(PLACE_BATCH)]
        self.seen = torch.cat(seen).to(self.device)
        self.tokens = self.whitened.flatten(0, 1).to(self.device)
        # of all steps as many for each evaluation: an epoch of places is no pass over all
        self.steps_per_epoch = math.ceil(config.least_steps / (config.meta_epochs * config.sub_epochs))
        self.loss_scale = self.tokens.shape[1]  # nats per place: Adam's ε is large beside smaller gradients

    def epoch(self, order: np.random.RandomState) -> list[np.ndarray]:
        """The batches of one epoch: numbers of random places of random images."""
        return list(order.randint(len(self.tokens), size=(self.steps_per_epoch, self.config.batch_size)))

    def inputs(self, batch: np.ndarray) -> Inputs:
        """What the flow takes of a training batch."""
        chosen = torch.from_numpy(batch).to(self.device)
        return Inputs(self.tokens[chosen], self.seen[chosen].float())

    def refit(self) -> None:
        """Standardise places by training images, each as if left out, and their sum by held-out ones."""
        detector, places = self.detector, self.detector.places
        if not detector.uses_places:
            return
        known = self.whitened[evenly(np.arange(len(self.whitened)), PLACE_SCALE)].to(self.device)
        likelihoods = [detector.latents(each)[1] for each in known.split(PLACE_BATCH)]
        places.fit_scale(torch.cat(likelihoods))
        held = (self.data.train.one("places", rows) for rows in in_batches(self.data.held_rows, PLACE_BATCH))
        worst = [places.most_unusual(detector.latents(places.whiten(each))[1]) for each in held]
        detector.place_unit.fit(torch.cat(worst))

    def taken(self, part: str) -> Iterator[tuple[Tensor | None, Tensor]]:
        """What ``Detector.scores`` takes of the images of a part, in batches."""
        source, rows = self.data.parts[part]
        for batch, image in zip(in_batches(rows, PLACE_BATCH), self.image[part].split(PLACE_BATCH)):
            yield source.one("places", batch) if self.detector.uses_places else None, image


PreparedClass = PreparedImages | PreparedPlaces


def prepare_data(
    config: Config, data: ClassData, features: dict, seed: int, device: torch.device
) -> PreparedClass:
    """The class ready for training. features: the sidecar of the cache. Seeds torch. Raises UserError on
    settings that do not fit the features or the memory, ClassError on features that cannot be normalised."""
    utils.keep_freed_memory()
    torch.manual_seed(seed)  # of every device
    kind = PreparedPlaces if config.score == "joined" else PreparedImages
    prepared = kind(config, data, features, seed, device)
    try:
        prepared.fit()
    except (ValueError, torch.linalg.LinAlgError) as error:
        reason = str(error).splitlines()[0]
        raise ClassError(f"class {data.class_name}: its features cannot be normalised ({reason})") from None
    prepared.detector.to(device)
    return prepared
