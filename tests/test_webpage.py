"""report.html: whole in itself, whatever the names; what it must tell; in a browser, too."""

from html.parser import HTMLParser

import pytest
from browser import FAULTS, in_browser
from PIL import Image
from test_report import LINE, RESULTS, SIMPLE, result, undefined

from config import Config
from reporting import report, webpage
from reporting.figures import Picture

NASTY = "<script>alert('x')</script> & \"b\" 'c'"


class Reader(HTMLParser):
    """The elements, attributes and words of a page; every element that is opened must be closed."""

    EMPTY = {"meta", "img"}

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == [], "not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def summary_of(results=RESULTS, simple=SIMPLE, defects=None, skipped=(), **knobs) -> dict:
    features = {"precision": "bfloat16", "skipped": list(skipped)}
    return report.summarize(Config(**knobs), results, simple, 4000.0, features, defects)


@pytest.fixture
def picture(tmp_path) -> Picture:
    Image.new("RGB", (2, 2)).save(tmp_path / "p.png")
    return Picture(tmp_path / "p.png", NASTY, "red, round")


def test_page_tells_what_it_must(picture):
    defects = {"b": {"hole": {"n": 7, "auroc": 0.75, "auroc_std": 0.1}}}
    summary = summary_of(n_seeds=2, defects=defects, skipped=["cut<off>.png"], clamp=2.5)
    summary["localisation"] = {"a": {"pixel_auroc": 0.9876, "aupro": 0.8765}}
    seen = Reader(webpage.page(summary, [picture])).text
    for told in (
        "0.7250 ± 0.0354",  # the mean
        "0.8500 ± 0.0707",
        "kNN",
        "+0.3000 [+0.2000, +0.4000]",
        "above in 1 of 2",
        "hole 7 0.7500 ± 0.1000",
        "a 0.9876 0.8765",
        "0, 1",  # seeds
        "67 min",
        summary["command"],
        summary["versions"]["torch"],
        summary["versions"]["machine"],
        summary["versions"]["commit"],
        "clamp 2.5",
        "left out cut<off>.png",
        "features: precision bfloat16",
    ):
        assert " ".join(told.split()) in seen, told


def test_nothing_is_fetched(picture):
    """No address outside the page in any attribute or style, a policy that forbids it, and one script."""
    page = webpage.page(summary_of(n_seeds=2), [picture])
    elements = Reader(page).elements
    assert not {tag for tag, _ in elements} & {"link", "iframe", "object", "base"}
    assert [attributes for tag, attributes in elements if tag == "script"] == [{}]
    for _, attributes in elements:
        for name in ("src", "href", "srcset", "action", "background"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page and "url(" not in page
    assert any("default-src 'none'" in (a.get("content") or "") for tag, a in elements if tag == "meta")


def test_names_break_nothing(picture):
    """A class, a defect, a run and a caption that look like HTML are read back as they are."""
    results = [result(NASTY, 0, 0.5)]
    simple = {NASTY: SIMPLE["b"]}
    defects = {NASTY: {NASTY: {"n": 1, "auroc": 0.5, "auroc_std": 0.0}}}
    summary = summary_of(results, simple, defects, modelname="a<b>&amp;", dataset_path=NASTY)
    seen = Reader(webpage.page(summary, [picture._replace(class_name=NASTY)]))
    assert seen.text.count(NASTY) >= 7 and "a<b>&amp;" in seen.text
    assert [a["alt"] for tag, a in seen.elements if tag == "img"] == [NASTY]


def test_sections_without_content_are_left_out(tmp_path):
    """No baselines, no kinds, no pictures, no AUROC: no empty heading, no nan, no None."""
    seen = Reader(webpage.page(summary_of([undefined("bare")], {}), [])).text
    for absent in (
        "Simple detectors",
        "Kinds of defect",
        "Pictures",
        "Class by class",
        "left out",
        "nan",
        "None",
    ):
        assert absent not in seen, absent
    assert "no AUROC (no anomalous test images): bare." in seen and "mean AUROC" not in seen


def test_thresholds_stand_on_the_page():
    lines = {"bare": LINE}
    summary = report.summarize(Config(), [undefined("bare", n_test=0)], {}, 1.0, {}, None, lines)
    assert "Thresholds" in (seen := Reader(webpage.page(summary, [])).text)
    assert "bare 1.25 10.0% 1.0% to 30.0% 9" in seen


def test_a_class_that_could_not_be_fitted_is_told():
    failed = {key: float("nan") for key in report.COLUMNS}
    failed |= {"class": "bare", "seed": 0, "reason": "the loss is <nan>"}
    seen = Reader(webpage.page(summary_of([failed, RESULTS[0]], {}), [])).text
    assert "no AUROC (the loss is <nan>): bare." in seen and "bare 0 - - -" in seen


def test_pictures_of_many_classes_are_folded(picture):
    for count, open_ones in ((webpage.MOST_OPEN, webpage.MOST_OPEN), (webpage.MOST_OPEN + 1, 0)):
        pictures = [picture._replace(class_name=str(i)) for i in range(count)]
        elements = Reader(webpage.page(summary_of(n_seeds=2), pictures)).elements
        folded = [attributes for tag, attributes in elements if tag == "details"]
        assert len(folded) == count and sum("open" in a for a in folded) == open_ones


def test_only_changed_knobs_stand_out():
    table = webpage.configuration({"clamp": 2.5, "alpha": Config.alpha, "seed": 0, "img_size": None})
    assert [table.rows[row] for row in table.marked] == [["clamp", "2.5"]]


def test_page_is_written_beside_the_results(tmp_path, picture):
    path = webpage.write_page(tmp_path, summary_of(n_seeds=2), [picture])
    assert path == tmp_path / "report.html" and path.read_text().startswith("<!doctype html>")


SORTED = """(window, document) => {
  const head = document.querySelector("thead").rows[0].cells, seen = [];
  for (const column of [1, 1, 0]) {
    head[column].click();
    seen.push([...document.querySelector("tbody").rows].map((row) => row.cells[0].textContent));
  }
  return seen;
}"""


def test_in_a_browser_pictures_load_and_tables_sort(tmp_path, picture):
    """By number and by name, the mean last; nothing is fetched."""
    results = [result(name, 0, auroc) for name, auroc in (("b", 0.5), ("c", 0.1), ("a", 0.9))]
    page = webpage.write_page(tmp_path, summary_of(results, {}), [picture])
    assert in_browser(page, FAULTS) == [[], [], 1]
    assert in_browser(page, SORTED) == [[*order, "mean"] for order in ("cba", "abc", "abc")]


def test_in_a_browser_a_picture_that_does_not_load_is_seen(tmp_path, picture):
    page = webpage.write_page(tmp_path, summary_of(n_seeds=2), [picture])
    page.write_text(page.read_text().replace("base64,", "base64,spoilt"))
    assert in_browser(page, FAULTS) == [[NASTY], [], 1]
