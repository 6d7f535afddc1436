"""A page as a real browser shows it: Chromium, where there is one (``apt-get install chromium``)."""

import html
import json
import re
import shutil
import subprocess
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
# Pictures that did not load, what was fetched, and how many pictures there are.
FAULTS = """(window, document) => [
  [...document.images].filter((image) => !image.complete || !image.naturalWidth).map((image) => image.alt),
  window.performance.getEntriesByType("resource").map((each) => each.name)
    .filter((name) => !name.startsWith("data:")),
  document.images.length,
]"""


def in_browser(page: Path, function: str) -> Any:
    """What a JavaScript function (window, document) gives of a page that is shown; skips without a
    browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    around = page.with_name("around.html")
    around.write_text(AROUND.format(page=page.name, function=function))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}/chromium"]
    options += ["--disable-web-security", "--allow-file-access-from-files"]  # to look into the frame
    options += ["--virtual-time-budget=10000", "--dump-dom", around.resolve().as_uri()]
    ran = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=300)
    found = re.search(r"<pre>(.+?)</pre>", ran.stdout, re.DOTALL)
    assert found, ran.stderr
    return json.loads(html.unescape(found[1]))
