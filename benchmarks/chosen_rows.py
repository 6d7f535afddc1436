"""What curves.py and false_alarms.py share: a set of the suite with its features in reach, and detectors that
are fitted to chosen pictures of its training and test split alike."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from suite import asked, made_by, read_suite, why_left_out  # noqa: E402

import config as knobs  # noqa: E402
import extractor  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from cache.feature_cache import CachedArray, FeatureCache  # noqa: E402
from datasets import OTHER, SPLITS, Labels, Split, choose_classes  # noqa: E402
from detector.checkpoints import Fitted  # noqa: E402
from detector.class_data import TokenSource, class_data  # noqa: E402
from detector.preparation import prepare_data  # noqa: E402
from shell.values import parse_values  # noqa: E402


class Joined:
    """A cached array of both splits as one (n_train + n_test, ...), the training rows first."""

    def __init__(self, first: CachedArray, second: CachedArray):
        self.first, self.second = first, second
        self.shape = (len(first) + len(second), *first.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """The rows ``index`` (m), copied."""
        later = index >= len(self.first)
        rows = np.empty((len(index), *self.shape[1:]), np.float16)
        rows[~later] = self.first[index[~later]]
        rows[later] = self.second[index[later] - len(self.first)]
        return rows

    def semantic(self) -> np.ndarray:
        """Of tokens: the semantic ones (n, C)."""
        return np.concatenate([self.first.semantic(), self.second.semantic()])


class Pictures:
    """The pictures of a set by their rows: those of the test split are counted after the training split's."""

    def __init__(self, name: str, config: knobs.Config, cache: FeatureCache):
        self.name, self.config, self.cache = name, config, cache
        parts = [cache.arrays(split) for split in SPLITS]
        arrays = {array: Joined(*(part[array] for part in parts)) for array in parts[0]}
        device = utils.set_up(config.device, config.threads)
        self.source = TokenSource(arrays, device)  # type: ignore[arg-type]
        self.classes = choose_classes(cache.labels, config.class_name)

    def of_class(self, class_name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the good training pictures, of the good test pictures and of the anomalous ones."""
        good, test, anomalous = self.cache.labels.one_class(class_name)
        test = test + len(self.cache.labels.train.names)
        return good, test[anomalous == 0], test[anomalous == 1]

    def fit(
        self,
        class_name: str,
        seed: int,
        training: np.ndarray,
        normal: np.ndarray,
        anomalous: np.ndarray,
        held: np.ndarray | None = None,
    ) -> Fitted:
        """A detector fitted to the rows ``training`` and tested on the rows of normal and anomalous pictures.
        held: the rows held out; None: a share of ``training``, by train.py's rule. Raises ClassError."""
        names = [str(row) for row in range(self.source.arrays["tokens"].shape[0])]
        chosen, tested, defect = np.full(len(names), OTHER), np.full(len(names), OTHER), np.zeros(len(names))
        chosen[training], tested[normal], tested[anomalous], defect[anomalous] = 0, 0, 0, 1
        splits = Split.of(names, chosen), Split.of(names, tested, defect)
        labels = Labels((class_name,), *splits, per_category=True)
        config = dataclasses.replace(self.config, seed=seed)
        data = class_data(config, labels, class_name, seed, self.source, self.source)
        if held is not None:
            data = dataclasses.replace(data, fit_rows=training, held_rows=held)
        return train.Trainer(prepare_data(config, data, self.cache.meta, seed, self.source.device)).run()


class Kept:
    """Figures that were measured already, a line each in a file, so that a long measurement may be done in
    parts. They are used again by the same code on the same features with the same settings."""

    def __init__(self, path: Path):
        self.path, self.commit = path, utils.commit()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.found = dict(map(json.loads, lines))

    def get(self, pictures: Pictures, what: tuple, compute: Callable[[], list]) -> list:
        """The figures (a JSON list) of ``what`` in a set: as they were kept, or computed now."""
        knobs_of = sorted(dataclasses.asdict(pictures.config).items())
        key = repr((self.commit, pictures.cache.meta["content"], knobs_of, what))
        if key not in self.found:
            self.found[key] = compute()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.found[key]]) + "\n")
        return self.found[key]


def sets_of(args: argparse.Namespace, **more) -> Iterator[Pictures]:
    """The sets that the command line asks for, one after the other; one that is not there is left out with a
    line. more: knobs that win over the suite's, not over the command line's. Raises UserError."""
    settings, sets = read_suite(args.suite, args.only)
    more = {"device": "cpu", **more, **parse_values(asked(args))}
    for entry in sets:
        if left_out := why_left_out(entry):
            print(left_out, flush=True)
            continue
        config = knobs.make_config({**settings, **entry.given, **more})
        print(f"== {entry.name}", flush=True)
        cache = extractor.ensure_features(config, utils.set_up(config.device, config.threads))
        yield Pictures(entry.name, config, cache)


def about(script: str, sets: list[Pictures]) -> str:
    """How a table came about. Raises UserError where there is no set."""
    if not sets:
        raise knobs.UserError("none of the sets is there")
    config = sets[0].config
    settings = {"preset": config.preset, "extractor": config.extractor}
    precisions = [str(pictures.cache.meta.get("precision")) for pictures in sets]
    return made_by(script, settings, precisions, f"{config.threads or 'all'} threads")


def command_line(doc: str, name: str) -> argparse.ArgumentParser:
    """What both scripts are given alike. name: of the study, whose table and kept figures bear it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path, help="the list of sets, as benchmarks/suite.toml")
    out, kept = Path(f"results/{name}.md"), Path(f"runs/{name}.jsonl")
    parser.add_argument("--out", type=Path, default=out, help="where the table goes [%(default)s]")
    parser.add_argument("--kept", type=Path, default=kept, help="figures already measured [%(default)s]")
    return parser
