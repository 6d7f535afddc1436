"""Fit one flow per normal class and seed; report detection per class and on average, on screen and in
runs/<modelname>/."""

import config as knobs
from shell.command_line import from_command_line, run_script
from shell.files import file_name
from shell.signals import Interrupted

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__)

import dataclasses
import functools
import itertools
import time
from typing import NamedTuple

import numpy as np
import torch

import datasets
import extractor
import train
import utils
from backbone.token_grid import place_grid_of
from cache import feature_cache
from config import ClassError, Config, UserError
from detector import calibration, detector, heat_map, runs
from reporting import figures, report, tables, webpage


# ---------------------------------------------------------------- running
class Failed(NamedTuple):
    """Stands for a class that could not be fitted."""

    cell: runs.Cell
    reason: str

    def result(self) -> dict:
        """A result without figures."""
        nothing = dict.fromkeys(report.COLUMNS, float("nan"))
        return {"class": self.cell.class_name, "seed": self.cell.seed, **nothing, "reason": self.reason}


def run_cells(ledger: runs.Ledger, device: torch.device, watch: runs.Stopwatch) -> None:
    """Fit every class with every seed that is not finished and that no other rank is at. Each is saved as
    soon as it is there, with its share of the wall time. A class that cannot be fitted stops no other."""
    config, cache = ledger.config, ledger.cache
    sources = {split: detector.TokenSource(cache.arrays(split), device) for split in datasets.SPLITS}
    for number, cell in enumerate(ledger.results, 1):
        announce(ledger, cell, number, "kept")
    missing = len(ledger.cells) - len(ledger.results)
    print(f"fitting {missing} flows of {len(ledger.cells)} (classes x seeds) on {device}", flush=True)
    for cell in ledger.turns():
        outcome = fit(config, cache, cell, sources)
        if isinstance(outcome, Failed):
            cell, result = outcome.cell, outcome.result() | watch.share()
            runs.keep_failure(config, cache, cell, result)
        else:
            result = outcome.result
            cell = runs.Cell(result["class"], result["seed"])
            result |= watch.share()
            detector.save_fitted(config, cache, outcome)
        ledger.keep(cell, result)
        announce(ledger, cell, len(ledger.results), "")
        watch.lap()  # waiting for other ranks is nobody's share


def announce(ledger: runs.Ledger, cell: runs.Cell, number: int, how: str) -> None:
    """Say what a class has come to."""
    result = ledger.results[cell]
    left = len(ledger.cells) - number
    tested = f"AUROC {tables.number(result['auroc'])}" if result.get("n_test") else "no test images"
    told = result.get("reason") or f"{tested}  {how or took(result, left)}"
    name = " ".join(cell.class_name.split())  # one line, whatever a folder is called
    print(f"[{number}/{len(ledger.cells)}] {name} seed {cell.seed}: {told}", flush=True)


def took(result: dict, left: int) -> str:
    """The time that a class took, and what as many more as are left would take."""
    told = f"{result['seconds']:.0f} s"
    return f"{told}, about {utils.readable_time(left * result['seconds'])} for {left} more" if left else told


def fit(
    config: Config,
    cache: feature_cache.FeatureCache,
    cell: runs.Cell,
    sources: dict[str, detector.TokenSource],
) -> detector.Fitted | Failed:
    """Fit one class with one seed."""
    try:
        return train.make_trainer(config, cache, *cell, sources["train"], sources["test"]).run()
    except ClassError as mistake:
        return Failed(cell, str(mistake).removeprefix(f"class {cell.class_name}: "))


def compare_with_simple_detectors(config: Config, classes: list[str]) -> dict[str, dict]:
    """{class: its simple detectors}: metrics of each, and the flow's margin over the best of them, from the
    records of the first seed."""
    table = {}
    for class_name, record in detector.trained_records(config, classes):
        scores = {name: np.array(values) for name, values in record["simple_scores"].items()}
        if not scores:
            continue
        labels = np.array(record["test"]["labels"])
        metrics = {name: utils.detection_metrics(labels, values) for name, values in scores.items()}
        best = max(metrics, key=lambda name: metrics[name]["auroc"])
        margin = utils.paired_bootstrap(labels, np.array(record["test"]["scores"]), scores[best])
        table[class_name] = {"metrics": metrics, "best": best, "margin": margin}
    return table


def defect_aurocs(config: Config, cache: feature_cache.FeatureCache, classes: list[str]) -> dict[str, dict]:
    """{class: {kind of defect: its AUROC}} over all seeds, of a data set that has kinds of defect."""
    kinds = cache.labels.test.kind
    if not any(kinds):
        return {}
    table = {}
    for class_name in classes:
        paths = (detector.checkpoint_path(config, class_name, seed) for seed in seeds_of(config))
        table[class_name] = report.per_defect([detector.read_record(path) for path in paths], kinds)
    return {name: defects for name, defects in table.items() if defects}


def localisations(config: Config, cache: feature_cache.FeatureCache, classes: list[str]) -> dict[str, dict]:
    """{class: pixel AUROC and AUPRO of its first seed's heat maps}, of the classes whose score reads places
    and whose test images have masks (ground_truth folders); needs the raw images and the kept weights."""
    if config.pretrained or not config.save_model or not config.places:
        return {}
    try:
        images = datasets.images_of(config)
        images = images.kept({split: cache.image_rows(split) for split in datasets.SPLITS})
        return {
            name: found
            for name in classes
            if (found := _localisation(config, cache, images, name)) is not None
        }
    except UserError as mistake:
        print(f"no pixel AUROC: {mistake}")
        return {}


def _localisation(
    config: Config, cache: feature_cache.FeatureCache, images: datasets.ImageSet, class_name: str
) -> dict | None:
    """Pixel AUROC and AUPRO of one class, from the cached places of its test images; a normal image's mask is
    empty, an anomalous one without a mask is left out."""
    fitted, record = detector.load_detector(detector.checkpoint_path(config, class_name, config.seed))
    rows, labels = (np.array(record["test"][key], int) for key in ("rows", "labels"))
    marked = {row: mask for row in rows if (mask := images.mask(int(row))) is not None}
    if not marked or not fitted.uses_places:
        return None
    size = next(iter(marked.values())).shape
    kept = [row for row, label in zip(rows, labels) if row in marked or not label]
    masks = [marked.get(row, np.zeros(size, bool)) for row in kept]
    maps = detector.place_maps(fitted, cache, np.array(kept))
    grid = place_grid_of(cache.manifest.fields)
    sized = [heat_map.of_places(values, grid, mask.shape) for values, mask in zip(maps, masks)]
    return heat_map.localisation(sized, masks)


def seeds_of(config: Config) -> range:
    return range(config.seed, config.seed + config.n_seeds)


def run(config: Config) -> dict | None:
    """The whole course of one configuration: features, classes, baselines, report -> its summary; None where
    another rank writes the report."""
    watch = runs.Stopwatch()
    device = utils.set_up(config.device, config.threads)
    with runs.writing(config):
        cache = extractor.ensure_features(config, device, functools.partial(detector.Detector, config))
        classes = datasets.choose_classes(cache.labels, config.class_name)
        runs.settle(config, cache)
        cells = [runs.Cell(class_name, seed) for seed in seeds_of(config) for class_name in classes]
        ledger = runs.Ledger(config, cache, cells)
        try:
            run_cells(ledger, device, watch)
        except Interrupted as interrupted:
            interrupted.told = ledger.go_on()
            raise
        if not ledger.report_is_mine():
            print(f"rank {ledger.ranks.rank} is done; another one reports", flush=True)
            return None
        ledger.tidy()
        return write_report(ledger, classes, watch)


def write_report(ledger: runs.Ledger, classes: list[str], watch: runs.Stopwatch) -> dict:
    """Baselines, table and pictures of a run whose cells are all done -> its summary."""
    config, cache, folder = ledger.config, ledger.cache, detector.run_folder(ledger.config)
    results = [ledger.results[cell] for cell in ledger.cells]
    failing = {result["class"] for result in results if "reason" in result}
    whole = [class_name for class_name in classes if class_name not in failing]
    table = compare_with_simple_detectors(config, whole) if config.baselines else {}
    defects = defect_aurocs(config, cache, whole)
    seconds = runs.wall_time(results) + watch.lap()
    thresholds = {name: calibration.of_record(r) for name, r in detector.trained_records(config, whole)}
    summary = report.summarize(config, results, table, seconds, cache.meta, defects, thresholds)
    summary["localisation"] = localisations(config, cache, whole)
    print("\n" + report.write_results(folder, summary))
    for name, found in summary["localisation"].items():
        print(
            f"{name}: where the defect is: pixel AUROC {found['pixel_auroc']:.4f}  AUPRO {found['aupro']:.4f}"
        )
    pictures = figures.draw_all(config, cache, whole, folder, summary) if config.plots and whole else []
    page = webpage.write_page(folder, summary, pictures)
    print(f"\nresults in {page} (for a browser), results.json, .csv and .md beside it")
    print(f"wall time {utils.readable_time(summary['wall_time_s'])}")
    return summary


def run_sweep(config: Config) -> list[dict]:
    """Run every combination of the values that the knob ``sweep`` lists, then the table of them all -> their
    summaries."""
    start, sweep, folder = time.perf_counter(), knobs.parse_sweep(config.sweep), detector.run_folder(config)
    configs = {}
    for values in itertools.product(
        *sweep.values()
    ):  # all of them first: a mistake shows before the first run
        parsed = knobs.parse_values(dict(zip(sweep, values)))
        name = file_name("-".join(values), knobs.LONGEST_NAME - 10)
        configs[values] = dataclasses.replace(
            config, **parsed, modelname=f"{config.modelname}/{name}", sweep=None
        )
    summaries: dict[tuple, dict] = {}
    for values, combination in configs.items():
        print(f"\n=== {' '.join(f'{knob} {value}' for knob, value in zip(sweep, values))}", flush=True)
        if summary := run(combination):
            summaries[values] = summary
    if len(summaries) < len(configs):  # another rank reports
        return list(summaries.values())
    print("\n" + report.write_sweep(folder, sweep, summaries, time.perf_counter() - start))
    print(f"\nresults in {folder}/sweep.json and sweep.md")
    return list(summaries.values())


def main(config: Config) -> None:
    """Raises UserError, once everything is reported, when a class could not be fitted."""
    summaries = run_sweep(config) if config.sweep else [run(config)]
    classes = [entry for summary in summaries if summary for entry in summary["classes"].values()]
    failures = [bad[0] for e in classes if (bad := [run for run in e["runs"] if "reason" in run])]
    if failures:
        first = f"class {failures[0]['class']}: {failures[0]['reason']}"
        raise UserError(f"{len(failures)} of {len(classes)} classes could not be fitted: {first}")


if __name__ == "__main__":
    run_script(main, CONFIG)
