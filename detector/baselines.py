"""Simple detectors, beside which the flow is reported: nearest neighbours and a Gaussian on the semantic
token and on the flow's own input, a patch memory and place-wise Gaussians on place tokens."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from detector.class_data import evenly, in_batches
from detector.detector import PlaceFlow
from detector.image_density import Gaussian
from detector.normalization import power_l2
from detector.preparation import PLACE_BATCH, PLACE_SAMPLE, PreparedClass

CHUNK = 1024  # rows whose distances to all others are held at once


def neighbours(reference: Tensor, query: Tensor) -> np.ndarray:
    """Mean Euclidean distance to the two nearest rows of reference (PANDA and DN2 use two): (n, C), (m, C) ->
    (m)."""
    k = min(2, len(reference))
    nearest = [torch.cdist(rows, reference).topk(k, largest=False).values for rows in query.split(CHUNK)]
    return torch.cat(nearest).mean(1).numpy()


def gaussian(reference: Tensor, query: Tensor) -> np.ndarray:
    """Squared Mahalanobis distance to a Gaussian with Ledoit-Wolf shrinkage, fitted to reference: (n, C), (m,
    C) -> (m)."""
    n, channels = reference.shape
    density = Gaussian(channels, min(n - 1, channels))
    density.fit(reference)
    return torch.cat([density(rows) for rows in query.split(CHUNK)]).numpy()


SEMANTIC = {  # name in the table -> (detector, what is done to the semantic tokens first)
    "kNN, raw": (neighbours, F.normalize),  # by cosine distance, as of DN2 and PANDA
    "kNN, power + L2": (neighbours, lambda tokens: F.normalize(power_l2(tokens))),
    "Gaussian, raw": (gaussian, torch.Tensor.float),
    "Gaussian, power + L2": (gaussian, power_l2),
}


# ---------------------------------------------------------------- on place tokens
SHARE, DIRECTIONS = 0.1, 64  # of all places, kept in the memory; random directions they are chosen in
REWEIGHTED = 9  # PatchCore's neighbours that reweight
CHOSEN, RIDGE = 100, 0.01  # PaDiM's channels for a ResNet-18, and what it adds to its covariances
LEAST_RIDGE = 1e-5  # of the mean variance: what float32 needs to factorise them


def greedy_coreset(tokens: Tensor, size: int) -> Tensor:
    """A greedy coreset of tokens, (n, E) -> (size, E): each next one is the farthest from those chosen.
    Distances are taken in random directions (PatchCore, arXiv 2106.08265, algorithm 1)."""
    directions = torch.randn(tokens.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0))
    shadows = (tokens - tokens.mean(0)) @ directions
    squares = shadows.square().sum(1)
    nearest, chosen = torch.full_like(squares, torch.inf), [0]
    while len(chosen) < min(size, len(tokens)):
        last = chosen[-1]
        distances = torch.addmv(squares, shadows, shadows[last], alpha=-2) + squares[last]
        nearest = torch.minimum(nearest, distances)
        nearest[last] = -torch.inf
        chosen.append(int(nearest.argmax()))
    return tokens[chosen]


def patch_memory(reference: Tensor) -> Callable[[Tensor], Tensor]:
    """PatchCore (arXiv 2106.08265, equations 6 and 7) fitted to place tokens (n, P, E): the largest distance
    of a place to a memory of normal ones, a coreset of ``SHARE`` of them, less where that memory is sparse.
    It maps (m, P, E) -> (m)."""
    flat = reference.flatten(0, 1)
    memory = greedy_coreset(flat, math.ceil(SHARE * len(flat)))

    def score_image(image: Tensor) -> Tensor:
        nearest, owner = torch.cdist(image, memory).min(1)
        farthest, place = nearest.max(0)
        around = torch.cdist(memory[owner[place]].unsqueeze(0), memory).squeeze(0)
        neighbours = around.topk(min(REWEIGHTED, len(memory)), largest=False).indices
        among = torch.cdist(image[place].unsqueeze(0), memory[neighbours]).squeeze(0)
        return (1 - torch.softmax(among, 0)[0]) * farthest

    return lambda places: torch.stack([score_image(image) for image in places])


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


# ---------------------------------------------------------------- of a class
def simple_scores(prepared: PreparedClass) -> dict[str, np.ndarray]:
    """Scores of the simple detectors on the test images, fitted to all normal training images:
    on the semantic token, on the power-normalised joint token, on places where they are read;
    and of places or of the image as the spread of the class has it, which chooses for the flow, too."""
    data = prepared.data
    normal = np.sort(np.concatenate([data.fit_rows, data.held_rows]))
    train, test = data.train.semantic[normal].float(), data.test.semantic[data.test_rows].float()
    scores = {name: score(prepare(train), prepare(test)) for name, (score, prepare) in SEMANTIC.items()}
    if prepared.joint:
        train, test = torch.cat([prepared.joint["fit"], prepared.joint["held"]]), prepared.joint["test"]
        scores["Gaussian, joint token"] = gaussian(train, test)
        scores["kNN, joint token"] = neighbours(train, test)
    if prepared.detector.uses_places:
        reference = data.train.on_cpu().one("places", evenly(normal, PLACE_SAMPLE))
        batches = in_batches(data.test_rows, PLACE_BATCH)
        for name, fitted_to in PLACES.items():
            score = fitted_to(reference)
            parts = [score(data.test.on_cpu().one("places", batch)) for batch in batches]
            scores[name] = torch.cat(parts).numpy()
    if isinstance(prepared.detector, PlaceFlow):
        chosen = "PaDiM-like, places" if prepared.detector.uses_places else "kNN, joint token"
        scores["PaDiM-like or kNN, by spread"] = scores[chosen]
    return scores
