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
from collections.abc import Iterator
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
from shell.values import parse_sweep, parse_values
from shell.workers import in_processes

PROCESS_BYTES = 1e9  # of a process of its own, beside the training
TABLES = Path(__file__).resolve().parent / "results"  # committed ones, a preset each
TOLERANCE = 5e-4  # of an AUROC, between two machines
Drawn = dict[str, list[figures.Picture]]  # class -> its pictures


# ---------------------------------------------------------------- running
class Failed(NamedTuple):
    """Stands for a class that could not be fitted."""

    pair: runs.ClassSeed
    reason: str

    def result(self) -> dict:
        """A result without figures."""
        nothing = dict.fromkeys(report.COLUMNS, float("nan"))
        return {"class": self.pair.class_name, "seed": self.pair.seed, **nothing, "reason": self.reason}


def fit_pairs(progress: runs.Progress, device: torch.device, watch: runs.Stopwatch) -> Drawn:
    """Fit every class with every seed that is not finished and that no other rank is at. Each is saved as
    soon as it is there, with its share of the wall time. A class that cannot be fitted stops no other ->
    pictures that are drawn already."""
    for number, pair in enumerate(progress.results, 1):
        announce(progress, pair, number, "kept")
    missing, at_once = len(progress.missing()), processes(progress, device)
    told = f", {at_once} at a time" if at_once > 1 else ""
    print(f"fitting {missing} flows of {len(progress.pairs)} (classes x seeds) on {device}{told}", flush=True)
    start, drawn = time.perf_counter(), Drawn()
    fitted = (
        in_parallel(progress, at_once, watch, drawn) if at_once > 1 else one_by_one(progress, device, watch)
    )
    for number, pair in enumerate(fitted, 1):
        each, left = (time.perf_counter() - start) / number, len(progress.missing())
        announce(progress, pair, len(progress.results), took(progress.results[pair], left, each))
        watch.lap()  # waiting for other ranks is nobody's share
    return drawn


def processes(progress: runs.Progress, device: torch.device) -> int:
    """How many classes are fitted at a time, each by a process of its own: on a CPU as many as there are
    threads, or as the memory holds; 1 where ranks share the work already."""
    if device.type != "cpu" or progress.ranks.world_size > 1:
        return 1
    config, features = progress.config, progress.cache.meta
    each = PROCESS_BYTES + memory.training_bytes(config, features, config.batch_size)
    held = int(min(utils.available_memory() / each, len(progress.pairs)))
    return max(1, min(torch.get_num_threads(), held))


def one_by_one(
    progress: runs.Progress, device: torch.device, watch: runs.Stopwatch
) -> Iterator[runs.ClassSeed]:
    """Fit the pairs that are this process's turn -> each, once it is kept."""
    cache = progress.cache
    sources = {split: class_data.TokenSource(cache.arrays(split), device) for split in datasets.SPLITS}
    for pair in progress.turns():
        progress.keep(pair, fit_and_keep(progress.config, cache, pair, sources, watch))
        yield pair


class Task(NamedTuple):
    """A pair for a process of its own."""

    pair: runs.ClassSeed
    config: Config
    identity: feature_cache.CacheIdentity
    threads: int
    since: float  # when its share of the wall time began


def in_parallel(
    progress: runs.Progress, at_once: int, watch: runs.Stopwatch, drawn: Drawn
) -> Iterator[runs.ClassSeed]:
    """Fit what is missing, so many pairs at a time -> each, once it is kept, its pictures in ``drawn``. All
    have the same number of threads, on two cores one: what a pair comes to does not depend on how many are
    missing."""
    cache, threads = progress.cache, max(1, torch.get_num_threads() // at_once)
    identity = feature_cache.CacheIdentity(cache.folder, cache.manifest.fields)
    tasks = (Task(pair, progress.config, identity, threads, watch.since) for pair in progress.missing())
    for pair, result, pictures in in_processes(at_once, fit_task, tasks, threads):
        progress.keep(pair, result)
        drawn |= {pair.class_name: pictures} if pictures else {}
        yield pair


def fit_task(task: Task) -> tuple[runs.ClassSeed, dict, list[figures.Picture]]:
    """Fit and keep a pair in a process of its own -> the pair, its result and its pictures; those that are
    not drawn here are left to the report."""
    device = utils.set_up("cpu", task.threads)
    cache = feature_cache.FeatureCache(task.identity)
    sources = {split: class_data.TokenSource(cache.arrays(split), device) for split in datasets.SPLITS}
    config, pair, pictures = task.config, task.pair, []
    result = fit_and_keep(config, cache, pair, sources, runs.Stopwatch(task.since))
    if config.keep == "all" and pair.seed == config.seed and "reason" not in result:
        with contextlib.suppress(UserError):  # of which the report tells, once for all classes
            images, folder = figures.raw_images(config, cache), checkpoints.run_folder(config)
            pictures = figures.draw_class(config, cache, images, pair.class_name, folder)
    return pair, result, pictures


def fit_and_keep(
    config: Config,
    cache: feature_cache.FeatureCache,
    pair: runs.ClassSeed,
    sources: dict[str, class_data.TokenSource],
    watch: runs.Stopwatch,
) -> dict:
    """Fit a pair and save what came of it -> its result."""
    outcome = fit(config, cache, pair, sources)
    if isinstance(outcome, Failed):
        result = outcome.result() | watch.share()
        runs.keep_failure(config, cache, pair, result)
        return result
    outcome.result |= watch.share()
    checkpoints.save_fitted(config, cache, outcome)
    return outcome.result


def announce(progress: runs.Progress, pair: runs.ClassSeed, number: int, how: str) -> None:
    """Say what a class has come to."""
    result = progress.results[pair]
    tested = f"AUROC {tables.number(result['auroc'])}" if result.get("n_test") else "no test images"
    told = result.get("reason") or f"{tested}  {how}"
    name = " ".join(pair.class_name.split())  # one line, whatever a folder is called
    print(f"[{number}/{len(progress.pairs)}] {name} seed {pair.seed}: {told}", flush=True)


def took(result: dict, left: int, each: float) -> str:
    """The time that a class took, and what those that are left will take at ``each`` seconds a class."""
    told = f"{result.get('seconds', 0):.0f} s"
    return f"{told}, about {utils.readable_time(left * each)} for {left} more" if left else told


def fit(
    config: Config,
    cache: feature_cache.FeatureCache,
    pair: runs.ClassSeed,
    sources: dict[str, class_data.TokenSource],
) -> checkpoints.Fitted | Failed:
    """Fit one class with one seed."""
    try:
        return train.make_trainer(config, cache, *pair, sources["train"], sources["test"]).run()
    except ClassError as mistake:
        return Failed(pair, str(mistake).removeprefix(f"class {pair.class_name}: "))


def run(config: Config) -> dict | None:
    """The whole course of one configuration: features, classes, baselines, report -> its summary; None where
    another rank writes the report."""
    watch = runs.Stopwatch()
    device = utils.set_up(config.device, config.threads)
    with runs.writing(config):
        cache = extractor.ensure_features(config, device, functools.partial(detector.Detector, config))
        classes = datasets.choose_classes(cache.labels, config.class_name)
        seeds = range(config.seed, config.seed + config.n_seeds)
        pairs = [runs.ClassSeed(class_name, seed) for seed in seeds for class_name in classes]
        runs.settle(config, cache, pairs)
        progress = runs.Progress(config, cache, pairs)
        try:
            drawn = fit_pairs(progress, device, watch)
        except Interrupted as interrupted:
            interrupted.told = progress.go_on()
            raise
        if not progress.report_is_mine():
            print(f"rank {progress.ranks.rank} is done; another one reports", flush=True)
            return None
        progress.tidy()
        return write_report(progress, classes, watch, drawn)


def write_report(progress: runs.Progress, classes: list[str], watch: runs.Stopwatch, drawn: Drawn) -> dict:
    """Baselines, table and pictures of a run whose pairs are all done -> its summary."""
    config, cache, folder = progress.config, progress.cache, checkpoints.run_folder(progress.config)
    print("all classes are done: writing the report", flush=True)
    results = [progress.results[pair] for pair in progress.pairs]
    failing = {result["class"] for result in results if "reason" in result}
    whole = [class_name for class_name in classes if class_name not in failing]
    table = findings.simple_detectors(config, whole) if config.baselines else {}
    defects = findings.defect_aurocs(config, cache, whole, sorted({pair.seed for pair in progress.pairs}))
    seconds = runs.wall_time(results) + watch.lap()
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
        if summary := run(combination):
            summaries[values] = summary
    if len(summaries) < len(configs):  # another rank reports
        return list(summaries.values())
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
    classes = [entry for summary in summaries if summary for entry in summary["classes"].values()]
    failures = [bad[0] for e in classes if (bad := [run for run in e["runs"] if "reason" in run])]
    if failures:
        first = f"class {failures[0]['class']}: {failures[0]['reason']}"
        raise UserError(f"{len(failures)} of {len(classes)} classes could not be fitted: {first}")
    if wanted and summaries[0]:
        different = differences(summaries[0], wanted)
        print("\n".join(different) or f"equal within ± {TOLERANCE:.4f}".replace("0.", "."))
        if different:
            raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, CONFIG)
