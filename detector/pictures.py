"""Pictures as a user has them (paths, Pillow images, arrays) -> the features that a detector takes, a few at
a time: memory does not grow with their number."""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import utils
from backbone import backbones, extraction
from backbone.extraction import COMPILED_FROM, Rows
from backbone.identity import cache_identity
from backbone.resizing import Unreadable, stack_rows, to_device_size
from cache.store import EXAMPLE, example_fault
from config import UserError
from detector.checkpoints import Record, config_of
from images import images
from images.tiles import tiles_of
from shell.files import as_strict_json

DECODING_THREADS = 2  # threads that decode pictures ahead of the backbone


def are_several(pictures: Any) -> bool:
    """Whether this is a list, an iterator or an array of pictures rather than one, or than something that is
    none."""
    if isinstance(pictures, np.ndarray):
        return pictures.ndim == 4
    one = (str, bytes, Path, Image.Image, torch.Tensor)
    return isinstance(pictures, Iterable) and not isinstance(pictures, one)


class FittedBackbone:
    """The backbone that a detector was fitted with: pictures -> rows of features. It is loaded at the first
    picture. Several classes of a run share one."""

    def __init__(
        self,
        record: Record,
        checkpoint: Path,
        device: torch.device,
        precision: str | None = None,
        weights: str | Path | None = None,
    ):
        """Of a fitted class. precision: of the backbone, as the knob says it; None: as in the fit. weights:
        the file of a fit with weights_path; None: looked for where it was, and beside the ``checkpoint``."""
        self.features = features = record.features
        self.config = dataclasses.replace(
            config_of(record),
            device=str(device),
            compile=False,
            precision=precision or features["precision"],
            img_size=tuple(features["img_size"]),  # of the fit, where the pictures decided it
        )
        self.scale = images.PixelScale(features.get("pixel_scale", {}))
        self.device, self.checkpoint, self.weights = device, checkpoint, weights and Path(weights)
        self.tiles = (
            self.config.tiles
        )  # pixels of the side of those that pictures are cut into; 0: they are not

    def __getstate__(self) -> dict:
        """Without the loaded backbone: a copy in another process loads its own."""
        return {name: value for name, value in vars(self).items() if name != "job"}

    @functools.cached_property
    def job(self) -> extraction.Extraction:
        """The loaded backbone. Raises UserError when it no longer gives the features of the fit."""
        config = dataclasses.replace(self.config, weights_path=self._weights_path())
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be a table of scores
            identity = cache_identity(config, self.device)
            job = extraction.Extraction(identity, self.device, config.extract_batch, config.workers)
        for field, now in job.fields.items():
            known = self.features.get(field)
            if field not in (EXAMPLE, "precision") and known != as_strict_json(now):
                raise UserError(f"the detector was fitted to features with {field} {known}, now it is {now}")
        if fault := example_fault(self.features.get(EXAMPLE), job.fields[EXAMPLE]):
            raise UserError(f"the detector does not fit: {fault}")
        return job

    def _weights_path(self) -> str | None:
        """The knob weights_path for the weights of the fit, wherever their file is now. Raises UserError when
        that is nowhere, or another one."""
        fitted_with, weights = self.config.weights_path, self.features["weights"]
        if fitted_with in (None, "random"):
            if self.weights:
                raise UserError(f"weights_path: it was fitted with {weights}, no file; leave it out")
            return fitted_with
        there = Path(fitted_with)
        beside = [folder / there.name for folder in self.checkpoint.parents[:2]]
        places = [self.weights] if self.weights else [there, *beside]
        for place in filter(Path.is_file, places):
            if weights == backbones.weights_source(self.config.extractor, str(place), self.config.seed):
                return str(place)
        raise UserError(
            f"weights_path: the detector was fitted with {there.name} ({weights}); expected that very file, "
            f"looked at {', '.join(map(str, places))}; give it: --weights_path FILE"
        )

    def rows(self, pictures: Iterable) -> Iterator[Rows | Unreadable]:
        """The features of pictures in order: of consecutive ones together, float16 on the device (see
        ``Extraction.rows``), or why one cannot be read; with tiles, of all those of one picture. The first
        pictures are computed one batch at a time, by all threads, at once; further ones as extraction does
        it."""
        job, numbered = self.job, iter(enumerate(pictures))
        size = 1 if self.tiles else job.batch
        batches = iter(lambda: list(itertools.islice(numbered, size)), [])
        few = batches if self.tiles else itertools.islice(batches, -(-COMPILED_FROM // size))
        with utils.thread_pool(DECODING_THREADS) as pool:
            for stacks in utils.in_order(pool, self._read, few, DECODING_THREADS):
                for stack in stacks:
                    with torch.inference_mode():
                        yield stack if isinstance(stack, Unreadable) else job.rows(stack)
        if more := next(batches, None):
            job.compile()
            yield from job.computed(self._read, itertools.chain([more], batches))

    def _read(self, batch: list[tuple[int, Any]]) -> list[Tensor | Unreadable]:
        """Numbered pictures, or their tiles, as the device takes them, of one size stacked."""
        levels: list[Tensor | Unreadable] = []
        for number, picture in batch:
            try:
                pixels = images.pixels_of(picture, self.scale)
            except UserError as mistake:
                levels.append(Unreadable(number, str(mistake)))
                continue
            tiles = tiles_of(pixels.shape[:2], self.tiles)
            levels += [to_device_size(tile.of(pixels), self.job.img_size) for tile in tiles]
        return stack_rows(levels)
