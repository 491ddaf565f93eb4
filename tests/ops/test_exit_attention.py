"""exit_attention against the fp64 reference: forward, every gradient, odd shapes."""

import pytest
import torch
from assertions import assert_as_exact

from tokenexit import reference
from tokenexit.ops.exit_attention import exit_attention

# (active, all) tokens of each sentence
SHAPES = {
    "one token": [(1, 1)],
    "full": [(63, 63), (129, 129)],
    "ragged": [(5, 17), (1, 63), (129, 129), (2, 2)],
    "one active": [(1, 129)],
    "finished sentences": [(0, 9), (3, 7), (0, 1), (0, 0)],
    "nothing active": [(0, 5), (0, 3)],
    "long": [(40, 513)],
}


def inputs(shape, dtype, heads=3, dim=8, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    active, all_ = zip(*shape, strict=True)
    values = {
        name: torch.randn(sum(n), heads, dim, generator=g, dtype=torch.float64).to(dtype)
        for name, n in (("q", active), ("k", all_), ("v", all_))
    }
    offsets = [torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (active, all_)]
    table = positions = None
    if bias:
        table = torch.randn(heads, 2 * 6 + 1, generator=g, dtype=torch.float64).to(dtype)
        positions = torch.cat([torch.randperm(n, generator=g)[:a].sort()[0] for a, n in shape])
    return values, offsets, table, positions


def run(function, dtype, shape, bias, with_grad=True):
    """Output and gradients in a dtype."""
    values, offsets, table, positions = inputs(shape, dtype, bias=bias)
    leaves = [*values.values(), *([table] if bias else [])]
    for leaf in leaves:
        leaf.requires_grad_(with_grad)
    out = function(*values.values(), *offsets, 0.4, table, positions)
    if with_grad and out.numel():
        g = torch.Generator().manual_seed(1)
        out.backward(torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype))
    return out.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients(shape, dtype, bias):
    ours, our_grads = run(exit_attention, dtype, shape, bias)
    plain, plain_grads = run(reference.exit_attention, dtype, shape, bias)
    # The truth starts from the same rounded inputs.
    exact = lambda *args: reference.exit_attention(  # noqa: E731
        *(a.to(dtype).double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
    )
    truth, truth_grads = run(exact, torch.float64, shape, bias)
    assert ours.dtype == dtype and ours.shape == truth.shape
    assert_as_exact(ours, truth, plain, "forward")
    if not ours.numel():
        return
    for name, got, wanted, rough in zip(
        ("q", "k", "v", "bias"), our_grads, truth_grads, plain_grads, strict=False
    ):
        assert_as_exact(got, wanted, rough, "backward", name)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    values, offsets, table, positions = inputs([(2, 4), (0, 2), (3, 3)], torch.float64, bias=bias)
    leaves = [v.requires_grad_() for v in (*values.values(), *([table] if bias else []))]

    def function(q, k, v, table=None):
        return exit_attention(q, k, v, *offsets, 0.4, table, positions)

    assert torch.autograd.gradcheck(function, leaves)


def test_queries_of_some_tokens_are_rows_of_attention_over_all():
    values, (cu, _), _, _ = inputs([(9, 9), (6, 6)], torch.float64)
    q, k, v = values.values()
    whole = exit_attention(q, k, v, cu, cu, 0.4)
    some = torch.tensor([1, 4, 8, 11])
    part = exit_attention(q[some], k, v, torch.tensor([0, 3, 4]), cu, 0.4)
    torch.testing.assert_close(part, whole[some])


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    values, offsets, _, _ = inputs([(40, 60)], torch.float64)
    exact = exit_attention(*values.values(), *offsets, 0.4)
    runs = torch.stack(
        [exit_attention(*values.values(), *offsets, 0.4, dropout_p=0.2) for _ in range(400)]
    )
    assert not torch.equal(runs[0], runs[1])
    assert (runs.mean(0) - exact).abs().mean() < 0.02


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(4, 3, 7)}, r"expected \[A, H, D\]"),
        ({"cu_q": torch.tensor([0, 2])}, "expected B \\+ 1 of both"),
        ({"bias": torch.zeros(3, 5)}, r"got positions None with a bias; expected \[3\]"),
        ({"bias": torch.zeros(3, 4), "positions": torch.arange(3)}, r"expected \[3, 2R\+1\]"),
        ({"backend": "reference", "dropout_p": 0.1}, "dropout_p=0.1 on the reference"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "q": torch.zeros(3, 3, 8),
        "k": torch.zeros(4, 3, 8),
        "v": torch.zeros(4, 3, 8),
        "cu_q": torch.tensor([0, 1, 3]),
        "cu_k": torch.tensor([0, 1, 4]),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        exit_attention(**{**arguments, **change})
