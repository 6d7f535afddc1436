"""The flow's places: the whitened place tokens of an image, what each sees of the others, and how unusual
each is (docs/method.md, section 5.3)."""

import math

import torch
from torch import Tensor, nn

from detector.normalization import EPS
from model import Inputs

RIDGE = 0.03  # added to the covariance of a place, in units of the mean variance
NEAR, RING = 2, 5  # places around a place: what it does not see of its image, and the reach of its high band
SEEN = 3  # tokens that a place sees of its image: two bands and its position
LEAST = 0.01  # of twice the negative log-likelihood before its logarithm
AS_IF_SEEN = 10  # images that the places' common variance of log-likelihoods counts like
MOST_UNUSUAL = 0.03  # share of an image's places that the score takes the mean of


def bands_around(grid: tuple[int, int]) -> Tensor:
    """What a place sees of the other places of its image, as weights (2, P, P) whose rows sum to 1 (to 0
    where there are none): the low band, the mean of all but the (2 ``NEAR`` + 1)² around it, which would tell
    it itself; the high band, the mean of those of them that are at most ``RING`` away."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    along = [(each.flatten()[:, None] - each.flatten()).abs() for each in (rows, columns)]
    distance = torch.maximum(*along)
    seen = torch.stack([distance > NEAR, (distance > NEAR) & (distance <= RING)]).float()
    return seen / seen.sum(2, keepdim=True).clamp_min(1)


def position(grid: tuple[int, int], channels: int) -> Tensor:
    """Where a place is, as a token (P, C): sines and cosines of row and column, from half a wave over the
    grid to four (as Vaswani et al. 2017)."""
    waves = math.pi * 8 ** torch.linspace(0, 1, max(1, channels // 4))
    rows, columns = ((torch.arange(side) + 0.5) / side for side in grid)
    places = (rows.repeat_interleave(grid[1]), columns.repeat(grid[0]))
    parts = [wave(each[:, None] * waves) for each in places for wave in (torch.sin, torch.cos)]
    token = torch.cat(parts, 1)[:, :channels]
    return nn.functional.pad(token, (0, channels - token.shape[1]))


class PlaceWhitening(nn.Module):
    """Place tokens (B, P, E) -> (B, P, E), each whitened by its place's own mean and covariance, as far as
    the data bear them out (docs/method.md, eq. 16)."""

    def __init__(self, places: int, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(places, channels))
        self.register_buffer("whitening", torch.zeros(0, channels, channels))  # (P, E, E) once fitted

    def fit(self, places: Tensor) -> "PlaceWhitening":
        """Fit to the place tokens (n, P, E) of normal training images, float32.

        A place's own mean is drawn to the mean of all places as far as their means differ by chance alone
        (James and Stein's estimator, its positive part); its covariance to the common one as if that had been
        seen on E images (an inverse Wishart prior; Friedman's regularised discriminant analysis, 1989)."""
        n, _, channels = places.shape
        common, own = places.mean((0, 1)), places.mean(0)
        within = (places - own).square().mean() / max(n - 1, 1)
        between = (own - common).square().mean().clamp_min(EPS)
        self.mean.copy_(common + (1 - within / between).clamp_min(0) * (own - common))
        away = (places - self.mean).transpose(0, 1)  # (P, n, E)
        covariance = away.transpose(1, 2) @ away / n
        pooled = covariance.mean(0)
        covariance += channels / (n + channels) * (pooled - covariance)
        variance = pooled.diagonal().mean()
        values, vectors = torch.linalg.eigh(covariance.double())
        roots = (values + RIDGE * variance + EPS).rsqrt()
        self.whitening = ((vectors * roots.unsqueeze(1)) @ vectors.transpose(1, 2)).float()
        return self

    def forward(self, places: Tensor) -> Tensor:
        return torch.matmul((places - self.mean).transpose(0, 1), self.whitening).transpose(0, 1)

    @staticmethod
    def left_out(tokens: Tensor) -> Tensor:
        """Whitened tokens (n, P, E) of the n images that it was fitted to, at the length that they have under
        Gaussians fitted without their own image (docs/method.md, eq. 17)."""
        n, _, channels = tokens.shape
        energies = tokens.square().sum(2, keepdim=True)
        own = 1 / (n + channels)  # the weight of an image's own deviation in the covariance of its place
        return tokens * (n / max(1, n - 1)) / (1 - own * energies).clamp_min(1e-3).sqrt()


class Places(nn.Module):
    """What the flow takes of the places of images, and from their likelihood how unusual each is: the
    logarithm of twice the negative log-likelihood per channel, standardised by place over the normal images
    (docs/method.md, eq. 16 to 19)."""

    def __init__(self, grid: tuple[int, int], channels: int):
        super().__init__()
        self.count = math.prod(grid)
        self.whiten = PlaceWhitening(self.count, channels)
        self.register_buffer("around", bands_around(grid), persistent=False)
        self.register_buffer("position", position(grid, channels), persistent=False)
        self.register_buffer("log_mean", torch.zeros(self.count))
        self.register_buffer("log_deviation", torch.ones(self.count))
        self.n_unusual = max(1, round(MOST_UNUSUAL * self.count))

    def inputs(self, tokens: Tensor) -> Inputs:
        """What the flow takes of all places of images, from whitened tokens (B, P, E): these (B P, E), and
        what each sees of its image (B P, 3, E): low band, high band, position."""
        bands = torch.matmul(self.around, tokens.unsqueeze(1))  # (B, 2, P, E)
        where = self.position.expand(tokens.shape[0], 1, -1, -1)
        seen = torch.cat([bands, where], 1).transpose(1, 2)  # (B, P, 3, E)
        return Inputs(tokens.flatten(0, 1), seen.flatten(0, 1))

    def fit_scale(self, likelihoods: Tensor) -> "Places":
        """Fit the standardisation to the negative log-likelihoods (n, P) of normal images."""
        logs, n = self._logs(likelihoods), len(likelihoods)
        variances = logs.var(0, correction=0)
        variances = (n * variances + AS_IF_SEEN * variances.mean()) / (n + AS_IF_SEEN)
        self.log_mean.copy_(logs.mean(0))
        self.log_deviation.copy_(variances.clamp_min(1e-6).sqrt())
        return self

    @staticmethod
    def _logs(likelihoods: Tensor) -> Tensor:
        return (2 * likelihoods).clamp_min(LEAST).log()

    def unusual(self, likelihoods: Tensor) -> Tensor:
        """How unusual each place is (B, P), in standard deviations, from negative log-likelihoods (B, P)."""
        return (self._logs(likelihoods) - self.log_mean) / self.log_deviation

    def most_unusual(self, likelihoods: Tensor) -> Tensor:
        """The mean of an image's most unusual places (B), from the same."""
        return self.unusual(likelihoods).topk(self.n_unusual, dim=1).values.mean(1)
