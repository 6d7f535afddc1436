"""How good a detector is: held-out likelihood and test scores after an epoch, and what a class comes to."""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import utils
from backbone.arithmetic import products
from config import ClassError
from detector import baselines, checkpoints
from detector.detector import WHOLE
from detector.preparation import PreparedClass
from images.images import whole_scores
from model import LOG_ROOT_2PI

AUROCS = {"auroc": WHOLE, "latent_auroc": "latent", "likelihood_auroc": "likelihood"}  # of which score


class Evaluation(NamedTuple):
    """What a class has come to after an epoch."""

    entry: dict  # of the history: epoch, losses, ``AUROCS``, NaN where there is no such score
    held: np.ndarray  # whole scores of the held-out images
    test: dict[str, np.ndarray]  # scores of the test images by their names


def scores_of(prepared: PreparedClass, part: str) -> dict[str, np.ndarray]:
    """Scores (n) of the images of a part as the flow now is, by their names: ``Detector.scores``."""
    with products(prepared.device):
        scores = [prepared.detector.scores(*taken) for taken in prepared.taken(part)]
    return {name: torch.cat([each[name] for each in scores]).cpu().numpy() for name in scores[0]}


@torch.no_grad()
def evaluate(prepared: PreparedClass, epoch: int, loss: float | None) -> Evaluation:
    """Measure the held-out normals and the test images as the flow now is, and tell it. loss: of the epoch,
    None before training. Raises ClassError on scores that are not finite."""
    config, data = prepared.config, prepared.data
    prepared.detector.eval()
    prepared.detector.at_start = loss is None and config.identity_start
    with products(prepared.device):
        prepared.refit()
    held, test = scores_of(prepared, "held"), scores_of(prepared, "test")
    if not all(np.isfinite(scores).all() for scores in (*held.values(), *test.values())):
        raise ClassError(
            f"class {data.class_name}: scores are not finite in epoch {epoch} at learning rate "
            f"{config.lr_init:g}; try a lower lr_init, max_grad_norm 1, or normalize power_l2"
        )
    known = "likelihood" in held and len(held[WHOLE])
    held_out = float(held["likelihood"].mean() - LOG_ROOT_2PI) if known else None  # nats per channel, eq. 11
    entry: dict = {"epoch": epoch, "loss": loss, "held_out_loss": held_out}
    for column, name in AUROCS.items():
        entry[column] = utils.auroc(data.labels, test[name]) if name in test else np.nan
    auroc = entry["auroc"] if len(data.test_rows) else None
    told = {"loss": loss, "held-out loss": held_out, "AUROC": auroc}
    figures = "".join(f"  {name} {value:.4f}" for name, value in told.items() if value is not None)
    tqdm.write(f"{data.class_name}  epoch {epoch}{figures}")
    return Evaluation(entry, held[WHOLE], test)


def record_of(prepared: PreparedClass, evaluations: list[Evaluation], seconds: float) -> checkpoints.Record:
    """What a class has come to at the last of its evaluations. seconds: what training took."""
    data, first, last = prepared.data, evaluations[0], evaluations[-1]
    history = [each.entry for each in evaluations]
    trained = [entry["auroc"] for entry in history if entry["epoch"]]  # the start is for comparison
    result = {
        "class": data.class_name,
        "seed": prepared.seed,
        **last.entry,
        **utils.detection_metrics(data.labels, last.test[WHOLE]),
        "best_on_test_auroc": max(trained or [last.entry["auroc"]]),
        "reads_places": prepared.detector.uses_places,
        "n_train": len(data.fit_rows),
        "n_held_out": len(data.held_rows),
        "n_test": len(data.test_rows),
        "n_anomalous": int(data.labels.sum()),
        "seconds": round(seconds, 1),
    }
    flow_scores = {name: scores for name, scores in last.test.items() if name != WHOLE}
    if first.entry["epoch"] == 0:
        flow_scores |= {f"{name}, before training": scores for name, scores in first.test.items()}
    return checkpoints.Record(
        result=result,
        history=history,
        test=checkpoints.Scored(data.test_rows, data.labels, last.test[WHOLE]),
        flow_scores=flow_scores,
        simple_scores=baselines.simple_scores(prepared) if prepared.compares else {},
        held_out_scores=whole_scores(last.held, data.held_pictures),
    )
