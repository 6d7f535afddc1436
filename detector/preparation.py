"""One class made ready for training: what is fitted before the flow, and its images as flow and scores take
them."""

import math

import numpy as np
import torch
from torch import Tensor

import utils
from backbone.arithmetic import products
from config import ClassError, Config
from detector import memory
from detector.class_data import EVAL_BATCH, ClassData, evenly, in_batches
from detector.detector import Detector, ImageFlow, PlaceFlow, make_detector
from detector.image_density import one_scene
from detector.normalization import power_groups, spread
from model import Inputs

PLACE_SAMPLE = 500  # images whose places are fitted to
PLACE_BATCH = 25  # images whose places are held at once
PLACE_SCALE = 150  # images by which the scale of each place is taken
PATCH_SAMPLE = 256  # images whose patch tokens the normaliser's statistics come from
POOL_BATCH = 250  # images whose patch tokens are held at once when semantic tokens are re-pooled


class Prepared:
    """One class, ready for training, its flow at its start. Images are numbered from 0 within their part
    ("fit", "held" or "test": ``ClassData.part``)."""

    steps_per_epoch = 0  # 0 where there is nothing to train
    loss_scale = 1  # what the loss is times
    at_once: int  # images per forward pass in evaluation

    def __init__(self, config: Config, data: ClassData, seed: int, device: torch.device):
        self.config, self.data, self.seed, self.device = config, data, seed, device
        # power-normalised joint tokens (n, D) of every part, on the CPU, where simple detectors ask for them
        self.joint: dict[str, Tensor] = {}

    @property
    def compares(self) -> bool:
        """Whether simple detectors are fitted beside the flow: with the first seed, whose figures the table
        has."""
        return self.config.baselines and self.seed == self.config.seed and len(self.data.test_rows) > 0


class PreparedImages(Prepared):
    """A class whose flow moves the images' tokens."""

    def __init__(self, config: Config, data: ClassData, seed: int, device: torch.device, detector: ImageFlow):
        super().__init__(config, data, seed, device)
        self.steps_per_epoch = math.ceil(len(data.fit_rows) / config.batch_size)
        self.at_once = EVAL_BATCH[device.type]
        normalizer, patches = detector.normalizer, detector.patch_normalizer
        if normalizer.steps:
            normalizer.fit(joint_tokens(detector, data, "fit"))
        if normalizer.whitens and self.compares:
            self.joint = {part: normalizer.power(joint_tokens(detector, data, part)) for part in data.PARTS}
        if patches is not None and (patches.steps or patches.reduces):
            sample = data.train.features(evenly(data.fit_rows, PATCH_SAMPLE), on_cpu=True)
            patches.fit(sample.patches.flatten(0, 1))
        self.detector = detector.to(device)

    def epoch(self, order: np.random.RandomState) -> list[np.ndarray]:
        """The batches of one epoch: the numbers of all training images in a new order."""
        return in_batches(order.permutation(len(self.data.fit_rows)), self.config.batch_size)

    def inputs(self, batch: np.ndarray) -> Inputs:
        """What the flow takes of a training batch."""
        return self.taken("fit", batch)[0]

    def refit(self) -> None:
        """Keep the latents of the training images, where the score is by their neighbours."""
        if self.config.score == "latent_knn":
            batches = in_batches(np.arange(len(self.data.fit_rows)), self.at_once)
            latents = [self.detector.flow(tokens, [seen])[0] for tokens, seen in map(self.inputs, batches)]
            self.detector.reference = torch.cat(latents).half()

    @torch.no_grad()
    def taken(self, part: str, batch: np.ndarray) -> tuple[Inputs, Tensor]:
        """What ``Detector.scores`` takes of images of a part."""
        source, rows = self.data.part(part)
        return self.detector.inputs(source[rows[batch]])


class PreparedPlaces(Prepared):
    """A class whose flow moves the places of its images."""

    at_once = PLACE_BATCH

    def __init__(self, config: Config, data: ClassData, seed: int, device: torch.device, detector: PlaceFlow):
        super().__init__(config, data, seed, device)
        self.detector = detector
        joint = {
            part: power_groups(joint_tokens(detector, data, part), detector.groups) for part in data.PARTS
        }
        detector.image.fit(joint["fit"])
        detector.read_places(one_scene(spread(data.train.semantic(data.fit_rows))))
        if detector.uses_places:
            self._prepare_places(device)
        detector.to(device)
        with torch.no_grad(), products(device):
            self.image = {part: detector.image_part(joint[part].to(device)) for part in ("held", "test")}
        if self.compares:
            self.joint = joint

    def _prepare_places(self, device: torch.device) -> None:
        """Whiten the places of the training images, each as if it had been left out of the fit."""
        config, places = self.config, self.detector.places
        sample = self.data.train.one("places", evenly(self.data.fit_rows, PLACE_SAMPLE), on_cpu=True)
        whiten = places.whiten.fit(sample)
        self.whitened = whiten.left_out(torch.cat([whiten(each) for each in sample.split(PLACE_BATCH)]))
        self.tokens = self.whitened.flatten(0, 1).to(device)
        seen = [places.inputs(each).seen.half() for each in self.whitened.split(PLACE_BATCH)]
        self.seen = torch.cat(seen).to(device)
        # of all steps as many for each evaluation: an epoch of places is no pass over all
        self.steps_per_epoch = math.ceil(config.least_steps / (config.meta_epochs * config.sub_epochs))
        self.loss_scale = self.tokens.shape[1]  # nats per place: Adam's ε is large beside smaller gradients

    def epoch(self, order: np.random.RandomState) -> list[np.ndarray]:
        """The batches of one epoch: numbers of random places of random images."""
        shape = (self.steps_per_epoch, self.config.batch_size)
        return list(order.randint(len(self.tokens), size=shape))

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
        latents = [detector.latents(places.inputs(each), len(each)) for each in known.split(PLACE_BATCH)]
        places.fit_scale(torch.cat([likelihoods for _, likelihoods in latents]))
        worst = []
        for batch in in_batches(self.data.held_rows, self.at_once):
            inputs = detector.place_inputs(self.data.train.one("places", batch))
            worst.append(places.most_unusual(detector.latents(inputs, len(batch))[1]))
        detector.place_unit.fit(torch.cat(worst))

    def taken(self, part: str, batch: np.ndarray) -> tuple[Inputs | None, Tensor]:
        """What ``Detector.scores`` takes of images of a part."""
        image = self.image[part][torch.from_numpy(batch).to(self.device)]
        if not self.detector.uses_places:
            return None, image
        source, rows = self.data.part(part)
        return self.detector.place_inputs(source.one("places", rows[batch])), image


PreparedClass = PreparedImages | PreparedPlaces


def joint_tokens(detector: Detector, data: ClassData, part: str) -> Tensor:
    """The joint tokens (n, D) of the images of a part, on the CPU, as is the detector."""
    source, rows = data.part(part)
    batches = in_batches(rows, POOL_BATCH)
    return torch.cat([detector.joint(source.features(batch, on_cpu=True)).clone() for batch in batches])


def prepare_data(
    config: Config, data: ClassData, features: dict, seed: int, device: torch.device
) -> PreparedClass:
    """The class ready for training. features: the sidecar of the cache, as ``Detector`` takes it. Seeds
    torch. Raises UserError on settings that do not fit the features or the memory, ClassError on
    features that cannot be normalised."""
    memory.check(config, features, min(config.batch_size, len(data.fit_rows)))
    utils.keep_freed_memory()
    torch.manual_seed(seed)  # of every device
    detector = make_detector(config, features, len(data.fit_rows))
    try:
        if isinstance(detector, PlaceFlow):
            return PreparedPlaces(config, data, seed, device, detector)
        assert isinstance(detector, ImageFlow)
        return PreparedImages(config, data, seed, device, detector)
    except (ValueError, torch.linalg.LinAlgError) as error:
        reason = str(error).splitlines()[0]
        raise ClassError(f"class {data.class_name}: its features cannot be normalised ({reason})") from None
