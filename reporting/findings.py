"""What a class came to beside its score: the flow against simple detectors, each kind of defect, the
threshold, heat maps against masks. All of it from what fitting it left, which is read once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import datasets
import utils
from backbone.token_grid import place_grid_of
from cache.feature_cache import FeatureCache
from config import Config, UserError
from detector import calibration, heat_map
from detector.checkpoints import Record, checkpoint_path, read_record
from detector.detector import Detector, load_detector, place_maps


class Left(NamedTuple):
    """What fitting a class left: its records, one per seed; of the first seed the threshold, where pictures
    were held out, and the detector, where weights are kept and the score reads places."""

    class_name: str
    records: list[Record]
    threshold: calibration.Threshold | None = None
    detector: Detector | None = None

    @property
    def first(self) -> Record:
        return self.records[0]


def read_class(config: Config, class_name: str, seeds: Sequence[int]) -> Left:
    """seeds: the run's, the first one first."""
    first, *others = (checkpoint_path(config, class_name, seed) for seed in seeds)
    if config.places and config.keep != "results":
        detector, record = load_detector(first)
    else:
        detector, record = None, read_record(first)
    reads_places = detector is not None and detector.uses_places
    records = [record, *map(read_record, others)]
    threshold = calibration.of_held_out(record.held_out_scores, config.false_alarms)
    return Left(class_name, records, threshold, detector if reads_places else None)


def raw_images(config: Config, cache: FeatureCache) -> datasets.ImageSet | None:
    """The images in the order of the cache's rows; None with ``pretrained``, where they need not be there,
    and where they are not those that were extracted, which is said."""
    if config.pretrained:
        return None
    try:
        images = datasets.images_of(config)
        images.scale.ranges = cache.meta.get("pixel_scale", {})
        return cache.in_rows(images)
    except UserError as mistake:
        print(f"no pictures of images and no pixel AUROC: {mistake}")
        return None


def of_class(cache: FeatureCache, images: datasets.ImageSet | None, left: Left) -> dict[str, dict]:
    """{kind of finding: what was found}; empty ones are nothing that could be told."""
    found = against_simple(left.first)
    found["defects"] = per_defect(left.records, cache.labels.test.kind)
    if left.threshold:
        found["thresholds"] = left.threshold._asdict()
    try:
        if images and left.detector:
            found["localisation"] = localisation(cache, images, left, left.detector)
    except UserError as mistake:  # a mask that cannot be read
        print(f"no pixel AUROC of {left.class_name}: {mistake}")
    return found


def against_simple(record: Record) -> dict[str, dict]:
    """Metrics of each simple detector, and the flow's margin over the best of them."""
    labels, others = record.test.labels, record.simple_scores
    if not others:
        return {}
    simple = {name: utils.detection_metrics(labels, values) for name, values in others.items()}
    best = max(simple, key=lambda name: simple[name]["auroc"])
    margin = utils.paired_difference(labels, record.test.scores, others[best])
    return {"simple": simple, "margins": margin | {"best": best}}


def per_defect(records: list[Record], kinds: Sequence[str]) -> dict[str, dict]:
    """Of one class, {kind of defect: number of images n, AUROC of the normal test images against them, its
    standard deviation over the seeds}; empty where the anomalous images are of one kind or none.

    records: of its seeds. kinds: the kind of defect of every image of the test split."""
    found: dict[str, dict] = {}
    labels = records[0].test.labels
    own = np.array([kinds[row] for row in records[0].test.rows], dtype=object)
    for kind in sorted(set(own[labels == 1]) - {""}):  # "": another class
        chosen = (labels == 0) | (own == kind)
        aurocs = [utils.auroc(labels[chosen], record.test.scores[chosen]) for record in records]
        found[kind] = {
            "n": int(((labels == 1) & (own == kind)).sum()),
            "auroc": float(np.mean(aurocs)),
            "auroc_std": float(np.std(aurocs, ddof=1)) if len(aurocs) > 1 else 0.0,
        }
    return found if len(found) > 1 else {}


def localisation(
    cache: FeatureCache, images: datasets.ImageSet, left: Left, detector: Detector
) -> dict[str, float]:
    """Pixel AUROC and AUPRO of the first seed's heat maps, from cached places; a normal image's mask is
    empty, an anomalous one without a mask is left out. Empty where no test image has a mask."""
    rows, labels = left.first.test.rows, left.first.test.labels
    masks = {row: mask for row in rows if (mask := images.mask(int(row))) is not None}
    if not masks:
        return {}
    size = next(iter(masks.values())).shape
    masks |= {row: np.zeros(size, bool) for row in rows[labels == 0] if row not in masks}
    kept = np.array([row for row in rows if row in masks])
    grid = place_grid_of(cache.fields)
    maps = place_maps(detector, cache, kept)
    sized = [heat_map.of_places(values, grid, masks[row].shape) for row, values in zip(kept, maps)]
    return heat_map.localisation(sized, [masks[row] for row in kept])
