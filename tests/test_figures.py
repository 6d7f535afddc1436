"""The pictures: what is drawn, not how it looks."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_report import RESULTS, SIMPLE

import datasets
from config import Config
from detector import calibration
from reporting import figures, overlays, report


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved from now on."""
    saved: list[Figure] = []
    monkeypatch.setattr(overlays, "save", lambda figure, path: saved.append(figure))
    return saved


def record(scores: list, labels: list, **more) -> dict:
    test = {"scores": scores, "labels": labels, "rows": list(range(len(scores)))}
    return {"test": test, "held_out_scores": [], "result": {"auroc": 0.8, "epoch": 3}} | more


def texts_of(legend) -> list[str]:
    return [text.get_text().strip() for text in legend.get_texts()]


# ---------------------------------------------------------------- histograms
def test_histogram_colours_mean_what_the_legend_says(drawn, tmp_path):
    kept = record([0.0, 1.0, 2.0, 9.0, 9.5], [0, 0, 0, 1, 1], held_out_scores=[0.0, 1.0, 1.5])
    figures.draw_histogram("cat", kept, 7, (10, 10), calibration.of_record(kept, 0.05), tmp_path / "h.png")
    axes, legend = drawn[0].axes[0], drawn[0].legends[0]
    assert axes.get_title() == "normal class: cat, seed 7"
    for container, text, at, above in zip(axes.containers, texts_of(legend), (1, 9), ("33.3%", "100.0%")):
        heights = {bar.get_x(): bar.get_height() for bar in container if bar.get_height() > 0}
        assert abs(np.mean(list(heights)) - at) < 1 and sum(heights.values()) == int(text.split()[1])
        assert text.endswith(f"{above} above")
    (line,) = axes.lines
    assert line.get_xdata()[0] == pytest.approx(1.5), "three pictures are few: the greatest held-out score"


def test_histogram_without_a_threshold_or_a_label(drawn, tmp_path):
    figures.draw_histogram("cat", record([1.0, 1.0], [0, 0]), 0, (5, 5), None, tmp_path / "h.png")
    axes = drawn[0].axes[0]
    assert not axes.lines and len(axes.containers) == 1
    assert texts_of(drawn[0].legends[0]) == ["normal: 2 images"]


def test_histogram_of_held_out_images_where_there_is_no_test(drawn, tmp_path):
    kept = record([], [], held_out_scores=[0.0, 1.0, 2.0])
    figures.draw_histogram("cat", kept, 0, (5, 5), calibration.of_record(kept, 0.05), tmp_path / "h.png")
    first, threshold = texts_of(drawn[0].legends[0])
    assert first.startswith("held-out normal: 3 images") and threshold.startswith("threshold")


@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_scores_that_run_away_get_a_logarithmic_axis(drawn, tmp_path, shift):
    """No score falls out of the bins, and the normal images fill more than one of them."""
    normal = np.linspace(0, 1, 40) + shift
    scores, labels = [*normal, *np.geomspace(1, 1e6, 40)], [0] * 40 + [1] * 40
    figures.draw_histogram("cat", record(scores, labels), 0, (40, 40), None, tmp_path / "h.png")
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "function" and "logarithmic" in axes.get_xlabel()
    for container in axes.containers:
        heights = [bar.get_height() for bar in container]
        assert sum(heights) == 40 and max(heights) < 30
    figures.draw_histogram(
        "cat", record([*normal, *normal + 2], labels), 0, (40, 40), None, tmp_path / "h.png"
    )
    assert drawn[1].axes[0].get_xscale() == "linear"


# ---------------------------------------------------------------- lines and bars
def history(**more) -> list[dict]:
    return [{"epoch": e, "loss": 1.0 - e / 10, "auroc": 0.5 + e / 10, **more} for e in (0, 3, 6)]


def test_curves_show_both_losses_and_mark_the_reported_epoch(drawn, tmp_path):
    entries = history(held_out_loss=2.0)
    entries[0]["loss"] = None  # nothing was trained yet
    figures.draw_curves({"a": record([0.0], [0], history=entries)}, 0, tmp_path / "c.png")
    left, right = drawn[0].axes
    assert left.lines[0].get_ydata().tolist() == [0.5, 0.8, 1.1]
    assert (left.lines[1].get_xdata(), left.lines[1].get_ydata()) == ([3], [0.8])
    training, held = right.lines
    assert np.isnan(training.get_ydata()[0]) and training.get_ydata()[1:].tolist() == [0.7, 0.4]
    assert held.get_ydata().tolist() == [2.0] * 3
    assert training.get_linestyle() == "--" and held.get_linestyle() == "-"
    assert texts_of(right.get_legend()) == ["a"] and "seed 0" in left.get_title()


def test_epochs_are_whole_numbers(drawn, tmp_path):
    figures.draw_curves({"a": record([0.0], [0], history=history()[:1])}, 0, tmp_path / "c.png")
    for axes in drawn[0].axes:
        axes.set_xlim(0, 2)
        assert all(float(place).is_integer() for place in axes.get_xticks())


def test_no_panel_and_no_curve_without_an_auroc(drawn, tmp_path):
    bare = record([1.0, 2.0], [0, 0], history=history(auroc=float("nan")))
    figures.draw_curves({"a": bare}, 0, tmp_path / "c.png")
    (axes,) = drawn[0].axes
    assert axes.get_ylabel().startswith("loss")
    assert not figures.draw_roc({"a": bare, "b": record([], [])}, 0, tmp_path / "r.png") and len(drawn) == 1
    both = {"a": bare, "b": record([1.0, 2.0], [0, 1])}
    assert figures.draw_roc(both, 4, tmp_path / "r.png")
    assert (
        texts_of(drawn[1].axes[0].get_legend()) == ["b  0.800"] and "seed 4" in drawn[1].axes[0].get_title()
    )


def test_names_are_no_formulas(tmp_path):
    """Names that begin with _ or hold $ are drawn as they are."""
    for name in ("_hidden", "$x$", "$\\frac{1}$", "a\nb"):
        kept = record([0.0, 1.0], [0, 1], history=history())
        figures.draw_histogram(name, kept, 0, (5, 5), None, tmp_path / "h.png")
        figures.draw_curves({name: kept}, 0, tmp_path / "c.png")
        assert figures.draw_roc({name: kept}, 0, tmp_path / "r.png")
        defects = {name: {name: {"n": 1, "auroc": 0.5, "auroc_std": 0.0}}}
        results = [entry | {"class": name} for entry in RESULTS[:1]]
        summary = report.summarize(Config(), results, {}, 1.0, {}, defects)
        assert figures.draw_methods(summary, tmp_path / "m.png")
        assert figures.draw_defects(summary, tmp_path / "d.png")


def test_methods_stand_beside_each_other(drawn, tmp_path):
    summary = report.summarize(Config(n_seeds=2), RESULTS, SIMPLE, 1.0, {})
    assert figures.draw_methods(summary, tmp_path / "m.png")
    axes = drawn[0].axes[0]
    assert texts_of(drawn[0].legends[0]) == ["flow, ± over 2 seeds", "kNN"]
    assert axes.get_title().endswith("detectors, seeds 0, 1")
    flow = axes.containers[0]
    (low, high), rows = sorted(axes.get_ylim()), flow[0].get_ydata()
    assert low <= min(rows) - 0.5 and high >= max(rows) + 0.5, "no marker lies on the frame"
    assert flow[0].get_xdata().tolist() == pytest.approx([0.85, 0.6, 0.725])
    (bars,) = flow[2]
    spans = [np.ptp(segment[:, 0]) / 2 for segment in bars.get_segments()]
    assert spans == pytest.approx([0.1 / 2**0.5, 0, 0.05 / 2**0.5], abs=1e-9)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["red, round", "b", "mean"]
    bare = report.summarize(Config(), [RESULTS[0] | {"auroc": float("nan")}], {}, 1.0, {})
    assert not figures.draw_methods(bare, tmp_path / "m.png")


def test_defects_have_a_bar_each(drawn, tmp_path):
    defects = {
        "b": {
            "hole": {"n": 7, "auroc": 0.75, "auroc_std": 0.1},
            "dirt": {"n": 2, "auroc": 1.0, "auroc_std": 0},
        }
    }
    summary = report.summarize(Config(), RESULTS[:1], {}, 1.0, {}, defects)
    assert figures.draw_defects(summary, tmp_path / "d.png")
    axes = drawn[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.75, 1.0] and axes.get_title().endswith(", seed 0")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b: hole (7)", "b: dirt (2)"]
    assert not figures.draw_defects(report.summarize(Config(), RESULTS[:1], {}, 1.0, {}), tmp_path / "d.png")


# ---------------------------------------------------------------- contact sheets
def test_strips_are_sorted_by_score():
    """Normal lowest and highest, anomalous lowest and highest; each from its end inwards."""
    n = 60
    scores = np.random.RandomState(0).permutation(n).astype(float)
    test = {"labels": [i % 2 for i in range(n)], "scores": scores.tolist()}
    found = figures.strips(test)
    assert [heading.split(",")[0] for heading, _ in found] == ["normal"] * 2 + ["anomalous"] * 2
    for number, (heading, shown) in enumerate(found):
        own = [i for i in range(n) if i % 2 == number // 2]
        wanted = sorted(own, key=lambda i: scores[i], reverse=bool(number % 2))[: figures.SHEET]
        assert shown == wanted and ("highest" in heading) == bool(number % 2)
    assert len(figures.strips({"labels": [0, 0], "scores": [1.0, 2.0]})) == 2, "no strip without images"


def test_tiles_keep_their_shape():
    shown = np.asarray(figures.tile(np.zeros((20, 80, 3), np.uint8)))
    dark = (shown < 10).all(2)
    assert shown.shape == (figures.TILE, figures.TILE, 3)
    assert dark.any(0).sum() == figures.TILE and abs(dark.any(1).sum() - figures.TILE / 4) <= 1


def test_contact_sheet_shows_the_image_of_each_position(tmp_path, monkeypatch):
    """Each tile is the image whose row and score stand at its position, and bears score, class and name."""
    rows, scores = [7, 3, 5], [2.0, 0.5, 9.0]
    names = [f"test/cat/{i}.png" for i in range(8)]
    labels = datasets.Labels(("cat", "dog"), datasets.Split.of([], []), datasets.Split.of(names, [0] * 8))
    images = datasets.ImageSet(labels, lambda split, i: np.full((4, 4, 3), 20 * i, np.uint8))
    words: list[str] = []
    real = figures.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        figures.ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, *rest: (words.append(text), real(self, at, text, *rest))[1],
    )
    test = {"rows": rows, "scores": scores, "labels": [0, 0, 1]}
    figures.draw_sheet(images, test, "normal class: cat, seed 0", tmp_path / "s.jpg")
    sheet = np.asarray(Image.open(tmp_path / "s.jpg").convert("RGB")).astype(int)
    first = figures.LINE * 3 + figures.GAP + figures.TILE // 2
    shown = [
        sheet[first, figures.GAP + place * (figures.TILE + figures.GAP) + figures.TILE // 2, 0]
        for place in range(3)
    ]
    assert shown == pytest.approx([60, 140, 255], abs=2), "rows 3 and 7, then white"
    assert words[:5] == ["normal class: cat, seed 0", "normal, lowest scores", "0.5", "cat", "3.png"]


def test_tiles_name_class_or_kind():
    names = ["test/apple/a.png", "test/other/b.png", "x.png"]
    split = datasets.Split.of(names, [0, datasets.OTHER, 0])
    labels = datasets.Labels(("Apple",), datasets.Split.of([], []), split)
    told = [figures.described(labels, row) for row in range(3)]
    assert told == [("Apple", "a.png"), ("other", "b.png"), ("Apple", "x.png")]
    split = datasets.Split.of(["bottle/test/hole/a.png"], [0], [True], ["hole"])
    labels = datasets.Labels(("bottle",), datasets.Split.of([], []), split, per_category=True)
    assert figures.described(labels, 0) == ("hole", "a.png")


def test_a_figure_is_whole_or_absent(tmp_path, monkeypatch):
    """Drawn beside its place: what breaks off leaves the old one."""

    class Broken:
        def savefig(self, path, **options):
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    path = tmp_path / "new" / "roc.png"
    with pytest.raises(KeyboardInterrupt):
        overlays.save(Broken(), path)
    assert list(path.parent.iterdir()) == []
