"""A fitted class as it is used: pictures in; scores, p-values, verdicts and heat maps out."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import utils
from backbone.extraction import Rows
from backbone.resizing import Unreadable
from backbone.token_grid import place_grid_of
from config import UserError
from detector import calibration, heat_map
from detector.checkpoints import Record
from detector.class_data import Features
from detector.detector import Detector, load_detector
from detector.pictures import FittedBackbone, are_several
from images import images
from images.tiles import tiles_of, whole_map

NO_PLACES = "its score reads no places (score joined does, of pictures of one scene)"


@dataclasses.dataclass(eq=False, repr=False)
class PictureDetector:
    """A fitted class as it is used: pictures in; scores, p-values, verdicts and heat maps out.

    A picture is a path, a Pillow image or an array (H, W, 3) or (H, W) of uint8. It can be pickled, for
    joblib, Dask or a pool; each process loads the backbone at its first picture. Start processes by spawn: a
    child forked after a score hangs in torch's threads. Several that share the cores take one thread each:

    with multiprocessing.get_context("spawn").Pool(4, torch.set_num_threads, (1,)) as pool:
        scores = pool.map(detector.score, paths)"""

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

        false_alarms: the share of normal pictures that ``verdict`` may call anomalous; None: the run's knob.
        weights_path: the file that a fit with weights_path took; None: looked for where it was and beside the
        checkpoint. precision: of the backbone, as the knob; None: as in the fit. backbone: of a detector that
        was fitted to the same features. Raises UserError when the checkpoint or the device is not there."""
        there, path = utils.set_up(device, threads), Path(path)
        fitted, record = load_detector(path)
        rate = record.config["false_alarms"] if false_alarms is None else false_alarms
        if not 0 < rate <= 0.5:
            raise UserError(f"false_alarms: expected a share above 0 and up to 0.5, got {rate}")
        backbone = backbone or FittedBackbone(record, path, there, precision, weights_path)
        name, held_out = record.result["class"], record.held_out_scores
        return PictureDetector(fitted.to(there), record, backbone, rate, name, held_out)

    def score(self, picture: Any) -> Any:
        """The anomaly score of a picture (float), or of several (n): higher is more anomalous. Raises
        UserError on one that cannot be read."""
        several = are_several(picture)
        scores: list[np.ndarray] = [np.empty(0)]
        for rows in self.backbone.rows(picture if several else [picture]):
            if isinstance(rows, Unreadable):
                raise UserError(rows.reason)
            scores.append(self.score_rows(rows))
        return np.concatenate(scores) if several else float(scores[-1][0])

    def score_rows(self, rows: Rows) -> np.ndarray:
        """Scores (n) from rows of features, as ``FittedBackbone.rows`` gives them; of the tiles of a picture
        one."""
        scores = self.fitted.score_features(Features.of(rows)).astype(float)
        return scores.max(keepdims=True) if self.backbone.tiles else scores

    def pixels(self, picture: Any) -> np.ndarray:
        """A picture as the detector sees it, (H, W, 3) uint8. Raises UserError where it cannot be read."""
        return images.pixels_of(picture, images.PixelScale(self.backbone.scale.ranges))

    def heat_map(self, picture: Any) -> np.ndarray:
        """How unusual each place of a picture is, (H, W) float32 at its size, in standard deviations beyond
        ``USUAL``, which few places of a normal picture reach. Raises UserError on a picture that cannot be
        read, and where the score reads no places."""
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
        """How many normal pictures score as high or higher, as a share, of a score or an array of them; NaN
        where none were held out (calibration.p_values)."""
        values = calibration.p_values(self.held_out, score)
        return values if np.ndim(score) else float(values)

    @property
    def threshold(self) -> calibration.Threshold:
        """Where ``verdict`` draws the line. Raises UserError where no pictures were held out."""
        return calibration.threshold(self.held_out, self.false_alarms)

    def verdict(self, score: Any) -> Any:
        """ "anomalous" or "normal", of a score or an array of them. Raises UserError where no pictures were
        held out."""
        verdicts = np.where(np.asarray(score) > self.threshold.score, "anomalous", "normal")
        return verdicts if np.ndim(score) else str(verdicts)

    def calibrate(self, good: Any) -> calibration.Threshold:
        """Let p-values and verdicts rest on fresh normal pictures instead -> the new threshold."""
        self.held_out = np.atleast_1d(self.score(good))
        return self.threshold
