"""Score images with a fitted class: the higher, the more anomalous. One line per image, most anomalous first.

python predict.py runs/foad_mfff/classes/cat-seed0 FOLDER_OR_IMAGE ... > scores.csv
"""

import argparse
import sys
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a class of a run: runs/<modelname>/classes/<class>-seed<n>"
    )
    parser.add_argument("images", type=Path, nargs="+", help="images, or folders of them")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":  # parse before the slow imports
    ARGUMENTS = parse_arguments()

import csv
import dataclasses

import numpy as np
import torch

import config as knobs
import datasets
import detector
import extractor
import feature_cache
import utils
from config import UserError
from feature_cache import CacheIdentity


def find_images(paths: list[Path]) -> list[Path]:
    """The images among files and below folders, in order. Raises UserError on a path that is neither."""
    images = []
    for path in paths:
        if not path.exists():
            raise UserError(f"no file or folder {path}")
        images += datasets.images_below(path) if path.is_dir() else [path]
    return images


def threshold(record: dict) -> float | None:
    """The score that 95 % of the held-out normal training images stay below; None where none were held
    out."""
    held = record.get("held_out_scores")
    return float(np.quantile(held, 0.95)) if held else None


@torch.inference_mode()
def score_images(fitted: detector.Detector, job: extractor.Extraction) -> np.ndarray:
    """Scores of the images of an extraction job, in order; memory does not grow with their number."""
    scores = []
    for rows in job.features("test"):
        scores.append(fitted.score_features(detector.Features.of(rows)))
    return np.concatenate(scores)


def features_of(config: knobs.Config, record: dict) -> CacheIdentity:
    """The features a detector takes. Raises UserError when the configuration no longer gives those it was
    fitted to."""
    identity = extractor.cache_identity(config)
    for field, expected in identity.fields.items():
        fitted_to = record["features"].get(field)
        if fitted_to != feature_cache.as_json(expected) and field not in ("dataset", "validate"):
            raise UserError(
                f"the detector was fitted to features with {field} {fitted_to}, now it is {expected}"
            )
    return identity


def main(arguments: argparse.Namespace) -> None:
    device = utils.set_up(arguments.device, 0)
    fitted, record = detector.load_detector(arguments.checkpoint)
    config = dataclasses.replace(detector.config_of(record), device=arguments.device)
    files = find_images(arguments.images)
    job = extractor.Extraction(config, datasets.unlabelled(files), features_of(config, record), device)
    scores = score_images(fitted.to(device), job)
    limit = threshold(record)
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["score", "image"] if limit is None else ["score", "anomalous", "image"])
    for i in np.argsort(-scores, kind="stable"):
        verdict = [] if limit is None else ["yes" if scores[i] > limit else "no"]
        table.writerow([f"{scores[i]:.6g}", *verdict, files[i]])
    if limit is not None:
        print(
            f"anomalous: above {limit:.6g}, the score that 95 % of the held-out normal images stay below",
            file=sys.stderr,
        )


if __name__ == "__main__":
    knobs.guarded(main, ARGUMENTS)
