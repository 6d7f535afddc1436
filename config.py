"""The knobs of every script, one commented line each, their presets and their checks.

Edit a default here or give ``--knob value`` on the command line: both are the same thing. A preset
(``--preset``) changes several defaults at once; a knob named on the command line wins over the preset.
Standard library only, so that ``-h`` is quick."""

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import typing
from types import NoneType


class UserError(Exception):
    """A mistake of the user's, told in one line: what was expected, what came, what to do."""


class ClassError(UserError):
    """One class cannot be fitted, for what its images or features are; the others can."""


# Datasets and backbones by name: the single list that choices, help and loading are made from.
DATASETS = (
    *("cifar10", "CIFAR100", "CIFAR100_fine", "fashion", "STL10", "CatsvsDogs"),
    *("mvtec", "VisA", "BTAD", "MTD", "RealIAD", "lbot", "digits", "folder", "csv"),
)
OWN_PICTURES = ("folder", "csv")  # whose pictures get verdicts: some are held out for the threshold
BACKBONES = {  # name here -> timm model (the released code's names; any other timm name works as it is)
    "VIT": "vit_base_patch16_384.orig_in21k_ft_in1k",
    "VIT_L": "vit_large_patch16_384.augreg_in21k_ft_in1k",
    "deit": "deit_base_distilled_patch16_384.fb_in1k",
    "cait": "cait_s24_384.fb_dist_in1k",
    "clip": "vit_base_patch16_clip_224.openai",
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "efficientnet_lite1": "tf_efficientnet_lite1",
    "efficientnet_lite2": "tf_efficientnet_lite2",
    "dinov2_s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_l": "vit_large_patch14_dinov2.lvd142m",
    "dinov3_b": "vit_base_patch16_dinov3.lvd1689m",
}
# Image sizes where those are not timm's: DINOv2 is evaluated at 224, timm has its last training's 518.
SIZES = {f"dinov2_{letter}": (224, 224) for letter in "sbl"}
FUSIONS = ("class_attention", "hilo", "spectral", "bands", "none")
NORMALIZATIONS = ("auto", "none", "power_l2", "power_l2+whiten")
SCORES = ("latent", "likelihood", "joined")

# fmt: off
# Named sets of defaults. The knobs' own, as you edit them below, are the paper's: "paper" changes nothing.
PRESETS: dict[str, dict] = {
    "paper": {},
    "paper_L": {"extractor": "VIT_L", "fc_internal": 1024, "batch_size": 32},
    "released": {
        "fusion": "class_attention", "token_grid": "released8", "normalize": "none", "fc_internal": 768, "batch_size": 8,
        "pixel_norm": (0.485, 0.456, 0.406, 0.229, 0.224, 0.225), "precision": "float32",
    },
    # How these were chosen, and on what: results/choosing.md.
    "accurate": {
        "img_size": "auto", "mirror": True, "bands": True, "places": 14, "centre_pool": 0.1, "score": "joined",
        "fusion": "bands", "fc_internal": 128, "identity_start": True, "batch_size": 256, "least_steps": 400,
        "lr_init": 2e-3, "lr_schedule": "cosine", "feature_noise": 0.3, "holdout": 0.1, "baselines": True,
    },
}
PRESETS["quickstart"] = PRESETS["accurate"] | {
    "modelname": "quickstart", "dataset": "digits", "extractor": "efficientnet_lite0",
    "mirror": False,  # a mirrored digit is another one
    "places": 8,  # as many as a digit has pixels
    "least_steps": 100,  # for a minute in all
}
# fmt: on


def knob(affects, default, text, choices=(), low=None, high=None):
    """One knob: whether it affects the cached features, what is fitted to them, or only how a run goes; its
    default, its help, and the values it takes: one of ``choices``, or from ``low`` to ``high``."""
    meta = {"affects": affects, "help": text, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=meta)


features, fit, run = (functools.partial(knob, role) for role in ("features", "fit", "run"))

Size = tuple[int, int]
Six = tuple[float, float, float, float, float, float]
LARGEST_IMAGE = 4096  # pixels a side: no backbone was made for more


# fmt: off
@dataclasses.dataclass(frozen=True)
class Config:
    """All knobs, each given as it is or as a text. Frozen: a changed configuration is a new one
    (``dataclasses.replace``). Raises UserError on a bad value."""

    # most used
    preset: str = run("paper", "a named set of defaults (see PRESETS)", tuple(PRESETS))
    dataset: str = features("cifar10", "data set (docs/data.md has the folder layouts)", DATASETS)
    dataset_path: str | None = run(None, "folder of the raw images, or the file of csv; none: data/<dataset>")
    class_name: str = run("all", "normal class: one, several separated by commas, or all; one with a comma in its name alone")
    extractor: str = features("VIT", f"backbone: {', '.join(BACKBONES)} or any timm model name")
    modelname: str = run("foad_mfff", "name of the run: results go to runs/<modelname>/")
    n_seeds: int = run(1, "main.py: how many seeds to run: seed, seed + 1, ...; the table gives mean and std", low=1, high=10**6)
    threads: int = run(0, "CPU threads in all; 0: all cores; main.py shares them out among classes, each in a process of its own; 1: one class after the other; with cluster: of each task, 1 unless said", low=0, high=1024)
    restart: bool = run(False, "do again what is finished (extractor.py: the features; main.py and train.py: the classes) instead of going on where the last run ended")
    # run
    device: str = fit("auto", "auto (CUDA where there is one), cpu, cuda or cuda:N")
    seed: int = run(0, "first random seed; every class starts from it alike", low=0, high=2**31)
    keep: str = run("all", "what a run keeps beside the figures: all; weights of every class and seed (safetensors), but no pictures (score histograms, ROC, curves over epochs, contact sheets); or results alone", ("all", "weights", "results"))
    cluster: str | None = run(None, "extract and fit on the workers of a Dask cluster, given by its scheduler's address (tcp://host:8786) or file (docs/scale.md); none: on this machine")
    check: bool = run(False, "main.py: compare the AUROCs of the preset quickstart with the committed table, results/quickstart.csv, and end with exit status 1 where one differs by more than .0005")
    # data
    tiles: int = run(0, "cut the pictures of a folder of good ones into tiles of so many pixels a side, at their own resolution, a quarter overlapping: for defects that vanish in a picture made small; predict.py then gives one score, that of the worst tile, and one heat map for the whole picture; 0: whole pictures", low=0, high=4096)
    feature_path: str | None = run(None, "folder of the features of all data sets and backbones; none: features")
    prune: str | None = run(None, "extractor.py: list: tell what the features of each backbone and data set take of the disk; names of data sets, as in digits,cifar10: drop all others' features")
    pretrained: bool = run(False, "True: the features are already extracted, stop if they are not (extractor.py: check every row of them, the images need not be there); False: extract what is missing")
    # backbone and extraction
    weights_path: str | None = features(None, "local weights instead of the hub's: .pth, .safetensors, .npz where timm reads it; random: untrained")
    img_size: Size | str | None = features(None, "image size fed to the backbone, 384 or 384x256 (height x width); none: the backbone's; auto: in the shape of the training pictures, of 100352 pixels, fewer where the pictures have fewer, but at least of the backbone's own size; small pictures go into a CNN enlarged 5 times (at least 96x96) where that is less")
    pixel_norm: Six | None = features(None, "mean and standard deviation that pixels are normalised by, six numbers separated by commas; none: the backbone's")
    token_grid: str = features("full", "patch tokens kept: full, a number g (average-pooled to g x g), or releasedg, as in released8: pooled as the released code did, which mixes tokens with channels")
    bands: bool = features(False, "also keep and use a band token: the low band, the ring energies and the peak energy of the backbone's maps at several depths")
    places: int = features(0, "also keep and use place tokens, for defects of a small place: the maps of middle depths on a grid of so many rows and columns, in the image's shape, and of as many more as it has more pixels than the backbone's own size; 0: none", low=0, high=64)
    precision: str = features("auto", "backbone arithmetic: float32, bfloat16, float16; auto: float32 on a CPU, half precision on a GPU", ("auto", "float32", "bfloat16", "float16"))
    mirror: bool = features(False, "average what the backbone gives of an image with what it gives of its mirror image: more accurate, in twice the time; not where left and right have a meaning")
    extract_batch: int = run(0, "images per backbone pass, at most 256; 0: chosen for the device", low=0, high=65536)
    workers: int = run(-1, "CPU: threads that each read and compute whole batches (0: one batch at a time, by all threads); GPU: threads that read images; -1: chosen for the machine", low=-1, high=256)
    unreadable: str = run("stop", "images that cannot be read: stop (after all others are done, naming each), or skip (they are left out, and listed)", ("stop", "skip"))
    compile: bool = run(False, "torch.compile the flow in training (on a GPU with CUDA graphs, 4 times as quick on an H200): pays on long runs only")
    # flow
    n_coupling_blocks: int = fit(4, "coupling layers K", low=1, high=1000)
    fc_internal: int | None = fit(None, "hidden width H of the subnets; none: C, as in the paper", low=1, high=10**6)
    clamp: float = fit(3.0, "soft clamp alpha of the log-scales", low=1e-06, high=1000.0)
    fusion: str = fit("hilo", "multi-frequency fusion module", FUSIONS)
    alpha: float = fit(0.5, "hilo: share of the heads given to the low frequencies", low=0.0, high=1.0)
    window: int = fit(3, "hilo: side of a window in patches", low=1, high=1024)
    identity_start: bool = fit(False, "zero the last layer of every subnet, so that training starts from the identity flow")
    # training
    normalize: str = fit("auto", "features before the flow, fitted on normal training features; auto: none for transformers, as released, power_l2+whiten for CNNs", NORMALIZATIONS)
    centre_pool: float = fit(0.0, "semantic token re-pooled from the patches under a centred Gaussian, its sigma in shares of the grid's side; 0: the backbone's own", low=0.0, high=100.0)
    batch_size: int = fit(32, "images per training step", low=1, high=10**7)
    meta_epochs: int = fit(1, "evaluations on the test set; each follows sub_epochs epochs", low=1, high=10**6)
    sub_epochs: int = fit(1, "epochs of training per meta epoch", low=1, high=10**6)
    least_steps: int = fit(0, "training steps at least: a small class gets more epochs until it has had so many", low=0, high=10**7)
    lr_init: float = fit(5e-5, "Adam learning rate", low=0.0, high=1e+38)
    lr_schedule: str = fit("constant", "learning rate over the run: constant or cosine (to zero)", ("constant", "cosine"))
    max_grad_norm: float = fit(0.0, "clip the gradient to this norm; 0: no clipping, as in the released code", low=0.0, high=1e+30)
    feature_noise: float = fit(0.0, "standard deviation of Gaussian noise added to the normalised semantic token in training", low=0.0, high=1000000.0)
    holdout: float | None = fit(None, "share of the normal training images held out to measure likelihood, and for thresholds; none: a tenth of one's own pictures (folder, csv), which get verdicts, 0 of other data sets", low=0.0, high=0.5)
    # scoring
    score: str = fit("latent", "anomaly score: latent (mean z^2), likelihood (negative log-likelihood); joined: the flow moves the places of the image instead, and its least likely ones are joined with a density of the image (needs places)", SCORES)
    false_alarms: float = run(0.05, "share of normal pictures that may be called anomalous: the threshold, from the held-out normal ones", low=1e-06, high=0.5)
    baselines: bool = run(False, "main.py: nearest neighbours and Gaussian on the same features, in the same table")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, value_of(field, getattr(self, field.name)))
        for holds, line in FITS:
            if not holds(self):
                raise UserError(line.format(**vars(self)))


FITS = (  # what has to hold of the knobs together -> the line where it does not
    (lambda c: all(re.fullmatch(r"(?!(classes|figures)$)[^\s.~-][^\\]{0,99}", part) for part in c.modelname.split("/")), "modelname: expected a plain name of at most 100 characters without a leading dot, dash or ~, and neither classes nor figures, got {modelname!r}"),
    (lambda c: re.fullmatch("full|(released)?(?!0+$)[0-9]{1,4}", c.token_grid), "token_grid: expected full, a number of patches per side, or released and a number, got {token_grid!r}"),
    (lambda c: not isinstance(c.img_size, tuple) or len(c.img_size) == 2 and all(side in range(1, LARGEST_IMAGE + 1) for side in c.img_size), "img_size: expected a height and a width of 1 to 4096 pixels, got {img_size}"),
    (lambda c: c.pixel_norm is None or len(c.pixel_norm) == 6 and all(isinstance(x, int | float) and math.isfinite(x) for x in c.pixel_norm) and min(c.pixel_norm[3:]) > 0, "pixel_norm: expected three finite numbers and three positive ones, got {pixel_norm}"),
    (lambda c: not 0 < c.centre_pool < 0.01, "centre_pool: expected 0 or at least 0.01 of a side, got {centre_pool:g}"),  # narrower, a Gaussian divides by nothing
    (lambda c: c.score != "joined" or c.places and c.least_steps and held_share(c.holdout, c.dataset), "score joined needs place tokens, a number of training steps and held-out normal images: set places, least_steps and holdout, say 14, 400 and 0.1"),
    (lambda c: c.fusion != "bands" or c.score == "joined", "fusion bands is of places: it needs score joined"),
)
# fmt: on

# ---------------------------------------------------------------- values
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters; bytes that are not UTF-8


def size_of(text):
    """(height, width) of 384x256, or of 384."""
    sides = tuple(int(side) for side in text.lower().split("x"))
    return sides * 2 if len(sides) == 1 else sides


KINDS = {  # type of a knob -> what it is called, and what makes it of a text
    bool: ("True or False", lambda text: {"true": True, "false": False}[text.lower()]),
    int: ("a whole number", int),
    float: ("a number", float),
    str: ("a text", str),
    Size: ("a size, as in 224 or 384x256", size_of),
    Six: ("six numbers, as in 0.5,0.5,0.5,0.2,0.2,0.2", lambda text: tuple(map(float, text.split(",")))),
}


def value_of(field, given):
    """A knob's value, given as it is or as a text. Raises UserError unless it fits type, choices and range."""
    kind, *others = typing.get_args(field.type) or (field.type,)
    low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
    for word in (*(None if other is NoneType else "auto" for other in others), *choices):
        if str(given).lower() == str(word).lower():
            return word
    value, (called, parse) = given, KINDS[kind]
    if isinstance(given, str):
        with contextlib.suppress(KeyError, ValueError):
            value = parse(given)
    right = type(value) is (typing.get_origin(kind) or kind) or kind is float and type(value) is int
    if not right or low is not None and not low <= value <= high:
        bounds = "" if low is None else f" from {low} to {high}"
        raise UserError(f"{field.name}: expected {called}{bounds}, got {given!r}")
    if choices:
        raise UserError(f"{field.name}: {unknown('value', value, choices)}")
    if kind is str and NO_TEXT.search(value):
        raise UserError(f"{field.name}: expected UTF-8 without control characters, got {value[:100]!r}")
    return value


def unknown(kind, got, known, all_of_them="-h lists them all"):
    """The line for a name that is not in ``known``, with the nearest one; a long list is only pointed to."""
    near = difflib.get_close_matches(got, known, 1)
    hint = f", did you mean {near[0]}" if near else ""
    listed = f"Expected one of: {', '.join(known)}" if len(known) <= 30 else all_of_them
    return f"unknown {kind} {got!r}{hint}. {listed}"


# ---------------------------------------------------------------- configurations
def make_config(given):
    """The configuration of ``given`` {knob: value or text}: defaults, then the preset's, then the given ones.
    Raises UserError."""
    for name in given:
        if name not in FIELDS:
            raise UserError(unknown("knob", name, FIELDS))
    preset = value_of(FIELDS["preset"], given.get("preset", Config.preset))
    return Config(**(PRESETS[preset] | given))


def changed(config):
    """{knob: value} of the knobs that differ from this file's defaults."""
    return {name: value for name, value in vars(config).items() if value != FIELDS[name].default}


def knobs_affecting(*roles: str) -> tuple[str, ...]:
    """The names of the knobs that affect one of ``roles`` (features, fit, run), in the order of this file."""
    return tuple(name for name, field in FIELDS.items() if field.metadata["affects"] in roles)


def held_share(holdout, dataset):
    """The share that is held out: the knob ``holdout``; where it is None, a tenth of one's own pictures."""
    return (0.1 if dataset in OWN_PICTURES else 0.0) if holdout is None else holdout
