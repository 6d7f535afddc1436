"""Which features a configuration asks for, found without loading the backbone."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import datasets
from backbone import backbones
from backbone.token_grid import OF_MAPS, PLACE_CHANNELS, Bands, Places, TokenGrid, place_grid
from cache.feature_cache import feature_folder
from cache.store import identity_hash
from config import LARGEST_IMAGE, Config, UserError, knobs_affecting


@dataclasses.dataclass(frozen=True)
class Identity:
    """All that the features of an image depend on, besides the image.

    folder, fields: of their store, and what must be found there. of_maps: what is kept of the maps of several
    depths, by the name of its array. precision: of the backbone, as torch names it."""

    folder: Path
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
        return hash(self.folder)

    def what_is_kept(self, backbone: backbones.Backbone) -> tuple[dict[str, tuple[int, ...]], dict]:
        """The shape of each array that an image leaves, and the store's fields that tell what they are."""
        shape = self.grid.cached_shape(backbone.grid)
        n_tokens = 1 + math.prod(shape)
        kind = "map" if backbone.is_map else "tokens"
        fields = {"n_feat": backbone.n_feat, "kind": kind, "grid": shape, "tokens": n_tokens}
        shapes: dict[str, tuple[int, ...]] = {"tokens": (n_tokens, backbone.n_feat)}
        if self.of_maps:
            depths = backbone.band_depths()
            channels = backbone.channels_of(depths)
            fields |= {"depths": depths, "band_channels": channels}
            shapes |= {name: kept.shape(channels) for name, kept in self.of_maps.items()}
        if "places" in shapes:
            fields["place_shape"] = shapes["places"]
        return shapes, fields


def cache_identity(
    config: Config,
    device: torch.device,
    img_size: Sequence[int] | None = None,
    pixel_scale: dict | None = None,
) -> Identity:
    """The features that a configuration asks for. Raises UserError.

    img_size: that img_size auto has chosen (``size_for``). pixel_scale: the ranges of pixels of more than
    eight bits (images/pixel_scale.py); images without such pixels have none. The fields are the knobs that
    affect the features, with what device, pictures and backbone decide put in for those left open."""
    own_size, defaults = backbones.own_size(config.extractor), backbones.timm_defaults(config.extractor)
    height, width = img_size or (config.img_size if isinstance(config.img_size, tuple) else own_size)
    size = (height, width)
    norm, bands = config.pixel_norm or (*defaults.mean, *defaults.std), Bands()
    of_maps: dict[str, Bands | Places] = {"bands": bands} if config.bands else {}
    square = places = (config.places, config.places)
    if config.places:
        of_maps["places"] = Places(places := place_grid(config.places, size, own_size))
    grid = TokenGrid.named(config.token_grid)
    precision = str(backbones.choose_precision(config.precision, device)).removeprefix("torch.")
    fields = {name: getattr(config, name) for name in knobs_affecting("features")}
    for name in ("dataset", "pixel_norm", "weights_path"):  # by content: norm_mean and norm_std, weights
        del fields[name]
    fields |= {
        "timm_model": backbones.timm_name(config.extractor),
        "weights": backbones.weights_source(config.extractor, config.weights_path, config.seed),
        "img_size": size,
        "norm_mean": tuple(norm[:3]),
        "norm_std": tuple(norm[3:]),
        "precision": precision,
        "rings": bands.rings if config.bands else None,
        "low_sigma": bands.sigma if config.bands else None,
        "place_channels": PLACE_CHANNELS if config.places else None,
        "place_grid": None if places == square else places,
        **grid.fields(),
        **({"pixel_scale": pixel_scale} if pixel_scale else {}),
        **({"of_maps": OF_MAPS} if of_maps else {}),
    }
    kept = {"bands": config.bands, f"places{config.places}": config.places, "mirror": config.mirror}
    name = config.extractor.replace("/", "_").replace(":", "_")
    parts = [name, "{}x{}".format(*size), grid.name, *(part for part, there in kept.items() if there)]
    return Identity(
        feature_folder(config.feature_path) / "-".join([*parts, identity_hash(fields)[:8]]),
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


# ---------------------------------------------------------------- the size of the images
PIXELS = 2 * 224 * 224
SIZES_READ = 200  # training pictures whose sizes decide
ANOTHER_SHAPE = math.log(1.5)  # so much longer or shorter: a class is told of
ENLARGED, LEAST_SIDE = 5, 96  # small pictures for a CNN: so many times as large, so many pixels at least


def size_for(extractor: str, images: datasets.ImageSet | None) -> tuple[int, int]:
    """The size, of about PIXELS, that the training pictures ask for (``size_in_shape``); the
    backbone's own where none can be read, or where it takes no other. Raises UserError without images."""
    if images is None:
        raise UserError(f"img_size auto: no features of {extractor} are there; run python extractor.py")
    own, found = backbones.own_size(extractor), images.sizes(SIZES_READ)
    if not found:
        return own
    backbone = backbones.outline(extractor, own)
    enlarged = ENLARGED if backbone.is_map else math.inf  # a transformer's positions are of its own size
    size = size_in_shape(np.concatenate(list(found.values())), PIXELS, own, backbone.stride, enlarged)
    if not backbones.takes(extractor, size):
        print(f"img_size auto: {extractor} takes {own[0]}x{own[1]} only", flush=True)
        return own
    shapes = {name: np.median([height / width for height, width in sizes]) for name, sizes in found.items()}
    others = [n for n, shape in shapes.items() if abs(math.log(shape * size[1] / size[0])) > ANOTHER_SHAPE]
    if others:
        print(
            f"img_size auto: pictures of {', '.join(others)} are squeezed into {size[0]}x{size[1]}; a class "
            "of another shape keeps it in a data set of its own",
            flush=True,
        )
    return size


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
