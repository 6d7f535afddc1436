"""Scores of pictures as they come: the rows of their table, its CSV, and what is said beside it."""

import contextlib
import csv
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from backbone.resizing import Unreadable
from detector.picture_detector import PictureDetector
from images import watch
from images.images import note
from shell.files import whole_file

COLUMNS = ("image", "class", "score", "p_value", "verdict")


class Row(NamedTuple):
    """What a class says of a picture. p_value, verdict: None where no pictures were held out."""

    image: str
    class_name: str
    score: float
    p_value: float | None
    verdict: str | None


WriteRow = Callable[[Row], None]


@contextlib.contextmanager
def table(output: Path | None, at_once: bool = False) -> Iterator[WriteRow]:
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
            writer.writerow(COLUMNS)

        def put(row: Row) -> None:
            writer.writerow(row._replace(score=f"{row.score:.6g}"))  # type: ignore[arg-type]
            stream.flush()

        yield put


def rows_of(detectors: list[PictureDetector], files: list[Path]) -> Iterator[list[Row] | Unreadable]:
    """The table's rows, in the order of the files: of some pictures together, or why one cannot be read."""
    waiting = iter(files)
    for rows in detectors[0].backbone.rows(files):
        if isinstance(rows, Unreadable):
            next(waiting)
            yield rows
            continue
        columns = [(fitted, fitted.score_rows(rows)) for fitted in detectors]
        named = [str(next(waiting)) for _ in columns[0][1]]
        yield [row(name, fitted, scores[i]) for i, name in enumerate(named) for fitted, scores in columns]


def rows_arriving(
    detectors: list[PictureDetector], arrivals: watch.Arrivals
) -> Iterator[list[Row] | Unreadable]:
    """``rows_of`` the pictures that arrive, without an end; one that changed while it was read waits again,
    one that cannot be read is tried again, and told of once there is little hope."""
    print(f"watching {arrivals.folder}; Ctrl-C ends", file=sys.stderr, flush=True)
    while True:
        files = arrivals.ready()
        waiting = iter(files)
        for part in rows_of(detectors, files):
            if not isinstance(part, Unreadable):
                paths = list(itertools.islice(waiting, len(part) // len(detectors)))
                whole = {str(path) for path in paths if arrivals.settles(path)}
                yield [line for line in part if line.image in whole]
            elif arrivals.settles(next(waiting), unreadable=True):
                yield part
        time.sleep(watch.INTERVAL)


def row(name: str, fitted: PictureDetector, score: float) -> Row:
    known = len(fitted.held_out) > 0
    p_value = round(fitted.p_value(score), 6) if known else None
    return Row(name, fitted.class_name, float(score), p_value, fitted.verdict(score) if known else None)


def tell_thresholds(detectors: list[PictureDetector]) -> None:
    """Say on standard error where the verdicts draw the line, and where that rests on too little."""
    for fitted in detectors:
        name = f"{fitted.class_name}: " if len(detectors) > 1 else ""
        if not len(fitted.held_out):
            print(f"{name}no verdicts: no normal pictures were held out; --calibrate FOLDER", file=sys.stderr)
            continue
        print(f"{name}{fitted.threshold}", file=sys.stderr)
        if fitted.threshold.warning:
            print(f"warning: {name}{fitted.threshold.warning}", file=sys.stderr)


def tell_counts(
    detectors: list[PictureDetector], counts: Counter[str], done: int, failed: int, output: Path | None
) -> None:
    """Say on standard error how many pictures were scored, how many each class calls anomalous, how many
    could not be read, and where the rows are."""
    told = [f"{done} pictures scored"]
    for fitted in detectors:
        by = f" by {fitted.class_name}" if len(detectors) > 1 else ""
        told += [f"{counts[fitted.class_name]} anomalous{by}"] if len(fitted.held_out) else []
    told += [f"{failed} unreadable"] if failed else []
    print(", ".join(told) + (f"; rows in {output}" if output else ""), file=sys.stderr)
    if line := detectors[0].backbone.scale.beyond():
        note(line)
