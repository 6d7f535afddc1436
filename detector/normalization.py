"""Feature normalisation before the flow, fitted on normal training features only and saved with the
checkpoint.

Backbone features are badly scaled for a flow: a few channels carry most of the variance."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-12
NO_VARIANCE = 1e-12  # of a direction, in units of the largest
RIDGE = 1e-6  # in units of the mean eigenvalue: what float32 needs to tell directions from rounding


def spread(tokens: Tensor) -> float:
    """How much the directions of tokens (n, C) differ, whatever n is, after ``power_l2``: 0 when all are
    alike, n / (n - 1) when they cancel (the circular variance, squared: Mardia and Jupp, Directional
    Statistics)."""
    n = len(tokens)
    return (1 - power_l2(tokens).mean(0).square().sum().item()) * n / max(1, n - 1)


def power_l2(tokens: Tensor) -> Tensor:
    """Signed square root of every entry, then unit length: (..., C) -> (..., C)."""
    rooted = tokens.abs().sqrt_()
    exported = torch.compiler.is_compiling() or torch.jit.is_tracing()
    rooted = rooted * tokens.sign() if exported else rooted.copysign_(tokens)  # ONNX has no copysign
    return rooted.div_(torch.linalg.vector_norm(rooted, dim=-1, keepdim=True).clamp_min_(EPS))


def principal_directions(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (k), largest first, and directions (D, k) of centred tokens (n, D), k = min(n - 1, D),
    float64. Of fewer tokens than channels by the tokens' own products, which are fewer."""
    a = centred.double()
    n, channels = a.shape
    if n - 1 >= channels:
        values, vectors = torch.linalg.eigh(a.T @ a / n)
        return values.flip(0).clamp_min(0), vectors.flip(1)
    values, vectors = torch.linalg.eigh(a @ a.T / n)
    values, vectors = values.flip(0)[: n - 1].clamp_min(0), vectors.flip(1)[:, : n - 1]
    directions = a.T @ vectors
    # an image that is there twice leaves a direction of no variance, whose sum is rounding alone
    real = values > NO_VARIANCE * values[:1]
    return values * real, directions / torch.linalg.vector_norm(directions, dim=0).clamp_min(EPS) * real


class Principal(nn.Module):
    """Tokens (B, D) -> where they lie (B, k) in the principal directions of the tokens that it was fitted to,
    and the squared length (B) of what lies in none of these (0 where k = D)."""

    def __init__(self, channels: int, directions: int):
        super().__init__()
        self.partial = directions < channels
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("directions", torch.eye(channels, directions))

    def fit(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, D), float32 -> variances (k) in the directions, their mean () over all D, float64."""
        self.mean.copy_(tokens.mean(0))
        values, directions = principal_directions(tokens - self.mean)
        self.directions.copy_(directions)
        return values, values.sum() / tokens.shape[1]

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        centred = tokens - self.mean
        inside = torch.matmul(centred, self.directions)
        outside = (centred.square().sum(1) - inside.square().sum(1)).clamp_min(0)
        return inside, outside if self.partial else torch.zeros_like(outside)


class Standardization(nn.Module):
    """Joint tokens (B, D) -> what the flow takes: tokens (B, D) less their mean, by one factor of mean square
    1; and the squared length (B) of what it does not see, 0. Before ``fit`` it is the identity."""

    def __init__(self, channels: int, _directions: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(1))

    def fit(self, tokens: Tensor) -> "Standardization":
        """Fit to normal training images' joint tokens (n, D), float32."""
        self.mean.copy_(tokens.mean(0))
        self.scale.fill_(((tokens - self.mean).square().mean() + EPS).rsqrt())
        return self

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return (tokens - self.mean) * self.scale, tokens.new_zeros(tokens.shape[0])


class Whitening(nn.Module):
    """Joint tokens (B, D) -> what the flow takes: tokens (B, k) in the principal directions, largest variance
    first, each scaled to (λ + r λ̄)^(-1/2), with λ̄ the mean variance and r = ``RIDGE``; and the squared
    length (B) of what lies outside of them, over r λ̄ (docs/method.md, eq. 12). One factor for all makes the
    mean square of the tokens 1."""

    def __init__(self, channels: int, directions: int):
        super().__init__()
        self.principal = Principal(channels, directions)
        self.register_buffer("scale", torch.ones(directions))
        self.register_buffer("rest_scale", torch.ones(()))

    def fit(self, tokens: Tensor) -> "Whitening":
        """Fit to the normal training images' joint tokens (n, D), float32."""
        values, average = self.principal.fit(tokens)
        floor = RIDGE * average + EPS
        scale = (values + floor).rsqrt()
        size = (values * scale.square()).mean().clamp_min(EPS)
        self.scale.copy_(scale / size.sqrt())
        self.rest_scale.copy_(1 / (floor * size))
        return self

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        inside, outside = self.principal(tokens)
        return inside * self.scale, outside * self.rest_scale


# By name: what is done to joint tokens, whose groups are power-normalised first; not so, nor fitted: none.
NORMALIZATIONS: dict[str, type[Standardization | Whitening]] = {
    "none": Standardization,
    "power_l2": Standardization,
    "power_l2+whiten": Whitening,
}


class PatchNormalizer(nn.Module):
    """Patch tokens (B, N, E) -> what the fusion takes (B, N, C), C the flow's channels, fewer filled up with
    zeros; where ``powered``, after ``power_l2`` and by one shift and scale, more channels than C brought down
    to their principal directions."""

    def __init__(self, powered: bool, channels: int, flow_channels: int):
        super().__init__()
        self.powered, self.missing = powered, max(0, flow_channels - channels)
        self.reduces = channels > flow_channels
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(()))
        shape = (channels, flow_channels) if self.reduces else (0, 0)
        self.register_buffer("directions", torch.eye(*shape))

    def fit(self, patches: Tensor) -> "PatchNormalizer":
        """Fit to patch tokens (m, E) of normal training images, float32."""
        tokens = power_l2(patches)
        self.mean.copy_(tokens.mean(0))
        centred = tokens - self.mean
        if self.reduces:
            values, vectors = torch.linalg.eigh((centred.T @ centred / len(centred)).double())
            self.directions.copy_(vectors.flip(1)[:, : self.directions.shape[1]])
            centred = centred @ self.directions
        self.scale.copy_((centred.square().mean() + EPS).rsqrt())
        return self

    def forward(self, patches: Tensor) -> Tensor:
        if self.powered:
            patches = power_l2(patches) - self.mean
            if self.reduces:
                patches = torch.matmul(patches, self.directions)
            patches = patches * self.scale
        return F.pad(patches, (0, self.missing)) if self.missing else patches
