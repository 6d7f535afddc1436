"""The knobs of every script, one commented line each, their presets and their checks.

Edit a default here or give ``--knob value`` on the command line: both are the same thing. A preset
(``--preset``) changes several defaults at once; a knob named on the command line wins over the preset.
Standard library only, so that ``-h`` is quick."""

import dataclasses
import difflib
import math
import re
import typing


class UserError(Exception):
    """A mistake of the user's, told in one line: what was expected, what came, what to do."""


class ClassError(UserError):
    """One class cannot be fitted, for what its images or features are; the others can."""


# Datasets and backbones by name: the single list that choices, help and loading are made from.
DATASETS = (
    *("cifar10", "CIFAR100", "CIFAR100_fine", "fashion", "STL10", "CatsvsDogs"),
    *("mvtec", "VisA", "BTAD", "MTD", "lbot", "digits", "folder"),
)
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
FUSIONS = ("class_attention", "hilo", "spectral", "none")
NORMALIZATIONS = ("auto", "none", "power_l2", "power_l2+whiten")
SCORES = ("latent", "likelihood", "latent_knn", "joined")
BASES = ("normal", "kernel")
FUSION_TOKENS = ("last", "middle")


ROLES = (
    "features",
    "fit",
    "run",
)  # what a knob affects: the cached features, what is fitted to them, or only how a run goes


SCRIPTS = ("extractor.py", "train.py", "main.py")
FITTING = SCRIPTS[1:]  # what reads a knob that affects the fit, unless the knob says otherwise


def knob(default, text, choices=None, low=None, high=None, *, affects, scripts=None):
    """One knob: its default, its help, the values it takes (one of ``choices``, or from ``low`` to ``high``),
    its role (ROLES), and the scripts that read it: the others refuse it."""
    if scripts is None:
        scripts = FITTING if affects == "fit" else SCRIPTS
    meta = {
        "help": text,
        "choices": choices,
        "low": low,
        "high": high,
        "affects": affects,
        "scripts": scripts,
    }
    return dataclasses.field(default=default, metadata=meta)


def knobs_affecting(*roles: str) -> tuple[str, ...]:
    """The names of the knobs that affect one of ``roles`` (ROLES), in the order of this file."""
    return tuple(field.name for field in dataclasses.fields(Config) if field.metadata["affects"] in roles)


# The knobs that a first run needs, at the head of the help.
MOST_USED = (
    "preset",
    "dataset",
    "dataset_path",
    "class_name",
    "extractor",
    "modelname",
    "n_seeds",
    "threads",
    "restart",
    "sweep",
)

# The sections of the help: the first knob of each -> its title.
SECTIONS = {
    "preset": "run",
    "dataset": "data",
    "extractor": "backbone and extraction",
    "n_coupling_blocks": "flow",
    "normalize": "training",
    "score": "scoring",
}

Size = tuple[int, int]
AUTO = "auto"
ImageSize = Size | str | None
Six = tuple[float, float, float, float, float, float]
LARGEST_IMAGE = 4096  # pixels a side: no backbone was made for more


@dataclasses.dataclass(frozen=True)
class Config:
    """All knobs. Frozen: a changed configuration is a new one (``dataclasses.replace``). Raises UserError on
    a bad value."""

    # --- run
    preset: str = knob(
        "paper",
        "paper, paper_L, released, accurate, quickstart or ablation: a named set of defaults (see PRESETS)",
        affects="run",
    )
    modelname: str = knob(
        "foad_mfff", "name of the run: results go to runs/<modelname>/", affects="run", scripts=FITTING
    )
    device: str = knob(
        "auto", "auto (CUDA where there is one), cpu, cuda or cuda:N", affects="fit", scripts=SCRIPTS
    )
    seed: int = knob(
        0, "first random seed; every class starts from it alike", low=0, high=2**31, affects="run"
    )
    n_seeds: int = knob(
        1,
        "how many seeds to run: seed, seed + 1, ...; the table gives mean and std",
        low=1,
        high=10**6,
        affects="run",
        scripts=("main.py",),
    )
    threads: int = knob(
        0,
        "CPU threads in all; 0: all cores; main.py shares them out among classes, each in a process of its "
        "own; 1: one class after the other",
        low=0,
        high=1024,
        affects="run",
    )
    verbose: bool = knob(True, "print the loss and AUROC of every epoch", affects="run", scripts=FITTING)
    keep: str = knob(
        "all",
        "what a run keeps beside the figures: all; weights of every class and seed (safetensors), but no "
        "pictures (score histograms, ROC, curves over epochs, contact sheets); or results alone",
        choices=("all", "weights", "results"),
        affects="run",
        scripts=FITTING,
    )
    sweep: str | None = knob(
        None,
        "main.py: run every combination, as in fusion=none,hilo;dataset=digits,cifar10, and make one table",
        affects="run",
        scripts=("main.py",),
    )
    restart: bool = knob(
        False,
        "do again what is finished (extractor.py: the features; main.py and train.py: the classes) instead "
        "of going on where the last run ended",
        affects="run",
    )
    worker: str | None = knob(
        None,
        "which of how many processes that share the work this one is, on one machine or many with a shared "
        "folder: 0/16 to 15/16; none: what torchrun sets (RANK, WORLD_SIZE), or 0/1",
        affects="run",
    )
    check: bool = knob(
        False,
        "main.py: compare the AUROCs with the preset's committed table, results/<preset>.csv, and end with "
        "exit status 1 where one differs by more than .0005",
        affects="run",
        scripts=("main.py",),
    )

    # --- data
    dataset: str = knob(
        "cifar10", "data set (see README for the folder layouts)", choices=DATASETS, affects="features"
    )
    dataset_path: str | None = knob(None, "folder of the raw images; none: data/<dataset>", affects="run")
    class_name: str = knob(
        "all",
        "normal class: one, several separated by commas, or all; a comma in a name is written "
        "\\, (backslash, comma)",
        affects="run",
        scripts=FITTING,
    )
    feature_path: str | None = knob(
        None, "folder of the feature cache; none: features/<dataset>-<extractor>-<size>-<grid>", affects="run"
    )
    pretrained: bool = knob(
        False,
        "True: the features are already extracted, stop if they are not (extractor.py: check every row of "
        "them, the images need not be there); False: extract what is missing",
        affects="run",
    )

    # --- backbone and extraction
    extractor: str = knob(
        "VIT", f"backbone: {', '.join(BACKBONES)} or any timm model name", affects="features"
    )
    weights_path: str | None = knob(
        None,
        "local weights instead of the hub's: .pth, .safetensors, .npz where timm reads it; random: untrained",
        affects="features",
    )
    img_size: ImageSize = knob(
        None,
        "image size fed to the backbone, 384 or 384x256 (height x width); none: the backbone's; auto: of "
        "one's own pictures and of MVTec, VisA, BTAD and MTD in the shape of the training pictures, of "
        "100352 pixels (auto:200000: of so many), fewer where the pictures have fewer, never fewer than of "
        "the backbone's own size; of the other sets the backbone's",
        affects="features",
    )
    pixel_norm: Six | None = knob(
        None,
        "mean and standard deviation that pixels are normalised by, six numbers separated by commas; none: "
        "the backbone's",
        affects="features",
    )
    token_grid: str = knob(
        "full",
        "patch tokens kept: full, a number g (average-pooled to g x g), compact (low and high band per "
        "window), or "
        "centre (only their mean under the window of centre_pool: the smallest form, for fusion none); "
        "releasedg, as in released8: pooled as the released code did, which mixes tokens with channels",
        affects="features",
    )
    bands: bool = knob(
        False,
        "also keep and use a band token: the low band, the ring energies and the peak energy of the "
        "backbone's maps at "
        "several depths",
        affects="features",
    )
    places: int = knob(
        0,
        "also keep and use place tokens, for defects of a small place: the maps of middle depths on a grid "
        "of so many rows and columns, in the image's shape, and of as many more as it has more pixels than "
        "the backbone's own size; 0: none",
        low=0,
        high=64,
        affects="features",
    )
    precision: str = knob(
        "auto",
        "backbone arithmetic: float32, bfloat16, float16; auto: float32 on a CPU, half precision on a GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
        affects="features",
    )
    extract_batch: int = knob(
        0, "images per backbone pass; 0: chosen for the device", low=0, high=65536, affects="run"
    )
    workers: int = knob(
        -1,
        "CPU: threads that each read and compute whole batches (0: one batch at a time, by all threads); "
        "GPU: threads that read images; -1: chosen for the machine",
        low=-1,
        high=256,
        affects="run",
    )
    unreadable: str = knob(
        "stop",
        "images that cannot be read: stop (after all others are done, naming each), or skip (they are left "
        "out, and listed)",
        choices=("stop", "skip"),
        affects="run",
    )
    compile: bool = knob(
        False,
        "torch.compile the backbone, and the flow in training (on a GPU with CUDA graphs, 4 times as quick "
        "on an H200): pays on long runs only",
        affects="run",
    )

    # --- flow
    n_coupling_blocks: int = knob(4, "coupling layers K", low=1, high=1000, affects="fit")
    fc_internal: int | None = knob(
        None, "hidden width H of the subnets; none: C, as in the paper", low=1, high=10**6, affects="fit"
    )
    clamp: float = knob(3.0, "soft clamp alpha of the log-scales", low=1e-6, high=1000.0, affects="fit")
    fusion: str = knob("hilo", "multi-frequency fusion module", choices=FUSIONS, affects="fit")
    fusion_tokens: str = knob(
        "last",
        "patch tokens that the fusion sees: of the last map, as in the paper, or of middle depths (needs "
        "places)",
        choices=FUSION_TOKENS,
        affects="fit",
    )
    flow_channels: int = knob(
        0,
        "normalize power_l2+whiten: leading directions of the token that the flow moves; 0: all",
        low=0,
        high=10**6,
        affects="fit",
    )
    base: str = knob(
        "normal",
        "base density of the likelihood: normal, as in the paper, or kernel (a density on the training "
        "images' latents, its bandwidth chosen by held-out likelihood)",
        choices=BASES,
        affects="fit",
    )
    alpha: float = knob(
        0.5, "hilo: share of the heads given to the low frequencies", low=0.0, high=1.0, affects="fit"
    )
    window: int = knob(
        3,
        "hilo and the compact token grid: side of a window in patches",
        low=1,
        high=1024,
        affects="features",
    )
    identity_start: bool = knob(
        False,
        "zero the last layer of every subnet, so that training starts from the identity flow",
        affects="fit",
    )

    # --- training
    normalize: str = knob(
        "auto",
        "features before the flow, fitted on normal training features; auto: none for transformers, as "
        "released, power_l2+whiten for CNNs",
        choices=NORMALIZATIONS,
        affects="fit",
    )
    centre_pool: float = knob(
        0.0,
        "semantic token re-pooled from the patches under a centred Gaussian, its sigma in shares of the "
        "grid's side; 0: the backbone's own",
        low=0.0,
        high=100.0,
        affects="fit",
        scripts=SCRIPTS,
    )
    whiten_ridge: float = knob(
        0.0,
        "normalize power_l2+whiten: added to the covariance's eigenvalues, in units of their mean; 0 whitens "
        "fully",
        low=0.0,
        high=1e9,
        affects="fit",
    )
    batch_size: int = knob(32, "images per training step", low=1, high=10**7, affects="fit")
    meta_epochs: int = knob(
        1, "evaluations on the test set; each follows sub_epochs epochs", low=1, high=10**6, affects="fit"
    )
    sub_epochs: int = knob(1, "epochs of training per meta epoch", low=1, high=10**6, affects="fit")
    least_steps: int = knob(
        0,
        "training steps at least: a small class gets more epochs until it has had so many",
        low=0,
        high=10**7,
        affects="fit",
    )
    lr_init: float = knob(5e-5, "Adam learning rate", low=0.0, high=1e38, affects="fit")
    lr_schedule: str = knob(
        "constant",
        "learning rate over the run: constant or cosine (to zero)",
        choices=("constant", "cosine"),
        affects="fit",
    )
    max_grad_norm: float = knob(
        0.0,
        "clip the gradient to this norm; 0: no clipping, as in the released code",
        low=0.0,
        high=1e30,
        affects="fit",
    )
    feature_noise: float = knob(
        0.0,
        "standard deviation of Gaussian noise added to the normalised semantic token in training",
        low=0.0,
        high=1e6,
        affects="fit",
    )
    holdout: float = knob(
        0.0,
        "share of the normal training images held out to measure likelihood, and for thresholds",
        low=0.0,
        high=0.5,
        affects="fit",
    )
    patience: int = knob(
        0,
        "report the epoch that is best on the held-out normals, and end training so many meta epochs behind "
        "it; 0: report the last epoch",
        low=0,
        high=10**6,
        affects="fit",
    )

    # --- scoring
    score: str = knob(
        "latent",
        "anomaly score: latent (mean z^2), likelihood (negative log-likelihood), latent_knn (neighbours in "
        "latent space), joined (likelihood, with the least likely places where the class shows one scene)",
        choices=SCORES,
        affects="fit",
    )
    false_alarms: float = knob(
        0.05,
        "share of normal pictures that may be called anomalous: the threshold, from the held-out normal ones",
        low=1e-6,
        high=0.5,
        affects="run",
        scripts=FITTING,
    )
    baselines: bool = knob(
        False,
        "main.py: nearest neighbours and Gaussian on the same features, in the same table",
        affects="run",
        scripts=FITTING,
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        for part in self.modelname.split("/"):  # a sweep's runs lie in a folder of their own
            check_folder_name("modelname", part)
        if self.preset not in PRESETS:
            raise UserError(unknown("preset", self.preset, PRESETS))
        grid = self.token_grid.removeprefix("released")
        if self.token_grid not in ("full", "compact", "centre") and not (
            grid.isascii() and grid.isdigit() and len(grid) < 5 and int(grid) > 0
        ):
            raise UserError(
                f"token_grid: expected full, compact, centre, a number of patches per side or released and a "
                f"number, got {self.token_grid!r}"
            )
        if isinstance(self.img_size, tuple) and not all(0 < side <= LARGEST_IMAGE for side in self.img_size):
            raise UserError(
                f"img_size: expected 1 to {LARGEST_IMAGE} pixels a side, got "
                f"{self.img_size[0]}x{self.img_size[1]}"
            )
        norm = self.pixel_norm
        if norm and not (all(map(math.isfinite, norm)) and min(norm[3:]) > 0):
            raise UserError(f"pixel_norm: expected three finite numbers and three positive ones, got {norm}")
        if self.worker:
            parse_worker(self.worker)
        if self.sweep:
            parse_sweep(self.sweep)
        if 0 < self.centre_pool < NARROWEST:
            raise UserError(
                f"centre_pool: expected 0 or at least {NARROWEST} of a side, got {self.centre_pool:g}"
            )
        if grid == "centre" and not self.centre_pool:
            raise UserError("token_grid centre needs centre_pool above 0, say 0.1 (it is 0)")
        for knob_name, value in (("score", "joined"), ("base", "kernel")):
            if getattr(self, knob_name) == value and not self.holdout:
                raise UserError(f"{knob_name} {value} needs held-out normal images: set holdout, say 0.1")
        if self.score == "latent_knn" and self.base == "kernel":
            raise UserError("score latent_knn asks for no density: take base normal, or score likelihood")
        if self.fusion_tokens == "middle" and not self.places:
            raise UserError("fusion_tokens middle needs place tokens: set places, say 14 (it is 0)")
        if self.patience and not self.holdout:
            raise UserError("patience needs held-out normal images: set holdout, say 0.1 (it is 0)")


# Named sets of defaults. The defaults above, as you edit them, are the paper's: "paper" changes nothing.
PRESETS = {
    "paper": {},
    "paper_L": {"extractor": "VIT_L", "fc_internal": 1024, "batch_size": 32},
    "released": {
        "fusion": "class_attention",
        "token_grid": "released8",
        "normalize": "none",
        "fc_internal": 768,
        "batch_size": 8,
        "pixel_norm": (0.485, 0.456, 0.406, 0.229, 0.224, 0.225),
        "precision": "float32",
    },
    # How these were chosen, and on what: results/choosing.md.
    "accurate": {
        "img_size": "auto",
        "bands": True,
        "places": 14,
        "normalize": "power_l2+whiten",
        "whiten_ridge": 10.0,
        "centre_pool": 0.1,
        "flow_channels": 256,
        "fusion": "class_attention",
        "fusion_tokens": "middle",
        "fc_internal": 256,
        "identity_start": True,
        "base": "kernel",
        "batch_size": 64,
        "meta_epochs": 2,
        "sub_epochs": 1,
        "least_steps": 60,
        "lr_init": 1e-3,
        "lr_schedule": "cosine",
        "feature_noise": 0.5,
        "max_grad_norm": 1.0,
        "holdout": 0.1,
        "patience": 3,
        "score": "joined",
        "baselines": True,
    },
}
PRESETS["quickstart"] = PRESETS["accurate"] | {
    "modelname": "quickstart",
    "dataset": "digits",
    "extractor": "efficientnet_lite0",
    "verbose": False,
}
PRESETS["ablation"] = PRESETS["accurate"] | {
    "modelname": "ablation",
    "extractor": "efficientnet_lite0",
    "n_seeds": 3,
    "sweep": "fusion=none,class_attention,hilo,spectral;fusion_tokens=last,middle",
    "baselines": False,
    "keep": "results",
}

# Defaults that a data set changes, unless the preset or the command line says otherwise: one's own pictures
# get verdicts, which rest on held-out normal ones.
OF_DATASET = {"folder": {"holdout": 0.1}}


# Knobs of earlier versions -> what to do instead.
FORMER = {
    "mirror": "it is gone: mirrored copies did not pay for twice the time",
    "low_depths": "the two deepest depths always join",
    "neighbours_weight": "neighbours are no part of the score; --base kernel is a density on the latents",
    "spread_at_balance": "there is one joint token: leave it out",
    "spread_of_surfaces": "places are weighed by their own variance: leave it out",
    "refit": "it is gone: the held-out images stay held out",
    "train_together": "it is gone: classes are fitted one by one, or by several processes (--worker)",
    "validate": "it is gone: settings are judged by benchmarks/suite.py",
    "rank": "--worker 3/16 is rank 3 of world_size 16",
    "world_size": "--worker 3/16 is rank 3 of world_size 16",
    "compile_flow": "--compile compiles backbone and flow",
    "pooling": "--token_grid released8 pools to 8 x 8 as pooling released did",
    "fine_classes": "--dataset CIFAR100_fine has the 100 classes",
    "select_epoch": "--patience 3 is select_epoch likelihood, --patience 0 the last epoch",
    "norm_mean": "--pixel_norm takes mean and standard deviation, six numbers",
    "norm_std": "--pixel_norm takes mean and standard deviation, six numbers",
    "img_pixels": "--img_size auto:200000 is img_size auto of so many pixels",
    "hide_tqdm_bar": "TQDM_DISABLE=1 in the environment hides progress bars",
    "n_feat": "the channels are the backbone's: leave it out",
    "n_heads": "4 heads for class_attention, 8 for hilo: leave it out",
    "use_gamma": "the gain is always learned: leave it out",
    "weight_decay": "it is the paper's 1e-5: leave it out",
    "matmul": "products in training are float32: leave it out",
    "band_depths": "the last four stages of a CNN, every quarter of a transformer: leave it out",
    "rings": "2 rings of frequency per depth: leave it out",
    "low_sigma": "the low band's window is 0.15 of a side: leave it out",
    "place_channels": "a place token has at most 192 channels: leave it out",
    "shard_rows": "the files of a cache have 128 to 256 MB: leave it out",
    "verify": "extractor.py checks every row and mends; with --pretrained it needs no images",
    "save_model": "--keep results keeps no weights",
    "plots": "--keep weights draws no pictures",
    "nbins1": "histograms have 50 bins for normal images: leave it out",
    "nbins2": "histograms have 100 bins for anomalous images: leave it out",
}


# ---------------------------------------------------------------- checks
LONGEST_TEXT, LONGEST_NAME = 4096, 100  # characters of a knob's text; bytes of a folder's name
NARROWEST = 0.01  # of a side: a narrower Gaussian weighs one patch, or divides by nothing


def check(field, value):
    """Raise UserError unless ``value`` fits the knob: its type, its choices, its range."""
    meta, optional = field.metadata, type(None) in typing.get_args(field.type)
    if value is None and optional or field.type == ImageSize and auto_pixels(value):
        return
    kind = plain_type(field.type)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{field.name}: expected {describe(kind)}, got {value!r}")
    if kind is str:
        check_text(field.name, value)
    if kind is float and not math.isfinite(value):
        raise UserError(f"{field.name}: expected a finite number, got {value!r}")
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{field.name}: {unknown('value', value, meta['choices'])}")
    if meta["low"] is not None and value < meta["low"] or meta["high"] is not None and value > meta["high"]:
        bounds = (
            f"at least {meta['low']}" if meta["high"] is None else f"from {meta['low']} to {meta['high']}"
        )
        raise UserError(f"{field.name}: expected {describe(kind)} {bounds}, got {value!r}")


def check_text(name, text):
    """Raise UserError on a text that no file name or table can hold: control characters (a class's name may
    have them, but for NUL), bytes that are not UTF-8, a length that no command line has."""
    harmless = name == "class_name"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text) and not (harmless and "\0" not in text):
        raise UserError(f"{name}: expected a text without control characters, got {text[:100]!r}")
    if any(0xD800 <= ord(c) < 0xE000 for c in text):  # what Python makes of bytes that are not UTF-8
        raise UserError(f"{name}: expected valid UTF-8, got {text[:100]!r}")
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{name}: expected at most {LONGEST_TEXT} characters, got {len(text)}")


def check_folder_name(name, text):
    """Raise UserError unless ``text`` names a folder that stays where it is made."""
    taken = ("classes", "figures")  # what a run keeps in its own folder
    if not text.strip(". ") or text[0] in ".~-" or "/" in text or "\\" in text or text in taken:
        raise UserError(
            f"{name}: expected a plain name without /, \\ or a leading dot, dash or ~, and none of "
            f"{', '.join(taken)}, got {text!r}"
        )
    if len(text.encode()) > LONGEST_NAME:
        raise UserError(f"{name}: expected at most {LONGEST_NAME} bytes, got {len(text.encode())}")


def class_names(text):
    """The class names in the knob class_name, separated by commas: a backslash takes the next character as it
    is, so that a class may have a comma (``\\,``) or be called all (``\\all``)."""
    names, escaped = [""], False
    for c in text:
        if escaped or c not in "\\,":
            names[-1] += c
            escaped = False
        elif c == "\\":
            escaped = True
        else:
            names.append("")
    return names


def auto_pixels(img_size):
    """The pixels that img_size auto asks for, 2 * 224 * 224 unless it says how many; None for other sizes."""
    if img_size == AUTO:
        return 2 * 224 * 224
    found = re.fullmatch(r"auto:([1-9][0-9]{0,7})", img_size) if isinstance(img_size, str) else None
    return int(found[1]) if found and int(found[1]) <= LARGEST_IMAGE**2 else None


def parse_worker(text):
    """``3/16`` -> (3, 16): which of how many processes. Raises UserError."""
    found = re.fullmatch(r"([0-9]{1,6})/([1-9][0-9]{0,5})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"worker: expected which of how many, as in 0/16 to 15/16, got {text!r}")
    return int(found[1]), int(found[2])


def plain_type(annotation):
    """The type of a knob without None and without what a tuple holds."""
    kinds = (
        [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        if type(None) in typing.get_args(annotation)
        else [annotation]
    )
    return typing.get_origin(kinds[0]) or kinds[0]


def describe(kind):
    return {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "a text",
        tuple: "numbers, as in 224x224 or 0.5,0.5,0.5,0.2,0.2,0.2",
    }[kind]


CLOSE = 0.75  # likeness (difflib's ratio) from which a name counts as a slip of the pen


def unknown(kind, got, known, all_of_them="-h lists them all"):
    """The line for a name that is not in ``known``, with the nearest one when there is one; a long list is
    only pointed to."""
    names = {str(name).lower(): str(name) for name in known}
    near = difflib.get_close_matches(str(got).lower(), names, 1, CLOSE)
    hint = f", did you mean {names[near[0]]}" if near else ""
    listed = f" Expected one of: {', '.join(map(str, known))}" if len(known) <= 30 else f" {all_of_them}"
    return f"unknown {kind} {got!r}{hint}.{listed}"


# ---------------------------------------------------------------- values from text
def unknown_knob(name, known):
    """The line for a knob that is not in ``known``: what took its place, if it once was one."""
    former = str(name).removeprefix("--")
    return f"unknown knob {name!r}: {FORMER[former]}" if former in FORMER else unknown("knob", name, known)


def parse_value(field, text):
    """The value of a knob from its command-line text. Raises UserError with what was expected."""
    kind = plain_type(field.type)
    if not isinstance(text, str):  # what argparse makes of --knob=--
        raise UserError(f"{field.name}: expected a value, got '--'")
    if type(None) in typing.get_args(field.type) and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                text.lower()
            ]
        if field.type == ImageSize and auto_pixels(text.lower()):
            return text.lower()
        if field.type == ImageSize:
            sides = [int(side) for side in text.lower().split("x")]
            return checked_length(sides * 2 if len(sides) == 1 else sides, 2)
        if field.type == Six | None:
            return checked_length([float(part) for part in text.split(",")], 6)
        if field.name == "modelname":
            check_folder_name("modelname", text)
        spelt = {str(choice).lower(): choice for choice in field.metadata["choices"] or ()}
        return spelt.get(text.lower()) or kind(text)
    except (KeyError, ValueError):
        raise UserError(f"{field.name}: expected {describe(kind)}, got {text!r}") from None


def parse_values(texts):
    """{knob: text} -> {knob: value}. Raises UserError on an unknown knob or a value that does not fit."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name in texts:
        if name not in fields:
            raise UserError(unknown_knob(name, fields))
    return {name: parse_value(fields[name], text) for name, text in texts.items()}


def parse_sweep(text):
    """``fusion=none,hilo;dataset=digits`` -> {"fusion": ["none", "hilo"], "dataset": ["digits"]}. Raises
    UserError."""
    sweep = {}
    for part in text.split(";"):
        name, equals, values = part.strip().partition("=")
        if not equals or not values:
            raise UserError(f"sweep: expected knob=value,value;knob=value,value, got {text!r}")
        fields = {field.name: field for field in dataclasses.fields(Config)}
        if name not in fields:
            raise UserError(unknown_knob(name, fields))
        if name in ("preset", "modelname", "sweep"):
            raise UserError(f"sweep: {name} cannot be swept; run the script once per {name}")
        sweep[name] = [value.strip() for value in values.split(",")]
        for value in sweep[name]:
            check(fields[name], parse_values({name: value})[name])
    return sweep


def checked_length(numbers, length):
    if len(numbers) != length:
        raise ValueError(f"expected {length} numbers")
    return tuple(numbers)


def make_config(given):
    """The configuration of ``given`` {knob: value}: defaults, then those of the data set, then the preset's,
    then the given ones. Raises UserError."""
    names = [field.name for field in dataclasses.fields(Config)]
    for name in given:
        if name not in names:
            raise UserError(unknown_knob(name, names))
    preset = given.get("preset", Config.preset)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(unknown("preset", preset, PRESETS))
    chosen = {**PRESETS[preset], **given}
    return Config(**{**OF_DATASET.get(chosen.get("dataset"), {}), **chosen})


def changed(config):
    """{knob: value} of the knobs that differ from this file's defaults."""
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != f.default
    }
