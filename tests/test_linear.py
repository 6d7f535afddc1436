"""The oneDNN linear layer gives what nn.Linear gives."""

import pytest
import torch
from torch import nn

import linear
import normalization


@pytest.mark.skipif(not linear.AVAILABLE, reason="this PyTorch has no oneDNN product")
@pytest.mark.parametrize("shape", [(1, 3, 5), (7, 16, 8), (64, 33, 20)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_value_and_gradients(shape, bias, gaps, relu):
    """Against float64, which takes nn.Linear's way, for whole rows and for rows cut out of wider ones."""
    m, k, n = shape
    torch.manual_seed(0)
    layer, exact = linear.Linear(k, n, bias, relu), linear.Linear(k, n, bias, relu).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(m, 2 * k)[:, :k] if gaps else torch.randn(m, k)
    x, y = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.detach().double().requires_grad_()
    weight = torch.randn(m, n)
    (layer(x) * weight).sum().backward()
    (exact(y) * weight.double()).sum().backward()
    pairs = [(layer(x), exact(y)), (x.grad, y.grad)] + [
        (p.grad, q.grad) for p, q in zip(layer.parameters(), exact.parameters())
    ]
    for ours, reference in pairs:
        assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_plain_where_onednn_does_not_serve():
    """float64, empty and three-dimensional input take nn.Linear's way."""
    layer = linear.Linear(4, 2)
    assert layer.double()(torch.randn(3, 4, dtype=torch.float64)).dtype == torch.float64
    assert layer.float()(torch.empty(0, 4)).shape == (0, 2)
    assert layer(torch.randn(2, 3, 4)).shape == (2, 3, 2)


def test_without_the_private_operator(monkeypatch):
    """A PyTorch that has dropped or changed the operator: nn.Linear does the work."""

    def gone(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(linear, "product", gone)
    assert not linear._works()
    monkeypatch.setattr(linear, "product", lambda x, weight, act="none": x @ weight.t() + (act == "relu"))
    assert not linear._works()
    monkeypatch.setattr(linear, "AVAILABLE", False)
    layer = linear.Linear(3, 4)
    x = torch.randn(2, 3)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def exported(**how):
    """Names of the operators in an export of a small network with a normalisation in front."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(linear.Linear(4, 3), nn.ReLU(), linear.Linear(3, 2))

        def forward(self, x):
            return self.layers(normalization.power_l2(x))

    net, x = Net().eval(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(net, (x,), **how)
    graphs = [
        module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)
    ]
    names = " ".join(str(node.target) for graph in graphs for node in graph.nodes)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-6)
    return names


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_holds_nothing_private(strict):
    names = exported(strict=strict)
    assert "aten.linear" in names and "mkldnn" not in names and "copysign" not in names
    assert "wrap_with_set_grad_enabled" not in names


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_compiling_and_tracing_take_the_plain_layer():
    layer, x, graphs = linear.Linear(4, 2), torch.randn(3, 4), []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=keep, fullgraph=True)(x)
    torch.testing.assert_close(compiled, layer(x), rtol=1e-5, atol=1e-6)
    assert "mkldnn" not in str(graphs[0].graph) and "autograd_function" not in str(graphs[0].graph)
    assert "aten::linear" in str(torch.jit.trace(layer, x).graph)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "matmul, device, exact, expected",
    [
        ("highest", CPU, True, "medium"),
        ("bfloat16", CPU, True, "medium"),
        ("highest", CPU, False, "highest"),
        ("tf32", CPU, False, "highest"),
        ("tf32", CUDA, True, "high"),
        ("highest", CUDA, True, "highest"),
        ("bfloat16", CUDA, True, "highest"),
    ],
)
def test_products(monkeypatch, matmul, device, exact, expected):
    """A CPU whose oneDNN gives up digits when it may is not allowed to; what was set before comes back."""
    monkeypatch.setattr(linear, "batched_by_onednn", lambda: exact)
    with pytest.raises(RuntimeError), linear.products(matmul, device):
        assert torch.get_float32_matmul_precision() == expected
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "highest"


def test_stacked_products_keep_their_digits():
    a, b = torch.randn(3, 4, 500), torch.randn(3, 500, 6)
    with linear.products("highest", CPU):
        error = (a @ b - a.double() @ b.double()).abs().max().item()
    assert error < 1e-4
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_product_that_loses_digits_is_seen(monkeypatch):
    """The probe, where the product is made with bfloat16 numbers."""
    exact = torch.Tensor.__matmul__

    def coarse(a, b):
        return exact(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else exact(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", coarse)
    assert not linear.batched_by_onednn.__wrapped__()


def test_bfloat16_forward_takes_bfloat16_products():
    layer, x = linear.Linear(300, 4, relu=True), torch.randn(5, 300)
    with linear.forward_precision("bfloat16", CPU):
        assert layer(x).dtype == torch.bfloat16
    for matmul in ("highest", "tf32"):
        with linear.forward_precision(matmul, CPU):
            assert layer(x).dtype == torch.float32
