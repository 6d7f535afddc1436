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
from detector.preparation import PLACE_BATCH, PLACE_SAMPLE, PreparedClass

LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)  # the constant of a Gaussian, nats per channel


@dataclasses.dataclass
class Evaluation:
    """What a class has come to after an epoch."""

    entry: dict  # of the history: epoch, loss, held_out_loss where images are held out, AUROCs by score
    scores: dict[str, np.ndarray]  # of held-out and test images, by the knob's score; may not be finite
    flow_scores: dict[str, np.ndarray]  # as ``Fitted.flow_scores``
    finite: bool  # whether all likelihoods are; else the held-out loss is infinite
    reference: Tensor  # the detector's
    # state of the flow, where it may be gone back to
    flow: dict[str, Tensor] = dataclasses.field(default_factory=dict)

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
    detector = prepared.detector.eval()
    with products(prepared.device):
        latents = {part: prepared.measure(part) for part in ("held", "test")}
        if prepared.config.score == "latent_knn":
            detector.reference = prepared.measure("fit").z.half()
        energies = {part: detector.energy(each, prepared.near.get(part)) for part, each in latents.items()}
        nll = {part: detector.score(latents[part], "likelihood", each) for part, each in energies.items()}
        image = {part: detector.score(latents[part], None, each) for part, each in energies.items()}
        scores = {part: each + prepared.unusual_places.get(part, 0.0) for part, each in image.items()}
        flow = detector.flow_loss(latents["test"])
    entry: dict = {"epoch": epoch, "loss": loss}
    if len(nll["held"]):
        usual = torch.from_numpy(prepared.usual["held"]).to(prepared.device)
        entry["held_out_loss"] = nll["held"][usual].mean().item() - LOG_ROOT_2PI
    finite = all(bool(each.isfinite().all()) for each in (*nll.values(), *scores.values()))
    if not finite:
        entry["held_out_loss"] = float("inf")
    likelihood = image["test"] if prepared.config.score == "joined" else nll["test"]
    reported = {"latent": detector.score(latents["test"], "latent"), "likelihood": likelihood, "flow": flow}
    by_name = {name: values.cpu().numpy() for name, values in reported.items()}
    own = {part: values.cpu().numpy() for part, values in scores.items()}
    titled = {"auroc": own["test"]} | {f"{name}_auroc": values for name, values in by_name.items()}
    for title, values in titled.items():
        entry[title] = utils.auroc(prepared.data.labels, np.nan_to_num(values))
    flow_scores = {"likelihood": by_name["likelihood"]}
    if prepared.config.base == "kernel":
        flow_scores["flow alone"] = by_name["flow"]
    return Evaluation(entry, own, flow_scores, finite, detector.reference)


def go_back(prepared: PreparedClass, best: Evaluation) -> None:
    """Make the detector that of an evaluation."""
    if best.flow:
        prepared.detector.flow.load_state_dict(best.flow)
    prepared.detector.reference = best.reference


def result_of(
    prepared: PreparedClass, scores: np.ndarray, best: Evaluation, history: list[dict], seconds: float
) -> dict:
    """The result of a class, as tables and its record have it. scores (n): of the test images, all finite;
    seconds: what training took."""
    data = prepared.data
    return {
        "class": data.class_name,
        "seed": prepared.seed,
        **utils.detection_metrics(data.labels, scores),
        "best_on_test_auroc": max(entry["auroc"] for entry in history),
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
    on the semantic token, on the joint token that the flow starts from (nearest neighbours there: of the
    images that the flow is fitted to, as its kernels), and on places where they are read."""
    data = prepared.data
    normal = np.sort(np.concatenate([data.fit_rows, data.held_rows]))
    scores = baselines.semantic_scores(data.train.semantic(normal), data.test.semantic(data.test_rows))
    if prepared.joint:
        train = torch.cat([prepared.joint["fit"], prepared.joint["held"]])
        scores["Gaussian, flow's input"] = baselines.gaussian(train, prepared.joint["test"])
        train, test = (  # an image that is fitted to lies in its own directions: nothing is outside
            torch.cat([tokens, outside.sqrt().unsqueeze(1)], 1)
            for tokens, outside in (prepared.tokens["fit"], prepared.tokens["test"])
        )
        train[:, -1] = 0
        scores["kNN, flow's input"] = baselines.neighbours(train, test)
    if prepared.detector.uses_places:
        reference = data.train.one_on_cpu("places", evenly(normal, PLACE_SAMPLE))
        for name, fitted_to in baselines.PLACES.items():
            score, batches = fitted_to(reference), in_batches(data.test_rows, PLACE_BATCH)
            scores[name] = torch.cat([score(data.test.one_on_cpu("places", b)) for b in batches]).numpy()
    return scores
