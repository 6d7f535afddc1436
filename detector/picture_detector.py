"""A fitted class as it is used: pictures in, a few at a time; scores, p-values, verdicts, heat maps out."""

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
from torch import Tensor

import utils
from backbone import extraction
from backbone.extraction import COMPILED_FROM, Rows
from backbone.identity import cache_identity
from backbone.resizing import Unreadable, read_levels
from backbone.token_grid import place_grid_of
from cache.store import EXAMPLE, example_fault
from config import Config, UserError
from detector import calibration, heat_map
from detector.checkpoints import Record, config_of
from detector.class_data import Features
from detector.detector import Detector, load_detector
from images import images
from images.images import tiles_of, whole_map
from shell.files import as_strict_json

DECODING_THREADS = 2  # threads that decode pictures ahead of the backbone
NO_PLACES = "its score reads no places (score joined does, of pictures of one scene)"


class FittedBackbone:
    """The backbone that a detector was fitted with: pictures -> rows of features. It is loaded at the first
    picture; the classes of a run share one."""

    def __init__(self, features: dict, config: Config):
        """features: the sidecar of those that a class was fitted to. config: of that fit, with device,
        precision and weights_path as they are now."""
        self.features, self.config = features, config
        self.scale = images.PixelScale(features.get("pixel_scale", {}))
        self.tiles = config.tiles  # pixels of a side that pictures are cut into; 0: they are whole

    def __getstate__(self) -> dict:
        """Without the loaded backbone: a copy in another process loads its own."""
        return {name: value for name, value in vars(self).items() if name != "job"}

    @functools.cached_property
    def job(self) -> extraction.Extraction:
        """The loaded backbone. Raises UserError when it no longer gives the features of the fit."""
        config, device = self.config, torch.device(self.config.device)
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be a table of scores
            identity = cache_identity(config, device)
            job = extraction.Extraction(identity, device, config.extract_batch, config.workers)
        for field, now in job.fields.items():
            known = self.features.get(field)
            if field not in (EXAMPLE, "precision") and known != as_strict_json(now):
                raise UserError(f"the detector was fitted to features with {field} {known}, now it is {now}")
        if fault := example_fault(self.features.get(EXAMPLE), job.fields[EXAMPLE]):
            raise UserError(f"the detector does not fit: {fault}")
        return job

    def rows(self, pictures: Iterable) -> Iterator[Rows | Unreadable]:
        """The features of pictures in order, of consecutive ones together, as ``Extraction.rows`` gives them,
        or why one cannot be read; with tiles, of all those of one picture. The first pictures are computed
        one batch at a time, by all threads, at once; further ones as extraction does it."""
        job, waiting = self.job, iter(pictures)
        size = 1 if self.tiles else job.batch
        batches = iter(lambda: list(itertools.islice(waiting, size)), [])
        few = batches if self.tiles else itertools.islice(batches, -(-COMPILED_FROM // size))
        with utils.Threads(DECODING_THREADS) as pool:
            for stacks in utils.in_order(pool, self._read, few, DECODING_THREADS):
                for stack in stacks:
                    yield stack if isinstance(stack, Unreadable) else job.rows(stack)
        if more := next(batches, None):
            job.compile()
            yield from job.computed(self._read, itertools.chain([more], batches))

    def _read(self, batch: list) -> list[Tensor | Unreadable]:
        """Pictures, or their tiles, as the device takes them, of one size stacked."""

        def pixels_of(picture: Any) -> list[np.ndarray]:
            pixels = images.pixels_of(picture, self.scale)
            return [tile.of(pixels) for tile in tiles_of(pixels.shape[:2], self.tiles)]

        return read_levels(batch, pixels_of, self.job.img_size)


@dataclasses.dataclass(eq=False, repr=False)
class PictureDetector:
    """A fitted class as it is used: pictures in; scores, p-values, verdicts and heat maps out.

    A picture is a path, a Pillow image or an array (H, W, 3) or (H, W) of uint8. It can be pickled; each
    process loads the backbone at its first picture (docs/verdicts.md)."""

    fitted: Detector
    record: Record
    backbone: FittedBackbone
    false_alarms: float
    class_name: str
    held_out: np.ndarray  # scores of normal pictures, which p-values and verdicts rest on; may be empty

    @staticmethod
    def load(
        path: str | Path,
        device: str = "auto",
        threads: int = 0,
        false_alarms: float | None = None,
        weights_path: str | Path | None = None,
        precision: str | None = None,
        backbone: FittedBackbone | None = None,
    ) -> "PictureDetector":
        """A fitted class, from its checkpoint: ``PictureDetector.load(path).score(picture)``.

        false_alarms: the share of normal pictures that ``verdict`` may call anomalous. weights_path: where
        the file of a fit with weights_path is now. precision: of the backbone. All three are knobs; None: as
        in the fit. backbone: of a detector that was fitted to the same features. Raises UserError when the
        checkpoint or the device is not there."""
        there = utils.set_up(device, threads)
        fitted, record = load_detector(path)
        config, features = config_of(record), record.features
        config = dataclasses.replace(
            config,
            device=str(there),
            precision=precision or features["precision"],
            img_size=tuple(features["img_size"]),  # of the fit, where the pictures decided it
            weights_path=str(weights_path) if weights_path else config.weights_path,
            false_alarms=config.false_alarms if false_alarms is None else false_alarms,
        )
        backbone = backbone or FittedBackbone(features, config)
        name, held_out = record.result["class"], record.held_out_scores
        return PictureDetector(fitted.to(there), record, backbone, config.false_alarms, name, held_out)

    def score(self, picture: Any) -> Any:
        """The anomaly score of a picture (float), or of several (n): higher is more anomalous. Raises
        UserError on one that cannot be read."""
        one = isinstance(picture, str | bytes) or not isinstance(picture, Iterable)
        several = not one and getattr(picture, "ndim", 4) == 4  # of an array's dimensions
        scores: list[np.ndarray] = [np.empty(0)]
        for rows in self.backbone.rows(picture if several else [picture]):
            if isinstance(rows, Unreadable):
                raise UserError(rows.reason)
            scores.append(self.score_rows(rows))
        return np.concatenate(scores) if several else float(scores[-1][0])

    def score_rows(self, rows: Rows) -> np.ndarray:
        """Scores (n) from rows of features (``FittedBackbone.rows``); of the tiles of a picture one."""
        scores = self.fitted.score_features(Features.of(rows)).astype(float)
        return scores.max(keepdims=True) if self.backbone.tiles else scores

    def pixels(self, picture: Any) -> np.ndarray:
        """A picture as the detector sees it, (H, W, 3) uint8. Raises UserError where it cannot be read."""
        return images.pixels_of(picture, self.backbone.scale)

    def heat_map(self, picture: Any) -> np.ndarray:
        """How unusual each place of a picture is, (H, W) float32 at its size, in standard deviations beyond
        ``USUAL``. Raises UserError on a picture that cannot be read, and where the score reads no places."""
        pixels = self.pixels(picture)
        if not self.fitted.uses_places:
            raise UserError(f"no heat maps by {self.class_name}: {NO_PLACES}")
        (rows,) = self.backbone.rows([pixels])
        assert not isinstance(rows, Unreadable), "pixels can be read"
        values, grid = self.fitted.place_map(Features.of(rows).places), place_grid_of(self.backbone.features)
        tiles = tiles_of(pixels.shape[:2], self.backbone.tiles)
        maps = [heat_map.of_places(each, grid, (t.height, t.width)) for each, t in zip(values, tiles)]
        return whole_map(maps, tiles, pixels.shape[:2])

    def p_value(self, score: Any) -> Any:
        """The share of normal pictures at least as unusual, of a score or an array (calibration.p_values)."""
        values = calibration.p_values(self.held_out, score)
        return values if np.ndim(score) else float(values)

    @property
    def threshold(self) -> calibration.Threshold:
        """Where ``verdict`` draws the line. Raises UserError where no pictures were held out."""
        return calibration.threshold(self.held_out, self.false_alarms)

    def verdict(self, score: Any) -> Any:
        """ "anomalous" or "normal", of a score or an array. Raises UserError where none were held out."""
        verdicts = np.where(np.asarray(score) > self.threshold.score, "anomalous", "normal")
        return verdicts if np.ndim(score) else str(verdicts)

    def calibrate(self, good: Any) -> calibration.Threshold:
        """Let p-values and verdicts rest on fresh normal pictures instead -> the new threshold."""
        held_out = np.atleast_1d(self.score(good))
        threshold = calibration.threshold(held_out, self.false_alarms)  # of none there is no threshold
        self.held_out = held_out
        return threshold
