import gpu_products
import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact


@pytest.mark.parametrize("name", gpu_products.CANDIDATES)
@pytest.mark.parametrize("rows", [0, 1, 129, 300])
def test_candidates_are_right(name, rows, device):
    """Whatever becomes of them: what is wrong is not worth its time."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 136, generator=generator) for n in (300, 264))
    x, weight = x.to(device, torch.float16), (0.1 * weight).to(device, torch.float16)
    count = torch.tensor([rows], device=device)
    out = gpu_products.product(x, weight, count, gpu_products.CANDIDATES[name])
    used = x[:rows]
    truth = F.linear(used.double(), weight.double())
    assert_as_exact(out[:rows], truth, F.linear(used, weight))
