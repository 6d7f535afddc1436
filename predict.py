"""Score pictures with a fitted class: the higher, the more anomalous. One row per picture, as they
come.

python predict.py runs/foad_mfff/classes/cat-seed0 FOLDER photo.jpg > scores.csv
python predict.py runs/foad_mfff 'shots/*.png' --output scores.json --false_alarms 0.01
find . -name '*.jpg' | python predict.py runs/foad_mfff -

A run's folder scores every picture by every class of its first seed, a row for each;
--class_name names some.

p_value: the share of normal pictures that score as high or higher, from the held-out ones;
verdict: anomalous where that is at most --false_alarms. Both are empty where none were held out.
Pictures that cannot be read are left out, listed at the end, and make the exit status 1."""

import argparse
import sys
from pathlib import Path

from shell.command_line import OneLineParser, add_weights_path
from shell.signals import guarded


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, help="a run, runs/<modelname>, or a class of it, .../classes/<class>-seed<n>"
    )
    parser.add_argument("images", nargs="+", help="files, folders, globs; - reads a list from standard input")
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

from collections import Counter
from collections.abc import Iterator

from tqdm import tqdm

import utils
from backbone.resizing import Unreadable
from config import UserError
from detector.detector import PictureDetector
from detector.records import find_checkpoints
from images.given import find_images
from images.images import images_below
from reporting.overlays import draw_heat_maps
from reporting.scores import rows_of, table, tell_counts, tell_thresholds


# ---------------------------------------------------------------- what is asked for
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


def main(arguments: argparse.Namespace) -> int:
    """Score the pictures -> the exit status: 1 where some could not be read."""
    files = find_images(arguments.images)
    detectors = load_all(arguments)
    unreadable = calibrate(detectors, arguments.calibrate) if arguments.calibrate else []
    counts: Counter[str] = Counter()  # of the verdicts of each class
    drawn: set[Path] = set()
    done, bar = 0, arguments.output is not None or not sys.stdout.isatty()
    tell_thresholds(detectors)
    try:
        with table(arguments.output) as put:
            for part in progress(rows_of(detectors, files), len(files), "scoring", bar):
                if isinstance(part, Unreadable):
                    unreadable.append(part.reason)
                    continue
                for line in part:
                    put(line)
                    counts[line["class"]] += line["verdict"] == "anomalous"
                if arguments.heat_maps:
                    draw_heat_maps(detectors, part, arguments.heat_maps, drawn)
                done += len(part) // len(detectors)
    except KeyboardInterrupt:
        kept = f"; {arguments.output} is not written" if arguments.output else ""
        print(f"interrupted: {done} of {len(files)} pictures were scored{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the rows has seen enough
        sys.stdout = None  # type: ignore[assignment]
        return 0
    tell_counts(detectors, counts, done, arguments.output)
    if drawn and (stale := len(set(arguments.heat_maps.glob("*.png")) - drawn)):
        print(
            f"note: {arguments.heat_maps} also holds {utils.counted(stale, 'PNG')} of other runs",
            file=sys.stderr,
        )
    for reason in unreadable:
        print(f"skipped: {reason}", file=sys.stderr)
    return 1 if unreadable else 0


def run(arguments: argparse.Namespace) -> None:
    sys.exit(main(arguments))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    guarded(run, ARGUMENTS)
