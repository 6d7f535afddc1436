"""Images -> tokens by one backbone, on the threads and the device of this machine."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import timm
import torch
from joblib import cpu_count
from torch import Tensor, nn

import utils
from backbone.backbones import Backbone, load_backbone, sha256_of_tensors, speed_up
from backbone.identity import Identity
from backbone.resizing import Unreadable, read_levels, resized
from backbone.runtime import PRECISIONS, Compiled
from cache.store import EXAMPLE
from datasets import RawImage
from images.images import PixelScale

BATCH = {"cpu": 8, "cuda": 64}  # images per backbone pass: a CPU's caches hold the maps of these
MOST_IN_BATCH = 256
MOST_THREADS = 8  # that compute whole batches: more would wait for Python's lock, and share out the rest
MOST_READERS = 32  # threads: no device takes more images than they decode
SHARDS_AT_ONCE = {"cpu": 1, "cuda": 4}  # one is computed while others are read, checked and written
PIXEL = 100  # bytes per pixel of a batch, at least: the picture and the first maps of a small backbone
EXAMPLE_NUMBERS = 64  # of each array that are kept of the fixed picture
COMPILED_FROM = 128  # images of a job on a CPU: of fewer, compiling takes longer than it saves

Rows = dict[str, Tensor]  # of some images: tokens (n, 1 + N, C), bands (n, D), places (n, P, E)


class FeatureExtractor(nn.Module):
    """From images of the backbone's size to what is kept of them, in one module: whole grey levels 0 to 255
    (n, 3, H, W) -> tokens (n, 1 + N, C) and, where kept, bands (n, D) and places (n, P, E), float16."""

    def __init__(self, identity: Identity, backbone: Backbone):
        super().__init__()
        self.backbone, self.grid, self.of_maps = backbone, identity.grid, identity.of_maps
        self.depths = backbone.band_depths() if self.of_maps else ()
        self.mirror, self.dtype = identity.fields["mirror"], getattr(torch, identity.fields["precision"])
        for name in ("mean", "std"):  # of each colour
            self.register_buffer(name, torch.tensor(identity.fields[f"norm_{name}"]).view(3, 1, 1))

    def normalised(self, levels: Tensor) -> Tensor:
        """Grey levels 0 to 255 (n, 3, H, W) -> what the backbone takes."""
        return ((levels.float() / 255 - self.mean) / self.std).to(self.dtype)

    def forward(self, levels: Tensor) -> tuple[Tensor, ...]:
        pixels = self.normalised(levels.contiguous(memory_format=torch.channels_last))
        tokens, maps = self.backbone.seen(pixels, self.depths)
        if self.mirror:  # mirrored back
            other, other_maps = self.backbone.seen(pixels.flip(-1), self.depths)
            patches = other[:, 1:].unflatten(1, self.backbone.grid).flip(2).flatten(1, 2)
            tokens = (tokens + torch.cat([other[:, :1], patches], 1)) / 2
            maps = [(one + another.flip(-1)) / 2 for one, another in zip(maps, other_maps)]
        return self.kept(tokens, maps)

    def kept(self, tokens: Tensor, maps: list[Tensor]) -> tuple[Tensor, ...]:
        """What is kept of the backbone's tokens and maps."""
        tokens = self.grid.pool(tokens, self.backbone.grid)
        kept = (tokens, *(each.measure(maps) for each in self.of_maps.values()))
        return tuple(values.half() for values in kept)

    def rows(self, values: tuple[Tensor, ...]) -> Rows:
        """What ``forward`` gives, by name."""
        return dict(zip(("tokens", *self.of_maps), values))


class Extraction:
    """One backbone, with everything that was chosen for this machine."""

    def __init__(self, identity: Identity, device: torch.device, batch: int = 0, workers: int = -1):
        """batch: images of a pass; 0: chosen for the device. workers: as the knob. Raises UserError."""
        self.device, self.extractor, self.img_size = device, identity.extractor, identity.img_size
        self.scale = PixelScale(identity.fields.get("pixel_scale", {}))
        self.batch = min(batch or BATCH[device.type], MOST_IN_BATCH)
        if device.type == "cpu":  # threads that each read and compute whole batches
            chosen = min(MOST_THREADS, torch.get_num_threads())
            needed = PIXEL * self.batch * math.prod(self.img_size)
            utils.check_memory("a batch of images", needed, "choose a smaller extract_batch or img_size")
        else:  # that read images for the one that drives the device
            chosen = max(1, min(MOST_READERS, cpu_count() - 1) // SHARDS_AT_ONCE[device.type])
        self.threads = chosen if workers < 0 else max(1, workers)
        backbone = load_backbone(self.extractor, self.img_size, identity.weights_path, identity.seed)
        sha256 = sha256_of_tensors(backbone.state_dict())
        self.dtype = getattr(torch, identity.fields["precision"])
        backbone = speed_up(backbone, device, self.dtype)
        self.module = FeatureExtractor(identity, backbone).to(device)
        self.fields = identity.fields | {"weights_sha256": sha256} | self._what_is_kept()
        self.full_batch: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    def _noise(self, count: int) -> Tensor:
        """Fixed pictures (count, 3, H, W) uint8."""
        generator = np.random.RandomState(0)
        return torch.from_numpy(generator.randint(0, 256, (count, 3, *self.img_size), np.uint8))

    @torch.inference_mode()
    def _what_is_kept(self) -> dict:
        """The fields that tell what an image leaves, found with a fixed picture. EXAMPLE: a few evenly spaced
        numbers of its tokens and of each map: another version of timm may build another network of the same
        name and weights."""
        module, backbone = self.module, self.module.backbone
        grid = module.grid.cached_shape(backbone.grid)
        tokens, maps = backbone.seen(module.normalised(self._noise(1).to(self.device)), module.depths)
        rows = module.rows(module.kept(tokens, maps))
        shapes = {name: list(values.shape[1:]) for name, values in rows.items()}
        fields: dict = {"kind": "map" if backbone.is_map else "tokens", "grid": list(grid), "shapes": shapes}
        fields["tokens"], fields["n_feat"] = shapes["tokens"]
        if maps:
            fields |= {"depths": list(module.depths), "band_channels": [each.shape[1] for each in maps]}
        if "places" in shapes:
            fields["place_shape"] = shapes["places"]
        numbers = [values.float().flatten().cpu().numpy() for values in (tokens, *maps)]
        chosen = [each[np.linspace(0, len(each) - 1, EXAMPLE_NUMBERS).astype(int)] for each in numbers]
        values = [[float(f"{value:.6g}") for value in each] for each in chosen]
        precision = str(self.dtype).removeprefix("torch.")
        fields[EXAMPLE] = {"timm": timm.__version__, "precision": precision, "values": values}
        return fields

    def compile(self) -> None:
        """Have OpenVINO compute full batches from now on, on a CPU, if it can; PyTorch does the rest."""
        if self.full_batch or self.device.type != "cpu" or self.dtype not in PRECISIONS:
            return
        try:
            threads = torch.get_num_threads()
            images = self._noise(self.batch)
            self.full_batch = Compiled(self.module, images, self.dtype, self.threads, threads)
        except Exception as error:  # it fails in many ways, or is not installed
            self.full_batch = self.module
            reason = " ".join(str(error).split())[-150:]
            told = f"OpenVINO cannot run {self.extractor} ({reason}): PyTorch does, more slowly"
            print(told, file=sys.stderr, flush=True)

    @torch.inference_mode()
    def rows(self, images: Tensor) -> Rows:
        """(n, 3, h, w) uint8, any n -> what is kept of them, float16 on the device."""
        found = []
        for batch in images.to(self.device, non_blocking=True).split(self.batch):
            compute = self.full_batch if self.full_batch and len(batch) == self.batch else self.module
            found.append(compute(resized(batch, self.img_size)))
        return self.module.rows(tuple(torch.cat(parts) for parts in zip(*found)))

    def features(self, images: Sequence[RawImage]) -> Iterator[Rows | Unreadable]:
        """``rows`` of images in order, a few at a time, or why one cannot be read."""

        def read(batch: Sequence[RawImage]) -> list[Tensor | Unreadable]:
            return read_levels(batch, lambda image: [image.read(self.scale)], self.img_size)

        return self.computed(read, (images[i : i + self.batch] for i in range(0, len(images), self.batch)))

    def computed(self, read: Callable[[Any], list], batches: Iterable) -> Iterator[Rows | Unreadable]:
        """What is kept of batches of images, in order. ``read`` makes a batch's images (n, 3, h, w), of one
        size stacked, or says why one cannot be read.

        On a CPU each thread takes whole batches with its share of torch's own threads: none waits for
        another, and a second program on the machine slows down one batch, not every layer of all. On a GPU
        threads read ahead into pinned memory."""
        here, threads = self.device.type == "cpu", torch.get_num_threads()
        share = max(1, threads // self.threads)

        def begun(batch: Any) -> list:
            prepare = self.rows if here else Tensor.pin_memory
            return [each if isinstance(each, Unreadable) else prepare(each) for each in read(batch)]

        try:
            with utils.Threads(self.threads, initializer=lambda: torch.set_num_threads(share)) as pool:
                for found in utils.in_order(pool, begun, batches, 2 * self.threads):
                    for each in found:
                        yield each if here or isinstance(each, Unreadable) else self.rows(each)
        finally:
            torch.set_num_threads(threads)  # what threads made from now on start with
