"""When a result is close enough: one rule, one table."""

import torch

# How many times the error of plain PyTorch in the same dtype ours may have.
FACTOR = {"forward": 2, "backward": 3}
# What rounding alone may do to a result near 0.
ATOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def assert_as_exact(ours, truth, plain, kind="forward", name=""):
    """`|ours - truth| <= k |plain - truth| + atol`, by the largest differences.

    Args:
        ours: in the dtype under test.
        truth: of the reference in fp64.
        plain: of the reference in the dtype under test.
    """
    if not truth.numel():
        return
    error = (ours.double() - truth).abs().max()
    allowed = (plain.double() - truth).abs().max()
    limit = FACTOR[kind] * allowed + ATOL[ours.dtype] * max(1, truth.abs().max().item())
    assert error <= limit, f"{name}: error {error:.2e}, plain PyTorch's {allowed:.2e}"
