"""Place tokens, a Gaussian for each place, and the simple detectors on them."""

import numpy as np
import pytest
import torch
from conftest import make_cache
from fabricated import all_of
from torch.nn import functional as F

import train
import utils
from backbone.token_grid import Bands, Places, place_grid, rotation
from config import ClassError, Config
from datasets import SPLITS, Labels, Split
from detector import baselines, class_data, detector, optimization
from detector.normalization import PlaceGaussians, spread

CHANNELS = (4, 6, 5)


def maps(grids=((16, 12), (8, 8), (4, 4)), seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, c, *grid, generator=generator) for c, grid in zip(CHANNELS, grids)]


# ---------------------------------------------------------------- the tokens
def test_places_are_smoothed_means_of_all_depths_but_the_deepest():
    tokens = Places((4, 4), 100).measure(maps())
    assert tokens.shape == (3, *Places((4, 4), 100).shape(CHANNELS)) == (3, 16, 10)
    padded = [F.pad(torch.stack([m, torch.ones_like(m)]), (1, 1, 1, 1)) for m in maps()[:2]]
    for depth, (height, width) in enumerate(((16, 12), (8, 8))):
        sums, there = sum(
            padded[depth][..., i : i + height, j : j + width] for i in range(3) for j in range(3)
        )
        smooth = sums / there  # 4, 6 or 9 cells
        cells = smooth.unflatten(3, (4, width // 4)).unflatten(2, (4, height // 4)).mean((3, 5))
        columns = slice(0, 4) if depth == 0 else slice(4, 10)
        assert torch.allclose(tokens[..., columns], cells.flatten(2).transpose(1, 2), atol=1e-5)


def test_a_coarser_map_is_brought_to_the_grid_and_one_depth_serves_alone():
    flat = [torch.full((1, 2, 2, 2), 3.0)]
    tokens = Places((4, 4), 9).measure(flat)
    assert tokens.shape == (1, 16, 2) and torch.allclose(tokens, torch.tensor(3.0)), "at the border, too"


def test_more_channels_are_rotated_down_and_lengths_kept():
    many = torch.randn(500, 10, generator=torch.Generator().manual_seed(3))
    few = many @ rotation(10, 6)
    assert few.square().sum().item() == pytest.approx(many.square().sum().item(), rel=0.1)
    assert torch.allclose(rotation(10, 6).T @ rotation(10, 6), torch.eye(6) * 10 / 6, atol=1e-5)
    assert torch.allclose(
        Places((4, 4), 6).measure(maps()), Places((4, 4), 10).measure(maps()) @ rotation(10, 6), atol=1e-5
    )
    assert Places((4, 4), 6).shape(CHANNELS) == (16, 6)


def test_places_lie_row_by_row_in_a_grid_of_any_shape():
    """Of maps that have as many rows and columns, and of coarser ones."""
    for height, width in ((16, 8), (8, 4), (3, 8)):
        features = torch.zeros(1, 1, height, width)
        features[:, :, : height // 2, width // 2 :] = 1
        tokens = Places((4, 2), 9).measure([features])
        assert tokens.shape == (1, 8, 1) and tokens[0, 1] == tokens.max() > tokens[0, 0]
        assert tokens[0, 6] == tokens.min() < tokens[0, 3] <= tokens[0, 1]


@pytest.mark.parametrize(
    "side, size, grid",
    [
        (14, (224, 224), (14, 14)),
        (6, (64, 64), (6, 6)),
        (14, (448, 224), (28, 14)),
        (14, (512, 192), (32, 12)),
        (14, (448, 448), (28, 28)),
        (4, (40, 160), (2, 8)),
        (2, (32, 3200), (1, 29)),
    ],
)
def test_places_are_as_dense_as_at_the_backbones_own_size(side, size, grid):
    assert place_grid(side, size, (224, 224)) == grid
    assert place_grid(side, size[::-1], (224, 224)) == grid[::-1]


# ---------------------------------------------------------------- the Gaussians
def test_places_keep_their_own_means_as_far_as_these_are_no_chance():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 9, 4, generator=generator)
    alike = PlaceGaussians(9, 4).fit(noise)
    assert (alike.mean - noise.mean((0, 1))).abs().max() < 0.1 * noise.mean(0).std()
    own = 5 * torch.randn(9, 4, generator=generator)
    apart = PlaceGaussians(9, 4).fit(noise + own)
    assert torch.allclose(apart.mean, (noise + own).mean(0), atol=1e-2)


@pytest.mark.parametrize("n", [3, 40, 3000])
def test_log_energies_of_places_are_the_plain_ones(n):
    """In float64 and by inverses: covariances drawn to the common one by E / (n + E), energies standardised
    by variances drawn to the common one by 10 / (n + 10)."""
    generator = torch.Generator().manual_seed(0)
    scale = 1 + 3 * torch.rand(9, 4, generator=generator)
    tokens, unseen = (scale * torch.randn(m, 9, 4, generator=generator) for m in (n, 20))
    fitted = PlaceGaussians(9, 4).fit(tokens)

    def logs(found):
        away = (found - fitted.mean).double()
        return torch.einsum("npc,pcd,npd->np", away, torch.linalg.inv(mixed), away).div(4).log()

    away = (tokens - fitted.mean).double()
    own = torch.einsum("npc,npd->pcd", away, away) / n
    pooled = own.mean(0)
    mixed = (4 * pooled + n * own) / (4 + n) + 0.03 * pooled.trace() / 4 * torch.eye(4)
    variance = logs(tokens).var(0, correction=0)
    deviation = ((n * variance + 10 * variance.mean()) / (n + 10)).sqrt()
    wanted = (logs(unseen) - logs(tokens).mean(0)) / deviation
    assert torch.allclose(fitted(unseen).double(), wanted, rtol=1e-3, atol=1e-3)


def test_log_energies_of_normal_places_are_standardised():
    generator = torch.Generator().manual_seed(0)
    scale = 1 + 3 * torch.rand(9, 4, generator=generator)
    tokens, unseen = (scale * torch.randn(4000, 9, 4, generator=generator) for _ in range(2))
    fitted = PlaceGaussians(9, 4).fit(tokens)
    for found in (tokens, unseen):
        assert fitted(found).mean(0).abs().max() < 0.1 and (fitted(found).std(0) - 1).abs().max() < 0.1
    unseen[:, 4] *= 3
    assert fitted(unseen)[:, 4].mean() > 1 and fitted(unseen)[:, :4].mean().abs() < 0.1


# ---------------------------------------------------------------- the detector
N, C, PLACES, E, N_TRAIN, N_TEST = 9, 16, 25, 6, 48, 24


def fabricate(folder, spread: float):
    """One surface; a defective image is unusual at one place alone. spread: of the semantic tokens."""
    generator = np.random.RandomState(0)
    odd = {"train": np.zeros(N_TRAIN, bool), "test": np.arange(N_TEST) % 2 == 1}
    splits = {
        s: Split.of([f"{s}{i}" for i in range(len(o))], np.zeros(len(o), int), o) for s, o in odd.items()
    }
    tokens = {s: 4 + spread * generator.randn(len(o), 1 + N, C) for s, o in odd.items()}
    size = Bands(2, 0.15).shape((2, 3))[0]
    bands = {s: 5 + 0.2 * generator.randn(len(o), size) for s, o in odd.items()}
    places = {s: generator.randn(len(o), PLACES, E) for s, o in odd.items()}
    for image in np.flatnonzero(odd["test"]):
        places["test"][image, generator.randint(PLACES)] += 6
    return make_cache(
        folder, Labels(("a",), **splits, per_category=True), tokens, bands, places, grid=(3, 3),
        band_channels=(2, 3), place_shape=(PLACES, E),
    )  # fmt: skip


def settings(**more) -> Config:
    options = {
        "bands": True, "places": 5, "score": "joined", "holdout": 0.25, "patience": 3,
        "normalize": "power_l2+whiten", "fusion": "class_attention", "n_coupling_blocks": 2,
        "fc_internal": 16, "batch_size": 16, "lr_init": 1e-3, "identity_start": True,
        "whiten_ridge": 1.0,
    }  # fmt: skip
    return Config(**(options | more))


def make(cache, cell_seed=0, **more):
    sources = [class_data.TokenSource(cache.arrays(split), torch.device("cpu")) for split in SPLITS]
    return train.make_trainer(settings(**more), cache, "a", cell_seed, *sources)


def fit(cache, **more):
    trainer = make(cache, **more)
    return trainer, trainer.run()


@pytest.fixture(scope="module")
def surface(tmp_path_factory):
    return fit(fabricate(tmp_path_factory.mktemp("surface") / "c", spread=0.1), baselines=True)


def test_a_defect_of_one_place_is_found_where_images_are_alike(surface, tmp_path):
    _, fitted = surface
    assert fitted.result["reads_places"] and fitted.result["auroc"] > 0.9
    cache = fabricate(tmp_path / "b", spread=0.1)
    _, without = fit(cache, places=0)
    assert without.result["auroc"] < 0.7, "the rest of the image does not show it"


@pytest.mark.parametrize("width", [0.1, 4.0], ids=["alike", "varied"])
def test_places_are_read_where_images_show_one_scene(tmp_path, width, monkeypatch):
    read = []
    plain = class_data.TokenSource._rows
    monkeypatch.setattr(
        class_data.TokenSource, "_rows", lambda self, name, rows: read.append(name) or plain(self, name, rows)
    )
    trainer, fitted = fit(fabricate(tmp_path / "c", spread=width))
    alike = spread(trainer.data.train.semantic(trainer.data.fit_rows)) < detector.ALIKE
    assert alike == (width == 0.1) == fitted.result["reads_places"] == ("places" in read)
    assert fitted.detector.uses_places == bool(fitted.detector.alike) == alike


def test_places_that_are_not_finite_are_a_damaged_cache(tmp_path):
    cache = fabricate(tmp_path / "c", spread=0.1)
    sources = []
    for split in SPLITS:
        arrays = cache.arrays(split)
        places = np.array(arrays["places"][np.arange(len(arrays["places"]))])
        sources.append(class_data.TokenSource(arrays | {"places": places}, torch.device("cpu")))
    sources[0].arrays["places"][7, 3, 2] = np.nan
    with pytest.raises(ClassError, match="1 of its training images are not finite, row 7 "):
        train.make_trainer(settings(), cache, "a", 0, *sources).run()


def test_the_joined_score_adds_log_energy_and_places(surface):
    """The image's log-energy and its most unusual places."""
    trainer, fitted = surface
    parts = fitted.detector
    assert parts.n_unusual == 1, "of 25 places"
    with torch.no_grad():
        energy = parts.energy(trainer.prepared.measure("test")).log()
    worst = parts.places(trainer.data.test.one("places", trainer.data.test_rows)).amax(1)
    assert fitted.scores == pytest.approx((energy + worst).numpy(), rel=1e-3, abs=1e-3)
    features = all_of(trainer.data.test, fitted.test_rows)
    assert parts.score_features(features) == pytest.approx(fitted.scores, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("width", [0.1, 4.0], ids=["one scene", "several"])
def test_the_flow_counts_as_under_its_own_density_where_one_scene_is_shown(tmp_path, width):
    """log e - g / h, e of the kernels alone and g the flow's gain per channel; else log(e - h g)."""
    trainer, fitted = fit(
        fabricate(tmp_path / "c", width),
        base="kernel",
        patience=0,
        meta_epochs=4,
        flow_channels=8,
        lr_init=1e-2,
    )
    parts, h = fitted.detector, fitted.detector.bandwidth
    with torch.no_grad():
        latents = trainer.prepared.measure("test")
        squares = (latents.tokens[:, None] - parts.reference.float()).square().sum(2) + latents.outside[
            :, None
        ]
        kernels = -2 * h * torch.exp(-squares / (2 * h)).mean(1).log() / parts.channels
        moved, log_det = latents.z[:, :8], latents.log_det
        gain = latents.tokens[:, :8].square().sum(1) - moved.square().sum(1) + 2 * log_det
    gain = gain / parts.channels
    assert gain.abs().max() > 1e-3 and gain.std() > 1e-3
    wanted = kernels.log() - gain / h if width == 0.1 else (kernels - h * gain).log()
    image = fitted.flow_scores["likelihood"]
    assert image == pytest.approx(wanted.numpy(), rel=1e-3, abs=1e-4)
    unusual = trainer.prepared.unusual_places.get("test", torch.zeros(()))
    assert fitted.scores == pytest.approx(image + unusual.numpy(), abs=1e-4)
    loaded = parts.score_features(all_of(trainer.data.test, fitted.test_rows))
    assert loaded == pytest.approx(fitted.scores, rel=1e-3, abs=1e-3)


def test_the_map_of_an_image_is_unusual_where_the_defect_is(surface):
    trainer, fitted = surface
    places = trainer.data.test.one("places", fitted.test_rows)
    values = fitted.detector.place_map(places)
    defective = np.flatnonzero(fitted.labels)
    found = values[defective].argmax(1) == places[defective].abs().mean(2).argmax(1).numpy()
    assert values.shape == (N_TEST, PLACES) and found.mean() > 0.8


@pytest.mark.parametrize("options", [{}, {"normalize": "none"}], ids=["whitened", "as they are"])
def test_the_fusion_reads_middle_tokens(tmp_path, options):
    """Two by two places together, and nothing of the last map; from an identity start once it has learnt."""
    cache = fabricate(tmp_path / "c", spread=4.0)
    trainer = make(cache, fusion_tokens="middle", identity_start=False, **options)
    parts = trainer.detector.eval()
    assert parts.fusion_grid == (3, 3)
    rows = trainer.prepared.rows["test"][:4]
    features = all_of(trainer.data.test, rows)
    pooled = parts.raw_patches(features)
    maps = features.places.transpose(1, 2).unflatten(2, (5, 5))
    assert torch.allclose(pooled, F.adaptive_avg_pool2d(maps, 3).flatten(2).transpose(1, 2))
    with torch.no_grad():
        found = parts.latents(parts.inputs(features))
        again = parts.latents(trainer.prepared.inputs("test", np.arange(4)))
        assert torch.allclose(again.z, found.z, atol=1e-4)
        other = parts.latents(parts.inputs(features._replace(patches=features.patches + 1)))
        assert torch.equal(other.z, found.z), "the last map is no part of it"
        moved = parts.latents(parts.inputs(features._replace(places=features.places.flip(0))))
        assert not torch.allclose(moved.z, found.z, atol=1e-3)
        assert not torch.allclose(moved.log_det, found.log_det, atol=1e-3)


def test_training_moves_the_fusion_of_middle_tokens(tmp_path, monkeypatch):
    monkeypatch.setitem(optimization.ADAM, "weight_decay", 0.0)
    options = {"meta_epochs": 3, "patience": 0}
    trainer = make(fabricate(tmp_path / "c", spread=4.0), fusion_tokens="middle", **options)
    fusion = {n: p for n, p in trainer.detector.flow.named_parameters() if ".fusion." in n}
    start = {name: parameter.detach().clone() for name, parameter in fusion.items()}
    fitted = trainer.run()
    assert fusion and not any(torch.equal(start[name], parameter) for name, parameter in fusion.items())
    features = all_of(trainer.data.test, fitted.test_rows)
    got = fitted.detector.score_features(features)
    assert got == pytest.approx(fitted.scores, rel=1e-3, abs=1e-3)
    moved = fitted.detector.score_features(features._replace(places=features.places.flip(0)))
    assert not np.allclose(moved, got, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- simple detectors
def test_simple_detectors_of_places_find_the_defect(surface):
    _, fitted = surface
    for name in baselines.PLACES:
        assert utils.auroc(fitted.labels, fitted.simple_scores[name]) > 0.9, name


def test_simple_detectors_belong_to_the_first_seed(tmp_path):
    """They hardly depend on it, and cost as much as a fit."""
    cache = fabricate(tmp_path / "c", spread=0.1)
    sources = [class_data.TokenSource(cache.arrays(split), torch.device("cpu")) for split in SPLITS]
    config = settings(baselines=True, n_seeds=2)
    fitted = [train.make_trainer(config, cache, "a", seed, *sources).run() for seed in (0, 1)]
    assert [bool(each.simple_scores) for each in fitted] == [True, False]


def test_coreset_takes_the_farthest():
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [50.0]])
    assert sorted(baselines.greedy_coreset(line, 3).flatten().tolist()) == [0, 11, 50]
    assert len(baselines.greedy_coreset(line, 99)) == 6


def test_patch_memory_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    reference, query = (torch.randn(n, 4, 3, generator=generator) for n in (6, 5))
    memory = reference.flatten(0, 1).numpy().astype(float)  # 24 places: all are kept
    wanted = []
    for image in query.numpy().astype(float):
        distances = np.linalg.norm(image[:, None] - memory[None], axis=2)
        place = distances.min(1).argmax()
        owner = distances[place].argmin()
        around = np.argsort(np.linalg.norm(memory - memory[owner], axis=1))[:9]
        weight = 1 - np.exp(distances[place, owner]) / np.exp(distances[place, around]).sum()
        wanted.append(weight * distances[place, owner])
    assert np.allclose(baselines.patch_memory(reference)(query).numpy(), wanted, rtol=1e-3)


def test_place_gaussians_equal_scipys():
    from scipy.spatial.distance import mahalanobis

    generator = torch.Generator().manual_seed(0)
    reference, query = (torch.randn(n, 4, 3, generator=generator) for n in (40, 5))
    wanted = []
    for image in query.numpy().astype(float):
        distances = []
        for p in range(4):
            tokens = reference[:, p].numpy().astype(float)
            precision = np.linalg.inv(np.cov(tokens.T) + 0.01 * np.eye(3))
            distances.append(mahalanobis(image[p], tokens.mean(0), precision))
        wanted.append(max(distances))
    assert np.allclose(baselines.place_gaussians(reference)(query).numpy(), wanted, rtol=1e-3)


def test_place_gaussians_of_tokens_of_any_size():
    """Too few images for covariances of full rank, tokens whose variance is far above the ridge."""
    generator = torch.Generator().manual_seed(0)
    reference, query = (3e4 * torch.randn(n, 4, 90, generator=generator) for n in (30, 5))
    assert baselines.place_gaussians(reference)(query).isfinite().all()
