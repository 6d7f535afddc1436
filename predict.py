"""Score pictures with a fitted class: higher is more anomalous. One row per picture, as they come.

python predict.py runs/foad_mfff/classes/cat-seed0 FOLDER photo.jpg > scores.csv
python predict.py runs/foad_mfff 'shots/*.png' --output scores.csv --false_alarms 0.01
find . -name '*.jpg' | python predict.py runs/foad_mfff -
python predict.py runs/foad_mfff/classes/cat-seed0 FOLDER --page verdicts.html
python predict.py runs/foad_mfff --watch FOLDER > scores.csv

A run's folder scores each picture by every class of its first seed, or by those of --class_name.

What a row says, and of which classes there are heat maps: docs/verdicts.md. Pictures that cannot
be read are named and left out, and make the exit status 1.

--watch scores the pictures in a folder, then each that arrives or is written anew, until Ctrl-C
or SIGTERM. One that has not changed for a second is taken for whole; one that cannot be read, as
what is half written, is tried again, for half a minute."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import OneLineParser
from shell.signals import guarded


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run, runs/<modelname>, or a class: .../classes/<class>-seed<n>")
    add("images", nargs="*", default=[], help="files, folders, globs; -: a list from stdin")
    add("--watch", type=Path, metavar="FOLDER", help="score pictures as they arrive there; no images then")
    add("--class_name", help="of a run: these classes only, separated by commas [all]")
    add("--seed", type=int, help="of a run: this seed [the first]")
    add("--output", type=Path, metavar="FILE", help="write the CSV there, not to the screen")
    add("--false_alarms", type=float, help="share of normal pictures that may count as anomalous [the fit's]")
    add("--calibrate", type=Path, metavar="FOLDER", help="fresh good pictures: p-values, verdicts by them")
    add("--heat_maps", type=Path, metavar="FOLDER", help="write there where each is unusual, as a PNG")
    add("--page", type=Path, metavar="FILE", help="write a page for a browser: pictures by score, heat maps")
    add("--weights_path", type=Path, metavar="FILE", help="where the file of the fit's --weights_path is now")
    add("--threads", type=int, default=0, help="CPU threads; 0: all cores [0]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parsed = parser.parse_intermixed_args(argv)
    if bool(parsed.images) == bool(parsed.watch):
        parser.error("expected images or --watch FOLDER, " + ("not both" if parsed.watch else "got neither"))
    return parsed


if __name__ == "__main__":  # parse before the slow imports
    ARGUMENTS = parse_arguments()

import contextlib
from collections import Counter

from tqdm import tqdm

from backbone.resizing import Unreadable
from config import UserError
from detector.checkpoints import find_checkpoints
from detector.picture_detector import NO_PLACES, PictureDetector
from images import images, watch
from reporting import overlays, pages, scores


def load_all(arguments: argparse.Namespace) -> list[PictureDetector]:
    """The detectors asked for, of one backbone, once it is said on standard error where each draws the line.
    Raises UserError."""
    asked = (arguments.device, arguments.threads, arguments.false_alarms, arguments.weights_path)
    loaded: list[PictureDetector] = []
    for path in find_checkpoints(arguments.checkpoint, arguments.class_name, arguments.seed):
        backbone = loaded[0].backbone if loaded else None
        loaded.append(PictureDetector.load(path, *asked, backbone=backbone))
        if loaded[-1].record.features != loaded[0].record.features:
            raise UserError(f"{arguments.checkpoint}: classes fitted to different features; name one class")
    if good := arguments.calibrate:
        if len(loaded) > 1:
            raise UserError(f"calibrate: {good} is of one class, not of {len(loaded)}; name it: --class_name")
        loaded[0].calibrate(images.images_below(good))
    for fitted in loaded:
        none = "no verdicts: no normal pictures were held out; --calibrate FOLDER"
        print(f"{fitted.class_name}: {fitted.threshold if len(fitted.held_out) else none}", file=sys.stderr)
        if (arguments.page or arguments.heat_maps) and not fitted.fitted.uses_places:
            print(f"{fitted.class_name}: no heat maps: {NO_PLACES}", file=sys.stderr)
    return loaded


def main(arguments: argparse.Namespace) -> int:
    """Score the pictures -> the exit status: 1 where some could not be read."""
    page, maps, output = arguments.page, arguments.heat_maps, arguments.output
    arrivals = watch.Arrivals(arguments.watch) if arguments.watch else None
    files = [] if arrivals else images.find_images(arguments.images)
    for file in (page, output):
        if file and file.is_dir():
            raise UserError(f"expected a file to write to, {file} is a folder")
    if page and arrivals:
        raise UserError("page: expected pictures that are there, --watch has no end; leave one out")
    if maps:
        images.refuse_among(maps, [Path(name) for name in arguments.images or [arguments.watch]], files)
        maps.mkdir(parents=True, exist_ok=True)
    detectors = load_all(arguments)
    counts = Counter({"pictures scored": 0})
    drawn: set[Path] = set()
    on_page: list[scores.Row] = []
    parts = scores.rows_arriving(detectors, arrivals) if arrivals else scores.rows_of(detectors, files)
    ends = [KeyboardInterrupt] if arrivals else []  # as watching does
    hidden = True if arrivals or output is None and sys.stdout.isatty() else None
    try:
        with scores.table(output, at_once=arrivals is not None) as put, contextlib.suppress(*ends):
            for part in tqdm(parts, "scoring", len(files), unit="img", disable=hidden):
                if isinstance(part, Unreadable):
                    counts["unreadable"] += 1
                    tqdm.write(f"skipped: {part.reason}", file=sys.stderr)
                    continue
                counts["pictures scored"] += 1
                for row in part:
                    put(row)
                    if row.verdict:
                        counts[f"anomalous by {row.class_name}"] += row.verdict == "anomalous"
                if page:
                    on_page += part
                if maps:
                    overlays.draw_heat_maps(detectors, part, maps, drawn)
    except BrokenPipeError:  # whoever read the rows has seen enough
        sys.stdout = None  # type: ignore[assignment]
        return 0
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(told + (f"; rows in {output}" if output else ""), file=sys.stderr)
    if page:
        pages.write_verdicts(page, detectors, on_page)
    return 1 if counts["unreadable"] else 0


if __name__ == "__main__":
    guarded(lambda arguments: sys.exit(main(arguments)), ARGUMENTS)
