"""The feature cache: its files and their checksums, its writer, its growth, and whether it can be used again.

The only owner of the format. May import datasets, images, utils, shell and config."""
