"""The cached tokens of one normal class: where they are read, and which of its images are for what."""

import dataclasses
import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import datasets
from cache import feature_cache
from config import OWN_PICTURES, ClassError, Config, held_share
from detector import calibration

EVAL_BATCH = {"cpu": 100, "cuda": 500}  # images per forward pass in evaluation: a CPU's caches hold these
LEFT_FREE = 0.2  # share of a GPU's memory that tokens leave to training


class Features(NamedTuple):
    """What is cached of some images, float32: semantic (n, C), patches (n, N, C) and, where kept, bands (n,
    D) and places (n, P, E)."""

    semantic: Tensor
    patches: Tensor
    bands: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def of(cls, rows: dict[str, Tensor]) -> "Features":
        """From cached rows, float16: tokens (n, 1 + N, C) and, where kept, bands and places."""
        tokens = rows["tokens"]
        kept = {name: rows[name].float() for name in ("bands", "places") if name in rows}
        return cls(tokens[:, 0].float(), tokens[:, 1:].float(), **kept)  # without gaps: products are quicker


class TokenSource:
    """Rows of a cached split by index: read out of the mapped files, or out of the device's memory where they
    fit there."""

    def __init__(self, arrays: dict[str, feature_cache.CachedArray], device: torch.device):
        self.device, self.arrays = device, arrays
        self.resident: dict[str, Tensor] = {}
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            if 2 * sum(math.prod(array.shape) for array in arrays.values()) <= free - LEFT_FREE * total:
                self.make_resident()

    def make_resident(self) -> None:
        """Copy every array to the device's memory, to be read there from now on."""
        for name, array in self.arrays.items():
            self.resident[name] = torch.empty(array.shape, dtype=torch.float16, device=self.device)
            for start in range(0, len(array), 1024):
                rows = slice(start, start + 1024)
                self.resident[name][rows] = torch.from_numpy(array[rows])

    def on_cpu(self) -> "TokenSource":
        """The same rows, read to the CPU."""
        return TokenSource(self.arrays, torch.device("cpu"))

    def _rows(self, name: str, index: np.ndarray) -> Tensor:
        """The rows ``index`` of an array, float16."""
        if name in self.resident:
            return self.resident[name].index_select(0, torch.from_numpy(index).to(self.device))
        return torch.from_numpy(self.arrays[name][index]).to(self.device)

    def __getitem__(self, index: np.ndarray) -> Features:
        """The features of the images ``index``, on the device, but for the places: few classes need them."""
        return Features.of({name: self._rows(name, index) for name in self.arrays if name != "places"})

    def one(self, name: str, index: np.ndarray) -> Tensor:
        """One array of the images ``index``, float32, on the device, without reading the rest."""
        return self._rows(name, index).float()

    @functools.cached_property
    def semantic(self) -> Tensor:
        """The semantic tokens (n, C) of all images, float16, on the CPU."""
        return torch.from_numpy(self.arrays["tokens"].semantic())


def token_sources(cache: feature_cache.FeatureCache, device: torch.device) -> list[TokenSource]:
    """Of both splits."""
    return [TokenSource(cache.arrays(split), device) for split in datasets.SPLITS]


def in_batches(index: np.ndarray, size: int) -> list:
    """Row numbers cut into consecutive batches, ``size`` long but the last; of none, one empty batch."""
    return [index[i : i + size] for i in range(0, max(1, len(index)), size)]


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]


FEWEST = 3  # images that a flow can be fitted to: two have one direction and no spread around it


@dataclasses.dataclass(frozen=True)
class ClassData:
    """One one-class problem: where its tokens are and which rows are for what."""

    class_name: str
    train: TokenSource
    test: TokenSource
    fit_rows: np.ndarray  # normal training images that the flow is fitted to
    held_rows: np.ndarray  # normal training images held out for likelihood
    test_rows: np.ndarray
    labels: np.ndarray  # of test_rows: 0 normal, 1 anomalous
    held_pictures: np.ndarray  # of held_rows: the picture that each is a tile or a copy of

    @property
    def parts(self) -> dict[str, tuple[TokenSource, np.ndarray]]:
        """By part, where its images are read, and their rows there."""
        rows = {"fit": self.fit_rows, "held": self.held_rows, "test": self.test_rows}
        return {part: (self.test if part == "test" else self.train, rows[part]) for part in rows}


def class_data(
    config: Config, labels: datasets.Labels, class_name: str, seed: int, train: TokenSource, test: TokenSource
) -> ClassData:
    """The rows of a class; there may be no test images. Raises ClassError on too few, and on features that
    are all the same.

    Held out are those that the data set itself does, where there are such; else a share at random, of one's
    own pictures as many as the false-alarm rate needs, up to a fifth: all tiles of a picture, and all its
    copies, whose tokens are the same."""
    train_rows, test_rows, test_labels = labels.one_class(class_name)
    tokens = train.semantic[train_rows].numpy()
    if len(tokens) > 1 and (tokens == tokens[0]).all():
        raise ClassError(
            f"class {class_name}: the cached features of its training images are all the same; so are its "
            "images, or the cache is damaged"
        )
    names = [labels.train.names[row] for row in train_rows]
    names = [datasets.picture_of(name) for name in names] if config.tiles else names
    content: dict[str, bytes] = {}
    for name, token in zip(names, tokens):
        content[name] = hashlib.sha256(content.get(name, b"") + token.tobytes()).digest()
    first: dict[bytes, int] = {}  # row of each picture
    pictures = np.array([first.setdefault(content[name], row) for name, row in zip(names, train_rows)])
    shuffled = np.random.RandomState(seed).permutation(np.unique(pictures))
    n_held = math.ceil(held_share(config.holdout, config.dataset) * len(shuffled))
    if config.dataset in OWN_PICTURES and n_held:
        n_held = max(n_held, min(calibration.needed(config.false_alarms), len(shuffled) // 5))
    held = labels.train.held[train_rows]
    if not held.any():
        held = np.isin(pictures, shuffled[:n_held])
    fit_rows, held_rows = train_rows[~held], train_rows[held]
    if len(fit_rows) < FEWEST or not (len(test_rows) or len(held_rows)):
        counts = f"{len(fit_rows)} training, {len(held_rows)} held-out and {len(test_rows)} test images"
        expected = f"expected at least {FEWEST} to train on and one of the others"
        raise ClassError(f"class {class_name}: {counts}; {expected}: give more normal ones, or --holdout 0.1")
    return ClassData(class_name, train, test, fit_rows, held_rows, test_rows, test_labels, pictures[held])
