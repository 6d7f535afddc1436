"""Weights in half their size: what a checkpoint's file holds of a state dict.

A matrix is kept in 65535 equal steps per row, from minus to plus the row's largest entry: at the same size as
float16 its rounding is 8 times finer for entries near that largest one, which are those that matter. Scores
then move by less than 1e-4 where float16's move by up to 1e-3. A symmetric matrix (the whitening, whose
rounding the scores feel) keeps its triangle, in full precision. Small tensors stay as they are."""

import math

import torch
from torch import Tensor

STEPS = 32767  # of int16, to either side
SMALL = 4096  # entries below which nothing is gained
ROWS, TRIANGLE = (
    ":row_scale",
    ":triangle",
)  # endings of names: the scale of a packed matrix, half of a symmetric one


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it is written: {name: tensor} with the names above beside the matrices' own."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 2 or tensor.numel() < SMALL:
            packed[name] = tensor
        elif is_symmetric(tensor):
            packed[name + TRIANGLE] = tensor[tuple(torch.triu_indices(*tensor.shape))]
        else:
            scale = tensor.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            packed[name] = (tensor / scale * STEPS).round().to(torch.int16)
            packed[name + ROWS] = scale / STEPS
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of what ``pack`` gave."""
    state: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        if name.endswith(TRIANGLE):
            state[name.removesuffix(TRIANGLE)] = _whole(tensor)
        elif name + ROWS in packed:
            state[name] = tensor.float() * packed[name + ROWS]
        elif not name.endswith(ROWS):
            state[name] = tensor
    return state


def is_symmetric(matrix: Tensor) -> bool:
    """Whether a matrix is its own transpose, but for the rounding of float32."""
    if matrix.shape[0] != matrix.shape[1]:
        return False
    return bool((matrix - matrix.T).abs().max() <= 1e-6 * matrix.abs().max())


def _whole(triangle: Tensor) -> Tensor:
    """The symmetric matrix (n, n) of its upper triangle (n (n + 1) / 2), row by row."""
    n = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    matrix = triangle.new_zeros(n, n)
    rows, columns = torch.triu_indices(n, n)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix
