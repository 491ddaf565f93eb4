"""Sums of embeddings: the compiled op against PyTorch's, to the bit."""

import pytest
import torch

from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.embed import embed

compiled = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))


def inputs(rows, d, has="all", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = (50, 40, 2)
    numbers = [torch.randint(0, n, (rows,), generator=generator) for n in sizes]
    tables = [torch.randn(n, d, generator=generator).to(dtype) for n in sizes]
    if has != "all":
        numbers[2] = None
    if has == "no types":
        tables[2] = None
    if has == "words and types":
        tables[1] = None
    if has == "words alone":
        tables[1:] = None, None
    return *numbers, *tables


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has", ["all", "types 0", "no types", "words and types", "words alone"])
@pytest.mark.parametrize(("rows", "d"), [(0, 4), (1, 1), (63, 24), (129, 1025)])
def test_same_bits(rows, d, has, dtype):
    given = inputs(rows, d, has, dtype)
    got, expected = embed(*given), embed(*given, backend="reference")
    assert got.dtype == dtype and torch.equal(got, expected)


@compiled
@pytest.mark.parametrize("d", [3, 16, 39])
def test_sums_are_rounded_to_the_nearest_bf16(d):
    """Halfway to the even one, beyond the largest to infinity; NaN stays NaN."""
    largest, inf, step = torch.finfo(torch.bfloat16).max, float("inf"), 2.0**-7
    pairs = [(1, step / 2), (1 + step, step / 2), (1, 0.75 * step), (-1, -step / 2), (2, -step / 2)]
    pairs += [(largest, largest), (-largest, -largest), (inf, -inf), (inf, 1), (float("nan"), 1)]
    pairs += [(2.0**-126, 2.0**-133), (3.0, -3.0)]
    word, position = torch.tensor(pairs).T.bfloat16()
    ids = torch.arange(len(pairs))
    given = ids, ids, None, *(x[:, None].repeat(1, d) for x in (word, position)), None
    got, expected = embed(*given), embed(*given, backend="reference")
    assert torch.equal(got.isnan(), expected.isnan()) and got[9].isnan().all()
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    assert got[:2, 0].tolist() == [1, 1 + 2 * step]


@compiled
@pytest.mark.parametrize("has", ["all", "types 0", "no types", "words and types", "words alone"])
@pytest.mark.parametrize(("rows", "d"), [(0, 4), (1, 1), (63, 24), (129, 1025)])
def test_a_table_of_bytes(rows, d, has):
    ids, positions, types, word, *others = inputs(rows, d, has)
    scale = word.abs().amax(1) / 127
    given = ids, positions, types, (word / scale[:, None]).round().char(), *others, scale
    got, expected = embed(*given), embed(*given, backend="reference")
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    for wrong, message in ((scale[1:], "49 scales of 1 dimensions; expected 50"), (None, "Char")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.tokenexit.embed(*given[:-1], wrong)
    with pytest.raises(RuntimeError, match="expected \\[V, d\\] of Char, with a scale"):
        torch.ops.tokenexit.embed(ids, positions, types, word, *others, scale)


@compiled
def test_strides():
    ids, positions, types, *tables = inputs(40, 24)
    given = ids[::2], positions[::2], types[::2], *(table.T.contiguous().T for table in tables)
    assert torch.equal(embed(*given), embed(*given, backend="reference"))


@compiled
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("number", [-1, 50])
def test_refuses_what_is_beyond_a_table(which, number):
    given = inputs(5, 4)
    given[which][3] = number
    with pytest.raises(RuntimeError, match=f"of {number}; expected 0 to"):
        embed(*given)


@compiled
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, torch.arange(5).int()),
        (1, torch.arange(4)),
        (4, torch.ones(40, 5)),
        (5, torch.ones(2, 4).bfloat16()),
        (5, torch.ones(0, 4)),
        (3, torch.ones(50)),
    ],
)
def test_refuses_what_does_not_fit(at, value):
    given = [*inputs(5, 4)]
    given[at] = value
    with pytest.raises(RuntimeError, match="got .*; expected"):
        embed(*given)


def test_unknown_backend():
    with pytest.raises(ValueError, match="got backend 'cuda'"):
        embed(*inputs(2, 4), backend="cuda")


@compiled
def test_opcheck():
    torch.library.opcheck(torch.ops.tokenexit.embed, inputs(5, 4))
