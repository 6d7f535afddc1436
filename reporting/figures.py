"""Five pictures of a run: of each class a histogram of its scores, and the test images at both ends of them
with their heat maps; of all classes the ROC, curves over the epochs, and the flow beside the simple
detectors. Those of one seed show the first."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from sklearn.metrics import roc_curve

import datasets
from backbone.token_grid import place_grid_of
from cache.feature_cache import FeatureCache
from config import UserError
from detector import heat_map
from detector.calibration import Threshold
from detector.checkpoints import Record, Scored
from detector.detector import place_maps
from reporting.findings import Left
from reporting.overlays import overlaid
from reporting.report import Summary, table_rows
from reporting.tables import shorten
from shell.files import file_name, whole_file

SHEET = 8  # images per row of a contact sheet
SIDE = 160  # pixels of the longer side of such an image
BINS = (50, 100)  # of the histograms of normal and anomalous images
MOST_IN_LEGEND = 20  # names
NAMES_AS_THEY_ARE = {"text.parse_math": False}  # $ begins no formula


class Picture(NamedTuple):
    path: Path
    caption: str


@rc_context(NAMES_AS_THEY_ARE)
def draw_class(
    cache: FeatureCache, images: datasets.ImageSet | None, left: Left, folder: Path
) -> list[Picture]:
    """Draw a class's pictures into ``folder``; the contact sheet needs the raw images."""
    name, tested, pictures = left.class_name, len(left.first.test.scores), []
    if tested or left.threshold:
        path = folder / f"scores-{file_name(name)}.png"
        pictures.append(saved(histogram(left.first, left.threshold), path, f"Scores of {name}"))
    if images and tested:
        path = folder / f"extremes-{file_name(name)}.jpg"
        try:
            sheet = contact_sheet(cache, images, left)
            pictures.append(saved(sheet, path, f"Test images of {name} at both ends of the scores"))
        except UserError as mistake:  # an image that can no longer be read
            print(f"no contact sheet of {name}: {mistake}")
    return pictures


@rc_context(NAMES_AS_THEY_ARE)
def draw_run(summary: Summary, records: dict[str, Record], folder: Path) -> list[Picture]:
    """Draw the pictures of all classes; one that would be empty is left out. records: of each class's first
    seed."""
    pictures = [saved(curves(records), folder / "epochs.png", "Losses and test AUROC over the epochs")]
    both = {name: record for name, record in records.items() if len(set(record.test.labels)) == 2}
    if both:
        caption = "AUROC of the flow (± over seeds) and of the simple detectors"
        pictures.append(saved(methods(summary), folder / "methods.png", caption))
        pictures.append(saved(roc(both), folder / "roc.png", "ROC of every class"))
    return pictures


def saved(figure: Figure, path: Path, caption: str) -> Picture:
    """Write a figure as PNG or JPEG, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:])
    return Picture(path, caption)


def legend(owner: Axes | Figure, handles: list, labels: list[str], **options) -> None:
    """A legend in which a leading _ hides no name; none where it would fill the figure."""
    if len(handles) <= MOST_IN_LEGEND:
        owner.legend(handles, [f" {label}" for label in labels], fontsize="small", **options)


# ---------------------------------------------------------------- of a class
def histogram(record: Record, threshold: Threshold | None) -> Figure:
    """Counts of the scores of normal and anomalous test images (of the held-out normal ones where there is no
    test), with the threshold. The axis is linear around the normal images and logarithmic far from them."""
    tested = len(record.test.scores) > 0
    scores = record.test.scores if tested else record.held_out_scores
    labels = record.test.labels if tested else np.zeros(len(scores))
    normal = scores[labels == 0] if (labels == 0).any() else scores
    low, centre, high = np.quantile(normal, [0.05, 0.5, 0.95])
    width = max(high - low, 1e-9 * float(np.ptp(scores)), 1e-12)
    places = np.arcsinh((scores - centre) / width)
    figure = Figure((7, 4.8), layout="constrained")
    axes, texts = figure.subplots(), []
    handles: list = []
    span = (places.min() - 0.01, places.max() + 0.01)
    kinds = ("normal" if tested else "held-out normal", "anomalous")
    for label, (kind, bins) in enumerate(zip(kinds, BINS)):
        own = labels == label
        if not own.any():
            continue
        handles.append(axes.hist(places[own], bins, range=span, alpha=0.6, color=f"C{label}")[2])
        above = f", {(scores[own] > threshold.score).mean():.1%} above" if threshold else ""
        texts.append(f"{kind}: {own.sum()} images{above}")
    if threshold:
        at = np.arcsinh((threshold.score - centre) / width)
        handles.append(axes.axvline(at, color="black", linestyle="--", linewidth=1))
        rates = f"{threshold.expected:.1%} ({threshold.low:.1%} to {threshold.high:.1%})"
        texts.append(f"threshold {threshold.score:.4g}: false alarms expected {rates}")
    ticks = np.linspace(*span, 8)
    axes.set_xticks(ticks, [f"{centre + width * np.sinh(tick):.3g}" for tick in ticks])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="anomaly score (logarithmic far from the normal images)", ylabel="images per bin")
    name = shorten(record.result["class"], 50)
    axes.set_title(f"normal class: {name}, seed {record.result['seed']}", fontsize="medium")
    legend(figure, handles, texts, loc="outside lower center")
    return figure


def strips(test: Scored) -> dict[str, np.ndarray]:
    """{heading: positions in the test set} of the least and the most anomalous images, truly normal ones
    first; each strip from its end of the scores inwards. A label without images has none."""
    ranked = np.argsort(test.scores, kind="stable")
    found: dict[str, np.ndarray] = {}
    for label, kind in ((0, "normal"), (1, "anomalous")):
        own = ranked[test.labels[ranked] == label]
        if len(own):
            found |= {f"{kind}, lowest scores": own[:SHEET], f"{kind}, highest scores": own[::-1][:SHEET]}
    return found


def contact_sheet(cache: FeatureCache, images: datasets.ImageSet, left: Left) -> Figure:
    """The strips, every image with its score, what it shows and its name; below it its heat map where the
    score reads places."""
    test = left.first.test
    lines = strips(test)
    height = 3.6 if left.detector else 2.2
    figure = Figure((1.4 * SHEET, height * len(lines)), layout="constrained")
    for axes, (heading, positions) in zip(figure.subplots(len(lines), 1, squeeze=False)[:, 0], lines.items()):
        rows, scores = test.rows[positions], test.scores[positions]
        maps = place_maps(left.detector, cache, rows) if left.detector else [None] * len(rows)
        grid = place_grid_of(cache.fields) if left.detector else None
        tiles = [tile(images.read("test", int(row)), places, grid) for row, places in zip(rows, maps)]
        axes.imshow(np.hstack(tiles))
        for place, (row, score) in enumerate(zip(rows, scores)):
            words = (f"{score:.4g}", *described(images.labels, row))
            shown = "\n".join(shorten(word, 18) for word in words).encode(errors="replace").decode()
            at = (place * SIDE, len(tiles[0]))
            axes.text(*at, shown, fontsize="x-small", verticalalignment="top")
        axes.set_xlim(0, SHEET * SIDE)
        axes.set_title(heading, fontsize="medium")
        axes.axis("off")
    return figure


def tile(pixels: np.ndarray, places: np.ndarray | None, grid: tuple[int, int] | None) -> np.ndarray:
    """An image in its own shape in a square of SIDE pixels, and, where the scores of its places are given,
    the same under its heat map below it."""
    shown = [Image.fromarray(pixels)]
    if places is not None and grid:
        shown = overlaid(pixels, heat_map.of_places(places, grid, pixels.shape[:2]), SIDE)
    return np.vstack([np.asarray(ImageOps.pad(picture, (SIDE, SIDE), color="white")) for picture in shown])


def described(labels: datasets.Labels, row: int) -> tuple[str, str]:
    """What a test image shows (its class, or what is wrong with it, or else its folder), and its name."""
    split = labels.test
    category, path = split.category[row], Path(split.names[row])
    known = split.kind[row] or (labels.classes[category] if category != datasets.OTHER else path.parent.name)
    return known, path.name


# ---------------------------------------------------------------- of all classes
def roc(records: dict[str, Record]) -> Figure:
    """The ROC curves of classes whose test images are of both labels."""
    figure = Figure((6.5, 6), layout="constrained")
    axes, handles, texts = figure.subplots(), [], []
    for name, record in records.items():
        fpr, tpr, _ = roc_curve(record.test.labels, record.test.scores)
        handles += axes.plot(fpr, tpr)
        texts.append(f"{name}  {record.result['auroc']:.3f}")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axes.set_title("ROC: normal class and AUROC", fontsize="medium")
    legend(axes, handles, texts)
    return figure


def curves(records: dict[str, Record]) -> Figure:
    """The test AUROC over the epochs, with the reported epoch marked, and the loss on training batches
    (dashed) and on held-out images (solid)."""
    figure = Figure((7, 7), layout="constrained")
    (above, below), handles = figure.subplots(2, 1), []
    for number, record in enumerate(records.values()):
        history, result, colour = record.history, record.result, f"C{number % 10}"
        epochs, loss, held, auroc = (column(history, x) for x in ("epoch", "loss", "held_out_loss", "auroc"))
        below.plot(epochs, loss, "--", marker=".", color=colour, linewidth=1)
        handles += below.plot(epochs, held, marker=".", color=colour)
        above.plot(epochs, auroc, marker=".", color=colour)
        above.plot(result["epoch"], result["auroc"], marker="o", color=colour)
    above.set(xlabel="epoch", ylabel="test AUROC")
    above.set_title("circle: what is reported", fontsize="medium")
    below.set(xlabel="epoch", ylabel="loss, nats per channel")
    below.set_title("dashed: training; solid: held-out normal images, if any", fontsize="medium")
    for axes in (above, below):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(below, handles, list(records))
    return figure


def column(history: list[dict], name: str) -> np.ndarray:
    """A figure of every entry of a history; NaN where an entry has none."""
    return np.array([entry.get(name) for entry in history], float)


def methods(summary: Summary) -> Figure:
    """AUROC of the flow, ± its deviation over the seeds, and of the simple detectors: a line per class and
    one for the mean."""
    rows = table_rows(summary)
    figure = Figure((7, 1.8 + 0.28 * len(rows)), layout="constrained")
    axes, places = figure.subplots(), np.arange(len(rows))
    aurocs, spread = (column(rows, name) for name in ("auroc", "auroc_std"))
    handles: list = [axes.errorbar(aurocs, places, xerr=spread, fmt="o", color="black", capsize=3)]
    for number, method in enumerate(summary.baselines):
        marker, colour = "v^<>sDPX*"[number % 9], f"C{number % 9 + 1}"
        handles += axes.plot(column(rows, method), places, marker, color=colour, alpha=0.7)
    axes.set_yticks(places, [shorten(row["class"], 30) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top, no marker on the frame
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("AUROC")
    axes.set_title(f"flow and simple detectors, seeds {rows[0]['seeds']}", fontsize="medium")
    legend(figure, handles, ["flow", *summary.baselines], loc="outside lower center", ncols=3)
    return figure
