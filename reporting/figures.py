"""Five pictures of a run: of each class's first seed a histogram of scores, and the test images at both ends
of them with heat maps; of all classes the ROC, curves over the epochs, the flow beside simple detectors."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.metrics import roc_curve

import datasets
from backbone.token_grid import place_grid_of
from cache.feature_cache import FeatureCache
from config import UserError
from detector import heat_map
from detector.calibration import Threshold
from detector.checkpoints import Record
from reporting.findings import Left
from reporting.overlays import overlaid
from reporting.report import Summary
from reporting.tables import shorten
from shell.files import file_name, whole_file

SHEET = 8  # images per row of a contact sheet
SIDE, LINE = 160, 20  # pixels of the longer side of such an image, and of the height of a line of words
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
    name, tested, pictures = left.first.result["class"], len(left.first.test.scores), []
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
    """Draw the pictures of all classes, none that would be empty. records: of each class's first seed."""
    pictures = [saved(curves(records), folder / "epochs.png", "Losses and test AUROC over the epochs")]
    both = {name: record for name, record in records.items() if len(set(record.test.labels)) == 2}
    if both:
        caption = "AUROC of the flow (± over seeds) and of the simple detectors"
        pictures.append(saved(methods(summary), folder / "methods.png", caption))
        pictures.append(saved(roc(both), folder / "roc.png", "ROC of every class"))
    return pictures


def saved(drawn: Figure | Image.Image, path: Path, caption: str) -> Picture:
    """Write a figure as PNG, an image as JPEG, whole or not at all."""
    with whole_file(path) as partial:
        if isinstance(drawn, Figure):
            drawn.savefig(partial, dpi=120, format="png")
        else:
            drawn.save(partial, "JPEG", quality=90)
    return Picture(path, caption)


def new_figure(width: float, height: float, n: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure in inches with ``n`` axes, one below the other."""
    figure = Figure((width, height), layout="constrained")
    return figure, list(figure.subplots(n, 1, squeeze=False)[:, 0])


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
    span = (places.min() - 0.01, places.max() + 0.01)
    figure, (axes,) = new_figure(7, 4.8)
    for label, kind in enumerate(("normal" if tested else "held-out normal", "anomalous")):
        own = labels == label
        if own.any():
            above = f", {(scores[own] > threshold.score).mean():.1%} above" if threshold else ""
            text = f"{kind}: {own.sum()} images{above}"
            axes.hist(places[own], BINS[label], range=span, histtype="stepfilled", alpha=0.6, label=text)
    if threshold:
        rates = f"{threshold.expected:.1%} ({threshold.low:.1%} to {threshold.high:.1%})"
        text = f"threshold {threshold.score:.4g}: false alarms expected {rates}"
        at = np.arcsinh((threshold.score - centre) / width)
        axes.axvline(at, color="black", linestyle="--", linewidth=1, label=text)
    ticks = np.linspace(*span, 8)
    axes.set_xticks(ticks, [f"{centre + width * np.sinh(tick):.3g}" for tick in ticks])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="anomaly score (logarithmic far from the normal images)", ylabel="images per bin")
    name = shorten(record.result["class"], 50)
    axes.set_title(f"normal class: {name}, seed {record.result['seed']}", fontsize="medium")
    figure.legend(loc="outside lower center", fontsize="small")
    return figure


def contact_sheet(cache: FeatureCache, images: datasets.ImageSet, left: Left) -> Image.Image:
    """The least and the most anomalous test images, truly normal ones first, each strip from its end of the
    scores inwards: images with score, what they show, name; below, heat maps where the score reads places."""
    test, split, strips = left.first.test, images.labels.test, dict[str, np.ndarray]()
    ranked = np.argsort(test.scores, kind="stable")
    for label in sorted(set(test.labels)):
        own, kind = ranked[test.labels[ranked] == label], ("normal", "anomalous")[label]
        strips |= {f"{kind}, lowest scores": own[:SHEET], f"{kind}, highest scores": own[::-1][:SHEET]}
    font = ImageFont.truetype(findfont(FontProperties()), LINE - 5)
    height = 2 * LINE + (1 + bool(left.detector)) * SIDE + 4 * LINE  # of a strip: heading, images, words
    sheet = Image.new("RGB", (SHEET * SIDE, len(strips) * height), "white")
    canvas, arrays = ImageDraw.Draw(sheet), cache.arrays("test")
    for number, (heading, positions) in enumerate(strips.items()):
        rows, top = test.rows[positions], number * height + 2 * LINE
        canvas.text((sheet.width / 2, top - LINE), heading, "black", font, anchor="mm")
        maps = left.detector.place_maps(arrays["places"], rows) if left.detector else [None] * len(rows)
        for place, (row, score, values) in enumerate(zip(rows, test.scores[positions], maps)):
            pixels, at = images.read("test", int(row)), (place * SIDE, top)
            size = pixels.shape[:2]
            heat = None if values is None else heat_map.of_places(values, place_grid_of(cache.fields), size)
            for shown in overlaid(pixels, heat, SIDE):
                sheet.paste(ImageOps.pad(shown, (SIDE, SIDE), color="white"), at)
                at = (at[0], at[1] + SIDE)
            shows = split.kind[row] or images.labels.classes[split.category[row]]
            name = Path(split.names[row]).name
            words = "\n".join(shorten(word, 18) for word in (f"{score:.4g}", shows, name))
            canvas.text(at, words.encode(errors="replace").decode(), "black", font)
    return sheet


# ---------------------------------------------------------------- of all classes
def roc(records: dict[str, Record]) -> Figure:
    """The ROC curves of classes whose test images are of both labels."""
    figure, (axes,) = new_figure(6.5, 6)
    for name, record in records.items():
        fpr, tpr, _ = roc_curve(record.test.labels, record.test.scores)
        axes.plot(fpr, tpr, label=f" {name}  {record.result['auroc']:.3f}")  # labels with _ are not shown
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axes.set_title("ROC: normal class and AUROC", fontsize="medium")
    if len(records) <= MOST_IN_LEGEND:
        axes.legend(fontsize="small")
    return figure


def curves(records: dict[str, Record]) -> Figure:
    """The test AUROC over the epochs, with the reported epoch marked, and the loss on training batches
    (dashed) and on held-out images (solid)."""
    figure, (above, below) = new_figure(7, 7, 2)
    for number, (name, record) in enumerate(records.items()):
        history, result, colour = record.history, record.result, f"C{number % 10}"
        epochs, loss, held, auroc = (column(history, x) for x in ("epoch", "loss", "held_out_loss", "auroc"))
        below.plot(epochs, loss, f"{colour}.--", linewidth=1)
        below.plot(epochs, held, f"{colour}.-", label=f" {name}")
        above.plot(epochs, auroc, f"{colour}.-")
        above.plot(result["epoch"], result["auroc"], f"{colour}o")
    above.set(xlabel="epoch", ylabel="test AUROC")
    above.set_title("circle: what is reported", fontsize="medium")
    below.set(xlabel="epoch", ylabel="loss, nats per channel")
    below.set_title("dashed: training; solid: held-out normal images, if any", fontsize="medium")
    for axes in (above, below):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(records) <= MOST_IN_LEGEND:
        below.legend(fontsize="small")
    return figure


def column(history: list[dict], name: str) -> np.ndarray:
    """A figure of every entry of a history; NaN where an entry has none."""
    return np.array([entry.get(name) for entry in history], float)


def methods(summary: Summary) -> Figure:
    """AUROC of the flow, ± its deviation over the seeds, and of the simple detectors: a line per class and
    one for the mean."""
    rows = summary.rows
    figure, (axes,) = new_figure(7, 1.8 + 0.28 * len(rows))
    aurocs, spread, places = column(rows, "auroc"), column(rows, "auroc_std"), np.arange(len(rows))
    axes.errorbar(aurocs, places, xerr=spread, fmt="o", color="black", capsize=3, label="flow")
    for number, method in enumerate(summary.baselines):
        marker, colour = "v^<>sDPX*"[number % 9], f"C{number % 9 + 1}"
        axes.plot(column(rows, method), places, f"{colour}{marker}", alpha=0.7, label=method)
    axes.set_yticks(places, [shorten(row["class"], 30) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top, no marker on the frame
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("AUROC")
    axes.set_title(f"flow and simple detectors, seeds {rows[0]['seeds']}", fontsize="medium")
    figure.legend(loc="outside lower center", fontsize="small", ncols=3)
    return figure
