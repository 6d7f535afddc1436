"""Features by content: a store per backbone, its shards, and data sets as look-ups from images to rows.

The only owner of the format. May import datasets, images, utils, shell and config."""
