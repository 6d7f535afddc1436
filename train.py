"""Fit the flow to one normal class and report its detection of all the others, epoch by epoch."""

from shell.command_line import from_command_line, run_script

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__, script="train.py")

import dataclasses
import functools
import math
import time
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import datasets
import extractor
import model
import utils
from backbone.arithmetic import forward_precision, products
from cache import feature_cache
from config import ClassError, Config, UserError
from detector import baselines, calibration, detector, memory, runs
from detector.detector import (
    ALIKE,
    EVAL_BATCH,
    ClassData,
    Detector,
    Fitted,
    Inputs,
    Latents,
    TokenSource,
    evenly,
    in_batches,
)
from detector.normalization import ENERGY_FLOOR, spread

PLACE_SAMPLE = 500  # images whose place tokens the Gaussians are fitted to
PLACE_BATCH = 25  # images whose places are scored at once
PATCH_SAMPLE = 256  # images whose patch tokens the normaliser's statistics come from
POOL_BATCH = 250  # images whose patch tokens are held at once when semantic tokens are re-pooled
LOSS_CHECK = 64  # steps between two looks at the loss on a GPU, where reading it waits for the device
EXTREME = 30.0  # times the median squared length of the tokens: of so much an image is left out of training
LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)  # the constant of a Gaussian, nats per channel
ADAM = {"betas": (0.8, 0.8), "eps": 1e-4, "weight_decay": 1e-5}  # the paper's (docs/method.md, section 4)


# ---------------------------------------------------------------- optimisation
def make_optimizer(parameters: list[Tensor], config: Config) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=config.lr_init, fused=True, **ADAM)


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


def compiled(step: Callable) -> Callable:
    """A function or module as torch.compile makes it for many calls: with CUDA graphs where there is a
    GPU."""
    return torch.compile(step, mode="reduce-overhead" if torch.cuda.is_available() else "default")


# ---------------------------------------------------------------- one class
@dataclasses.dataclass
class Evaluation:
    """The state of a class after an epoch: enough to go back to it."""

    number: int  # evaluations up to and including this one
    entry: dict
    flow: dict[str, Tensor]
    reference: Tensor  # latents of the training images for the score latent_knn; else empty
    measured: dict[str, Latents]  # of held-out and test images

    @property
    def held_out_loss(self) -> float:
        """NaN where nothing is held out."""
        return self.entry.get("held_out_loss", float("nan"))


class Trainer:
    """Fits a detector to one class. ``run`` is the whole course; the other methods are its steps.

    matmul: how products are computed in training: highest (float32), tf32 (on a GPU) or bfloat16."""

    matmul = "highest"

    def __init__(self, config: Config, data: ClassData, features: dict, seed: int, device: torch.device):
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
        self.usual = {part: self._usual(part) for part in ("fit", "held")}
        self.unusual_places = self._unusual_places()
        self.near: dict[str, Tensor] = {}  # distances (n, kernels) of the tokens of held-out and test images
        if config.base == "kernel":
            self._set_kernels()
        self.optimizer = SubnetOptimizers(self.detector.flow, config)
        self.trained = compiled(self.detector.flow) if config.compile else self.detector.flow
        self.rate = config.lr_init
        self.generator = np.random.RandomState(seed)
        self.noise = torch.Generator(device).manual_seed(seed)
        per_epoch = math.ceil(len(self.usual["fit"]) / config.batch_size)
        least = math.ceil(config.least_steps / (per_epoch * config.meta_epochs))
        self.sub_epochs = max(config.sub_epochs, least)  # per evaluation
        self.epochs = config.meta_epochs * self.sub_epochs
        self.step, self.steps = 0, self.epochs * per_epoch
        self.history: list[dict] = []
        self.best: Evaluation | None = None
        self.before_training: dict[str, np.ndarray] = {}  # as ``Fitted.flow_scores``

    # ------------------------------------------------------------ normalisation
    def _fit_normalizers(self) -> None:
        """Fit the normalisations and the places' Gaussians to normal training images. Raises ClassError where
        their features allow none."""
        try:
            self._fit_tokens()
            self._fit_patches()
            self._fit_places()
        except (ValueError, torch.linalg.LinAlgError) as error:
            name, reason = self.data.class_name, str(error).splitlines()[0]
            fault = detector.features_fault(self.data)
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
        source, fit = self.sources[part], self.detector
        batches = in_batches(self.rows[part], POOL_BATCH)
        return torch.cat([fit.joint(source.on_cpu(batch)).clone() for batch in batches])

    def _fit_patches(self) -> None:
        fit, rows = self.detector, evenly(self.data.fit_rows, PATCH_SAMPLE)
        if fit.patch_normalizer is not None and (fit.patch_normalizer.steps or fit.patch_normalizer.reduces):
            features = self.data.train.on_cpu(rows)
            if fit.middle:
                features = features._replace(places=self.data.train.one_on_cpu("places", rows))
            fit.patch_normalizer.fit(fit.raw_patches(features).flatten(0, 1))

    def _fit_places(self) -> None:
        fit, source = self.detector, self.data.train
        if fit.places is None:
            return
        rows = in_batches(self.data.fit_rows, POOL_BATCH)
        alike = spread(torch.cat([source.on_cpu(batch).semantic.clone() for batch in rows])) < ALIKE
        fit.read_places_if(alike)
        if alike:
            fit.places.fit(source.one_on_cpu("places", evenly(self.data.fit_rows, PLACE_SAMPLE)))

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
        limit = EXTREME * lengths.median() if len(rows) else 0.0
        return (lengths <= limit).nonzero().squeeze(1).cpu().numpy()

    def extremes(self) -> np.ndarray:
        """The rows of the normal training images that are left out for the length of their tokens."""
        return np.concatenate([np.delete(self.rows[part], usual) for part, usual in self.usual.items()])

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
        fit = self.detector
        with products("highest", self.device):
            tokens = {part: self._all_tokens(part) for part in self.rows}
            fit.reference = (model.DRAWN * tokens["fit"][0]).half()
            self.near = {part: fit.distances(*tokens[part]) for part in ("held", "test")}
            usual = torch.from_numpy(self.usual["held"]).to(self.device)
            fit.bandwidth.copy_(model.best_bandwidth(self.near["held"][usual], fit.channels))

    def _all_tokens(self, part: str) -> tuple[Tensor, Tensor]:
        """Tokens (n, k) and outside (n) of all images of a part."""
        if part in self.tokens:
            return self.tokens[part]
        source, fit = self.sources[part], self.detector
        found = [fit.normalizer(fit.joint(source[b])) for b in in_batches(self.rows[part], POOL_BATCH)]
        return torch.cat([tokens for tokens, _ in found]), torch.cat([outside for _, outside in found])

    @property
    def compares(self) -> bool:
        """Whether simple detectors are fitted beside the flow: with the first seed, whose figures the table
        has."""
        return self.config.baselines and self.seed == self.config.seed and len(self.data.test_rows) > 0

    # ------------------------------------------------------------ training
    def run(self) -> Fitted:
        start = time.perf_counter()
        if self.config.patience:  # training may not improve on the start
            self.evaluate(0, None)
        for meta_epoch in range(1, self.config.meta_epochs + 1):
            losses = [self.train_epoch() for _ in range(self.sub_epochs)]
            self.evaluate(meta_epoch * self.sub_epochs, losses[-1])
            if self.has_ended():
                break
        return self.fitted(time.perf_counter() - start)

    def train_epoch(self) -> float:
        """One pass over the normal training images in a new order -> their mean loss (nats per channel, no
        constant)."""
        self.detector.train()
        order = self.generator.permutation(self.usual["fit"])
        batches = tqdm(
            in_batches(order, self.config.batch_size),
            desc=self.data.class_name,
            unit="batch",
            leave=False,
            disable=utils.no_bar(),
        )
        with products(self.matmul, self.device):
            losses = [self.train_step(batch) for batch in batches]
        return torch.stack(losses).mean().item()

    def train_step(self, batch: np.ndarray) -> Tensor:
        """One Adam step on the mean loss of a batch, numbers of images to fit to -> the loss, detached."""
        self.rate = learning_rate(self.config, self.step / self.steps)
        self.optimizer.set_learning_rate(self.rate)
        inputs = self.inputs("fit", batch)
        tokens = self.with_noise(inputs.tokens[:, : self.detector.leading])
        with forward_precision(self.matmul, self.device):
            z, log_det = self.trained(tokens, [inputs.patches])
            loss = model.loss_per_image(z, log_det).mean()
        loss.backward()
        self.optimizer.step()
        self.count_step(loss.detach())
        return loss.detach()

    def inputs(self, part: str, batch: np.ndarray) -> Inputs:
        """What the flow takes of images of a part: fit, held or test, by their numbers in it."""
        source, rows, fit = self.sources[part], self.rows[part][batch], self.detector
        with torch.no_grad():
            if part not in self.tokens:
                features = source[rows]
                if fit.middle:
                    features = features._replace(places=source.one("places", rows))
                return fit.inputs(features)
            tokens, outside = (values[torch.from_numpy(batch)] for values in self.tokens[part])
            if fit.patch_normalizer is None:
                return Inputs(tokens, outside, tokens.new_zeros(len(tokens), 0, fit.leading))
            raw = fit.middle_patches(source.one("places", rows)) if fit.middle else source.patches(rows)
            return Inputs(tokens, outside, fit.patch_normalizer(raw))

    def with_noise(self, tokens: Tensor) -> Tensor:
        """The tokens with the training noise on them."""
        if not self.config.feature_noise:
            return tokens
        noise = torch.randn(tokens.shape, generator=self.noise, device=tokens.device)
        return tokens + self.config.feature_noise * noise

    def count_step(self, loss: Tensor) -> None:
        """Count a step, and look whether its loss is finite: at every step on a CPU, now and then on a
        GPU."""
        look = (
            self.device.type == "cpu"
            or self.step % LOSS_CHECK == LOSS_CHECK - 1
            or self.step + 1 == self.steps
        )
        if look and not self.config.patience and not torch.isfinite(loss):
            raise self.not_finite(f"the loss is {loss.item()}", self.step)
        self.step += 1

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

    def has_ended(self) -> bool:
        """Whether the held-out likelihood has not improved for ``patience`` evaluations."""
        if not self.config.patience or self.best is None:
            return False
        return len(self.history) - self.best.number >= self.config.patience

    # ------------------------------------------------------------ evaluation
    @torch.no_grad()
    def measure(self, part: str) -> Latents:
        """What the flow makes of all images of a part."""
        found = []
        for batch in in_batches(np.arange(len(self.rows[part])), EVAL_BATCH[self.device.type]):
            inputs = self.inputs(part, batch)
            none = Latents(inputs.tokens, inputs.outside, inputs.tokens, inputs.outside)
            found.append(self.detector.latents(inputs) if len(batch) else none)
        return Latents(*(torch.cat(parts) for parts in zip(*found)))

    def evaluate(self, epoch: int, loss: float | None) -> None:
        """Score the test images and the held-out normals after an epoch; remember it if it is the best."""
        self.detector.eval()
        with products("highest", self.device), torch.no_grad():
            measured = {part: self.measure(part) for part in ("held", "test")}
            entry, reference = self._evaluated({"epoch": epoch, "loss": loss}, measured)
        self.history.append(entry)
        if self.config.verbose:
            held = f"  held-out loss {entry['held_out_loss']:.4f}" if "held_out_loss" in entry else ""
            trained = "before training" if loss is None else f"loss {loss:.4f}"
            tested = f"  AUROC {entry['auroc']:.4f}" if len(self.data.test_rows) else ""
            tqdm.write(f"{self.data.class_name}  epoch {epoch}  {trained}{held}{tested}")
        self._remember_if_best(entry, reference, measured)

    def _evaluated(self, entry: dict, measured: dict[str, Latents]) -> tuple[dict, Tensor]:
        """An epoch's entry of the history, completed, and the latents of the images fitted to, where the
        score takes them."""
        fit, config = self.detector, self.config
        test, usual = measured["test"], torch.from_numpy(self.usual["held"]).to(self.device)
        energies = {part: fit.energy(each, self.near.get(part)) for part, each in measured.items()}
        nll = {part: model.negative_log_likelihood(each, fit.bandwidth) for part, each in energies.items()}
        if len(nll["held"]):
            entry["held_out_loss"] = nll["held"][usual].mean().item() - LOG_ROOT_2PI
        if not all(each.isfinite().all() for each in nll.values()):
            if not config.patience or not self.history:
                raise self.not_finite("scores are not finite", self.step - 1)
            entry["held_out_loss"] = float("inf")  # training has diverged: an earlier epoch is reported
        by_name = {"latent": test.z.square().mean(1), "likelihood": nll["test"], "flow": fit.flow_loss(test)}
        reference = test.z[:0]
        if config.score == "latent_knn":
            reference = self.measure("fit").z
            distances = model.squared_distances(test.z, reference) + test.outside.unsqueeze(1)
            by_name["latent_knn"] = model.nearest_neighbours(distances)
        logs = energies["test"].clamp_min(ENERGY_FLOOR).log()
        by_name["joined"] = logs + self.unusual_places.get("test", 0.0)
        entry["auroc"] = self._auroc(by_name[config.score])
        entry |= {f"{name}_auroc": self._auroc(by_name[name]) for name in ("latent", "likelihood", "flow")}
        if entry["loss"] is None:
            self.before_training = self._flow_scores(test, ", before training")
        return entry, reference

    def _auroc(self, scores: Tensor) -> float:
        return utils.auroc(self.data.labels, np.nan_to_num(scores.cpu().numpy()))

    def _flow_scores(self, test: Latents, suffix: str = "") -> dict[str, np.ndarray]:
        """The scores that ``Fitted.flow_scores`` keeps, of latents of the test images."""
        fit = self.detector
        found = {"likelihood": fit.score(test, "likelihood", self.near.get("test"))}
        if self.config.base == "kernel":
            found["flow alone"] = fit.flow_loss(test)
        return {name + suffix: values.cpu().numpy() for name, values in found.items()}

    def _remember_if_best(self, entry: dict, reference: Tensor, measured: dict[str, Latents]) -> None:
        chosen = not self.config.patience or self.best is None
        if chosen or entry["held_out_loss"] < self.best.held_out_loss:  # type: ignore[union-attr]
            flow, keep = self.detector.flow, bool(self.config.patience)
            state = {name: values.clone() for name, values in flow.state_dict().items()} if keep else {}
            self.best = Evaluation(len(self.history), entry, state, reference, measured)

    # ------------------------------------------------------------ what is left
    def fitted(self, seconds: float) -> Fitted:
        """The detector of the chosen epoch and the result of the class."""
        data, best, fit = self.data, self.best, self.detector
        assert best is not None, "evaluate comes first"
        if best.flow:
            fit.flow.load_state_dict(best.flow)
        if self.config.score == "latent_knn":
            fit.reference = best.reference.half()
        with products("highest", self.device), torch.no_grad():
            whole = {
                part: fit.score(each, None, self.near.get(part)) + self.unusual_places.get(part, 0.0)
                for part, each in best.measured.items()
            }
            flow_scores = self._flow_scores(best.measured["test"])
        scores, held_scores = whole["test"].cpu().numpy(), whole["held"].cpu().numpy()
        if not (np.isfinite(scores).all() and np.isfinite(held_scores).all()):
            raise self.not_finite("scores are not finite", self.step - 1)
        result = {
            "class": data.class_name,
            "seed": self.seed,
            **utils.detection_metrics(data.labels, scores),
            "best_on_test_auroc": max(entry["auroc"] for entry in self.history),
            **{key: value for key, value in best.entry.items() if key != "auroc"},
            "reads_places": fit.uses_places,
            "n_train": len(data.fit_rows),
            "n_held_out": len(data.held_rows),
            "n_test": len(data.test_rows),
            "n_anomalous": int(data.labels.sum()),
            "seconds": round(seconds, 1),
        }
        simple = self.simple_scores() if self.compares else {}
        by_flow = flow_scores | self.before_training
        return Fitted(
            fit, scores, data.labels, data.test_rows, held_scores, self.history, result, by_flow, simple
        )

    @torch.no_grad()
    def simple_scores(self) -> dict[str, np.ndarray]:
        """Scores of simple detectors (baselines.py) on the test images, fitted to all normal training images:
        on the semantic token, on the joint token that the flow starts from, and on places where they are
        read."""
        data = self.data
        normal = np.sort(np.concatenate([data.fit_rows, data.held_rows]))
        scores = baselines.semantic_scores(data.train.semantic(normal), data.test.semantic(data.test_rows))
        if self.joint:
            train = torch.cat([self.joint["fit"], self.joint["held"]])
            scores["Gaussian, flow's input"] = baselines.gaussian(train, self.joint["test"])
            train, test = (  # an image that is fitted to lies in its own directions: nothing is outside
                torch.cat([tokens, outside.sqrt().unsqueeze(1)], 1)
                for tokens, outside in (self.tokens["fit"], self.tokens["test"])
            )
            train[:, -1] = 0
            scores["kNN, flow's input"] = baselines.neighbours(train, test)
        if self.detector.uses_places:
            reference = data.train.one_on_cpu("places", evenly(normal, PLACE_SAMPLE))
            for name, fit in baselines.PLACES.items():
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
    trainer = Trainer(config, data, cache.meta, seed, train.device)
    if len(rows := trainer.extremes()):
        first = cache.labels.train.names[rows[0]]
        print(
            f"note: class {class_name}: the features of {utils.counted(len(rows), 'training image')} are "
            f"over {EXTREME:g} times as large as usual, {first} first; look at it: it is left out of "
            "training and of held-out likelihoods",
            flush=True,
        )
    return trainer


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
