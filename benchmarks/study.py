"""What fusion, context and training are worth: flows that differ in one thing, on the same features.

python benchmarks/study.py paper --only cifar10 --knobs extractor=vit_tiny_patch16_224 weights_path=FILE
python benchmarks/study.py context --only castings,surfaces,materials,textures --seeds 3

paper: the paper's fusion modules after some epochs. controls: the same where patches, tokens or layers are
others. context: what a place sees of the other places (preset accurate). The sets are those of
benchmarks/suite.toml; the table goes to results/STUDY.md, its figures to STUDY.csv beside it."""

import argparse
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from judging import Row
from suite import ROOT, WHOLE, Set, auroc_cell, made_by, publish, read_suite, why_left_out

import datasets
import extractor
import train
import utils
from config import UserError, make_config
from detector import class_data, evaluation, places
from detector.baselines import simple_scores
from reporting.tables import as_markdown
from shell.command_line import OneLineParser
from shell.signals import KEPT, guarded

HOW = (
    "AUROC, mean over a set's classes (± standard deviation over the seeds). Last column: the difference to "
    "the first row of the same score (and epoch), of the seeds that both have, mean over the classes of all "
    "sets, with its 95 % interval over the classes (Student's t)."
)


# ---------------------------------------------------------------- what differs
Change = Callable[[Tensor, bool], Tensor]  # tokens (B, N, C) that a batch sees, whether it is trained on


def only(*kept: int) -> Change:
    """Of the tokens that a token sees, those numbers; the others are zero."""
    return lambda seen, _: torch.stack([seen[:, i] * (i in kept) for i in range(seen.shape[1])], 1)


def of_normal_images() -> Change:
    """In training the own tokens; in scoring those of images that were trained on last."""
    last: list[Tensor] = []

    def change(seen: Tensor, training: bool) -> Tensor:
        if training:
            last[:] = [seen]
            return seen
        return last[0][torch.arange(len(seen)) % len(last[0])]

    return change


class Variant(NamedTuple):
    """change: what is done to the tokens that a batch sees. near, ring: of detector/places.py."""

    name: str
    knobs: dict = {}
    change: Change | None = None
    near: int = places.NEAR
    ring: int = places.RING


class Study(NamedTuple):
    """knobs: of all variants. scores: which of the detector's. epochs: after which, besides the last; none:
    as the detector is trained without a study."""

    knobs: dict
    scores: tuple[str, ...]
    epochs: tuple[int, ...]
    variants: list[Variant]


HILO, WHITENED = {"fusion": "hilo"}, {"normalize": "power_l2+whiten", "identity_start": True}
ADDITIVE = {"clamp": 1e-6}  # of the log-scales: all of them are zero
STUDIES = {
    "paper": Study(
        {"preset": "paper", "holdout": 0.0, "meta_epochs": 20},
        ("latent", "likelihood"),
        (1, 2, 5, 10),
        [
            Variant("no fusion", {"fusion": "none"}),
            Variant("class attention", {"fusion": "class_attention"}),
            Variant("hilo", HILO),
            Variant("spectral", {"fusion": "spectral"}),
        ],
    ),
    "controls": Study(
        {"preset": "paper", "holdout": 0.0, "meta_epochs": 10},
        ("latent", "likelihood"),
        (1, 2),
        [
            Variant("hilo", HILO),
            Variant("no fusion", {"fusion": "none"}),
            Variant("class attention", {"fusion": "class_attention"}),
            Variant("hilo of the mean patch", HILO, lambda seen, _: seen.mean(1, True).expand_as(seen)),
            Variant("hilo of zeros", HILO, lambda seen, _: torch.zeros_like(seen)),
            Variant("hilo, scored with a normal image's patches", HILO, of_normal_images()),
            Variant(
                "hilo, trained with another image's patches",
                HILO,
                lambda seen, training: seen.roll(1, 0) if training else seen,
            ),
            Variant("hilo, additive", HILO | ADDITIVE),
            Variant("no fusion, additive", {"fusion": "none"} | ADDITIVE),
            Variant("hilo, whitened", HILO | WHITENED),
            Variant("no fusion, whitened", {"fusion": "none"} | WHITENED),
            Variant("class attention, whitened", {"fusion": "class_attention"} | WHITENED),
        ],
    ),
    "context": Study(
        {"preset": "accurate"},
        ("places", WHOLE),
        (),
        [
            Variant("low and high band, position"),
            Variant("Gaussians of the places, no flow", {"least_steps": 1, "lr_init": 0.0}),
            Variant("no condition", {"fusion": "none"}),
            Variant("position", change=only(2)),
            Variant("low band, position", change=only(0, 2)),
            Variant("high band, position", change=only(1, 2)),
            Variant("its own neighbourhood, too", near=-1, ring=1),
            Variant("hilo over the three", HILO),
            Variant("class attention over the three", {"fusion": "class_attention"}),
        ],
    ),
}


def see_otherwise(flow: nn.Module, change: Change) -> None:
    """Have the tokens of a flow see something else from now on."""
    flow.register_forward_pre_hook(
        lambda flow, given: (given[0], [change(each, flow.training) for each in given[1]])
    )


# ---------------------------------------------------------------- a variant, class and seed
def fit(study: str, number: int, of_set: str, knobs: dict, class_name: str, seed: int) -> list[Row]:
    """The rows of a study's variant; with the first one and seed 0 those of the simple detectors, too."""
    torch.set_num_threads(1)
    chosen, device = STUDIES[study], torch.device("cpu")
    variant, baselines = chosen.variants[number], number == 0 and seed == 0
    config = make_config(chosen.knobs | knobs | variant.knobs | {"baselines": baselines, "seed": seed})
    places.NEAR, places.RING = variant.near, variant.ring
    cache = extractor.ensure_features(config, device)
    prepared = train.prepare(config, cache, class_data.token_sources(cache, device), class_name, seed)
    if variant.change:
        see_otherwise(prepared.detector.flow, variant.change)
    (last, _), found = train.count_epochs(prepared), {}
    for epoch, loss in train.train_epochs(prepared) if last else [(0, None)]:
        if epoch in (*chosen.epochs, last):
            scores = evaluation.evaluate(prepared, epoch, loss).test
            name = f"{variant.name}, epoch {epoch}" if chosen.epochs else variant.name
            found |= {f"{name}: {score}": scores[score] for score in chosen.scores if score in scores}
    found |= simple_scores(prepared) if prepared.compares else {}
    labels = prepared.data.labels
    return [Row(name, of_set, class_name, seed, utils.auroc(labels, own)) for name, own in found.items()]


def tasks(study: str, sets: list[Set], more: dict, seeds: int) -> list[tuple]:
    """The arguments of ``fit``; what features are missing is extracted."""
    found = []
    for entry in sets:
        given = entry.given | more
        config = make_config(STUDIES[study].knobs | given)
        labels = extractor.ensure_features(config, torch.device("cpu")).labels
        for seed in range(seeds):
            for number in range(len(STUDIES[study].variants)):
                classes = datasets.choose_classes(labels, config.class_name)
                found += [(study, number, entry.name, given, name, seed) for name in classes]
    return found


# ---------------------------------------------------------------- the table
def make_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    by_class: dict[str, dict[tuple[str, str], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in sorted(rows, key=lambda row: row.seed):
        by_class[row.detector][row.set, row.of_class][row.seed] = row.auroc
    firsts: dict[str, dict] = {}  # of each score and number of epochs
    sets, lines = list(dict.fromkeys(row.set for row in rows)), []
    for detector, classes in by_class.items():
        own = [[[*each.values()] for key, each in classes.items() if key[0] == name] for name in sets]
        of = detector.partition(", epoch " if ", epoch " in detector else ": ")[2]
        first, told = firsts.setdefault(of, classes), ""
        if of and first is not classes:
            both = [(seeds, first[key]) for key, seeds in classes.items() if {*seeds} & {*first.get(key, ())}]
            more = [np.mean([one[seed] - other[seed] for seed in {*one} & {*other}]) for one, other in both]
            told = f"{np.mean(more):+.4f}"
            if len(more) > 1:  # one class has no interval
                told += f" ± {stats.t.ppf(0.975, len(more) - 1) * stats.sem(more):.4f}"
        cells = [auroc_cell(np.mean(values, 0)) if values else "" for values in own]
        lines.append([detector, *cells, told])
    return ["detector", *sets, "- the first"], lines


def main(args: argparse.Namespace) -> None:
    """Raises UserError."""
    settings, sets = read_suite(args.suite, args.only)
    more = {"extractor": settings["extractor"]} | dict(pair.partition("=")[::2] for pair in args.knobs)
    sets = [entry for entry in sets if not why_left_out(entry)]
    jobs = tasks(args.study, sets, more, args.seeds)
    if not jobs:
        raise UserError(f"none of the sets of {args.suite} is there")
    fits = joblib.Parallel(joblib.cpu_count(), verbose=5)(joblib.delayed(fit)(*job) for job in jobs)
    rows = [row for each in fits for row in each]
    name, others = args.name or args.study, [textwrap.fill(HOW, 120), made_by()]
    publish(Path("results") / f"{name}.md", name, as_markdown(*make_table(rows)), others, rows)


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--suite", type=Path, default=ROOT / "benchmarks/suite.toml")
    parser.add_argument("--only", help="sets, separated by commas [all]")
    parser.add_argument("--seeds", type=int, default=1, help="[1]")
    parser.add_argument("--knobs", nargs="*", default=[], metavar="KNOB=VALUE", help="more, for all sets")
    parser.add_argument("--name", help="the table is results/NAME.md [the study's]")
    guarded(main, parser.parse_args(), told=KEPT)
