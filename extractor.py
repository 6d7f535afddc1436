"""Extract the features of a data set once: frozen backbone -> semantic and patch tokens of every
image -> cache on disk."""

from shell.command_line import command_line, from_command_line, run_script
from shell.signals import Interrupted

if __name__ == "__main__":  # parse before the slow imports: -h and mistakes answer at once
    CONFIG = from_command_line(__doc__, script="extractor.py")

import contextlib
import dataclasses
import functools
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from joblib import cpu_count
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import backbones
import datasets
import growth
import memory
import utils
from arithmetic import is_traced
from cache_writer import (
    CHANGED,
    MOST_NAMED,
    CacheWriter,
    Features,
    lost_shards,
    reopen,
    restore,
    start_again,
)
from config import LARGEST_IMAGE, Config, UserError, knobs_affecting
from feature_cache import CacheIdentity, FeatureCache, cache_folder, labels_damage
from layouts import OF_ANY_SHAPE
from manifest import EXAMPLE, Manifest, has_features
from shards import REPAIR, Damaged, Shard, shards_of
from token_grid import OF_MAPS, Bands, Places, TokenGrid, place_grid

CHUNK = 64  # images of a full cache that are pooled at a time
BATCH = {"cpu": 8, "cuda": 64}  # images per backbone pass: a CPU's caches hold the maps of these
IN_FLIGHT = 2  # batches on their way from a GPU while the next is computed
MOST_THREADS = 8  # that compute whole batches: more would wait for Python's lock, and share out the rest
MOST_READERS = 32  # threads: no device takes more images than they decode
SHARDS_AT_ONCE = 4  # on a GPU
PIXEL = 100  # bytes per pixel of a batch, at least: the picture and the first maps of a small backbone
EXAMPLE_NUMBERS = 64  # of each array that are kept of the fixed picture
NOT_FINITE = (
    "the backbone gave features that are not finite or exceed float16; try --precision float32, and check "
    "its weights"
)


# ---------------------------------------------------------------- what is extracted
def token_grid(config: Config) -> TokenGrid:
    return TokenGrid(config.token_grid, config.pooling, config.window, config.centre_pool)


def maps_kept(config: Config, img_size: tuple[int, int]) -> dict[str, Bands | Places]:
    """What is kept of the maps of several depths of images of that size, by the name of its array."""
    kept: dict[str, Bands | Places] = {}
    if config.bands:
        kept["bands"] = Bands(config.rings, config.low_sigma)
    if config.places:
        grid = place_grid(config.places, img_size, backbones.own_size(config.extractor))
        kept["places"] = Places(grid, config.place_channels)
    return kept


def cache_identity(config: Config) -> CacheIdentity:
    """Which features a configuration asks for, found without loading the backbone. Raises UserError.

    The fields are the knobs that affect the features, with what the backbone decides put in for those left
    open. A size that the pictures decide is left open (``sized``)."""
    defaults, grid = backbones.timm_defaults(config.extractor), token_grid(config)
    fields = {name: getattr(config, name) for name in knobs_affecting("features")}
    del fields["weights_path"]  # recorded by content, as "weights"
    fields |= {
        "timm_model": backbones.timm_name(config.extractor),
        "weights": backbones.weights_source(config),
        "norm_mean": config.norm_mean or tuple(defaults.mean),
        "norm_std": config.norm_std or tuple(defaults.std),
        **grid.fields(),
    }
    if by_pictures(config):
        del fields["img_size"]
        size = f"auto{config.img_pixels}"
    else:
        del fields["img_pixels"]
        fields |= shape_fields(config, backbones.image_size(config))
        size = "{}x{}".format(*fields["img_size"])
    for name, unspecified in (("precision", "auto"), ("n_feat", None)):
        if fields[name] == unspecified:  # whatever the machine or the backbone chose is accepted
            del fields[name]
    if not config.bands:
        fields |= {"rings": None, "low_sigma": None}
    if not config.places:
        fields["place_channels"] = None
    if config.bands or config.places:
        fields["of_maps"] = OF_MAPS
    else:
        fields["band_depths"] = None
    parts = {"bands": config.bands, f"places{config.places}": config.places}
    grid_key = "-".join([grid.key, *(name for name, kept in parts.items() if kept)])
    return CacheIdentity(cache_folder(config, size, grid_key), fields)


# ---------------------------------------------------------------- the size of the images
SIZES_READ = 200  # training pictures whose sizes decide


def by_pictures(config: Config) -> bool:
    """Whether the pictures decide the size that is fed to the backbone."""
    return config.img_size == "auto" and config.dataset in OF_ANY_SHAPE


def shape_fields(config: Config, img_size: tuple[int, int]) -> dict:
    """What a cache records of the shape of its images; a square grid of places needs no telling."""
    grid = (config.places, config.places)
    if config.places:
        grid = place_grid(config.places, img_size, backbones.own_size(config.extractor))
    return {"img_size": img_size, "place_grid": None if grid == (config.places, config.places) else grid}


def sized(config: Config, images: datasets.ImageSet, identity: CacheIdentity) -> CacheIdentity:
    """The same with the size of the images where the pictures decide it: that of the features that are there,
    so that a folder may grow, or the one that the training pictures ask for."""
    if "img_size" in identity.fields:
        return identity
    size = None
    with contextlib.suppress(UserError):
        size = Manifest.read(identity.folder).fields.get("img_size")
    fields = shape_fields(config, tuple(size) if size else size_for(config, images))
    return CacheIdentity(identity.folder, identity.fields | fields)


def at_size(config: Config, identity: CacheIdentity) -> Config:
    """The configuration with the size of the images as a knob."""
    return dataclasses.replace(config, img_size=identity.fields["img_size"])


def size_for(config: Config, images: datasets.ImageSet) -> tuple[int, int]:
    """The size that the training pictures ask for (``size_in_shape``); the backbone's own where none can be
    read, or where it takes no other."""
    own, found = backbones.own_size(config.extractor), images.sizes(SIZES_READ)
    if not found:
        return own
    backbone = backbones.outline(dataclasses.replace(config, img_size=None))
    size = size_in_shape(np.array(found), config.img_pixels, own, backbone.stride)
    if not backbones.takes(config, size):
        print(f"img_size auto: {config.extractor} takes {own[0]}x{own[1]} only", flush=True)
        return own
    return size


def size_in_shape(sizes: np.ndarray, pixels: int, own_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Height and width in multiples of ``stride``, in the median shape of pictures of the ``sizes`` (n, 2).

    About so many pixels, but no more than the median picture has (enlarging adds nothing), and in any case
    as many as the backbone's own size."""
    ratio, area = np.median(sizes[:, 0] / sizes[:, 1]), np.median(np.prod(sizes.astype(float), 1))
    area = max(min(pixels, area), math.prod(own_size))
    sides = (math.sqrt(area * ratio), math.sqrt(area / ratio))
    height, width = (min(max(1, round(side / stride)), LARGEST_IMAGE // stride) * stride for side in sides)
    return height, width


# ---------------------------------------------------------------- images -> device
class Unreadable(NamedTuple):
    """Stands for an image that could not be read, on its way from a reader."""

    row: int  # in its split
    reason: str


class ImageRows:
    """The images of one split: (3, h, w) uint8, or the error of an unreadable one.

    An image larger than the backbone's is resized here (Pillow, bicubic), a smaller one on the device, many
    at a time."""

    def __init__(self, images: datasets.ImageSet, split: str, img_size: tuple[int, int]):
        self.images, self.split, self.img_size = images, split, img_size

    def __len__(self) -> int:
        return len(self.images.labels.split(self.split).names)

    def stacks(self, rows: range) -> list[Tensor | Unreadable]:
        """The images ``rows``, consecutive ones of one size stacked: (n, 3, h, w), in order."""
        return stack_rows([self[i] for i in rows])

    def __getitem__(self, i: int) -> Tensor | Unreadable:
        try:
            pixels = self.images.read(self.split, i)
        except UserError as mistake:  # raised again, or noted, where it is known what is wanted
            return Unreadable(i, str(mistake))
        return to_device_size(pixels, self.img_size)


def to_device_size(pixels: np.ndarray, img_size: tuple[int, int]) -> Tensor:
    """(h, w, 3) uint8 -> (3, h, w), resized to ``img_size`` here when a side is longer than that."""
    if pixels.shape[0] > img_size[0] or pixels.shape[1] > img_size[1]:
        pixels = np.asarray(Image.fromarray(pixels).resize(img_size[::-1], Image.Resampling.BICUBIC))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def stack_rows(rows: list) -> list:
    """Consecutive images of one size stacked -> [(n, 3, h, w) or an error, ...] in order."""
    stacks: list = []
    for row in rows:
        if (
            isinstance(row, Tensor)
            and stacks
            and isinstance(stacks[-1], list)
            and stacks[-1][0].shape == row.shape
        ):
            stacks[-1].append(row)
        else:
            stacks.append([row] if isinstance(row, Tensor) else row)
    return [torch.stack(stack) if isinstance(stack, list) else stack for stack in stacks]


HALF = 0.5001  # what is halfway between two levels goes up, in whatever order a device adds


@functools.lru_cache(maxsize=64)
def bicubic_weights(before: int, after: int) -> Tensor:
    """Pillow's antialiased bicubic filter (a = -1/2) from ``before`` to ``after`` pixels in a row -> (after,
    before), float32, each row summing to 1.

    Made smaller, the filter is as wide as the ratio asks, so that every pixel counts. Weights are rounded to
    2^-22, as Pillow's are for pixels of 8 bits (src/libImaging/Resample.c)."""
    scale = before / after
    stretch = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    first = np.maximum((centre - 2 * stretch + 0.5).astype(int), 0)[:, None]
    last = np.minimum((centre + 2 * stretch + 0.5).astype(int), before)[:, None]
    place = np.arange(before)
    x = np.abs((place + 0.5 - centre[:, None]) / stretch)
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * ((place >= first) & (place < last))
    weights /= weights.sum(1, keepdims=True)
    return torch.from_numpy(np.round(weights * 2**22) / 2**22).float()


def resize_like_pillow(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 3, h, w) uint8 -> (n, 3, H, W) float32 of whole grey levels 0 to 255, as Pillow's bicubic resize
    gives them but for a level here and there.

    Two matrix products, along the width and then the height (the other way where only the height shrinks),
    each rounded and cut to 8 bits: any device does them alike, and so does an exported file. They need all of
    float32 (no TF32). Pillow 13 takes the height first for some tall pictures that shrink both ways; theirs
    differ by what one rounding is worth."""
    pixels, (height, width) = images.float(), images.shape[2:]
    for dim in (2, 3) if size[0] < height and size[1] > width else (3, 2):
        before, after = pixels.shape[dim], size[dim - 2]
        if before != after:
            weights = bicubic_weights(before, after).to(images.device)
            pixels = torch.matmul(pixels, weights.t()) if dim == 3 else torch.matmul(weights, pixels)
            pixels = (pixels + HALF).floor().clamp(0, 255)
    return pixels


def prepare(
    images: Tensor, img_size: tuple[int, int], mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """(n, 3, h, w) uint8 on the device -> (n, 3, H, W), resized (bicubic, antialiased, as Pillow does) and
    normalised."""
    images = images.contiguous(memory_format=torch.channels_last)
    if images.shape[2:] != img_size:
        if images.device.type == "cpu":  # which resizes uint8 itself, rounding as Pillow does
            images = F.interpolate(images, img_size, mode="bicubic", antialias=True)
        else:
            images = resize_like_pillow(images, img_size).contiguous(memory_format=torch.channels_last)
    return ((images.float() / 255 - mean) / std).to(dtype)


# ---------------------------------------------------------------- images -> tokens
Rows = dict[str, Tensor]  # of some images: tokens (n, 1 + N, C), bands (n, D), places (n, P, E)


def what_is_kept(config: Config, backbone: backbones.Backbone) -> tuple[dict[str, tuple[int, ...]], dict]:
    """The shape of each array that an image leaves, and the cache's fields that tell what they are."""
    grid, of_maps = token_grid(config), maps_kept(config, backbone.img_size)
    shape = grid.cached_shape(backbone.grid)
    n_tokens = 1 + grid.n_tokens(shape)
    fields = {
        "n_feat": backbone.n_feat,
        "kind": "map" if backbone.is_map else "tokens",
        "grid": shape,
        "tokens": n_tokens,
    }
    shapes: dict[str, tuple[int, ...]] = {"tokens": (n_tokens, backbone.n_feat)}
    if of_maps:
        depths = backbone.band_depths(config.band_depths)
        channels = backbone.channels_of(depths)
        fields |= {"depths": depths, "band_channels": channels}
        shapes |= {name: kept.shape(channels) for name, kept in of_maps.items()}
    if config.places:
        fields["place_shape"] = shapes["places"]
    return shapes, fields


class Extraction:
    """One backbone over one data set, with everything that was chosen for this machine."""

    def __init__(
        self, config: Config, images: datasets.ImageSet, identity: CacheIdentity, device: torch.device
    ):
        self.config, self.images, self.device = config, images, device
        self.img_size = identity.fields["img_size"]
        self.grid, self.of_maps = token_grid(config), maps_kept(config, self.img_size)
        backbone = backbones.load_backbone(config, identity.fields["weights"])
        self.dtype = backbones.choose_precision(config.precision, device)
        self.full_grid = backbone.grid
        self.shapes, kept = what_is_kept(config, backbone)
        self.depths = kept.get("depths", ())
        self.fields = identity.fields | kept
        self.fields |= {
            "precision": str(self.dtype).removeprefix("torch."),
            "weights_sha256": utils.sha256_of_tensors(backbone.state_dict()),
            "image_list": images.fingerprint(),
        }
        self.backbone = backbones.speed_up(backbone, device, self.dtype, fuse=not config.compile)
        self.mean, self.std = (
            torch.tensor(identity.fields[key], device=device).view(3, 1, 1)
            for key in ("norm_mean", "norm_std")
        )
        self.fields[EXAMPLE] = self._example()
        if config.compile:
            used = "forward_intermediates" if self.of_maps else "forward_features"
            setattr(self.backbone.model, used, torch.compile(getattr(self.backbone.model, used)))
        self.batch = config.extract_batch or BATCH[device.type]
        at_once = min(self.batch, max(1, images.labels.count()))
        if device.type == "cpu":
            utils.check_memory(
                f"a batch of {at_once} images of {self.img_size[0]}x{self.img_size[1]}",
                PIXEL * at_once * math.prod(self.img_size),
                "choose a smaller extract_batch or img_size",
            )

    @torch.inference_mode()
    def _example(self) -> dict:
        """What the backbone gives of a fixed picture, in a few evenly spaced numbers of its tokens and of
        each map: another version of timm may build another network of the same name and weights."""
        noise = np.random.RandomState(0).randint(0, 256, (1, 3, *self.img_size), np.uint8)
        images = torch.from_numpy(noise).to(self.device)
        pixels = prepare(images, self.img_size, self.mean, self.std, self.dtype)
        tokens, maps = (
            self.backbone.with_maps(pixels, self.depths) if self.depths else (self.backbone(pixels), [])
        )
        numbers = [values.float().flatten().cpu().numpy() for values in (tokens, *maps)]
        chosen = [each[np.linspace(0, len(each) - 1, EXAMPLE_NUMBERS).astype(int)] for each in numbers]
        return {
            "timm": timm.__version__,
            "precision": self.fields["precision"],
            "values": [[float(f"{value:.6g}") for value in each] for each in chosen],
        }

    def rows(self, images: Tensor) -> Rows:
        """(n, 3, h, w) uint8, any n -> tokens (n, 1 + N, C) and, where kept, bands (n, D) and places (n, P,
        E), float16 on the device."""
        images = images.to(self.device, non_blocking=True)
        parts = [images] if is_traced() else images.split(self.batch)
        batches = [self._batch(batch) for batch in parts]
        if len(batches) == 1:
            return batches[0]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def _batch(self, images: Tensor) -> Rows:
        pixels = prepare(images, self.img_size, self.mean, self.std, self.dtype)
        maps: list[Tensor] = []
        if self.of_maps:
            tokens, maps = self.backbone.with_maps(pixels, self.depths)
        else:
            tokens = self.backbone(pixels)
        rows = {"tokens": self.grid.pool(tokens, self.full_grid)}
        rows |= {name: kept.measure(maps) for name, kept in self.of_maps.items()}
        return {name: values.half() for name, values in rows.items()}

    @torch.inference_mode()
    def seconds_per_image(self, count: int) -> float:
        """Time of the backbone per image on this machine, for a job of so many, by the second of two passes
        over blank images; reading and decoding come on top."""
        few = self.threads and count < LONG_JOB  # on a CPU two images tell nearly as much as a batch
        blank = torch.zeros(min(2, self.batch) if few else self.batch, 3, *self.img_size, dtype=torch.uint8)
        at_once, threads = max(1, self.threads), torch.get_num_threads()
        torch.set_num_threads(max(1, threads // at_once))  # as one of the threads that extract
        for _ in range(2):
            start = time.perf_counter()
            for values in self.rows(blank).values():
                values.sum().item()  # waits for a GPU
        torch.set_num_threads(threads)
        return (time.perf_counter() - start) / (len(blank) * at_once)

    def features(
        self, split: str, start: int = 0, stop: int | None = None, unreadable: list[int] | None = None
    ) -> Iterator[Rows]:
        """What is kept of the images start..stop of a split (all), in order, on the device (see ``rows``).
        Batches begin at ``start``: the outcome does not depend on what was extracted before.

        An unreadable image is left out and its index added to the list ``unreadable``; without a list, it
        raises UserError. So do features that are not finite, at the latest after the last rows."""
        everything = ImageRows(self.images, split, self.img_size)
        chosen = range(len(everything))[start:stop]
        found = (self._by_threads if self.threads else self._by_one_thread)(everything, chosen)
        for rows in found:
            if not isinstance(rows, Unreadable):
                yield rows
            elif unreadable is None:
                raise UserError(rows.reason)
            else:
                unreadable.append(rows.row)

    @property
    def threads(self) -> int:
        """Threads that each take whole batches on a CPU; 0: one thread drives the device."""
        if self.device.type != "cpu" or self.config.compile:  # compiled code has threads of its own
            return 0
        workers = self.config.workers
        return workers if workers >= 0 else min(MOST_THREADS, torch.get_num_threads())

    @property
    def readers(self) -> int:
        """Threads that read images beside the one that drives a GPU, for each of the shards at once."""
        if self.device.type == "cpu":
            return 0
        if self.config.workers >= 0:
            return self.config.workers
        readers = (
            min(MOST_READERS, cpu_count() - 1) if self.images.from_files else 1
        )  # arrays are there already
        return max(1, readers // self.shards_at_once)

    @property
    def shards_at_once(self) -> int:
        """Shards in work at a time: on a GPU one is computed while others are read, checked and written."""
        return 1 if self.device.type == "cpu" or self.config.compile else SHARDS_AT_ONCE

    def _by_threads(self, everything: ImageRows, chosen: range) -> Iterator[Rows | Unreadable]:
        """Features by threads, each of which reads and computes whole batches with its share of torch's own
        threads: none waits for another, and a second program on the machine slows down one batch, not every
        layer of all. PyTorch holds Python's lock between its operators only."""
        threads, workers = torch.get_num_threads(), self.threads
        share = max(1, threads // workers)

        @torch.inference_mode()
        def compute(batch: range) -> list[Rows | Unreadable]:
            stacks = everything.stacks(batch)
            return [images if isinstance(images, Unreadable) else checked(images) for images in stacks]

        def checked(images: Tensor) -> Rows:
            rows = self.rows(images)
            if not all(torch.isfinite(values).all() for values in rows.values()):
                raise UserError(NOT_FINITE)
            return rows

        try:
            with utils.thread_pool(workers, lambda: torch.set_num_threads(share)) as pool:
                for found in in_order(pool, compute, self._batches(chosen), 2 * workers):
                    yield from found
        finally:
            torch.set_num_threads(threads)  # what threads made from now on start with

    @torch.inference_mode()
    def _by_one_thread(self, everything: ImageRows, chosen: range) -> Iterator[Rows | Unreadable]:
        """Features by this thread, which keeps the device busy, while others read the images. The device says
        at the end whether all was finite: asking earlier would wait for it."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for images in self._read_ahead(everything, chosen):
            if isinstance(images, Unreadable):
                yield images
                continue
            rows = self.rows(images)
            for values in rows.values():
                finite &= torch.isfinite(values).all()
            yield rows
        if not finite:
            raise UserError(NOT_FINITE)

    def _read_ahead(self, everything: ImageRows, chosen: range) -> Iterator[Tensor | Unreadable]:
        """The images, stacked batch by batch: read by ``readers`` threads into pinned memory, where there are
        any."""
        if not self.readers:
            for batch in self._batches(chosen):
                yield from everything.stacks(batch)
            return

        def read(batch: range) -> list[Tensor | Unreadable]:
            stacks = everything.stacks(batch)
            return [
                s.pin_memory() if isinstance(s, Tensor) and torch.cuda.is_available() else s for s in stacks
            ]

        with utils.thread_pool(self.readers) as pool:
            for stacks in in_order(pool, read, self._batches(chosen), self.readers + 1):
                yield from stacks

    def _batches(self, chosen: range) -> list[range]:
        return [chosen[first : first + self.batch] for first in range(0, len(chosen), self.batch)]


def in_order(pool: ThreadPoolExecutor, task: Callable, batches: list[range], ahead: int) -> Iterator:
    """task(batch) of every batch by the pool's threads, in order, ``ahead`` of them before they are asked
    for."""
    pending: deque[Future] = deque()
    for batch in batches:
        pending.append(pool.submit(task, batch))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def arriving(features: Iterator[Rows], device: torch.device) -> Iterator[Rows]:
    """The same rows in the CPU's memory. From a GPU they are copied to pinned memory on a stream of their
    own, beside the computing, and handed on ``IN_FLIGHT`` batches late; PyTorch's pool gives a pinned buffer
    out again once nobody holds it."""
    if device.type != "cuda":
        yield from features
        return
    stream = torch.cuda.Stream(device)
    pending: deque[tuple[Rows, torch.cuda.Event]] = deque()
    for rows in features:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copies = {}
            for name, values in rows.items():
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                copies[name] = buffer.copy_(values, non_blocking=True)
                values.record_stream(stream)
            pending.append((copies, stream.record_event()))
        if len(pending) > IN_FLIGHT:
            yield _arrived(*pending.popleft())
    while pending:
        yield _arrived(*pending.popleft())


def _arrived(copies: Rows, event: torch.cuda.Event) -> Rows:
    event.synchronize()
    return copies


# ---------------------------------------------------------------- tokens -> cache
LONG_JOB = 1000  # images from which the time is estimated before the start in any case


def extract(
    config: Config,
    images: datasets.ImageSet,
    identity: CacheIdentity,
    device: torch.device,
    known: growth.Known | None = None,
) -> FeatureCache:
    """Extract what is missing of the images of a data set into their cache, but for those whose features are
    known. Raises UserError; finished shards are kept."""
    config = at_size(config, identity)
    shapes, _ = what_is_kept(config, backbones.outline(config))
    check_disk(identity.folder, images.labels, shapes)
    job = Extraction(config, images, identity, device)
    writer = new_writer(config, images, identity.folder, job.fields, shapes)
    missing = writer.missing()
    count = sum(shard.stop - shard.start for shard in missing)
    size = "{}x{}".format(*job.img_size) + (" (img_size auto)" if "img_pixels" in identity.fields else "")
    print(
        f"extracting {count} images with {config.extractor} at {size} on {device} in "
        f"{job.fields['precision']}: {job.fields['tokens']} tokens of {job.fields['n_feat']} channels each, "
        f"{writer.manifest.size(missing) / 1e9:.2g} GB in {identity.folder}",
        end="",
        flush=True,
    )
    told = count >= LONG_JOB or count and "img_pixels" in identity.fields
    expected = utils.readable_time(count * job.seconds_per_image(count)) if told else ""
    print(f", about {expected} on this machine, once" if told else "", flush=True)

    def features(shard: Shard, skipped: list[int]) -> Iterator[dict[str, np.ndarray]]:
        def compute(part: Shard) -> Iterator[dict[str, np.ndarray]]:
            for rows in arriving(job.features(part.split, part.start, part.stop, skipped), device):
                yield {name: values.numpy() for name, values in rows.items()}

        return compute(shard) if known is None else known.features(images, shard, compute)

    start = time.perf_counter()
    fill(config, writer, features, count, job.shards_at_once)
    seconds = time.perf_counter() - start
    print(f"extracted {count} images in {seconds:.0f} s, {count / seconds:.0f} images/s", flush=True)
    return FeatureCache(identity)


def new_writer(
    config: Config,
    images: datasets.ImageSet,
    folder: Path,
    fields: dict,
    shapes: dict[str, tuple[int, ...]],
) -> CacheWriter:
    """A writer of these images' cache."""
    skip = config.unreadable == "skip"
    writer = CacheWriter(folder, fields, images.labels, shapes, config.shard_rows, part_key(images), skip)
    growth.remember(images, folder)  # before the last shard makes the cache whole
    return writer


def part_key(images: datasets.ImageSet) -> Callable[[Shard], str]:
    """What the images of a shard are known by."""
    return lambda shard: images.part_key(shard.split, shard.start, shard.stop)


def fill(config: Config, writer: CacheWriter, features: Features, count: int, at_once: int = 1) -> None:
    """Write what is missing, so many shards at once; say what is kept when that is stopped or the disk is
    full."""
    hidden = utils.no_bar(config.hide_tqdm_bar)
    try:
        with tqdm(total=count, unit="img", disable=hidden, smoothing=0.05) as bar:
            writer.fill(features, utils.ranks(config), bar.update, at_once)
    except Interrupted as interrupted:
        interrupted.told = f"{writer.kept()}; to go on: {command_line()}"
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{reason} ({writer.folder}): {writer.kept()}; then run the same again") from None


def check_disk(folder: Path, labels: datasets.Labels, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError when the part of a cache that is not there yet would not fit on the disk."""
    size = 2 * labels.count() * sum(math.prod(shape) for shape in shapes.values())
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    size -= sum(path.stat().st_size for path in folder.glob("*.npy"))
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UserError(
            f"the features need {size / 1e9:.2f} GB, the disk of {existing} has {free / 1e9:.2f} GB free; "
            "free some, or choose a smaller token_grid"
        )


def pool_full_cache(
    config: Config, images: datasets.ImageSet, identity: CacheIdentity
) -> FeatureCache | None:
    """Make a smaller grid's cache out of the same images' full-grid cache, without the backbone; None without
    one."""
    full = cache_identity(
        dataclasses.replace(config, token_grid="full", pooling="correct", feature_path=None)
    )
    if config.token_grid == "full":
        return None
    of_this_size = {name: identity.fields[name] for name in ("img_size", "place_grid")}
    try:
        source = FeatureCache(CacheIdentity(full.folder, full.fields | of_this_size).with_images(images))
    except UserError:
        return None
    grid = token_grid(config)
    shape = grid.cached_shape(source.grid)
    n_tokens = 1 + grid.n_tokens(shape)
    shapes = source.shapes | {"tokens": (n_tokens, source.channels)}
    check_disk(identity.folder, images.labels, shapes)
    fields = source.manifest.fields | identity.fields | {"grid": shape, "tokens": n_tokens}
    writer = new_writer(config, images, identity.folder, fields, shapes)
    missing = writer.missing()
    print(
        f"features: pooling {full.folder} to {n_tokens} tokens per image, "
        f"{writer.manifest.size(missing) / 1e9:.2f} GB in {identity.folder}",
        flush=True,
    )
    rows_of = {split: source.image_rows(split) for split in datasets.SPLITS}

    def pooled(shard: Shard, skipped: list[int]) -> Iterator[dict[str, np.ndarray]]:
        arrays = source.arrays(shard.split)
        first, last = np.searchsorted(rows_of[shard.split], (shard.start, shard.stop))
        there = set(rows_of[shard.split][first:last].tolist())
        skipped += [i for i in range(shard.start, shard.stop) if i not in there]
        for start in range(first, last, CHUNK):
            rows = {name: array[start : min(start + CHUNK, last)] for name, array in arrays.items()}
            tokens = grid.pool(torch.from_numpy(rows["tokens"]).float(), source.grid).half()
            yield rows | {"tokens": tokens.numpy()}

    fill(config, writer, pooled, sum(shard.stop - shard.start for shard in missing))
    return FeatureCache(identity)


# ---------------------------------------------------------------- the two ways in
def ensure_features(
    config: Config, device: torch.device, check: Callable[[dict], object] | None = None
) -> FeatureCache:
    """The cache of a configuration; what is missing is extracted first unless ``pretrained`` says it is
    there.

    check: called with what the sidecar will say of the features before any is extracted, to refuse what will
    not go with them. Raises UserError."""
    identity = cache_identity(config)
    folder = identity.folder
    if config.pretrained:
        print(f"features: {folder} (pretrained True: taken as they are)", flush=True)
        return as_wanted(config, FeatureCache(identity))
    there = fits(identity)  # a mistake shows before the images are looked at
    try:
        images = datasets.images_of(config)
    except UserError as mistake:
        hint = f"; the features in {folder} can be used without the images: --pretrained True"
        raise UserError(f"{mistake}{hint if there else ''}") from None
    datasets.choose_classes(
        images.labels, config.class_name
    )  # a mistake shows before the long extraction, not after it
    known = grown(images, identity) if there else None
    if there and known is None and is_finished(folder):
        Manifest.read(folder).refuse_others(folder, identity.with_images(images).fields)
        if not mend(images, folder, thorough=config.verify):
            print(f"features: reusing the cache {folder}", flush=True)
            return as_wanted(config, FeatureCache(identity))
    identity = sized(config, images, identity)
    if check is not None:
        _, features = what_is_kept(config, backbones.outline(at_size(config, identity)))
        check(features)
    return make_features(config, images, identity, device, known)


def fits(identity: CacheIdentity) -> bool:
    """Whether the folder holds features of this kind, finished or not. Raises UserError when it holds
    others, or anything else."""
    if not has_features(identity.folder):
        return False
    with contextlib.suppress(Damaged):  # its shards are still known by their records
        Manifest.read(identity.folder).refuse_others(identity.folder, identity.fields)
    return True


def is_finished(folder: Path) -> bool:
    """Whether a cache is whole; one with a damaged manifest is not."""
    try:
        return Manifest.read(folder).finished
    except Damaged:
        return False


def make_features(
    config: Config,
    images: datasets.ImageSet,
    identity: CacheIdentity,
    device: torch.device,
    known: growth.Known | None,
) -> FeatureCache:
    """What is missing of a cache, from a larger one or from the images."""
    return pool_full_cache(config, images, identity) or extract(config, images, identity, device, known)


def grown(images: datasets.ImageSet, identity: CacheIdentity) -> growth.Known | None:
    """What a finished cache holds of images that are all still there, where others have come; its shards that
    change are no longer finished then. None otherwise."""
    if not is_finished(identity.folder):
        return None
    try:
        known = growth.known_before(images, FeatureCache(identity))
    except Damaged:
        return None
    if known is not None:
        manifest = Manifest.read(identity.folder)
        counts = {split: len(images.labels.split(split).names) for split in datasets.SPLITS}
        wanted = shards_of(counts, manifest.shard_rows)
        lost = lost_shards(identity.folder, manifest, part_key(images), thorough=False)
        reopen(identity.folder, {*lost, *set(manifest.shards) - set(wanted)})
    return known


def mend(images: datasets.ImageSet, folder: Path, thorough: bool) -> bool:
    """Whether anything of a finished cache has to be extracted again; it is then no longer finished.

    thorough: by the checksum of every row, else by sizes and headers. Raises UserError when no shard is of
    these images: the folder may be the wrong one."""
    manifest = Manifest.read(folder)
    lost = lost_shards(folder, manifest, part_key(images), thorough)
    if lost and all(CHANGED in damage for damage in lost.values()) and len(lost) == len(manifest.shards):
        raise UserError(
            f"the features in {folder} are of other images than those now there; give another "
            f"--feature_path, or python extractor.py --restart to replace them"
        )
    relabelled = manifest.fields["image_list"] != images.fingerprint()
    if not (lost or relabelled or labels_damage(folder, manifest)):
        if thorough:
            restore(folder, manifest)
        return False
    again = f"{len(lost)} of {len(manifest.shards)} shards are made again {listed(lost)}"
    print(f"features: {again if lost else 'all shards are kept, the labels are written again'}", flush=True)
    reopen(folder, lost)
    return True


def listed(lost: dict[Shard, str]) -> str:
    """Lost shards with the reason, the first few of them."""
    shown = [f"{shard.name}: {damage}" for shard, damage in lost.items()]
    return f"({'; '.join(shown[:MOST_NAMED])}{'; ...' if len(shown) > MOST_NAMED else ''})"


def as_wanted(config: Config, cache: FeatureCache) -> FeatureCache:
    """A finished cache, checked as the knobs want it. Raises UserError."""
    if cache.skipped and config.unreadable == "stop":
        left_out = utils.counted(len(cache.skipped), "unreadable image")
        raise UserError(
            f"the features in {cache.folder} leave out {left_out}, "
            f"{cache.skipped[0]} first; --unreadable skip takes them as they are"
        )
    if config.verify:
        lost = lost_shards(cache.folder, cache.manifest, None, thorough=True)
        if lost:
            raise Damaged(f"{len(lost)} shards of {cache.folder} are damaged {listed(lost)}; {REPAIR}")
        print(f"features: all {len(cache.manifest.shards)} shards of {cache.folder} are sound", flush=True)
    return cache


def main(config: Config) -> None:
    device = utils.set_up(config.device, config.threads)
    identity = cache_identity(config)
    folder, there = identity.folder, fits(identity)
    try:
        images = datasets.images_of(config)
    except UserError:
        if not (there and config.verify):
            raise
        as_wanted(config, FeatureCache(identity))  # without the images it is only looked at
        return
    known = grown(images, identity) if there and not config.restart else None
    if there and config.restart:
        if utils.ranks(config).world_size > 1:
            raise UserError("restart: expected one process, which others may join without restart")
        start_again(folder)
    elif there and known is None and is_finished(folder) and not mend(images, folder, thorough=True):
        cache = as_wanted(dataclasses.replace(config, verify=False), FeatureCache(identity))
        growth.remember(images, folder)
        print(f"features: all {len(cache.manifest.shards)} shards of {folder} are sound", flush=True)
        return
    identity = sized(config, images, identity)
    memory.check_features(config, what_is_kept(config, backbones.outline(at_size(config, identity)))[1])
    print(f"features written to {make_features(config, images, identity, device, known).folder}", flush=True)


if __name__ == "__main__":
    run_script(main, CONFIG)
