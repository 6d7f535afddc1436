"""Fit the flow to one normal class and report its detection of all the others, epoch by epoch."""

import config as knobs

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = knobs.from_command_line(__doc__)

import copy
import dataclasses
import math
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import datasets
import detector
import extractor
import model
import utils
from config import Config, UserError
from detector import ClassData, Detector, Fitted, TokenSource, in_batches

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
        def arrived(_: Tensor) -> None:
            self.missing[number] -= 1
            if self.missing[number] == 0:
                self._step_one(self.optimizers[number])
                self.missing[number] = len(parameters)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

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
@dataclasses.dataclass
class BestEpoch:
    """The epoch to report so far: its place in the history, its scores, and its weights where a later one may
    be worse."""

    index: int  # evaluations up to and including it
    entry: dict
    scores: np.ndarray
    held_scores: np.ndarray
    state: dict[str, Tensor] | None


class Trainer:
    """Fits a detector to one class. ``run`` is the whole course; the other methods are its steps."""

    def __init__(self, config: Config, data: ClassData, features: dict, seed: int, device: torch.device):
        self.config, self.data, self.seed, self.device = config, data, seed, device
        utils.seed_everything(seed)
        self.detector = Detector(config, features)
        self._fit_normalizer()
        self.detector.to(device)
        self.parameters = list(self.detector.parameters())
        self.optimizer = SubnetOptimizers(self.detector.flow, config)
        self.rate = config.lr_init
        self.generator = np.random.RandomState(seed)
        self.noise = torch.Generator(device).manual_seed(seed)
        self.epochs = config.meta_epochs * config.sub_epochs
        self.step, self.steps = 0, self.epochs * math.ceil(len(data.fit_rows) / config.batch_size)
        self.history: list[dict] = []
        self.best: BestEpoch | None = None

    def _fit_normalizer(self) -> None:
        normalizer, rows, source = self.detector.normalizer, self.data.fit_rows, self.data.train
        if not normalizer.steps:
            return
        pooled = [normalizer.pool(*source.on_cpu(batch)).clone() for batch in in_batches(rows, POOL_BATCH)]
        semantic = torch.cat(pooled)  # cloned above: a view would keep the patches
        sample = rows[np.linspace(0, len(rows) - 1, min(PATCH_SAMPLE, len(rows))).astype(int)]
        normalizer.fit(semantic, source.on_cpu(sample)[1].flatten(0, 1))

    def run(self) -> Fitted:
        start = time.perf_counter()
        for meta_epoch in range(1, self.config.meta_epochs + 1):
            losses = [self.train_epoch() for _ in range(self.config.sub_epochs)]
            self.evaluate(meta_epoch * self.config.sub_epochs, losses[-1])
            if self.has_ended():
                break
        return self.fitted(time.perf_counter() - start)

    def train_epoch(self) -> float:
        """One pass over the normal training images in a new order -> their mean loss (nats per channel, no
        constant)."""
        self.detector.train()
        losses = [self.train_step(batch) for batch in self.progress(self.shuffled_batches())]
        return torch.stack(losses).mean().item()

    def shuffled_batches(self) -> list[np.ndarray]:
        """The batches of an epoch: rows of the training split, shuffled."""
        return in_batches(self.generator.permutation(self.data.fit_rows), self.config.batch_size)

    def progress(self, batches: list) -> Iterable:
        return tqdm(
            batches, desc=self.data.class_name, unit="batch", leave=False, disable=self.config.hide_tqdm_bar
        )

    @torch.no_grad()
    def inputs(self, batch: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the flow sees of the rows ``batch``: normalised semantic (B, C), with the training noise, and
        patch tokens (B, N, C)."""
        semantic, patches = self.detector.normalizer(*self.data.train[batch])
        if self.config.feature_noise:
            noise = torch.randn(semantic.shape, generator=self.noise, device=self.device)
            semantic = semantic + self.config.feature_noise * noise
        return semantic, patches

    def train_step(self, batch: np.ndarray) -> Tensor:
        """One Adam step on the mean loss of a batch of rows -> the loss, detached."""
        self.optimizer.set_learning_rate(self.scheduled_rate())
        semantic, patches = self.inputs(batch)
        loss = model.loss_per_image(*self.detector.flow(semantic, [patches])).mean()
        loss.backward()
        self.optimizer.step()
        self.count_step(loss.detach())
        return loss.detach()

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
        """Whether the held-out likelihood has not improved for ``patience`` evaluations."""
        if self.config.select_epoch == "last" or self.best is None:
            return False
        return len(self.history) - self.best.index >= self.config.patience

    def not_finite(self, what: str, step: int) -> UserError:
        """The error of a loss or score that is not finite: the epoch, the learning rate, what to try."""
        epoch = min(step * self.epochs // self.steps + 1, self.epochs)
        return UserError(
            f"class {self.data.class_name}: {what} in epoch {epoch} at learning rate {self.rate:g}; "
            "try a lower lr_init, max_grad_norm 1, or normalize power_l2"
        )

    def evaluate(self, epoch: int, loss: float) -> None:
        """Score the test images and the held-out normals after an epoch; remember it if it is the one to
        report so far."""
        fit, data = self.detector.eval(), self.data
        entry = {"epoch": epoch, "loss": loss}
        if model.SCORES[self.config.score].needs_reference:
            fit.reference = fit.latents(data.train, data.fit_rows)[0]
        held_scores = np.empty(0)
        if len(data.held_rows):
            held = fit.latents(data.train, data.held_rows)
            entry["held_out_loss"] = model.loss_per_image(*held).mean().item()
            held_scores = fit.score(*held)
        latents = fit.latents(data.test, data.test_rows)
        scores = fit.score(*latents)
        if not np.isfinite(scores).all() or not math.isfinite(entry.get("held_out_loss", 0.0)):
            raise self.not_finite("scores are not finite", self.step - 1)
        entry["auroc"] = utils.auroc(data.labels, scores)
        for name, score in model.SCORES.items():  # what the flow's other scores would have had
            if not score.needs_reference:
                entry[f"{name}_auroc"] = utils.auroc(data.labels, fit.score(*latents, name))
        self.history.append(entry)
        self._remember_if_best(entry, scores, held_scores)
        if self.config.verbose:
            held_text = f"  held-out loss {entry['held_out_loss']:.4f}" if "held_out_loss" in entry else ""
            tqdm.write(
                f"{data.class_name}  epoch {epoch}  loss {loss:.4f}{held_text}  AUROC {entry['auroc']:.4f}"
            )

    def _remember_if_best(self, entry: dict, scores: np.ndarray, held_scores: np.ndarray) -> None:
        by_likelihood = self.config.select_epoch == "likelihood"
        if (
            not by_likelihood
            or self.best is None
            or entry["held_out_loss"] < self.best.entry["held_out_loss"]
        ):
            later_ones = by_likelihood and self.config.meta_epochs > 1
            state = copy.deepcopy(self.detector.state_dict()) if later_ones else None
            self.best = BestEpoch(len(self.history), entry, scores, held_scores, state)

    def fitted(self, seconds: float) -> Fitted:
        """The detector of the chosen epoch and the result of the class."""
        best, data = self.best, self.data
        assert best is not None, "evaluate comes first"
        if best.state is not None:
            self.detector.reference = best.state["reference"]
            self.detector.load_state_dict(best.state)
        result = {
            "class": data.class_name,
            "seed": self.seed,
            **utils.detection_metrics(data.labels, best.scores),
            "best_on_test_auroc": max(entry["auroc"] for entry in self.history),
            **{key: value for key, value in best.entry.items() if key != "auroc"},
            "n_train": len(data.fit_rows),
            "n_held_out": len(data.held_rows),
            "n_test": len(data.test_rows),
            "seconds": round(seconds, 1),
        }
        return Fitted(
            self.detector, best.scores, data.labels, data.test_rows, best.held_scores, self.history, result
        )


# ---------------------------------------------------------------- the script
def make_trainer(
    config: Config,
    cache: datasets.FeatureCache,
    class_name: str,
    seed: int,
    train: TokenSource,
    test: TokenSource,
) -> Trainer:
    """The trainer of one class and seed. What it comes to does not depend on what ran before."""
    data = detector.class_data(config, cache.labels, class_name, seed, train, test)
    return Trainer(config, data, cache.meta, seed, train.device)


def main(config: Config) -> None:
    device = utils.set_up(config.device, config.threads)
    if config.class_name == "all" or "," in config.class_name:
        raise UserError(
            f"train.py fits one class: give it with --class_name (now {config.class_name!r}); main.py fits "
            f"several"
        )
    cache = extractor.ensure_features(config, device)
    class_name = datasets.choose_classes(cache.labels, config.class_name)[0]
    train, test = (TokenSource(cache.tokens(split), device) for split in datasets.SPLITS)
    fitted = make_trainer(config, cache, class_name, config.seed, train, test).run()
    path = detector.save_fitted(config, cache, fitted)
    result = fitted.result
    metrics = "  ".join(f"{metric.title} {result[name]:.4f}" for name, metric in utils.METRICS.items())
    print(
        f"{class_name}: {metrics}  (epoch {result['epoch']}, best on test "
        f"{result['best_on_test_auroc']:.4f})  "
        f"{result['seconds']:.0f} s  kept in {path}.json"
    )


if __name__ == "__main__":
    knobs.run_script(main, CONFIG)
