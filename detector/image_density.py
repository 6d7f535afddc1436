"""How unusual the image is as a whole: densities of the joint token that need no training (docs/method.md,
section 5.4)."""

import math

import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor, nn

from detector.normalization import EPS, principal_directions
from model import squared_distances

DRAWN = 0.5  # where kernels are centred between the mean of all tokens (0) and a training image's (1)
BANDWIDTHS = 40  # tried, a factor of 1.12 apart
KERNEL_RIDGE = 10.0  # of the kernels' metric, in units of the mean variance
ONE_SCENE, SEVERAL = 0.29, 0.39  # spread up to which a class shows one scene, and from which it shows several
FLOOR = 1e-6  # of an energy before its logarithm


class Standardized(nn.Module):
    """Values (B) in standard deviations of those of normal images that they were not fitted to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    @torch.no_grad()
    def fit(self, values: Tensor) -> "Standardized":
        """values (n), n at least 1; of one alone, or of n alike, the deviation stays 1."""
        self.mean.copy_(values.mean())
        deviation = values.std(correction=min(1, len(values) - 1))
        self.deviation.copy_(deviation if deviation > FLOOR else torch.ones(()))
        return self

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.deviation


class ImageDensity(nn.Module):
    """Power-normalised joint tokens (B, D) -> how unusual they are (B, 2), in standard deviations: under a
    Gaussian with Ledoit and Wolf's shrinkage, and under kernels at the training images' tokens. Its buffers
    are fitted by ``fit``; k, the directions in which the n training images differ, is at most n - 1."""

    def __init__(self, channels: int, directions: int):
        super().__init__()
        self.channels = channels
        self.partial = directions < channels  # some directions are no training image's
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("directions", torch.eye(channels, directions))
        for name in ("gaussian", "kernel"):
            self.register_buffer(f"{name}_scale", torch.ones(directions))
            self.register_buffer(f"{name}_rest", torch.ones(()))
        self.register_buffer("centres", torch.zeros(0, directions, dtype=torch.float16))
        self.register_buffer("bandwidth", torch.ones(()))
        self.gaussian_unit, self.kernel_unit = Standardized(), Standardized()

    @torch.no_grad()
    def fit(self, joint: Tensor) -> "ImageDensity":
        """Fit to the normal training images' power-normalised joint tokens (n, D), float32. Each image's own
        energies, that both are standardised by, are those of densities without it."""
        n, channels = joint.shape
        self.mean.copy_(joint.mean(0))
        centred = joint - self.mean
        values, directions = principal_directions(centred)
        count = self.directions.shape[1]
        values, average = values[:count], values.sum() / channels
        self.directions.copy_(directions[:, :count])
        shrinkage = float(ledoit_wolf_shrinkage(centred.double().cpu().numpy(), assume_centered=True))
        ridges = {"gaussian": (1 - shrinkage, shrinkage), "kernel": (1.0, KERNEL_RIDGE)}
        for name, (own, ridge) in ridges.items():
            variances = (own * values + ridge * average).clamp_min(EPS)
            getattr(self, f"{name}_scale").copy_(variances.rsqrt())
            getattr(self, f"{name}_rest").copy_(1 / (ridge * average).clamp_min(EPS))
        tokens = centred @ self.directions  # nothing of them lies outside
        energies = (tokens * self.gaussian_scale).square().sum(1)
        left_out = energies / (1 - (1 - shrinkage) * energies / n).clamp_min(1e-3) * (n / (n - 1)) ** 2
        self.gaussian_unit.fit(self._log(left_out))
        scaled = tokens * self.kernel_scale
        self.centres = (DRAWN * scaled).half()
        distances = squared_distances(scaled, self.centres.float()).fill_diagonal_(torch.inf)
        self.bandwidth.copy_(best_bandwidth(distances, channels))
        self.kernel_unit.fit(self._log(kernel_energy(distances, self.bandwidth, channels) * channels))
        return self

    def _log(self, energies: Tensor) -> Tensor:
        return (energies / self.channels).clamp_min(FLOOR).log()

    def forward(self, joint: Tensor) -> Tensor:
        centred = joint - self.mean
        inside = torch.matmul(centred, self.directions)
        outside = centred.square().sum(1) - inside.square().sum(1)
        outside = outside.clamp_min(0) if self.partial else torch.zeros_like(outside)
        gaussian = (inside * self.gaussian_scale).square().sum(1) + outside * self.gaussian_rest
        distances = squared_distances(inside * self.kernel_scale, self.centres.float())
        distances = distances + (outside * self.kernel_rest).unsqueeze(1)
        kernels = kernel_energy(distances, self.bandwidth, self.channels) * self.channels
        return torch.stack([self.gaussian_unit(self._log(gaussian)), self.kernel_unit(self._log(kernels))], 1)


def kernel_energy(distances: Tensor, bandwidth: Tensor, channels: int) -> Tensor:
    """Twice the negative log-likelihood under a kernel density in units of the bandwidth h, the variance of a
    kernel, per channel and without its constant (docs/method.md, eq. 22): -2 h log mean_i exp(-d_i / 2h) / D.

    distances (B, n): squared, to the kernels' centres, the training images' tokens times ``DRAWN``: kernels
    widen a density, and drawn to the mean they do not (the smoothed bootstrap with shrinkage: Silverman and
    Young 1987) -> (B)."""
    density = torch.logsumexp(distances / (-2 * bandwidth), 1) - math.log(distances.shape[1])
    return -2 * bandwidth * density / channels


def best_bandwidth(distances: Tensor, channels: int) -> Tensor:
    """The bandwidth of the kernel density under which images are most likely whose squared distances to its
    centres are given, infinite to their own: (m, n) -> ()."""
    start = distances[distances.isfinite()].mean() / channels
    tried = torch.stack([start * 1.12**-i for i in range(BANDWIDTHS)])
    losses = [(kernel_energy(distances, h, channels) / h + h.log()).mean() for h in tried]
    return tried[int(torch.stack(losses).argmin())]


def one_scene(spread: float) -> float:
    """How far a class shows one scene, from the spread of its semantic tokens: 1 up to ``ONE_SCENE``, 0 from
    ``SEVERAL`` on, straight between them."""
    return min(1.0, max(0.0, (SEVERAL - spread) / (SEVERAL - ONE_SCENE)))
