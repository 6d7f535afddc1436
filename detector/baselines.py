"""Simple detectors, beside which the flow is reported: nearest neighbours and a Gaussian on the semantic
token and on the flow's own input, a patch memory and place-wise Gaussians on place tokens."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from detector.image_density import Gaussian
from detector.normalization import power_l2
from model import nearest_neighbours, squared_distances

CHUNK = 1024  # rows whose distances to all others are held at once


def neighbours(reference: Tensor, query: Tensor) -> np.ndarray:
    """Mean Euclidean distance to the two nearest rows of reference (PANDA and DN2 use two): (n, C), (m, C) ->
    (m)."""
    parts = [nearest_neighbours(squared_distances(rows, reference)) for rows in query.split(CHUNK)]
    return torch.cat(parts).cpu().numpy()


def cosine_neighbours(reference: Tensor, query: Tensor) -> np.ndarray:
    """The same with cosine distance, as DN2 and PANDA take it: (n, C), (m, C) -> (m)."""
    return neighbours(F.normalize(reference, dim=1), F.normalize(query, dim=1))


def gaussian(reference: Tensor, query: Tensor) -> np.ndarray:
    """Squared Mahalanobis distance to a Gaussian with Ledoit-Wolf shrinkage, fitted to reference: (n, C), (m,
    C) -> (m)."""
    n, channels = reference.shape
    density = Gaussian(channels, min(n - 1, channels))
    density.fit(reference)
    return torch.cat([density(rows) for rows in query.split(CHUNK)]).cpu().numpy()


SEMANTIC = {  # name in the table -> (detector, what is done to the semantic tokens first)
    "kNN, raw": (cosine_neighbours, torch.Tensor.float),
    "kNN, power + L2": (cosine_neighbours, power_l2),
    "Gaussian, raw": (gaussian, torch.Tensor.float),
    "Gaussian, power + L2": (gaussian, power_l2),
}


def semantic_scores(train: Tensor, test: Tensor) -> dict[str, np.ndarray]:
    """Scores (m) of the detectors on semantic tokens: normal training tokens (n, C), test tokens (m, C)."""
    return {name: detector(prepare(train), prepare(test)) for name, (detector, prepare) in SEMANTIC.items()}


# ---------------------------------------------------------------- on place tokens
POOL, MEMORY, REWEIGHTED = 20_000, 1_000, 9  # places drawn from, places kept, neighbours that reweight
CHOSEN, RIDGE = 100, 0.01  # PaDiM's channels for a ResNet-18, and what it adds to its covariances
LEAST_RIDGE = 1e-5  # of the mean variance: what float32 needs to factorise them


def greedy_coreset(tokens: Tensor, size: int) -> Tensor:
    """A greedy coreset of tokens, (n, E) -> (size, E): each next one is the farthest from those chosen.
    Distances are taken in 64 random directions (PatchCore, arXiv 2106.08265, algorithm 1)."""
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
    ridge = max(RIDGE, LEAST_RIDGE * float(covariance.diagonal(dim1=1, dim2=2).mean()))
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(chosen)))

    def score(places: Tensor) -> Tensor:
        away = places[..., chosen].transpose(0, 1) - mean
        solved = torch.linalg.solve_triangular(factor, away.transpose(1, 2), upper=False)
        return solved.square().sum(1).sqrt().amax(0)

    return score


PLACES = {"PatchCore-like, places": patch_memory, "PaDiM-like, places": place_gaussians}
