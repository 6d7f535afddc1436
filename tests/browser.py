"""A page as a real browser shows it: Chromium, where there is one (``apt-get install chromium``)."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# The page in a frame, and beside it what a function of the frame's window gives, as JSON.
AROUND = """<!doctype html><iframe src="{page}" width="1200" height="900"></iframe><pre></pre><script>
onload = () => {{
  const inside = frames[0];
  let found;
  try {{ found = ({function})(inside, inside.document); }} catch (error) {{ found = String(error); }}
  document.querySelector("pre").textContent = JSON.stringify(found);
}};
</script>"""


class _Found(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.inside, self.text = False, ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "pre"

    def handle_data(self, data):
        self.text += data if self.inside else ""


def in_browser(page: Path, function: str) -> Any:
    """What a JavaScript function (window, document) gives of a page that is shown; skips without a
    browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    around = page.with_name("around.html")
    around.write_text(AROUND.format(page=page.name, function=function))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={page.parent}/chromium",
    ]
    command += ["--disable-web-security", "--allow-file-access-from-files"]  # to look into the frame
    command += ["--virtual-time-budget=10000", "--dump-dom", around.resolve().as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    text = _Found(ran.stdout).text
    assert text, ran.stderr
    return json.loads(text)


# Pictures that did not load, what was fetched, and how many pictures there are.
FAULTS = """(window, document) => [
  [...document.images].filter((image) => !image.complete || !image.naturalWidth).map((image) => image.alt),
  window.performance.getEntriesByType("resource").map((each) => each.name)
    .filter((name) => !name.startsWith("data:")),
  document.images.length,
]"""
