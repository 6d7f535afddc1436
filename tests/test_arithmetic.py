"""Products of matrices: quicker, with the digits they had."""

import pytest
import torch

from backbone import arithmetic


def test_products_keep_their_digits():
    """Whether oneDNN makes them or not; gradients are products as well. What was set before comes back."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 500, requires_grad=True), torch.randn(3, 500, 6)
    with pytest.raises(RuntimeError), arithmetic.products(torch.device("cpu")):
        found = a @ b
        found.sum().backward()
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "highest"
    assert (found - a.double() @ b.double()).abs().max() < 1e-4
    torch.testing.assert_close(a.grad, b.sum(2)[:, None].expand(3, 4, 500), rtol=1e-5, atol=1e-5)
