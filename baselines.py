"""Simple detectors: nearest neighbours and a Gaussian on semantic tokens, a patch memory and place-wise
Gaussians on place tokens. Distances are computed in chunks: memory stays bounded."""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from torch.nn import functional as F

from model import CHUNK, nearest_neighbours
from normalization import power_l2


def cosine_neighbours(reference: Tensor, query: Tensor) -> np.ndarray:
    """k-nearest-neighbour score with cosine distance (DN2, PANDA: k = 2): (n, C), (m, C) -> (m)."""
    return nearest_neighbours(F.normalize(reference, dim=1), F.normalize(query, dim=1)).cpu().numpy()


OWN_INPUT = "flow's input"  # see Detector.own_input


def gaussian(reference: Tensor, query: Tensor) -> np.ndarray:
    """Squared Mahalanobis distance to a Gaussian with Ledoit-Wolf shrinkage, fitted to reference: (n, C), (m,
    C) -> (m). The covariance is factorised, not inverted: one of thousands of channels takes seconds."""
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
        f"Gaussian, {OWN_INPUT}": gaussian(train, test),
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


# ---------------------------------------------------------------- on place tokens
POOL, MEMORY, REWEIGHTED = 20_000, 1_000, 9  # places drawn from, places kept, neighbours that reweight
CHOSEN, RIDGE = 100, 0.01  # PaDiM's channels for a ResNet-18, and what it adds to its covariances


def greedy_coreset(tokens: Tensor, size: int) -> Tensor:
    """Of tokens (n, E) so many that leave none far away: each next one is the farthest from those chosen
    (n, E) -> (size, E). Distances are taken in 64 random directions (PatchCore, arXiv 2106.08265, algorithm
    1)."""
    directions = torch.randn(tokens.shape[1], 64, generator=torch.Generator().manual_seed(0))
    shadows = tokens @ directions
    chosen, nearest = [0], (shadows - shadows[0]).square().sum(1)
    while len(chosen) < min(size, len(tokens)):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (shadows - shadows[chosen[-1]]).square().sum(1))
    return tokens[chosen]


def patch_memory(reference: Tensor) -> Callable[[Tensor], Tensor]:
    """A detector like PatchCore (arXiv 2106.08265, equations 6 and 7) fitted to place tokens (n, P, E): the
    largest distance of a place to a memory of normal ones, less where that memory is sparse. It maps (m, P,
    E) -> (m)."""
    flat = reference.flatten(0, 1)
    drawn = np.random.RandomState(0).permutation(len(flat))[:POOL]
    memory = greedy_coreset(flat[torch.from_numpy(drawn)], MEMORY)

    def score(places: Tensor) -> Tensor:
        distances = torch.cdist(places.flatten(0, 1), memory)
        nearest, owner = distances.min(1)
        farthest, place = nearest.view(places.shape[:2]).max(1)
        rows = torch.arange(len(places))
        around = torch.cdist(memory[owner.view(places.shape[:2])[rows, place]], memory)
        neighbours = around.topk(min(REWEIGHTED, len(memory)), largest=False).indices
        among = torch.cdist(places[rows, place].unsqueeze(1), memory[neighbours]).squeeze(1)
        return (1 - torch.softmax(among, 1)[:, 0]) * farthest

    return score


def place_gaussians(reference: Tensor) -> Callable[[Tensor], Tensor]:
    """A detector like PaDiM (arXiv 2011.08785) fitted to place tokens (n, P, E): a Gaussian for every place
    over some random channels, and an image's largest Mahalanobis distance. It maps (m, P, E) -> (m)."""
    kept = np.random.RandomState(0).permutation(reference.shape[2])[:CHOSEN]
    chosen = torch.from_numpy(np.sort(kept))
    tokens = reference[..., chosen].transpose(0, 1)  # (P, n, E')
    mean = tokens.mean(1, keepdim=True)
    covariance = (tokens - mean).transpose(1, 2) @ (tokens - mean) / max(tokens.shape[1] - 1, 1)
    factor = torch.linalg.cholesky(covariance + RIDGE * torch.eye(len(chosen)))

    def score(places: Tensor) -> Tensor:
        away = places[..., chosen].transpose(0, 1) - mean
        solved = torch.linalg.solve_triangular(factor, away.transpose(1, 2), upper=False)
        return solved.square().sum(1).sqrt().amax(0)

    return score


PLACE_BASELINES = {"PatchCore-like, places": patch_memory, "PaDiM-like, places": place_gaussians}
