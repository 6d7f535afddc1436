"""How good a detector is: held-out likelihood and test scores after an epoch, and what a class comes to."""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

import utils
from backbone.arithmetic import products
from detector import baselines
from detector.class_data import evenly, in_batches
from detector.preparation import PLACE_BATCH, PLACE_SAMPLE, WHOLE, PreparedClass

LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)  # the constant of a Gaussian, nats per channel


@dataclasses.dataclass
class Evaluation:
    """What a class has come to after an epoch."""

    entry: dict  # of the history: epoch, loss, held_out_loss where images are held out, AUROCs by score
    scores: dict[str, np.ndarray]  # of held-out and test images, by the knob's score; may not be finite
    named: dict[str, np.ndarray]  # scores of the test images by their names
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
        tested = f"  AUROC {self.entry['auroc']:.4f}" if len(self.scores["test"]) else ""
        return f"epoch {self.entry['epoch']}  {trained}{held}{tested}"


@torch.no_grad()
def evaluate(prepared: PreparedClass, epoch: int, loss: float | None) -> Evaluation:
    """Measure the held-out normals and the test images as the flow now is. loss: of the epoch, None before
    training."""
    prepared.detector.eval()
    with products(prepared.device):
        held, test = (prepared.scores(part) for part in ("held", "test"))
    entry: dict = {"epoch": epoch, "loss": loss}
    if "likelihood" in held and len(held[WHOLE]):
        usual = torch.from_numpy(prepared.usual["held"]).to(prepared.device)
        entry["held_out_loss"] = held["likelihood"][usual].mean().item() - LOG_ROOT_2PI
    finite = all(bool(each.isfinite().all()) for found in (held, test) for each in found.values())
    if not finite:
        entry["held_out_loss"] = float("inf")
    named = {name: values.cpu().numpy() for name, values in test.items()}
    own = {"held": held[WHOLE].cpu().numpy(), "test": named[WHOLE]}
    entry["auroc"] = utils.auroc(prepared.data.labels, np.nan_to_num(own["test"]))
    for name in ("latent", "likelihood"):
        scores = named.get(name, np.full(len(own["test"]), np.nan))
        known = name in named
        entry[f"{name}_auroc"] = utils.auroc(prepared.data.labels, np.nan_to_num(scores)) if known else np.nan
    return Evaluation(entry, own, named, finite)


def go_back(prepared: PreparedClass, best: Evaluation) -> None:
    """Make the detector that of an evaluation."""
    if best.state:
        prepared.detector.load_saved(best.state)


def result_of(
    prepared: PreparedClass, scores: np.ndarray, best: Evaluation, history: list[dict], seconds: float
) -> dict:
    """The result of a class, as tables and its record have it. scores (n): of the test images, all finite;
    seconds: what training took."""
    data = prepared.data
    # the start, where it is only looked at for comparison, is no epoch that could be reported
    reportable = [entry for entry in history if entry["epoch"] or prepared.config.patience] or history
    return {
        "class": data.class_name,
        "seed": prepared.seed,
        **utils.detection_metrics(data.labels, scores),
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
    on the semantic token, on the power-normalised joint token, and on places where they are read."""
    data = prepared.data
    normal = np.sort(np.concatenate([data.fit_rows, data.held_rows]))
    scores = baselines.semantic_scores(data.train.semantic(normal), data.test.semantic(data.test_rows))
    if prepared.joint:
        train = torch.cat([prepared.joint["fit"], prepared.joint["held"]])
        scores["Gaussian, joint token"] = baselines.gaussian(train, prepared.joint["test"])
        scores["kNN, joint token"] = baselines.neighbours(train, prepared.joint["test"])
    if prepared.detector.uses_places:
        reference = data.train.one_on_cpu("places", evenly(normal, PLACE_SAMPLE))
        for name, fitted_to in baselines.PLACES.items():
            score, batches = fitted_to(reference), in_batches(data.test_rows, PLACE_BATCH)
            scores[name] = torch.cat([score(data.test.one_on_cpu("places", b)) for b in batches]).numpy()
    return scores
