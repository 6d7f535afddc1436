"""How unusual the image is as a whole: densities of the joint token that need no training (docs/method.md,
section 5.4)."""

import math

import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor, nn

from detector.normalization import EPS, Principal

# Where kernels are centred between the mean of all tokens (0) and a training image's (1). Kernels widen a
# density; drawn to the mean they do not (smoothed bootstrap with shrinkage: Silverman and Young 1987).
DRAWN = 0.5
BANDWIDTHS = 40  # tried, a factor of 1.12 apart
KERNEL_RIDGE = 10.0  # of the kernels' metric, in units of the mean variance
ONE_SCENE, SEVERAL = 0.15, 0.39  # spread up to which a class shows one scene, and from which it shows several
FLOOR = 1e-6  # of an energy before its logarithm


class Standardized(nn.Module):
    """Values (B) in standard deviations of those of normal images that they were not fitted to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def fit(self, values: Tensor) -> "Standardized":
        """values (n), n at least 1; of one alone, or of n alike, the deviation stays 1."""
        self.mean.copy_(values.mean())
        deviation = values.std(correction=min(1, len(values) - 1))
        self.deviation.copy_(deviation if deviation > FLOOR else torch.ones(()))
        return self

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.deviation


class Gaussian(nn.Module):
    """Tokens (B, D) -> squared Mahalanobis distances (B) under a Gaussian with Ledoit and Wolf's shrinkage,
    in k principal directions of the tokens that it was fitted to, with one variance in all others: D times
    docs/method.md, eq. 20."""

    def __init__(self, channels: int, directions: int):
        super().__init__()
        self.principal = Principal(channels, directions)
        self.register_buffer("scale", torch.ones(directions))
        self.register_buffer("rest", torch.ones(()))

    def fit(self, tokens: Tensor) -> tuple[Tensor, Tensor, float]:
        """Tokens (n, D), float32 -> variances (k) and their mean (), as ``Principal.fit``; shrinkage ρ."""
        values, average = self.principal.fit(tokens)
        centred = (tokens - self.principal.mean).double().cpu().numpy()
        shrinkage = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
        self.scale.copy_(((1 - shrinkage) * values + shrinkage * average).clamp_min(EPS).rsqrt())
        self.rest.copy_(1 / (shrinkage * average).clamp_min(EPS))
        return values, average, shrinkage

    def energies(self, inside: Tensor, outside: Tensor) -> Tensor:
        """The same from what ``principal`` makes of tokens: (B, k), (B) -> (B)."""
        return (inside * self.scale).square().sum(1) + outside * self.rest

    def forward(self, tokens: Tensor) -> Tensor:
        return self.energies(*self.principal(tokens))


class ImageDensity(nn.Module):
    """Power-normalised joint tokens (B, D) -> how unusual they are (B, 2), in standard deviations: under a
    Gaussian, and under kernels at the training images' tokens, in k directions as ``Gaussian``."""

    def __init__(self, channels: int, directions: int):
        super().__init__()
        self.channels = channels
        self.gaussian = Gaussian(channels, directions)
        self.register_buffer("kernel_scale", torch.ones(directions))
        self.register_buffer("kernel_rest", torch.ones(()))
        self.register_buffer("centres", torch.zeros(0, directions, dtype=torch.float16))
        self.register_buffer("bandwidth", torch.ones(()))
        self.gaussian_unit, self.kernel_unit = Standardized(), Standardized()

    def fit(self, joint: Tensor) -> "ImageDensity":
        """Fit to the normal training images' joint tokens (n, D), float32. Both are standardised by each
        image's energies under densities without it."""
        n, channels = joint.shape
        values, average, shrinkage = self.gaussian.fit(joint)
        self.kernel_scale.copy_((values + KERNEL_RIDGE * average).clamp_min(EPS).rsqrt())
        self.kernel_rest.copy_(1 / (KERNEL_RIDGE * average).clamp_min(EPS))
        inside = (joint - self.gaussian.principal.mean) @ self.gaussian.principal.directions
        left_out = left_out_energies(inside, values, average, shrinkage, channels)
        self.gaussian_unit.fit(self._log(left_out))
        scaled = inside * self.kernel_scale
        self.centres = (DRAWN * scaled).half()
        distances = left_out_distances(scaled, self.centres.float())
        self.bandwidth.copy_(best_bandwidth(distances, channels))
        self.kernel_unit.fit(self._log(kernel_energy(distances, self.bandwidth, channels) * channels))
        return self

    def _log(self, energies: Tensor) -> Tensor:
        return (energies / self.channels).clamp_min(FLOOR).log()

    def forward(self, joint: Tensor) -> Tensor:
        inside, outside = self.gaussian.principal(joint)
        gaussian = self.gaussian.energies(inside, outside)
        distances = squared_distances(inside * self.kernel_scale, self.centres.float())
        distances = distances + (outside * self.kernel_rest).unsqueeze(1)
        kernels = kernel_energy(distances, self.bandwidth, self.channels) * self.channels
        return torch.stack([self.gaussian_unit(self._log(gaussian)), self.kernel_unit(self._log(kernels))], 1)


def left_out_energies(
    inside: Tensor, values: Tensor, average: Tensor, shrinkage: float, channels: int
) -> Tensor:
    """The squared Mahalanobis distance of each training image (n) under the Gaussian of the n - 1 others with
    the same shrinkage ρ, from the tokens' coordinates (n, k) in their principal directions, the variances (k)
    there and their mean () over all D channels (docs/method.md, section 5.4).

    Without image i, at d from the mean of all n: the mean is d / (n - 1) further away, the covariance n / (n
    - 1) (S - d dᵀ / (n - 1)), whose inverse Sherman and Morrison give."""
    n = len(inside)
    squares, more = inside.double().square(), n / (n - 1)
    averages = more * (average - squares.sum(1, keepdim=True) / ((n - 1) * channels))
    kept = more * (1 - shrinkage) * values + shrinkage * averages  # (n, k)
    energies = (squares / kept.clamp_min(EPS)).sum(1)
    own = (1 - shrinkage) * more / (n - 1)
    return (more**2 * energies / (1 - own * energies).clamp_min(1e-6)).float()


def squared_distances(query: Tensor, reference: Tensor) -> Tensor:
    """Squared Euclidean distances of the rows of query (m, C) to those of reference (n, C) -> (m, n)."""
    squares = query.square().sum(1, keepdim=True) + reference.square().sum(1)
    return (squares - 2 * torch.matmul(query, reference.t())).clamp_min(0)


def left_out_distances(tokens: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (n, n) of each training image to the centres of the others in a metric fitted to
    these, infinite to its own, from tokens and centres (n, k) in the metric of all, M = (S + r I)⁻¹ (eq. 21).
    Without image i, at d from the mean, M becomes M + M d dᵀ M / (n - 1 - dᵀ M d) (Sherman and Morrison)."""
    own = tokens.square().sum(1, keepdim=True)
    away, left = own - tokens @ centres.T, (len(tokens) - 1 - own).clamp_min(1e-3)
    return (squared_distances(tokens, centres) + away.square() / left).fill_diagonal_(torch.inf)


def kernel_energy(distances: Tensor, bandwidth: Tensor, channels: int) -> Tensor:
    """Squared distances (B, n) to kernels' centres -> twice the negative log-likelihood (B) under a kernel
    density in units of the bandwidth h, the variance of a kernel, per channel and without its constant
    (docs/method.md, eq. 21): -2 h log mean_i exp(-d_i / 2h) / D."""
    density = torch.logsumexp(distances / (-2 * bandwidth), 1) - math.log(distances.shape[1])
    return -2 * bandwidth * density / channels


def best_bandwidth(distances: Tensor, channels: int) -> Tensor:
    """Squared distances of images to the kernels' centres (m, n), infinite to their own -> the bandwidth ()
    under which they are most likely."""
    start = distances[distances.isfinite()].mean() / channels
    tried = torch.stack([start * 1.12**-i for i in range(BANDWIDTHS)])
    losses = [(kernel_energy(distances, h, channels) / h + h.log()).mean() for h in tried]
    return tried[int(torch.stack(losses).argmin())]


def one_scene(spread: float) -> float:
    """How far a class shows one scene, from the spread of its semantic tokens (docs/method.md, eq. 22)."""
    return min(1.0, max(0.0, (SEVERAL - spread) / (SEVERAL - ONE_SCENE)))
