"""The method transcribed plainly from docs/method.md, sections 2 and 3: tokens are permuted layer by layer,
every token is projected, windows are looped over.

Slow and obvious on purpose. Only parameters are taken out of the modules under test, never a computation."""

import math

import numpy as np
import torch


def heads_of(projected: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, n, heads * w) -> (B, heads, n, w)."""
    return projected.unflatten(2, (heads, -1)).transpose(1, 2)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Ordinary scaled attention of (B, heads, 1, w) over (B, heads, n, w) -> (B, heads * w)."""
    weights = torch.softmax(query @ keys.transpose(2, 3) / math.sqrt(query.shape[3]), 3)
    return (weights @ values).squeeze(2).flatten(1)


def class_attention(module, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    tokens = torch.cat([x[:, None], p], 1)
    query, keys, values = (
        heads_of(t @ layer.weight.T, module.heads)
        for t, layer in ((x[:, None], module.q), (tokens, module.k), (tokens, module.v))
    )
    return attend(query, keys, values) @ module.proj.weight.T + module.proj.bias


def windows(grid: tuple[int, int], window: int) -> list[list[int]]:
    """The patches of every window, found by walking over the grid."""
    found = {}
    for row in range(grid[0]):
        for column in range(grid[1]):
            found.setdefault((row // window, column // window), []).append(row * grid[1] + column)
    return [found[key] for key in sorted(found)]


def hilo_branch(module, kind: str, x: torch.Tensor, groups: list[torch.Tensor]) -> torch.Tensor:
    """One branch: its own attention over each group of tokens (B, n, d), results averaged, projected."""
    q, kv, proj = (getattr(module, f"{kind}_{part}") for part in ("q", "kv", "proj"))
    inner = len(q.weight)
    heads = inner // module.width
    query = heads_of(x[:, None] @ q.weight.T, heads)
    results = []
    for tokens in groups:
        both = tokens @ kv.weight.T
        results.append(attend(query, heads_of(both[..., :inner], heads), heads_of(both[..., inner:], heads)))
    return torch.stack(results).mean(0) @ proj.weight.T + proj.bias


def hilo(module, x: torch.Tensor, p: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    groups = [p[:, members] for members in windows(grid, window)]
    pooled = torch.stack([group.mean(1) for group in groups], 1)
    return torch.cat(
        [
            hilo_branch(module, kind, x, found)
            for kind, found in (("h", groups), ("l", [pooled]))
            if hasattr(module, f"{kind}_q")
        ],
        1,
    )


def hilo_compact(module, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    low, high = p[:, : p.shape[1] // 2], p[:, p.shape[1] // 2 :]
    return torch.cat(
        [
            hilo_branch(module, kind, x, [band])
            for kind, band in (("h", high), ("l", low))
            if hasattr(module, f"{kind}_q")
        ],
        1,
    )


# FcaNet's sixteen best frequencies, as its paper's code lists them: rows, then columns
FCANET_ROWS = (0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2)
FCANET_COLUMNS = (0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2)


def spectral(module, x: torch.Tensor, p: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Gate from one DCT coefficient per channel; the mean patch, gated, is added to x and projected."""
    channels = x.shape[1]
    coefficients = []
    for channel in range(channels):
        place = channel * 16 // channels
        u, v = FCANET_ROWS[place] * (grid[0] // 6), FCANET_COLUMNS[place] * (grid[1] // 6)
        total = 0
        for row in range(grid[0]):
            for column in range(grid[1]):
                wave = math.cos(math.pi * u * (row + 0.5) / grid[0]) * math.cos(
                    math.pi * v * (column + 0.5) / grid[1]
                )
                total = total + p[:, row * grid[1] + column, channel] * wave
        size = math.sqrt(grid[0] * grid[1]) / (math.sqrt(2) ** ((u > 0) + (v > 0)))
        coefficients.append(total / size)
    down, up = module.gate.fc[0].weight, module.gate.fc[2].weight
    gate = torch.sigmoid(torch.relu(torch.stack(coefficients, 1) @ down.T) @ up.T)
    return (x + gate * p.mean(1)) @ module.proj.weight.T + module.proj.bias


def fuse(module, x, p, grid, window, whole=None):
    """The fusion module on semantic half (B, d) and patch halves (B, N, d), whatever its kind. whole (B, N,
    C): the tokens, in the order they were given in."""
    kind = type(module).__name__
    if kind == "ClassAttention":
        return class_attention(module, x, p)
    if kind == "HiLo":
        return hilo_compact(module, x, p) if module.bands else hilo(module, x, p, grid, window)
    if kind == "BandProjection":
        return torch.cat(list(whole.unbind(1)), 1) @ module.proj.weight.T + module.proj.bias
    return spectral(module, x, p, grid)


def subnet(module, x, p, grid, window, whole):
    h = x
    for layer in (module.fc1, module.fc2, module.fc3):
        h = torch.relu(h @ layer.weight.T + layer.bias)
    if module.fusion is not None:
        fused = fuse(module.fusion, x, p, grid, window, whole)
        h = torch.cat([h, fused * module.gamma], 1)
    return h @ module.fc_out.weight.T + module.fc_out.bias


def flow(module, x, p, grid, window=3, clamp=3.0):
    """docs/method.md, eq. 1 to 4, with the patch tokens permuted in every layer -> z (B, C), log-determinant
    (B)."""
    total, whole = torch.zeros(len(x), dtype=x.dtype), p
    for k, layer in enumerate(module.module_list):
        order = torch.from_numpy(np.random.RandomState(k).permutation(x.shape[1]))
        x, p = x[:, order], p[:, :, order]
        half = x.shape[1] // 2
        x1, x2, p1, p2 = x[:, :half], x[:, half:], p[..., :half], p[..., half:]
        s2, t2 = subnet(layer.s2, x2, p2, grid, window, whole).tensor_split([half], 1)
        s2 = clamp * 0.636 * torch.arctan(s2 / clamp)
        y1 = torch.exp(s2) * x1 + t2
        s1, t1 = subnet(layer.s1, y1, p1, grid, window, whole).tensor_split([x.shape[1] - half], 1)
        s1 = clamp * 0.636 * torch.arctan(s1 / clamp)
        y2 = torch.exp(s1) * x2 + t1
        x = torch.cat([y1, y2], 1)
        total = total + s1.sum(1) + s2.sum(1)
    return x, total
