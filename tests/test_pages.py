"""report.html: whole in itself, whatever the names; what it must tell; in a browser, too."""

import dataclasses
import html
import re

import pytest
from browser import FAULTS, in_browser
from PIL import Image
from test_report import FOUND, RESULTS, result, simple, summary_of, undefined

from reporting.figures import Picture
from reporting.pages import run_page

NASTY = "<script>alert('x')</script> & \"b\" 'c'"


def words_of(page: str) -> str:
    """What a reader sees."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.fixture
def picture(tmp_path) -> Picture:
    Image.new("RGB", (2, 2)).save(tmp_path / "p.png")
    return Picture(tmp_path / "p.png", NASTY)


def test_page_tells_what_it_must(picture):
    defects = {"hole": {"n": 7, "auroc": 0.75, "auroc_std": 0.1}}
    heat = {"pixel_auroc": 0.9876, "aupro": 0.8765}
    b = dataclasses.replace(FOUND["b"], defects=defects, localisation=heat)
    features = {"precision": "bfloat16", "skipped": ["cut<off>.png"]}
    failed = undefined("bare", reason="the loss is <nan>")
    summary = summary_of([*RESULTS[::2], failed], FOUND | {"b": b}, features, clamp=2.5)
    seen = words_of(run_page(summary, [], {"b": [picture]}))
    made = [summary.command, *(summary.versions[name] for name in ("torch", "machine", "commit"))]
    figures = ["0.7000", "kNN", "+0.3000 [+0.2000, +0.4000]", "above 1, level 1, below 0", "b hole 7 0.7500"]
    other = ["b 0.9876 0.8765", "1:06:40", "clamp 2.5", "cut<off>.png", "no AUROC (the loss is <nan>): bare."]
    for told in (*made, *figures, *other):
        assert " ".join(told.split()) in seen, told
    empty = words_of(run_page(summary_of([undefined("bare")], {}), [], {}))
    for absent in ("Simple detectors", "Kinds of defect", "Class by class", "Left out", "nan", "None"):
        assert absent not in empty, absent


def test_nothing_is_fetched_and_names_break_nothing(picture):
    """No address outside the page in any attribute or style, a policy that forbids it, and one script."""
    summary = summary_of([result(NASTY, 0, 0.5)], {NASTY: simple(kNN=0.5)}, modelname="a<b>&amp;")
    page = run_page(summary, [], {NASTY: [picture]})
    assert words_of(page).count(NASTY) >= 4 and "a<b>&amp;" in words_of(page)
    assert page.count("<script") == page.count("</script>") == 1 and page.count("<img") == 1
    addresses = re.findall(r'\b(?:src|href|srcset|action|data)="([^"]*)"', page)
    assert len(addresses) == 1 and addresses[0].startswith("data:image/png")
    assert not re.search(r"@import|url\(|<link|<iframe|<base", page) and "default-src 'none'" in page


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
    page.write_text(run_page(summary_of(results, {}), [picture], {}))
    assert in_browser(page, FAULTS) == [[], [], 1]
    assert in_browser(page, SORTED) == [[*order, "mean"] for order in ("cba", "abc", "abc")]
    page.write_text(page.read_text().replace("base64,", "base64,spoilt"))
    assert in_browser(page, FAULTS) == [[NASTY], [], 1]
