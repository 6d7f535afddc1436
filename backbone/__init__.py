"""From images to tokens in the cache: timm models and weights, resizing, tokens of all depths, token grids.

Knows nothing of detectors. May import cache, datasets, images, utils, shell and config."""
