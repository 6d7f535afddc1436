"""Products of matrices: quicker, with the digits they had; and what is traced holds nothing private."""

import pytest
import torch
from torch import nn

from backbone import arithmetic
from detector import normalization


def test_an_export_holds_nothing_private():
    """Of a small network with a normalisation in front."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

        def forward(self, x):
            return self.layers(normalization.power_l2(x))

    net, x = Net().eval(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(net, (x,), strict=False)
    graphs = [
        module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)
    ]
    names = " ".join(str(node.target) for graph in graphs for node in graph.nodes)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-6)
    assert "aten.linear" in names and "mkldnn" not in names and "copysign" not in names
    assert "wrap_with_set_grad_enabled" not in names


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "device, exact, expected",
    [(CPU, True, "medium"), (CPU, False, "highest"), (CUDA, True, "highest")],
)
def test_products(monkeypatch, device, exact, expected):
    """A CPU whose oneDNN gives up digits when it may is not allowed to; what was set before comes back."""
    monkeypatch.setattr(arithmetic, "exact_by_onednn", lambda: exact)
    with pytest.raises(RuntimeError), arithmetic.products(device):
        assert torch.get_float32_matmul_precision() == expected
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_keep_their_digits():
    """Whether oneDNN makes them or not; gradients are products as well."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 500, requires_grad=True), torch.randn(3, 500, 6)
    with arithmetic.products(CPU):
        found = a @ b
        found.sum().backward()
    assert (found - a.double() @ b.double()).abs().max() < 1e-4
    torch.testing.assert_close(a.grad, b.sum(2)[:, None].expand(3, 4, 500), rtol=1e-5, atol=1e-5)
