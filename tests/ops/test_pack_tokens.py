"""The layout of padded batches: the compiled op against plain PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenexit import reference
from tokenexit.ops import extension_available, extension_error
from tokenexit.ops.pack_tokens import pack_tokens

compiled = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))
CELL = st.tuples(st.booleans(), st.integers(-1, 2))


@compiled
@given(rows=st.integers(0, 9).flatmap(lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n))))
def test_equals_the_reference(rows):
    cells = torch.tensor(rows, dtype=torch.int64).view(len(rows), len(rows[0]) if rows else 0, 2)
    mask, word_ids = cells[..., 0] != 0, cells[..., 1]
    expected = pack_tokens(mask, word_ids, backend="reference")
    for got, truth in zip(pack_tokens(mask, word_ids), expected, strict=True):
        assert torch.equal(got, truth)


@compiled
def test_strides():
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).T != 0
    word_ids = torch.tensor([[0, 0, -1, 1], [-1, 5, 5, 5]]).T
    for got, truth in zip(
        pack_tokens(mask, word_ids),
        pack_tokens(mask, word_ids, backend="reference"),
        strict=True,
    ):
        assert torch.equal(got, truth)


def test_refuses():
    mask, word_ids = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="got torch.int64 and torch.int64; expected torch.bool"):
        pack_tokens(word_ids, word_ids)
    with pytest.raises(ValueError, match=r"got a mask \[2, 3\] and word_ids \[1, 3\]"):
        pack_tokens(mask, word_ids[:1])
    with pytest.raises(ValueError, match="got backend 'cuda'"):
        pack_tokens(mask, word_ids, backend="cuda")


@compiled
def test_opcheck():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.library.opcheck(
        torch.ops.tokenexit.pack_tokens, (mask, torch.tensor([[0, 0, 0], [-1, 2, 2]]))
    )


@compiled
def test_any_number_of_rows_and_tokens_is_exported():
    class Pack(torch.nn.Module):
        def forward(self, mask, word_ids):
            return torch.ops.tokenexit.pack_tokens(mask, word_ids)

    given = torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.int64)
    size = (torch.export.Dim.DYNAMIC,) * 2
    exported = torch.export.export(Pack(), given, dynamic_shapes=(size, size)).module()
    other = torch.ones(5, 7, dtype=torch.bool), torch.zeros(5, 7, dtype=torch.int64)
    assert all(map(torch.equal, exported(*other), Pack()(*other)))


@given(rows=st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n))))
def test_static_shapes(rows):
    """The same layout, and in excess tokens of no word and of a sentence without tokens."""
    if not rows:
        return
    cells = torch.tensor(rows)
    mask, word_ids = cells[..., 0] != 0, cells[..., 1]
    by_token, cu, first_token, place = reference.pack_static(mask, word_ids)
    exact = reference.pack_tokens(mask, word_ids)
    num_tokens, num_words = int(mask.sum()), len(exact[2])
    assert by_token.shape == (5, mask.numel()) and len(first_token) == mask.numel()
    assert torch.equal(by_token[:, :num_tokens], exact[0])
    assert torch.equal(cu, torch.cat([exact[1], exact[1][:, -1:]], 1))
    assert torch.equal(first_token[:num_words], exact[2])
    excess = torch.tensor([0, 1, len(mask), -1, -1])
    assert (by_token[:, num_tokens:] == excess[:, None]).all()
    assert torch.equal(by_token[0][place[mask]], mask.flatten().nonzero()[:, 0])
