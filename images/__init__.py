"""Where raw images come from: image files, folder layouts, the binary files of published data sets, folders
in which pictures arrive.

Owns no labels' meaning and no tensors. May import utils, shell and config."""
