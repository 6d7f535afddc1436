"""The coupling layer and the flow: inverse, log-determinant, and equality with the plain transcription of
the released step."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import make_flow

import model

VARIANTS = {  # name -> (channels, grid, options)
    "class_attention": (18, (3, 3), {"fusion": "class_attention"}),
    "class_attention odd": (13, (2, 5), {"fusion": "class_attention"}),
    "hilo low only": (16, (4, 5), {"fusion": "hilo", "alpha": 1.0}),
    "hilo both": (17, (4, 7), {"fusion": "hilo", "alpha": 0.5}),
    "hilo high only": (16, (4, 5), {"fusion": "hilo", "alpha": 0.0}),
    "hilo window 2": (22, (5, 3), {"fusion": "hilo", "alpha": 0.25, "window": 2, "hidden": 19}),
    "spectral": (34, (6, 13), {"fusion": "spectral"}),
    "bands": (9, (1, 3), {"fusion": "bands"}),
    "none": (9, (2, 2), {"fusion": "none"}),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def make(name: str, dtype=torch.float64, batch: int = 4, n_blocks: int = 3, **more):
    """A flow away from its start (larger last layers, gains that are not one), with tokens to feed it."""
    channels, grid, options = VARIANTS[name]
    torch.manual_seed(3)
    flow = make_flow(channels, grid, n_blocks=n_blocks, **{"hidden": 12, **options, **more}).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in flow.named_parameters():
            if parameter_name.endswith("gamma"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "fc_out" in parameter_name:
                parameter.mul_(1.5)
    return (
        flow,
        torch.randn(batch, channels, dtype=dtype),
        torch.randn(batch, grid[0] * grid[1], channels, dtype=dtype),
        grid,
        options.get("window", 3),
    )


@every_variant
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_round_trip(name, dtype, tolerance):
    flow, x, p, _, _ = make(name, dtype)
    with torch.no_grad():
        z, forward = flow(x, [p])
        back, reverse = flow(z, [p], rev=True)
    assert z.shape == x.shape and forward.shape == (len(x),) and z.dtype == forward.dtype == dtype
    assert (z - x).abs().max() > 0.1 and forward.abs().min() > 1e-3, "the flow does something"
    assert (back - x).abs().max() < tolerance
    assert (forward + reverse).abs().max() < tolerance * max(1, forward.abs().max().item())


@every_variant
def test_log_det_against_autograd(name):
    flow, x, p, _, _ = make(name, batch=2)
    _, log_det = flow(x, [p])
    _, reverse = flow(x, [p], rev=True)
    for i in range(len(x)):
        condition = p[i : i + 1]
        for rev, found in ((False, log_det), (True, reverse)):
            jacobian = torch.autograd.functional.jacobian(
                lambda y: flow(y[None], [condition], rev=rev)[0][0], x[i]
            )
            assert abs(torch.linalg.slogdet(jacobian).logabsdet - found[i]).item() < 1e-8


@every_variant
def test_equals_plain_transcription(name):
    """Tokens permuted in every layer and projected one by one give what the layer's channel order gives."""
    flow, x, p, grid, window = make(name, n_blocks=4, clamp=1.3)
    with torch.no_grad():
        z, log_det = flow(x, [p])
        wanted, wanted_log_det = reference.flow(flow, x, p, grid, window, clamp=1.3)
    assert (z - wanted).abs().max() < 1e-6 * wanted.abs().max()
    assert (log_det - wanted_log_det).abs().max() < 1e-6 * wanted_log_det.abs().max()


@every_variant
def test_gradients_equal_plain_transcription(name):
    flow, x, p, grid, window = make(name)
    model.loss_per_image(*flow(x, [p])).mean().backward()
    found = {key: parameter.grad.clone() for key, parameter in flow.named_parameters()}
    flow.zero_grad()
    model.loss_per_image(*reference.flow(flow, x, p, grid, window)).mean().backward()
    for key, parameter in flow.named_parameters():
        assert (found[key] - parameter.grad).abs().max() <= 1e-6 * parameter.grad.abs().max() + 1e-12, key


@pytest.mark.parametrize("name", ["class_attention", "hilo both", "spectral"])
def test_patches_matter(name):
    flow, x, p, _, _ = make(name)
    with torch.no_grad():
        assert (flow(x, [p])[0] - flow(x, [p.roll(1, 0)])[0]).abs().max() > 1e-3


def test_clamp_bounds_the_scales():
    """Whatever the subnets say, a log-scale stays below clamp * 0.636 * pi / 2."""
    for clamp in (0.5, 3.0):
        flow, x, p, _, _ = make("class_attention", clamp=clamp, n_blocks=1)
        with torch.no_grad():
            for layer in flow.module_list:
                for subnet in (layer.s1, layer.s2):
                    subnet.fc_out.bias[: len(subnet.fc_out.bias) // 2] = 1e9  # the log-scales, not the shifts
        bound = x.shape[1] * clamp * 0.636 * math.pi / 2
        assert (flow(x, [p])[1] - bound).abs().max() < 1e-6 * bound


def test_latents_are_limited():
    flow, x, p, _, _ = make("none")
    assert flow(x * 1e12, [p])[0].abs().max() == 1e6


def test_identity_start_only_permutes():
    flow, x, p, _, _ = make("hilo both", identity_start=True, n_blocks=4)
    wanted = x
    for k in range(4):
        wanted = wanted[:, torch.from_numpy(np.random.RandomState(k).permutation(x.shape[1]))]
    z, log_det = flow(x, [p])
    assert torch.equal(z, wanted) and log_det.abs().max() == 0


def test_gains_are_one_at_the_start():
    flow = make_flow(18, (3, 3), hidden=12, n_blocks=3)
    gains = [value for name, value in flow.named_parameters() if name.endswith("gamma")]
    assert len(gains) == 2 * 3 and all((value == 1).all() for value in gains)


# ---------------------------------------------------------------- FrEIA's contract
@pytest.mark.parametrize(
    "dims_in, dims_c",
    [
        ([(10, 2)], [(4, 10)]),
        ([(10,), (10,)], [(4, 10)]),
        ([(10,)], [(4, 9)]),
        ([(10,)], []),
        ([(10,)], [(10,)]),
    ],
)
def test_coupling_refuses_wrong_sizes(dims_in, dims_c):
    with pytest.raises(ValueError, match="FusedCoupling takes one .* of shape .*, got "):
        model.FusedCoupling(dims_in, dims_c, order=None, token_order=None, make_subnet=None, clamp=3.0)


# ---------------------------------------------------------------- likelihood and scores
def test_loss_and_likelihood_by_hand():
    z, log_det = torch.tensor([[1.0, 2.0], [0.0, -4.0]]), torch.tensor([0.5, -1.0])
    assert torch.allclose(model.loss_per_image(z, log_det), torch.tensor([(2.5 - 0.5) / 2, (8 + 1) / 2]))
    of_places = model.loss_per_image(z[:, None], log_det[:, None])
    assert torch.equal(of_places, model.loss_per_image(z, log_det)[:, None])
    likelihood = model.negative_log_likelihood(z, log_det, torch.tensor([3.0, 0.0]), 4)
    without = torch.tensor([(2.5 + 1.5 - 0.5) / 4, (8 + 1) / 4])
    assert torch.allclose(likelihood, without + 0.5 * math.log(2 * math.pi))


def test_likelihood_score_is_a_density():
    """The negative log-likelihood per channel of a flow integrates to one: here on a fine grid over one
    image's two channels."""
    torch.manual_seed(1)
    flow = make_flow(2, (1, 1), n_blocks=2, hidden=6, fusion="none").double()
    axis = torch.arange(-9, 9, 0.06).double()
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        z, log_det = flow(points, [torch.zeros(len(points), 1, 2).double()])
        total = torch.exp(-2 * model.negative_log_likelihood(z, log_det)).sum() * 0.06**2
    assert abs(total.item() - 1) < 1e-3


@every_variant
def test_tokens_that_do_not_fit_are_refused_when_the_flow_runs(name):
    """Channels, patch tokens and batches that do not belong together: expected and got, no silent
    broadcasting."""
    flow, x, p, _, _ = make(name, batch=5)
    wrong = {
        "channels of the patches": (x, torch.cat([p, p[..., :1]], 2)),
        "channels of the semantic token": (torch.cat([x, x[:, :1]], 1), p),
        "one patch more": (x, torch.cat([p, p[:, :1]], 1)),
        "one patch less": (x, p[:, 1:]),
        "one image's patches for five": (x, p[:1]),
    }
    for case, (semantic, patches) in wrong.items():
        with pytest.raises(ValueError, match="expected a semantic token.*got"):
            flow(semantic, [patches])
            pytest.fail(case)
