"""Which features a configuration asks for, found without loading the backbone: the fields and the folder of
their store, the size of the images, the shape of each array."""

import dataclasses
import math

import numpy as np
import torch

import datasets
from backbone import backbones
from backbone.token_grid import OF_MAPS, PLACE_CHANNELS, Bands, Places, TokenGrid, place_grid
from cache.feature_cache import feature_folder
from cache.store import CacheIdentity, identity_hash
from config import LARGEST_IMAGE, Config, UserError, auto_pixels, knobs_affecting


# ---------------------------------------------------------------- what is extracted
def token_grid(config: Config) -> TokenGrid:
    return TokenGrid.named(config.token_grid, config.window, config.centre_pool)


def maps_kept(config: Config, img_size: tuple[int, int]) -> dict[str, Bands | Places]:
    """What is kept of the maps of several depths of images of that size, by the name of its array."""
    kept: dict[str, Bands | Places] = {}
    if config.bands:
        kept["bands"] = Bands()
    if config.places:
        grid = place_grid(config.places, img_size, backbones.own_size(config.extractor))
        kept["places"] = Places(grid)
    return kept


def settled(
    config: Config, device: torch.device, images: datasets.ImageSet | None, size: list[int] | None = None
) -> Config:
    """The configuration with what the machine and the pictures decide put in: precision, and size of the
    images, which is ``size`` where that was decided before. Raises UserError where there are no images to
    decide it."""
    precision = str(backbones.choose_precision(config.precision, device)).removeprefix("torch.")
    img_size = config.img_size
    if auto_pixels(img_size) and size:
        img_size = (size[0], size[1])
    elif auto_pixels(img_size) and images is not None:
        img_size = size_for(config, images)
    elif auto_pixels(img_size):
        raise UserError(
            f"img_size auto: no features of {config.extractor} are there; run python extractor.py"
        )
    return dataclasses.replace(config, precision=precision, img_size=img_size)


def cache_identity(config: Config, pixel_scale: dict | None = None) -> CacheIdentity:
    """Which features a ``settled`` configuration asks for, found without loading the backbone. Raises
    UserError.

    pixel_scale: the ranges of pixels of more than eight bits (images/pixel_scale.py); images without such
    pixels have none. The fields are the knobs that affect the features, with what the backbone decides put in
    for those left open; precision is none of them while it is open."""
    defaults, grid = backbones.timm_defaults(config.extractor), token_grid(config)
    fields = {name: getattr(config, name) for name in knobs_affecting("features")}
    del fields["weights_path"]  # recorded by content, as "weights"
    del fields["pixel_norm"]
    del fields["dataset"]
    norm, bands = config.pixel_norm or (*defaults.mean, *defaults.std), Bands()
    img_size = backbones.image_size(config)
    places = (config.places, config.places)
    if config.places:
        places = place_grid(config.places, img_size, backbones.own_size(config.extractor))
    fields |= {
        "timm_model": backbones.timm_name(config.extractor),
        "weights": backbones.weights_source(config),
        "img_size": img_size,
        "norm_mean": tuple(norm[:3]),
        "norm_std": tuple(norm[3:]),
        "rings": bands.rings if config.bands else None,
        "low_sigma": bands.sigma if config.bands else None,
        "place_channels": PLACE_CHANNELS if config.places else None,
        "place_grid": None if places == (config.places, config.places) else places,  # a square goes without
        **grid.fields(),
    }
    if pixel_scale:
        fields["pixel_scale"] = pixel_scale
    if config.precision == "auto":
        del fields["precision"]
    if config.bands or config.places:
        fields["of_maps"] = OF_MAPS
    kept = {"bands": config.bands, f"places{config.places}": config.places, "mirror": config.mirror}
    name = config.extractor.replace("/", "_").replace(":", "_")
    parts = [name, "{}x{}".format(*img_size), grid.key, *(part for part, there in kept.items() if there)]
    return CacheIdentity(feature_folder(config) / "-".join([*parts, identity_hash(fields)[:8]]), fields)


# ---------------------------------------------------------------- the size of the images
SIZES_READ = 200  # training pictures whose sizes decide
ANOTHER_SHAPE = math.log(1.5)  # so much longer or shorter: a class is told of
ENLARGED, LEAST_SIDE = 5, 96  # small pictures for a CNN: so many times as large, so many pixels at least


def size_for(config: Config, images: datasets.ImageSet) -> tuple[int, int]:
    """The size that the training pictures ask for (``size_in_shape``); the backbone's own where none can be
    read, or where it takes no other."""
    own, found = backbones.own_size(config.extractor), images.sizes(SIZES_READ)
    if not found:
        return own
    backbone = backbones.outline(dataclasses.replace(config, img_size=None))
    every = np.concatenate(list(found.values()))
    enlarged = ENLARGED if backbone.is_map else math.inf  # a transformer's positions are of its own size
    size = size_in_shape(every, auto_pixels(config.img_size) or 0, own, backbone.stride, enlarged)
    if not backbones.takes(config, size):
        print(f"img_size auto: {config.extractor} takes {own[0]}x{own[1]} only", flush=True)
        return own
    if others := of_another_shape(found, size):
        print(
            f"img_size auto: pictures of {', '.join(others)} are squeezed into {size[0]}x{size[1]}; a class "
            "of another shape keeps it in a data set of its own",
            flush=True,
        )
    return size


def of_another_shape(sizes: dict[str, list[tuple[int, int]]], size: tuple[int, int]) -> list[str]:
    """The classes whose median shape is quite another than that of ``size``."""
    found = {name: np.median([height / width for height, width in own]) for name, own in sizes.items()}
    return [name for name, ratio in found.items() if abs(math.log(ratio * size[1] / size[0])) > ANOTHER_SHAPE]


def size_in_shape(
    sizes: np.ndarray, pixels: int, own_size: tuple[int, int], stride: int, enlarged: float
) -> tuple[int, int]:
    """Height and width in multiples of ``stride``, in the median shape of pictures of the ``sizes`` (n, 2).

    About so many ``pixels``, but no more than the median picture has. At least those of the backbone's own
    size, or where that is less, those of the median picture ``enlarged`` so many times, of a square of
    LEAST_SIDE if they are still fewer."""
    ratio, area = np.median(sizes[:, 0] / sizes[:, 1]), np.median(np.prod(sizes.astype(float), 1))
    least = min(math.prod(own_size), max(enlarged**2 * area, LEAST_SIDE**2))
    area = max(min(pixels, area), least)
    sides = (math.sqrt(area * ratio), math.sqrt(area / ratio))
    height, width = (min(max(1, round(side / stride)), LARGEST_IMAGE // stride) * stride for side in sides)
    return height, width


# ---------------------------------------------------------------- what an image leaves
def what_is_kept(config: Config, backbone: backbones.Backbone) -> tuple[dict[str, tuple[int, ...]], dict]:
    """The shape of each array that an image leaves, and the cache's fields that tell what they are."""
    grid, of_maps = token_grid(config), maps_kept(config, backbone.img_size)
    shape = grid.cached_shape(backbone.grid)
    n_tokens = 1 + grid.n_tokens(shape)
    fields = {
        "n_feat": backbone.n_feat,
        "kind": "map" if backbone.is_map else "tokens",
        "grid": shape,
        "tokens": n_tokens,
    }
    shapes: dict[str, tuple[int, ...]] = {"tokens": (n_tokens, backbone.n_feat)}
    if of_maps:
        depths = backbone.band_depths()
        channels = backbone.channels_of(depths)
        fields |= {"depths": depths, "band_channels": channels}
        shapes |= {name: kept.shape(channels) for name, kept in of_maps.items()}
    if config.places:
        fields["place_shape"] = shapes["places"]
    return shapes, fields
