"""What any detector of some features takes of memory, whatever the other knobs of its fit are: a grid that
every fit refuses is refused before its extraction."""

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


def check_features(config: Config, features: dict) -> None:
    """Raise UserError when any detector of these features is more than the memory holds."""
    rows, columns = features["grid"]
    check_memory(
        f"a detector of {rows} x {columns} patch tokens",
        FLOAT * features_floats(config, features),
        "choose a smaller token_grid or img_size",
    )
