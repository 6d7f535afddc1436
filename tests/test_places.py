"""Place tokens, the flow that moves them, and the simple detectors on them."""

import math

import numpy as np
import pytest
import torch
from conftest import make_cache
from fabricated import JOINED, make
from torch.nn import functional as F

import model
import train
import utils
from backbone.token_grid import Bands, Places, place_grid, rotation
from datasets import Labels, Split
from detector import baselines, class_data
from detector.image_density import one_scene
from detector.normalization import spread
from detector.places import Places as PlaceModule
from detector.places import PlaceWhitening, bands_around, position

CHANNELS = (4, 6, 5)


def maps(grids=((16, 12), (8, 8), (4, 4)), seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, c, *grid, generator=generator) for c, grid in zip(CHANNELS, grids)]


# ---------------------------------------------------------------- the tokens
def test_places_are_smoothed_means_of_all_depths_but_the_deepest():
    tokens = Places((4, 4), 100).measure(maps())
    assert tokens.shape == (3, 16, 10)
    padded = [F.pad(torch.stack([m, torch.ones_like(m)]), (1, 1, 1, 1)) for m in maps()[:2]]
    for depth, (height, width) in enumerate(((16, 12), (8, 8))):
        sums, there = sum(
            padded[depth][..., i : i + height, j : j + width] for i in range(3) for j in range(3)
        )
        smooth = sums / there  # 4, 6 or 9 cells
        cells = smooth.unflatten(3, (4, width // 4)).unflatten(2, (4, height // 4)).mean((3, 5))
        columns = slice(0, 4) if depth == 0 else slice(4, 10)
        assert torch.allclose(tokens[..., columns], cells.flatten(2).transpose(1, 2), atol=1e-5)


def test_more_channels_are_rotated_down_and_lengths_kept():
    many = torch.randn(500, 10, generator=torch.Generator().manual_seed(3))
    few = many @ rotation(10, 6)
    assert few.square().sum().item() == pytest.approx(many.square().sum().item(), rel=0.1)
    assert torch.allclose(rotation(10, 6).T @ rotation(10, 6), torch.eye(6) * 10 / 6, atol=1e-5)
    assert torch.allclose(
        Places((4, 4), 6).measure(maps()), Places((4, 4), 10).measure(maps()) @ rotation(10, 6), atol=1e-5
    )


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


# ---------------------------------------------------------------- what a place sees
def test_bands_are_means_of_the_others_beyond_the_neighbourhood():
    """On a row of nine places, and for all places of a grid by loops."""
    low, high = bands_around((1, 9))
    assert low[0].tolist() == pytest.approx([0] * 3 + [1 / 6] * 6)
    assert high[0].tolist() == pytest.approx([0] * 3 + [1 / 3] * 3 + [0] * 3)
    assert low[4].tolist() == pytest.approx([1 / 4] * 2 + [0] * 5 + [1 / 4] * 2)
    rows, columns = 9, 7
    found = bands_around((rows, columns))
    for p in range(rows * columns):
        away = [max(abs(p // columns - q // columns), abs(p % columns - q % columns)) for q in range(63)]
        for band, reach in zip(found, (9, 5)):
            seen = [3 <= distance <= reach for distance in away]
            assert band[p].tolist() == pytest.approx([one / sum(seen) for one in seen])


def test_positions_are_waves_of_row_and_column():
    """From half a wave over the grid to four."""
    found = position((3, 5), 8).numpy()
    for p in range(15):
        turns = [math.pi * wave * (p // 5 + 0.5) / 3 for wave in (1, 8)]
        turns += [math.pi * wave * (p % 5 + 0.5) / 5 for wave in (1, 8)]
        wanted = [*np.sin(turns[:2]), *np.cos(turns[:2]), *np.sin(turns[2:]), *np.cos(turns[2:])]
        assert found[p] == pytest.approx(wanted, abs=1e-5)
    for channels in (2, 7, 9):
        assert position((3, 5), channels).shape == (15, channels)


def test_a_place_sees_no_more_of_itself_than_the_flow_is_to_move():
    """Nor of its neighbourhood: its token changes what those three and more away from it see."""
    places = places_of((9, 9), 4)
    tokens = torch.randn(2, 81, 4, generator=torch.Generator().manual_seed(0))
    before = places.inputs(tokens.clone())
    tokens[0, 40] += 5
    after = places.inputs(tokens)
    moved = (after.tokens != before.tokens).any(1)
    assert moved.nonzero().flatten().tolist() == [40]
    changed = (after.seen != before.seen).flatten(1).any(1)
    away = [max(abs(p // 9 - 4), abs(p % 9 - 4)) for p in range(81)]
    assert changed.tolist() == [distance >= 3 for distance in away] + [False] * 81


# ---------------------------------------------------------------- the places' flow
def places_of(grid, channels: int) -> PlaceModule:
    torch.manual_seed(0)
    return PlaceModule(grid, channels)


def test_places_keep_their_own_means_as_far_as_these_are_no_chance():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 9, 4, generator=generator)
    alike = PlaceWhitening(9, 4).fit(noise)
    assert (alike.mean - noise.mean((0, 1))).abs().max() < 0.1 * noise.mean(0).std()
    own = 5 * torch.randn(9, 4, generator=generator)
    apart = PlaceWhitening(9, 4).fit(noise + own)
    assert torch.allclose(apart.mean, (noise + own).mean(0), atol=1e-2)


@pytest.mark.parametrize("n", [3, 40, 3000])
def test_at_its_start_the_flow_has_the_places_own_gaussians(n):
    """In float64 and by inverses: covariances drawn to the common one by E / (n + E), logarithms standardised
    by variances drawn to the common one by 10 / (n + 10)."""
    generator = torch.Generator().manual_seed(0)
    scale = 1 + 3 * torch.rand(9, 4, generator=generator)
    tokens, unseen = (scale * torch.randn(m, 9, 4, generator=generator) for m in (n, 20))
    places = places_of((3, 3), 4)
    places.whiten.fit(tokens)

    def logs(found):
        away = (found - places.whiten.mean).double()
        squares = torch.einsum("npc,pcd,npd->np", away, torch.linalg.inv(mixed), away)
        return (squares / 4 + math.log(2 * math.pi)).log()

    away = (tokens - places.whiten.mean).double()
    own = torch.einsum("npc,npd->pcd", away, away) / n
    pooled = own.mean(0)
    mixed = (4 * pooled + n * own) / (4 + n) + 0.03 * pooled.trace() / 4 * torch.eye(4)
    variance = logs(tokens).var(0, correction=0)
    deviation = ((n * variance + 10 * variance.mean()) / (n + 10)).sqrt()
    wanted = (logs(unseen) - logs(tokens).mean(0)) / deviation
    found, unseen_found = (
        model.negative_log_likelihood(places.whiten(each), torch.zeros(len(each), 9))
        for each in (tokens, unseen)
    )
    got = places.fit_scale(found).unusual(unseen_found)
    assert torch.allclose(got.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [6, 30])
def test_a_training_images_places_are_as_long_as_without_it(n):
    """(17) beside a fit of the same covariance, about the same mean, without the image's own part of it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(n, 1, 4, generator=generator).double()
    tokens -= tokens.mean(0)  # one place: its own mean and covariance are the common ones
    left_out = PlaceWhitening.left_out
    own = torch.einsum("nc,nd->cd", tokens[:, 0], tokens[:, 0])
    for i in range(n):
        image = tokens[i, 0]
        away = image * n / (n - 1)  # from the mean of the others
        covariance = (own + 4 * torch.eye(4)) / (n + 4)  # the prior counts like E images
        whitened = tokens @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T
        others = covariance - torch.outer(image, image) / (n + 4)
        wanted = away @ torch.linalg.inv(others) @ away
        assert left_out(whitened)[i, 0].square().sum() == pytest.approx(float(wanted), rel=1e-6)


def test_the_most_unusual_places_are_three_in_a_hundred():
    places = places_of((10, 10), 4)
    losses = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)).exp()
    places.fit_scale(losses)
    wanted = places.unusual(losses).sort(1, descending=True).values[:, :3].mean(1)
    assert torch.allclose(places.most_unusual(losses), wanted) and places_of((2, 2), 4).n_unusual == 1


# ---------------------------------------------------------------- the detector
N, C, PLACES, E, N_TRAIN, N_TEST = 9, 16, 49, 6, 48, 24


def fabricate(folder, spread: float, light: float = 0.0, n_train: int = N_TRAIN):
    """One surface; a defective image is unusual at one place alone. spread: of the semantic tokens. light:
    how much an image's places have in common; then a defect is a place that would be usual in another."""
    generator = np.random.RandomState(0)
    odd = {"train": np.zeros(n_train, bool), "test": np.arange(N_TEST) % 2 == 1}
    splits = {
        s: Split.of([f"{s}{i}" for i in range(len(o))], np.zeros(len(o), int), o) for s, o in odd.items()
    }
    tokens = {s: 4 + spread * generator.randn(len(o), 1 + N, C) for s, o in odd.items()}
    size = len(Bands().statistics) * 5
    bands = {s: 5 + 0.2 * generator.randn(len(o), size) for s, o in odd.items()}
    lights = {s: generator.randn(len(o), 1, 1) for s, o in odd.items()}
    places = {s: generator.randn(len(o), PLACES, E) + light * lights[s] for s, o in odd.items()}
    for image in np.flatnonzero(odd["test"]):
        wrong = -2 * light * np.sign(lights["test"][image]) if light else 6 * generator.choice([-1, 1], E)
        places["test"][image, generator.randint(PLACES)] += np.ravel(wrong)
    return make_cache(
        folder, Labels(("a",), **splits, per_category=True), tokens, bands, places, grid=(3, 3),
        band_channels=(2, 3), place_shape=(PLACES, E),
    )  # fmt: skip


OPTIONS = JOINED | {"places": 7, "holdout": 0.25, "fc_internal": 16, "batch_size": 64, "lr_init": 5e-3}


def fit(cache, **more):
    prepared = make(cache, **OPTIONS | more)
    return prepared, train.train(prepared)


@pytest.fixture(scope="module")
def surface(tmp_path_factory):
    return fit(fabricate(tmp_path_factory.mktemp("surface") / "c", spread=0.1), baselines=True)


def test_a_defect_of_one_place_is_found_where_images_are_alike(surface):
    _, fitted = surface
    assert fitted.result["reads_places"] and fitted.result["auroc"] > 0.9
    image = utils.auroc(fitted.test.labels, fitted.flow_scores["image part"])
    assert image < 0.75, "the rest of the image does not show it"


def test_training_learns_what_the_places_of_an_image_have_in_common(tmp_path):
    """Their light: with the bands of its image a place's is known, without them it is not. A defect is a
    place whose light is that of another image."""
    cache = fabricate(tmp_path / "c", spread=0.1, light=3.0, n_train=150)
    options = {"least_steps": 100, "lr_init": 1e-2, "lr_schedule": "cosine", "baselines": True}
    bands, none = (fit(cache, fusion=fusion, **options)[1] for fusion in ("bands", "none"))
    start, trained = (entry["held_out_loss"] for entry in bands.history)
    blind_start, blind = (entry["held_out_loss"] for entry in none.history)
    assert start == pytest.approx(blind_start, abs=1e-6) and start == pytest.approx(blind, abs=0.05)
    assert trained < start - 0.15
    before, after, without = (
        utils.auroc(each.test.labels, each.flow_scores[name])
        for each, name in ((bands, "places, before training"), (bands, "places"), (none, "places"))
    )
    assert before < 0.6 and without < 0.6 and after > 0.9


@pytest.mark.parametrize("width", [0.1, 4.0], ids=["alike", "varied"])
def test_places_are_read_where_images_show_one_scene(tmp_path, width, monkeypatch):
    """Where they do not, there is nothing to train, and the score is the image's."""
    read = []
    plain = class_data.TokenSource._rows
    monkeypatch.setattr(
        class_data.TokenSource, "_rows", lambda self, name, *of: read.append(name) or plain(self, name, *of)
    )
    prepared, fitted = fit(fabricate(tmp_path / "c", spread=width), baselines=True)
    alike = one_scene(spread(prepared.data.train.semantic[prepared.data.fit_rows].float())) > 0
    assert alike == (width == 0.1) == fitted.result["reads_places"] == ("places" in read)
    assert prepared.detector.uses_places == bool(prepared.detector.one_scene) == alike
    assert fitted.result["epoch"] == int(alike)
    if not alike:
        assert np.array_equal(fitted.test.scores, fitted.flow_scores["image part"])
    simple = fitted.simple_scores
    chosen = simple["PaDiM-like, places" if alike else "kNN, joint token"]
    assert np.array_equal(simple["PaDiM-like or kNN, by spread"], chosen)


@pytest.mark.parametrize("width", [0.1, 3.3], ids=["one scene", "between"])
def test_the_joined_score_adds_image_and_places(tmp_path, width):
    """Of the image: the Gaussian's where the class shows one scene, the kernels' where several; of the
    places, weighted likewise and by 1.5: their mean over the most unusual ones, in units of the held-out
    images'."""
    prepared, fitted = fit(fabricate(tmp_path / "c", spread=width))
    parts, weight = prepared.detector, float(prepared.detector.one_scene)
    assert (weight == 1) == (width == 0.1) and weight > 0
    source, rows = prepared.data.test, fitted.test.rows
    with torch.no_grad():
        both = parts.image(parts.joint(source[rows])).numpy()
        worst, known = (
            3 + parts.place_map(data.one("places", own)).max(1)  # one of 49 places
            for data, own in ((source, rows), (prepared.data.train, prepared.data.held_rows))
        )
    image = weight * both[:, 0] + (1 - weight) * both[:, 1]
    places = (worst - known.mean()) / known.std(ddof=1)
    assert fitted.flow_scores["image part"] == pytest.approx(image, rel=1e-3, abs=1e-3)
    assert fitted.flow_scores["places"] == pytest.approx(places, rel=1e-3, abs=1e-3)
    assert fitted.test.scores == pytest.approx(image + 1.5 * weight * places, rel=1e-3, abs=1e-3)


def test_places_maps_are_high_at_the_defects(surface):
    prepared, fitted = surface
    places = prepared.data.test.one("places", fitted.test.rows)
    values = prepared.detector.place_map(places)
    defective = np.flatnonzero(fitted.test.labels)
    found = values[defective].argmax(1) == places[defective].abs().mean(2).argmax(1).numpy()
    assert values.shape == (N_TEST, PLACES) and found.mean() > 0.8
    normal = np.delete(values, defective, 0)
    assert (normal > 0).mean() < 0.06, "few places of a normal picture are beyond three deviations"


# ---------------------------------------------------------------- simple detectors
def test_simple_detectors_of_places_find_the_defect(surface):
    _, fitted = surface
    for name in baselines.PLACES:
        assert utils.auroc(fitted.test.labels, fitted.simple_scores[name]) > 0.9, name


def test_simple_detectors_belong_to_the_first_seed(surface, tmp_path):
    """They hardly depend on it, and cost as much as a fit."""
    _, second = fit(fabricate(tmp_path / "c", spread=0.1), seed=1, baselines=True)
    assert surface[1].simple_scores and not second.simple_scores
