"""Simple detectors on semantic tokens: nearest neighbours and a Gaussian. Distances are computed in chunks:
memory stays bounded."""

import numpy as np
import torch
from sklearn.covariance import LedoitWolf, ledoit_wolf
from torch import Tensor
from torch.nn import functional as F

from model import CHUNK, nearest_neighbours
from normalization import power_l2


def cosine_neighbours(reference: Tensor, query: Tensor) -> np.ndarray:
    """k-nearest-neighbour score with cosine distance (DN2, PANDA: k = 2): (n, C), (m, C) -> (m)."""
    return nearest_neighbours(F.normalize(reference, dim=1), F.normalize(query, dim=1)).cpu().numpy()


def gaussian(reference: Tensor, query: Tensor) -> np.ndarray:
    """Mahalanobis distance to a Gaussian with Ledoit-Wolf shrinkage, fitted to reference: (n, C), (m, C) ->
    (m)."""
    fitted = LedoitWolf(store_precision=True).fit(reference.double().cpu().numpy())
    return np.concatenate([fitted.mahalanobis(rows.double().cpu().numpy()) for rows in query.split(CHUNK)])


OWN_INPUT = (
    "flow's input"  # the normalised tokens of the detector, each flow's scaled by the root of its weight
)


def gaussian_distance(reference: Tensor, query: Tensor) -> np.ndarray:
    """``gaussian`` without the inverse of a covariance of thousands of channels: (n, C), (m, C) -> (m)."""
    mean = reference.mean(0)
    covariance, _ = ledoit_wolf(reference.double().cpu().numpy())
    factor = torch.linalg.cholesky(torch.from_numpy(covariance)).float()
    solved = [
        torch.linalg.solve_triangular(factor, (rows - mean).T.cpu(), upper=False)
        for rows in query.split(CHUNK)
    ]
    return torch.cat([part.square().sum(0) for part in solved]).numpy()


def own_input_scores(train: Tensor, test: Tensor) -> dict[str, np.ndarray]:
    """Nearest neighbours and Gaussian on the detector's own input: train (n, C), test (m, C) -> scores
    (m)."""
    return {
        f"kNN, {OWN_INPUT}": nearest_neighbours(train, test).cpu().numpy(),
        f"Gaussian, {OWN_INPUT}": gaussian_distance(train, test),
    }


def _raw(tokens: Tensor) -> Tensor:
    return tokens


BASELINES = {  # name in the table -> (detector, what is done to the semantic tokens first)
    "kNN, raw": (cosine_neighbours, _raw),
    "kNN, power + L2": (cosine_neighbours, power_l2),
    "Gaussian, raw": (gaussian, _raw),
    "Gaussian, power + L2": (gaussian, power_l2),
}


def baseline_scores(train: Tensor, test: Tensor) -> dict[str, np.ndarray]:
    """Anomaly scores (m) of every baseline: normal training tokens (n, C), test tokens (m, C)."""
    return {name: detector(prepare(train), prepare(test)) for name, (detector, prepare) in BASELINES.items()}
