"""Every backbone of the list through the whole course, with untrained weights and small images: extraction,
fit, predict.py's scores and the exported file, with the presets ``paper`` and ``accurate``.

python tools/backbones.py                    all of them, into docs/backbones.md
python tools/backbones.py resnet18 levit     those alone, on the screen

What the table says of a backbone (semantic token, depths, grid) is at its own image size."""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no weights are needed

import numpy as np
import timm
import torch
from PIL import Image

import config as knobs
import export
import predict
import train
from backbone.backbones import Backbone, outline, timm_name
from config import UserError, make_config
from shell.files import write_text
from utils import counted

# label -> extractor, and the side of the small images
BACKBONES = {
    "resnet18": ("resnet18", 64),
    "wide_resnet50_2": ("wide_resnet50_2", 64),
    "convnext_tiny": ("convnext_tiny", 64),
    "efficientnet_lite0": ("tf_efficientnet_lite0", 64),
    "vit_tiny": ("vit_tiny_patch16_224", 64),
    "VIT": ("VIT", 64),
    "deit distilled": ("deit", 64),
    "cait": ("cait", 64),
    "clip": ("clip", 64),
    "dinov2": ("dinov2_s", 56),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", 56),
    "dinov3": ("dinov3_b", 64),
    "siglip": ("vit_base_patch16_siglip_224", 64),
    "eva02": ("eva02_tiny_patch14_224", 56),
    "swin_tiny": ("swin_tiny_patch4_window7_224", 64),
    "maxvit": ("maxvit_tiny_tf_224", 64),
    "xcit": ("xcit_tiny_12_p16_224", 64),
    "mobilenetv3": ("mobilenetv3_large_100", 64),
    "levit": ("levit_128s", 64),
}
PRESETS = ("paper", "accurate")


def make_pictures(folder: Path) -> None:
    """A class's training and test images, and a defective kind: smooth noise of 80 x 80."""
    generator = np.random.RandomState(0)
    for place, count in (("train/good", 16), ("test/good", 3), ("test/bad", 3)):
        (folder / place).mkdir(parents=True)
        for i in range(count):
            pixels = generator.randint(0, 256, (10, 10, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((80, 80)).save(folder / place / f"{i}.png")


def course(extractor: str, side: int, preset: str, folder: Path, ending: str | None = ".pt2") -> str:
    """Extraction, fit, predict and, to a file of that ending, export, in an empty folder: "works", or the
    step at which it ended, with its line."""
    make_pictures(folder / "images")
    before, step = os.getcwd(), "fit"
    os.chdir(folder)
    try:
        train.main(make_config(settings(extractor, side, preset)))
        step = "predict"
        asked = "runs/small images/test --output rows.csv --device cpu --threads 1".split()
        if predict.main(predict.parse_arguments(asked)):
            raise UserError("some pictures were not read")
        step = "export"
        if ending:
            export.export(export.load(Path("runs/small/classes/good-seed0"), None), Path(f"small{ending}"))
    except UserError as refused:
        return f"{step}: {refused}"
    except Exception as fault:  # a fault of this repository's: the others shall be tried all the same
        reason = str(fault).strip().splitlines()[:1]
        return f"FAULT in {step}: {type(fault).__name__} {reason}"
    finally:
        os.chdir(before)
    return "works"


def settings(extractor: str, side: int, preset: str) -> dict:
    """The knobs of a small fit."""
    small = {"fc_internal": 32, "least_steps": 4, "batch_size": 8, "holdout": 0.25, "places": 4}
    return {
        "preset": preset, "extractor": extractor, "weights_path": "random", "img_size": (side, side),
        "dataset": "folder", "dataset_path": "images", "class_name": "good", "modelname": "small",
        "device": "cpu", "threads": 1, "workers": 0,
        **{name: value for name, value in small.items() if name != "places" or preset == "accurate"},
    }  # fmt: skip


def described(extractor: str) -> tuple[str, str, str, str]:
    """Image size, grid, semantic token and depths of a backbone at its own size. Raises UserError."""
    backbone = outline(make_config({"extractor": extractor}))
    size = "{} x {}".format(*backbone.img_size)
    grid = "{} x {}".format(*backbone.grid)
    try:
        depths = ", ".join(map(str, backbone.band_depths()))
        depths += f" of {len(backbone.model.feature_info)}"
    except UserError:
        depths = "none"
    return size, grid, semantic_token(backbone), depths


def semantic_token(backbone: Backbone) -> str:
    if backbone.is_map:
        return "mean of the map"
    if not backbone.has_class_token:
        return "mean of the patches"
    dropped = backbone.prefix - 1
    return "class token" + (f" ({counted(dropped, 'other prefix token')} dropped)" if dropped else "")


HEAD = "| backbone | timm model | size | grid | semantic token | band depths | paper | accurate |"
INTRODUCTION = """# Backbones

Each went through extraction, fit, predict.py and export with untrained weights and images of {sides}
pixels (timm {timm}, PyTorch {torch}); the other columns are of its own image size. "band depths": the
stages or blocks whose maps `bands` and `places` read, of how many. Made by `python tools/backbones.py`.
A backbone that is not listed is asked for by its timm name in the same way; what it lacks is said in one
line.

Short names: `--extractor` {names}. DINOv2 is fed 224 x 224; `--img_size 448` or
`--img_size 518`, the size of its last training, give it finer grids (32 x 32, 37 x 37). Images have sides
in multiples of the patch.

"""


def row(label: str) -> str:
    """A row of the table."""
    extractor, side = BACKBONES[label]
    cells = []
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            cells.append(course(extractor, side, preset, Path(folder)))
    model = timm_name(extractor).partition(".")[0]
    return f"| {label} | {model} | " + " | ".join([*described(extractor), *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BACKBONES)} [all]")
    arguments = parser.parse_args()
    if unknown := {*arguments.names} - {*BACKBONES}:
        parser.error(f"expected names of {', '.join(BACKBONES)}, got {', '.join(sorted(unknown))}")
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for label in arguments.names or BACKBONES:
        lines.append(row(label))
        print(lines[-1], flush=True)
    if not arguments.names:
        sides = " or ".join(map(str, sorted({side for _, side in BACKBONES.values()})))
        names = ", ".join(f"`{name}`" for name in knobs.BACKBONES)
        told = INTRODUCTION.format(sides=sides, timm=timm.__version__, torch=torch.__version__, names=names)
        write_text(ROOT / "docs" / "backbones.md", told + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
