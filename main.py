"""Fit one flow per normal class and seed; report detection per class and on average, on screen and in
runs/<modelname>/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

from shell.command_line import from_command_line, run_script
from shell.files import write_text

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__)

import csv
import dataclasses
import functools
import math
import time
from concurrent.futures import Executor

import torch
from tqdm import tqdm

import datasets
import extractor
import train
import utils
from cache.feature_cache import FeatureCache
from config import ClassError, Config, UserError
from detector import checkpoints, class_data, detector, memory, runs
from reporting import figures, findings, pages, report, tables
from shell import engine

PROCESS_BYTES = 1e9  # of a process of its own, beside the training
TABLES = Path(__file__).resolve().parent / "results"  # committed ones, a preset each
TOLERANCE = 5e-4  # of an AUROC, between two machines


# ---------------------------------------------------------------- running
def fit_pairs(
    config: Config,
    cache: FeatureCache,
    pairs: list[runs.ClassSeed],
    device: torch.device,
    cluster: Executor | None,
) -> dict[runs.ClassSeed, dict]:
    """Fit every class with every seed that is not finished. Each is kept as soon as it is there. A class that
    cannot be fitted stops no other."""
    done = {pair: result for pair in pairs if (result := runs.finished(config, cache, pair))}
    missing = [pair for pair in pairs if pair not in done]
    at_once = 1 if cluster else processes(config, cache.meta, device, len(pairs))
    threads = config.threads or 1 if cluster else max(1, torch.get_num_threads() // at_once)
    where = config.cluster if cluster else f"{device}, {at_once} at a time" if at_once > 1 else device
    print(f"fitting {len(missing)} flows of {len(pairs)} (classes x seeds) on {where}", flush=True)
    start = time.perf_counter()
    with engine.in_processes(at_once, threads) as executor:
        if executor := executor or cluster:
            task = functools.partial(fit_there, config, cache, threads)
        else:
            task = functools.partial(fit_here, config, cache, token_sources(cache, device))
        for number, (pair, result) in enumerate(engine.outcomes(executor, task, missing), 1):
            done[pair], left = result, len(missing) - number
            each = (time.perf_counter() - start) / number
            time_left = f", about {tqdm.format_interval(left * each)} for {left} more" if left else ""
            print(f"[{len(done)}/{len(pairs)}] {outcome(pair, result)}{time_left}", flush=True)
    return done


def processes(config: Config, features: dict, device: torch.device, pairs: int) -> int:
    """How many classes are fitted at a time, each by a process of its own: on a CPU as many as there are
    threads, or as the memory holds."""
    if device.type != "cpu":
        return 1
    each = PROCESS_BYTES + memory.training_bytes(config, features, config.batch_size)
    return max(1, min(torch.get_num_threads(), int(min(utils.available_memory() / each, pairs))))


def token_sources(cache: FeatureCache, device: torch.device) -> list[class_data.TokenSource]:
    return [class_data.TokenSource(cache.arrays(split), device) for split in datasets.SPLITS]


def fit_there(config: Config, cache: FeatureCache, threads: int, pair: runs.ClassSeed) -> dict:
    """``fit_here`` in another process, perhaps on another machine."""
    device = utils.set_up(config.device, threads)
    torch.cuda.empty_cache()  # of the pair before: tokens stay on a GPU where they fit into what is free
    return fit_here(config, cache, token_sources(cache, device), pair)


def fit_here(config: Config, cache: FeatureCache, sources: list, pair: runs.ClassSeed) -> dict:
    """Fit one class with one seed and keep what comes of it -> its result. One that cannot be fitted has a
    result with the reason and without figures."""
    try:
        fitted = train.make_trainer(config, cache, *pair, *sources).run()
    except ClassError as mistake:
        reason = str(mistake).removeprefix(f"class {pair.class_name}: ")
        nothing = dict.fromkeys(report.COLUMNS, float("nan"))
        return {"class": pair.class_name, "seed": pair.seed, **nothing, "reason": reason}
    checkpoints.save_fitted(config, cache, fitted)
    return fitted.result


def outcome(pair: runs.ClassSeed, result: dict) -> str:
    """What a class has come to, in one line, whatever it is called."""
    tested = f"AUROC {tables.number(result['auroc'])}" if result.get("n_test") else "no test images"
    told = result.get("reason") or f"{tested}  {result['seconds']:.0f} s"
    return f"{' '.join(pair.class_name.split())} seed {pair.seed}: {told}"


def run(config: Config) -> report.Summary:
    """The whole course of one configuration: features, classes, report -> its summary."""
    began = time.perf_counter()
    device = utils.set_up(config.device, config.threads)
    with runs.writing(config), engine.on_cluster(config.cluster) as cluster:
        check = functools.partial(detector.make_detector, config)
        cache = extractor.ensure_features(config, device, check, executor=cluster)
        classes = datasets.choose_classes(cache.labels, config.class_name)
        seeds = range(config.seed, config.seed + config.n_seeds)
        pairs = [runs.ClassSeed(class_name, seed) for seed in seeds for class_name in classes]
        runs.settle(config, cache, pairs)
        done = fit_pairs(config, cache, pairs, device, cluster)
        runs.sweep_up(config)  # which lists the folders, too: NFS may not show what others wrote before that
        return write_report(config, cache, [done[pair] for pair in pairs], time.perf_counter() - began)


def write_report(config: Config, cache: FeatureCache, results: list[dict], seconds: float) -> report.Summary:
    """Tables and pictures of a run whose pairs are all done, class by class from what each left -> its
    summary. seconds: since this run began, without those before it that it goes on with."""
    print("all classes are done: writing the report", flush=True)
    folder, drawing = checkpoints.run_folder(config), config.keep == "all"
    seeds = sorted({result["seed"] for result in results})
    failing = {result["class"] for result in results if "reason" in result}
    whole = list(dict.fromkeys(r["class"] for r in results if r["class"] not in failing))
    looks_at_images = drawing or (config.places and config.keep == "weights")
    images = findings.raw_images(config, cache) if looks_at_images else None
    found, by_class, records = {}, {}, {}
    for name in whole:
        left = findings.read_class(config, name, seeds)
        found[name] = findings.of_class(cache, images, left)
        records[name] = dataclasses.replace(left.first, flow_scores={}, simple_scores={})  # the largest parts
        if drawing:
            by_class[name] = figures.draw_class(cache, images, left, folder / "figures")
    summary = report.summarize(config, results, found, seconds, cache.meta)
    of_the_run = figures.draw_run(summary, records, folder / "figures") if drawing and whole else []
    print("\n" + report.write_results(folder, summary))
    write_text(folder / "report.html", pages.run_page(summary, of_the_run, by_class))
    print(f"\nresults in {folder}/report.html (for a browser), results.json, .csv and .md beside it")
    print(f"wall time {tqdm.format_interval(summary.wall_time_s)}")
    return summary


# ---------------------------------------------------------------- the committed table
def committed_table(config: Config) -> dict[str, float]:
    """{class, and mean: AUROC} of the preset's committed table. Raises UserError where there is none."""
    path = TABLES / f"{config.preset}.csv"
    if not path.exists():
        raise UserError(f"check: there is no committed table {path.name}")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or report.ORACLE not in rows[0]:  # the suite's, of several data sets
        raise UserError(f"check: {path.name} is no table of a run of main.py")
    return {row["class"]: float(row["auroc"]) for row in rows}


def differences(summary: report.Summary, wanted: dict[str, float]) -> list[str]:
    """What differs by more than TOLERANCE between a run's AUROCs and those of a table, a line each; what only
    one of them has differs, too."""
    found = {row["class"]: row["auroc"] for row in report.table_rows(summary)}
    pairs = {name: (found.get(name, math.nan), wanted.get(name, math.nan)) for name in found | wanted}
    return [
        f"{name}: AUROC {tables.number(ours)}, {tables.number(theirs)} in the table"
        for name, (ours, theirs) in pairs.items()
        if not abs(ours - theirs) <= TOLERANCE
    ]


def main(config: Config) -> None:
    """Raises UserError, once everything is reported, when a class could not be fitted; SystemExit with status
    1 when ``check`` finds a difference."""
    wanted = committed_table(config) if config.check else None
    summary = run(config)
    classes = summary.classes.values()
    failures = [bad[0] for e in classes if (bad := [run for run in e["runs"] if "reason" in run])]
    if failures:
        first = f"class {failures[0]['class']}: {failures[0]['reason']}"
        raise UserError(f"{len(failures)} of {len(classes)} classes could not be fitted: {first}")
    if wanted:
        different = differences(summary, wanted)
        print("\n".join(different) or f"equal within ± {TOLERANCE:.4f}".replace("0.", "."))
        if different:
            raise SystemExit(1)


if __name__ == "__main__":
    from main import main as by_name  # other processes know the tasks by this module's name

    run_script(by_name, CONFIG)
