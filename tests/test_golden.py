"""The modules against fixtures made by running the released ones.

Every file of $GOLDEN_DIR (default: tests/golden) is checked; its kind is the start of its name, its sizes are
those of its tensors."""

import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_flow
from safetensors.torch import load_file

import config
import model
import train
from backbone.token_grid import TokenGrid
from detector import class_data, preparation
from freq_fusion import HiLo, SpectralGate

FOLDER = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
KINDS = ("flow_", "hilo_", "dct_", "released_pooling")
TIGHT, TRAINED = 1e-5, 1e-4  # relative error: at once, and behind training steps


def of_kind(kind: str) -> list:
    return [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob(f"{kind}*.safetensors"))]


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    """Max abs difference / max abs of the reference <= tolerance, same number of values, all finite."""
    got, wanted = got.detach().double().flatten(), wanted.double().flatten()
    assert got.shape == wanted.shape, f"{what}: {got.shape} values, expected {wanted.shape}"
    assert torch.isfinite(got).all(), f"{what}: not finite"
    scale = wanted.abs().max().item()
    error = (got - wanted).abs().max().item() / (scale or 1.0)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, at most {tolerance:.0e} expected"


def test_folder_holds_fixtures():
    """A folder without any known fixture is a failure, never a silent pass."""
    found = sorted(FOLDER.glob("*.safetensors"))
    known = [path for path in found if path.name.startswith(KINDS)]
    assert known, (
        f"no fixture in {FOLDER}: expected files named {', '.join(kind + '*.safetensors' for kind in KINDS)}"
    )
    for path in set(found) - set(known):
        warnings.warn(f"{path} is of no known kind and was not checked", stacklevel=1)


# ---------------------------------------------------------------- the flow
def ours(name: str) -> str:
    return name.replace("blocks.", "module_list.", 1)


def released(name: str) -> str:
    return name.replace("module_list.", "blocks.", 1)


def parameters(golden: dict) -> dict:
    return {
        ours(name.removeprefix("param.")): value
        for name, value in golden.items()
        if name.startswith("param.")
    }


def sizes(golden: dict) -> tuple[int, int, int, int]:
    """Channels C, patch tokens N, blocks K, width H of a flow fixture."""
    channels, n = golden["features"].shape[3], golden["features"].shape[2] - 1
    blocks = 1 + max(int(name.split(".")[2]) for name in golden if name.startswith("param.blocks."))
    return channels, n, blocks, len(golden["param.blocks.0.s1.fc1.bias"])


def released_flow(golden: dict):
    channels, n, blocks, hidden = sizes(golden)
    flow = make_flow(channels, grid_of(n), n_blocks=blocks, hidden=hidden, fusion="class_attention")
    flow.load_state_dict(parameters(golden))  # strict: no parameter more or less than the released flow's
    return flow


def grid_of(n: int) -> tuple[int, int]:
    side = math.isqrt(n)
    return (side, side) if side * side == n else (1, n)


@pytest.fixture(scope="module", params=of_kind("flow_"))
def flow_file(request):
    golden = load_file(request.param)
    return golden, golden["features"][:, :, 0], golden["features"][:, :, 1:]


def test_flow_forward(flow_file):
    golden, semantic, patches = flow_file
    with torch.no_grad():
        z, log_det = released_flow(golden)(semantic[0], [patches[0]])
    assert_close(z, golden["z"], TIGHT, "z")
    assert_close(log_det, golden["log_det"], TIGHT, "log_det")
    assert_close(model.loss_per_image(z, log_det).mean(), golden["loss"], TIGHT, "loss")
    assert_close(z.square().mean(1), golden["score"], TIGHT, "score")


def test_flow_gradients(flow_file):
    golden, semantic, patches = flow_file
    flow = released_flow(golden)
    model.loss_per_image(*flow(semantic[0], [patches[0]])).mean().backward()
    wanted = {ours(name.removeprefix("grad.")) for name in golden if name.startswith("grad.")}
    assert wanted == set(dict(flow.named_parameters())), (
        "every parameter has a reference gradient, and no other"
    )
    for name, parameter in flow.named_parameters():
        assert_close(parameter.grad, golden[f"grad.{released(name)}"], TIGHT, f"grad.{released(name)}")


def test_flow_inverse(flow_file):
    golden, semantic, patches = flow_file
    flow = released_flow(golden)
    with torch.no_grad():
        back, reverse = flow(golden["z"], [patches[0]], rev=True)
    assert_close(back, golden["inverse_semantic"], TIGHT, "inverse_semantic")
    assert_close(back, semantic[0], TIGHT, "inverse of z")
    assert_close(-reverse, golden["log_det"], TIGHT, "log_det of the inverse")


def test_flow_training(flow_file):
    """Adam as released over the batches in order: the loss of every step, and z afterwards."""
    golden, semantic, patches = flow_file
    flow = released_flow(golden)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-5, betas=(0.8, 0.8), eps=1e-4, weight_decay=1e-5)
    losses = []
    for y_sem, y_patch in zip(semantic, patches):
        loss = model.loss_per_image(*flow(y_sem, [y_patch])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert_close(torch.stack(losses), golden["train.losses"], TRAINED, "train.losses")
    with torch.no_grad():
        assert_close(flow(semantic[0], [patches[0]])[0], golden["train.z_after"], TRAINED, "train.z_after")


class GoldenSource:
    """What training wants of a TokenSource, out of a fixture's features."""

    def __init__(self, features: torch.Tensor):
        self.rows = features.flatten(0, 1)

    def __getitem__(self, index):
        rows = self.rows[torch.from_numpy(np.asarray(index))]
        return class_data.Features(rows[:, 0], rows[:, 1:])


def test_trainer_takes_the_released_steps(flow_file):
    """The training script's own step, on its default optimiser settings, gives the released losses."""
    golden, semantic, patches = flow_file
    channels, n, blocks, hidden = sizes(golden)
    source = GoldenSource(golden["features"])
    rows = np.arange(len(source.rows))
    none, labels = rows[:0], np.zeros(len(rows), int)
    data = class_data.ClassData("golden", source, source, rows, none, rows, labels, none)
    batches = rows.reshape(len(semantic), -1)  # an epoch each, so that each has its loss
    sizes_of_flow = {"n_coupling_blocks": blocks, "fc_internal": hidden}
    settings = config.Config(fusion="class_attention", meta_epochs=len(batches), **sizes_of_flow)
    features = {"n_feat": channels, "grid": grid_of(n), "tokens": 1 + n, "kind": "tokens"}
    prepared = preparation.prepare_data(settings, data, features, 0, torch.device("cpu"))
    detector = prepared.detector
    detector.flow.load_state_dict(parameters(golden))
    given = iter(batches)
    prepared.epoch = lambda order: [next(given)]
    losses = torch.tensor([loss for _, loss in train.train_epochs(prepared)])
    assert_close(losses, golden["train.losses"], TRAINED, "train.losses")
    features = class_data.Features(semantic[0], patches[0])
    with torch.no_grad():
        (tokens, seen), _ = detector.eval().inputs(features)
        z, _ = detector.flow(tokens, [seen])
        score = detector.score(features, "latent")
    assert_close(z, golden["train.z_after"], TRAINED, "train.z_after")
    assert_close(score, golden["train.z_after"].square().mean(1), TRAINED, "score afterwards")


# ---------------------------------------------------------------- fusion modules
@pytest.mark.parametrize("path", of_kind("hilo_"))
def test_hilo(path):
    golden = load_file(path)
    window = int(re.search(r"_w(\d+)", path.stem)[1])
    alphas = sorted({re.match(r"alpha([\d.]+)\.", name)[1] for name in golden})
    assert alphas
    for alpha in alphas:
        part = {
            name.removeprefix(f"alpha{alpha}."): value
            for name, value in golden.items()
            if name.startswith(f"alpha{alpha}.")
        }
        tokens, out = part["tokens"], part["out"]
        channels = tokens.shape[2]
        module = HiLo(
            channels,
            out.shape[1],
            grid_of(tokens.shape[1] - 1),
            alpha=float(alpha),
            window=window,
        )
        module.load_state_dict(
            {name.removeprefix("param."): value for name, value in part.items() if name.startswith("param.")}
        )
        assert_close(
            module(tokens[:, 0], tokens[:, 1:], torch.arange(channels)), out, TIGHT, f"hilo, alpha {alpha}"
        )


@pytest.mark.parametrize("path", of_kind("dct_"))
def test_dct(path):
    golden = load_file(path)
    maps = golden["x"]
    module = SpectralGate(maps.shape[1], tuple(maps.shape[2:]))
    assert_close(module.dct_layer.weight, golden["param.dct_layer.weight"], TIGHT, "dct filters")
    module.fc.load_state_dict(
        {
            name.removeprefix("param.fc."): value
            for name, value in golden.items()
            if name.startswith("param.fc.")
        }
    )
    assert_close(module(maps), golden["out"], TIGHT, "gated map")
    gate = module.gate_tokens(maps.flatten(2).transpose(1, 2), torch.arange(maps.shape[1]))
    assert_close(maps * gate[..., None, None], golden["out"], TIGHT, "map gated by way of its tokens")


# ---------------------------------------------------------------- pooling
@pytest.mark.parametrize("path", of_kind("released_pooling"))
def test_released_pooling(path):
    golden = load_file(path)
    tokens, wanted = golden["tokens"], golden["pooled_released"]
    side = math.isqrt(wanted.shape[1] - 1)
    pooled = TokenGrid(str(side), "released").pool(tokens, grid_of(tokens.shape[1] - 1))
    assert_close(pooled, wanted, TIGHT, "pooled_released")
    correct = TokenGrid(str(side), "correct").pool(tokens, grid_of(tokens.shape[1] - 1))
    assert (correct - wanted).abs().max() > 0.1 * wanted.abs().max(), (
        "the default pooling is not the mixed one"
    )
