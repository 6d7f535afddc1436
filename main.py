"""Fit one flow per normal class and seed, and report detection per class and on average: table on screen, files in runs/<modelname>/."""

import config as knobs

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = knobs.from_command_line(__doc__)

import dataclasses
import itertools
import json
import time
from functools import partial

import torch

import baselines
import datasets
import evaluate
import extractor
import report
import together
import train
import utils
from config import Config


# ---------------------------------------------------------------- running
def run_classes(config: Config, cache: datasets.FeatureCache, classes: list[str], device: torch.device) -> list[dict]:
    """Fit every class with every seed -> their results. Each is kept as soon as it is there."""
    train_source, test_source = (train.TokenSource(cache.tokens(split), device) for split in datasets.SPLITS)
    results, total = [], len(classes) * config.n_seeds

    def keep(result):
        results.append(result)
        print(f"[{len(results)}/{total}] {result['class']} seed {result['seed']}: AUROC {result['auroc']:.4f}  {result['seconds']:.0f} s", flush=True)

    for seed in range(config.seed, config.seed + config.n_seeds):
        missing = []
        for class_name in classes:
            result = finished_result(config, cache, class_name, seed) if config.resume else None
            keep(result) if result else missing.append(class_name)
        for fitted in fit(config, cache, missing, seed, train_source, test_source):
            train.save_fitted(config, cache, fitted)
            keep(fitted.result)
    return sorted(results, key=lambda result: (result["seed"], classes.index(result["class"])))


def fit(config: Config, cache: datasets.FeatureCache, classes: list[str], seed: int, train_source, test_source):
    """Fit the classes one after the other, or all at once as one batched model where train_together says so; yield each when done."""
    together_wanted = config.train_together == "True" or config.train_together == "auto" and train_source.device.type == "cuda"
    make = partial(train.make_trainer, config, cache, seed=seed, train=train_source, test=test_source)
    if not together_wanted or len(classes) < 2:
        yield from (make(class_name).run() for class_name in classes)
        return
    for group in together.groups([make(class_name) for class_name in classes]):
        yield from together.TogetherTrainer(group).run()


IRRELEVANT = ("class_name", "seed", "n_seeds", "resume", "verbose", "hide_tqdm_bar", "plots", "baselines", "pretrained", "nbins1", "nbins2", "threads", "preset", "workers", "modelname", "sweep", "save_model")  # fmt: skip


def finished_result(config: Config, cache: datasets.FeatureCache, class_name: str, seed: int) -> dict | None:
    """The result of a class and seed that an earlier run of the same configuration and features finished; None without one."""
    path = train.checkpoint_path(config, class_name, seed).with_suffix(".json")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    wanted = {name: value for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items() if name not in IRRELEVANT}
    same = all(content["config"].get(name) == value for name, value in wanted.items()) and content["features"] == cache.meta
    return train.undefined_as_nan(content["result"]) if same else None


def run_baselines(cache: datasets.FeatureCache, classes: list[str]) -> dict[str, dict[str, dict]]:
    """{baseline: {class: metrics}} on the same semantic tokens."""
    semantic = {split: torch.from_numpy(cache.tokens(split).semantic()).float() for split in datasets.SPLITS}
    table = {name: {} for name in baselines.BASELINES}
    for class_name in classes:
        train_rows, test_rows, labels = cache.labels.one_class(class_name)
        for name, scores in baselines.baseline_scores(semantic["train"][train_rows], semantic["test"][test_rows]).items():
            table[name][class_name] = utils.detection_metrics(labels, scores)
    return table


def run(config: Config) -> dict:
    """The whole course of one configuration: features, classes, baselines, report -> its summary."""
    start, folder = time.perf_counter(), train.run_folder(config)
    device = utils.set_up(config.device, config.threads)
    cache = extractor.ensure_features(config, device)
    classes = datasets.choose_classes(cache.labels, config.class_name)
    results = run_classes(config, cache, classes, device)
    table = run_baselines(cache, classes) if config.baselines else {}
    summary = report.summarize(config, results, table, time.perf_counter() - start, cache.meta)
    print("\n" + report.write_results(folder, summary))
    if config.plots:
        evaluate.draw_all(config, cache, classes, folder)
    print(f"\nresults in {folder}/results.json, .csv and .md; wall time {summary['wall_time_s']:.0f} s")
    return summary


def run_sweep(config: Config) -> None:
    """Run every combination of the values that the knob ``sweep`` lists, then the table of them all."""
    start, sweep, folder = time.perf_counter(), knobs.parse_sweep(config.sweep), train.run_folder(config)
    summaries = {}
    configs = {}
    for values in itertools.product(*sweep.values()):  # all of them first: a mistake shows before the first run
        parsed, name = knobs.parse_values(dict(zip(sweep, values))), "-".join(values).replace("/", "_")
        configs[values] = dataclasses.replace(config, **parsed, modelname=f"{config.modelname}/{name}", sweep=None)
    for values, one in configs.items():
        print(f"\n=== {' '.join(f'{knob} {value}' for knob, value in zip(sweep, values))}", flush=True)
        summaries[values] = run(one)
    print("\n" + report.write_sweep(folder, sweep, summaries, time.perf_counter() - start))
    print(f"\nresults in {folder}/sweep.json and sweep.md")


def main(config: Config) -> None:
    if config.sweep:
        run_sweep(config)
    else:
        run(config)


if __name__ == "__main__":
    knobs.run_script(main, CONFIG)
