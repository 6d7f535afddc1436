"""Which features a configuration asks for, found without loading the backbone."""

import dataclasses

import torch

from backbone import backbones
from backbone.token_grid import OF_MAPS, PLACE_CHANNELS, Bands, OfMaps, Places, TokenGrid, place_grid
from cache.feature_cache import ImageList
from config import Config, knobs_affecting
from datasets import ImageSet
from shell.files import checksum


@dataclasses.dataclass(frozen=True)
class Identity:
    """All that the features of an image depend on, besides the image.

    name, fields: of their store, and what must be found there, as JSON has it. of_maps: what is kept of the
    maps of several depths, by the name of its array."""

    name: str
    fields: dict = dataclasses.field(hash=False)
    extractor: str
    img_size: tuple[int, int]
    weights_path: str | None
    seed: int
    grid: TokenGrid
    of_maps: OfMaps = dataclasses.field(hash=False)


def cache_identity(
    config: Config, device: torch.device, images: ImageSet | None = None, listed: ImageList | None = None
) -> Identity:
    """The features that a configuration asks for. Raises UserError.

    listed: has the sizes that img_size auto has chosen, to which that for the ``images`` is added, and the
    ranges of pixels of more than eight bits (images/images.py). The fields are the knobs that affect the
    features, with what device, pictures and backbone decide put in for those left open."""
    precision = config.precision
    if precision == "auto" and device.type == "cpu":
        precision = "float32"  # whatever it is quick in, so that figures are the same on all CPUs
    elif precision == "auto":
        precision = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    known = backbones.timm_model(config.extractor)
    size = config.img_size if isinstance(config.img_size, tuple) else known.own_size
    if config.img_size == "auto" and listed:
        size = backbones.size_for(config.extractor, images, listed.sizes)
    norm, of_maps = config.pixel_norm or (*known.mean, *known.std), OfMaps()
    square = places = (config.places, config.places)
    if config.bands:
        of_maps["bands"] = Bands()
    if config.places:
        of_maps["places"] = Places(places := place_grid(config.places, size, known.own_size))
    grid = TokenGrid.named(config.token_grid)
    by_content = ("dataset", "pixel_norm", "weights_path")  # norm_mean and norm_std, weights
    fields = {name: getattr(config, name) for name in knobs_affecting("features") if name not in by_content}
    fields |= {
        "timm_model": known.name,
        "weights": backbones.weights_source(config.extractor, config.weights_path, config.seed),
        "img_size": list(size),
        "norm_mean": list(norm[:3]),
        "norm_std": list(norm[3:]),
        "precision": precision,
        "rings": Bands.rings if config.bands else None,
        "low_sigma": Bands.sigma if config.bands else None,
        "place_channels": PLACE_CHANNELS if config.places else None,
        "place_grid": None if places == square else list(places),
        "token_grid": grid.name,
        "pooling": grid.pooling,
        **dict.fromkeys(("window", "centre_share")),  # which no grid has now
        **({"pixel_scale": listed.pixel_scale} if listed and listed.pixel_scale else {}),
        **({"of_maps": OF_MAPS} if of_maps else {}),
    }
    kept = {"bands": config.bands, f"places{config.places}": config.places, "mirror": config.mirror}
    extractor = config.extractor.replace("/", "_").replace(":", "_")
    told = (part for part, there in kept.items() if there)
    name = "-".join([extractor, "{}x{}".format(*size), grid.name, *told, checksum(fields)[:8]])
    return Identity(name, fields, config.extractor, size, config.weights_path, config.seed, grid, of_maps)
