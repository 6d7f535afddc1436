"""Fit one flow per normal class and seed; report detection per class and on average, on screen and in
runs/<modelname>/."""

import config as knobs

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = knobs.from_command_line(__doc__)

import dataclasses
import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch

import baselines
import batched
import datasets
import detector
import extractor
import feature_cache
import figures
import report
import train
import utils
import webpage
from config import Config, knobs_affecting


# ---------------------------------------------------------------- running
def run_classes(
    config: Config, cache: feature_cache.FeatureCache, classes: list[str], device: torch.device
) -> list[dict]:
    """Fit every class with every seed -> their results. Each is saved as soon as it is there."""
    sources = {split: detector.TokenSource(cache.arrays(split), device) for split in datasets.SPLITS}
    results: list[dict] = []
    total = len(classes) * config.n_seeds

    def add(result: dict) -> None:
        results.append(result)
        print(
            f"[{len(results)}/{total}] {result['class']} seed {result['seed']}: AUROC {result['auroc']:.4f}  "
            f"{result['seconds']:.0f} s",
            flush=True,
        )

    for seed in seeds_of(config):
        missing = []
        for class_name in classes:
            result = finished_result(config, cache, class_name, seed) if config.resume else None
            if result:
                add(result)
            else:
                missing.append(class_name)
        for fitted in fit(config, cache, missing, seed, sources):
            detector.save_fitted(config, cache, fitted)
            add(fitted.result)
    return sorted(results, key=lambda result: (result["seed"], classes.index(result["class"])))


def fit(
    config: Config,
    cache: feature_cache.FeatureCache,
    classes: list[str],
    seed: int,
    sources: dict[str, detector.TokenSource],
) -> Iterator[detector.Fitted]:
    """Fit the classes one after the other, or all at once as one batched model (knob train_together); yield
    each when done."""
    at_once = config.train_together == "True"

    def make(class_name: str) -> train.Trainer:
        return train.make_trainer(config, cache, class_name, seed, sources["train"], sources["test"])

    if (
        not at_once or len(classes) < 2 or config.score == "spectrum"
    ):  # its two flows are trained one class at a time
        yield from (make(class_name).run() for class_name in classes)
        return
    for group in batched.groups([make(class_name) for class_name in classes]):
        yield from batched.BatchedTrainer(group).run()


def finished_result(
    config: Config, cache: feature_cache.FeatureCache, class_name: str, seed: int
) -> dict | None:
    """The result of a class and seed that an earlier run of the same configuration and features finished, or
    None."""
    try:
        record = detector.read_record(detector.checkpoint_path(config, class_name, seed))
    except (OSError, ValueError):
        return None
    fitted_with = detector.config_of(record)
    relevant = knobs_affecting("features", "fit")
    same = all(getattr(fitted_with, name) == getattr(config, name) for name in relevant)
    return record["result"] if same and record["features"] == cache.meta else None


def run_baselines(config: Config, cache: feature_cache.FeatureCache, classes: list[str]) -> dict[str, dict]:
    """{class: its simple detectors} on the same cache: metrics of each, and the flow's margin over the best
    of them."""
    semantic = {split: torch.from_numpy(cache.tokens(split).semantic()).float() for split in datasets.SPLITS}
    table = {}
    for class_name, record in detector.trained_records(config, classes):
        train_rows, test_rows, labels = cache.labels.one_class(class_name)
        scores = baselines.baseline_scores(semantic["train"][train_rows], semantic["test"][test_rows])
        scores |= {name: np.array(values) for name, values in record.get("own_input_scores", {}).items()}
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


def seeds_of(config: Config) -> range:
    return range(config.seed, config.seed + config.n_seeds)


def run(config: Config) -> dict:
    """The whole course of one configuration: features, classes, baselines, report -> its summary."""
    start, folder = time.perf_counter(), detector.run_folder(config)
    device = utils.set_up(config.device, config.threads)
    cache = extractor.ensure_features(config, device)
    classes = datasets.choose_classes(cache.labels, config.class_name)
    results = run_classes(config, cache, classes, device)
    table = run_baselines(config, cache, classes) if config.baselines else {}
    defects = defect_aurocs(config, cache, classes)
    seconds = time.perf_counter() - start
    summary = report.summarize(config, results, table, seconds, cache.meta, defects)
    print("\n" + report.write_results(folder, summary))
    pictures = figures.draw_all(config, cache, classes, folder, summary) if config.plots else []
    page = webpage.write_page(folder, summary, pictures)
    print(f"\nresults in {page} (for a browser), results.json, .csv and .md beside it")
    print(f"wall time {utils.readable_time(summary['wall_time_s'])}")
    return summary


def run_sweep(config: Config) -> None:
    """Run every combination of the values that the knob ``sweep`` lists, then the table of them all."""
    start, sweep, folder = time.perf_counter(), knobs.parse_sweep(config.sweep), detector.run_folder(config)
    configs = {}
    for values in itertools.product(
        *sweep.values()
    ):  # all of them first: a mistake shows before the first run
        parsed, name = knobs.parse_values(dict(zip(sweep, values))), "-".join(values).replace("/", "_")
        configs[values] = dataclasses.replace(
            config, **parsed, modelname=f"{config.modelname}/{name}", sweep=None
        )
    summaries = {}
    for values, combination in configs.items():
        print(f"\n=== {' '.join(f'{knob} {value}' for knob, value in zip(sweep, values))}", flush=True)
        summaries[values] = run(combination)
    print("\n" + report.write_sweep(folder, sweep, summaries, time.perf_counter() - start))
    print(f"\nresults in {folder}/sweep.json and sweep.md")


def main(config: Config) -> None:
    if config.sweep:
        run_sweep(config)
    else:
        run(config)


if __name__ == "__main__":
    knobs.run_script(main, CONFIG)
