"""How good a detector is: held-out likelihood and test scores after an epoch, and what a class comes to."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

import utils
from backbone.arithmetic import products
from detector import baselines
from detector.class_data import evenly, in_batches
from detector.detector import WHOLE, PlaceFlow
from detector.preparation import PLACE_BATCH, PLACE_SAMPLE, PreparedClass
from model import LOG_ROOT_2PI


@dataclasses.dataclass
class Evaluation:
    """What a class has come to after an epoch."""

    entry: dict  # of the history: epoch, loss, held_out_loss where images are held out, AUROCs by score
    held: np.ndarray  # whole scores of the held-out images
    test: dict[str, np.ndarray]  # scores of the test images by their names
    finite: bool  # whether all scores are; else the held-out loss is infinite
    # of the detector, where it may be gone back to
    state: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def held_out_loss(self) -> float:
        """Nats per channel; NaN where nothing is held out."""
        return self.entry.get("held_out_loss", float("nan"))

    def __str__(self) -> str:
        loss = self.entry["loss"]
        trained = "before training" if loss is None else f"loss {loss:.4f}"
        held = f"  held-out loss {self.held_out_loss:.4f}" if "held_out_loss" in self.entry else ""
        tested = f"  AUROC {self.entry['auroc']:.4f}" if len(self.test[WHOLE]) else ""
        return f"epoch {self.entry['epoch']}  {trained}{held}{tested}"


@torch.no_grad()
def scores_of(prepared: PreparedClass, part: str) -> dict[str, np.ndarray]:
    """Scores (n) of the images of a part as the flow now is, by their names: ``Detector.scores``."""
    _, rows = prepared.data.part(part)
    batches = in_batches(np.arange(len(rows)), prepared.at_once)
    with products(prepared.device):
        scores = [prepared.detector.scores(*prepared.taken(part, batch)) for batch in batches]
    return {name: torch.cat([each[name] for each in scores]).cpu().numpy() for name in scores[0]}


@torch.no_grad()
def evaluate(prepared: PreparedClass, epoch: int, loss: float | None) -> Evaluation:
    """Measure the held-out normals and the test images as the flow now is. loss: of the epoch, None before
    training."""
    prepared.detector.eval()
    prepared.detector.at_start = loss is None and prepared.config.identity_start
    with products(prepared.device):
        prepared.refit()
    held, test = scores_of(prepared, "held"), scores_of(prepared, "test")
    entry: dict = {"epoch": epoch, "loss": loss}
    if "likelihood" in held and len(held[WHOLE]):
        entry["held_out_loss"] = float(held["likelihood"].mean() - LOG_ROOT_2PI)  # as of training, eq. 11
    finite = all(np.isfinite(scores).all() for scores in (*held.values(), *test.values()))
    if not finite:
        entry["held_out_loss"] = float("inf")
    for column, name in (("auroc", WHOLE), ("latent_auroc", "latent"), ("likelihood_auroc", "likelihood")):
        known = name in test
        entry[column] = utils.auroc(prepared.data.labels, np.nan_to_num(test[name])) if known else np.nan
    return Evaluation(entry, held[WHOLE], test, finite)


def result_of(prepared: PreparedClass, best: Evaluation, history: list[dict], seconds: float) -> dict:
    """The result of a class, as tables and its record have it, from the evaluation that counts, whose scores
    are finite. seconds: what training took."""
    data = prepared.data
    # the start, where it is only looked at for comparison, is no epoch that could be reported
    reportable = [entry for entry in history if entry["epoch"] or prepared.config.patience] or history
    return {
        "class": data.class_name,
        "seed": prepared.seed,
        **utils.detection_metrics(data.labels, best.test[WHOLE]),
        "best_on_test_auroc": max(entry["auroc"] for entry in reportable),
        **{key: value for key, value in best.entry.items() if key != "auroc"},
        "reads_places": prepared.detector.uses_places,
        "n_train": len(data.fit_rows),
        "n_held_out": len(data.held_rows),
        "n_test": len(data.test_rows),
        "n_anomalous": int(data.labels.sum()),
        "seconds": round(seconds, 1),
    }


def outcome(result: dict) -> str:
    """What came out of a class, in words: its metrics, or that there was nothing to test on."""
    epoch = f"epoch {result['epoch']}"
    if not result["n_test"]:
        return f"fitted to {result['n_train']} normal images, no test images ({epoch})"
    metrics = "  ".join(f"{metric.title} {result[name]:.4f}" for name, metric in utils.METRICS.items())
    return f"{metrics}  ({epoch}, best on test {result['best_on_test_auroc']:.4f})"


@torch.no_grad()
def simple_scores(prepared: PreparedClass) -> dict[str, np.ndarray]:
    """Scores of simple detectors (baselines.py) on the test images, fitted to all normal training images:
    on the semantic token, on the power-normalised joint token, on places where they are read;
    and of places or of the image as the spread of the class has it, which chooses for the flow, too."""
    data = prepared.data
    normal = np.sort(np.concatenate([data.fit_rows, data.held_rows]))
    scores = baselines.semantic_scores(data.train.semantic(normal), data.test.semantic(data.test_rows))
    if prepared.joint:
        train = torch.cat([prepared.joint["fit"], prepared.joint["held"]])
        scores["Gaussian, joint token"] = baselines.gaussian(train, prepared.joint["test"])
        scores["kNN, joint token"] = baselines.neighbours(train, prepared.joint["test"])
    if prepared.detector.uses_places:
        reference = data.train.one("places", evenly(normal, PLACE_SAMPLE), on_cpu=True)
        batches = in_batches(data.test_rows, PLACE_BATCH)
        for name, fitted_to in baselines.PLACES.items():
            score = fitted_to(reference)
            parts = [score(data.test.one("places", batch, on_cpu=True)) for batch in batches]
            scores[name] = torch.cat(parts).numpy()
    if isinstance(prepared.detector, PlaceFlow):
        chosen = "PaDiM-like, places" if prepared.detector.uses_places else "kNN, joint token"
        scores["PaDiM-like or kNN, by spread"] = scores[chosen]
    return scores
