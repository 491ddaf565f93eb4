"""add_layer_norm of rows without variance; see test_norm_and_gelu.py for the rest."""

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact

from tokenexit.ops.add_layer_norm import add_layer_norm


@pytest.mark.parametrize("value", [0.1, 1000.3])
@pytest.mark.parametrize("width", [1, 64, 770])
@torch.no_grad()
def test_a_constant_row_is_the_bias(width, value):
    x, residual = torch.full((2, width), value), torch.zeros(2, width)
    weight, bias = torch.ones(width), torch.linspace(-1, 1, width)
    plain = F.layer_norm(x + residual, (width,), weight, bias, 1e-12)
    assert_as_exact(add_layer_norm(x, residual, weight, bias), bias.double().expand(2, -1), plain)
