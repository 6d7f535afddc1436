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
from torch import Tensor, nn
from tqdm import tqdm

import datasets
import extractor
import utils
from backbone.arithmetic import products
from cache.feature_cache import FeatureCache
from config import OWN_PICTURES, ClassError, Config, UserError
from detector import calibration, checkpoints, evaluation, runs
from detector.class_data import TokenSource, class_data
from detector.detector import WHOLE, make_detector
from detector.preparation import PreparedClass, prepare_data
from images.tiles import whole_scores
from model import loss_per_image

ADAM = {"betas": (0.8, 0.8), "eps": 1e-4, "weight_decay": 1e-5}  # the paper's (docs/method.md, section 4)


class Trainer:
    """Trains the flow of one class: ``run`` is the whole course."""

    def __init__(self, prepared: PreparedClass):
        self.prepared, self.data, self.detector = prepared, prepared.data, prepared.detector
        self.config = config = prepared.config
        self.flow = self.detector.flow
        if config.compile:  # with CUDA graphs where there is a GPU
            mode = "reduce-overhead" if torch.cuda.is_available() else "default"
            self.flow = torch.compile(self.flow, mode=mode)
        self.optimizer = make_optimizer(self.detector.flow, config)
        self.order = np.random.RandomState(prepared.seed)
        self.noise = torch.Generator(prepared.device).manual_seed(prepared.seed)
        per_epoch = prepared.steps_per_epoch
        least = math.ceil(config.least_steps / (per_epoch * config.meta_epochs)) if per_epoch else 0
        self.sub_epochs = max(config.sub_epochs, least)  # per evaluation
        self.epochs = config.meta_epochs * self.sub_epochs if per_epoch else 0
        self.step, self.steps = 0, self.epochs * per_epoch
        self.history: list[dict] = []  # the entries of all evaluations
        self.before_training: dict[str, np.ndarray] = {}  # scores of the test images by name, if taken
        self.best: evaluation.Evaluation | None = None
        self.since_best = 0  # evaluations

    def run(self) -> checkpoints.Fitted:
        """Train, and go back to the best epoch. Raises ClassError on scores that are not finite."""
        start, patience = time.perf_counter(), self.config.patience
        if patience or self.prepared.compares or not self.epochs:
            self.evaluate(0, None)  # training may not improve on the start
        for epoch in range(1, self.epochs + 1):
            loss = self.train_epoch()
            if epoch % self.sub_epochs == 0:
                self.evaluate(epoch, loss)
                if patience and self.since_best >= patience:
                    break
        return self.fitted(time.perf_counter() - start)

    def train_epoch(self) -> float:
        """One epoch of batches in a new order -> their mean loss."""
        self.detector.train()
        batches = self.prepared.epoch(self.order)
        bar = tqdm(batches, self.data.class_name, unit="batch", leave=False, disable=utils.NO_BAR)
        with products(self.prepared.device):
            losses = [self.train_step(batch) for batch in bar]
        return torch.stack(losses).mean().item()

    def train_step(self, batch: np.ndarray) -> Tensor:
        """One Adam step on the loss of a batch -> the loss, detached."""
        config = self.config
        self.optimizer.param_groups[0]["lr"] = learning_rate(config, self.step / self.steps)
        tokens, seen = self.prepared.inputs(batch)
        if config.feature_noise:
            noise = torch.randn(tokens.shape, generator=self.noise, device=tokens.device)
            tokens = tokens + config.feature_noise * noise
        z, log_det = self.flow(tokens, [seen])
        loss = self.prepared.loss_scale * loss_per_image(z, log_det).mean()
        loss.backward()
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(self.detector.flow.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    def evaluate(self, epoch: int, loss: float | None) -> None:
        """Measure held-out and test images after an epoch; keep it if it is the best by held-out
        likelihood, or the last where no epoch is selected."""
        now, last = evaluation.evaluate(self.prepared, epoch, loss), not self.config.patience
        if not now.finite and (last or not self.history):  # else an earlier one is best
            raise ClassError(
                f"class {self.data.class_name}: scores are not finite in epoch {epoch} at learning rate "
                f"{self.config.lr_init:g}; try a lower lr_init, max_grad_norm 1, or normalize power_l2"
            )
        self.history.append(now.entry)
        if loss is None:
            self.before_training = now.test
        tqdm.write(f"{self.data.class_name}  {now}")
        self.since_best += 1
        if last or self.best is None or now.held_out_loss < self.best.held_out_loss:
            self.best, self.since_best = now, 0
            if not last:
                now.state = {name: values.clone() for name, values in self.detector.state_dict().items()}

    def fitted(self, seconds: float) -> checkpoints.Fitted:
        """The detector of the best epoch, its scores, and how they came about."""
        assert self.best is not None, "evaluate comes first"
        if self.best.state:
            self.detector.load_saved(self.best.state)
        held_scores, data = self.best.held, self.data
        if data.held_pictures is not None:
            held_scores = whole_scores(held_scores, data.held_pictures)
        before = {f"{name}, before training": scores for name, scores in self.before_training.items()}
        return checkpoints.Fitted(
            detector=self.detector,
            scores=self.best.test[WHOLE],
            labels=data.labels,
            test_rows=data.test_rows,
            held_scores=held_scores,
            history=self.history,
            result=evaluation.result_of(self.prepared, self.best, self.history, seconds),
            flow_scores={name: scores for name, scores in self.best.test.items() if name != WHOLE} | before,
            simple_scores=evaluation.simple_scores(self.prepared) if self.prepared.compares else {},
        )


def make_optimizer(flow: nn.Module, config: Config) -> torch.optim.Adam:
    return torch.optim.Adam(flow.parameters(), lr=config.lr_init, fused=True, **ADAM)


def learning_rate(config: Config, progress: float) -> float:
    """The learning rate after the share ``progress`` (0 to 1) of all steps."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr_init * (cosine if config.lr_schedule == "cosine" else 1.0)


# ---------------------------------------------------------------- the script
def make_trainer(
    config: Config, cache: FeatureCache, class_name: str, seed: int, train: TokenSource, test: TokenSource
) -> Trainer:
    """The trainer of one class and seed. What it comes to does not depend on what ran before. Raises
    ClassError and UserError: ``class_data``, ``prepare_data``."""
    data = class_data(config, cache.labels, class_name, seed, train, test)
    return Trainer(prepare_data(config, data, cache.meta, seed, train.device))


def main(config: Config) -> None:
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
            checkpoints.save_fitted(config, cache, fitted)
            result, kept = fitted.result, "kept"
    path = checkpoints.checkpoint_path(config, *pair)
    record = checkpoints.read_record(path)
    print(f"{class_name}: {evaluation.outcome(result)}  {result['seconds']:.0f} s  {kept} in {path}.json")
    if threshold := calibration.of_held_out(record.held_out_scores, config.false_alarms):
        print(threshold)
        if threshold.warning:
            print(f"warning: {threshold.warning}")


def is_one_class(config: Config) -> bool:
    """Whether one's own pictures are of one class, which needs no name then. Raises UserError."""
    return config.dataset in OWN_PICTURES and len(datasets.images_of(config).labels.classes) == 1


if __name__ == "__main__":
    run_script(main, CONFIG)
