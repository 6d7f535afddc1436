"""What a detector and its training take of memory, estimated before it is asked for: a mistyped size is a
line then, and not a machine that hangs."""

import math

from backbone.token_grid import Bands
from config import Config
from utils import check_memory

FLOAT = 4  # bytes


def joint_channels(config: Config, features: dict) -> int:
    bands = sum(features["band_channels"]) * len(Bands().statistics) if config.bands else 0
    return features["n_feat"] + bands


def features_floats(config: Config, features: dict) -> int:
    """Roughly the numbers that any detector of these features holds: the matrices that whiten its inputs."""
    places, width = features["place_shape"] if config.places else (0, 0)
    return joint_channels(config, features) ** 2 + places * width**2 + 17 * math.prod(features["grid"]) ** 2


def parameters(config: Config, channels: int, fused: bool) -> int:
    """Roughly the parameters of a flow over so many channels: those of its linear layers, and of the largest
    fusion there is."""
    half, hidden = channels / 2, config.fc_internal or channels
    subnet = half * hidden + 2 * hidden**2 + 2 * hidden * channels
    fusion = 3 * half**2 + half * hidden if fused else 0
    return math.ceil(2 * config.n_coupling_blocks * (subnet + fusion))


def detector_floats(config: Config, features: dict) -> int:
    """Roughly the numbers that a detector holds: its flow, and what all detectors of the features hold."""
    joined = joint_channels(config, features)
    if config.score == "joined":
        joined = features["place_shape"][1]
    return parameters(config, joined, config.fusion != "none") + features_floats(config, features)


def check_detector(config: Config, features: dict) -> None:
    """Raise UserError when a detector of these features is more than the memory holds."""
    check_memory(
        f"a detector of {features['n_feat']} channels and {config.n_coupling_blocks} coupling layers",
        FLOAT * detector_floats(config, features),
        "choose a smaller fc_internal or n_coupling_blocks",
    )


def training_bytes(config: Config, features: dict, n_images: int) -> int:
    """Roughly the bytes that fitting to so many images takes: weights, gradients and Adam's two moments, a
    batch's tokens as they are, normalised and with their gradients, and what each coupling layer keeps for
    the backward pass, the queries of its attention heads the most of it."""
    batch, channels = min(config.batch_size, n_images), features["n_feat"]
    heads = 8 if config.fusion != "none" else 0
    kept = 2 * config.n_coupling_blocks * (6 * (config.fc_internal or channels) + 4 * channels * (1 + heads))
    return FLOAT * (
        4 * detector_floats(config, features) + batch * (3 * features["tokens"] * channels + kept)
    )


def check_training(config: Config, features: dict, n_images: int) -> None:
    """Raise UserError when fitting to so many images is more than the memory holds."""
    check_memory(
        f"training in batches of {min(config.batch_size, n_images)}",
        training_bytes(config, features, n_images),
        "choose a smaller batch_size, fc_internal, n_coupling_blocks or token_grid",
    )
