"""Pictures as a user has them (paths, Pillow images, arrays) -> the features that a detector takes, a few at
a time: memory does not grow with their number."""

import contextlib
import dataclasses
import functools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import datasets
import extractor
import images
import utils
from config import Config, UserError
from extractor import Rows, Unreadable

READERS = 2  # threads that decode pictures ahead of the backbone


def pixels_of(picture: Any) -> np.ndarray:
    """A path, a Pillow image or an array, (H, W, 3) or (H, W) uint8 -> (H, W, 3) uint8. Raises UserError on
    anything else, and on a file that cannot be read."""
    if isinstance(picture, (str, Path)):
        return images.read_image(Path(picture))
    if isinstance(picture, Image.Image):
        return np.asarray(images.to_rgb(picture))
    array = np.asarray(picture)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, 2)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise UserError(
            f"expected a path, a Pillow image or an array (H, W, 3) or (H, W) of uint8, got "
            f"{type(picture).__name__} {array.dtype} {array.shape}"
        )
    return array


def are_several(pictures: Any) -> bool:
    """Whether this is a list or iterator of pictures, or an array of them, rather than one."""
    if isinstance(pictures, np.ndarray):
        return pictures.ndim == 4
    return not isinstance(pictures, (str, Path, Image.Image))


class Eye:
    """The backbone that a detector was fitted with: pictures -> rows of features. It is loaded at the first
    picture. Several classes of a run share one."""

    def __init__(self, config: Config, features: dict, device: torch.device, precision: str | None = None):
        """features: the sidecar of the features that the detector was fitted to. precision: of the backbone,
        as the knob says it; None: as in the fit."""
        self.config = dataclasses.replace(
            config,
            device=str(device),
            compile=False,
            precision=precision or config.precision,
            img_size=tuple(features["img_size"]),  # of the fit, where the pictures decided it
        )
        self.features, self.device = features, device
        self.unchecked = {"dataset", "validate"} | ({"precision"} if precision else set())

    @functools.cached_property
    def job(self) -> extractor.Extraction:
        """The loaded backbone. Raises UserError when it no longer gives the features of the fit."""
        identity = extractor.cache_identity(self.config)
        self._check({k: v for k, v in identity.fields.items() if k not in self.unchecked})
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be a table of scores
            job = extractor.Extraction(self.config, datasets.unlabelled([]), identity, self.device)
        self._check({"weights_sha256": job.fields["weights_sha256"]})
        return job

    def _check(self, fields: dict) -> None:
        for field, now in fields.items():
            fitted_to = self.features.get(field)
            if fitted_to != utils.as_strict_json(now):
                raise UserError(
                    f"the detector was fitted to features with {field} {fitted_to}, now it is {now}"
                )

    def rows(self, pictures: Iterable) -> Iterator[Rows | Unreadable]:
        """The features of pictures in order: of consecutive ones together, float16 on the device (see
        ``Extraction.rows``), or why one cannot be read."""
        batch: list = []
        for picture in self._read(pictures):
            batch.append(picture)
            if len(batch) == self.job.batch:
                yield from self._rows(batch)
                batch = []
        yield from self._rows(batch)

    def _rows(self, batch: list) -> Iterator[Rows | Unreadable]:
        for stack in extractor.stack_rows(batch):
            if isinstance(stack, Unreadable):
                yield stack
            else:
                with torch.inference_mode():
                    yield self.job.rows(stack)

    def _read(self, pictures: Iterable) -> Iterator[Tensor | Unreadable]:
        """The pictures as the device takes them, in order, read a little ahead."""
        ahead, pending = READERS * self.job.batch, deque()  # type: ignore[var-annotated]
        pool = ThreadPoolExecutor(READERS)
        try:
            for number, picture in enumerate(pictures):
                pending.append(pool.submit(self._read_one, number, picture))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # Ctrl-C does not wait for what is not begun
            pool.shutdown(cancel_futures=True)

    def _read_one(self, number: int, picture: Any) -> Tensor | Unreadable:
        try:
            return extractor.to_device_size(pixels_of(picture), self.job.img_size)
        except UserError as mistake:
            return Unreadable(number, str(mistake))
