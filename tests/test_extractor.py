"""Backbones and what is made of their tokens: shapes, places, pooling, weights, resizing, and the cache they
end in."""

import copy
import dataclasses
import itertools
import math
import pathlib
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import make_folder, texture, write_image
from PIL import Image
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d, Conv2dSame

import config as knobs
import datasets
import extractor
import train
from backbone import backbones, extraction, resizing, storing
from backbone.identity import cache_identity, maps_kept, token_grid, what_is_kept
from backbone.token_grid import TokenGrid
from cache.cache_writer import reopen
from cache.manifest import Manifest
from config import BACKBONES, Config, UserError
from datasets import SPLITS, Labels, Split

CPU = torch.device("cpu")


def grid_named(name: str, pooling: str = "correct", window: int = 3) -> TokenGrid:
    return TokenGrid(name, pooling, window)


def cached(grid, name: str, window: int) -> tuple[tuple[int, int], int]:
    """Rows and columns that the cache holds, and the number of patch tokens."""
    shape = grid_named(name, window=window).cached_shape(grid)
    return shape, grid_named(name, window=window).n_tokens(shape)


def load_backbone(config: Config) -> backbones.Backbone:
    return backbones.load_backbone(config, backbones.weights_source(config))


def settings(name: str, size=None, **more) -> Config:
    """Untrained weights, float32, no worker processes."""
    return Config(
        **{
            "extractor": name,
            "img_size": size,
            "weights_path": "random",
            "precision": "float32",
            "workers": 0,
            "threads": 1,
            "dataset": "folder",
            **more,
        }
    )


TINY = {  # timm model -> (image size, grid, C, prefix tokens in timm's sequence; None for a map)
    "vit_tiny_patch16_224": ((64, 64), (4, 4), 192, 1),
    "deit_tiny_distilled_patch16_224": ((64, 96), (4, 6), 192, 2),
    "cait_xxs24_224": ((96, 64), (6, 4), 192, 1),
    "vit_small_patch14_reg4_dinov2": ((42, 70), (3, 5), 384, 5),
    "resnet18": ((64, 96), (2, 3), 512, None),
    "convnext_atto": ((96, 64), (3, 2), 320, None),
    "swin_tiny_patch4_window7_224": ((224, 224), (7, 7), 768, None),
}


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    size, grid, channels, prefix = TINY[request.param]
    backbone = load_backbone(settings(request.param, size))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return SimpleNamespace(
            backbone=backbone,
            images=images,
            tokens=backbone(images),
            grid=grid,
            channels=channels,
            prefix=prefix,
        )


def test_token_shapes(tiny):
    assert tiny.backbone.grid == tiny.grid and tiny.backbone.n_feat == tiny.channels
    assert (
        tiny.tokens.shape == (2, 1 + math.prod(tiny.grid), tiny.channels)
        and tiny.tokens.dtype == torch.float32
    )
    assert (
        not any(parameter.requires_grad for parameter in tiny.backbone.parameters())
        and not tiny.backbone.model.training
    )


def test_tokens_are_timms(tiny):
    """The class token and the patch tokens stand in timm's own final features; prefix tokens but the first
    are dropped."""
    with torch.inference_mode():
        features = tiny.backbone.model.forward_features(tiny.images)
    if tiny.prefix is None:
        if features.shape[1] != tiny.channels:
            features = features.permute(0, 3, 1, 2)
        assert tuple(features.shape[2:]) == tiny.grid
        for row in range(tiny.grid[0]):
            for column in range(tiny.grid[1]):
                assert torch.equal(
                    tiny.tokens[:, 1 + row * tiny.grid[1] + column], features[:, :, row, column]
                )
        assert torch.allclose(tiny.tokens[:, 0], features.mean((2, 3)), atol=1e-5)
    else:
        assert features.shape[1] == tiny.prefix + math.prod(tiny.grid)
        assert torch.equal(tiny.tokens[:, 0], features[:, 0])
        assert torch.equal(tiny.tokens[:, 1:], features[:, tiny.prefix :])


def test_images_do_not_see_each_other(tiny):
    with torch.inference_mode():
        assert torch.allclose(tiny.backbone(tiny.images[1:]), tiny.tokens[1:], atol=1e-4)


@pytest.mark.parametrize("size, grid", [((64, 96), (4, 6)), ((96, 64), (6, 4))])
def test_rows_come_before_columns(size, grid):
    """The token that changes most with a piece of the image is row * columns + column."""
    backbone = load_backbone(settings("vit_tiny_patch16_224", size))
    assert backbone.grid == grid
    side = size[0] // grid[0]
    with torch.inference_mode():
        plain = backbone(torch.zeros(1, 3, *size))
        for row, column in ((0, 0), (1, 0), (0, 1), (3, 2), (grid[0] - 1, grid[1] - 1)):
            image = torch.zeros(1, 3, *size)
            image[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = 3.0
            moved = (backbone(image) - plain)[0, 1:].norm(dim=1)
            assert moved.argmax().item() == row * grid[1] + column


NAMED = {  # docs/method.md, section 6: name -> (C, grid)
    "VIT": (768, (24, 24)),
    "deit": (768, (24, 24)),
    "cait": (384, (24, 24)),
    "clip": (768, (14, 14)),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_backbones(name):
    """At their own image size, untrained: shapes as listed, the tokens timm's own, pooled cells an
    independent average."""
    backbone = load_backbone(settings(name))
    channels, (rows, columns) = NAMED[name]
    assert (backbone.n_feat, backbone.grid) == (channels, (rows, columns))
    image = torch.randn(1, 3, *backbone.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features, tokens = backbone.model.forward_features(image), backbone(image)
    prefix = features.shape[1] - rows * columns
    assert prefix == (2 if name == "deit" else 1) and tokens.shape == (1, 1 + rows * columns, channels)
    assert torch.equal(tokens[:, 0], features[:, 0]) and torch.equal(tokens[:, 1:], features[:, prefix:])
    side = rows // 3 if rows % 3 == 0 else rows // 2
    step = rows // side
    pooled = grid_named(str(side)).pool(tokens, backbone.grid)
    cell = [
        features[0, prefix + row * columns + column]
        for row in range(step, 2 * step)
        for column in range(2 * step, 3 * step)
    ]
    assert (pooled[0, 1 + side + 2] - torch.stack(cell).mean(0)).abs().max() < 1e-5 * tokens.abs().max()


def test_all_names_are_timms():
    assert {*NAMED, *OUTLINED, *backbones.WEIGHT_PACKAGES} == {*BACKBONES} and knobs.SIZES.keys() <= {
        *OUTLINED
    }
    for name, model in BACKBONES.items():
        fields = cache_identity(settings(name)).fields
        assert fields["timm_model"] == model and timm.is_model(model.split(".")[0])
        own = knobs.SIZES.get(name, timm.get_pretrained_cfg(model).input_size[1:])
        assert tuple(fields["img_size"]) == tuple(own)


OUTLINED = {  # too large to be built in a moment
    "VIT_L": (24, 1024, 1),
    "dinov2_s": (16, 384, 1),
    "dinov2_b": (16, 768, 1),
    "dinov2_l": (16, 1024, 1),
    "dinov3_b": (16, 768, 5),
}


@pytest.mark.parametrize("name", OUTLINED)
def test_short_names_have_the_sizes_that_they_are_used_at(name):
    """Each with its grid, channels and prefix tokens; DINOv2 also at 448 and at the 518 of its last
    training."""
    side, channels, prefix = OUTLINED[name]
    backbone = backbones.outline(settings(name))
    assert backbone.grid == (side, side) and backbone.n_feat == channels
    assert backbone.prefix == prefix and backbone.has_class_token
    if name.startswith("dinov2"):
        for size, side in ((448, 32), (518, 37)):
            assert backbones.outline(settings(name, (size, size))).grid == (side, side)


def test_normalisation_is_the_backbones_own():
    fields = cache_identity(settings("VIT")).fields
    assert fields["norm_mean"] == fields["norm_std"] == (0.5, 0.5, 0.5), (
        "this ViT was trained with 0.5, not with ImageNet's"
    )
    assert cache_identity(settings("VIT", pixel_norm=(0.1, 0.2, 0.3, 1, 2, 3))).fields["norm_mean"] == (
        0.1,
        0.2,
        0.3,
    )


# ---------------------------------------------------------------- pooling
def numbered(grid, channels: int = 5, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1 + math.prod(grid), channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid, side", [((6, 6), 2), ((6, 9), 3), ((4, 4), 4), ((8, 2), 1)])
def test_pooled_grid(grid, side):
    tokens = numbered(grid)
    pooled = grid_named(str(side)).pool(tokens, grid)
    assert pooled.shape == (2, 1 + side * side, 5) and torch.equal(pooled[:, 0], tokens[:, 0])
    height, width = grid[0] // side, grid[1] // side
    for i in range(side):
        for j in range(side):
            cells = [
                1 + row * grid[1] + column
                for row in range(i * height, (i + 1) * height)
                for column in range(j * width, (j + 1) * width)
            ]
            assert torch.allclose(pooled[:, 1 + i * side + j], tokens[:, cells].mean(1), atol=1e-6)


def test_full_grid_is_untouched():
    tokens = numbered((3, 4))
    assert torch.equal(grid_named("full").pool(tokens, (3, 4)), tokens)


def test_released_pooling_mixes():
    """(B, N, C) read as (B, C, rows, columns): entry k of an image's patch block lands on channel k // N."""
    grid, tokens = (2, 4), numbered((2, 4))
    flat = tokens[:, 1:].reshape(2, -1)
    pooled = grid_named("2", "released").pool(tokens, grid)
    for channel in range(5):
        for i in range(2):
            for j in range(2):
                entries = [channel * 8 + i * 4 + 2 * j + column for column in (0, 1)]
                assert torch.allclose(pooled[:, 1 + 2 * i + j, channel], flat[:, entries].mean(1), atol=1e-6)


@pytest.mark.parametrize("grid, window", [((6, 6), 3), ((7, 5), 3), ((4, 3), 2)])
def test_compact_tokens(grid, window):
    """Per window its mean, then for every window the root mean square of what the mean loses."""
    tokens = numbered(grid)
    rows, columns = math.ceil(grid[0] / window), math.ceil(grid[1] / window)
    got = grid_named("compact", window=window).pool(tokens, grid)
    assert got.shape == (2, 1 + 2 * rows * columns, 5) and torch.equal(got[:, 0], tokens[:, 0])
    maps = tokens[:, 1:].unflatten(1, grid)
    for i in range(rows):
        for j in range(columns):
            part = maps[:, i * window : (i + 1) * window, j * window : (j + 1) * window].flatten(1, 2)
            assert torch.allclose(got[:, 1 + i * columns + j], part.mean(1), atol=1e-5)
            assert torch.allclose(
                got[:, 1 + rows * columns + i * columns + j], part.std(1, correction=0), atol=1e-5
            )
    assert cached(grid, "compact", window) == ((rows, columns), 2 * rows * columns)


def test_cached_grid():
    assert cached((7, 5), "full", 3) == ((7, 5), 35)
    assert cached((24, 24), "8", 3) == ((8, 8), 64)
    with pytest.raises(UserError, match="at most 5"):
        cached((7, 5), "6", 3)


# ---------------------------------------------------------------- weights
def test_random_weights_follow_the_seed():
    first, again, other = (
        load_backbone(settings("resnet18", (32, 32), seed=seed)).model.conv1.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "efficientnet_lite0"])
def test_weights_file_round_trip(tmp_path, name, suffix):
    torch.manual_seed(5)
    state = timm.create_model(BACKBONES.get(name, name)).state_dict()
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    loaded = load_backbone(settings(name, weights_path=str(path))).model.state_dict()
    assert {key for key in state if key.split(".")[0] not in ("head", "fc", "classifier")} == loaded.keys()
    assert all(torch.equal(state[key], loaded[key]) for key in loaded)


def test_weights_with_another_classifier(tmp_path):
    """A model fine-tuned on other classes serves as well: its classifier is not asked for."""
    state = timm.create_model("resnet18", num_classes=7).state_dict()
    torch.save(state, tmp_path / "w.pth")
    loaded = load_backbone(settings("resnet18", weights_path=str(tmp_path / "w.pth"))).model.state_dict()
    assert all(torch.equal(state[key], loaded[key]) for key in loaded)


def test_weights_without_a_classifier(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    save_file(
        {key: value for key, value in state.items() if not key.startswith("head.")},
        tmp_path / "w.safetensors",
    )
    loaded = load_backbone(
        settings("vit_tiny_patch16_224", weights_path=str(tmp_path / "w.safetensors"))
    ).model
    assert torch.equal(loaded.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])


class Executes:
    """A pickle of it makes a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_weights_that_would_execute(tmp_path):
    proof = tmp_path / "executed"
    for number, content in enumerate((Executes(proof), {"state_dict": {"conv1.weight": Executes(proof)}})):
        torch.save(content, tmp_path / f"{number}.pth")
        (tmp_path / f"{number}.bin").write_bytes(pickle.dumps(content))
        for path in (tmp_path / f"{number}.pth", tmp_path / f"{number}.bin"):
            assert "would execute" in refused(path, "resnet18")
    assert not proof.exists()
    pickle.loads((tmp_path / "0.bin").read_bytes())
    assert proof.exists(), "loaded carelessly, it does execute"


def test_weights_with_more_than_the_model_has(tmp_path):
    """The tensors of a deeper model hold those of a shallower one, with other values."""
    state = timm.create_model("resnet18").state_dict() | {"layer1.2.conv1.weight": torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    line = refused(tmp_path / "w.safetensors", "resnet18")
    assert "another model" in line and "layer1.2.conv1.weight" in line


def refused(path, name="vit_tiny_patch16_224") -> str:
    with pytest.raises(UserError) as mistake:
        load_backbone(settings(name, weights_path=str(path)))
    return str(mistake.value)


def test_wrong_weights(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    assert "resnet.pth" in refused(tmp_path / "resnet.pth")
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=11).state_dict(), tmp_path / "shallow.pth")
    assert "blocks.11" in refused(tmp_path / "shallow.pth")
    torch.save(timm.create_model("vit_tiny_patch16_224", embed_dim=96).state_dict(), tmp_path / "narrow.pth")
    assert "narrow.pth" in refused(tmp_path / "narrow.pth")
    (tmp_path / "garbage.safetensors").write_bytes(b"no weights at all")
    assert "garbage" in refused(tmp_path / "garbage.safetensors")
    assert "nowhere.pth" in refused(tmp_path / "nowhere.pth")


class Spiteful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_weights_are_never_unpickled_as_code(tmp_path):
    torch.save({"conv1.weight": Spiteful(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    refused(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def lite():
    return load_backbone(settings("efficientnet_lite0", (64, 64), weights_path=None))


def test_lite0_takes_the_packages_weights(lite):
    file = backbones.packaged_weights("efficientnet_lite0")
    packaged = list(torch.load(file, weights_only=True, map_location="cpu").values())
    loaded = list(lite.model.state_dict().values())
    assert len(loaded) == len(packaged) == 296
    assert all(torch.equal(a, b) for a, b in zip(loaded, packaged))


def test_folded_batch_norms_agree(lite):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    folded = backbones.fold_batch_norms(lite.model)
    count = [
        sum(isinstance(module, BatchNormAct2d) for module in model.modules())
        for model in (lite.model, folded)
    ]
    assert count[1] == 0 < count[0]
    with torch.inference_mode():
        wanted, got = lite.model.forward_features(images), folded.forward_features(images)
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_make_fast_agrees(lite):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    fresh = load_backbone(settings("efficientnet_lite0", (64, 64), weights_path=None))
    with torch.inference_mode():
        wanted = lite(images)
        got = backbones.speed_up(fresh, CPU, torch.float32)(images)
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.skipif(not backbones._convolves(torch.float32), reason="no fused convolution in this PyTorch")
@pytest.mark.parametrize("act", backbones.FusedConvolution.ACTIVATIONS)
@pytest.mark.parametrize("size", [(13, 16), (16, 13)], ids=str)
def test_fused_convolution_agrees(act, size):
    """Every activation; TensorFlow's padding of even and odd totals on each side, plain padding, groups."""
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(2, 4, *size, generator=generator)
    for conv in (
        Conv2dSame(4, 6, 3, stride=2),
        Conv2dSame(4, 4, 5, stride=1, groups=4),
        torch.nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0)),
    ):
        assert backbones.FusedConvolution.takes(conv, act(), torch.float32)
        with torch.inference_mode():
            wanted, got = act()(conv(x)), backbones.FusedConvolution(conv, act())(x)
        assert torch.allclose(got, wanted, atol=1e-5), (conv, act)


def test_fused_convolution_leaves_what_it_cannot_do():
    def takes(conv, act):
        return backbones.FusedConvolution.takes(conv, act, torch.float32)

    assert not takes(torch.nn.Conv2d(3, 3, 3), torch.nn.GELU())
    assert not takes(torch.nn.Conv2d(3, 3, 3, dilation=2), torch.nn.ReLU())
    assert not takes(torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), torch.nn.ReLU())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_any_processor(dtype):
    """The private operator refuses half precision where there is no AVX-512; PyTorch's own does not."""
    plain = load_backbone(settings("mobilenetv3_small_050", (32, 32)))
    fast = backbones.speed_up(copy.deepcopy(plain), CPU, dtype)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, got = plain(image), fast(image.to(dtype))
    assert torch.nn.functional.cosine_similarity(got, wanted, 2).min() > 0.98


def test_automatic_precision_is_float32_on_a_cpu():
    assert backbones.choose_precision("auto", CPU) == torch.float32
    assert backbones.choose_precision("bfloat16", CPU) == torch.bfloat16


def test_folding_is_dropped_where_it_would_change_the_function(lite):
    """Neighbours in the list of modules that are not neighbours in the forward pass."""

    class Crossed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 3, 1), BatchNormAct2d(3)
            torch.nn.init.normal_(self.norm.running_mean)

        def forward_features(self, x):
            return self.conv(self.norm(x))

    model = Crossed().eval()
    assert backbones.fold_batch_norms(model) is model


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "name, told",
    [
        ("vit_tiny_patch16_22", "vit_tiny_patch16_224"),
        ("resnet19", "resnet18"),
        ("efficientnet_lit0", "efficientnet_lite0"),
    ],
)
def test_unknown_model(name, told):
    with pytest.raises(UserError, match=f"{name}.*{told}"):
        load_backbone(settings(name))


def test_unknown_tag():
    with pytest.raises(UserError, match="no_such_tag"):
        load_backbone(settings("resnet18.no_such_tag"))


@pytest.mark.parametrize(
    "name, size", [("vit_tiny_patch16_224", (8, 8)), ("swin_tiny_patch4_window7_224", (3, 3))]
)
def test_image_size_that_does_not_fit(name, size):
    with pytest.raises(UserError, match=f"{size[0]}x{size[1]}"):
        load_backbone(settings(name, size))


def test_weights_not_reachable(monkeypatch):
    """What the hub's client raises without a network becomes one line that says what to do."""

    def offline(*arguments, **options):
        assert options["pretrained"]
        raise OSError("no route to host\nand a second line")

    monkeypatch.setattr(backbones.timm, "create_model", offline)
    with pytest.raises(UserError, match="not reachable.*no route to host.*--weights_path") as mistake:
        load_backbone(settings("VIT", weights_path=None))
    assert "\n" not in str(mistake.value) and "--extractor efficientnet_lite0" in str(mistake.value)


@pytest.mark.parametrize("there", [True, False])
def test_no_waiting_for_a_hub_that_is_not_there(monkeypatch, there):
    """Its client is told to look into the cache only, for as long as the weights are loaded."""
    hub, seen = backbones.huggingface_hub.constants, []

    def create(*arguments, **options):
        seen.append(hub.HF_HUB_OFFLINE)
        raise OSError

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(backbones.utils, "reachable", lambda url: there and url == hub.ENDPOINT)
    monkeypatch.setattr(backbones.timm, "create_model", create)
    for weights_path in (None, "random"):
        with pytest.raises(UserError):
            load_backbone(settings("VIT", weights_path=weights_path))
    assert seen == [not there, False] and hub.HF_HUB_OFFLINE is False


# ---------------------------------------------------------------- images
SIZES = [((32, 32), (64, 64)), ((20, 28), (48, 80)), ((8, 8), (56, 56)), ((32, 32), (40, 33))]


def grey(images: torch.Tensor, size) -> torch.Tensor:
    """What prepare makes of images, in grey levels."""
    return resizing.prepare(images, size, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), torch.float32) * 255


@pytest.mark.parametrize("old, new", SIZES)
def test_resizing_is_pillows(old, new):
    images = np.random.RandomState(0).randint(0, 256, (3, *old, 3), dtype=np.uint8)
    got = grey(torch.from_numpy(images).permute(0, 3, 1, 2), new)
    wanted = np.stack(
        [np.asarray(Image.fromarray(image).resize(new[::-1], Image.Resampling.BICUBIC)) for image in images]
    )
    difference = np.abs(got.permute(0, 2, 3, 1).numpy() - wanted)
    assert difference.max() <= 2 + 1e-3, "torch rounds its weights a little coarser than Pillow"
    assert (difference > 1 + 1e-3).mean() < 1e-3 and (difference > 1e-3).mean() < 0.01


@pytest.mark.parametrize("old, new", [*SIZES, ((28, 28), (384, 384)), ((9, 5), (9, 7))])
def test_every_device_resizes_alike(old, new):
    """What a GPU makes of a picture that grows is what the CPU makes of it, to the last grey level."""
    images = torch.randint(0, 256, (3, 3, *old), dtype=torch.uint8)
    got = resizing.resize_like_pillow(images, new)
    assert torch.equal(got, grey(images, new).round())


def test_normalising():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    got = resizing.prepare(images, (4, 4), mean.view(3, 1, 1), std.view(3, 1, 1), torch.float32)
    for channel in range(3):
        assert torch.allclose(
            got[:, channel], (images[:, channel] / 255 - mean[channel]) / std[channel], atol=1e-6
        )


@pytest.mark.parametrize("size", [(40, 50), (20, 90), (90, 20)])
def test_larger_images_are_resized_by_pillow(size):
    """Where one side is larger than the backbone's, Pillow resizes; the outcome is the same function of the
    image."""
    image = texture(1, np.random.RandomState(0), 96)[: size[0], : size[1]]
    images = datasets.ImageSet(Labels((), Split.of(["a"], [0]), Split.of([], [])), lambda split, i: image)
    row = resizing.ImageRows(images, "train", (32, 48))[0]
    got = grey(row[None], (32, 48))[0].permute(1, 2, 0).numpy()
    wanted = np.asarray(Image.fromarray(image).resize((48, 32), Image.Resampling.BICUBIC))
    assert np.abs(got - wanted).max() <= 1 + 1e-3


def test_stack_rows():
    small, large = torch.zeros(3, 2, 2), torch.ones(3, 4, 2)
    stacks = resizing.stack_rows([small, small + 1, large, small])
    assert [tuple(stack.shape) for stack in stacks] == [(2, 3, 2, 2), (1, 3, 4, 2), (1, 3, 2, 2)]
    mistake = resizing.Unreadable(1, "broken")
    assert resizing.stack_rows([small, mistake, small])[1] is mistake
    assert len(resizing.stack_rows([mistake, mistake])) == 2


# ---------------------------------------------------------------- extraction
@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A folder of images of several sizes; the working directory is tmp_path."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", classes=("a", "b"), n_train=5, n_test=3)
    for name, size in (("train/a/01.png", 60), ("train/b/02.png", 20), ("test/a/00.png", 48)):
        write_image(tmp_path / "images" / name, texture(1, np.random.RandomState(3), size))
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def shards_of_any_size(monkeypatch):
    monkeypatch.setattr(storing, "SHARD_ROWS", 0)


def small(folder, shard_rows: int = 0, **more) -> Config:
    """New caches have ``shard_rows`` images per file from now on; 0: as many as they have by themselves."""
    storing.SHARD_ROWS = shard_rows
    return settings("resnet18", (32, 48), dataset_path=str(folder), **more)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"extract_batch": 2},
        {"workers": 1},
        {"workers": 3, "extract_batch": 2},
        {"token_grid": "1"},
        {"token_grid": "compact"},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_cache_holds_the_backbones_tokens(mixed, options):
    """Row i of the cache is image i through the plain backbone, whatever the batches, workers and sizes on
    the way."""
    config = small(mixed, **options)
    cache = extractor.ensure_features(config, CPU)
    backbone, images = load_backbone(config), datasets.load_images("folder", str(mixed))
    mean, std = (torch.tensor(cache.meta[key]).view(3, 1, 1) for key in ("norm_mean", "norm_std"))
    assert cache.labels.fingerprint() == images.labels.fingerprint()
    for split in SPLITS:
        tokens = cache.tokens(split)
        assert len(tokens) == len(images.labels.split(split).names)
        for i in range(len(tokens)):
            image = Image.fromarray(images.read(split, i)).resize((48, 32), Image.Resampling.BICUBIC)
            pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
            with torch.inference_mode():
                wanted = token_grid(config).pool(backbone(pixels[None]), (1, 2))[0]
            error = (torch.from_numpy(tokens[i]).float() - wanted).abs().max() / wanted.abs().max()
            assert error < (0.05 if "precision" in options else 0.01), (split, i)


def test_sidecar_describes_the_cache(mixed):
    cache = extractor.ensure_features(small(mixed), CPU)
    meta = cache.meta
    assert (
        meta["n_feat"] == 512
        and tuple(meta["grid"]) == (1, 2)
        and meta["tokens"] == 3
        and meta["count"] == {"train": 10, "test": 6}
    )
    assert (
        meta["precision"] == "float32" and meta["dtype"] == "float16" and meta["weights"] == "random, seed 0"
    )


def test_features_are_extracted_once(mixed, monkeypatch, capsys):
    extractor.ensure_features(small(mixed), CPU)
    monkeypatch.setattr(extractor, "extract", lambda *_: pytest.fail("extracted again"))
    extractor.ensure_features(small(mixed), CPU)
    assert "reusing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"pixel_norm": (0.1, 0.1, 0.1, 0.5, 0.5, 0.5)},
        {"seed": 1},
        {"token_grid": "1"},
        {"precision": "bfloat16"},
        {"img_size": (32, 32)},
    ],
    ids=str,
)
def test_other_settings_are_refused(mixed, change):
    extractor.ensure_features(small(mixed, feature_path="kept"), CPU)
    field = {"seed": "weights", "pixel_norm": "norm_mean"}.get(*change, next(iter(change)))
    with pytest.raises(UserError, match=f"kept.*{field} is"):
        extractor.ensure_features(Config(**{**vars(small(mixed, feature_path="kept")), **change}), CPU)


def test_changed_images_are_refused(mixed):
    extractor.ensure_features(small(mixed), CPU)
    (mixed / "train" / "a" / "00.png").unlink()
    with pytest.raises(UserError, match="other images"):
        extractor.ensure_features(small(mixed), CPU)


def test_pretrained(mixed, monkeypatch):
    """True: the cache serves without the raw images; and is demanded."""
    with pytest.raises(UserError, match="no features"):
        extractor.ensure_features(small(mixed, pretrained=True), CPU)
    wanted = extractor.ensure_features(small(mixed), CPU).tokens("test")[np.arange(6)]
    shutil.rmtree(mixed)
    assert (
        extractor.ensure_features(small(mixed, pretrained=True), CPU).tokens("test")[np.arange(6)] == wanted
    ).all()
    with pytest.raises(UserError, match="--pretrained True"):
        extractor.ensure_features(small(mixed), CPU)


def test_an_unreadable_image_costs_its_shard_only(mixed):
    """The others are there when it is repaired, or taken out, or left out."""
    broken = mixed / "test" / "b" / "02.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"broken")
    for workers in (0, 1, 3):
        with pytest.raises(UserError, match="1 unreadable image: test/b/02.png;.*5 of 6 shards are kept"):
            extractor.ensure_features(small(mixed, workers=workers, shard_rows=3), CPU)
    broken.write_bytes(whole)
    cache = extractor.ensure_features(small(mixed, shard_rows=3), CPU)
    straight = extractor.ensure_features(small(mixed, shard_rows=3, feature_path="other"), CPU)
    assert cache.meta == straight.meta and cache.meta["count"] == {"train": 10, "test": 6}


def test_unreadable_images_are_left_out_on_request(mixed, capsys):
    """Which is told by every script, whoever left them out."""
    (mixed / "train" / "a" / "03.png").write_bytes(b"broken")
    config = small(mixed, unreadable="skip")
    told = "left out: 1 unreadable image, train/a/03.png first"
    cache = extractor.ensure_features(config, CPU)
    assert capsys.readouterr().out.splitlines()[-1] == told
    for ask in (extractor.main, train.main):
        ask(dataclasses.replace(config, class_name="a"))
        assert told in capsys.readouterr().out.splitlines()
    assert cache.skipped == ["train/a/03.png"] and "train/a/03.png" not in cache.labels.train.names
    assert len(cache.tokens("train")) == len(cache.labels.train.names) == 9
    extractor.ensure_features(config, CPU)
    pooled = extractor.ensure_features(dataclasses.replace(config, token_grid="1"), CPU)
    assert pooled.skipped == cache.skipped
    assert (pooled.tokens("train").semantic() == cache.tokens("train").semantic()).all()
    with pytest.raises(UserError, match="leave out 1 unreadable image, train/a/03.png first; --unreadable"):
        extractor.ensure_features(small(mixed), CPU)


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_last(path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def test_extractor_mends_the_damaged_shard_alone(mixed, capsys):
    config = small(mixed, shard_rows=4, feature_path="kept")
    extractor.main(config)
    before = contents(Path("kept"))
    flip_last(Path("kept") / "train-tokens-00001.npy")
    (Path("kept") / "test-00000.json").unlink()
    extractor.main(config)
    assert "1 of 5 shards are made again (train-00001: " in capsys.readouterr().out
    assert contents(Path("kept")) == before
    extractor.main(config)
    assert "all 5 shards of kept are sound" in capsys.readouterr().out


def test_before_training_a_file_that_is_cut_or_gone_is_seen(mixed, capsys):
    """Rows are checked when they are read; extractor.py mends them."""
    config = small(mixed, shard_rows=4, feature_path="kept")
    extractor.main(config)
    before = contents(Path("kept"))
    flip_last(Path("kept") / "train-tokens-00001.npy")
    cache = extractor.ensure_features(config, CPU)
    with pytest.raises(UserError, match="checksum"):
        cache.tokens("train")[:]
    extractor.main(config)
    extractor.ensure_features(config, CPU).tokens("train")[:]
    assert contents(Path("kept")) == before
    (Path("kept") / "test-tokens-00000.npy").unlink()
    extractor.ensure_features(config, CPU)
    assert contents(Path("kept")) == before


def test_pretrained_features_are_checked_without_the_images(mixed, capsys):
    extractor.main(small(mixed, feature_path="kept"))
    mixed.rename("elsewhere")
    with pytest.raises(UserError, match="dataset_path"):
        extractor.main(small(mixed, feature_path="kept"))
    config = small(mixed, feature_path="kept", pretrained=True)
    extractor.main(config)
    assert "all 2 shards of kept are sound" in capsys.readouterr().out
    flip_last(Path("kept") / "test-tokens-00000.npy")
    with pytest.raises(UserError, match=r"1 shards of kept are damaged \(test-00000: .*extractor.py"):
        extractor.main(config)


def test_changed_images_cost_their_shards_only(mixed, capsys):
    """For extractor.py; training refuses the features first. Labels come along."""
    config = small(mixed, shard_rows=4, feature_path="kept")
    extractor.main(config)
    write_image(mixed / "train" / "a" / "04.png", texture(2, np.random.RandomState(9)))
    write_image(mixed / "test" / "b" / "03.png", texture(2, np.random.RandomState(9)))
    with pytest.raises(UserError, match="other images.*python extractor.py extracts those that have changed"):
        extractor.ensure_features(config, CPU)
    extractor.main(config)
    assert "1 of 5 shards are made again (train-00001: its images have changed)" in capsys.readouterr().out
    straight = extractor.ensure_features(dataclasses.replace(config, feature_path="other"), CPU)
    assert extractor.ensure_features(config, CPU).meta == straight.meta
    assert contents(Path("kept")) == contents(Path("other"))


def test_damaged_labels_cost_no_shard_and_are_told(mixed, capsys):
    config = small(mixed, feature_path="kept")
    extractor.main(config)
    before = contents(Path("kept"))
    flip_last(Path("kept") / "labels.json")
    capsys.readouterr()
    extractor.main(config)
    told = capsys.readouterr().out
    assert "all shards are kept, the labels are written again" in told and "made again" not in told
    assert contents(Path("kept")) == before


def test_a_pooled_cache_goes_on(mixed, monkeypatch):
    """From the full one, without the backbone, with the bytes of an uninterrupted one."""
    config = small(mixed, shard_rows=4, token_grid="1")
    extractor.ensure_features(small(mixed, shard_rows=4), CPU)
    monkeypatch.setattr(extractor, "extract", None)
    folder = extractor.ensure_features(config, CPU).folder
    before = contents(folder)
    reopen(folder, seen := Manifest.read(folder), seen.shards[1:3])
    extractor.ensure_features(config, CPU)
    assert contents(folder) == before


def test_images_taken_away(mixed):
    """The shards before them stay; those that are left over go."""
    config = small(mixed, shard_rows=2, feature_path="kept")
    extractor.main(config)
    for name in ("train/b/03.png", "train/b/04.png", "test/b/00.png"):
        (mixed / name).unlink()
    inode = (Path("kept") / "train-tokens-00000.npy").stat().st_ino
    extractor.main(config)
    extractor.main(dataclasses.replace(config, feature_path="other"))
    assert contents(Path("kept")) == contents(Path("other"))
    assert (Path("kept") / "train-tokens-00000.npy").stat().st_ino == inode


@pytest.mark.parametrize("finished", [True, False])
def test_other_images_altogether_are_refused(mixed, finished):
    """The folder, or the images, may be the wrong ones: nothing is replaced without restart."""
    config = small(mixed, feature_path="kept")
    extractor.main(config)
    if not finished:
        reopen(Path("kept"), seen := Manifest.read(Path("kept")), seen.shards[:1])
    before = contents(Path("kept"))
    other = make_folder(Path("other images"), classes=("a", "b"), n_train=5, n_test=3, seed=7)
    config = dataclasses.replace(config, dataset_path=str(other))
    with pytest.raises(UserError, match="other images.*restart"):
        extractor.main(config)
    assert contents(Path("kept")) == before
    extractor.main(dataclasses.replace(config, restart=True))
    assert (
        extractor.ensure_features(config, CPU).meta["image_list"] == datasets.images_of(config).fingerprint()
    )


def test_restart_extracts_everything_again(mixed, capsys):
    config = small(mixed, feature_path="kept", restart=True)
    extractor.main(config)
    before = contents(Path("kept"))
    capsys.readouterr()
    extractor.main(config)
    assert "extracting 16 images" in capsys.readouterr().out and contents(Path("kept")) == before
    with pytest.raises(UserError, match="restart: expected one process"):
        extractor.main(dataclasses.replace(config, worker="0/2"))


def test_features_of_other_settings_are_refused_before_any_work(mixed, monkeypatch):
    """Finished or not, by both ways in, before images are read or a backbone is built."""
    config = small(mixed, feature_path="kept")
    extractor.main(config)
    monkeypatch.setattr(datasets, "images_of", lambda config: pytest.fail("images were looked at"))
    for reopened in (False, True):
        if reopened:
            reopen(Path("kept"), seen := Manifest.read(Path("kept")), seen.shards)
        for way_in in (extractor.main, lambda config: extractor.ensure_features(config, CPU)):
            with pytest.raises(UserError, match="kept.*token_grid is full there"):
                way_in(dataclasses.replace(config, token_grid="1"))
            Path("mine").mkdir(exist_ok=True)
            (Path("mine") / "thesis.txt").write_text("mine")
            with pytest.raises(UserError, match="mine is there and holds no features"):
                way_in(dataclasses.replace(config, feature_path="mine"))


def test_the_disk_is_checked_before_the_backbone_is_built(mixed, monkeypatch):
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    monkeypatch.setattr(backbones, "load_backbone", lambda *_: pytest.fail("built"))
    with pytest.raises(UserError, match="the features need 0.00 GB"):
        extractor.ensure_features(small(mixed), CPU)


@pytest.mark.parametrize(
    "options", [{}, {"token_grid": "compact"}, {"token_grid": "1"}, {"bands": True}], ids=str
)
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_outline_tells_what_the_backbone_gives(name, options):
    config = settings(name, (64, 96), **options)
    outline, loaded = backbones.outline(config), load_backbone(config)
    assert what_is_kept(config, outline) == what_is_kept(config, loaded)
    assert all(parameter.is_meta for parameter in outline.parameters())


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_with_mirror_an_image_and_its_mirror_image_give_mirrored_features(mixed, name):
    """The mean of both, cell by cell: the semantic token and rings, which have no place, are the same."""
    config = settings(name, (64, 96), dataset_path=str(mixed), bands=True, places=4)
    image = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (1, 3, 64, 96), np.uint8))
    plain, both = job_of(config), job_of(dataclasses.replace(config, mirror=True))
    one, other = plain.rows(image), plain.rows(image.flip(-1))
    found, mirrored = both.rows(image), both.rows(image.flip(-1))
    near = {"atol": 0.02, "rtol": 0.01}  # sums in half precision
    assert not torch.allclose(one["tokens"][:, 0].float(), other["tokens"][:, 0].float(), **near)

    def on_grid(rows, array):
        grid = plain.full_grid if array == "tokens" else both.of_maps["places"].grid
        return rows[array].float()[:, -grid[0] * grid[1] :].unflatten(1, grid)

    for array in ("tokens", "places"):
        torch.testing.assert_close(on_grid(found, array), on_grid(mirrored, array).flip(2), **near)
        mean = (on_grid(one, array) + on_grid(other, array).flip(2)) / 2
        torch.testing.assert_close(on_grid(found, array), mean, **near)
    semantic = (one["tokens"][:, 0].float() + other["tokens"][:, 0].float()) / 2
    torch.testing.assert_close(found["tokens"][:, 0].float(), semantic, **near)
    torch.testing.assert_close(found["bands"], mirrored["bands"], **near)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_that_are_not_finite(mixed, tmp_path, workers):
    with pytest.raises(UserError, match="finite"):
        norm = (0.5, 0.5, 0.5, 1e-12, 1e-12, 1e-12)
        extractor.ensure_features(small(mixed, pixel_norm=norm, workers=workers), CPU)
    assert not list(tmp_path.glob("features/*/*.npy"))


def job_of(config: Config) -> extraction.Extraction:
    return extraction.Extraction(config, datasets.images_of(config), cache_identity(config), CPU)


def test_threads_give_what_one_gives_in_order(mixed, monkeypatch):
    """Whatever the order in which threads end, rows come in that of the images; batches begin at start."""
    alone, threads = (job_of(small(mixed, extract_batch=1, workers=n)) for n in (0, 2))
    stack_at_once, calls = resizing.stack_rows, itertools.count()

    def slow_first(rows):
        time.sleep(0.1 * (next(calls) == 0))
        return stack_at_once(rows)

    monkeypatch.setattr(resizing, "stack_rows", slow_first)
    for span in ((0, None), (3, 9), (4, 4)):
        one, other = ([rows["tokens"] for rows in job.features("train", *span)] for job in (threads, alone))
        assert sum(map(len, one)) == sum(map(len, other)) == len(range(10)[slice(*span)])
        if one:
            assert torch.allclose(torch.cat(one).float(), torch.cat(other).float(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("workers", [0, 3])
def test_threads_leave_out_what_cannot_be_read(mixed, workers):
    for name in ("a/02.png", "b/00.png"):
        (mixed / "train" / name).write_bytes(b"broken")
    found: list[int] = []
    rows = list(job_of(small(mixed, extract_batch=2, workers=workers)).features("train", 1, None, found))
    assert found == [2, 5] and sum(len(part["tokens"]) for part in rows) == 7


def test_threads_share_what_torch_has(mixed, monkeypatch):
    """Two threads of torch's four each; afterwards there are four again, and no thread is left, even where
    the rows are not all taken."""
    job, seen, running = job_of(small(mixed, extract_batch=2, workers=2)), set(), threading.active_count()
    rows_of = job.rows
    monkeypatch.setattr(job, "rows", lambda images: seen.add(torch.get_num_threads()) or rows_of(images))
    torch.set_num_threads(4)
    try:
        features = job.features("train")
        next(features)
        features.close()
        assert seen == {2} and torch.get_num_threads() == 4 and threading.active_count() == running
        fresh = ThreadPoolExecutor(1)
        assert fresh.submit(torch.get_num_threads).result() == 4
        fresh.shutdown()
    finally:
        torch.set_num_threads(1)


def test_how_many_threads_and_readers(mixed, monkeypatch):
    job = job_of(small(mixed, workers=-1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(extraction, "cpu_count", lambda: 12)
    assert (job.threads, job.readers) == (8, 0)
    job.device = torch.device("cuda")
    assert (job.threads, job.readers, job.shards_at_once) == (0, 2, 4)
    job.config = small(mixed, workers=3)
    assert (job.threads, job.readers) == (0, 3)
    job.config, job.device = small(mixed, workers=-1, compile=True), CPU
    assert (job.threads, job.readers) == (0, 0)


def test_as_with_a_gpu_shards_at_once_and_readers(mixed, monkeypatch):
    """Three shards in work at a time, each with two threads that read for the one that computes: the cache's
    bytes are those of one after the other."""
    plain, busy = (small(mixed, shard_rows=2, feature_path=name) for name in ("plain", "busy"))
    extractor.ensure_features(plain, CPU)
    monkeypatch.setattr(extraction.Extraction, "readers", 2)
    monkeypatch.setattr(extraction.Extraction, "shards_at_once", 3)
    reading, read = set(), resizing.ImageRows.stacks

    def slow(rows, batch):
        reading.add(threading.current_thread().name)
        time.sleep(0.05 * (batch[0] % 4 == 0))
        return read(rows, batch)

    monkeypatch.setattr(resizing.ImageRows, "stacks", slow)
    extractor.ensure_features(busy, CPU)
    assert len(reading) > 2
    files = sorted(path.name for path in Path("plain").iterdir())
    assert files == sorted(path.name for path in Path("busy").iterdir())
    for name in files:
        if name.endswith(".npy"):
            assert Path("plain", name).read_bytes() == Path("busy", name).read_bytes()


def test_rows_arrive_in_order_and_copied(monkeypatch):
    """From a GPU, by a stand-in for it: three batches are on their way before the first is waited for; each
    is handed on once its copy has ended, and kept from reuse until then."""
    log: list[str] = []

    def buffer(shape, dtype, pin_memory):
        assert pin_memory
        return SimpleNamespace(copy_=lambda values, non_blocking: log.append(f"copy {values.name}") or values)

    def batch(name):
        keep = lambda stream: log.append(f"keep {name}")  # noqa: E731
        return {"tokens": SimpleNamespace(name=name, shape=(1,), dtype=None, record_stream=keep)}

    def event():
        name = log[-1].split()[1]
        return SimpleNamespace(synchronize=lambda: log.append(f"wait {name}"))

    stream = SimpleNamespace(wait_stream=lambda other: log.append(f"after {other}"), record_event=event)
    cuda = SimpleNamespace(
        Stream=lambda device: stream,
        stream=lambda _: nullcontext(),
        current_stream=lambda device: "computing",
    )
    monkeypatch.setattr(extraction, "torch", SimpleNamespace(cuda=cuda, empty=buffer))
    arriving = extraction.arriving(map(batch, "abcd"), torch.device("cuda"))
    assert next(arriving)["tokens"].name == "a"
    assert log == [step for name in "abc" for step in ("after computing", f"copy {name}", f"keep {name}")] + [
        "wait a"
    ]
    assert [rows["tokens"].name for rows in arriving] == ["b", "c", "d"] and log[-1] == "wait d"


def test_a_device_resizes_as_pillow_does(monkeypatch):
    """Anywhere but on the CPU the images are resized by two rounded passes, not by torch's float bicubic."""
    monkeypatch.setattr(resizing.F, "interpolate", lambda *_, **__: pytest.fail("torch's own resize"))
    one = torch.ones(3, 1, 1, device="meta")
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="meta")
    assert resizing.prepare(images, (24, 16), one, one, torch.float32).shape == (2, 3, 24, 16)


def test_full_disk(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="free"):
        extractor.ensure_features(small(mixed), CPU)
    assert not list(tmp_path.glob("features/*"))


def test_unknown_class_shows_before_extraction(mixed, tmp_path):
    with pytest.raises(UserError, match="unknown class"):
        extractor.ensure_features(small(mixed, class_name="c"), CPU)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("size, grid", [((64, 96), (4, 6)), ((96, 64), (6, 4))])
def test_grid_from_the_number_of_tokens(size, grid):
    """A model that does not tell its grid: the image's sides do."""
    model = load_backbone(settings("vit_tiny_patch16_224", size)).model
    model.patch_embed.grid_size = None
    assert backbones.Backbone(model, size).grid == grid


# ---------------------------------------------------------------- what a cache is known by
@pytest.mark.parametrize(
    "base, change",
    [
        ({"token_grid": "2"}, {"token_grid": "released2"}),
        ({"token_grid": "compact"}, {"window": 2}),
        ({"token_grid": "centre", "centre_pool": 0.1}, {"centre_pool": 0.3}),
        ({}, {"bands": True}),
        ({}, {"places": 3}),
        ({}, {"pixel_norm": (0.5,) * 6}),
        ({"dataset": "CIFAR100"}, {"dataset": "CIFAR100_fine"}),
    ],
    ids=str,
)
def test_identity_follows_what_changes_the_features(base, change):
    first, second = (cache_identity(settings("resnet18", (32, 32), **o)) for o in (base, base | change))
    assert first.fields != second.fields


def test_identity_is_that_of_caches_made_before():
    """Fields that were knobs once are still recorded, and still checked."""
    former = {
        "pooling": "released", "token_grid": "8", "fine_classes": True, "dataset": "CIFAR100",
        "norm_mean": (0.1, 0.2, 0.3), "norm_std": (1, 2, 3), "rings": 2, "low_sigma": 0.15,
        "band_depths": "auto", "place_channels": 192,
    }  # fmt: skip
    options = {"token_grid": "released8", "dataset": "CIFAR100_fine", "bands": True, "places": 3}
    identity = cache_identity(settings("resnet18", (32, 32), pixel_norm=(0.1, 0.2, 0.3, 1, 2, 3), **options))
    assert former.items() <= identity.fields.items()
    assert identity.folder.name == "CIFAR100-fine-resnet18-32x32-8-bands-places3"
    mirrored = cache_identity(settings("resnet18", (32, 32), mirror=True))
    assert mirrored.folder.name.endswith("-mirror"), "as beside the others in a sweep"
    plain = cache_identity(settings("resnet18", (32, 32))).fields
    of_maps = ("rings", "low_sigma", "band_depths", "place_channels")
    assert all(plain[name] is None for name in of_maps) and plain["fine_classes"] is False


def test_identity_ignores_what_changes_nothing():
    plain = cache_identity(settings("resnet18", (32, 32)))
    for change in ({"window": 5}, {"fusion": "none"}, {"centre_pool": 0.2}):
        assert cache_identity(settings("resnet18", (32, 32), **change)) == plain, change


def test_sidecar_knows_the_weights(mixed):
    one, same, other = (
        extractor.ensure_features(small(mixed, seed=seed, feature_path=path), CPU).meta["weights_sha256"]
        for seed, path in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert one == same != other


def test_bands_in_the_cache_are_those_of_the_maps(mixed):
    config = small(mixed, bands=True)
    cache = extractor.ensure_features(config, CPU)
    backbone, images = load_backbone(config), datasets.load_images("folder", str(mixed))
    mean, std = (torch.tensor(cache.meta[key]).view(3, 1, 1) for key in ("norm_mean", "norm_std"))
    assert cache.meta["depths"] == [1, 2, 3, 4] and cache.meta["band_channels"] == [64, 128, 256, 512]
    for split in SPLITS:
        bands = cache.arrays(split)["bands"]
        for i in range(len(bands)):
            image = Image.fromarray(images.read(split, i)).resize((48, 32), Image.Resampling.BICUBIC)
            pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
            with torch.inference_mode():
                _, maps = backbone.with_maps(pixels[None], (1, 2, 3, 4))
                wanted = maps_kept(config, backbone.img_size)["bands"].measure(maps)[0]
            error = (torch.from_numpy(np.array(bands[i])).float() - wanted).abs().max() / wanted.abs().max()
            assert error < 0.02, (split, i)


def test_depths_of_a_token_model_with_three_stages():
    backbone = load_backbone(settings("levit_128s"))
    assert backbone.band_depths() == (0, 1, 2)


def test_a_timm_that_is_too_old_is_told(monkeypatch):
    """It cannot build what is asked for, in whatever words of its own."""
    text = (Path(extractor.__file__).parent / "requirements.txt").read_text()
    assert f"timm>={backbones.LEAST_TIMM}\n" in text and backbones.too_old() == ""
    monkeypatch.setattr(timm, "__version__", "1.0.20.dev0")
    monkeypatch.setattr(timm, "create_model", lambda *_, **options: torch.ones((), device="meta").item())
    with pytest.raises(UserError, match=r"timm 1.0.20.dev0 cannot build it .*pip install 'timm>=1.0.22'"):
        backbones.outline(settings("resnet18"))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_band_depths(name):
    backbone = load_backbone(settings(name))
    assert backbone.band_depths() == ((2, 5, 8, 11) if "vit" in name else (1, 2, 3, 4))
    tokens, maps = backbone.with_maps(torch.zeros(1, 3, *backbone.img_size), (1, 3))
    assert [m.shape[1] for m in maps] == list(backbone.channels_of((1, 3)))
    assert torch.allclose(tokens, backbone(torch.zeros(1, 3, *backbone.img_size)), atol=1e-5)


@pytest.mark.parametrize("token_grid", ["2", "compact"])
def test_derived_cache_equals_an_extracted_one(mixed, monkeypatch, token_grid):
    """Pooling the full-grid cache gives what pooling during extraction gives, up to float16, and the same
    sidecar."""
    full = settings("resnet18", (128, 128), dataset_path=str(mixed), window=2)
    pooled = dataclasses.replace(full, token_grid=token_grid)
    extracted = extractor.ensure_features(pooled, CPU)
    rows, meta = extracted.tokens("train")[0:10], extracted.meta
    shutil.rmtree(extracted.folder)
    extractor.ensure_features(full, CPU)
    monkeypatch.setattr(extractor, "extract", None)  # from here on nothing can be extracted
    derived = extractor.ensure_features(pooled, CPU)
    rounded = derived.meta
    assert rounded.pop("content") != meta.pop("content") and rounded == meta
    np.testing.assert_allclose(
        derived.tokens("train")[0:10].astype(float), rows.astype(float), rtol=4e-3, atol=2e-3
    )


def test_a_damaged_full_cache_is_not_pooled(mixed, capsys):
    """Its images are extracted instead."""
    full = extractor.ensure_features(small(mixed), CPU)
    path = full.folder / "test-tokens-00000.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    pooled = extractor.ensure_features(small(mixed, token_grid="1"), CPU)
    assert "not pooled: " in (told := capsys.readouterr().out) and "extracting 6 images" in told
    assert len(pooled.tokens("test")[:]) == 6


def test_pooling_a_full_cache_asks_for_the_disk_too(mixed, monkeypatch):
    extractor.ensure_features(small(mixed), CPU)
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    monkeypatch.setattr(extractor, "extract", lambda *_: pytest.fail("extracted"))
    with pytest.raises(UserError, match="free"):
        extractor.ensure_features(small(mixed, token_grid="1"), CPU)


# ---------------------------------------------------------------- the resize by matrices
@pytest.mark.parametrize(
    "before, after",
    [
        ((32, 32), (224, 224)),
        ((400, 500), (64, 96)),
        ((90, 40), (40, 90)),
        ((64, 300), (64, 37)),
        ((100, 100), (37, 100)),
    ],
)
def test_resize_by_matrices_is_pillows(before, after):
    """Noise, the hardest picture: the very grey levels where a side shrinks; where both grow, at most two
    off, as on the CPU, and that in few places."""
    noise = np.random.RandomState(0).randint(0, 256, (2, *before, 3)).astype(np.uint8)
    wanted = [Image.fromarray(image).resize(after[::-1], Image.Resampling.BICUBIC) for image in noise]
    got = resizing.resize_like_pillow(torch.from_numpy(noise).permute(0, 3, 1, 2), after)
    assert torch.equal(got, got.round())
    off = np.abs(
        got.permute(0, 2, 3, 1).numpy() - np.stack([np.asarray(image) for image in wanted]).astype(float)
    )
    shrinks = after[0] < before[0] or after[1] < before[1]
    assert off.max() == 0 if shrinks else off.max() <= 2 and (off > 0).mean() < 0.01


def test_weights_of_the_resize_sum_to_one():
    for before, after in ((8, 224), (224, 8), (7, 7)):
        weights = resizing.bicubic_weights(before, after)
        assert weights.shape == (after, before)
        assert torch.allclose(weights.sum(1), torch.ones(after).double(), atol=1e-5)
    assert torch.allclose(weights, torch.eye(7).double(), atol=1e-6), "the same size: every pixel is itself"
