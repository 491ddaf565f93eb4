"""Padded inputs to packed ones in one pass: as the steps one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.pack_rows import pack_rows, takes
from tokenexit.ops.pack_tokens import pack_tokens
from tokenexit.packing import word_ids_from_kinds

pytestmark = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))
KINDS = torch.tensor([0, 1, 2, 0, 1, 2, 0], dtype=torch.uint8)
ENDS = {"ids": 7, "types": 2, "positions": 9}


def step_by_step(mask, ids, word_ids, types, positions, most):
    real = mask != 0
    given = {"ids": ids, "types": types, "positions": positions}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not ((value >= 0) & (value < ENDS[name]))[real].all():
            return None
    words = word_ids_from_kinds(KINDS[ids * real], real) if word_ids is None else word_ids
    if not real.any() or real.sum(1).max() > most or (words[real] < -1).any():
        return None
    by_token, *rest = pack_tokens(real, words, backend="reference")
    return torch.cat([by_token, torch.stack([value[real] for value in given.values()])]), *rest


def packed(mask, ids, word_ids, types, positions, most):
    return pack_rows(mask, ids, word_ids, KINDS, types, positions, *ENDS.values(), most)


@given(data=st.data())
def test_as_step_by_step(data):
    shape = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))

    def cells(low, high):
        count = shape[0] * shape[1]
        # What is out of range now and then, at padding or not.
        value = st.integers(low, high - 1) | st.sampled_from([low, low, low, -2, high])
        return torch.tensor(data.draw(st.lists(value, min_size=count, max_size=count))).view(shape)

    def maybe(low, high):
        return cells(low, high) if data.draw(st.booleans()) else None

    mask = cells(0, 2) % 2
    if data.draw(st.booleans()):
        mask = mask != 0
    rows = mask, cells(0, 7), maybe(-1, 3), maybe(0, 2), maybe(0, 9), data.draw(st.integers(1, 12))
    got, expected = packed(*rows), step_by_step(*rows)
    assert (got is None) == (expected is None)
    for ours, truth in zip(got or (), expected or (), strict=True):
        assert torch.equal(ours, truth)


def test_strides():
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).T != 0
    ids, words = torch.tensor([[3, 4, 9, 5], [-1, 6, 4, 0]]).T, torch.arange(8).view(2, 4).T
    for word_ids in (None, words):
        rows = mask, ids, word_ids, ids * 0, None, 12
        for ours, truth in zip(packed(*rows), step_by_step(*rows), strict=True):
            assert torch.equal(ours, truth)


@pytest.mark.parametrize("at", range(5))
def test_refuses_what_does_not_fit(at):
    rows = [torch.ones(2, 3).long() for _ in range(5)]
    for other in (torch.ones(2, 2).long(), torch.ones(2, 3), torch.ones(6).long()):
        with pytest.raises(RuntimeError, match="got .*; expected"):
            packed(*rows[:at], other, *rows[at + 1 :], 9)
    with pytest.raises(RuntimeError, match="got 7 kinds for 8 ids"):
        pack_rows(rows[0], rows[1], None, KINDS, None, None, 8, 2, 9, 9)


def test_takes_what_is_there():
    ids = torch.ones(2, 3).long()
    assert takes(ids, None, ids) and not takes(ids, ids.to("meta"))
    assert not takes(torch.nn.Parameter(ids.float()))


def test_opcheck():
    ids = torch.arange(6).view(2, 3)
    torch.library.opcheck(
        torch.ops.tokenexit.pack_rows, (ids, ids, ids, KINDS, ids % 2, None, 7, 2, 9, 9)
    )
