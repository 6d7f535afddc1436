"""Fit one flow per normal class and seed; report detection per class and on average, on screen and in
runs/<modelname>/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # under PYTHONSAFEPATH, too

import config as knobs
from shell.command_line import from_command_line, run_script
from shell.files import file_name
from shell.signals import Interrupted

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__)

import contextlib
import csv
import dataclasses
import functools
import itertools
import time
from concurrent.futures import Executor
from typing import NamedTuple

import torch

import datasets
import extractor
import train
import utils
from cache import feature_cache
from config import ClassError, Config, UserError
from detector import calibration, checkpoints, class_data, detector, memory, runs
from reporting import figures, findings, report, tables, webpage
from shell import engine
from shell.values import parse_sweep, parse_values

PROCESS_BYTES = 1e9  # of a process of its own, beside the training
TABLES = Path(__file__).resolve().parent / "results"  # committed ones, a preset each
TOLERANCE = 5e-4  # of an AUROC, between two machines


# ---------------------------------------------------------------- running
class Outcome(NamedTuple):
    """What came of a pair: its result, and the pictures of it that are drawn."""

    result: dict
    pictures: list[figures.Picture]


Outcomes = dict[runs.ClassSeed, Outcome]
Sources = dict[str, class_data.TokenSource]  # by split


def fit_pairs(
    config: Config,
    cache: feature_cache.FeatureCache,
    pairs: list[runs.ClassSeed],
    device: torch.device,
    cluster: Executor | None,
    began: float,
) -> Outcomes:
    """Fit every class with every seed that is not finished. Each is kept as soon as it is there. A class that
    cannot be fitted stops no other. began: the run, in s since 1970."""
    done = {pair: Outcome(result, []) for pair, result in runs.all_finished(config, cache, pairs).items()}
    for number, (pair, kept) in enumerate(done.items(), 1):
        announce(pair, kept.result, f"{number}/{len(pairs)}", "kept")
    missing = [pair for pair in pairs if pair not in done]
    at_once = 1 if cluster else processes(config, cache.meta, device, len(pairs))
    threads = config.threads or 1 if cluster else max(1, torch.get_num_threads() // at_once)
    where = config.cluster if cluster else f"{device}, {at_once} at a time" if at_once > 1 else device
    print(f"fitting {len(missing)} flows of {len(pairs)} (classes x seeds) on {where}", flush=True)
    start = time.perf_counter()
    with engine.in_processes(at_once, threads) as executor:
        executor = executor or cluster
        if executor:
            task = functools.partial(fit_there, config, cache, threads, began)
        else:
            task = functools.partial(fit_here, config, cache, token_sources(cache, device), began)
        for number, (pair, outcome) in enumerate(engine.outcomes(executor, task, missing), 1):
            done[pair] = outcome
            each = (time.perf_counter() - start) / number
            how = took(outcome.result, len(missing) - number, each)
            announce(pair, outcome.result, f"{len(done)}/{len(pairs)}", how)
    return done


def processes(config: Config, features: dict, device: torch.device, pairs: int) -> int:
    """How many classes are fitted at a time, each by a process of its own: on a CPU as many as there are
    threads, or as the memory holds."""
    if device.type != "cpu":
        return 1
    each = PROCESS_BYTES + memory.training_bytes(config, features, config.batch_size)
    return max(1, min(torch.get_num_threads(), int(min(utils.available_memory() / each, pairs))))


def token_sources(cache: feature_cache.FeatureCache, device: torch.device) -> Sources:
    return {split: class_data.TokenSource(cache.arrays(split), device) for split in datasets.SPLITS}


def fit_there(
    config: Config,
    cache: feature_cache.FeatureCache,
    threads: int,
    began: float,
    pair: runs.ClassSeed,
) -> Outcome:
    """Fit one class with one seed in another process, perhaps on another machine, and draw it there, too."""
    device = utils.set_up(config.device, threads)
    torch.cuda.empty_cache()  # of the pair before: tokens stay on a GPU where they fit into what is free
    runs.check_settled(config, cache)
    outcome = fit_here(config, cache, token_sources(cache, device), began, pair)
    if config.keep == "all" and pair.seed == config.seed and "reason" not in outcome.result:
        with contextlib.suppress(UserError):  # of which the report tells, once for all classes
            images, folder = figures.raw_images(config, cache), checkpoints.run_folder(config)
            outcome.pictures[:] = figures.draw_class(config, cache, images, pair.class_name, folder)
    return outcome


def fit_here(
    config: Config, cache: feature_cache.FeatureCache, sources: Sources, began: float, pair: runs.ClassSeed
) -> Outcome:
    """Fit one class with one seed and keep what comes of it; its pictures are left to the report. One that
    cannot be fitted has a result with the reason and without figures."""
    try:
        fitted = train.make_trainer(config, cache, *pair, sources["train"], sources["test"]).run()
    except ClassError as mistake:
        reason = str(mistake).removeprefix(f"class {pair.class_name}: ")
        nothing = dict.fromkeys(report.COLUMNS, float("nan"))
        result = {"class": pair.class_name, "seed": pair.seed, **nothing, "reason": reason}
        return Outcome(result | runs.times(began), [])
    fitted.result |= runs.times(began)
    checkpoints.save_fitted(config, cache, fitted)
    return Outcome(fitted.result, [])


def announce(pair: runs.ClassSeed, result: dict, number: str, how: str) -> None:
    """Say what a class has come to."""
    tested = f"AUROC {tables.number(result['auroc'])}" if result.get("n_test") else "no test images"
    told = result.get("reason") or f"{tested}  {how}"
    name = " ".join(pair.class_name.split())  # one line, whatever a folder is called
    print(f"[{number}] {name} seed {pair.seed}: {told}", flush=True)


def took(result: dict, left: int, each: float) -> str:
    """The time that a class took, and what those that are left will take at ``each`` seconds a class."""
    told = f"{result.get('seconds', 0):.0f} s"
    return f"{told}, about {utils.readable_time(left * each)} for {left} more" if left else told


def run(config: Config) -> dict:
    """The whole course of one configuration: features, classes, baselines, report -> its summary."""
    began = time.time()
    device = utils.set_up(config.device, config.threads)
    with runs.writing(config), engine.on_cluster(config.cluster) as cluster:
        check = functools.partial(detector.make_detector, config)
        cache = extractor.ensure_features(config, device, check, executor=cluster)
        classes = datasets.choose_classes(cache.labels, config.class_name)
        seeds = range(config.seed, config.seed + config.n_seeds)
        pairs = [runs.ClassSeed(class_name, seed) for seed in seeds for class_name in classes]
        runs.settle(config, cache, pairs)
        try:
            done = fit_pairs(config, cache, pairs, device, cluster, began)
        except Interrupted as interrupted:
            interrupted.told = runs.go_on(config, cache, pairs)
            raise
        runs.sweep_up(config)  # which lists the folders, too: NFS may not show what others wrote before that
        return write_report(config, cache, {pair: done[pair] for pair in pairs}, began)


def write_report(config: Config, cache: feature_cache.FeatureCache, done: Outcomes, began: float) -> dict:
    """Baselines, table and pictures of a run whose pairs are all done -> its summary."""
    folder = checkpoints.run_folder(config)
    print("all classes are done: writing the report", flush=True)
    results = [outcome.result for outcome in done.values()]
    failing = {result["class"] for result in results if "reason" in result}
    whole = list(dict.fromkeys(pair.class_name for pair in done if pair.class_name not in failing))
    drawn = {pair.class_name: outcome.pictures for pair, outcome in done.items() if outcome.pictures}
    table = findings.simple_detectors(config, whole) if config.baselines else {}
    defects = findings.defect_aurocs(config, cache, whole, sorted({pair.seed for pair in done}))
    seconds = runs.wall_time(results, began)
    thresholds = {
        name: calibration.of_record(record, config.false_alarms)
        for name, record in checkpoints.trained_records(config, whole)
    }
    summary = report.summarize(config, results, table, seconds, cache.meta, defects, thresholds)
    summary["localisation"] = findings.localisations(config, cache, whole)
    print("\n" + report.write_results(folder, summary))
    for name, found in summary["localisation"].items():
        print(
            f"{name}: where the defect is: pixel AUROC {found['pixel_auroc']:.4f}  AUPRO {found['aupro']:.4f}"
        )
    plots = config.keep == "all" and whole
    pictures = figures.draw_all(config, cache, whole, folder, summary, drawn) if plots else []
    page = webpage.write_page(folder, summary, pictures)
    print(f"\nresults in {page} (for a browser), results.json, .csv and .md beside it")
    print(f"wall time {utils.readable_time(summary['wall_time_s'])}")
    return summary


def run_sweep(config: Config) -> list[dict]:
    """Run every combination of the values that the knob ``sweep`` lists, then the table of them all -> their
    summaries."""
    start, sweep = time.perf_counter(), parse_sweep(config.sweep)
    folder, configs = checkpoints.run_folder(config), {}
    for values in itertools.product(*sweep.values()):  # all first: a mistake shows before the first run
        parsed = parse_values(dict(zip(sweep, values)))
        name = file_name("-".join(values), knobs.LONGEST_NAME - 10)
        configs[values] = dataclasses.replace(
            config, **parsed, modelname=f"{config.modelname}/{name}", sweep=None
        )
    summaries: dict[tuple, dict] = {}
    for values, combination in configs.items():
        print(f"\n=== {' '.join(f'{knob} {value}' for knob, value in zip(sweep, values))}", flush=True)
        summaries[values] = run(combination)
    print("\n" + report.write_sweep(folder, sweep, summaries, time.perf_counter() - start))
    print(f"\nresults in {folder}/sweep.json and sweep.md")
    return list(summaries.values())


def committed_table(config: Config) -> dict[str, float]:
    """{class, and mean: AUROC} of the preset's committed table. Raises UserError where there is none."""
    path = TABLES / f"{config.preset}.csv"
    if config.sweep or not path.exists():
        raise UserError(f"check: there is no committed table of {'a sweep' if config.sweep else path.name}")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("method") == "flow"]
    if not rows:  # the suite's, of several data sets
        raise UserError(f"check: {path.name} is no table of a run of main.py")
    return {row["class"]: float(row["auroc"]) for row in rows}


def differences(summary: dict, wanted: dict[str, float]) -> list[str]:
    """What differs by more than TOLERANCE between a run's AUROCs and those of a table, a line each."""
    found = {name: entry["auroc"] for name, entry in summary["classes"].items()}
    found["mean"] = summary["mean"]["auroc"]
    lines = [f"{name}: not in the table" for name in found if name not in wanted]
    for name, auroc in wanted.items():
        if name not in found:
            lines.append(f"{name}: not in this run")
        elif not abs(found[name] - auroc) <= TOLERANCE:  # an undefined one differs, too
            lines.append(f"{name}: AUROC {found[name]:.4f}, {auroc:.4f} in the table")
    return lines


def main(config: Config) -> None:
    """Raises UserError, once everything is reported, when a class could not be fitted; SystemExit with status
    1 when ``check`` finds a difference."""
    wanted = committed_table(config) if config.check else None
    summaries = run_sweep(config) if config.sweep else [run(config)]
    classes = [entry for summary in summaries for entry in summary["classes"].values()]
    failures = [bad[0] for e in classes if (bad := [run for run in e["runs"] if "reason" in run])]
    if failures:
        first = f"class {failures[0]['class']}: {failures[0]['reason']}"
        raise UserError(f"{len(failures)} of {len(classes)} classes could not be fitted: {first}")
    if wanted:
        different = differences(summaries[0], wanted)
        print("\n".join(different) or f"equal within ± {TOLERANCE:.4f}".replace("0.", "."))
        if different:
            raise SystemExit(1)


if __name__ == "__main__":
    from main import main as by_name  # other processes know the tasks by this module's name

    run_script(by_name, CONFIG)
