"""report.html: whole in itself, whatever the names; what it must tell; in a browser, too."""

from html.parser import HTMLParser

import pytest
from browser import FAULTS, in_browser
from PIL import Image
from test_report import FOUND, RESULTS, result, simple, summary_of, undefined

from reporting import webpage
from reporting.figures import Picture

NASTY = "<script>alert('x')</script> & \"b\" 'c'"


class Reader(HTMLParser):
    """The elements, attributes and words of a page; every element that is opened must be closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == [], "not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def picture(tmp_path) -> Picture:
    Image.new("RGB", (2, 2)).save(tmp_path / "p.png")
    return Picture(tmp_path / "p.png", NASTY, "red, round")


def test_page_tells_what_it_must(picture):
    defects = {"hole": {"n": 7, "auroc": 0.75, "auroc_std": 0.1}}
    b = FOUND["b"] | {"defects": defects, "localisation": {"pixel_auroc": 0.9876, "aupro": 0.8765}}
    features = {"precision": "bfloat16", "skipped": ["cut<off>.png"]}
    failed = undefined("bare", reason="the loss is <nan>")
    summary = summary_of([*RESULTS[::2], failed], FOUND | {"b": b}, features, clamp=2.5)
    seen = Reader(webpage.page(summary, [picture])).text
    made = [summary["command"], *(summary["versions"][name] for name in ("torch", "machine", "commit"))]
    results = ["0.7000", "kNN", "+0.3000 [+0.2000, +0.4000]", "above 1, level 1, below 0"]
    for told in (
        *made,
        *results,
        "b hole 7 0.7500",
        "b 0.9876 0.8765",
        "67 min",
        "clamp 2.5",
        "cut<off>.png",
        "no AUROC (the loss is <nan>): bare.",
    ):
        assert " ".join(told.split()) in seen, told


def test_nothing_is_fetched_and_names_break_nothing(picture):
    """No address outside the page in any attribute or style, a policy that forbids it, and one script."""
    found = {NASTY: simple(kNN=0.5)}
    summary = summary_of([result(NASTY, 0, 0.5)], found, modelname="a<b>&amp;", dataset_path=NASTY)
    page = webpage.page(summary, [picture._replace(class_name=NASTY)])
    seen = Reader(page)
    assert seen.text.count(NASTY) >= 5 and "a<b>&amp;" in seen.text
    assert [a["alt"] for tag, a in seen.elements if tag == "img"] == [NASTY]
    assert [attributes for tag, attributes in seen.elements if tag == "script"] == [{}]
    assert not {tag for tag, _ in seen.elements} & {"link", "iframe", "object", "base"}
    for _, attributes in seen.elements:
        for name in ("src", "href", "srcset", "action", "background"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page and "url(" not in page
    assert any("default-src 'none'" in (a.get("content") or "") for tag, a in seen.elements if tag == "meta")


def test_sections_without_content_are_left_out():
    seen = Reader(webpage.page(summary_of([undefined("bare")], {}), [])).text
    for absent in ("Simple detectors", "Kinds of defect", "Class by class", "Left out", "nan", "None"):
        assert absent not in seen, absent


SORTED = """(window, document) => {
  const head = document.querySelector("thead").rows[0].cells, seen = [];
  for (const column of [1, 1, 0]) {
    head[column].click();
    seen.push([...document.querySelector("tbody").rows].map((row) => row.cells[0].textContent));
  }
  return seen;
}"""


def test_in_a_browser_pictures_load_and_tables_sort(tmp_path, picture):
    """By number and by name, the mean last; nothing is fetched; a picture that does not load is seen."""
    results = [result(name, 0, auroc) for name, auroc in (("b", 0.5), ("c", 0.1), ("a", 0.9))]
    page = tmp_path / "report.html"
    page.write_text(webpage.page(summary_of(results, {}), [picture]))
    assert in_browser(page, FAULTS) == [[], [], 1]
    assert in_browser(page, SORTED) == [[*order, "mean"] for order in ("cba", "abc", "abc")]
    page.write_text(page.read_text().replace("base64,", "base64,spoilt"))
    assert in_browser(page, FAULTS) == [[NASTY], [], 1]
