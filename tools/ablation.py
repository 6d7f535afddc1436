"""What fusion and training add: a Markdown table of sweeps by the preset ablation, one per data set.

python main.py --preset ablation --dataset digits --modelname ablation-digits
python main.py --preset ablation --dataset mvtec --dataset_path data/textures --modelname ablation-textures
python tools/ablation.py runs/ablation-digits runs/ablation-textures

Every row has the AUROC of the flow's likelihood and of its mean z^2, without places, at the epoch that was
chosen: means over classes and seeds, ± the standard deviation over seeds of the mean over classes."""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from detector import checkpoints

SCORES = {"flow": "the flow's likelihood", "latent": "mean z²"}  # of a record -> as the table calls them


class Row(NamedTuple):
    """A line of the table: its words, the run of the sweep that it is of, and whether before training."""

    words: str
    run: str
    before: bool = False


# Without fusion there are no patch tokens to choose.
ROWS = (
    Row("before training", "none-last", before=True),
    Row("no fusion", "none-last"),
    Row("class attention, last map", "class_attention-last"),
    Row("class attention, middle depths", "class_attention-middle"),
    Row("hilo, last map", "hilo-last"),
    Row("hilo, middle depths", "hilo-middle"),
    Row("spectral, last map", "spectral-last"),
    Row("spectral, middle depths", "spectral-middle"),
)


def aurocs(folder: Path, before: bool) -> dict[int, np.ndarray]:
    """{seed: means over classes of the AUROC of each score (2)} of a run; empty where there is none.
    ``before``: of the first evaluation, before training, instead of the chosen one. Raises ValueError on a
    record that is damaged or of another version."""
    found: dict[int, list] = defaultdict(list)
    for path in sorted((folder / "classes").glob("*-seed*.json")):
        if not path.name.endswith(".failed.json"):
            record = checkpoints.read_record(path)
            entry = record["history"][0] if before else record["result"]
            found[record["result"]["seed"]].append([entry[f"{name}_auroc"] for name in SCORES])
    return {seed: np.mean(classes, 0) for seed, classes in found.items()}


def cells(seeds: dict[int, np.ndarray]) -> list[str]:
    """A cell for each score."""
    if not seeds:
        return ["not run"] * len(SCORES)
    means = np.array(list(seeds.values()))
    spread = [f" ± {value:.4f}" for value in means.std(0, ddof=1)] if len(means) > 1 else [""] * len(SCORES)
    return [f"{mean:.4f}{more}" for mean, more in zip(means.mean(0), spread)]


def table(sweeps: list[Path]) -> str:
    """The Markdown table of the runs that are there."""
    titles = [f"{sweep.name}, {score}" for sweep in sweeps for score in SCORES.values()]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for row in ROWS:
        found = [cell for sweep in sweeps for cell in cells(aurocs(sweep / row.run, row.before))]
        lines.append(f"| {row.words} | {' | '.join(found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of sweeps by the preset ablation")
    print(table(parser.parse_args().sweeps))


if __name__ == "__main__":
    main()
