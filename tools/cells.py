"""Solar cells in MVTec layout, from the package elpv-dataset (requirements-dev.txt): 2,624 pictures of real
cells by electroluminescence, mono- and polycrystalline.

python tools/cells.py data/cells
python main.py --preset accurate --dataset mvtec --dataset_path data/cells --extractor efficientnet_lite0

Good is a cell whose probability of a defect is 0, all others are defective. Of the good ones of a kind 80 %
are for training, by NumPy's RandomState(seed)."""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as knobs
from shell.command_line import OneLineParser
from shell.signals import guarded
from tools.textures import new_set

KINDS = ("mono", "poly")


def package_data() -> Path:
    """The folder of the package's labels.csv. Raises UserError where it is not installed."""
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or not found.submodule_search_locations:
        raise knobs.UserError("the package elpv-dataset is not installed: pip install elpv-dataset")
    return Path(found.submodule_search_locations[0]) / "data"


def places(lines: list[str], seed: int) -> dict[str, str]:
    """Lines "path probability kind" of labels.csv -> {path: the folder it belongs in}."""
    cells = [line.split() for line in lines if line.strip()]
    found: dict[str, str] = {}
    for kind in KINDS:
        good = [path for path, probability, own in cells if own == kind and float(probability) == 0]
        order = np.random.RandomState(seed).permutation(len(good))
        found |= {path: f"{kind}/test/defective" for path, _, own in cells if own == kind}
        found |= dict.fromkeys(good, f"{kind}/test/good")
        found |= {good[i]: f"{kind}/train/good" for i in order[: int(0.8 * len(good))]}
    return found


def write_set(folder: Path, source: Path, seed: int) -> None:
    """Write the set, whole or not at all (``new_set``)."""
    with new_set(folder, seed) as partial:
        found = places((source / "labels.csv").read_text().splitlines(), seed)
        for path, place in found.items():
            (partial / place).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, partial / place / Path(path).name)
    print(f"{len(found)} images of {len(KINDS)} kinds of cells in {folder}")


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the split [0]")
    args = parser.parse_args()
    guarded(lambda: write_set(args.folder, package_data(), args.seed))
