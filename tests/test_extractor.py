"""Backbones and what is made of their tokens: shapes, places, pooling, weights, resizing, and the cache they
end in."""

import copy
import dataclasses
import math
import pathlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import content, flip, load_images, make_folder, texture, write_image
from fabricated import small_run
from PIL import Image
from safetensors.torch import save_file

import extractor
from backbone import backbones, extraction, resizing, storing
from backbone.identity import cache_identity
from backbone.token_grid import TokenGrid
from config import BACKBONES, Config, UserError
from datasets import SPLITS

CPU = torch.device("cpu")


def load_backbone(config: Config) -> backbones.Backbone:
    size = config.img_size or backbones.timm_model(config.extractor).own_size
    return backbones.load_backbone(config.extractor, size, config.weights_path, config.seed)


def job_of(config: Config) -> extraction.Extraction:
    return extraction.Extraction(cache_identity(config, CPU), CPU, config.extract_batch, config.workers)


def tokens_of(config: Config, split: str):
    return extractor.ensure_features(config, CPU).arrays(split)["tokens"]


def settings(name: str, size=None, **more) -> Config:
    """Untrained weights, float32, no worker processes."""
    return small_run(extractor=name, img_size=size, **more)


TINY = {  # timm model -> (image size, grid, C, prefix tokens in timm's sequence; None for a map)
    "test_vit": ((64, 96), (4, 6), 64, 1),
    "vit_small_patch14_reg4_dinov2": ((42, 70), (3, 5), 384, 5),
    "test_resnet": ((64, 96), (2, 3), 96, None),
    "swin_tiny_patch4_window7_224": ((224, 224), (7, 7), 768, None),
}


@pytest.mark.parametrize("name", TINY)
def test_tokens_are_timms(name):
    """The class token and the patch tokens stand in timm's own final features; prefix tokens but the first
    are dropped. Of a map, its mean and its cells."""
    size, grid, channels, prefix = TINY[name]
    backbone = load_backbone(settings(name, size))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens, features = backbone(images), backbone.model.forward_features(images)
    assert backbone.grid == grid and backbone.n_feat == channels and not backbone.model.training
    assert tokens.shape == (2, 1 + math.prod(grid), channels) and tokens.dtype == torch.float32
    if prefix is None:
        if features.shape[1] != channels:
            features = features.permute(0, 3, 1, 2)
        assert torch.equal(tokens[:, 1:].unflatten(1, grid), features.permute(0, 2, 3, 1))
        assert torch.allclose(tokens[:, 0], features.mean((2, 3)), atol=1e-5)
    else:
        assert torch.equal(tokens[:, 0], features[:, 0])
        assert torch.equal(tokens[:, 1:], features[:, prefix:])


# ---------------------------------------------------------------- pooling
@pytest.mark.parametrize("grid, side", [((6, 9), 3), ((4, 4), 4), ((8, 2), 1)])
def test_pooled_grid(grid, side):
    tokens = torch.randn(2, 1 + math.prod(grid), 5, generator=torch.Generator().manual_seed(0))
    pooled = TokenGrid(str(side), "correct").pool(tokens, grid)
    assert pooled.shape == (2, 1 + side * side, 5) and torch.equal(pooled[:, 0], tokens[:, 0])
    height, width = grid[0] // side, grid[1] // side
    cells = tokens[:, 1:].unflatten(1, grid)
    for i in range(side):
        for j in range(side):
            mean = cells[:, i * height : (i + 1) * height, j * width : (j + 1) * width].mean((1, 2))
            assert torch.allclose(pooled[:, 1 + i * side + j], mean, atol=1e-6)
    with pytest.raises(UserError, match=f"at most {min(grid)}"):
        TokenGrid("10", "correct").cached_shape(grid)


# ---------------------------------------------------------------- weights
@pytest.mark.parametrize("name, suffix", [("test_vit", ".safetensors"), ("efficientnet_lite0", ".pth")])
def test_weights_file_round_trip(tmp_path, name, suffix):
    """Of a model fine-tuned on other classes, too: its classifier is not asked for."""
    torch.manual_seed(5)
    state = timm.create_model(BACKBONES.get(name, name), num_classes=7).state_dict()
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    loaded = load_backbone(settings(name, weights_path=str(path))).model.state_dict()
    assert {key for key in state if key.split(".")[0] not in ("head", "fc", "classifier")} == loaded.keys()
    assert all(torch.equal(state[key], loaded[key]) for key in loaded)


class Executes:
    """A pickle of it makes a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_weights_that_would_execute(tmp_path):
    proof = tmp_path / "executed"
    content = {"state_dict": {"conv1.weight": Executes(proof)}}
    torch.save(content, tmp_path / "zipped.pth")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(content))
    for name in ("zipped.pth", "plain.bin"):
        assert "would execute" in refused(tmp_path / name, "test_resnet")
    assert not proof.exists()
    pickle.loads((tmp_path / "plain.bin").read_bytes())
    assert proof.exists(), "loaded carelessly, it does execute"


def refused(path, name="test_vit") -> str:
    with pytest.raises(UserError) as mistake:
        load_backbone(settings(name, weights_path=str(path)))
    return str(mistake.value)


def test_wrong_weights(tmp_path):
    """The file is named, and the first tensor that is missing, left over or of another shape."""
    deeper = timm.create_model("test_resnet").state_dict() | {"layer1.2.conv1.weight": torch.zeros(1)}
    save_file(deeper, tmp_path / "deeper.safetensors")
    assert "layer1.2.conv1.weight" in refused(tmp_path / "deeper.safetensors", "test_resnet")
    torch.save(timm.create_model("test_vit", depth=5).state_dict(), tmp_path / "shallow.pth")
    assert "shallow.pth" in (line := refused(tmp_path / "shallow.pth")) and "blocks.5" in line
    (tmp_path / "garbage.safetensors").write_bytes(b"no weights at all")
    assert "garbage" in refused(tmp_path / "garbage.safetensors")
    assert "nowhere.pth" in refused(tmp_path / "nowhere.pth")


def test_lite0_takes_the_packages_weights():
    loaded = load_backbone(settings("efficientnet_lite0", (64, 64), weights_path=None)).model.state_dict()
    packaged = torch.load(
        backbones.packaged_weights("efficientnet_lite0"), weights_only=True, map_location="cpu"
    )
    assert len(loaded) == len(packaged) == 296
    assert all(torch.equal(a, b) for a, b in zip(loaded.values(), packaged.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_speed_up_changes_no_tokens(dtype):
    """Half precision on any processor, too."""
    plain = load_backbone(settings("test_efficientnet", (32, 32)))
    fast = backbones.speed_up(copy.deepcopy(plain), CPU, dtype)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, got = plain(image), fast(image.to(dtype))
    if dtype == torch.float32:
        assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert torch.nn.functional.cosine_similarity(got, wanted, 2).min() > 0.98


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize("name, size", [("test_vit", (8, 8)), ("swin_tiny_patch4_window7_224", (3, 3))])
def test_image_size_that_does_not_fit(name, size):
    with pytest.raises(UserError, match=f"{size[0]}x{size[1]}"):
        load_backbone(settings(name, size))


# ---------------------------------------------------------------- extraction
@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A folder of images of several sizes; the working directory is tmp_path."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", classes=("a", "b"), n_train=5, n_test=3)
    for name, size in (("train/a/01.png", 60), ("train/b/02.png", 20), ("test/a/00.png", 48)):
        write_image(tmp_path / "images" / name, texture(1, np.random.RandomState(3), size))
    return tmp_path / "images"


def small(folder, **more) -> Config:
    return settings("resnet18", (32, 48), dataset_path=str(folder), **more)


@pytest.mark.parametrize(
    "options",
    [{}, {"workers": 2, "extract_batch": 2, "token_grid": "1"}, {"precision": "bfloat16"}],
    ids=str,
)
def test_cache_holds_the_backbones_tokens(mixed, options):
    """Row i of the cache is image i through the plain backbone, whatever the batches, workers and sizes on
    the way."""
    config = small(mixed, **options)
    cache = extractor.ensure_features(config, CPU)
    backbone, images = load_backbone(config), load_images("folder", str(mixed))
    mean, std = (torch.tensor(cache.meta[key]).view(3, 1, 1) for key in ("norm_mean", "norm_std"))
    assert content(cache.labels) == content(images.labels)
    for split in SPLITS:
        tokens = cache.arrays(split)["tokens"][:]
        assert len(tokens) == len(images.labels.split(split).names)
        for i in range(len(tokens)):
            image = Image.fromarray(images.read(split, i)).resize((48, 32), Image.Resampling.BICUBIC)
            pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
            with torch.inference_mode():
                wanted = cache_identity(config, CPU).grid.pool(backbone(pixels[None]), (1, 2))[0]
            error = (torch.from_numpy(tokens[i]).float() - wanted).abs().max() / wanted.abs().max()
            assert error < (0.05 if "precision" in options else 0.01), (split, i)


def test_pretrained(mixed, capsys):
    """True: the features serve without the raw images; and are demanded."""
    with pytest.raises(UserError, match="no features are listed in features/datasets/.*extractor.py"):
        extractor.ensure_features(small(mixed, pretrained=True), CPU)
    wanted = tokens_of(small(mixed), "test")[:]
    write_image(mixed / "test/b/new.png", texture(1, np.random.RandomState(9)))
    assert len(tokens_of(small(mixed, pretrained=True), "test")) == 6
    shutil.rmtree(mixed)
    extractor.main(small(mixed, pretrained=True))
    assert (tokens_of(small(mixed, pretrained=True), "test")[:] == wanted).all()
    flip(next(Path("features").glob("*/*/tokens.npy")))
    with pytest.raises(UserError, match="16 of 16 images have no features"):
        extractor.main(small(mixed, pretrained=True))
    assert "tokens.npy: its checksum differs" in capsys.readouterr().out


def shards() -> dict[Path, int]:
    """The shards that are there: {folder: its inode}."""
    return {path: path.stat().st_ino for path in Path("features").glob("resnet18-*/[!.]*/")}


def test_damage_costs_its_shard_alone(mixed, monkeypatch, capsys):
    """extractor.py reads every byte; before training, what is cut or gone is seen, the rest when it is
    read."""
    monkeypatch.setattr(storing, "SHARD_ROWS", 4)
    config = small(mixed, extract_batch=2)
    extractor.main(config)
    before = shards()
    first = sorted(before)[0] / "tokens.npy"
    rows = len(np.load(first))
    flip(first)
    with pytest.raises(UserError, match="checksum"):
        for split in SPLITS:
            tokens_of(config, split)[:]
    extractor.main(config)
    told = capsys.readouterr().out
    assert f"damaged shards in {first.parents[1]}, which count as missing: {first.parent.name}/" in told
    assert f"extracting {rows} image" in told and set(before) - set(shards()) == {first.parent}
    (second := sorted(before)[1] / "record.json").unlink()
    found, wanted = (
        tokens_of(dataclasses.replace(config, feature_path=path), "train")[:] for path in (None, "anew")
    )
    assert set(before) - set(shards()) == {first.parent, second.parent}
    assert np.allclose(found.astype(float), wanted.astype(float), rtol=1e-2, atol=1e-2)
    capsys.readouterr()
    extractor.main(config)
    assert "all sound" in capsys.readouterr().out


def test_with_mirror_an_image_and_its_mirror_image_give_mirrored_features(mixed):
    """The mean of both, cell by cell: the semantic token and rings, which have no place, are the same."""
    config = settings("resnet18", (64, 96), dataset_path=str(mixed), bands=True, places=4)
    image = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (1, 3, 64, 96), np.uint8))
    plain, both = job_of(config), job_of(dataclasses.replace(config, mirror=True))
    one, other = plain.rows(image), plain.rows(image.flip(-1))
    found, mirrored = both.rows(image), both.rows(image.flip(-1))
    near = {"atol": 0.02, "rtol": 0.01}  # sums in half precision
    assert not torch.allclose(one["tokens"][:, 0].float(), other["tokens"][:, 0].float(), **near)

    def on_grid(rows, array):
        grid = plain.module.backbone.grid if array == "tokens" else both.module.of_maps["places"].grid
        return rows[array].float()[:, -grid[0] * grid[1] :].unflatten(1, grid)

    for array in ("tokens", "places"):
        torch.testing.assert_close(on_grid(found, array), on_grid(mirrored, array).flip(2), **near)
        mean = (on_grid(one, array) + on_grid(other, array).flip(2)) / 2
        torch.testing.assert_close(on_grid(found, array), mean, **near)
    semantic = (one["tokens"][:, 0].float() + other["tokens"][:, 0].float()) / 2
    torch.testing.assert_close(found["tokens"][:, 0].float(), semantic, **near)
    torch.testing.assert_close(found["bands"], mirrored["bands"], **near)


def test_mistakes_show_before_extraction(mixed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="feature_path: expected a folder, .*file is a file"):
        extractor.ensure_features(small(mixed, feature_path=str(tmp_path / "file")), CPU)
    with pytest.raises(UserError, match="unknown class"):
        extractor.ensure_features(small(mixed, class_name="c"), CPU)
    with pytest.raises(UserError, match="give it with --class_name"):
        extractor.ensure_features(small(mixed), CPU, one_class=True)
    assert not (tmp_path / "features").exists()


# ---------------------------------------------------------------- what a cache is known by
def test_a_store_is_known_by_what_changes_the_features():
    """Its name can be read."""

    def name_of(**more) -> str:
        options = {"token_grid": "released8", "bands": True, "places": 3, "mirror": True}
        return cache_identity(settings("resnet18", (32, 48), **options | more), CPU).name

    for same in ({}, {"window": 5}, {"fusion": "none"}, {"centre_pool": 0.2}, {"dataset": "CIFAR100"}):
        assert name_of(**same) == "resnet18-32x48-8-bands-places3-mirror-a07be2bb"
    for other in ({"token_grid": "8"}, {"places": 4}, {"pixel_norm": (0.5,) * 6}, {"seed": 1}):
        assert name_of(**other)[-8:] != "a07be2bb"


# ---------------------------------------------------------------- the resize by matrices
@pytest.mark.parametrize(
    "before, after",
    [((32, 32), (224, 224)), ((9, 5), (9, 7)), ((400, 500), (64, 96)), ((90, 40), (40, 90))],
)
def test_resize_by_matrices_is_pillows(before, after):
    """Noise, the hardest picture: the very grey levels where a side shrinks; where both grow, those of the
    CPU, at most two off, and that in few places."""
    noise = np.random.RandomState(0).randint(0, 256, (2, *before, 3)).astype(np.uint8)
    wanted = [Image.fromarray(image).resize(after[::-1], Image.Resampling.BICUBIC) for image in noise]
    got = resizing.resize_like_pillow(torch.from_numpy(noise).permute(0, 3, 1, 2), after)
    assert torch.equal(got, got.round())
    off = np.abs(
        got.permute(0, 2, 3, 1).numpy() - np.stack([np.asarray(image) for image in wanted]).astype(float)
    )
    shrinks = after[0] < before[0] or after[1] < before[1]
    if not shrinks:
        assert torch.equal(got, resizing.resized(torch.from_numpy(noise).permute(0, 3, 1, 2), after).float())
    assert off.max() == 0 if shrinks else off.max() <= 2 and (off > 0).mean() < 0.01
