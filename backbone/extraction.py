"""Images -> tokens: one backbone over one data set, on the threads and the device of this machine."""

import functools
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import timm
import torch
from joblib import cpu_count
from torch import Tensor, nn

import datasets
import utils
from backbone import backbones
from backbone.backbones import Backbone
from backbone.identity import maps_kept, token_grid, what_is_kept
from backbone.resizing import ImageRows, Unreadable, resized
from backbone.runtime import PRECISIONS, Compiled
from backbone.token_grid import Bands, Places, TokenGrid
from cache.shards import NOT_FINITE
from cache.store import EXAMPLE, CacheIdentity
from config import Config, UserError

BATCH = {"cpu": 8, "cuda": 64}  # images per backbone pass: a CPU's caches hold the maps of these
IN_FLIGHT = 2  # batches on their way from a GPU while the next is computed
MOST_THREADS = 8  # that compute whole batches: more would wait for Python's lock, and share out the rest
MOST_READERS = 32  # threads: no device takes more images than they decode
SHARDS_AT_ONCE = 4  # on a GPU
PIXEL = 100  # bytes per pixel of a batch, at least: the picture and the first maps of a small backbone
EXAMPLE_NUMBERS = 64  # of each array that are kept of the fixed picture
LONG_JOB = 1000  # images from which the time is estimated before the start in any case
COMPILED_FROM = 128  # images of a job on a CPU: of fewer, compiling takes longer than it saves

Rows = dict[str, Tensor]  # of some images: tokens (n, 1 + N, C), bands (n, D), places (n, P, E)
Read = Callable[[Any], list[Tensor | Unreadable]]  # a batch -> its images (n, 3, h, w), of one size stacked


class FeatureExtractor(nn.Module):
    """From images of the backbone's size to what is kept of them, in one module: whole grey levels 0 to 255
    (n, 3, H, W) -> tokens (n, 1 + N, C) and, where kept, bands (n, D) and places (n, P, E), float16."""

    def __init__(
        self,
        backbone: Backbone,
        grid: TokenGrid,
        of_maps: dict[str, Bands | Places],
        pixel_norm: tuple[tuple[float, ...], tuple[float, ...]],
        mirror: bool,
        dtype: torch.dtype,
    ):
        """pixel_norm: mean and deviation of each colour. mirror: what is given of an image is averaged with
        what is given of its mirror image. dtype: of the backbone."""
        super().__init__()
        self.backbone, self.grid, self.of_maps = backbone, grid, of_maps
        self.depths = backbone.band_depths() if of_maps else ()
        self.mirror, self.dtype = mirror, dtype
        mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in pixel_norm)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, levels: Tensor) -> tuple[Tensor, ...]:
        levels = levels.contiguous(memory_format=torch.channels_last)
        pixels = ((levels.float() / 255 - self.mean) / self.deviation).to(self.dtype)
        tokens, maps = self.seen(pixels)
        grid = self.backbone.grid
        if self.mirror:  # mirrored back
            other, other_maps = self.seen(pixels.flip(-1))
            patches = other[:, 1:].unflatten(1, grid).flip(2).flatten(1, 2)
            tokens = (tokens + torch.cat([other[:, :1], patches], 1)) / 2
            maps = [(one + another.flip(-1)) / 2 for one, another in zip(maps, other_maps)]
        kept = [self.grid.pool(tokens, grid), *(each.measure(maps) for each in self.of_maps.values())]
        return tuple(values.half() for values in kept)

    def seen(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The tokens (n, 1 + N, C) and, where something of them is kept, the maps of normalised images."""
        if self.depths:
            return self.backbone.with_maps(pixels, self.depths)
        return self.backbone(pixels), []

    def rows(self, values: tuple[Tensor, ...]) -> Rows:
        """What ``forward`` gives, by name."""
        return dict(zip(("tokens", *self.of_maps), values))


class Extraction:
    """One backbone over one data set, with everything that was chosen for this machine."""

    def __init__(
        self, config: Config, images: datasets.ImageSet, identity: CacheIdentity, device: torch.device
    ):
        self.config, self.images, self.device = config, images, device
        self.img_size = identity.fields["img_size"]
        backbone = backbones.load_backbone(config, identity.fields["weights"])
        self.dtype = backbones.choose_precision(config.precision, device)
        self.shapes, kept = what_is_kept(config, backbone)
        self.fields = identity.fields | kept
        self.fields |= {
            "precision": str(self.dtype).removeprefix("torch."),
            "weights_sha256": utils.sha256_of_tensors(backbone.state_dict()),
            "shapes": self.shapes,
        }
        self.module = FeatureExtractor(
            backbones.speed_up(backbone, device, self.dtype),
            token_grid(config),
            maps_kept(config, self.img_size),
            (identity.fields["norm_mean"], identity.fields["norm_std"]),
            config.mirror,
            self.dtype,
        ).to(device)
        self._full_batch: Callable[[Tensor], tuple[Tensor, ...]] = self.module
        self.fields[EXAMPLE] = self._example()
        if config.compile:
            model, used = (
                backbone.model,
                "forward_intermediates" if self.module.depths else "forward_features",
            )
            setattr(model, used, torch.compile(getattr(model, used)))
        self.batch = config.extract_batch or BATCH[device.type]
        at_once = min(self.batch, max(1, images.labels.count()))
        if device.type == "cpu":
            utils.check_memory(
                f"a batch of {at_once} images of {self.img_size[0]}x{self.img_size[1]}",
                PIXEL * at_once * math.prod(self.img_size),
                "choose a smaller extract_batch or img_size",
            )

    def _noise(self, count: int) -> Tensor:
        """Fixed pictures (count, 3, H, W) uint8."""
        generator = np.random.RandomState(0)
        return torch.from_numpy(generator.randint(0, 256, (count, 3, *self.img_size), np.uint8))

    @torch.inference_mode()
    def _example(self) -> dict:
        """What the backbone gives of a fixed picture, in a few evenly spaced numbers of its tokens and of
        each map: another version of timm may build another network of the same name and weights."""
        module = self.module
        pixels = (self._noise(1).to(self.device) / 255 - module.mean) / module.deviation
        tokens, maps = module.seen(pixels.to(self.dtype))
        numbers = [values.float().flatten().cpu().numpy() for values in (tokens, *maps)]
        chosen = [each[np.linspace(0, len(each) - 1, EXAMPLE_NUMBERS).astype(int)] for each in numbers]
        return {
            "timm": timm.__version__,
            "precision": self.fields["precision"],
            "values": [[float(f"{value:.6g}") for value in each] for each in chosen],
        }

    def compile(self) -> None:
        """Have OpenVINO compute full batches from now on, on a CPU, if it can; PyTorch does the rest."""
        self._full_batch = self._compiled or self.module

    @functools.cached_property
    def _compiled(self) -> Compiled | None:
        if self.device.type != "cpu" or self.config.compile or self.dtype not in PRECISIONS:
            return None
        try:
            threads = torch.get_num_threads()
            return Compiled(self.module, self._noise(self.batch), self.dtype, max(1, self.threads), threads)
        except Exception as error:  # it fails in many ways, or is not installed
            reason = " ".join(str(error).split())[-150:]
            told = f"OpenVINO cannot run {self.config.extractor} ({reason}): PyTorch does, more slowly"
            print(told, file=sys.stderr, flush=True)
            return None

    def __getstate__(self) -> dict:
        """Of another process: what is compiled stays here, and is made again there."""
        return {name: value for name, value in vars(self).items() if name != "_compiled"} | {
            "_full_batch": self.module
        }

    def rows(self, images: Tensor) -> Rows:
        """(n, 3, h, w) uint8, any n -> tokens (n, 1 + N, C) and, where kept, bands (n, D) and places (n, P,
        E), float16 on the device."""
        batches = [
            self._batch(batch) for batch in images.to(self.device, non_blocking=True).split(self.batch)
        ]
        if len(batches) == 1:
            return batches[0]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def _batch(self, images: Tensor) -> Rows:
        compute = self._full_batch if len(images) == self.batch else self.module
        return self.module.rows(compute(resized(images, self.img_size)))

    @torch.inference_mode()
    def seconds_per_image(self, count: int) -> float:
        """Time of the backbone per image on this machine, for a job of so many, by the second of two passes
        over blank images; reading and decoding come on top."""
        few = self.threads and count < LONG_JOB  # on a CPU two images tell nearly as much as a batch
        if not few:
            self.compile()
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
        self,
        split: str,
        start: int = 0,
        stop: int | None = None,
        unreadable: list[int] | None = None,
        images: datasets.ImageSet | None = None,
    ) -> Iterator[Rows]:
        """What is kept of the images start..stop of a split (all), of the job's images or of others, in
        order, on the device (see ``rows``).

        An unreadable image is left out and its index added to the list ``unreadable``; without a list, it
        raises UserError. So do features that are not finite, at the latest after the last rows."""
        everything = ImageRows(images or self.images, split, self.img_size)
        chosen = range(len(everything))[start:stop]
        if len(chosen) >= self.batch and self.images.labels.count() >= COMPILED_FROM:
            self.compile()
        batches = (chosen[first : first + self.batch] for first in range(0, len(chosen), self.batch))
        for rows in self.computed(everything.stacks, batches):
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

    def computed(self, read: Read, batches: Iterable) -> Iterator[Rows | Unreadable]:
        """What is kept of batches of images, in order. ``read`` makes a batch's images, of one size stacked,
        or says why one cannot be read. Raises UserError on features that are not finite, at the latest after
        the last rows."""
        return (self._by_threads if self.threads else self._by_one_thread)(read, batches)

    def _by_threads(self, read: Read, batches: Iterable) -> Iterator[Rows | Unreadable]:
        """Features by threads, each of which reads and computes whole batches with its share of torch's own
        threads: none waits for another, and a second program on the machine slows down one batch, not every
        layer of all."""
        threads, workers = torch.get_num_threads(), self.threads
        share = max(1, threads // workers)

        @torch.inference_mode()
        def compute(batch) -> list[Rows | Unreadable]:
            return [images if isinstance(images, Unreadable) else checked(images) for images in read(batch)]

        def checked(images: Tensor) -> Rows:
            rows = self.rows(images)
            if not all(torch.isfinite(values).all() for values in rows.values()):
                raise UserError(NOT_FINITE)
            return rows

        try:
            with utils.thread_pool(workers, lambda: torch.set_num_threads(share)) as pool:
                for found in utils.in_order(pool, compute, batches, 2 * workers):
                    yield from found
        finally:
            torch.set_num_threads(threads)  # what threads made from now on start with

    @torch.inference_mode()
    def _by_one_thread(self, read: Read, batches: Iterable) -> Iterator[Rows | Unreadable]:
        """Features by this thread, which keeps the device busy, while others read the images. The device says
        at the end whether all was finite: asking earlier would wait for it."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for images in self._read_ahead(read, batches):
            if isinstance(images, Unreadable):
                yield images
                continue
            rows = self.rows(images)
            for values in rows.values():
                finite &= torch.isfinite(values).all()
            yield rows
        if not finite:
            raise UserError(NOT_FINITE)

    def _read_ahead(self, read: Read, batches: Iterable) -> Iterator[Tensor | Unreadable]:
        """The images, stacked batch by batch: read by ``readers`` threads into pinned memory, where there are
        any."""
        if not self.readers:
            for batch in batches:
                yield from read(batch)
            return

        def read_pinned(batch) -> list[Tensor | Unreadable]:
            return [
                s.pin_memory() if isinstance(s, Tensor) and torch.cuda.is_available() else s
                for s in read(batch)
            ]

        with utils.thread_pool(self.readers) as pool:
            for stacks in utils.in_order(pool, read_pinned, batches, self.readers + 1):
                yield from stacks


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
