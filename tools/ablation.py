"""What fusion and training add: two Markdown tables of sweeps by the preset ablation, one per data set.

python main.py --preset ablation --dataset digits --modelname ablation-digits
python main.py --preset ablation --dataset mvtec --dataset_path data/textures --modelname ablation-textures
python tools/ablation.py runs/ablation-digits runs/ablation-textures

The first has the AUROC of the whole score, and of the places alone over the classes whose places are read:
means over classes and seeds, ± the standard deviation over seeds of the mean over classes; before training,
of the first seed. The second has what a row has more than the flow without fusion of the same seed, and that
on the mean of the sets."""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import utils
from detector import checkpoints
from detector.detector import WHOLE

SCORES = (WHOLE, "places")  # of a record


class Row(NamedTuple):
    """A line of the table: its words, the run of the sweep that it is of, and whether before training."""

    words: str
    run: str
    before: bool = False


NO_FUSION = Row("no fusion", "none")
ROWS = (
    Row("before training", "none", before=True),
    NO_FUSION,
    Row("class attention", "class_attention"),
    Row("hilo", "hilo"),
    Row("bands", "bands"),
)


def aurocs(folder: Path, before: bool) -> dict[int, np.ndarray]:
    """{seed: means over classes of the AUROC of each score (2)} of a run; empty where there is none, NaN of
    the places where no class reads them. ``before``: before training, of the seeds that were measured then.
    Raises ValueError on a record that is damaged or of another version."""
    found: dict[int, list] = defaultdict(list)
    for path in sorted((folder / "classes").glob("*-seed*.json")):
        record = checkpoints.read_record(path)
        scores = {WHOLE: record["test"]["scores"]} | record["flow_scores"]
        if before:
            scores = {name: scores.get(f"{name}, before training") for name in SCORES}
        if scores.get(WHOLE):
            labels = np.array(record["test"]["labels"])
            values = [np.array(scores.get(name) or np.full(len(labels), np.nan)) for name in SCORES]
            each = [np.nan if np.isnan(v).any() else utils.auroc(labels, v) for v in values]
            found[record["result"]["seed"]].append(each)
    return {
        seed: np.ma.masked_invalid(classes).mean(0).filled(np.nan) for seed, classes in sorted(found.items())
    }


def cells(seeds: dict[int, np.ndarray], form: str = "{:.4f}") -> list[str]:
    """A cell for each score."""
    if not seeds:
        return ["not run"] * len(SCORES)
    means = np.array(list(seeds.values()))
    spread = [f" ± {value:.4f}" for value in means.std(0, ddof=1)] if len(means) > 1 else [""] * len(SCORES)
    shown = zip(means.mean(0), spread)
    return ["" if np.isnan(mean) else f"{form.format(mean)}{more}" for mean, more in shown]


def less(these: dict[int, np.ndarray], those: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The differences of the seeds that both have."""
    return {seed: these[seed] - those[seed] for seed in these if seed in those}


def mean_over(sets: list[dict[int, np.ndarray]]) -> dict[int, np.ndarray]:
    """The means over the sets of the seeds that all have."""
    common = set.intersection(*map(set, sets))
    return {seed: np.mean([values[seed] for values in sets], 0) for seed in sorted(common)}


def markdown(titles: list[str], rows: dict[str, list[str]]) -> str:
    heads = [f"{title}, {score}" for title in titles for score in SCORES]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    return "\n".join([*lines, *(f"| {words} | {' | '.join(found)} |" for words, found in rows.items())])


def tables(sweeps: list[Path]) -> tuple[str, str]:
    """The Markdown tables of the runs that are there: AUROC, and gains over the flow without fusion."""
    found = {row: [aurocs(sweep / row.run, row.before) for sweep in sweeps] for row in ROWS}
    without, names = found[NO_FUSION], [sweep.name for sweep in sweeps]
    first = {row.words: [cell for seeds in sets for cell in cells(seeds)] for row, sets in found.items()}
    second = {}
    for row, sets in found.items():
        gains = [less(these, those) for these, those in zip(sets, without)]
        if row != NO_FUSION:
            shown = [*gains, mean_over(gains)]
            second[row.words] = [cell for seeds in shown for cell in cells(seeds, "{:+.4f}")]
    return markdown(names, first), markdown([*names, "mean"], second)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of sweeps by the preset ablation")
    print(*tables(parser.parse_args().sweeps), sep="\n\n")


if __name__ == "__main__":
    main()
