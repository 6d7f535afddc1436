"""Feature normalisation before the flow, fitted on normal training features only and saved with the
checkpoint.

Backbone features are badly scaled for a flow: a few channels carry most of the variance. ``NORMALIZATIONS``
names the choices."""

import torch
from torch import Tensor, nn

from arithmetic import is_traced
from token_grid import centred_window

EPS = 1e-12
FLOOR = (
    0.01  # of the mean variance: a channel that hardly varies in the normal images is not blown up by more
)
RIDGE = 1e-6  # in units of the mean eigenvalue, for whitening a covariance that is singular


def spread(tokens: Tensor) -> float:
    """How much the directions of tokens (n, C) differ: one minus the squared length of their mean direction,
    after ``power_l2``; 0 when all are alike, 1 when they cancel. (The circular variance of directional
    statistics, in its squared form: Mardia and Jupp, Directional Statistics.)"""
    return 1 - power_l2(tokens).mean(0).square().sum().item()


def power_l2(tokens: Tensor) -> Tensor:
    """Signed square root of every entry, then unit length: (..., C) -> (..., C). For non-negative features
    the plain square root."""
    rooted = tokens.abs().sqrt_()
    rooted = rooted * tokens.sign() if is_traced() else rooted.copysign_(tokens)  # ONNX has no copysign
    return rooted.div_(torch.linalg.vector_norm(rooted, dim=-1, keepdim=True).clamp_min_(EPS))


# The normalisations by name, as the steps they take in this order (``Normalizer``).
NORMALIZATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "standardize": ("standardize",),
    "power_l2": ("power_l2",),
    "whiten": ("whiten",),
    "power_l2+whiten": ("power_l2", "whiten"),
}


def fit_whitening(tokens: Tensor, ridge: float) -> Tensor:
    """The symmetric matrix (C, C) that takes tokens (n, C) to the identity covariance; their mean square is 1
    then.

    The covariance is Ledoit and Wolf's; ``ridge`` is added to its eigenvalues, in units of their mean."""
    tokens = tokens.double()
    from sklearn.covariance import ledoit_wolf  # slow to import: who only predicts does not wait

    covariance, _ = ledoit_wolf(tokens.cpu().numpy())
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance).to(tokens.device))
    values = values + (ridge + RIDGE) * values.mean()
    whitening = (vectors * values.rsqrt()) @ vectors.T
    whitened = (tokens - tokens.mean(0)) @ whitening
    return (whitening / whitened.square().mean().sqrt()).float()


class BandNormalizer(nn.Module):
    """Band tokens (B, D) -> chosen columns (B, C), each group of columns (one statistic of one depth)
    power-normalised to unit length, all of them whitened together. Its buffers are fitted by ``fit``."""

    def __init__(self, columns: list[range], ridge: float):
        super().__init__()
        self.columns, self.ridge = columns, ridge
        channels = sum(map(len, columns))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("whitening", torch.eye(channels))

    def _power(self, bands: Tensor) -> Tensor:
        return torch.cat([power_l2(bands[:, group.start : group.stop]) for group in self.columns], 1)

    @torch.no_grad()
    def fit(self, bands: Tensor) -> "BandNormalizer":
        """Fit to the normal training images' band tokens (n, D), float32."""
        tokens = self._power(bands)
        self.mean.copy_(tokens.mean(0))
        self.whitening.copy_(fit_whitening(tokens, self.ridge))
        return self

    @torch.no_grad()
    def forward(self, bands: Tensor) -> Tensor:
        return (self._power(bands) - self.mean) @ self.whitening


PLACE_RIDGE = 0.03  # added to the covariance of a place, in units of the mean variance


class PlaceNormalizer(nn.Module):
    """Place tokens (B, P, D) -> the same shape, whitened: each place by its own mean and covariance, as far
    as the data bear them out. Its buffers are fitted by ``fit``; before, there is no whitening."""

    def __init__(self, places: int, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(places, channels))
        self.register_buffer("whitening", torch.zeros(0, channels, channels))  # (P, D, D) once fitted

    @torch.no_grad()
    def fit(self, places: Tensor) -> "PlaceNormalizer":
        """Fit to the place tokens (n, P, D) of normal training images, float32 (docs/method.md, eq. 17).

        A place's own mean is drawn to the mean of all places as far as the places' means differ by chance
        alone (the positive part of James and Stein's estimator); its covariance to the common one by D / (n +
        D), as if that had been seen on D images (an inverse Wishart prior; Friedman's regularised
        discriminant analysis, 1989)."""
        n, _, channels = places.shape
        common, own = places.mean((0, 1)), places.mean(0)
        within = (places - own).square().mean() / max(n - 1, 1)
        between = (own - common).square().mean().clamp_min(EPS)
        self.mean.copy_(common + (1 - within / between).clamp_min(0) * (own - common))
        away = (places - self.mean).transpose(0, 1)  # (P, n, D)
        covariance = away.transpose(1, 2) @ away / n
        pooled = covariance.mean(0)
        covariance += channels / (n + channels) * (pooled - covariance)
        variance = pooled.diagonal().mean()
        values, vectors = torch.linalg.eigh(covariance.double())
        roots = (values + PLACE_RIDGE * variance + EPS).rsqrt()
        self.whitening = ((vectors * roots.unsqueeze(1)) @ vectors.transpose(1, 2)).float()
        self.whitening /= self(places).square().mean().sqrt()
        return self

    @torch.no_grad()
    def forward(self, places: Tensor) -> Tensor:
        return torch.matmul((places - self.mean).transpose(0, 1), self.whitening).transpose(0, 1)


class Normalizer(nn.Module):
    """(B, C) semantic and (B, N, C) patch tokens -> the same shapes, normalised. Its buffers are fitted by
    ``fit``.

    name (NORMALIZATIONS): "none", "standardize" (every channel to mean 0, variance 1), "power_l2" (per token,
    then one common shift and scale, so that a channel's mean square is 1 on average), "whiten" (semantic
    tokens to the identity covariance, by Ledoit-Wolf shrinkage; an identity flow is then the Gaussian
    detector), "power_l2+whiten" (one after the other). Patch tokens have statistics of their own; where
    semantic tokens are whitened, patch tokens are shifted and scaled as for "power_l2".

    centre_pool, grid: with centre_pool above 0, the semantic token is first re-pooled from the patch tokens
    of the grid (rows, columns): their mean under a Gaussian window on the image's centre, sigma = centre_pool
    times the grid's sides.

    patches_used: False where the flow has no fusion: patch tokens are then handed on as they are. ridge:
    added to the covariance's eigenvalues before whitening, in units of their mean: 0 whitens fully, more
    keeps more of the features' own scale."""

    def __init__(
        self,
        name: str,
        channels: int,
        *,
        ridge: float,
        centre_pool: float,
        grid: tuple[int, int],
        patches_used: bool,
    ):
        super().__init__()
        self.patches_used = patches_used
        self.register_buffer(
            "window", centred_window(grid, centre_pool) if centre_pool else None, persistent=False
        )
        self.steps, self.ridge = NORMALIZATIONS[name], ridge
        for kind in ("semantic", "patch"):
            self.register_buffer(f"{kind}_mean", torch.zeros(channels))
            self.register_buffer(f"{kind}_scale", torch.ones(channels))
        self.register_buffer("whitening", torch.eye(channels) if "whiten" in self.steps else None)

    def pool(self, semantic: Tensor, patches: Tensor) -> Tensor:
        """The semantic token that is normalised: the backbone's own (B, C), or re-pooled from the patches (B,
        N, C)."""
        return semantic if self.window is None else torch.matmul(self.window, patches[:, : len(self.window)])

    @torch.no_grad()
    def fit(self, semantic: Tensor, patches: Tensor) -> "Normalizer":
        """Fit to the normal training images' pooled semantic tokens (n, C) and, where they are used, patch
        tokens (m, C), float32."""
        if not self.steps:
            return self
        kinds = {"semantic": semantic} | ({"patch": patches} if self.patches_used else {})
        for kind, tokens in kinds.items():
            tokens = power_l2(tokens) if "power_l2" in self.steps else tokens
            mean = tokens.mean(0)
            deviation = (tokens - mean).square().mean(0)
            if self.steps == ("power_l2",) or (self.whitening is not None and kind == "patch"):
                deviation = deviation.mean().expand_as(mean)
            deviation = deviation.clamp(min=FLOOR * deviation.mean()) + EPS
            getattr(self, f"{kind}_mean").copy_(mean)
            getattr(self, f"{kind}_scale").copy_(deviation.rsqrt())
            if kind == "semantic" and self.whitening is not None:
                self.whitening.copy_(fit_whitening(tokens, self.ridge))
        return self

    @torch.no_grad()
    def forward(self, semantic: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        normal = self.semantic(semantic, patches)
        return normal, self._normalize_patches(patches) if self.steps and self.patches_used else patches

    @torch.no_grad()
    def semantic(self, semantic: Tensor, patches: Tensor) -> Tensor:
        """The normalised semantic token alone, which is little work beside the patches: (B, C), (B, N, C) ->
        (B, C)."""
        semantic = self.pool(semantic, patches)
        if not self.steps:
            return semantic
        if "power_l2" in self.steps:
            semantic = power_l2(semantic)
        semantic = semantic - self.semantic_mean
        return semantic * self.semantic_scale if self.whitening is None else semantic @ self.whitening

    def _normalize_patches(self, patches: Tensor) -> Tensor:
        """Most of the work is here: (B, N, C), written once and then changed in place."""
        patches = power_l2(patches) if "power_l2" in self.steps else patches.clone()
        return patches.sub_(self.patch_mean).mul_(self.patch_scale)
