"""Fit one flow per normal class and seed; report each class and the mean, also in runs/<modelname>/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import from_command_line, run_script

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__)

import csv
import dataclasses
import math
import time
from concurrent.futures import Executor
from functools import partial

import torch
from tqdm import tqdm

import datasets
import extractor
import train
import utils
from cache.feature_cache import FeatureCache
from config import Config, UserError
from detector import checkpoints, class_data, runs
from detector.detector import make_detector, needed_bytes
from reporting import figures, findings, pages, report, tables
from shell import engine
from shell.files import write_text

TABLE = Path(__file__).resolve().parent / "results/quickstart.csv"  # the committed one


def fit_all(config: Config, cache: FeatureCache, device: torch.device, cluster: Executor | None) -> list:
    """Fit every class with every seed that is not finished -> the results of all. Each is kept as soon as it
    is there; one that cannot be fitted stops no other. On a CPU as many at a time, each by a process of its
    own, as there are threads, or as the memory holds."""
    classes = datasets.choose_classes(cache.labels, config.class_name)
    seeds = range(config.seed, config.seed + config.n_seeds)
    pairs = [runs.ClassSeed(class_name, seed) for seed in seeds for class_name in classes]
    done = runs.settle(config, cache, pairs)
    missing = [pair for pair in pairs if pair not in done]
    at_once = 1
    if device.type == "cpu" and not cluster:
        each = 1e9 + needed_bytes(config, cache.meta, config.batch_size)  # bytes
        at_once = max(1, int(min(torch.get_num_threads(), utils.available_memory() / each, len(pairs))))
    threads = config.threads or 1 if cluster else max(1, torch.get_num_threads() // at_once)
    where = config.cluster if cluster else f"{device}, {at_once} at a time" if at_once > 1 else device
    print(f"fitting {len(missing)} flows of {len(pairs)} (classes x seeds) on {where}", flush=True)
    start = time.perf_counter()
    with engine.in_processes(at_once, threads) as executor:
        if executor := executor or cluster:
            task = partial(train.fit_there, config, cache, threads)
        else:
            task = partial(train.fit, config, cache, class_data.token_sources(cache, device))
        for number, (pair, result) in enumerate(engine.outcomes(executor, task, missing), 1):
            done[pair], left = result, len(missing) - number
            told = f"AUROC {tables.number(result['auroc'])}  {result.get('seconds', 0):.0f} s"
            time_left = tqdm.format_interval(left * (time.perf_counter() - start) / number)
            more = f", about {time_left} for {left} more" if left else ""
            name = f"[{len(done)}/{len(pairs)}] {tables.shorten(pair.class_name, 60)} seed {pair.seed}"
            print(f"{name}: {result.get('reason', told)}{more}", flush=True)
    return [done[pair] for pair in pairs]


def write_report(config: Config, cache: FeatureCache, results: list[dict], seconds: float) -> report.Summary:
    """Tables and pictures of a run whose pairs are all done, class by class from what each left -> its
    summary. seconds: since this run began, without those before it that it goes on with."""
    print("all classes are done: writing the report", flush=True)
    folder, drawing = checkpoints.run_folder(config.modelname), config.keep == "all"
    failing = {result["class"] for result in results if "reason" in result}
    images = findings.raw_images(config, cache)
    found, by_class, records = {}, {}, {}
    for name in dict.fromkeys(result["class"] for result in results if result["class"] not in failing):
        left = findings.read_class(config, name)
        found[name] = findings.of_class(cache, images, left)
        records[name] = dataclasses.replace(left.first, flow_scores={}, simple_scores={})  # the largest parts
        if drawing:
            by_class[name] = figures.draw_class(cache, images, left, folder / "figures")
    summary = report.summarize(config, results, found, seconds, cache.meta)
    of_the_run = figures.draw_run(summary, records, folder / "figures") if drawing and found else []
    print("\n" + report.write_results(folder, summary))
    write_text(folder / "report.html", pages.run_page(summary, of_the_run, by_class))
    print(f"\nresults in {folder}/report.html (for a browser), results.json, .csv and .md beside it")
    print(f"wall time {tqdm.format_interval(summary.wall_time_s)}")
    return summary


def differences(summary: report.Summary) -> list[str]:
    """What differs by more than .0005, as two machines may, between a run's AUROCs and those of the committed
    table, a line each; what only one of them has differs, too."""
    with TABLE.open(encoding="utf-8", newline="") as stream:
        wanted = {row["class"]: float(row["auroc"]) for row in csv.DictReader(stream)}
    found = {row["class"]: row["auroc"] for row in summary.rows}
    return [
        f"{name}: AUROC {tables.number(found.get(name))}, {tables.number(wanted.get(name))} in the table"
        for name in found | wanted
        if not abs(found.get(name, math.nan) - wanted.get(name, math.nan)) <= 5e-4
    ]


def main(config: Config) -> None:
    """Features, classes, report. Raises UserError, once everything is reported, when a class could not be
    fitted; SystemExit with status 1 when ``check`` finds a difference."""
    if config.check and config.preset != TABLE.stem:
        raise UserError(f"check: there is a committed table of the preset {TABLE.stem} alone")
    began, device = time.perf_counter(), utils.set_up(config.device, config.threads)
    folder = checkpoints.run_folder(config.modelname)
    with runs.writing(folder), engine.on_cluster(config.cluster) as cluster:
        cache = extractor.ensure_features(config, device, partial(make_detector, config), executor=cluster)
        results = fit_all(config, cache, device, cluster)
        runs.sweep_up(folder)  # which lists the folders, too: NFS may not show what others wrote before that
        summary = write_report(config, cache, results, time.perf_counter() - began)
    if failed := {result["class"]: result["reason"] for result in results if "reason" in result}:
        told = f"{len(failed)} of {len(summary.classes)} classes could not be fitted: class "
        raise UserError(told + ": ".join(next(iter(failed.items()))))
    if config.check:
        different = differences(summary)
        print("\n".join(different) or "equal within ± .0005")
        if different:
            raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, CONFIG)
