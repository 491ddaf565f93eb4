"""Ops called directly: a tensor is read where and as it is, or refused; results are written."""

import importlib

import pytest
import torch

from tokenexit.ops import extension_available, extension_error
from tokenexit.prepacking import turned

pytestmark = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))

importlib.import_module("tokenexit.ops.absorbed_attention")  # with its fake: nobody else does

D, H, INNER, C = 32, 2, 64, 3


def layer():
    """Weights of a layer."""
    rows = [(D, D), (2 * D, D), (D, D), None, (INNER, D), (D, INNER), None]
    shapes = [s for pair in rows for s in ([pair, pair[:1]] if pair else [(D,), (D,)])]
    return [torch.randn(s) for s in shapes]


def calls():
    """Arguments of each op: two sentences of 3 and 2 tokens, each token a word."""

    def i(*values):
        return torch.tensor(values)

    offsets, tokens = i(0, 3, 5), torch.arange(5)
    h, q = torch.randn(5, D), torch.randn(5, H, D // H)
    bias = torch.randn(H, 9)
    attention = (q, torch.randn_like(q), torch.randn_like(q), offsets, offsets, 0.5, bias, tokens)
    words = (tokens, torch.ones(5), torch.zeros_like(tokens), offsets)
    rules = (i(1, 1), torch.tensor([0.5, 0.5]), 1, False, i(1, 1))
    costs, scales = [1.0] * 4, []
    weights = layer()
    copies = [turned(x) for x in weights if x.dim() == 2]
    loop = (h, tokens, offsets, offsets, tokens, tokens, weights * 2, scales, copies * 2)
    heads = [x for _ in range(2) for x in (torch.randn(C, D), torch.randn(C))]
    policy = (i(1, 1), i(1, 1), torch.full((2, 2), 0.5), False, False, bias, i(1, 2, 1, 2, 1))
    return {
        "pack_tokens": (torch.ones(2, 3, dtype=torch.bool), torch.arange(3).expand(2, -1)),
        "pack_rows": (
            *(i(1, 1)[None], i(1, 1)[None], i(1, 1)[None], torch.zeros(2, dtype=torch.uint8)),
            *(i(0, 1)[None], i(0, 1)[None], 2, 2, 2, 2),
        ),
        "embed": (tokens, tokens, tokens, h, torch.randn(5, D), torch.randn(5, D)),
        "exit_decision": (torch.randn(5, C), *words, *rules),
        "compact_active": (tokens, offsets, tokens, i(0, 1, 0, 1, 1), offsets),
        "exit_attention": (*attention, 0.0, 0, 3),
        "exit_attention_backward": (
            *(torch.randn_like(q), *attention[:3], torch.randn_like(q), torch.randn(5, H)),
            *(*attention[3:], 0.0, 0, 3),
        ),
        "absorbed_attention": (torch.randn(5, H, D), h, *attention[3:], 3),
        "add_layer_norm": (h, torch.randn_like(h), torch.randn(D), torch.randn(D), 1e-12),
        "linear": (h, torch.randn(C, D), torch.randn(C)),
        "bias_gelu": (h, torch.randn(D)),
        "exit_layer": (
            *(
                h,
                i(0, 2, 3),
                i(0, 2, 3),
                offsets,
                layer(),
                scales,
                costs,
                H,
                0.5,
                1e-12,
                False,
                True,
            ),
            *(bias, i(0, 2, 0)),
        ),
        "exit_loop": (*loop, heads, 0, costs, H, 0.5, [1e-12] * 2, *policy),
    }


def places():
    """Each tensor of each call: op, index of the argument, index in its list or None."""
    for op, args in calls().items():
        for at, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                yield op, at, None
            elif isinstance(arg, list) and arg and isinstance(arg[0], torch.Tensor):
                yield op, at, len(arg) - 1


PLACES = list(places())


def moved(op, at, index, move):
    """The call's arguments with one tensor replaced."""
    args = [*calls()[op]]
    if index is None:
        args[at] = move(args[at])
    else:
        args[at][index] = move(args[at][index])
    return args


@pytest.mark.parametrize("op, at, index", PLACES)
def test_a_tensor_on_another_device(op, at, index):
    args = moved(op, at, index, lambda x: x.to("meta"))
    with pytest.raises(ValueError, match=rf"{op}: got tensors on \['cpu', 'meta'\]"):
        getattr(torch.ops.tokenexit, op)(*args)
    # What the compiled code itself says, where the dispatcher does not stand before it.
    packet = getattr(torch.ops.tokenexit, op).default
    with pytest.raises(RuntimeError, match=r"got .* on another device; expected all on the CPU"):
        packet.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)


@pytest.mark.parametrize("op, at, index", PLACES)
def test_a_tensor_of_another_dtype(op, at, index):
    if op == "exit_attention_backward" and at in (4, 5):
        return  # out and lse: other devices read them
    args = moved(op, at, index, lambda x: x.to(torch.int16))
    with pytest.raises(RuntimeError, match="got|not implemented for"):
        getattr(torch.ops.tokenexit, op)(*args)


@pytest.mark.parametrize("op, at, index", PLACES)
def test_a_tensor_that_is_not_contiguous(op, at, index):
    """It is read as it is meant, or refused."""

    def spread(x):
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    run = getattr(torch.ops.tokenexit, op)
    torch.manual_seed(0)
    args = calls()[op]
    expected = run(*args)
    torch.manual_seed(0)
    others = moved(op, at, index, spread)
    if op in ("exit_layer", "exit_loop") and index is not None:
        with pytest.raises(RuntimeError, match="contiguous"):
            run(*others)
        return
    got = run(*others)
    if isinstance(got, torch.Tensor):
        got, expected = [got], [expected]
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("op", calls())
def test_all_of_a_result_is_written(op):
    """What comes from `torch.empty` is NaN, or the largest integer, in these tests."""
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    result = getattr(torch.ops.tokenexit, op)(*calls()[op])
    for x in [result] if isinstance(result, torch.Tensor) else result:
        assert x.isfinite().all() if x.is_floating_point() else (x < 1000).all()
