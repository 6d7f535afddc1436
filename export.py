"""One file that scores uint8 pictures without this repository: score, p-value and verdict.

python export.py runs/foad_mfff/classes/cat-seed0 cat.onnx
python export.py runs/foad_mfff/classes/cat-seed0 cat.pt2 --size 480x640

Input "images" (n, H, W, 3) uint8, any n, RGB; H and W are the backbone's own, or those of
--size, which are resized inside as Pillow does. Outputs "score" (n), "p_value" (n) among the
held-out normal pictures (NaN without any) and "anomalous" (n), whether the score is above the
threshold at --false_alarms. The file is compared with the detector before it is put in its place.
It computes in float32, and so must what runs it (docs/verdicts.md)."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import OneLineParser
from shell.signals import guarded


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a class: runs/<modelname>/classes/<class>-seed<n>")
    parser.add_argument("output", type=Path, help="the file to write: .onnx or .pt2 (torch.export)")
    parser.add_argument("--size", help="height x width of the pictures, as in 480x640 [the backbone's]")
    parser.add_argument("--false_alarms", type=float, help="as of predict.py [the fit's]")
    parser.add_argument("--calibrate", type=Path, metavar="FOLDER", help="as of predict.py")
    parser.add_argument("--weights_path", type=Path, metavar="FILE", help="as of predict.py")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores [0]")
    return parser.parse_args(argv)


if __name__ == "__main__":  # parse before the slow imports
    ARGUMENTS = parse_arguments()

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from backbone.resizing import resize_like_pillow
from config import UserError, make_config
from detector.class_data import Features
from detector.picture_detector import PictureDetector
from images.images import images_below, note
from shell.files import whole_file

TOLERANCE = 1e-4  # of the largest score, between the file's scores and the detector's
OUTPUTS = ["score", "p_value", "anomalous"]
Run = Callable[[np.ndarray], list[np.ndarray]]  # images -> score, p-value, verdict


class Exported(nn.Module):
    """From pixels (n, H, W, 3) uint8 to score, p-value and verdict (n) in one module."""

    def __init__(self, detector: PictureDetector):
        super().__init__()
        self.img_size, self.features = detector.backbone.job.img_size, detector.backbone.job.module
        self.fitted = detector.fitted.requires_grad_(False)
        limit = detector.threshold.score if len(detector.held_out) else math.inf
        self.register_buffer("held_out", torch.from_numpy(detector.held_out).float())
        self.register_buffer("limit", torch.tensor(limit))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = resize_like_pillow(images.permute(0, 3, 1, 2), self.img_size)
        score = self.fitted.score(Features.of(self.features.rows(self.features(levels))))
        above, n = (self.held_out >= score.unsqueeze(1)).sum(1), len(self.held_out)
        return score, (1 + above) / (1 + n if n else math.nan), score > self.limit


def write_pt2(program: torch.export.ExportedProgram, path: Path) -> Run:
    """Write a file of torch.export -> what runs it."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # of views: torch's, on its own doing
        torch.export.save(program, content)
    path.write_bytes(content.getvalue())
    module = torch.export.load(content).module()
    return lambda images: [out.numpy() for out in module(torch.from_numpy(images))]


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> Run:
    """Write an ONNX file -> what runs it (onnxruntime). Raises UserError without the packages."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install onnx onnxscript onnxruntime") from None
    names = {"input_names": ["images"], "output_names": OUTPUTS}
    made = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    made.model.metadata_props["precision"] = "float32; OpenVINO: INFERENCE_PRECISION_HINT f32"
    made.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # --threads; of its own it takes every core
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(OUTPUTS, {"images": images})


WRITERS = {".onnx": write_onnx, ".pt2": write_pt2}


def write(detector: PictureDetector, output: Path, size: tuple[int, int]) -> float:
    """Write the file for pictures of ``size`` -> how far its scores are from the detector's, of noise that is
    smoother and smoother, as a share of the largest. Raises UserError when that is too far: no file then."""
    noise = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(0))
    smooth = [nn.functional.avg_pool2d(each, 2 * i + 1, 1, i) for i, each in enumerate(noise)]
    levels = (torch.stack(smooth) * 255).round().to(torch.uint8)
    images, module = levels.permute(0, 2, 3, 1).contiguous(), Exported(detector).eval()
    batch = {"images": {0: torch.export.Dim("batch", min=1, max=2**20)}}
    with torch.no_grad():
        pixels = resize_like_pillow(levels, module.img_size)
        wanted = detector.score_rows(detector.backbone.job.rows(pixels.to(torch.uint8)))
        module(images)  # once as it is: the matrices that are kept for a size are constants of the file then
        try:
            program = torch.export.export(module, (images[:3],), dynamic_shapes=batch)
        except Exception as error:  # a backbone that it cannot trace: it fails in many ways
            raise UserError(f"this detector cannot be exported by torch.export: {error!r:.150}") from None
        with whole_file(output) as partial:
            return compare(wanted, WRITERS[output.suffix](program, partial), images.numpy())


def compare(wanted: np.ndarray, run: Run, images: np.ndarray) -> float:
    """How far the scores of the file are from the detector's, one by one and together. Raises UserError."""
    alone = np.concatenate([run(images[i : i + 1])[0] for i in range(len(images))])
    off = float(np.abs(np.array([run(images)[0], alone]) - wanted).max() / np.abs(wanted).max())
    if not off <= TOLERANCE:
        told = f"the exported scores differ from the detector's by {off:.1e} of the largest"
        raise UserError(f"{told}, more than {TOLERANCE:g}; nothing was written")
    return off


def main(arguments: argparse.Namespace) -> None:
    output, good = arguments.output, arguments.calibrate
    if output.suffix not in WRITERS:
        raise UserError(f"output: expected a name ending in .onnx or .pt2, got {output}")
    asked = (arguments.threads, arguments.false_alarms, arguments.weights_path)
    detector = PictureDetector.load(arguments.checkpoint, "cpu", *asked, precision="float32")
    if tiles := detector.backbone.tiles:
        raise UserError(f"it was fitted to tiles of {tiles} pixels; an exported file cuts none")
    if good:
        detector.calibrate(images_below(good))
    size = make_config({"img_size": arguments.size or detector.backbone.job.img_size}).img_size
    if not isinstance(size, tuple):
        raise UserError(f"size: expected height x width, as in 384x256, got {arguments.size!r}")
    off = write(detector, output, size)
    inputs = f"{output.stat().st_size / 1e6:.1f} MB, images (n, {size[0]}, {size[1]}, 3) uint8"
    print(f"{output}: {inputs} -> {', '.join(OUTPUTS)}; scores within {off:.1e} of the detector's")
    precision = detector.backbone.features["precision"]
    if len(detector.held_out) and precision != "float32" and not good:
        told = f"p-values rest on held-out scores in {precision}, the file computes in float32"
        note(f"{told}: --calibrate FOLDER of good pictures, or a fit with --precision float32")


if __name__ == "__main__":
    guarded(main, ARGUMENTS)
