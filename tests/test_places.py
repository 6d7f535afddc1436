"""Place tokens, the flow of single places, and the simple detectors on them."""

import dataclasses
import warnings
import weakref

import numpy as np
import pytest
import torch
from conftest import make_cache
from torch.nn import functional as F

import baselines
import detector
import train
import utils
from config import Config
from datasets import SPLITS, Labels, Split
from normalization import PlaceNormalizer
from token_grid import Bands, Places, place_grid, rotation

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


# ---------------------------------------------------------------- the normaliser
def test_places_keep_their_own_means_as_far_as_these_are_no_chance():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 9, 4, generator=generator)
    alike = PlaceNormalizer(9, 4).fit(noise)
    assert (alike.mean - noise.mean((0, 1))).abs().max() < 0.1 * noise.mean(0).std()
    own = 5 * torch.randn(9, 4, generator=generator)
    apart = PlaceNormalizer(9, 4).fit(noise + own)
    assert torch.allclose(apart.mean, (noise + own).mean(0), atol=1e-2)


def test_places_have_their_own_covariance_as_far_as_there_are_images():
    """By the formula, place by place; two images tell little about a place, many all."""
    generator = torch.Generator().manual_seed(0)
    scale = 1 + 3 * torch.rand(9, 4, generator=generator)
    for n in (3, 5000):
        tokens = scale * torch.randn(n, 9, 4, generator=generator)
        fitted = PlaceNormalizer(9, 4).fit(tokens)
        away = (tokens - fitted.mean).double()
        own = torch.einsum("npc,npd->pcd", away, away) / n
        pooled = own.mean(0)
        mixed = (4 * pooled + n * own) / (4 + n) + 0.03 * pooled.trace() / 4 * torch.eye(4)
        wanted = torch.einsum("npc,pcd,npd->np", away, torch.linalg.inv(mixed), away)
        got = fitted(tokens).double().square().sum(2)
        assert torch.allclose(got / got.mean(), wanted / wanted.mean(), rtol=1e-3), n
        assert fitted(tokens).square().mean().item() == pytest.approx(1, rel=1e-4)
    white = fitted(tokens)
    assert (white.var(0) - 1).abs().max() < 0.15, "each place is white by itself"


# ---------------------------------------------------------------- the local flow
N, C, PLACES, E, N_TRAIN, N_TEST = 9, 16, 25, 6, 48, 24


def fabricate(folder, spread: float, per_category: bool = True, curved: bool = False):
    """One surface; a defective image is unusual at one place alone. spread: of the semantic tokens; curved:
    one channel of a place is the square of another."""
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
    for values in places.values() if curved else ():
        values[..., 1] = values[..., 0] ** 2
    return make_cache(
        folder, Labels(("a",), **splits, per_category=per_category), tokens, bands, places, grid=(3, 3),
        band_channels=(2, 3), place_shape=(PLACES, E),
    )  # fmt: skip


def settings(**more) -> Config:
    options = {
        "bands": True, "places": 5, "score": "spectrum", "holdout": 0.25, "select_epoch": "likelihood",
        "normalize": "power_l2+whiten", "fusion": "class_attention", "n_coupling_blocks": 2,
        "fc_internal": 16, "batch_size": 16, "lr_init": 1e-3, "identity_start": True, "hide_tqdm_bar": True,
        "verbose": False,
    }  # fmt: skip
    return Config(**(options | more))


def fit(cache, cell_seed=0, **more):
    sources = [detector.TokenSource(cache.arrays(split), torch.device("cpu")) for split in SPLITS]
    trainer = train.make_trainer(settings(**more), cache, "a", cell_seed, *sources)
    return trainer, trainer.run()


@pytest.fixture(scope="module")
def surface(tmp_path_factory):
    return fit(fabricate(tmp_path_factory.mktemp("surface") / "c", spread=0.1), refit=True, baselines=True)


def test_the_local_flows_moments_go_with_the_training(tmp_path, no_collector):
    """At once, not when cycles of references are looked for."""
    trainer, fitted = fit(fabricate(tmp_path / "c", spread=0.1), meta_epochs=1)
    moment = weakref.ref(trainer.heads[2].optimizer.optimizers[0])
    del trainer
    assert moment() is None and fitted.detector.uses_places


def test_a_defect_of_one_place_is_found_where_images_are_alike(surface, tmp_path):
    trainer, fitted = surface
    assert [head.name for head in trainer.heads] == ["semantic", "texture", "local"]
    assert fitted.result["local_weight"] > 0.4 and fitted.result["auroc"] > 0.95
    cache = fabricate(tmp_path / "b", spread=0.1)
    _, without = fit(cache, places=0)
    assert without.result["auroc"] < 0.7, "the rest of the image does not show it"


@pytest.mark.parametrize("spread, surfaces", [(4.0, 0.08), (0.1, 1e-5)], ids=["varied", "by knob"])
def test_places_are_not_read_where_they_do_not_count(tmp_path, spread, surfaces, monkeypatch):
    cache = fabricate(tmp_path / "c", spread=spread, per_category=False)
    read = []
    plain = detector.TokenSource._rows
    monkeypatch.setattr(
        detector.TokenSource, "_rows", lambda self, name, rows: read.append(name) or plain(self, name, rows)
    )
    trainer, fitted = fit(cache, spread_of_surfaces=surfaces, refit=True)
    assert len(trainer.heads) == 2 and "places" not in read and "local_weight" not in fitted.result


def test_weights_of_the_heads(surface):
    fit_, weights = surface[1].detector, surface[1].detector.weights
    assert weights.sum().item() == pytest.approx(1)
    tokens = torch.cat([torch.eye(4) + 0.7, torch.ones(4, 4)])
    v = detector.spread(tokens)
    fit_ = dataclasses.replace(settings(), spread_at_balance=v, spread_of_surfaces=v)
    fresh = detector.Detector(
        fit_, {"n_feat": 4, "grid": (1, 1), "tokens": 2, "kind": "map", "band_channels": (2, 3),
               "place_shape": (PLACES, E)},
    )  # fmt: skip
    fresh.weigh(tokens)
    # meaning and surface count alike; of the surface, places count as much as the whole image
    assert fresh.weights.tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4])


def test_an_image_is_as_unlikely_as_its_least_likely_place(surface):
    trainer, fitted = surface
    rows = trainer.data.test_rows
    found = trainer.heads[2].measure(trainer.data.test, rows)
    places = trainer.data.test.one("places", rows)
    with torch.no_grad():
        each = torch.stack([fitted.detector.place_scores(image[None])[0] for image in places])
    assert torch.allclose(found.likelihood, each.amax(1), atol=1e-4)
    assert found.loss == pytest.approx(each.mean().item() - 0.9189385, abs=1e-4)
    features = trainer.data.test[rows]._replace(places=places)
    assert np.allclose(fitted.detector.score_features(features), fitted.scores, atol=1e-4)


def test_a_seed_comes_out_the_same_whichever_seed_the_run_began_with(tmp_path):
    """The places that the local flow learns from are drawn by the seed of the class, too."""
    cache, options = fabricate(tmp_path / "c", spread=0.1), {"select_epoch": "last", "lr_init": 5e-3}
    local = [
        dict(fit(cache, cell_seed=1, seed=first, **options)[1].detector.local.named_parameters())
        for first in (0, 1)
    ]
    assert all(torch.equal(values, local[1][name]) for name, values in local[0].items())


def test_a_flow_without_neighbours_is_calibrated_without_a_warning():
    """PyTorch warns of a deviation over nothing, on every user's screen."""
    evidence = detector.Evidence((), 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evidence.calibrate("neighbours", torch.zeros(5, 0))
        evidence.calibrate("likelihood", torch.tensor([1.0, 3.0]))
    assert evidence(torch.tensor([4.0]), torch.zeros(1, 0)).item() == pytest.approx(2**0.5)


def test_the_local_flow_learns(tmp_path):
    """Places on a curve: no Gaussian fits, a flow does."""
    cache = fabricate(tmp_path / "c", spread=0.1, curved=True)
    _, fitted = fit(cache, meta_epochs=20, lr_init=5e-3, patience=20, feature_noise=0.1)
    losses = [entry["local_held_out_loss"] for entry in fitted.history]
    assert min(losses) < losses[0] - 0.05 and fitted.result["local_epoch"] > 0


# ---------------------------------------------------------------- simple detectors
def test_simple_detectors_of_places_find_the_defect(surface):
    _, fitted = surface
    for name in baselines.PLACE_BASELINES:
        assert utils.auroc(fitted.labels, fitted.own_input_scores[name]) > 0.9, name


def test_simple_detectors_belong_to_the_first_seed(tmp_path):
    """They hardly depend on it, and cost as much as a fit."""
    cache = fabricate(tmp_path / "c", spread=0.1)
    sources = [detector.TokenSource(cache.arrays(split), torch.device("cpu")) for split in SPLITS]
    config = settings(baselines=True, n_seeds=2)
    fitted = [train.make_trainer(config, cache, "a", seed, *sources).run() for seed in (0, 1)]
    assert [bool(each.own_input_scores) for each in fitted] == [True, False]


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
