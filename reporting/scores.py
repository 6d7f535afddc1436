"""Scores of pictures as they come: the rows of their table, and its CSV."""

import contextlib
import csv
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from backbone.resizing import Unreadable
from detector.picture_detector import PictureDetector
from images.watch import INTERVAL, Arrivals
from shell.files import whole_file


class Row(NamedTuple):
    """What a class says of a picture. p_value, verdict: None where no pictures were held out."""

    image: str
    class_name: str
    score: float
    p_value: float | None
    verdict: str | None


@contextlib.contextmanager
def table(output: Path | None, at_once: bool = False) -> Iterator[Callable[[Row], None]]:
    """What takes the rows one by one: CSV on the screen, or a file that is there, whole, when the block ends
    well, or ``at_once``, row by row, behind those that it has."""
    with contextlib.ExitStack() as stack:
        stream = sys.stdout
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            path = output if at_once else stack.enter_context(whole_file(output))
            stream = open(path, "a", encoding="utf-8", errors="backslashreplace", newline="")  # any name
            stack.enter_context(stream)
        writer = csv.writer(stream, lineterminator="\n")
        if output is None or not stream.tell():
            writer.writerow(("image", "class", "score", "p_value", "verdict"))

        def put(row: Row) -> None:
            writer.writerow(row._replace(score=f"{row.score:.6g}"))  # type: ignore[arg-type]
            stream.flush()

        yield put


def rows_of(detectors: list[PictureDetector], files: list[Path]) -> Iterator[list[Row] | Unreadable]:
    """Of each file in turn what every class says of it, or why it cannot be read."""
    waiting = iter(files)
    for rows in detectors[0].backbone.rows(files):
        if isinstance(rows, Unreadable):
            next(waiting)
            yield rows
            continue
        for scores in zip(*(fitted.score_rows(rows) for fitted in detectors)):
            name = str(next(waiting))
            yield [row(name, fitted, score) for fitted, score in zip(detectors, scores)]


def rows_arriving(detectors: list[PictureDetector], arrivals: Arrivals) -> Iterator[list[Row] | Unreadable]:
    """``rows_of`` the pictures that arrive, without an end; one that changed while it was read waits again,
    one that cannot be read is tried again, and told of once there is little hope."""
    print(f"watching {arrivals.folder}; Ctrl-C ends", file=sys.stderr, flush=True)
    while True:
        files = arrivals.ready()
        # the rows first: they are asked for their end, too, and no signal falls into their disposal
        for part, path in zip(rows_of(detectors, files), files):
            if arrivals.settles(path, unreadable=isinstance(part, Unreadable)):
                yield part
        time.sleep(INTERVAL)


def row(name: str, fitted: PictureDetector, score: float) -> Row:
    known = len(fitted.held_out) > 0
    p_value = round(fitted.p_value(score), 6) if known else None
    return Row(name, fitted.class_name, float(score), p_value, fitted.verdict(score) if known else None)
