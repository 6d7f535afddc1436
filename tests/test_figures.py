"""The pictures: what is drawn, not how it looks."""

import numpy as np
import pytest
from matplotlib.figure import Figure

import datasets
import figures


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved from now on."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    return saved


def test_histogram_colours_mean_what_the_legend_says(drawn, tmp_path):
    test = {"scores": [0.0, 0.1, 0.2, 9.0, 9.5, 9.9], "labels": [0, 0, 0, 1, 1, 1]}
    figures.draw_histogram("cat", test, 10, 10, tmp_path / "h.png")
    axes = drawn[0].axes[0]
    centres = {}
    for container, text in zip(axes.containers, axes.get_legend().get_texts()):
        filled = [bar.get_x() for bar in container if bar.get_height() > 0]
        centres[text.get_text()] = np.mean(filled)
    assert centres["normal"] < 1 < 8 < centres["anomalous"]


def test_contact_sheet_is_sorted_by_score(drawn, tmp_path):
    """Rows: normal lowest and highest, anomalous lowest and highest; each from its end inwards."""
    n = 60
    scores = np.random.RandomState(0).permutation(n).astype(float)
    test = {"rows": list(range(n)), "labels": [i % 2 for i in range(n)], "scores": scores.tolist()}
    labels = datasets.Labels((), datasets.Split.of([], []), datasets.Split.of(map(str, range(n)), [0] * n))
    images = datasets.ImageSet(labels, lambda split, i: np.full((4, 4, 3), i, np.uint8))
    figures.draw_sheet(images, test, tmp_path / "s.png")
    for number, axes in enumerate(drawn[0].axes):
        shown = axes.images[0].get_array()[0, :: figures.TILE, 0]
        own = [i for i in range(n) if i % 2 == number // 2]
        wanted = sorted(own, key=lambda i: scores[i], reverse=bool(number % 2))[: figures.SHEET]
        assert shown.tolist() == wanted, number


def test_curves_mark_the_reported_epoch(drawn, tmp_path):
    history = [
        {"epoch": e, "loss": 1.0, "held_out_loss": 2.0 - e / 10, "auroc": 0.5 + e / 10} for e in (0, 3, 6)
    ]
    figures.draw_curves({"a": {"history": history, "result": {"epoch": 3, "auroc": 0.8}}}, tmp_path / "c.png")
    left, right = drawn[0].axes
    assert left.lines[0].get_ydata().tolist() == [0.5, 0.8, 1.1]
    assert (left.lines[1].get_xdata(), left.lines[1].get_ydata()) == ([3], [0.8])
    assert right.lines[0].get_ydata().tolist() == [2.0, 1.7, 1.4]
