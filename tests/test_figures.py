"""The pictures: what is drawn, not how it looks."""

import dataclasses

import numpy as np
import pytest
from fabricated import GRID, fabricate
from PIL import Image
from test_report import record_of, summary_of

import datasets
from cache.store import CachedArray
from detector import calibration
from detector.checkpoints import Record
from reporting import figures
from reporting.findings import Left


def record(scores: list, labels: list) -> Record:
    history = [{"epoch": e, "loss": 1.0 - e / 10, "auroc": 0.5 + e / 10} for e in (0, 3, 6)]
    return dataclasses.replace(record_of(np.array(labels), np.array(scores)), history=history)


def texts_of(legend) -> list[str]:
    return [text.get_text().strip() for text in legend.get_texts()]


# ---------------------------------------------------------------- plots
@pytest.mark.parametrize("far", [2.0, 1e6])
def test_histogram_counts_every_score(far):
    """In the colours of the legend; scores that run away leave the normal images more than one bin."""
    normal = np.linspace(0, 1, 40)
    kept = record([*normal, *normal + np.geomspace(2, far, 40)], [0] * 40 + [1] * 40)
    figure = figures.histogram(kept, calibration.threshold(np.array([0, 1, 1.5]), 0.05))
    axes = figure.axes[0]
    assert axes.get_title() == "normal class: cat, seed 7"
    told, (line,) = texts_of(figure.legends[0]), axes.lines
    assert told[:2] == ["normal: 40 images, 0.0% above", "anomalous: 40 images, 100.0% above"]
    assert told[2].startswith("threshold 1.5: false alarms expected 25.0%"), "three pictures are few"
    for shape, bins, left in zip(axes.patches, figures.BINS, (True, False), strict=True):
        places, heights = shape.get_xy()[1 : 1 + 2 * bins].T
        assert sum(heights) == 2 * 40 and max(heights) < 30, "two corners of each bin"
        assert (np.average(places, weights=heights) < line.get_xdata()[0]) == left


def test_curves_show_both_losses_and_mark_the_reported_epoch():
    kept = record([0.0], [0])
    kept.history = [entry | {"held_out_loss": 2.0} for entry in kept.history]
    kept.history[0]["loss"] = None  # nothing was trained yet
    above, below = figures.curves({"a": kept}).axes
    assert above.lines[0].get_ydata().tolist() == [0.5, 0.8, 1.1]
    assert (above.lines[1].get_xdata(), above.lines[1].get_ydata()) == ([3], [0.8])
    training, held = below.lines
    assert np.isnan(training.get_ydata()[0]) and training.get_ydata()[1:].tolist() == [0.7, 0.4]
    assert held.get_ydata().tolist() == [2.0] * 3 and texts_of(below.get_legend()) == ["a"]
    assert training.get_linestyle() == "--" and held.get_linestyle() == "-"


def test_only_what_there_is_gets_a_picture(tmp_path):
    """No ROC and no bars without test images of both labels."""
    one, both = record([1.0, 2.0], [0, 0]), record([1.0, 2.0], [0, 1])
    (axes,) = figures.roc({"b": both}).axes
    assert texts_of(axes.get_legend()) == ["b  0.800"] and axes.lines[0].get_ydata()[-1] == 1
    for records, names in (({"a": one}, ["epochs"]), ({"a": one, "b": both}, ["epochs", "methods", "roc"])):
        drawn = figures.draw_run(summary_of(), records, tmp_path)
        assert [picture.path.stem for picture in drawn] == names
        assert all(Image.open(picture.path).size[0] > 500 for picture in drawn)


# ---------------------------------------------------------------- contact sheets


class Detector:
    """Of the places of the fabricated cache, the first is unusual."""

    def place_maps(self, places: CachedArray, rows: np.ndarray) -> np.ndarray:
        return np.where(np.arange(GRID[0] * GRID[1]) == 0, 9.0, 0.0)[None].repeat(len(rows), 0)


@pytest.mark.parametrize("detector", [None, Detector()])
def test_contact_sheet_shows_the_image_of_each_position(tmp_path, capsys, detector):
    """Each panel is the image whose row and score stand at its position, its heat map below it where there is
    one, and three lines of words."""
    cache, sizes = fabricate(tmp_path), {7: (20, 40), 3: (40, 20), 5: (30, 30)}
    names, kinds = [f"test/cat/M\udcfc{i}.png" for i in range(8)], ["", "", "", "", "", "hole", "", ""]
    split = datasets.Split.of(names, [0] * 8, [False] * 8, kinds)
    labels = datasets.Labels(("cat", "dog"), datasets.Split.of([], []), split)
    pixels = [np.full((*sizes.get(i, (9, 9)), 3), 20 * i, np.uint8) for i in range(8)]
    images = datasets.ImageSet(labels, {"test": list(map(datasets.RawImage, pixels))})
    kept = record([2.0, 0.5, 9.0], [0, 0, 1])
    kept.test.rows = np.array([7, 3, 5])
    left = Left([kept], None, detector)
    (picture,) = figures.draw_class(cache, images, left, tmp_path)[1:]
    assert picture.path.name == "extremes-cat.jpg" and Image.open(picture.path).size[0] > 1000
    side, heading = figures.SIDE, 2 * figures.LINE
    strips = np.split(np.asarray(figures.contact_sheet(cache, images, left)), 4)
    for strip, rows in zip(strips, ((3, 7), (7, 3), (5,), (5,))):
        high = side * (1 + bool(detector))
        assert (strip[heading:, len(rows) * side :] == 255).all(), "nothing where there is no image"
        for place, row in enumerate(rows):
            one = strip[heading:, place * side : (place + 1) * side]
            height, width = (length * side // max(sizes[row]) for length in sizes[row])
            assert ((one[:side] == 20 * row).all(2)).sum() == height * width, "in its own shape"
            lines = (one[high:] < 128).any((1, 2))
            assert (np.diff(lines, prepend=False) & lines).sum() >= 3, "score, what it shows and name below"
            if detector:
                corner = side + (side - height) // 2, (side - width) // 2
                opposite = (side - 1 - corner[0], -1 - corner[1])
                assert one[corner].sum() > one[:high][opposite].sum(), "hot where the first place is"
    images.images["test"][5] = datasets.RawImage(tmp_path / "gone.png")
    (picture,) = figures.draw_class(cache, images, left, tmp_path)
    assert picture.path.name == "scores-cat.png"
    assert "no contact sheet of cat: no image" in capsys.readouterr().out
