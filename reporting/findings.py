"""What a run came to beside its scores: the flow against simple detectors, each kind of defect, heat maps
against masks. All of it from the records of classes that are fitted."""

from collections.abc import Sequence

import numpy as np

import datasets
import utils
from backbone.token_grid import place_grid_of
from cache import feature_cache
from config import Config, UserError
from detector import checkpoints, detector, heat_map


def simple_detectors(config: Config, classes: list[str]) -> dict[str, dict]:
    """{class: its simple detectors}: metrics of each, and the flow's margin over the best of them, from the
    records of the first seed."""
    table = {}
    for class_name, record in checkpoints.trained_records(config, classes):
        scores = {name: np.array(values) for name, values in record["simple_scores"].items()}
        if not scores:
            continue
        labels = np.array(record["test"]["labels"])
        metrics = {name: utils.detection_metrics(labels, values) for name, values in scores.items()}
        best = max(metrics, key=lambda name: metrics[name]["auroc"])
        margin = utils.paired_difference(labels, np.array(record["test"]["scores"]), scores[best])
        table[class_name] = {"metrics": metrics, "best": best, "margin": margin}
    return table


def defect_aurocs(
    config: Config, cache: feature_cache.FeatureCache, classes: list[str], seeds: Sequence[int]
) -> dict[str, dict]:
    """{class: {kind of defect: its AUROC}} over the seeds, of a data set that has kinds of defect."""
    kinds = cache.labels.test.kind
    if not any(kinds):
        return {}
    table = {}
    for class_name in classes:
        paths = (checkpoints.checkpoint_path(config, class_name, seed) for seed in seeds)
        table[class_name] = per_defect([checkpoints.read_record(path) for path in paths], kinds)
    return {name: defects for name, defects in table.items() if defects}


def per_defect(records: list[dict], kinds: Sequence[str]) -> dict[str, dict]:
    """Of one class, {kind of defect: number of images n, AUROC of the normal test images against them, its
    standard deviation over the seeds}; empty where the anomalous images are of one kind or none.

    records: the class's checkpoint records, one per seed. kinds: the kind of defect of every image of the
    test split."""
    found: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for record in records:
        test = record["test"]
        labels, scores = np.array(test["labels"]), np.array(test["scores"])
        own = np.array([kinds[row] for row in test["rows"]], dtype=object)
        for kind in sorted(set(own[labels == 1]) - {""}):  # "": another class
            chosen = (labels == 0) | (own == kind)
            found.setdefault(kind, []).append(utils.auroc(labels[chosen], scores[chosen]))
            counts[kind] = int(((labels == 1) & (own == kind)).sum())
    if len(found) < 2:
        return {}
    return {
        kind: {
            "n": counts[kind],
            "auroc": float(np.mean(values)),
            "auroc_std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        }
        for kind, values in found.items()
    }


def localisations(config: Config, cache: feature_cache.FeatureCache, classes: list[str]) -> dict[str, dict]:
    """{class: pixel AUROC and AUPRO of its first seed's heat maps}, of the classes whose score reads places
    and whose test images have masks (ground_truth folders); needs the raw images and the kept weights."""
    if config.pretrained or config.keep == "results" or not config.places:
        return {}
    found = {}
    try:
        images = cache.in_rows(datasets.images_of(config))
    except UserError as mistake:
        print(f"no pixel AUROC: {mistake}")
        return {}
    for name in classes:
        try:
            found[name] = _localisation(config, cache, images, name)
        except UserError as mistake:  # a mask that cannot be read
            print(f"no pixel AUROC of {name}: {mistake}")
    return {name: each for name, each in found.items() if each is not None}


def _localisation(
    config: Config, cache: feature_cache.FeatureCache, images: datasets.ImageSet, class_name: str
) -> dict | None:
    """Pixel AUROC and AUPRO of one class, from the cached places of its test images; a normal image's mask is
    empty, an anomalous one without a mask is left out."""
    fitted, record = detector.load_detector(checkpoints.checkpoint_path(config, class_name, config.seed))
    rows, labels = (np.array(record["test"][key], int) for key in ("rows", "labels"))
    marked = {row: mask for row in rows if (mask := images.mask(int(row))) is not None}
    if not marked or not fitted.uses_places:
        return None
    size = next(iter(marked.values())).shape
    kept = [row for row, label in zip(rows, labels) if row in marked or not label]
    masks = [marked.get(row, np.zeros(size, bool)) for row in kept]
    maps = detector.place_maps(fitted, cache, np.array(kept))
    grid = place_grid_of(cache.fields)
    sized = [heat_map.of_places(values, grid, mask.shape) for values, mask in zip(maps, masks)]
    return heat_map.localisation(sized, masks)
