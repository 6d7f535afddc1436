"""Fit the flow to one normal class and report its detection of all the others, epoch by epoch."""

from shell.command_line import from_command_line, run_script

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__, script="train.py")

import dataclasses
import functools
import math
import time
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import calibration
import datasets
import detector
import extractor
import feature_cache
import memory
import model
import runs
import utils
from arithmetic import forward_precision, products
from baselines import PLACE_BASELINES, own_input_scores
from config import ClassError, Config, UserError
from detector import (
    EVAL_BATCH,
    NEGLIGIBLE,
    ClassData,
    Detector,
    Evidence,
    Features,
    Fitted,
    Index,
    Inputs,
    TokenSource,
    evenly,
    in_batches,
)

PLACE_SAMPLE = 500  # images whose place tokens the normaliser is fitted to
PLACES_AT_ONCE = 8  # places of each image that a training step of the local flow sees
PLACE_STEPS = 4  # steps of the local flow for each of the others'
PLACE_BATCH = 25  # images whose places are scored at once
PATCH_SAMPLE = 256  # images whose patch tokens the normaliser's statistics come from
POOL_BATCH = 250  # images whose patch tokens are held at once when semantic tokens are re-pooled
LOSS_CHECK = 64  # steps between two looks at the loss on a GPU, where reading it waits for the device
ADAM = {"betas": (0.8, 0.8), "eps": 1e-4}  # the paper's (docs/method.md, section 4)


# ---------------------------------------------------------------- optimisation
def make_optimizer(parameters: list[Tensor], config: Config) -> torch.optim.Adam:
    return torch.optim.Adam(
        parameters, lr=config.lr_init, weight_decay=config.weight_decay, fused=True, **ADAM
    )


def learning_rate(config: Config, progress: float) -> float:
    """The learning rate after the share ``progress`` (0 to 1) of all steps."""
    return config.lr_init * (
        0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1.0
    )


class SubnetOptimizers:
    """Adam, one per subnet, that steps during the backward pass: once all gradients of a subnet are there,
    they are used and dropped.

    The outcome is that of one Adam over all parameters, but the gradients of the whole flow are never held at
    once, which saves a quarter of the memory. Clipping needs them all: then ``step`` clips and steps after
    the backward pass."""

    def __init__(self, flow: nn.Module, config: Config):
        subnets = [list(module.parameters()) for module in flow.modules() if isinstance(module, model.Subnet)]
        self.optimizers = [make_optimizer(parameters, config) for parameters in subnets]
        self.parameters, self.max_norm = (
            [p for parameters in subnets for p in parameters],
            config.max_grad_norm,
        )
        self.missing = [len(parameters) for parameters in subnets]
        if not self.max_norm:
            for number, parameters in enumerate(subnets):
                self._step_when_complete(number, parameters)

    def _step_when_complete(self, number: int, parameters: list[Tensor]) -> None:
        weak = weakref.ref(self)  # the parameters outlive training, and must not keep Adam's moments

        def arrived(_: Tensor) -> None:
            if (optimizers := weak()) is not None:
                optimizers.count(number, len(parameters))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

    def count(self, number: int, of: int) -> None:
        """One more gradient of the subnet ``number``, which has so many, is there."""
        self.missing[number] -= 1
        if self.missing[number] == 0:
            self._step_one(self.optimizers[number])
            self.missing[number] = of

    @staticmethod
    def _step_one(optimizer: torch.optim.Adam) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, rate: float) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate

    def step(self) -> None:
        """What is left to do after the backward pass."""
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
            for optimizer in self.optimizers:
                self._step_one(optimizer)


# ---------------------------------------------------------------- one class
class Measured(NamedTuple):
    """What one flow makes of n images."""

    z: Tensor  # (n, C), and of the local flow nothing: its latents are those of places
    log_det: Tensor  # (n), likewise
    likelihood: Tensor  # (n), the likelihood score
    loss: float  # mean over the images, nats per channel, without the constant


@dataclasses.dataclass
class Outcome:
    """What one flow makes of the held-out and the test images after an epoch."""

    evaluation: int  # evaluations up to and including this one
    entry: dict
    held: Measured | None
    test: Measured
    state: dict[str, Tensor] | None = None  # the weights, where a later epoch may be worse

    @property
    def held_out_loss(self) -> float:
        """NaN where nothing is held out."""
        return self.held.loss if self.held else float("nan")


class Head:
    """One flow of the detector in training: its inputs, its optimiser, and the epoch to report so far."""

    name: str
    noise = 1.0  # share of the knob feature_noise

    def __init__(self, detector: Detector, config: Config, trained: bool):
        self.detector, self.config, self.flow = detector, config, detector.flow_of(self.name)
        self.optimizer = SubnetOptimizers(self.flow, config) if trained else None
        # the same flow, as training runs it
        self.trained = compiled(self.flow) if config.compile_flow else self.flow
        self.best: Outcome | None = None

    def inputs(self, features: Features) -> Inputs:
        """What the flow takes of a batch."""
        raise NotImplementedError

    def step(self, features: Features, noise: torch.Generator, rate: float) -> Tensor:
        """One Adam step on the mean loss of a batch -> the loss, detached."""
        assert self.optimizer is not None
        self.optimizer.set_learning_rate(rate)
        tokens, patches = self.noisy_inputs(features, noise)
        with forward_precision(self.config.matmul, tokens.device):
            loss = model.loss_per_image(*self.trained(tokens, [patches])).mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def noisy_inputs(self, features: Features, noise: torch.Generator) -> Inputs:
        """What the flow sees of a batch in training: its inputs, with the training noise on the tokens."""
        tokens, patches = self.inputs(features)
        if self.config.feature_noise:
            shape, device = tokens.shape, tokens.device
            sigma = self.noise * self.config.feature_noise
            tokens = tokens + sigma * torch.randn(shape, generator=noise, device=device)
        return Inputs(tokens, patches)

    @torch.no_grad()
    def measure(self, source: TokenSource, rows: np.ndarray) -> Measured:
        """What the flow makes of many images."""
        batches = []
        for batch in in_batches(rows, EVAL_BATCH[source.device.type]):
            tokens, patches = self.inputs(self.features(source, batch))
            none = tokens, tokens.new_zeros(0)
            batches.append(self.flow(tokens, [patches]) if len(batch) else none)
        z, log_det = (torch.cat(parts) for parts in zip(*batches))
        loss = model.loss_per_image(z, log_det).mean().item()
        return Measured(z, log_det, model.likelihood_score(z, log_det), loss)

    @torch.no_grad()
    def known(self, source: TokenSource, rows: np.ndarray) -> list[Tensor]:
        """The tokens (n, C) of many images that neighbours are looked for in (detector.REFERENCES)."""
        batches = in_batches(rows, EVAL_BATCH[source.device.type])
        return [torch.cat([self.inputs(self.features(source, batch)).tokens for batch in batches])]

    def distances(self, evidence: Evidence, source: TokenSource, rows: np.ndarray) -> Tensor:
        """Mean distances (n, kinds of tokens) of many images to the nearest normal ones."""
        return evidence.distances(self.known(source, rows))

    def features(self, source: TokenSource, rows: Index) -> Features:
        return source[rows]

    def remember_if_best(self, outcome: Outcome) -> None:
        by_likelihood = self.config.select_epoch == "likelihood"
        if not by_likelihood or self.best is None or outcome.held_out_loss < self.best.held_out_loss:
            if by_likelihood and self.optimizer is not None:
                outcome.state = {name: value.clone() for name, value in self.flow.state_dict().items()}
            self.best = outcome

    def is_stale(self, evaluations: int) -> bool:
        """Whether the held-out likelihood has not improved for ``patience`` evaluations."""
        if self.best is None:
            return False
        return self.optimizer is None or evaluations - self.best.evaluation >= self.config.patience


def compiled(step: Callable) -> Callable:
    """A function or module as torch.compile makes it for many calls: with CUDA graphs where there is a
    GPU."""
    return torch.compile(step, mode="reduce-overhead" if torch.cuda.is_available() else "default")


class SemanticHead(Head):
    """The flow of meaning. Its tokens can be had without the patches."""

    name = "semantic"

    def inputs(self, features: Features) -> Inputs:
        return self.detector.inputs(*features)

    @torch.no_grad()
    def known(self, source: TokenSource, rows: np.ndarray) -> list[Tensor]:
        fit, kinds = self.detector, []
        for batch in in_batches(rows, EVAL_BATCH[source.device.type]):
            features = source[batch]
            kinds.append(fit.known_by("semantic", fit.tokens(*features), features))
        return [torch.cat(parts) for parts in zip(*kinds)]


class TextureHead(Head):
    """The flow of rings and peaks: it needs no tokens."""

    name = "texture"

    def inputs(self, features: Features) -> Inputs:
        return self.detector.texture_inputs(features.semantic)

    def features(self, source: TokenSource, rows: Index) -> Features:
        bands = source.one("bands", rows)
        return Features(bands, bands, bands)


class LocalHead(Head):
    """The flow of single places: it needs place tokens alone, learns from a few places of each image at a
    step, and finds an image as unlikely as its least likely place. Places are many: their flow takes several
    steps where the others take one, with less noise."""

    name, noise = "local", 0.3

    def __init__(self, detector: Detector, config: Config, trained: bool, seed: int):
        super().__init__(detector, config, trained)
        self.generator = np.random.RandomState(seed)  # of places

    def step(self, features: Features, noise: torch.Generator, rate: float) -> Tensor:
        losses = [super(LocalHead, self).step(features, noise, rate) for _ in range(PLACE_STEPS)]
        return torch.stack(losses).mean()

    def inputs(self, features: Features) -> Inputs:
        """Of place tokens (B, P, E), PLACES_AT_ONCE drawn at random from each image: (B places, E)."""
        places = features.semantic
        chosen = self.generator.randint(places.shape[1], size=(len(places), PLACES_AT_ONCE))
        tokens = self.detector.place_normalizer(places)
        rows = torch.arange(len(places), device=places.device)[:, None]
        tokens = tokens[rows, torch.from_numpy(chosen).to(places.device)].flatten(0, 1)
        return Inputs(tokens, tokens.new_zeros(len(tokens), 0, tokens.shape[1]))

    @torch.no_grad()
    def measure(self, source: TokenSource, rows: np.ndarray) -> Measured:
        scores = [
            self.detector.place_scores(source.one("places", batch)) for batch in in_batches(rows, PLACE_BATCH)
        ]
        largest = torch.cat([self.detector.local_finding(each)[0] for each in scores])
        mean = torch.cat([each.mean(1) for each in scores])
        none = largest.new_zeros(0)
        return Measured(none, none, largest, mean.mean().item() - model.LOG_ROOT_2PI)

    def known(self, source: TokenSource, rows: np.ndarray) -> list[Tensor]:
        return []

    def distances(self, evidence: Evidence, source: TokenSource, rows: np.ndarray) -> Tensor:
        return torch.zeros(len(rows), 0, device=source.device)

    def features(self, source: TokenSource, rows: np.ndarray) -> Features:
        places = source.one("places", rows)
        return Features(places, places)


class Trainer:
    """Fits a detector to one class. ``run`` is the whole course; the other methods are its steps."""

    def __init__(self, config: Config, data: ClassData, features: dict, seed: int, device: torch.device):
        self.config, self.data, self.seed, self.device = config, data, seed, device
        memory.check_training(config, features, len(data.fit_rows))
        self.bytes = memory.training_bytes(config, features, len(data.fit_rows))
        utils.keep_freed_memory()
        utils.seed_everything(seed)
        self.detector = Detector(config, features)
        self._normalize_by(data.fit_rows)
        self.detector.to(device)
        self.parameters = list(self.detector.parameters())
        self.heads = self._make_heads()
        self.rate = config.lr_init
        self.generator = np.random.RandomState(seed)
        self.noise = torch.Generator(device).manual_seed(seed)
        per_epoch = math.ceil(len(data.fit_rows) / config.batch_size)
        least = math.ceil(config.least_steps / (per_epoch * config.meta_epochs))
        self.sub_epochs = max(config.sub_epochs, least)  # per evaluation
        self.epochs = config.meta_epochs * self.sub_epochs
        self.step, self.steps = 0, self.epochs * per_epoch
        self.history: list[dict] = []
        self.distances: dict[str, Tensor] = {}  # to the nearest normal images, of test and held-out ones

    def _normalize_by(self, rows: np.ndarray) -> None:
        """Fit the normalisation, and the weights of the heads, to normal training images. Raises ClassError
        where their features allow none."""
        try:
            self._fit_normalizers(rows)
        except (ValueError, torch.linalg.LinAlgError) as error:
            name, reason = self.data.class_name, str(error).splitlines()[0]
            fault = detector.features_fault(self.data)
            raise ClassError(fault or f"class {name}: its features cannot be normalised ({reason})") from None

    def _fit_normalizers(self, rows: np.ndarray) -> None:
        fit, source = self.detector, self.data.train
        if fit.rings is not None:
            bands = source.one_on_cpu("bands", rows)
            fit.rings.fit(bands)
            if fit.low is not None:
                fit.low.fit(bands)
        spectrum = self.config.score == "spectrum"
        if not fit.normalizer.steps and not spectrum:
            return
        own, pooled = [], []
        for batch in in_batches(rows, POOL_BATCH):
            semantic, patches = source.on_cpu(batch)[:2]
            own.append(semantic.clone())  # cloned: a view would keep the patches
            pooled.append(fit.normalizer.pool(semantic, patches).clone())
        whole = torch.cat(own)
        if spectrum:
            fit.weigh(whole)
        sample = source.on_cpu(evenly(rows, PATCH_SAMPLE)).patches.flatten(0, 1)
        fit.normalizer.fit(torch.cat(pooled), sample)
        if fit.own is not None:
            fit.own.fit(whole, sample)
        if fit.uses_places:
            fit.place_normalizer.fit(source.one_on_cpu("places", evenly(rows, PLACE_SAMPLE)))

    def _make_heads(self) -> list[Head]:
        fit, config = self.detector, self.config
        if config.score != "spectrum":
            return [SemanticHead(fit, config, trained=True)]
        trained = {name: fit.weight(name) >= NEGLIGIBLE for name in fit.heads}
        heads: list[Head] = [
            SemanticHead(fit, config, trained["semantic"]),
            TextureHead(fit, config, trained["texture"]),
        ]
        return heads + ([LocalHead(fit, config, trained["local"], self.seed)] if fit.uses_places else [])

    def run(self) -> Fitted:
        start = time.perf_counter()
        self.evaluate_start()
        for meta_epoch in range(1, self.config.meta_epochs + 1):
            losses = [self.train_epoch() for _ in range(self.sub_epochs)]
            self.evaluate(meta_epoch * self.sub_epochs, losses[-1])
            if self.has_ended():
                break
        return self.fitted(time.perf_counter() - start)

    def evaluate_start(self) -> None:
        """Where epochs are chosen by likelihood, the start is one of them: training may not improve on it."""
        self._look_for_neighbours()
        if self.config.select_epoch == "likelihood":
            self.evaluate(0, None)

    def _look_for_neighbours(self) -> None:
        """Score spectrum: the distances to the nearest normal images, in the tokens that the flows start
        from."""
        for head in self.heads if self.config.score == "spectrum" else ():
            evidence = self.detector.evidence[head.name]
            evidence.remember(head.known(self.data.train, self.data.fit_rows))
            held = head.distances(evidence, self.data.train, self.data.held_rows)
            evidence.calibrate("neighbours", held)
            self.distances[f"{head.name} held"] = held
            self.distances[head.name] = head.distances(evidence, self.data.test, self.data.test_rows)

    def train_epoch(self) -> float:
        """One pass over the normal training images in a new order -> their mean loss (nats per channel, no
        constant)."""
        self.detector.train()
        with products(self.config.matmul, self.device):
            losses = [self.train_step(batch) for batch in self.progress(self.shuffled_batches())]
        return torch.stack(losses).mean().item()

    def shuffled_batches(self) -> list[Index]:
        """The batches of an epoch: rows of the training split, shuffled, taken to the device at once."""
        rows = self.generator.permutation(self.data.fit_rows)
        return in_batches(self.data.train.index(rows), self.config.batch_size)

    def progress(self, batches: list) -> Iterable:
        return tqdm(
            batches,
            desc=self.data.class_name,
            unit="batch",
            leave=False,
            disable=utils.no_bar(self.config.hide_tqdm_bar),
        )

    def inputs(self, features: Features) -> Inputs:
        """What the semantic flow sees of a batch in training."""
        return self.heads[0].noisy_inputs(features, self.noise)

    def train_step(self, batch: Index) -> Tensor:
        """One Adam step of every flow on the mean loss of a batch of rows -> the first flow's loss,
        detached."""
        rate = self.scheduled_rate()
        trained = [head for head in self.heads if head.optimizer is not None]
        losses = [head.step(head.features(self.data.train, batch), self.noise, rate) for head in trained]
        self.count_step(losses[0])
        return losses[0]

    def scheduled_rate(self) -> float:
        self.rate = learning_rate(self.config, self.step / self.steps)
        return self.rate

    def count_step(self, loss: Tensor) -> None:
        """Count a step, and look whether its loss is finite: at every step on a CPU, now and then on a
        GPU."""
        look = (
            self.device.type == "cpu"
            or self.step % LOSS_CHECK == LOSS_CHECK - 1
            or self.step + 1 == self.steps
        )
        if look and not self.has_ended() and not torch.isfinite(loss):
            raise self.not_finite(f"the loss is {loss.item()}", self.step)
        self.step += 1

    def has_ended(self) -> bool:
        """Whether no flow's held-out likelihood has improved for ``patience`` evaluations."""
        if self.config.select_epoch == "last":
            return False
        return all(head.is_stale(len(self.history)) for head in self.heads)

    def not_finite(self, what: str, step: int) -> ClassError:
        """The error of a loss or score that is not finite: features that are not, or the epoch, the learning
        rate, what to try."""
        if fault := detector.features_fault(self.data):
            return ClassError(fault)
        epoch = min(step * self.epochs // self.steps + 1, self.epochs)
        return ClassError(
            f"class {self.data.class_name}: {what} in epoch {epoch} at learning rate {self.rate:g}; "
            "try a lower lr_init, max_grad_norm 1, or normalize power_l2"
        )

    def evaluate(self, epoch: int, loss: float | None) -> None:
        """Score the test images and the held-out normals after an epoch; each flow remembers its best
        epoch."""
        self.detector.eval()
        entry: dict = {"epoch": epoch, "loss": loss}
        with products("highest", self.device):
            outcomes = {head.name: self._outcome(head, entry) for head in self.heads}
        for name, outcome in outcomes.items():
            if len(self.data.held_rows):
                entry["held_out_loss" if name == "semantic" else f"{name}_held_out_loss"] = (
                    outcome.held_out_loss
                )
        scores, _ = self._scores(outcomes)
        if not np.isfinite(scores).all():
            raise self.not_finite("scores are not finite", self.step - 1)
        entry["auroc"] = utils.auroc(self.data.labels, scores)
        for name, score in model.SCORES.items():  # what the flow's other scores would have had
            if not score.needs_reference:
                by_name = self.detector.score(*outcomes["semantic"].test[:2], name)
                entry[f"{name}_auroc"] = utils.auroc(self.data.labels, by_name)
        self.history.append(entry)
        for head in self.heads:
            head.remember_if_best(outcomes[head.name])
        if self.config.verbose:
            held = f"  held-out loss {entry['held_out_loss']:.4f}" if "held_out_loss" in entry else ""
            trained = "before training" if loss is None else f"loss {loss:.4f}"
            tested = f"  AUROC {entry['auroc']:.4f}" if len(self.data.test_rows) else ""
            tqdm.write(f"{self.data.class_name}  epoch {epoch}  {trained}{held}{tested}")

    def _outcome(self, head: Head, entry: dict) -> Outcome:
        """What a flow makes of the images now. A flow that is not trained stays as it was."""
        if head.optimizer is None and head.best is not None:
            return head.best
        fit, data = self.detector, self.data
        if self.config.score == "latent_knn":
            fit.reference = head.measure(data.train, data.fit_rows).z
        held = head.measure(data.train, data.held_rows) if len(data.held_rows) else None
        if held and not math.isfinite(held.loss):
            raise self.not_finite("scores are not finite", self.step - 1)
        return Outcome(len(self.history) + 1, entry, held, head.measure(data.test, data.test_rows))

    def _scores(self, outcomes: dict[str, Outcome]) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the test images and of the held-out normals, from what each flow made of them."""
        fit = self.detector
        if self.config.score != "spectrum":
            held, test = outcomes["semantic"].held, outcomes["semantic"].test
            return fit.score(test.z, test.log_det), (fit.score(held.z, held.log_det) if held else np.empty(0))
        findings: dict[str, dict] = {"": {}, " held": {}}
        for name, outcome in outcomes.items():
            assert outcome.held is not None
            fit.evidence[name].calibrate("likelihood", outcome.held.likelihood)
            for rows, measured in (("", outcome.test), (" held", outcome.held)):
                findings[rows][name] = (measured.likelihood, self.distances[name + rows])
        test, held = (fit.combine(found).cpu().numpy() for found in findings.values())
        return test, held

    def fitted(self, seconds: float) -> Fitted:
        """The detector of the chosen epochs and the result of the class."""
        data, chosen = self.data, {}
        for head in self.heads:
            assert head.best is not None, "evaluate comes first"
            chosen[head.name] = head.best
            if head.best.state is not None:
                head.flow.load_state_dict(head.best.state)
        if self.config.score == "latent_knn":
            self.detector.reference = self.heads[0].measure(data.train, data.fit_rows).z
        scores, held_scores = self._scores(chosen)
        if self.config.refit:
            self._refit()
            scores = self._refitted_scores() if len(data.test_rows) else scores
        entry = chosen["semantic"].entry
        if "texture" in chosen:
            entry = entry | {f"{name}_epoch": best.entry["epoch"] for name, best in chosen.items()}
            entry |= {f"{name}_weight": self.detector.weight(name) for name in chosen}
        result = {
            "class": data.class_name,
            "seed": self.seed,
            **utils.detection_metrics(data.labels, scores),
            "best_on_test_auroc": max(entry["auroc"] for entry in self.history),
            **{key: value for key, value in entry.items() if key != "auroc"},
            "n_train": len(data.fit_rows),
            "n_held_out": len(data.held_rows),
            "n_test": len(data.test_rows),
            "n_anomalous": int(data.labels.sum()),
            "seconds": round(seconds, 1),
        }
        compared = self.config.baselines and self.seed == self.config.seed  # the table's is the first seed
        simple = self._own_input_scores() if compared and len(data.test_rows) else {}
        return Fitted(
            self.detector, scores, data.labels, data.test_rows, held_scores, self.history, result, simple
        )

    def _refit(self) -> None:
        """Let the normalisation and the neighbours take in all normal training images.

        The standardisation stays that of the held-out images, from when they were still held out."""
        fit, data = self.detector, self.data
        normal = np.sort(np.concatenate([data.fit_rows, data.held_rows]))
        self._normalize_by(normal)
        if self.config.score == "latent_knn":
            fit.reference = self.heads[0].measure(data.train, normal).z
        for head in self.heads if self.config.score == "spectrum" else ():
            fit.evidence[head.name].remember(head.known(data.train, normal))

    def _refitted_scores(self) -> np.ndarray:
        """Scores of the test images after the refit."""
        with products("highest", self.device), torch.no_grad():
            batches = in_batches(self.data.test_rows, EVAL_BATCH[self.device.type])
            parts = [self.detector.scores(self.detector.read(self.data.test, batch)) for batch in batches]
        scores = torch.cat(parts).cpu().numpy()
        if not np.isfinite(scores).all():
            raise self.not_finite("scores are not finite after the refit", self.step - 1)
        return scores

    @torch.no_grad()
    def _own_input_scores(self) -> dict[str, np.ndarray]:
        """Scores of simple detectors on what the flows take, fitted to all normal training images."""
        data = self.data

        def tokens(source: TokenSource, rows: np.ndarray) -> Tensor:
            return torch.cat(
                [
                    self.detector.own_input(source[batch])
                    for batch in in_batches(rows, EVAL_BATCH[source.device.type])
                ]
            )

        normal = np.sort(np.concatenate([data.fit_rows, data.held_rows]))
        scores = own_input_scores(tokens(data.train, normal), tokens(data.test, data.test_rows))
        if not (self.config.places and data.per_category):
            return scores
        reference = data.train.one_on_cpu("places", evenly(normal, PLACE_SAMPLE))
        for name, fit in PLACE_BASELINES.items():
            score, batches = fit(reference), in_batches(data.test_rows, PLACE_BATCH)
            scores[name] = torch.cat([score(data.test.one_on_cpu("places", b)) for b in batches]).numpy()
        return scores


# ---------------------------------------------------------------- the script
def make_trainer(
    config: Config,
    cache: feature_cache.FeatureCache,
    class_name: str,
    seed: int,
    train: TokenSource,
    test: TokenSource,
) -> Trainer:
    """The trainer of one class and seed. What it comes to does not depend on what ran before."""
    data = detector.class_data(config, cache.labels, class_name, seed, train, test)
    return Trainer(config, data, cache.meta, seed, train.device)


def main(config: Config) -> None:
    watch = runs.Stopwatch()
    device = utils.set_up(config.device, config.threads)
    given = f"give it with --class_name (now {config.class_name!r})"
    advice = f"train.py fits one class: {given}; main.py fits several"
    if config.class_name == "all" and not is_one_class(config):
        raise UserError(advice)
    with runs.writing(config):
        cache = extractor.ensure_features(config, device, functools.partial(Detector, config))
        class_name, *more = datasets.choose_classes(cache.labels, config.class_name)
        if more:
            raise UserError(advice)
        runs.settle(config, cache)
        cell = runs.Cell(class_name, config.seed)
        result, kept = runs.finished(config, cache, cell), "kept from an earlier run"
        if result is None:
            train, test = (TokenSource(cache.arrays(split), device) for split in datasets.SPLITS)
            fitted = make_trainer(config, cache, *cell, train, test).run()
            fitted.result |= watch.share()
            detector.save_fitted(config, cache, fitted)
            result, kept = fitted.result, "kept"
    kept += f" in {detector.checkpoint_path(config, *cell)}.json"
    print(f"{class_name}: {outcome(result)}  {result['seconds']:.0f} s  {kept}")
    tell_threshold(detector.read_record(detector.checkpoint_path(config, *cell)))


def is_one_class(config: Config) -> bool:
    """Whether a folder of one's own holds one class, which needs no name then. Raises UserError."""
    return config.dataset == "folder" and len(datasets.images_of(config).labels.classes) == 1


def outcome(result: dict) -> str:
    """What came out of a class, in words: its metrics, or that there was nothing to test on."""
    epoch = f"epoch {result['epoch']}"
    if not result["n_test"]:
        return f"fitted to {result['n_train']} normal images, no test images ({epoch})"
    metrics = "  ".join(f"{metric.title} {result[name]:.4f}" for name, metric in utils.METRICS.items())
    return f"{metrics}  ({epoch}, best on test {result['best_on_test_auroc']:.4f})"


def tell_threshold(record: dict) -> None:
    """Say where predict.py will draw the line, and how sure that is; nothing where none were held out."""
    found = calibration.of_record(record)
    if found:
        print(found)
        if found.warning:
            print(f"warning: {found.warning}")


if __name__ == "__main__":
    run_script(main, CONFIG)
