"""Simple detectors on semantic tokens: nearest neighbours and a Gaussian. Distances are computed in chunks: memory stays bounded."""

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor
from torch.nn import functional as F

from normalization import power_l2

NEIGHBOURS = 2  # PANDA and DN2 use two
CHUNK = 1024


def nearest_neighbours(reference: Tensor, query: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Mean Euclidean distance to the k nearest rows of reference (n, C), for every row of query (m, C) -> (m)."""
    k = min(k, len(reference))
    return torch.cat([torch.cdist(part, reference).topk(k, largest=False).values.mean(1) for part in query.split(CHUNK)])


def cosine_neighbours(reference: Tensor, query: Tensor) -> np.ndarray:
    """k-nearest-neighbour score with cosine distance (DN2, PANDA: k = 2): (n, C), (m, C) -> (m)."""
    return nearest_neighbours(F.normalize(reference, dim=1), F.normalize(query, dim=1)).cpu().numpy()


def gaussian(reference: Tensor, query: Tensor) -> np.ndarray:
    """Mahalanobis distance to a Gaussian with Ledoit-Wolf shrinkage, fitted to reference: (n, C), (m, C) -> (m)."""
    fitted = LedoitWolf(store_precision=True).fit(reference.double().cpu().numpy())
    return np.concatenate([fitted.mahalanobis(part.double().cpu().numpy()) for part in query.split(CHUNK)])


BASELINES = {  # name in the table -> (detector, what is done to the semantic tokens first)
    "kNN, raw": (cosine_neighbours, lambda tokens: tokens),
    "kNN, power + L2": (cosine_neighbours, power_l2),
    "Gaussian, raw": (gaussian, lambda tokens: tokens),
    "Gaussian, power + L2": (gaussian, power_l2),
}


def baseline_scores(train: Tensor, test: Tensor) -> dict[str, np.ndarray]:
    """Anomaly scores (m) of every baseline: normal training tokens (n, C), test tokens (m, C)."""
    return {name: detector(prepare(train), prepare(test)) for name, (detector, prepare) in BASELINES.items()}
