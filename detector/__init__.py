"""The detector of one normal class: its rows, normalisation, scores, checkpoint, calibration,
pictures in and scores out; the simple detectors beside it; which classes of a run are finished.

May import model, freq_fusion, backbone, cache, datasets, images, utils, shell and config."""
