"""Tables, as text for a terminal and as Markdown; what a figure and an interval look like in a cell."""

import math
import textwrap
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

TERMINAL = 100  # columns that a table on screen may take


class Table(NamedTuple):
    """has_mean: whether the last row is the mean of the others."""

    header: list[str]
    rows: list[list[str]]
    has_mean: bool = False


def undefined(value: float | None) -> bool:
    return value is None or math.isnan(value)


def number(value: float | None) -> str:
    """A figure of a table; - where it is undefined."""
    return "-" if undefined(value) else f"{value:.4f}"


def cell(values: dict, n_seeds: int) -> str:
    """An AUROC, with its standard deviation where there are several seeds."""
    mean = number(values["auroc"])
    return mean if mean == "-" or n_seeds < 2 else f"{mean} ± {number(values['auroc_std'])}"


def margin_cell(margin: dict) -> str:
    """A difference of AUROCs with its 95 % interval (``utils.paired_difference``)."""
    if undefined(margin.get("difference")):
        return "-"
    return f"{margin['difference']:+.4f} [{margin['low']:+.4f}, {margin['high']:+.4f}]"


def wins_cell(margins: list[dict]) -> str:
    """In how many classes a difference is above zero, level with it, and below it, at .05: by the Gaussian
    (DeLong's) whose 95 % intervals they have, with Holm's correction for how many classes are looked at."""
    known = [margin for margin in margins if not undefined(margin.get("difference"))]
    difference = np.array([margin["difference"] for margin in known])
    error = np.array([margin["high"] - margin["low"] for margin in known]) / (2 * 1.96)
    sure = holm(2 * ndtr(-np.abs(difference) / np.maximum(error, 1e-300))) <= 0.05
    above, below = (sure & (difference > 0)).sum(), (sure & (difference < 0)).sum()
    return f"above {above}, level {len(known) - above - below}, below {below}" if known else "-"


def holm(p: np.ndarray) -> np.ndarray:
    """p-values (n), corrected for there being n of them (Holm 1979)."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    return np.minimum(adjusted, 1)[np.argsort(order)]


def shorten(text: str, width: int) -> str:
    """A name on one line of at most ``width`` characters, its middle left out where it is longer."""
    text = " ".join(text.split())
    tail = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def as_text(header: list[str], rows: list[list[str]], has_mean: bool = False) -> str:
    """The table in columns, TERMINAL wide at most: the first column, of names, gives way."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    left = max(8, TERMINAL - sum(widths[1:]) - 2 * (len(header) - 1))
    lines = [[shorten(first, left), *others] for first, *others in (header, *rows)]
    widths[0] = max(len(line[0]) for line in lines)
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    rule = "-" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], *[rule] * has_mean, text[-1]])


def wrapped(notes: list[str]) -> str:
    """Notes below a table, one paragraph each."""
    return "\n".join(textwrap.fill(note, TERMINAL, subsequent_indent="  ") for note in notes)


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    """The table in Markdown; a name breaks neither the table nor the page."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(escaped, line)) + " |" for line in lines)


def escaped(text: str) -> str:
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
