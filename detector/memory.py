"""What a detector and its training take of memory, estimated before it is asked for: a mistyped size is a
line then, and not a machine that hangs."""

import math

from backbone.token_grid import Bands
from config import Config
from utils import check_memory

FLOAT = 4  # bytes


def detector_floats(config: Config, features: dict) -> int:
    """Roughly the numbers that a detector holds: of the linear layers of its flow, of the largest fusion
    there is, and of the matrices that whiten its inputs. features: the sidecar of the cache."""
    bands = sum(features["band_channels"]) * len(Bands().statistics) if config.bands else 0
    joint = features["n_feat"] + bands
    places, width = features["place_shape"] if config.places else (0, 0)
    channels = width if config.score == "joined" else joint
    half, hidden = channels / 2, config.fc_internal or channels
    subnet = half * hidden + 2 * hidden**2 + 2 * hidden * channels
    if config.fusion != "none":
        subnet += 3 * half**2 + half * hidden
    whitening = joint**2 + places * width**2 + 17 * math.prod(features["grid"]) ** 2
    return math.ceil(2 * config.n_coupling_blocks * subnet) + whitening


def training_bytes(config: Config, features: dict, batch: int) -> int:
    """Roughly the bytes that fitting by batches of so many images takes: weights, gradients and Adam's two
    moments, a batch's tokens as they are, normalised and with their gradients, and what each coupling layer
    keeps for the backward pass, the queries of its attention heads the most of it."""
    channels, heads = features["n_feat"], 8 if config.fusion != "none" else 0
    kept = 2 * config.n_coupling_blocks * (6 * (config.fc_internal or channels) + 4 * channels * (1 + heads))
    images = batch * (3 * features["tokens"] * channels + kept)
    return FLOAT * (4 * detector_floats(config, features) + images)


def check(config: Config, features: dict, batch: int = 0) -> None:
    """Raise UserError when a detector of these features, or fitting it by batches of so many images, is more
    than the memory holds."""
    held = FLOAT * detector_floats(config, features)
    check_memory(
        f"a detector of {features['n_feat']} channels and {config.n_coupling_blocks} coupling layers"
        + (f" and its training in batches of {batch}" if batch else ""),
        training_bytes(config, features, batch) if batch else held,
        "choose a smaller fc_internal, n_coupling_blocks, batch_size or token_grid",
    )
