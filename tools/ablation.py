"""What each part of the preset accurate adds: a Markdown table of runs that leave one out, by the likelihoods
of the flows alone (--neighbours_weight 0), so that neighbours hide nothing.

python tools/ablation.py --textures data/textures --cifar10 data/cifar10 --ranks 2

Every cell of the table is a run of main.py in runs/ablation-DATASET-ROW, whose results.md has its command;
what is there already is kept. The first row's history tells what training adds."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """What a row leaves out: its words, the knobs, and whether these want features of their own."""

    words: str
    knobs: tuple[str, ...] = ()
    own_features: bool = False


WHOLE = "whole"
ROWS = {
    WHOLE: Row("`accurate`, its likelihoods alone"),
    "nofusion": Row("without fusion", ("--fusion", "none")),
    "class_attention": Row("class attention instead of the spectral gate", ("--fusion", "class_attention")),
    "hilo": Row("hilo instead", ("--fusion", "hilo")),
    "nolow": Row("without the low band", ("--low_depths", "0")),
    "norings": Row("without rings, peaks and places", ("--spread_at_balance", "1e-6")),
    "noplaces": Row("without places", ("--places", "0"), own_features=True),
    "nomirror": Row("without mirror images", ("--mirror", "False"), own_features=True),
}
COMMON = ("--preset", "accurate", "--extractor", "efficientnet_lite0", "--neighbours_weight", "0",
          "--threads", "1", "--baselines", "False", "--plots", "False", "--save_model", "False",
          "--verbose", "False", "--hide_tqdm_bar", "True")  # fmt: skip


def name_of(dataset: str, row: str) -> str:
    return f"ablation-{dataset}-{row}"


def run(dataset: list[str], name: str, row: Row, ranks: int) -> None:
    """The run of one cell, by so many processes. Raises CalledProcessError."""
    command = [sys.executable, str(ROOT / "main.py"), *COMMON, *dataset, *row.knobs, "--modelname", name]
    if row.own_features:
        command += ["--feature_path", f"features/{name}"]
    shared = [["--rank", str(rank), "--world_size", str(ranks)] for rank in range(ranks)]
    processes = [subprocess.Popen([*command, *part]) for part in shared]
    for process in processes:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)


def aurocs(name: str) -> np.ndarray | None:
    """AUROC before training and at the end (classes, 2) of a finished run; None where there is none."""
    folder = Path("runs") / name
    if not (folder / "results.json").exists():
        return None
    records = [json.loads(path.read_text()) for path in sorted((folder / "classes").glob("*-seed*.json"))]
    return np.array([(r["history"][0]["auroc"], r["result"]["auroc"]) for r in records])


def table(datasets: list[str]) -> str:
    """The Markdown table of the runs that are there, means over classes."""
    lines = [f"| | knobs | {' | '.join(datasets)} |", "|---|---|" + "---|" * len(datasets)]
    found = {(data, row): aurocs(name_of(data, row)) for data in datasets for row in ROWS}

    def cells(row: str, when: int) -> str:
        values = [found[data, row] for data in datasets]
        return " | ".join("not run" if v is None else f"{v[:, when].mean():.4f}" for v in values)

    lines.append(f"| before training | (epoch 0 of the next row) | {cells(WHOLE, 0)} |")
    for row, (words, knobs, _) in ROWS.items():
        changed = f"`{' '.join(knobs)}`" if knobs else ""
        lines.append(f"| {words} | {changed} | {cells(row, 1)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--textures", help="folder of tools/textures.py: a column of it")
    parser.add_argument("--cifar10", help="folder of the CIFAR-10 images: a column of it")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"[{','.join(ROWS)}]")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the classes [1]")
    parser.add_argument("--class_name", default="all", help="classes of CIFAR-10 [all]")
    arguments = parser.parse_args()
    datasets = {"digits": ["--dataset", "digits"]}
    if arguments.textures:
        datasets["textures"] = ["--dataset", "mvtec", "--dataset_path", arguments.textures]
    if arguments.cifar10:
        datasets["cifar10"] = ["--dataset", "cifar10", "--dataset_path", arguments.cifar10]
        datasets["cifar10"] += ["--class_name", arguments.class_name]
    for data, given in datasets.items():
        for row in arguments.rows.split(","):
            run(given, name_of(data, row), ROWS[row], arguments.ranks)
            print("\n" + table(list(datasets)), flush=True)


if __name__ == "__main__":
    main()
