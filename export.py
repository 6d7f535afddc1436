"""One file that scores pictures without this repository: uint8 pictures in; score, p-value and
verdict out.

python export.py runs/foad_mfff/classes/cat-seed0 cat.onnx
python export.py runs/foad_mfff/classes/cat-seed0 cat.pt2 --size 480x640

Input "images" (n, H, W, 3) uint8, any n, RGB; H and W are the backbone's own, or those of
--size, which are resized inside as Pillow does. Outputs "score" (n), "p_value" (n) among the
held-out normal pictures (NaN without any) and "anomalous" (n), whether the score is above the
threshold at --false_alarms. The file is compared with the detector before it is put in its
place.

The arithmetic is float32, and whatever runs the file is to keep to it: OpenVINO computes in
bfloat16 on newer processors unless INFERENCE_PRECISION_HINT is f32, as in
core.compile_model("cat.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}); scores are a
hundredth off otherwise, and verdicts near the threshold flip. The ONNX file's metadata say so
("precision"). Held-out scores of a fit in bfloat16 differ from it: --calibrate
FOLDER rests p-values and verdicts on fresh good pictures, scored as the file scores them; so
does a fit with --precision float32."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import OneLineParser, add_weights_path
from shell.signals import guarded
from shell.values import parse_values


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a class: runs/<modelname>/classes/<class>-seed<n>")
    parser.add_argument("output", type=Path, help="the file to write: .onnx or .pt2 (torch.export)")
    parser.add_argument("--size", help="height x width of the pictures, as in 480x640 [the backbone's]")
    parser.add_argument("--false_alarms", type=float, help="as of predict.py [the fit's]")
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="as of predict.py")
    add_weights_path(parser)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores [0]")
    return parser.parse_or_stop(argv)


if __name__ == "__main__":  # parse before the slow imports
    ARGUMENTS = parse_arguments()

import utils
from config import UserError, make_config
from detector.exporting import OUTPUTS, export, load, warning


def main(arguments: argparse.Namespace) -> None:
    utils.set_up("cpu", arguments.threads)
    good, weights = arguments.calibrate, arguments.weights_path
    detector = load(arguments.checkpoint, arguments.false_alarms, good, weights)
    size = None
    if arguments.size:
        size = make_config(parse_values({"img_size": arguments.size})).img_size
        if not isinstance(size, tuple):
            raise UserError(f"size: expected height x width, as in 384x256, got {arguments.size!r}")
    off = export(detector, arguments.output, size)
    (height, width), written = size or detector.backbone.job.img_size, arguments.output.stat().st_size
    print(
        f"{arguments.output}: {written / 1e6:.1f} MB, images (n, {height}, {width}, 3) uint8 -> "
        f"{', '.join(OUTPUTS)}; scores within {off:.1e} of the detector's"
    )
    if told := warning(detector, good is not None):
        print(told, file=sys.stderr)


if __name__ == "__main__":
    guarded(main, ARGUMENTS)
