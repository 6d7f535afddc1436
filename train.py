"""Fit the flow to one normal class and report its detection of all the others, epoch by epoch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import from_command_line, run_script

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__)

import itertools
import math
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import datasets
import extractor
import utils
from backbone.arithmetic import products
from cache.feature_cache import FeatureCache
from config import ClassError, Config, UserError
from detector import calibration, checkpoints, runs
from detector.class_data import TokenSource, class_data, token_sources
from detector.detector import make_detector
from detector.evaluation import evaluate, record_of
from detector.preparation import PreparedClass, prepare_data
from model import loss_per_image
from reporting.report import COLUMNS

ADAM = {"betas": (0.8, 0.8), "eps": 1e-4, "weight_decay": 1e-5, "fused": True}  # docs/method.md, section 4


def train_epochs(prepared: PreparedClass) -> Iterator[tuple[int, float]]:
    """Train the flow of one class (docs/method.md, eq. 11) -> each epoch's number, from 1, and mean loss."""
    config, flow = prepared.config, prepared.detector.flow
    if config.compile:  # with CUDA graphs where there is a GPU
        flow = torch.compile(flow, mode="reduce-overhead" if torch.cuda.is_available() else "default")
    optimizer = torch.optim.Adam(flow.parameters(), lr=config.lr_init, **ADAM)
    order = np.random.RandomState(prepared.seed)
    generator = torch.Generator(prepared.device).manual_seed(prepared.seed)
    epochs, _ = count_epochs(prepared)

    for epoch in range(epochs):
        prepared.detector.train()
        bar = tqdm(prepared.epoch(order), prepared.data.class_name, leave=False, disable=utils.NO_BAR)
        losses = []
        with products(prepared.device):
            for step, batch in enumerate(bar, epoch * prepared.steps_per_epoch):
                progress = step / (epochs * prepared.steps_per_epoch)
                share = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1.0
                optimizer.param_groups[0]["lr"] = config.lr_init * share
                tokens, seen = prepared.inputs(batch)
                if config.feature_noise:
                    noise = torch.randn(tokens.shape, generator=generator, device=tokens.device)
                    tokens = tokens + config.feature_noise * noise
                z, log_det = flow(tokens, [seen])
                loss = prepared.loss_scale * loss_per_image(z, log_det).mean()
                loss.backward()
                if config.max_grad_norm:
                    nn.utils.clip_grad_norm_(flow.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        yield epoch + 1, torch.stack(losses).mean().item() / prepared.loss_scale


def count_epochs(prepared: PreparedClass) -> tuple[int, int]:
    """How many epochs there are in all, and for each evaluation: as many as least_steps takes."""
    config, per_epoch = prepared.config, prepared.steps_per_epoch
    if not per_epoch:  # there is nothing to train
        return 0, 1
    sub_epochs = max(config.sub_epochs, math.ceil(config.least_steps / (per_epoch * config.meta_epochs)))
    return config.meta_epochs * sub_epochs, sub_epochs


def train(prepared: PreparedClass) -> checkpoints.Record:
    """Train the flow of one class, and evaluate it. Raises ClassError on scores that are not finite."""
    began, (epochs, sub_epochs) = time.perf_counter(), count_epochs(prepared)
    start, evaluations = [(0, None)] if prepared.compares or not epochs else [], []
    for epoch, loss in itertools.chain(start, train_epochs(prepared)):
        if epoch % sub_epochs == 0:
            evaluations.append(evaluate(prepared, epoch, loss))
    return record_of(prepared, evaluations, time.perf_counter() - began)


def outcome(result: dict) -> str:
    """What came out of a class, in words: its metrics, or that there was nothing to test on."""
    epoch = f"epoch {result['epoch']}"
    if not result["n_test"]:
        return f"fitted to {result['n_train']} normal images, no test images ({epoch})"
    metrics = "  ".join(f"{name.upper()} {result[name]:.4f}" for name in utils.METRICS)
    return f"{metrics}  ({epoch}, best on test {result['best_on_test_auroc']:.4f})"


# ---------------------------------------------------------------- one class with one seed
def prepare(
    config: Config, cache: FeatureCache, sources: list[TokenSource], class_name: str, seed: int
) -> PreparedClass:
    """A class ready for training, with its flow. What it comes to does not depend on what ran before. Raises
    ClassError and UserError: ``class_data``, ``prepare_data``."""
    data = class_data(config, cache.labels, class_name, seed, *sources)
    return prepare_data(config, data, cache.meta, seed, sources[0].device)


def fit(config: Config, cache: FeatureCache, sources: list[TokenSource], pair: runs.ClassSeed) -> dict:
    """Fit one class with one seed and keep what comes of it -> its result. One that cannot be fitted has a
    result with the reason and without figures."""
    try:
        prepared = prepare(config, cache, sources, *pair)
        record = train(prepared)
    except ClassError as mistake:
        reason = str(mistake).removeprefix(f"class {pair.class_name}: ")
        nothing = dict.fromkeys(COLUMNS, math.nan)
        return {"class": pair.class_name, "seed": pair.seed, **nothing, "reason": reason}
    checkpoints.save_fitted(config, cache.meta, prepared.detector, record)
    return record.result


def fit_there(config: Config, cache: FeatureCache, threads: int, pair: runs.ClassSeed) -> dict:
    """``fit`` in another process, perhaps on another machine."""
    device = utils.set_up(config.device, threads)
    torch.cuda.empty_cache()  # of the pair before: tokens stay on a GPU where they fit into what is free
    return fit(config, cache, token_sources(cache, device), pair)


def main(config: Config) -> None:
    device, folder = utils.set_up(config.device, config.threads), checkpoints.run_folder(config.modelname)
    with runs.writing(folder):
        cache = extractor.ensure_features(config, device, partial(make_detector, config), one_class=True)
        (name,) = datasets.choose_classes(cache.labels, config.class_name)
        pair = runs.ClassSeed(name, config.seed)
        result, kept = runs.settle(config, cache, [pair]).get(pair), "kept from an earlier run"
        if result is None:
            result, kept = fit(config, cache, token_sources(cache, device), pair), "kept"
    if "reason" in result:
        raise UserError(f"class {name}: {result['reason']}")
    path = checkpoints.checkpoint_path(folder, *pair)
    print(f"{name}: {outcome(result)}  {result['seconds']:.0f} s  {kept} in {path}.json")
    record = checkpoints.read_record(path)
    if len(record.held_out_scores):
        print(calibration.threshold(record.held_out_scores, config.false_alarms))
        if (fitted := record.config["false_alarms"]) != config.false_alarms:
            asked = f"give it --false_alarms {config.false_alarms:g}"
            print(f"predict.py takes the rate of the fit, {fitted:g}: {asked}")


if __name__ == "__main__":
    run_script(main, CONFIG)
