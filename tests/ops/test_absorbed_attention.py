"""absorbed_attention against the fp64 reference, and against attention over projected keys."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from assertions import assert_as_exact

from tokenexit import reference
from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.absorbed_attention import absorbed_attention
from tokenexit.ops.exit_attention import exit_attention

compiled = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))

# (active, all) tokens of each sentence
SHAPES = {
    "one token": [(1, 1)],
    "ragged": [(5, 17), (1, 63), (129, 129), (2, 2)],
    "finished sentences": [(0, 9), (3, 7), (0, 1), (1, 30), (0, 0)],
    "nothing active": [(0, 5), (0, 3)],
    "long": [(40, 513)],
}


def inputs(shape, heads=3, d=40, bias=False, seed=0):
    """In fp64."""
    g = torch.Generator().manual_seed(seed)
    active, tokens = zip(*shape, strict=True)
    q = torch.randn(sum(active), heads, d, generator=g, dtype=torch.float64)
    h = torch.randn(sum(tokens), d, generator=g, dtype=torch.float64)
    offsets = [torch.tensor([0, *n]).cumsum(0) for n in (active, tokens)]
    table = positions = None
    if bias:
        table = torch.randn(heads, 13, generator=g, dtype=torch.float64)
        positions = torch.cat([torch.randperm(n, generator=g)[:a].sort()[0] for a, n in shape])
    return q, h, *offsets, 0.2, table, positions


def cast(arguments, dtype):
    return [a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, dtype, bias):
    arguments = cast(inputs(shape, bias=bias), dtype)
    truth = reference.absorbed_attention(*cast(arguments, torch.float64))
    got = absorbed_attention(*arguments)
    assert got.dtype == dtype
    assert_as_exact(got, truth, reference.absorbed_attention(*arguments))


@pytest.mark.parametrize("d", [1, 16, 33, 384, 770])
@pytest.mark.parametrize("heads", [1, 12, 16])
def test_widths(heads, d):
    values = cast(inputs([(2, 7), (1, 20)], heads, d), torch.float32)
    values[4] = d**-0.5  # scores of size 1: large ones leave few digits to the weights
    truth, size = reference.absorbed_attention(*cast(values, torch.float64)), values[1].abs().max()
    plain = reference.absorbed_attention(*values)
    assert_as_exact(absorbed_attention(*values), truth, plain, scale=size)


@compiled
@hypothesis.settings(max_examples=60)
@hypothesis.given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    heads=st.integers(1, 5),
    d=st.integers(1, 50),
    bias=st.booleans(),
)
def test_any_batch(lengths, heads, d, bias):
    arguments = inputs([(min(pair), max(pair)) for pair in lengths], heads, d, bias)
    values = cast(arguments, torch.float32)
    truth = reference.absorbed_attention(*cast(values, torch.float64))
    assert_as_exact(absorbed_attention(*values), truth, reference.absorbed_attention(*values))


@compiled
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1], ids=hex)
def test_any_nan_is_one_and_stays_in_its_sentence(bits):
    arguments = cast(inputs([(4, 5), (2, 4)]), torch.float32)
    arguments[1].view(torch.int32)[1, 2] = bits
    got = absorbed_attention(*arguments)
    assert got[:4].isnan().all() and got[4:].isfinite().all()


def test_is_attention_over_projected_keys_and_values():
    """With queries carried by W_K and contexts brought back by W_V."""
    g = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    heads, dim, d = 2, 5, 10
    h, q = rand(12, d), rand(4, heads, dim)
    key, value = (rand(heads, dim, d) for _ in range(2))
    key_bias, value_bias = (rand(heads, dim) for _ in range(2))
    cu_q, cu_k = torch.tensor([0, 1, 4]), torch.tensor([0, 5, 12])
    k = torch.einsum("td,hed->the", h, key) + key_bias
    v = torch.einsum("td,hed->the", h, value) + value_bias
    expected = exit_attention(q, k, v, cu_q, cu_k, 0.3)
    carried = torch.einsum("ahe,hed->ahd", q, key)
    mixed = absorbed_attention(carried, h, cu_q, cu_k, 0.3)
    got = torch.einsum("ahd,hed->ahe", mixed, value) + value_bias
    torch.testing.assert_close(got, expected)


@compiled
def test_same_bits_on_any_number_of_threads():
    arguments = cast(inputs([(5, 17), (1, 63), (40, 129)], 12, 96), torch.float32)
    whole = absorbed_attention(*arguments)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(absorbed_attention(*arguments), whole)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    arguments = cast(inputs([(2, 5), (0, 3), (1, 1)], bias=bias), torch.float32)
    torch.library.opcheck(torch.ops.tokenexit.absorbed_attention.default, (*arguments, 0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: torch.zeros(3, 2, 7)}, r"expected \[A, H, d\], \[K, d\]"),
        ({2: torch.tensor([0, 3])}, "expected B \\+ 1 of both"),
        ({5: torch.zeros(2, 5)}, "got positions None with a bias"),
    ],
)
def test_refuses(change, message):
    arguments = list(inputs([(1, 4), (2, 3)], 2, 8))
    for at, value in change.items():
        arguments[at] = value
    with pytest.raises(ValueError, match=message):
        absorbed_attention(*arguments)


@compiled
def test_refuses_offsets_beyond_the_tensors():
    arguments = cast(inputs([(1, 4), (2, 3)], 2, 8), torch.float32)
    arguments[3] = torch.tensor([0, 4, 2**40])
    with pytest.raises(RuntimeError, match="of 3 queries and 7 states"):
        absorbed_attention(*arguments)
    arguments[2:4] = torch.tensor([0, 1, 2]), torch.tensor([0, 4, 7])
    with pytest.raises(RuntimeError, match="offsets up to 2 and 7 of 3 queries"):
        absorbed_attention(*arguments)


@compiled
def test_a_bias_of_another_dtype():
    arguments = cast(inputs([(1, 4), (2, 3)], 2, 8, bias=True), torch.float32)
    arguments[5] = arguments[5].bfloat16()
    torch.testing.assert_close(
        absorbed_attention(*arguments), absorbed_attention(*arguments, backend="reference")
    )
