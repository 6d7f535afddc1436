"""What the documents say is so: commands can be run, files and functions are there, tables have the figures
of results/, and pages are short."""

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
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] + [
    str(path.relative_to(ROOT))
    for folder in ("results", "docs", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md"))
]
COMMAND = re.compile(r"(?:^|`)\s*(?:\.venv/bin/)?python3? ((?:tools/|benchmarks/)?\w+\.py)([^`#\n]*)", re.M)
LINK = re.compile(r"\]\(([^)#:]+)\)")
FILE = re.compile(r"`((?:\w+/)*\w+\.(?:py|md|toml))`")


def faults(text: str) -> list[str]:
    """What is wrong with the commands of a page."""
    found = []
    for script, rest in COMMAND.findall(text):
        own = rest.split(" run ")[0]  # of speed.py run SCRIPT, what follows is SCRIPT's
        options = re.findall(r"--(\w+)", own)
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


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    path = ROOT / page
    text = path.read_text()
    assert [link for link in LINK.findall(text) if not (path.parent / link).exists()] == []
    assert [name for name in FILE.findall(text) if not (ROOT / name).is_file()] == []


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert sum(len(line.split()) for line in lines) <= 1000
    assert max(map(len, lines)) <= 200


def missing(file: str, names: str) -> list[str]:
    """Which of the names in backticks no function or class of the file has."""
    code = (ROOT / file).read_text()
    return [name for name in re.findall(r"`(\w+)`", names) if not re.search(rf"(?:def|class) {name}\b", code)]


@pytest.mark.parametrize("page, least", [("docs/reading.md", 20), ("results/README.md", 8)])
def test_what_the_reading_guide_names_is_there(page, least):
    """Each file of a row and, in its turn, the functions named of it."""
    rows = re.findall(r"^\| [^|]+ \| ([^|]+\.py) \| (.+) \|$", (ROOT / page).read_text(), re.M)
    assert len(rows) >= least
    for files, names in rows:
        pairs = zip(files.split("; "), names.split("; "), strict=True)
        assert [(file, name) for file, each in pairs for name in missing(file, each)] == []


EQUATION = re.compile(r"^\*\*\((\d+)\)\*\* [^`]+, `(\S+\.py)`: (`\w+`)\n\n```\n", re.M)


def test_every_equation_stands_alone_and_names_its_function():
    found = EQUATION.findall((ROOT / "docs/method.md").read_text())
    assert [int(number) for number, *_ in found] == list(range(1, 24))
    assert [number for number, file, name in found if missing(file, name)] == []


# ---------------------------------------------------------------- tables of figures
SETS = ("digits", "textures", "cells", "surfaces", "signs", "materials", "castings", "cifar10")
LITE0, VIT = "EfficientNet-Lite0", "ViT-Tiny"
README = {  # detector and backbone of a row -> table in results/ and the detector there
    ("`paper`: mean z²", LITE0): ("paper-lite0", "whole score"),
    ("`paper`: mean z², one epoch", VIT): ("paper", "hilo, epoch 1: latent"),
    ("best baseline: Gaussian, semantic token", VIT): ("paper", "Gaussian, raw"),
    ("**`accurate`**: whole score", LITE0): ("suite", "whole score"),
    ("best baseline: Gaussian, joint token", LITE0): ("suite", "Gaussian, joint token"),
}
RESULTS = {  # the same of results/README.md, whose rows have one backbone
    "**`accurate`: whole score**": ("suite", "whole score"),
    "whole score before training": ("suite", "whole score, before training"),
    "image part": ("suite", "image part"),
    "places": ("suite", "places"),
    "places before training": ("suite", "places, before training"),
    "likelihood: the flow alone": ("suite", "likelihood"),
    "**`paper`: mean z²**, as released": ("paper-lite0", "whole score"),
    "`released`: mean z²": ("released", "whole score"),
    "`released`: likelihood": ("released", "likelihood"),
    "Gaussian, joint token": ("suite", "Gaussian, joint token"),
    "kNN, joint token": ("suite", "kNN, joint token"),
    "Gaussian, semantic token": ("suite", "Gaussian, power + L2"),
    "kNN, semantic token": ("suite", "kNN, power + L2"),
    "PatchCore-like, places": ("suite", "PatchCore-like, places"),
    "PaDiM-like, places": ("suite", "PaDiM-like, places"),
    "PaDiM-like or kNN, by spread": ("suite", "PaDiM-like or kNN, by spread"),
}


def means_of(name: str) -> dict[str, dict[str, float]]:
    """{detector: {set: mean AUROC over classes and seeds}} of results/NAME.csv, of sets all of whose classes
    it has."""
    found: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    with open(ROOT / "results" / f"{name}.csv", newline="") as file:
        for row in csv.DictReader(file):
            classes = found[row["detector"]][row["set"]]
            classes.setdefault(row["class"], []).append(float(row["auroc"]))
    counts = {key: max(len(sets.get(key, ())) for sets in found.values()) for key in SETS}
    return {
        name: {
            key: float(np.mean([*map(np.mean, sets[key].values())]))
            for key in SETS
            if len(sets.get(key, ())) == counts[key] > 0
        }
        for name, sets in found.items()
    }


def rows_of(page: str, titles: int) -> dict:
    """Titles of the rows of a page's first table of figures -> their figures by set, and the mean."""
    table = (ROOT / page).read_text().split("| digits |")[1].split("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        figures = cells[titles : titles + len(SETS) + 1]
        found[tuple(cells[:titles])] = [float(cell.strip("*()")) if cell else None for cell in figures]
    return found


def check_row(figures: list, table: str, detector: str) -> None:
    means = means_of(table)[detector]
    expected = [means.get(name) for name in SETS] + [float(np.mean(list(means.values())))]
    assert figures == [value and pytest.approx(value, abs=5.01e-5) for value in expected]


def test_the_readme_has_the_figures_of_results():
    rows = rows_of("README.md", titles=2)
    assert rows.keys() == README.keys()
    for title, figures in rows.items():
        check_row(figures, *README[title])


def test_results_have_the_figures_of_their_tables():
    rows = rows_of("results/README.md", titles=1)
    assert len(rows) == len(RESULTS) + 1  # and the best baseline of each class
    for title, (table, detector) in RESULTS.items():
        check_row(rows[(title,)], table, detector)


def test_every_claim_has_its_figures_in_the_readme_and_in_its_file():
    """A file may have more digits."""
    readme, text = (ROOT / "README.md").read_text(), (ROOT / "results/claims.md").read_text()
    claims = re.findall(r"^\| [^|]+ \| ([^|]+) \| (\S+\.md) \|$", text, re.M)
    assert len(claims) > 8
    for figures, file in claims:
        known = [float(number) for number in re.findall(r"\.\d+", (ROOT / file).read_text())]
        for figure in figures.split(", "):
            half = 0.5 * 10.0 ** -len(figure.partition(".")[2]) + 1e-9
            there = any(abs(number - float(figure.strip("−"))) <= half for number in known)
            assert there and figure in readme, (figure, file)
