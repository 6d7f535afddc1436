"""Score images with a fitted class: the higher, the more anomalous. One line per image, most anomalous first.

python predict.py runs/foad_mfff/classes/cat-seed0 FOLDER_OR_IMAGE ... > scores.csv
"""

import argparse
import sys
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a class of a run: runs/<modelname>/classes/<class>-seed<n>")
    parser.add_argument("images", type=Path, nargs="+", help="images, or folders of them")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":  # parse before the slow imports
    ARGUMENTS = parse_arguments()

import dataclasses

import numpy as np
import torch

import config as knobs
import datasets
import extractor
import train
import utils
from config import UserError


def find_images(paths: list[Path]) -> list[Path]:
    """The images among files and below folders, in order. Raises UserError on a path that is neither."""
    found = []
    for path in paths:
        if not path.exists():
            raise UserError(f"no file or folder {path}")
        found += datasets.images_below(path) if path.is_dir() else [path]
    return found


def threshold(content: dict) -> float | None:
    """The score that 95 % of the held-out normal training images stay below; None where none were held out."""
    held = content.get("held_out_scores")
    return float(np.quantile(held, 0.95)) if held else None


@torch.inference_mode()
def score_images(detector: train.Detector, job: extractor.Extraction) -> np.ndarray:
    """Scores of the images of an extraction job, in order; memory does not grow with their number."""
    scores = []
    for chunk in job.loader("test"):
        if isinstance(chunk, UserError):
            raise chunk
        for images in chunk:
            tokens = job.rows(images).float()
            scores.append(detector.score(*detector(tokens[:, 0], tokens[:, 1:])))
    return np.concatenate(scores)


def main(arguments) -> None:
    device = utils.set_up(arguments.device, 0)
    detector, content = train.load_detector(arguments.checkpoint)
    config = dataclasses.replace(train.config_of(content), device=arguments.device)
    fields = extractor.cache_fields(config)
    for field, wanted in fields.items():
        if (found := content["features"].get(field)) != datasets.as_json(wanted) and field not in ("dataset", "validate"):
            raise UserError(f"the detector was fitted to features with {field} {found}, now it is {wanted}")
    files = find_images(arguments.images)
    images = datasets.unlabelled(files)
    scores = score_images(detector.to(device), extractor.Extraction(config, images, fields, device))
    limit = threshold(content)
    print("score,anomalous,image" if limit is not None else "score,image")
    for i in np.argsort(-scores, kind="stable"):
        verdict = f"{'yes' if scores[i] > limit else 'no'}," if limit is not None else ""
        print(f"{scores[i]:.6g},{verdict}{files[i]}")
    if limit is not None:
        print(f"anomalous: above {limit:.6g}, the score that 95 % of the held-out normal images stay below", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as mistake:
        knobs.stop(mistake)
