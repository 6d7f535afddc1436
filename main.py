"""Fit one flow per normal class and seed, and report detection per class and on average: table on screen, files in runs/<modelname>/."""

import config as knobs

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = knobs.from_command_line(__doc__)

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import baselines
import datasets
import evaluate
import extractor
import together
import train
import utils
from config import Config

METRICS = ("auroc", "aupr", "fpr95", "best_on_test_auroc")


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


IRRELEVANT = ("class_name", "seed", "n_seeds", "resume", "verbose", "hide_tqdm_bar", "plots", "baselines", "pretrained", "nbins1", "nbins2", "threads", "preset", "workers")  # fmt: skip


def finished_result(config: Config, cache: datasets.FeatureCache, class_name: str, seed: int) -> dict | None:
    """The result of a class and seed that an earlier run of the same configuration and features finished; None without one."""
    path = train.checkpoint_path(config, class_name, seed).with_suffix(".json")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    wanted = {name: value for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items() if name not in IRRELEVANT}
    same = all(content["config"].get(name) == value for name, value in wanted.items()) and content["features"] == cache.meta
    return content["result"] if same else None


def run_baselines(config: Config, cache: datasets.FeatureCache, classes: list[str]) -> dict[str, dict[str, dict]]:
    """{baseline: {class: metrics}} on the same semantic tokens."""
    semantic = {}
    for split in datasets.SPLITS:
        source = train.TokenSource(cache.tokens(split), torch.device("cpu"))
        semantic[split] = torch.cat([source[part][0].clone() for part in train.parts(np.arange(len(source.tokens)), 500)])
    table = {name: {} for name in baselines.BASELINES}
    for class_name in classes:
        train_rows, test_rows, labels = cache.labels.one_class(class_name)
        for name, scores in baselines.baseline_scores(semantic["train"][train_rows], semantic["test"][test_rows]).items():
            table[name][class_name] = utils.detection_metrics(labels, scores)
    return table


# ---------------------------------------------------------------- reporting
def summarize(config: Config, results: list[dict], baseline_table: dict, seconds: float, meta: dict) -> dict:
    """results.json: per class the mean and standard deviation over seeds, and their mean over classes (std of the seeds' means)."""
    classes = list(dict.fromkeys(result["class"] for result in results))
    by_class = {name: _over_seeds([[r for r in results if r["class"] == name]]) for name in classes}
    seeds = sorted({result["seed"] for result in results})
    for name in classes:
        by_class[name]["runs"] = [result for result in results if result["class"] == name]
    mean = _over_seeds([[r for r in results if r["class"] == name] for name in classes])
    rows = {name: {"classes": per_class, "mean": _mean_metrics(per_class)} for name, per_class in baseline_table.items()}
    return {
        "classes": by_class, "mean": mean, "baselines": rows, "config": dataclasses.asdict(config), "seeds": seeds, "features": meta,
        "versions": utils.versions(), "wall_time_s": round(seconds, 1), "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }  # fmt: skip


def _over_seeds(groups: list[list[dict]]) -> dict:
    """Mean over groups and seeds of every metric, and the standard deviation over seeds of the groups' mean (0 for one seed)."""
    summary = {}
    for metric in METRICS:
        values = np.array([[result[metric] for result in group] for group in groups])  # (groups, seeds)
        per_seed = values.mean(0)
        summary[metric] = float(per_seed.mean())
        summary[f"{metric}_std"] = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else 0.0
    return summary


def _mean_metrics(per_class: dict[str, dict]) -> dict:
    return {metric: float(np.mean([values[metric] for values in per_class.values()])) for metric in ("auroc", "aupr", "fpr95")}


def make_table(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a row per class, then the mean."""
    n_seeds, config = len(summary["seeds"]), summary["config"]
    chosen = "last epoch" if config["select_epoch"] == "last" else "epoch by held-out likelihood"
    header = ["class", f"AUROC ({chosen})", "AUPR", "FPR95", "best on test (oracle)", *summary["baselines"]]

    def cell(values, metric):
        return f"{values[metric]:.4f}" + (f" ± {values[f'{metric}_std']:.4f}" if n_seeds > 1 else "")

    rows = []
    for name, values in [*summary["classes"].items(), ("mean", summary["mean"])]:
        others = [b["mean"] if name == "mean" else b["classes"][name] for b in summary["baselines"].values()]
        rows.append([name, *(cell(values, metric) for metric in METRICS), *(f"{other['auroc']:.4f}" for other in others)])
    return header, rows


def as_text(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:-1], "-" * len(lines[0]), lines[-1]])


def as_markdown(header: list[str], rows: list[list[str]], summary: dict) -> str:
    config, versions = summary["config"], summary["versions"]
    line = "| " + " | ".join(["---"] * len(header)) + " |"
    table = "\n".join(["| " + " | ".join(header) + " |", line, *("| " + " | ".join(row) + " |" for row in rows)])
    settings = ", ".join(f"{name} {value}" for name, value in config.items() if value is not None)
    return (
        f"# {config['dataset']}, {config['extractor']}, fusion {config['fusion']}\n\n{table}\n\n"
        f"Seeds: {', '.join(map(str, summary['seeds']))}; ± is the standard deviation over them. Baseline columns: AUROC.\n\n"
        f"Command: `{summary['command']}`\n\nWall time: {summary['wall_time_s']:.0f} s. "
        f"Versions: {', '.join(f'{name} {value}' for name, value in versions.items())}.\n\nConfiguration: {settings}.\n"
    )


def write_results(folder: Path, summary: dict) -> str:
    """Write results.json, results.csv and results.md -> the table as text."""
    header, rows = make_table(summary)
    utils.write_text(folder / "results.md", as_markdown(header, rows, summary))
    utils.write_text(folder / "results.csv", as_csv(summary))
    utils.write_json(folder / "results.json", summary)
    return as_text(header, rows)


def as_csv(summary: dict) -> str:
    """One line per method and class, numbers unrounded."""
    lines = ["method,class,auroc,auroc_std,aupr,fpr95,best_on_test_auroc"]
    for name, v in [*summary["classes"].items(), ("mean", summary["mean"])]:
        lines.append(f"flow,{name},{v['auroc']},{v['auroc_std']},{v['aupr']},{v['fpr95']},{v['best_on_test_auroc']}")
    for method, table in summary["baselines"].items():
        for name, v in [*table["classes"].items(), ("mean", table["mean"])]:
            lines.append(f'"{method}",{name},{v["auroc"]},,{v["aupr"]},{v["fpr95"]},')
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    start = time.perf_counter()
    device = utils.set_up(config.device, config.threads)
    cache = extractor.ensure_features(config, device)
    classes = datasets.choose_classes(cache.labels, config.class_name)
    results = run_classes(config, cache, classes, device)
    table = run_baselines(config, cache, classes) if config.baselines else {}
    summary = summarize(config, results, table, time.perf_counter() - start, cache.meta)
    folder = Path("runs") / config.modelname
    print("\n" + write_results(folder, summary))
    if config.plots:
        evaluate.draw_all(config, cache, classes, folder)
    print(f"\nresults in {folder}/results.json, .csv and .md; wall time {summary['wall_time_s']:.0f} s")


if __name__ == "__main__":
    knobs.run_script(main, CONFIG)
