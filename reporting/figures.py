"""Pictures of a run: score histograms, ROC of all classes, curves over epochs, the flow beside the simple
detectors, kinds of defect, and the images at both ends of the scores. Those of one seed show the first."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: no screen is needed
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.metrics import roc_curve

import datasets
from backbone.token_grid import place_grid_of
from cache import feature_cache
from config import Config, UserError
from detector import calibration, checkpoints, detector, heat_map
from reporting import overlays, report
from reporting.tables import shorten
from shell.files import file_name, whole_file

SHEET = 10  # images per row of a contact sheet
BINS = (50, 100)  # of the histograms of normal and anomalous images
TILE = 104  # pixels of a side of the square that an image is fitted into
GAP, LINE = 6, 13  # pixels between tiles, and of a line of text
HEAT_MAPS = 4  # of the most anomalous test images of a class
MOST_IN_LEGEND = 20  # classes
RUNS_AWAY = 10  # the scores' range in spreads of the normal images', from which the axis is logarithmic


class Picture(NamedTuple):
    """A picture of a run. class_name: of which class; empty for all of them."""

    path: Path
    caption: str
    class_name: str = ""


def draw_all(
    config: Config,
    cache: feature_cache.FeatureCache,
    classes: list[str],
    folder: Path,
    summary: dict,
    drawn: dict[str, list[Picture]] | None = None,
) -> list[Picture]:
    """Draw every picture of a run into ``folder``/figures from what its classes left behind and its summary.

    A picture that would be empty is left out: no ROC without test images of both labels. Contact sheets need
    the raw images: with ``pretrained`` there are none. drawn: the pictures of classes that are there already,
    each by ``draw_class``."""
    figures, seed = folder / "figures", config.seed
    figures.mkdir(parents=True, exist_ok=True)
    records = dict(checkpoints.trained_records(config, classes))
    pictures = []
    if summary["baselines"] or len(classes) > 1:
        if draw_methods(summary, figures / "methods.png"):
            caption = "AUROC of the flow (± standard deviation over seeds) and of the simple detectors"
            pictures.append(Picture(figures / "methods.png", caption))
    if draw_defects(summary, figures / "defects.png"):
        pictures.append(Picture(figures / "defects.png", "AUROC of each kind of defect"))
    if draw_roc(records, seed, figures / "roc.png"):
        pictures.append(Picture(figures / "roc.png", f"ROC of every class, seed {seed}"))
    draw_curves(records, seed, figures / "epochs.png")
    pictures.append(Picture(figures / "epochs.png", f"Loss (and test AUROC) over the epochs, seed {seed}"))
    found = dict(drawn or {})
    if missing := [name for name in records if name not in found]:
        try:
            images = raw_images(config, cache)
        except UserError as mistake:
            images = None
            print(f"no contact sheets: {mistake}")
        found |= {name: draw_class(config, cache, images, name, folder) for name in missing}
    return pictures + [picture for name in records for picture in found[name]]


def raw_images(config: Config, cache: feature_cache.FeatureCache) -> datasets.ImageSet | None:
    """The images in the order of the cache's rows; None with ``pretrained``: they need not be there. Raises
    UserError where they are not those that were extracted."""
    if config.pretrained:
        return None
    images = datasets.images_of(config)
    images.scale.ranges = cache.meta.get("pixel_scale", {})
    return cache.in_rows(images)


def draw_class(
    config: Config,
    cache: feature_cache.FeatureCache,
    images: datasets.ImageSet | None,
    name: str,
    folder: Path,
) -> list[Picture]:
    """Draw the pictures of a class, of its first seed's record, into ``folder``/figures: its scores and, with
    the raw images, the contact sheet and heat maps of the test images."""
    figures, seed = folder / "figures", config.seed
    figures.mkdir(parents=True, exist_ok=True)
    record, pictures = checkpoints.read_record(checkpoints.checkpoint_path(config, name, seed)), []
    if record["test"]["scores"] or record["held_out_scores"]:
        path = figures / f"scores-{file_name(name)}.png"
        found = calibration.of_record(record, config.false_alarms)
        draw_histogram(name, record, seed, BINS, found, path)
        pictures.append(Picture(path, f"Scores of {name}, seed {seed}", name))
    if images and record["test"]["scores"]:
        try:
            path = figures / f"extremes-{file_name(name)}.jpg"
            draw_sheet(images, record["test"], f"normal class: {name}, seed {seed}", path)
            caption = f"Test images of {name} at both ends of the scores, seed {seed}"
            pictures.append(Picture(path, caption, name))
            pictures += draw_heat_maps(config, cache, images, name, record, figures)
        except UserError as mistake:
            print(f"no contact sheet of {name}: {mistake}")
    return pictures


def draw_heat_maps(
    config: Config,
    cache: feature_cache.FeatureCache,
    images: datasets.ImageSet,
    name: str,
    record: dict,
    figures: Path,
) -> list[Picture]:
    """Where the most anomalous test images of a class are unusual, beside its contact sheet; none where its
    score reads no places (predict.py --heat_maps draws those, too)."""
    if not (config.places and config.keep != "results"):
        return []
    fitted, _ = detector.load_detector(checkpoints.checkpoint_path(config, name, config.seed))
    if not fitted.uses_places:
        return []
    test = record["test"]
    rows = np.array(test["rows"])[np.argsort(test["scores"])[::-1][:HEAT_MAPS]]
    pictures = []
    for number, (row, places) in enumerate(zip(rows, detector.place_maps(fitted, cache, rows)), 1):
        path, pixels = figures / f"heat-{file_name(name)}-{number}.png", images.read("test", int(row))
        values = heat_map.of_places(places, place_grid_of(cache.fields), pixels.shape[:2])
        overlays.draw(pixels, values, heat_map.HOT, path, images.labels.test.names[int(row)])
        caption = f"Where test image {number} of {name}, by its score, is unusual, seed {config.seed}"
        pictures.append(Picture(path, caption, name))
    return pictures


# ---------------------------------------------------------------- plots
def title(axes: Axes, text: str) -> None:
    """A title in which a class's name is taken as it is: $ begins no formula."""
    axes.set_title("\n".join(textwrap.wrap(text, 70)), fontsize="medium", parse_math=False)


def legend(owner: Axes | Figure, handles: list, labels: list[str], **options) -> None:
    """A legend in which names are taken as they are: a leading _ hides nothing, $ begins no formula."""
    shown = owner.legend(handles, [f" {label}" for label in labels], fontsize="small", **options)
    for text in shown.get_texts():
        text.set_parse_math(False)


def draw_histogram(
    name: str, record: dict, seed: int, bins: tuple[int, int], found: calibration.Threshold | None, path: Path
) -> None:
    """Counts of the scores of normal and anomalous test images (of the held-out normal ones where there is no
    test), with the threshold ``found`` where one was set. Where the anomalous images' scores run away from
    the normal ones', the axis is logarithmic far from those.

    bins: of the normal and of the anomalous images, over the same range."""
    scores, labels = np.array(record["test"]["scores"]), np.array(record["test"]["labels"])
    tested = len(scores) > 0
    if not tested:
        scores = np.array(record["held_out_scores"])
        labels = np.zeros(len(scores))
    limit = found.score if found else None
    figure = Figure((7, 4.8), layout="constrained")
    axes = figure.subplots()
    centre, width = bulk(scores, labels)
    if width:
        axes.set_xscale("function", functions=stretch(centre, width))
    handles: list = []
    texts = []
    normal = "normal" if tested else "held-out normal"
    for label, kind, count in ((0, normal, bins[0]), (1, "anomalous", bins[1])):
        own = scores[labels == label]
        if len(own):
            _, _, bars = axes.hist(
                own, bins=edges(scores, count, centre, width).tolist(), alpha=0.6, color=f"C{label}"
            )
            above = "" if limit is None else f", {(own > limit).mean():.1%} above"
            handles.append(bars)
            texts.append(f"{kind}: {len(own)} images{above}")
    if found:
        handles.append(axes.axvline(found.score, color="black", linestyle="--", linewidth=1))
        rates = f"{found.expected:.1%} ({found.low:.1%} to {found.high:.1%})"
        texts.append(f"threshold {found.score:.4g}: false alarms expected {rates}")
    few, many = sorted(max(1, int((labels == label).sum())) for label in (0, 1))
    if many > 20 * few:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    title(axes, f"normal class: {name}, seed {seed}")
    axes.set(xlabel="anomaly score", ylabel="images per bin")
    if width:
        ticks = edges(scores, 8, centre, width)
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.set_xlabel("anomaly score (logarithmic far from the normal images)")
    legend(figure, handles, texts, loc="outside lower center")
    overlays.save(figure, path)


def bulk(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Centre and width of the normal images' scores, around which the axis stays linear; width 0: it is so
    everywhere, as no score runs away."""
    normal = scores[labels == 0] if (labels == 0).any() else scores
    low, centre, high = np.quantile(normal, [0.05, 0.5, 0.95])
    width = max(float(high - low), 1e-9 * float(np.ptp(scores)))
    return (float(centre), width) if np.ptp(scores) > RUNS_AWAY * width else (float(centre), 0.0)


def stretch(centre: float, width: float) -> tuple[Callable, Callable]:
    """A scale that is linear around ``centre`` and logarithmic far from it, and its inverse."""
    return (
        lambda score: np.arcsinh((score - centre) / width),
        lambda place: centre + width * np.sinh(place),
    )


def edges(scores: np.ndarray, count: int, centre: float, width: float) -> np.ndarray:
    """The edges of ``count`` bins over the range of the scores, equally wide on the axis."""
    low, high = float(scores.min()), float(scores.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    if not width:
        return np.linspace(low, high, count + 1)
    there, back = stretch(centre, width)
    inner = back(np.linspace(there(low), there(high), count + 1))
    inner[[0, -1]] = low, high  # rounding must lose no score
    return inner


def draw_roc(records: dict[str, dict], seed: int, path: Path) -> bool:
    """The ROC curves of the classes whose test images are of both labels -> whether there was one to draw."""
    both = {name: r for name, r in records.items() if len(set(r["test"]["labels"])) == 2}
    if not both:
        return False
    figure = Figure((6.5, 6), layout="constrained")
    axes = figure.subplots()
    handles: list = []
    texts = []
    for name, record in both.items():
        fpr, tpr, _ = roc_curve(record["test"]["labels"], record["test"]["scores"])
        handles += axes.plot(fpr, tpr, linestyle=line_style(len(handles)))
        texts.append(f"{name}  {record['result']['auroc']:.3f}")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    title(axes, f"ROC: normal class and AUROC, seed {seed}")
    if len(handles) <= MOST_IN_LEGEND:
        legend(axes, handles, texts)
    overlays.save(figure, path)
    return True


def line_style(number: int) -> str:
    """The ten colours come again with other dashes."""
    return ("-", "--", ":", "-.")[number // 10 % 4]


def draw_curves(records: dict[str, dict], seed: int, path: Path) -> None:
    """The loss on training batches (dashed) and on held-out images (solid) over the epochs; the test AUROC
    where there is one, the reported epoch marked with a circle."""
    histories = {name: record["history"] for name, record in records.items()}
    defined = any(np.isfinite(column(history, "auroc")).any() for history in histories.values())
    figure = Figure((7, 7 if defined else 3.6), layout="constrained")
    panels = figure.subplots(2 if defined else 1, 1, squeeze=False)[:, 0]
    handles: list = []
    losses = panels[-1]
    for number, (name, history) in enumerate(histories.items()):
        epochs, colour = [entry["epoch"] for entry in history], f"C{number % 10}"
        losses.plot(epochs, column(history, "loss"), "--", marker=".", color=colour, linewidth=1)
        held = column(history, "held_out_loss")
        handles += losses.plot(epochs, held, line_style(number), marker=".", color=colour)
        if defined:
            aurocs = column(history, "auroc")
            panels[0].plot(epochs, aurocs, line_style(number), marker=".", color=colour)
            chosen = records[name]["result"]
            panels[0].plot(chosen["epoch"], chosen["auroc"], marker="o", color=colour)
    if defined:
        panels[0].set(xlabel="epoch", ylabel="test AUROC")
        title(panels[0], f"circle: what is reported; seed {seed}")
    losses.set(xlabel="epoch", ylabel="loss, nats per channel")
    title(losses, f"dashed: training; solid: held-out normal images, if any; seed {seed}")
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(histories) <= MOST_IN_LEGEND:
        legend(losses, handles, list(histories))
    overlays.save(figure, path)


def column(history: list[dict], name: str) -> np.ndarray:
    """A figure of every entry of a history; NaN where an entry has none."""
    return np.array([entry.get(name) for entry in history], float)


def draw_methods(summary: dict, path: Path) -> bool:
    """AUROC of the flow, ± its deviation over the seeds, and of the simple detectors: a line per class and
    one for the mean -> whether any is defined."""
    rows = report.table_rows(summary)
    aurocs = np.array([row.values["auroc"] for row in rows], float)
    if np.isnan(aurocs).all():
        return False
    figure = Figure((7, 1.8 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    handles: list = []
    texts = []
    for number, (method, table) in enumerate(summary["baselines"].items()):
        values = [report.simple_auroc(table, row.name) for row in rows]
        marker = "v^<>sDPX*"[number % 9]
        handles += axes.plot(np.array(values, float), places, marker, color=f"C{number % 9 + 1}", alpha=0.7)
        texts.append(method)
    spread = [row.values["auroc_std"] for row in rows]
    several = f", ± over {len(summary['seeds'])} seeds" if len(summary["seeds"]) > 1 else ""
    handles.insert(0, axes.errorbar(aurocs, places, xerr=spread, fmt="o", color="black", capsize=3))
    texts.insert(0, f"flow{several}")
    axes.set_yticks(places, [shorten(row.label, 30) for row in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top, no marker on the frame
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("AUROC")
    title(axes, f"flow and simple detectors, {seeds_of(summary)}")
    legend(figure, handles, texts, loc="outside lower center", ncols=3)
    overlays.save(figure, path)
    return True


def seeds_of(summary: dict) -> str:
    """The seeds of a run in a title: seed 0; seeds 0, 1, 2."""
    seeds = summary["seeds"]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def draw_defects(summary: dict, path: Path) -> bool:
    """A bar of AUROC per class and kind of defect, ± over the seeds -> whether a class has kinds."""
    bars = [
        (name, kind, entry) for name, kinds in summary["defects"].items() for kind, entry in kinds.items()
    ]
    if not bars:
        return False
    names = list(summary["defects"])
    figure = Figure((7, 1.2 + 0.24 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        np.arange(len(bars)),
        [entry["auroc"] for _, _, entry in bars],
        xerr=[entry["auroc_std"] for _, _, entry in bars],
        color=[f"C{names.index(name) % 10}" for name, _, _ in bars],
        alpha=0.8,
    )
    labels = [f"{shorten(name, 20)}: {shorten(kind, 20)} ({entry['n']})" for name, kind, entry in bars]
    axes.set_yticks(np.arange(len(bars)), labels, parse_math=False, fontsize="small")
    axes.invert_yaxis()
    axes.axvline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlim=(0, 1), xlabel="AUROC against the normal test images (dashed: chance)")
    title(axes, f"kinds of defect (images), {seeds_of(summary)}")
    overlays.save(figure, path)
    return True


# ---------------------------------------------------------------- contact sheets
def strips(test: dict) -> list[tuple[str, list[int]]]:
    """(heading, positions in the test set): the least and the most anomalous images, truly normal ones
    first; each strip from its end of the scores inwards. A label without images has none."""
    labels, scores = np.array(test["labels"]), np.array(test["scores"])
    found = []
    for label, kind in ((0, "normal"), (1, "anomalous")):
        own = np.flatnonzero(labels == label)
        ranked = own[np.argsort(scores[own], kind="stable")]
        if len(ranked):
            found.append((f"{kind}, lowest scores", ranked[:SHEET].tolist()))
            found.append((f"{kind}, highest scores", ranked[::-1][:SHEET].tolist()))
    return found


def draw_sheet(images: datasets.ImageSet, test: dict, heading: str, path: Path) -> None:
    """A contact sheet: the strips, every image in its own shape with its score, its class and its name."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 10)
    height = LINE + GAP + TILE + 3 * LINE + GAP  # of a strip
    rows = strips(test)
    sheet = Image.new("RGB", (SHEET * (TILE + GAP) + GAP, 2 * LINE + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), shorten(heading, 150), "black", font)
    for number, (caption, positions) in enumerate(rows):
        top = 2 * LINE + number * height
        draw.text((GAP, top), caption, "black", font)
        for place, position in enumerate(positions):
            left, row = GAP + place * (TILE + GAP), int(test["rows"][position])
            sheet.paste(tile(images.read("test", row)), (left, top + LINE + GAP))
            words = (f"{test['scores'][position]:.4g}", *described(images.labels, row))
            for line, word in enumerate(words):
                at = (left, top + LINE + GAP + TILE + line * LINE)
                draw.text(at, shorten(word, 17), "black", font)
    with whole_file(path) as partial:
        sheet.save(partial, "JPEG", quality=90, subsampling=0)


def tile(pixels: np.ndarray) -> Image.Image:
    """An image (H, W, 3) in its own shape, as large as fits into a square of TILE pixels on grey."""
    return ImageOps.pad(Image.fromarray(pixels), (TILE, TILE), Image.Resampling.BICUBIC, (225, 225, 225))


def described(labels: datasets.Labels, row: int) -> tuple[str, str]:
    """What a test image shows (its class, or what is wrong with it, or else its folder), and its name."""
    split = labels.test
    category, path = int(split.category[row]), Path(split.names[row])
    known = split.kind[row] or (labels.classes[category] if category != datasets.OTHER else path.parent.name)
    return known, path.name
