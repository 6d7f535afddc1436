"""Where raw images come from: image files, folder layouts, the binary files of published data sets.

Owns no labels' meaning and no tensors. May import utils, shell and config."""
