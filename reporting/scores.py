"""Scores of pictures as they come: the rows of their table, its CSV, and what is said beside it."""

import contextlib
import csv
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from backbone.resizing import Unreadable
from config import UserError
from detector.picture_detector import PictureDetector
from images import watch
from images.images import note
from shell.files import naming, whole_file

COLUMNS = ("image", "class", "score", "p_value", "verdict")
WriteRow = Callable[[dict], None]


def check_output(output: Path | None) -> None:
    """Raise UserError on a file that is not to be CSV."""
    if output is not None and output.suffix != ".csv":
        raise UserError(f"output: expected a name ending in .csv, got {output}")


@contextlib.contextmanager
def table(output: Path | None, at_once: bool = False) -> Iterator[WriteRow]:
    """What takes the rows, {column: value}, one by one: CSV on the screen, or a file that is there, whole,
    when the block ends well, or ``at_once``, row by row, behind those that it has."""
    if output is None:
        with naming("standard output"):
            yield _csv(sys.stdout, headed=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    place = contextlib.nullcontext(output) if at_once else whole_file(output)
    with (
        naming(output),
        place as path,
        open(path, "a", encoding="utf-8", errors="backslashreplace", newline="") as stream,  # any name
    ):
        yield _csv(stream, headed=stream.tell() > 0)


def _csv(stream, headed: bool) -> WriteRow:
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    if not headed:
        writer.writeheader()

    def put(row: dict) -> None:
        writer.writerow(row | {"score": f"{row['score']:.6g}"})
        stream.flush()

    return put


def rows_of(detectors: list[PictureDetector], files: list[Path]) -> Iterator[list[dict] | Unreadable]:
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
) -> Iterator[list[dict] | Unreadable]:
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
                yield [line for line in part if line["image"] in whole]
            elif arrivals.settles(next(waiting), unreadable=True):
                yield part
        time.sleep(watch.INTERVAL)


def row(name: str, fitted: PictureDetector, score: float) -> dict:
    known = len(fitted.held_out) > 0
    return {
        "image": name,
        "class": fitted.class_name,
        "score": float(score),
        "p_value": round(fitted.p_value(score), 6) if known else None,
        "verdict": fitted.verdict(score) if known else None,
    }


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
    could not be read, where they are not listed, and where the rows are."""
    told = [f"{done} pictures scored"]
    for fitted in detectors:
        by = f" by {fitted.class_name}" if len(detectors) > 1 else ""
        told += [f"{counts[fitted.class_name]} anomalous{by}"] if len(fitted.held_out) else []
    told += [f"{failed} unreadable"] if failed else []
    print(", ".join(told) + (f"; rows in {output}" if output else ""), file=sys.stderr)
    if line := detectors[0].backbone.scale.beyond():
        note(line)
