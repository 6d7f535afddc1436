"""Pictures of a run: score histograms, ROC of all classes, curves over epochs, and the images at both ends of
the scores."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no screen is needed
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_curve

import datasets
import detector
import feature_cache
from config import Config, UserError

SHEET = 12  # images per row of a contact sheet
TILE = 96  # pixels


def draw_all(config: Config, cache: feature_cache.FeatureCache, classes: list[str], folder: Path) -> None:
    """Draw every picture of a run (first seed) into ``folder``/figures from what its classes left behind.

    Contact sheets need the raw images: with ``pretrained`` there are none.
    """
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    records = dict(detector.trained_records(config, classes))
    draw_roc(records, figures / "roc.png")
    draw_curves(records, figures / "epochs.png")
    for name, record in records.items():
        draw_histogram(name, record["test"], config.nbins1, config.nbins2, figures / f"scores-{name}.png")
    if config.pretrained:
        return  # the raw images need not be there
    try:
        images = datasets.images_of(config)
        if images.fingerprint() != cache.meta["image_list"]:
            raise UserError("the images have changed since they were extracted")
        for name, record in records.items():
            draw_sheet(images, record["test"], figures / f"extremes-{name}.png")
    except UserError as mistake:
        print(f"no contact sheets: {mistake}")


def draw_histogram(name: str, test: dict, nbins_normal: int, nbins_anomalous: int, path: Path) -> None:
    """Densities of the scores of normal and anomalous test images."""
    scores, labels = np.array(test["scores"]), np.array(test["labels"])
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    span = tuple(np.quantile(scores, [0, 0.995]))
    for label, text, bins in ((0, "normal", nbins_normal), (1, "anomalous", nbins_anomalous)):
        if (labels == label).any():
            axes.hist(scores[labels == label], bins=bins, range=span, density=True, alpha=0.6, label=text)
    axes.set(
        title=f"normal class: {name}", xlabel="anomaly score (cut at its 99.5 % quantile)", ylabel="density"
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_roc(records: dict[str, dict], path: Path) -> None:
    figure = Figure((6, 6), layout="constrained")
    axes = figure.subplots()
    for name, record in records.items():
        labels = np.array(record["test"]["labels"])
        if len(np.unique(labels)) == 2:
            fpr, tpr, _ = roc_curve(labels, record["test"]["scores"])
            axes.plot(fpr, tpr, label=f"{name}  {record['result']['auroc']:.3f}")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    axes.set(
        xlabel="false positive rate",
        ylabel="true positive rate",
        title="ROC, normal class and AUROC",
        aspect="equal",
    )
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_curves(records: dict[str, dict], path: Path) -> None:
    """Test AUROC and the loss (held-out where there is one) over epochs; the reported epoch is marked."""
    figure = Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, record in records.items():
        epochs = [entry["epoch"] for entry in record["history"]]
        (line,) = left.plot(epochs, [entry["auroc"] for entry in record["history"]], marker=".", label=name)
        left.plot(record["result"]["epoch"], record["result"]["auroc"], marker="o", color=line.get_color())
        losses = [entry.get("held_out_loss", entry["loss"]) for entry in record["history"]]
        right.plot(epochs, losses, marker=".", color=line.get_color())
    left.set(xlabel="epoch", ylabel="test AUROC (circle: reported)")
    right.set(xlabel="epoch", ylabel="loss, nats per channel (held-out if any)")
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_sheet(images: datasets.ImageSet, test: dict, path: Path) -> None:
    """A contact sheet: the least and the most anomalous test images, truly normal ones first, then truly
    anomalous ones."""
    rows, labels, scores = (np.array(test[key]) for key in ("rows", "labels", "scores"))
    ranked = [rows[labels == label][np.argsort(scores[labels == label])] for label in (0, 1)]
    strips = [strip for order in ranked for strip in (order[:SHEET], order[::-1][:SHEET])]
    titles = (
        "normal, lowest scores",
        "normal, highest scores",
        "anomalous, lowest scores",
        "anomalous, highest scores",
    )
    figure = Figure((SHEET * 0.8, 4.2), layout="constrained")
    for axes, title, strip in zip(figure.subplots(4, 1), titles, strips):
        tiles = [Image.fromarray(images.read("test", int(row))).resize((TILE, TILE)) for row in strip]
        if tiles:
            axes.imshow(np.concatenate([np.asarray(tile) for tile in tiles], 1))
        axes.set_title(title, fontsize="small", loc="left")
        axes.axis("off")
    figure.savefig(path, dpi=100)
