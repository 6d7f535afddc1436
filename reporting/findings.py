"""What a class came to beside its score, from what fitting it left: the flow against simple detectors, each
kind of defect, the threshold, heat maps against masks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import datasets
import utils
from backbone.token_grid import place_grid_of
from cache.feature_cache import FeatureCache
from config import Config, UserError
from detector import calibration, heat_map
from detector.checkpoints import Record, checkpoint_path, read_record, run_folder
from detector.detector import Detector, load_detector
from images.layouts import read_mask
from reporting.report import Found, best_of, over_seeds


class Left(NamedTuple):
    """What fitting a class left: its records, one per seed; of the first seed the threshold, where pictures
    were held out, and the detector, where weights are kept and the score reads places."""

    records: list[Record]
    threshold: calibration.Threshold | None = None
    detector: Detector | None = None

    @property
    def first(self) -> Record:
        return self.records[0]


def read_class(config: Config, class_name: str) -> Left:
    folder, seeds = run_folder(config.modelname), range(config.seed, config.seed + config.n_seeds)
    paths = [checkpoint_path(folder, class_name, seed) for seed in seeds]
    records = [read_record(path) for path in paths]
    held_out = records[0].held_out_scores
    threshold = calibration.threshold(held_out, config.false_alarms) if len(held_out) else None
    keeps_places = records[0].weights is not None and records[0].result["reads_places"]
    return Left(records, threshold, load_detector(paths[0])[0] if keeps_places else None)


def raw_images(config: Config, cache: FeatureCache) -> datasets.ImageSet | None:
    """The images in the order of the cache's rows; None where nothing is drawn or located, with
    ``pretrained``, and where they are not those that were extracted, which is said."""
    if config.pretrained or config.keep == "results" or config.keep == "weights" and not config.places:
        return None
    try:
        images = datasets.images_of(config)
        images.scale.ranges = cache.meta.get("pixel_scale", {})
        return cache.in_rows(images)
    except UserError as mistake:
        print(f"no pictures of images and no pixel AUROC: {mistake}")
        return None


def of_class(cache: FeatureCache, images: datasets.ImageSet | None, left: Left) -> Found:
    """Simple detectors, and the flow's margin over the best of them, are those of the first seed."""
    labels, scores, simple = left.first.test.labels, left.first.test.scores, left.first.simple_scores
    found = Found({name: utils.detection_metrics(labels, values) for name, values in simple.items()})
    if best := best_of({name: metrics["auroc"] for name, metrics in found.simple.items()}):
        found.margin = utils.paired_difference(labels, scores, simple[best])
    found.defects = per_defect(left.records, cache.labels.test.kind)
    found.threshold = left.threshold._asdict() if left.threshold else {}
    try:
        if images and left.detector:
            found.localisation = localisation(cache, images, left.first.test.rows, labels, left.detector)
    except UserError as mistake:  # a mask that cannot be read
        print(f"no pixel AUROC of {left.first.result['class']}: {mistake}")
    return found


def per_defect(records: list[Record], kinds: Sequence[str]) -> dict[str, dict]:
    """From the records of a class, one per seed, and the kind of every test image: {kind: how many, AUROC of
    the normal images against them, its deviation over the seeds}; empty where there is one kind or none."""
    labels, found = records[0].test.labels, {}
    own = np.array([kinds[row] for row in records[0].test.rows], dtype=object)
    for kind in sorted(set(own[labels == 1]) - {""}):  # "": another class
        chosen = (labels == 0) | (own == kind)
        aurocs = [{"auroc": utils.auroc(labels[chosen], each.test.scores[chosen])} for each in records]
        found[kind] = {"n": int(labels[own == kind].sum()), **over_seeds([aurocs], ["auroc"])}
    return found if len(found) > 1 else {}


def localisation(
    cache: FeatureCache, images: datasets.ImageSet, rows: np.ndarray, labels: np.ndarray, detector: Detector
) -> dict[str, float]:
    """Pixel AUROC and AUPRO of the heat maps of test images, from cached places; a normal image's mask is
    empty, an anomalous one without a mask is left out. Empty where no test image has a mask."""
    masks = {row: read_mask(path) for row in rows if (path := images.images["test"][row].mask)}
    if not masks:
        return {}
    size = next(iter(masks.values())).shape
    masks |= {row: np.zeros(size, bool) for row in rows[labels == 0] if row not in masks}
    kept = np.array([row for row in rows if row in masks])
    maps, grid = detector.place_maps(cache.arrays("test")["places"], kept), place_grid_of(cache.fields)
    sized = [heat_map.of_places(values, grid, masks[row].shape) for row, values in zip(kept, maps)]
    return heat_map.localisation(sized, [masks[row] for row in kept])
