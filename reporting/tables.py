"""Tables as text for a terminal and as Markdown."""

import math
import textwrap

TERMINAL = 100  # columns that a table on screen may take


def number(value: float | None, digits: int = 4) -> str:
    """A figure of a table; - where it is undefined."""
    return "-" if undefined(value) else f"{value:.{digits}f}"


def undefined(value: float | None) -> bool:
    return value is None or math.isnan(value)


def cell(values: dict, metric: str, n_seeds: int) -> str:
    """A metric, with its standard deviation where there are several seeds."""
    mean = number(values[metric])
    return mean if mean == "-" or n_seeds < 2 else f"{mean} ± {number(values[f'{metric}_std'])}"


def margin_cell(margins: dict[str, dict], name: str | None) -> str:
    """How far the flow of the first seed is above the best simple detector of a class, with the paired
    interval; for the mean (None), the classes where it is above by more than the interval."""
    if name is None:
        defined = [margin for margin in margins.values() if not undefined(margin["difference"])]
        return f"above in {sum(m['low'] > 0 for m in defined)} of {len(defined)}" if defined else "-"
    margin = margins.get(name)
    if margin is None or undefined(margin["difference"]):
        return "-"
    return f"{margin['difference']:+.4f} [{margin['low']:+.4f}, {margin['high']:+.4f}]"


def shorten(text: str, width: int) -> str:
    """A name on one line of at most ``width`` characters, its middle left out where it is longer."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def as_text(header: list[str], rows: list[list[str]], ruled_last: bool = True, width: int = TERMINAL) -> str:
    """The table in columns, at most ``width`` wide: the first column, of names, gives way. The last row
    stands below a line when it is a mean."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    names = max(8, min(widths[0], width - sum(widths[1:]) - 2 * (len(header) - 1)))
    for line in lines:
        line[0] = shorten(line[0], names)
    widths[0] = max(len(line[0]) for line in lines)
    text = ["  ".join(cell.ljust(size) for cell, size in zip(line, widths)).rstrip() for line in lines]
    rule = "-" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], *([rule] if ruled_last else []), text[-1]])


def wrapped(notes: list[str], width: int = TERMINAL) -> str:
    """Notes below a table, one paragraph each."""
    return "\n".join(textwrap.fill(note, width, subsequent_indent="  ") for note in notes)


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    """The table in Markdown; a name breaks neither the table nor the page."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(escaped, line)) + " |" for line in lines)


def escaped(text: str) -> str:
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
