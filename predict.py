"""Score pictures with a fitted class: the higher, the more anomalous. One row per picture, as they
come.

python predict.py runs/foad_mfff/classes/cat-seed0 FOLDER photo.jpg > scores.csv
python predict.py runs/foad_mfff 'shots/*.png' --output scores.json --false_alarms 0.01
find . -name '*.jpg' | python predict.py runs/foad_mfff -
python predict.py runs/foad_mfff --watch FOLDER > scores.csv

A run's folder scores every picture by every class of its first seed, a row for each;
--class_name names some.

p_value: the share of normal pictures that score as high or higher, from the held-out ones;
verdict: anomalous where that is at most --false_alarms. Both are empty where none were held out.
Pictures that cannot be read are left out, listed at the end, and make the exit status 1.

--watch scores the pictures in a folder, then each that arrives there or is written anew, until
Ctrl-C or SIGTERM. One that cannot be read is tried again for half a minute: it may still be in the
writing."""

import argparse
import sys
from pathlib import Path

import config as knobs
from shell.command_line import OneLineParser, add_weights_path
from shell.files import file_name, whole_file
from shell.signals import guarded


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, help="a run, runs/<modelname>, or a class of it, .../classes/<class>-seed<n>"
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "images", nargs="*", default=[], help="files, folders, globs; - reads a list from standard input"
    )
    asked.add_argument(
        "--watch", type=Path, metavar="FOLDER", help="score pictures as they arrive there, until Ctrl-C"
    )
    parser.add_argument(
        "--class_name", help="of a run: these classes only, separated by commas (in a name: \\,) [all]"
    )
    parser.add_argument("--seed", type=int, help="of a run: this seed [the first]")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write .csv, .json or .jsonl instead of CSV to the screen"
    )
    parser.add_argument(
        "--false_alarms", type=float, help="share of normal pictures that may be called anomalous [the run's]"
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="FOLDER", help="fresh good pictures: p-values and verdicts by them"
    )
    parser.add_argument(
        "--heat_maps", type=Path, metavar="FOLDER", help="write there where each picture is unusual, as a PNG"
    )
    add_weights_path(parser)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores [0]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    return parser.parse_or_stop(argv)


if __name__ == "__main__":  # parse before the slow imports
    import signal

    ARGUMENTS = parse_arguments()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while they are imported: no traceback

import codecs
import contextlib
import csv
import glob
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator

from tqdm import tqdm

import heat_map
import utils
import watch
from config import UserError
from detector import PictureDetector
from images import images_below, pixels_of
from pictures import Unreadable

COLUMNS = ("image", "class", "score", "p_value", "verdict")
Put = Callable[[dict], None]


# ---------------------------------------------------------------- what is asked for
def find_images(names: list[str]) -> list[Path]:
    """The files that names stand for, in order: files, images below folders, globs, - for lines of standard
    input. Raises UserError on a name that stands for nothing."""
    images: list[Path] = []
    for name in names:
        path = Path(name)
        if name == "-":
            images += [Path(line) for line in lines_of(sys.stdin.buffer.read())]
        elif path.is_dir():
            images += images_below(path)
        elif path.exists():
            images.append(path)
        elif found := matching(name):
            images += found
        else:
            raise UserError(f"no file or folder {name}, and no files that it matches as a pattern")
    if not images:
        raise UserError("no pictures given: files, folders, globs or, for -, a line each on standard input")
    return images


def lines_of(content: bytes) -> list[str]:
    """The lines of a list of names, in UTF-8 or, with its mark, UTF-16, ended as on any system; empty ones
    left out. Raises UserError on what is no such list."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16", errors="replace")
    else:
        text = os.fsdecode(content.removeprefix(codecs.BOM_UTF8))
    if "\0" in text:
        raise UserError(
            "standard input: expected a name a line in UTF-8, or in UTF-16 with a byte-order mark, got NUL "
            "bytes (find takes no -print0 here)"
        )
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def matching(pattern: str) -> list[Path]:
    """The files that match a pattern, sorted. A part of it that is there as it is written stands for itself:
    a folder may have brackets in its name."""
    found = [Path()]
    for part in Path(pattern).parts:
        found = [
            place / name
            for place in found
            for name in (
                [part] if (place / part).exists() else [*[""] * (part == "**"), *_globbed(part, place)]
            )
        ]
    return sorted({path for path in found if path.is_file()}, key=str)


def _globbed(part: str, place: Path) -> list[str]:
    return glob.glob(part, root_dir=place, recursive=True)


def find_checkpoints(path: Path, class_name: str | None, seed: int | None) -> list[Path]:
    """The checkpoints of a run's folder, or the one that is named. Raises UserError when there are none."""
    if not path.is_dir():
        return [path]
    records = sorted(path.glob("classes/*.json"))
    parts = [(file, *file.stem.rpartition("-seed")[::2]) for file in records]
    numbered = [(file, name, int(number)) for file, name, number in parts if number.isdigit()]
    if not numbered:
        raise UserError(f"expected a run with classes/<class>-seed<n>.json in {path}, found none")
    first = min(number for _, _, number in numbered) if seed is None else seed
    found = {name: file for file, name, number in numbered if number == first}
    if not found:
        raise UserError(f"{path} holds no class of seed {seed}")
    if class_name is None:
        return list(found.values())
    chosen = [name.strip() for name in knobs.class_names(class_name)]
    for name in chosen:
        if file_name(name) not in found:
            raise UserError(knobs.unknown("class", name, found))
    return [found[file_name(name)] for name in chosen]


def load_all(arguments: argparse.Namespace) -> list[PictureDetector]:
    """The detectors asked for; classes of one run share the backbone. Raises UserError."""
    rate = arguments.false_alarms
    if rate is not None and not 0 < rate <= 0.5:
        raise UserError(f"false_alarms: expected a share above 0 and up to 0.5, got {rate}")
    device = utils.set_up(arguments.device, arguments.threads)
    loaded: list[PictureDetector] = []
    for path in find_checkpoints(arguments.checkpoint, arguments.class_name, arguments.seed):
        eye = loaded[0].eye if loaded else None
        loaded.append(PictureDetector.load(path, device, rate, eye, arguments.weights_path))
        if loaded[-1].record["features"] != loaded[0].record["features"]:
            raise UserError(
                f"the classes in {arguments.checkpoint} were fitted to different features; name one class"
            )
    return loaded


# ---------------------------------------------------------------- what comes out
@contextlib.contextmanager
def table(output: Path | None, at_once: bool = False) -> Iterator[Put]:
    """What takes the rows, {column: value}, one by one: CSV on the screen, or a file that is there, whole,
    when the block ends well, or ``at_once``, row by row. Raises UserError on an ending that is none of the
    three."""
    if output is None:
        yield _csv(sys.stdout)
        return
    if output.suffix not in (".csv", ".json", ".jsonl"):
        raise UserError(f"output: expected a name ending in .csv, .json or .jsonl, got {output}")
    place = contextlib.nullcontext(output) if at_once else whole_file(output)
    with place as path, open(path, "w", encoding="utf-8", newline="") as stream:
        if output.suffix == ".csv":
            yield _csv(stream)
        elif output.suffix == ".jsonl":
            yield lambda row: print(json.dumps(row, ensure_ascii=False), file=stream, flush=True)
        else:
            comma = iter(["[\n"])
            yield lambda row: print(
                next(comma, ",\n") + json.dumps(row, ensure_ascii=False), end="", file=stream, flush=True
            )
            print(next(comma, "") + "\n]", file=stream)


def _csv(stream) -> Put:
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()

    def put(row: dict) -> None:
        writer.writerow(row | {"score": f"{row['score']:.6g}"})
        stream.flush()

    return put


def rows_of(detectors: list[PictureDetector], files: list[Path]) -> Iterator[list[dict] | Unreadable]:
    """The table's rows, in the order of the files: of some pictures together, or why one cannot be read."""
    waiting = iter(files)
    for rows in detectors[0].eye.rows(files):
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
    """``rows_of`` the pictures that arrive, without an end; one that cannot be read is tried again, and told
    of once there is little hope."""
    print(f"watching {arrivals.folder}; Ctrl-C ends", file=sys.stderr, flush=True)
    while True:
        files = arrivals.ready()
        waiting = iter(files)
        for part in rows_of(detectors, files):
            if not isinstance(part, Unreadable):
                for path in itertools.islice(waiting, len(part) // len(detectors)):
                    arrivals.done(path)
                yield part
            elif arrivals.given_up(next(waiting)):
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


def draw_heat_maps(
    detectors: list[PictureDetector], rows: list[dict], folder: Path, drawn: set[Path]
) -> None:
    """A PNG for each row: the picture, and where it is unusual. drawn: those of this run, to which these are
    added; names that are alike get a number, what an earlier run left takes none."""
    for row in rows:
        fitted = next(known for known in detectors if known.class_name == row["class"])
        name = f"{Path(row['image']).stem}-{row['class']}" if len(detectors) > 1 else Path(row["image"]).stem
        stem, number = file_name(name), 1
        while (path := folder / f"{stem}{f'-{number}' * (number > 1)}.png") in drawn:
            number += 1
        drawn.add(path)
        told = f"{row['image']}  score {row['score']:.3g}  {row['verdict'] or ''}"
        try:
            heat_map.draw(pixels_of(row["image"]), fitted.heat_map(row["image"]), path, told)
        except UserError as gone:  # or changed since it was scored
            drawn.remove(path)
            print(f"no heat map: {gone}", file=sys.stderr)


def calibrate(detectors: list[PictureDetector], folder: Path) -> list[str]:
    """Let the detectors' p-values rest on the good pictures of a folder -> those that cannot be read. Raises
    UserError when none can."""
    scores: list[list[float]] = [[] for _ in detectors]
    unreadable = []
    files = images_below(folder) if folder.is_dir() else []
    for rows in progress(detectors[0].eye.rows(files), len(files), "calibrating", True):
        if isinstance(rows, Unreadable):
            unreadable.append(rows.reason)
        else:
            for known, fitted in zip(scores, detectors):
                known += fitted.score_rows(rows).tolist()
    if not scores[0]:
        raise UserError(
            f"calibrate: expected a folder of good pictures, found none that can be read in {folder}"
        )
    for known, fitted in zip(scores, detectors):
        fitted.calibrate_to(known)
    return unreadable


def progress(parts: Iterator, total: int, text: str, shown: bool) -> Iterator:
    """The same parts, with a bar on standard error that counts pictures; none where it is no terminal."""
    with tqdm(total=total, unit="img", desc=text, disable=None if shown else True) as bar:
        for part in parts:
            yield part
            bar.update(1 if isinstance(part, Unreadable) else _count(part))


def _count(part) -> int:
    return len({row["image"] for row in part}) if isinstance(part, list) else len(next(iter(part.values())))


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
    anomalous = [
        f"{counts[fitted.class_name]} anomalous" + f" by {fitted.class_name}" * (len(detectors) > 1)
        for fitted in detectors
        if len(fitted.held_out)
    ]
    told = ", ".join([f"{done} pictures scored", *anomalous, *[f"{failed} unreadable"] * (failed > 0)])
    print(told + (f"; rows in {output}" if output else ""), file=sys.stderr)


def main(arguments: argparse.Namespace) -> int:
    """Score the pictures -> the exit status: 1 where some could not be read."""
    arrivals = watch.Arrivals(arguments.watch) if arguments.watch else None
    files = [] if arrivals else find_images(arguments.images)
    detectors = load_all(arguments)
    unreadable = calibrate(detectors, arguments.calibrate) if arguments.calibrate else []
    failed = len(unreadable)
    counts: Counter[str] = Counter()  # of the verdicts of each class
    drawn: set[Path] = set()
    written, bar = 0, arguments.output is not None or not sys.stdout.isatty()
    tell_thresholds(detectors)
    parts = rows_arriving(detectors, arrivals) if arrivals else rows_of(detectors, files)
    ends = [KeyboardInterrupt] if arrivals else []  # as watching does
    try:
        with table(arguments.output, at_once=arrivals is not None) as put, contextlib.suppress(*ends):
            for part in progress(parts, len(files), "scoring", bar and not arrivals):
                if isinstance(part, Unreadable):
                    failed += 1
                    if arrivals:
                        print(f"skipped: {part.reason}", file=sys.stderr, flush=True)
                    else:
                        unreadable.append(part.reason)
                    continue
                for line in part:
                    counts[line["class"]] += line["verdict"] == "anomalous"
                    written += 1
                    put(line)
                if arguments.heat_maps:
                    draw_heat_maps(detectors, part, arguments.heat_maps, drawn)
    except KeyboardInterrupt:
        kept = f"; {arguments.output} is not written" if arguments.output else ""
        done = written // len(detectors)
        print(f"interrupted: {done} of {len(files)} pictures were scored{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the rows has seen enough
        sys.stdout = None  # type: ignore[assignment]
        return 0
    tell_counts(detectors, counts, written // len(detectors), failed if arrivals else 0, arguments.output)
    if drawn and (stale := len(set(arguments.heat_maps.glob("*.png")) - drawn)):
        print(
            f"note: {arguments.heat_maps} also holds {utils.counted(stale, 'PNG')} of other runs",
            file=sys.stderr,
        )
    for reason in unreadable:
        print(f"skipped: {reason}", file=sys.stderr)
    return 1 if failed else 0


def run(arguments: argparse.Namespace) -> None:
    sys.exit(main(arguments))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    guarded(run, ARGUMENTS)
