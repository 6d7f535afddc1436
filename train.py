"""Fit the flow to one normal class and report its detection of all the others, epoch by epoch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import from_command_line, run_script

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__)

import functools
import math
import time

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import datasets
import extractor
import utils
from backbone.arithmetic import products
from cache.feature_cache import FeatureCache
from config import OWN_PICTURES, ClassError, Config, UserError
from detector import calibration, checkpoints, evaluation, runs
from detector.class_data import TokenSource, features_fault
from detector.detector import make_detector
from detector.optimization import SubnetAdam, compiled, learning_rate
from detector.preparation import WHOLE, PreparedClass, prepare
from images.tiles import whole_scores

LOSS_CHECK = 64  # steps between two looks at the loss on a GPU, where reading it waits for the device


class Trainer:
    """Trains the flow of one class. ``run`` is the whole course; the other methods are its steps."""

    def __init__(self, prepared: PreparedClass):
        self.prepared, self.data, self.detector = prepared, prepared.data, prepared.detector
        self.config = config = prepared.config
        self.flow = compiled(self.detector.flow) if config.compile else self.detector.flow
        self.optimizer, self.rate = SubnetAdam(self.detector.flow, config), config.lr_init
        self.order = np.random.RandomState(prepared.seed)
        self.noise = torch.Generator(prepared.device).manual_seed(prepared.seed)
        per_epoch = prepared.steps_per_epoch
        least = math.ceil(config.least_steps / (per_epoch * config.meta_epochs))
        self.sub_epochs = max(config.sub_epochs, least)  # per evaluation
        self.epochs = config.meta_epochs * self.sub_epochs
        self.step, self.steps = 0, self.epochs * per_epoch
        self.history: list[dict] = []  # the entries of all evaluations
        self.before_training: dict[str, np.ndarray] = {}  # scores of the test images by name, if taken
        self.best: evaluation.Evaluation | None = None
        self.since_best = 0  # evaluations

    def run(self) -> checkpoints.Fitted:
        """Train, and go back to the best epoch. Raises ClassError on a loss or scores that are not finite."""
        start = time.perf_counter()
        if self.config.patience or self.prepared.compares or not self.prepared.trains:
            self.evaluate(0, None)  # training may not improve on the start
        for epoch in range(1, self.epochs + 1 if self.prepared.trains else 1):
            loss = self.train_epoch()
            if epoch % self.sub_epochs == 0:
                self.evaluate(epoch, loss)
                if self.config.patience and self.since_best >= self.config.patience:
                    break
        return self.fitted(time.perf_counter() - start)

    def train_epoch(self) -> float:
        """One epoch of batches in a new order -> their mean loss."""
        self.detector.train()
        batches = tqdm(
            self.prepared.epoch(self.order),
            desc=self.data.class_name,
            unit="batch",
            leave=False,
            disable=utils.no_bar(),
        )
        with products(self.prepared.device):
            losses = [self.train_step(batch) for batch in batches]
        return torch.stack(losses).mean().item()

    def train_step(self, batch: np.ndarray) -> Tensor:
        """One Adam step on the loss of a batch -> the loss, detached."""
        self.rate = learning_rate(self.config, self.step / self.steps)
        self.optimizer.set_learning_rate(self.rate)
        tokens, seen = self.prepared.inputs(batch)
        if self.config.feature_noise:
            noise = torch.randn(tokens.shape, generator=self.noise, device=tokens.device)
            tokens = tokens + self.config.feature_noise * noise
        loss = self.prepared.loss(*self.flow(tokens, [seen]))
        self.optimizer.backward_and_step(loss)
        self.check_loss(loss.detach())
        self.step += 1
        return loss.detach()

    def evaluate(self, epoch: int, loss: float | None) -> None:
        """Measure held-out and test images after an epoch; keep it if it is the best by held-out
        likelihood, or the last where no epoch is selected."""
        found, last = evaluation.evaluate(self.prepared, epoch, loss), not self.config.patience
        if not found.finite and (last or not self.history):  # else an earlier one is best
            raise self.not_finite("scores are not finite", self.step - 1)
        self.history.append(found.entry)
        if loss is None:
            self.before_training = found.named
        tqdm.write(f"{self.data.class_name}  {found}")
        self.since_best += 1
        if last or self.best is None or found.held_out_loss < self.best.held_out_loss:
            self.best, self.since_best = found, 0
            if not last:
                found.state = {name: values.clone() for name, values in self.detector.state_dict().items()}

    def fitted(self, seconds: float) -> checkpoints.Fitted:
        """The detector of the best epoch, its scores, and how they came about."""
        assert self.best is not None, "evaluate comes first"
        evaluation.go_back(self.prepared, self.best)
        scores, held_scores = self.best.scores["test"], self.best.scores["held"]
        if self.data.held_pictures is not None:
            held_scores = whole_scores(held_scores, self.data.held_pictures)
        named = {name: values for name, values in self.best.named.items() if name != WHOLE}
        named |= {f"{name}, before training": values for name, values in self.before_training.items()}
        return checkpoints.Fitted(
            self.detector,
            scores,
            self.data.labels,
            self.data.test_rows,
            held_scores,
            self.history,
            evaluation.result_of(self.prepared, scores, self.best, self.history, seconds),
            named,
            evaluation.simple_scores(self.prepared) if self.prepared.compares else {},
        )

    def check_loss(self, loss: Tensor) -> None:
        """Raise ClassError when the loss is not finite and the last epoch counts: at every step on a CPU, now
        and then on a GPU."""
        now = self.step % LOSS_CHECK == LOSS_CHECK - 1 or self.step + 1 == self.steps
        look = self.prepared.device.type == "cpu" or now
        if look and not self.config.patience and not torch.isfinite(loss):
            raise self.not_finite(f"the loss is {loss.item()}", self.step)

    def not_finite(self, what: str, step: int) -> ClassError:
        """The error of a loss or score that is not finite: features that are not, or the epoch, the learning
        rate, what to try."""
        if fault := features_fault(self.data):
            return ClassError(fault)
        epoch = min(step * self.epochs // self.steps + 1, self.epochs)
        return ClassError(
            f"class {self.data.class_name}: {what} in epoch {epoch} at learning rate {self.rate:g}; "
            "try a lower lr_init, max_grad_norm 1, or normalize power_l2"
        )


# ---------------------------------------------------------------- the script
def make_trainer(
    config: Config, cache: FeatureCache, class_name: str, seed: int, train: TokenSource, test: TokenSource
) -> Trainer:
    """The trainer of one class and seed. What it comes to does not depend on what ran before."""
    return Trainer(prepare(config, cache, class_name, seed, train, test))


def main(config: Config) -> None:
    began = time.time()
    device = utils.set_up(config.device, config.threads)
    given = f"give it with --class_name (now {config.class_name!r})"
    advice = f"train.py fits one class: {given}; main.py fits several"
    if config.class_name == "all" and not config.pretrained and not is_one_class(config):
        raise UserError(advice)
    with runs.writing(config):
        cache = extractor.ensure_features(config, device, functools.partial(make_detector, config))
        class_name, *more = datasets.choose_classes(cache.labels, config.class_name)
        if more:
            raise UserError(advice)
        pair = runs.ClassSeed(class_name, config.seed)
        runs.settle(config, cache, [pair])
        result, kept = runs.finished(config, cache, pair), "kept from an earlier run"
        if result is None:
            train, test = (TokenSource(cache.arrays(split), device) for split in datasets.SPLITS)
            fitted = make_trainer(config, cache, *pair, train, test).run()
            fitted.result |= runs.times(began)
            checkpoints.save_fitted(config, cache, fitted)
            result, kept = fitted.result, "kept"
    path = checkpoints.checkpoint_path(config, *pair)
    print(f"{class_name}: {evaluation.outcome(result)}  {result['seconds']:.0f} s  {kept} in {path}.json")
    if threshold := calibration.of_record(checkpoints.read_record(path), config.false_alarms):
        print(threshold)
        if threshold.warning:
            print(f"warning: {threshold.warning}")


def is_one_class(config: Config) -> bool:
    """Whether one's own pictures are of one class, which needs no name then. Raises UserError."""
    return config.dataset in OWN_PICTURES and len(datasets.images_of(config).labels.classes) == 1


if __name__ == "__main__":
    run_script(main, CONFIG)
