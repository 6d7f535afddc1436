"""The validation set made from normal training images, and caches pooled out of a full one."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import config as knobs
import datasets
import detector
import extractor
import outliers
import utils
from config import Config


def image_set(n=40, sizes=((8, 8), (8, 10))):
    """Two classes, one of which varies in size; the pixels of image i lie around i, but for a bright first
    row."""
    rng = np.random.RandomState(0)
    pixels = [np.full((*sizes[i % 2 if i % 4 else 0], 3), i, np.uint8) for i in range(2 * n)]
    for image in pixels:
        image += rng.randint(0, 60, image.shape).astype(np.uint8)
        image[0] = 200 + rng.randint(50)
    category = np.arange(2 * n) % 2
    labels = datasets.Labels(
        ("even", "odd"),
        datasets.Split.of([f"t{i}" for i in range(2 * n)], category, np.arange(2 * n) < 4),
        datasets.Split.of(["secret"], [0], [True]),
    )

    def read(split, i):
        assert split == "train", "the real test set was read"
        return pixels[i]

    return datasets.ImageSet(labels, read)


def test_validation_set_is_made_of_normal_training_images():
    images = image_set()
    made = datasets.validation_set(images)
    for name in made.labels.classes:
        fitted, tested, anomalous = made.labels.one_class(name)
        names = {split: np.array(made.labels.split(split).names) for split in datasets.SPLITS}
        held = set(names["test"][tested[anomalous == 0]])
        assert len(held) == 4 and not held & set(names["train"][fitted]), "held-out images are not fitted to"
        assert {n.split()[0] for n in names["test"][tested]} == held, (
            "outliers come from held-out images of the class"
        )
        assert sum(anomalous) == 4 * len(outliers.KINDS)
        assert not {"t0", "t1", "t2", "t3", "secret"} & ({*names["train"][fitted]} | held), (
            "defective and test images are left out"
        )


def test_too_few_images_leave_nothing_to_fit():
    """The class is refused later, with a line; here nothing breaks."""
    images = image_set()
    made = datasets.validation_set(images.kept({"train": np.array([4, 5, 6]), "test": np.array([], int)}))
    fitted, tested, anomalous = made.labels.one_class("even")
    assert len(fitted) == 0 and len(tested) == 2 * (1 + len(outliers.KINDS)) and sum(anomalous == 0) == 2


def test_outliers_differ_from_their_image_and_are_the_same_each_time():
    made = datasets.validation_set(image_set())
    names = made.labels.test.names
    for i, name in enumerate(names):
        image = made.read("test", i)
        assert np.array_equal(image, made.read("test", i))
        original = made.read("test", names.index(name.split()[0]))
        assert image.dtype == np.uint8 and image.shape == original.shape
        assert (" " in name) == (not np.array_equal(image, original)), name


def test_outliers_are_of_both_sorts():
    assert set(outliers.KINDS) == {*"rotated pasted blended scratched spotted cut noisy blurred".split()}


@pytest.mark.parametrize("kind", outliers.TEXTURE)
def test_texture_outliers_leave_the_rest_as_it_is(kind):
    """They change something at every draw, and never more than a fifth of the image."""
    generator = np.random.RandomState(1)
    image, other = (generator.randint(0, 255, (60, 80, 3)).astype(np.uint8) for _ in range(2))
    for seed in range(20):
        made = outliers.outlier(image, other, kind, np.random.RandomState(seed))
        changed = (made != image).any(2).mean()
        assert made.dtype == np.uint8 and 0 < changed < 0.2, (seed, changed)


@pytest.fixture(scope="module")
def small_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.RandomState(0)
    for split in datasets.SPLITS:
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(5):
                Image.fromarray(rng.randint(0, 256, (40, 40, 3)).astype(np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    return root


@pytest.mark.parametrize("token_grid", ["2", "compact"])
def test_derived_cache_equals_an_extracted_one(small_folders, tmp_path, monkeypatch, token_grid):
    """Pooling the full-grid cache gives what pooling during extraction gives, up to float16, and the same
    sidecar."""
    monkeypatch.chdir(tmp_path)
    full = Config(
        dataset="folder",
        dataset_path=str(small_folders),
        extractor="resnet18",
        weights_path="random",
        img_size=(128, 128),
        precision="float32",
        hide_tqdm_bar=True,
        window=2,
        workers=0,
    )
    device = utils.set_up("cpu", 1)
    pooled = dataclasses.replace(full, token_grid=token_grid)
    extracted = extractor.ensure_features(pooled, device)
    rows, meta = extracted.tokens("train")[0:10], extracted.meta
    extractor.shutil.rmtree(extracted.folder)
    extractor.ensure_features(full, device)
    monkeypatch.setattr(extractor, "extract", None)  # from here on nothing can be extracted
    derived = extractor.ensure_features(pooled, device)
    rounded = derived.meta
    assert rounded.pop("content") != meta.pop("content") and rounded == meta
    np.testing.assert_allclose(
        derived.tokens("train")[0:10].astype(float), rows.astype(float), rtol=4e-3, atol=2e-3
    )


def test_sweep_runs_every_combination(small_folders, tmp_path, monkeypatch):
    import main

    monkeypatch.chdir(tmp_path)
    config = Config(
        dataset="folder",
        dataset_path=str(small_folders),
        extractor="resnet18",
        weights_path="random",
        img_size=(64, 64),
        workers=0,
        hide_tqdm_bar=True,
        verbose=False,
        plots=False,
        fc_internal=8,
        threads=1,
        n_seeds=2,
        modelname="grid",
        sweep="fusion=none,class_attention;clamp=1,3",
    )
    main.main(config)
    content = (tmp_path / "runs/grid/sweep.md").read_text()
    assert "| none |" in content and "| class_attention |" in content and content.count("±") >= 4
    for name in ("none-1", "none-3", "class_attention-1", "class_attention-3"):
        assert (tmp_path / "runs/grid" / name / "results.json").exists()
    kept = detector.checkpoint_path(dataclasses.replace(config, modelname="grid/none-3"), "a", 1)
    assert kept.with_suffix(".safetensors").exists()


def test_bad_sweeps_are_refused():
    for text in ("fusion", "fusion=", "fusoin=none", "fusion=nne", "clamp=x"):
        with pytest.raises(knobs.UserError):
            Config(sweep=text)
