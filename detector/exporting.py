"""A detector as one module from pixels to score, p-value and verdict, written to a file and compared with the
detector."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from backbone.resizing import resize_like_pillow
from config import UserError
from detector.class_data import Features
from detector.picture_detector import PictureDetector, load_picture_detector
from images.images import images_below
from shell.files import whole_file

TOLERANCE = 1e-4  # of the largest score, between the file's scores and the detector's
OUTPUTS = ("score", "p_value", "anomalous")
PRECISION = (  # in the metadata of an ONNX file
    "float32, as its p-values and verdicts were made; OpenVINO computes in bfloat16 on newer processors "
    "unless it is asked for INFERENCE_PRECISION_HINT f32"
)


class Exported(nn.Module):
    """From pixels to score, p-value and verdict in one module (export.py says what they are)."""

    def __init__(self, detector: PictureDetector):
        super().__init__()
        self.img_size, self.features = detector.backbone.job.img_size, detector.backbone.job.module
        self.fitted = detector.fitted.requires_grad_(False)
        held_out = torch.from_numpy(detector.held_out).float()
        self.register_buffer("held_out", held_out)
        limit = detector.threshold.score if len(held_out) else float("inf")
        self.register_buffer("limit", torch.tensor(limit))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = resize_like_pillow(images.permute(0, 3, 1, 2), self.img_size)
        score = self.fitted.score(Features.of(self.features.rows(self.features(levels))))
        above = (self.held_out >= score.unsqueeze(1)).sum(1)
        p_value = (1 + above) / (1 + len(self.held_out))
        if not len(self.held_out):
            p_value = p_value * float("nan")
        return score, p_value.float(), score > self.limit


def load(
    path: Path, false_alarms: float | None, good: Path | None = None, weights: Path | None = None
) -> PictureDetector:
    """The detector of a checkpoint on the CPU, its backbone in float32; ``good``: a folder of fresh good
    pictures that p-values shall rest on; ``weights``: the file of a fit with weights_path. Raises
    UserError."""
    detector = load_picture_detector(
        path, torch.device("cpu"), false_alarms, weights=weights, precision="float32"
    )
    if tiles := detector.backbone.tiles:
        raise UserError(f"{path} was fitted to tiles of {tiles} pixels; an exported file cuts none")
    if good:
        detector.calibrate(images_below(good))
    return detector


def warning(detector: PictureDetector, calibrated: bool) -> str:
    """What the p-values of the file rest on, where that is not its own arithmetic; else empty."""
    precision, count = detector.backbone.features["precision"], len(detector.held_out)
    if calibrated or precision == "float32" or not count:
        return ""
    return (
        f"warning: p-values and verdicts rest on {count} held-out scores in {precision}, the file computes "
        "in float32: --calibrate FOLDER of good pictures, or a fit with --precision float32"
    )


def examples(count: int, size: tuple[int, int]) -> Tensor:
    """Pictures to compare on (count, H, W, 3) uint8: noise that is smoother from one to the next."""
    noise = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))
    smooth = [nn.functional.avg_pool2d(noise[i], 2 * i + 1, 1, i) for i in range(count)]
    return (torch.stack(smooth) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# ---------------------------------------------------------------- the two formats
Run = Callable[[np.ndarray], list[np.ndarray]]  # images -> score, p-value, verdict


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
    """Write an ONNX file, its weights inside -> what runs it (onnxruntime). Raises UserError without the
    packages."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"ONNX needs packages ({error.name} is missing): pip install onnx onnxscript onnxruntime"
        ) from None
    names = {"input_names": ["images"], "output_names": list(OUTPUTS)}
    made = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    onnx.helper.set_model_props(made, {"precision": PRECISION})
    path.write_bytes(made.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # --threads; of its own it takes every core
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(list(OUTPUTS), {"images": images})


WRITERS = {".onnx": write_onnx, ".pt2": write_pt2}


def export(detector: PictureDetector, output: Path, size: tuple[int, int] | None = None) -> float:
    """Write the file -> how far its scores are from the detector's, as a share of the largest. Raises
    UserError when that is too far, and leaves no file then."""
    if output.suffix not in WRITERS:
        raise UserError(f"output: expected a name ending in .onnx or .pt2, got {output}")
    images = examples(5, size or detector.backbone.job.img_size)
    module = Exported(detector).eval()
    batch = {"images": {0: torch.export.Dim("batch", min=1, max=2**20)}}
    with torch.no_grad():
        wanted = detector_scores(detector, images)
        module(images)  # once as it is: the matrices that are kept for a size are constants of the file then
        try:
            program = torch.export.export(module, (images[:3],), dynamic_shapes=batch)
        except Exception as error:  # a backbone that it cannot trace: it fails in many ways
            reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
            raise UserError(f"this detector cannot be exported by torch.export ({reason})") from None
        with whole_file(output) as partial:
            return compare(wanted, WRITERS[output.suffix](program, partial), images)


def detector_scores(detector: PictureDetector, images: Tensor) -> np.ndarray:
    """The detector's own scores (n) of pictures (n, H, W, 3)."""
    pixels = resize_like_pillow(images.permute(0, 3, 1, 2), detector.backbone.job.img_size)
    return detector.score_rows(detector.backbone.job.rows(pixels.to(torch.uint8)))


def compare(wanted: np.ndarray, run: Run, images: Tensor) -> float:
    """How far the scores of the file are from the detector's, one by one and together. Raises UserError."""
    alone = [run(images[i : i + 1].numpy())[0] for i in range(len(images))]
    far = np.abs(np.array([run(images.numpy())[0], np.concatenate(alone)]) - wanted).max(0)
    off = float(far.max()) / float(np.abs(wanted).max())
    if not off <= TOLERANCE:
        raise UserError(
            f"the exported scores differ from the detector's by {off:.1e} of the largest, more than "
            f"{TOLERANCE:g}, most at a score of {wanted[far.argmax()]:.3g} (far from the normal pictures the "
            "flow magnifies the rounding of float32); nothing was written"
        )
    return off
