"""Which features a configuration asks for, found without loading the backbone."""

import dataclasses

import torch

from backbone import backbones
from backbone.token_grid import OF_MAPS, PLACE_CHANNELS, Bands, Places, TokenGrid, place_grid
from cache.feature_cache import ImageList
from cache.store import identity_hash
from config import Config, knobs_affecting
from datasets import ImageSet


@dataclasses.dataclass(frozen=True)
class Identity:
    """All that the features of an image depend on, besides the image.

    name, fields: of their store, and what must be found there, as JSON has it. of_maps: what is kept of the
    maps of several depths, by the name of its array. precision: of the backbone, as torch names it."""

    name: str
    fields: dict
    extractor: str
    img_size: tuple[int, int]
    weights_path: str | None
    seed: int
    grid: TokenGrid
    of_maps: dict[str, Bands | Places]
    mirror: bool
    precision: str

    def __hash__(self) -> int:
        return hash(self.name)


def cache_identity(
    config: Config,
    device: torch.device,
    images: ImageSet | None = None,
    listed: ImageList | None = None,
) -> Identity:
    """The features that a configuration asks for. Raises UserError.

    listed: has the sizes that img_size auto has chosen, to which that for the ``images`` is added, and the
    ranges of pixels of more than eight bits (images/pixel_scale.py). The fields are the knobs that affect the
    features, with what device, pictures and backbone decide put in for those left open."""
    precision = str(choose_precision(config.precision, device)).removeprefix("torch.")
    known = backbones.timm_model(config.extractor)
    weights = backbones.weights_source(config.extractor, config.weights_path, config.seed)
    size = config.img_size if isinstance(config.img_size, tuple) else known.own_size
    if config.img_size == "auto" and listed:
        size = backbones.size_for(config.extractor, images, listed.sizes)
    norm, bands = config.pixel_norm or (*known.mean, *known.std), Bands()
    of_maps: dict[str, Bands | Places] = {"bands": bands} if config.bands else {}
    square = places = (config.places, config.places)
    if config.places:
        of_maps["places"] = Places(places := place_grid(config.places, size, known.own_size))
    grid = TokenGrid.named(config.token_grid)
    fields = {name: getattr(config, name) for name in knobs_affecting("features")}
    for name in ("dataset", "pixel_norm", "weights_path"):  # by content: norm_mean and norm_std, weights
        del fields[name]
    fields |= {
        "timm_model": known.name,
        "weights": weights,
        "img_size": list(size),
        "norm_mean": list(norm[:3]),
        "norm_std": list(norm[3:]),
        "precision": precision,
        "rings": bands.rings if config.bands else None,
        "low_sigma": bands.sigma if config.bands else None,
        "place_channels": PLACE_CHANNELS if config.places else None,
        "place_grid": None if places == square else list(places),
        **grid.fields(),
        **({"pixel_scale": listed.pixel_scale} if listed and listed.pixel_scale else {}),
        **({"of_maps": OF_MAPS} if of_maps else {}),
    }
    kept = {"bands": config.bands, f"places{config.places}": config.places, "mirror": config.mirror}
    name = config.extractor.replace("/", "_").replace(":", "_")
    parts = [name, "{}x{}".format(*size), grid.name, *(part for part, there in kept.items() if there)]
    return Identity(
        "-".join([*parts, identity_hash(fields)[:8]]),
        fields,
        config.extractor,
        size,
        config.weights_path,
        config.seed,
        grid,
        of_maps,
        config.mirror,
        precision,
    )


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The arithmetic of the backbone for the knob ``precision``: auto is float32 on a CPU, whatever it is
    quick in, so that figures are the same on all of them, and half precision on a GPU."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
