"""The commands that the documents give can be run: their scripts are there and read the options named. The
README's first table has the figures of results/."""

import collections
import csv
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from config import Config

ROOT = Path(__file__).resolve().parent.parent
KNOBS = {field.name for field in dataclasses.fields(Config)}
PAGES = ["README.md", "CONTRIBUTING.md"] + [
    str(path.relative_to(ROOT))
    for folder in ("results", "docs", "benchmarks")
    for path in (ROOT / folder).glob("*.md")
]
COMMAND = re.compile(r"(?:^|`)\s*(?:\.venv/bin/)?python3? ((?:tools/|benchmarks/)?\w+\.py)([^`#\n]*)", re.M)


def faults(text: str) -> list[str]:
    """What is wrong with the commands of a page."""
    found = []
    for script, rest in COMMAND.findall(text):
        options = re.findall(r"--(\w+)", rest)
        if not (ROOT / script).is_file():
            found.append(f"there is no {script}")
        elif script in ("main.py", "train.py", "extractor.py"):
            found += [f"{script} does not read --{name}" for name in options if name not in KNOBS]
        else:
            code = (ROOT / script).read_text()
            found += [f"{script} has no --{name}" for name in options if f'"--{name}"' not in code]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_run(page):
    assert faults((ROOT / page).read_text()) == []


def test_what_cannot_be_run_is_found():
    wrong = "`python nowhere.py`\n```\npython train.py --n_seed 3\npython export.py x --sizes 3\n"
    assert faults(wrong) == [
        "there is no nowhere.py",
        "train.py does not read --n_seed",
        "export.py has no --sizes",
    ]


def test_what_the_reading_guide_names_is_there():
    """The files of each row, and in them the functions."""
    rows = re.findall(
        r"^\| (?!what happens)[^|]+ \| (.+\.py) \| (.+) \|$", (ROOT / "docs/reading.md").read_text(), re.M
    )
    assert len(rows) > 15
    for files, names in rows:
        code = "\n".join((ROOT / file).read_text() for file in re.split("[;,] ", files))
        for part in re.findall(r"[\w.]+", names.replace("`", "")):
            assert re.search(rf"\b(?:def|class) {part.split('.')[-1]}\b", code), f"{part} is not in {files}"


SETS = ("digits", "textures", "cells", "surfaces", "signs", "materials", "castings", "cifar10")
DETECTORS = {  # how a row of the README's table begins -> table in results/ and the detector there
    "**`accurate`, whole score**": ("suite", "whole score"),
    "the same before training": ("suite", "whole score, before training"),
    "`accurate`, the image as a whole": ("suite", "image part"),
    "`accurate`, places": ("suite", "places"),
    "the places before training": ("suite", "places, before training"),
    "**`paper`**": ("paper", "whole score"),
    "`paper`: likelihood": ("paper", "likelihood"),
    "`released` on this backbone (7 x 7 grid): mean z²": ("released", "whole score"),
    "`released`: likelihood": ("released", "likelihood"),
    "kNN, joint token": ("suite", "kNN, joint token"),
    "Gaussian, joint token": ("suite", "Gaussian, joint token"),
    "kNN, semantic token (power + L2)": ("suite", "kNN, power + L2"),
    "Gaussian, semantic token (power + L2)": ("suite", "Gaussian, power + L2"),
    "PatchCore-like, places": ("suite", "PatchCore-like, places"),
    "PaDiM-like, places": ("suite", "PaDiM-like, places"),
}


def means_of(name: str) -> dict[str, dict[str, float]]:
    """{detector: {set: mean AUROC over classes and seeds}} of results/NAME.csv, of sets all of whose classes
    it has."""
    found: dict = collections.defaultdict(lambda: collections.defaultdict(list))
    with open(ROOT / "results" / f"{name}.csv", newline="") as file:
        for row in csv.DictReader(file):
            found[row["detector"]][row["set"]].append(float(row["auroc"]))
    counts = {key: len(values) for key, values in found["whole score"].items()}
    return {
        name: {key: float(np.mean(values)) for key, values in sets.items() if len(values) == counts[key]}
        for name, sets in found.items()
    }


@pytest.mark.parametrize("label", DETECTORS)
def test_the_first_table_has_the_figures_of_results(label):
    (line,) = re.findall(rf"^\| {re.escape(label)}.*", (ROOT / "README.md").read_text(), re.M)
    cells = [cell.strip().strip("*()") for cell in line.split("|")[2 : len(SETS) + 3]]
    table, detector = DETECTORS[label]
    means = means_of(table)[detector]
    expected = [means.get(name) for name in SETS]
    expected.append(float(np.mean(list(means.values()))))
    for cell, value in zip(cells, expected):
        assert (float(cell) if cell else None) == (value and pytest.approx(value, abs=6e-5))
