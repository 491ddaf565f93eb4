"""Padded to packed and back; tokens to words."""

import torch

from tokenexit.ops.pack_tokens import pack
from tokenexit.packing import (
    CONTINUES_WORD,
    SPECIAL,
    STARTS_WORD,
    Active,
    word_ids_from_kinds,
)


def test_round_trip_with_padding_on_both_sides():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    packed = pack(mask, torch.zeros_like(mask))
    padded = torch.arange(12).view(3, 4) + 1
    assert packed.pack(padded).tolist() == [2, 3, 5, 6, 7, 8]
    assert packed.unpack(packed.pack(padded)).tolist() == (padded * mask).tolist()
    assert packed.cu_tokens.tolist() == [0, 2, 6, 6]
    assert packed.positions.tolist() == [0, 1, 0, 1, 2, 3]


def test_what_is_not_zero_is_real():
    for mask in (
        torch.tensor([[2, 0, -1]]),
        torch.tensor([[0.5, 0, 1]]),
        torch.tensor([[True, False, True]]),
    ):
        assert pack(mask, torch.zeros(1, 3)).slots.tolist() == [0, 2]


def test_without_padding_nothing_is_copied():
    mask = torch.ones(2, 3)
    values = torch.arange(6)
    unpacked = pack(mask, torch.zeros(2, 3)).unpack(values)
    assert unpacked.shape == (2, 3) and unpacked.data_ptr() == values.data_ptr()
    repacked = pack(mask, torch.zeros(2, 3)).pack(unpacked)
    assert repacked.tolist() == values.tolist() and repacked.data_ptr() == values.data_ptr()


def test_as_many_tokens_as_sentences():
    mask = torch.tensor([[0, 1], [1, 0]])
    packed = pack(mask, torch.zeros(2, 2))
    assert packed.unpack(torch.tensor([5, 6])).tolist() == [[0, 5], [6, 0]]
    assert packed.pack(torch.tensor([[0, 5], [6, 0]])).tolist() == [5, 6]


def test_words_are_runs_of_equal_ids():
    ids = torch.tensor([[-1, 0, 0, 1, -1, 1, 0, -1], [3, 3, -1, -1, 3, 9, 9, 9]])
    packed = pack(torch.ones_like(ids), ids)
    assert packed.word_of_token.tolist() == [-1, 0, 0, 1, -1, 2, 3, -1, 4, 4, -1, -1, 5, 6, 6, 6]
    assert packed.first_token.tolist() == [1, 3, 5, 6, 8, 12, 13]
    assert packed.cu_words.tolist() == [0, 4, 7]
    assert packed.word_at.tolist() == [-1, 0, -1, 1, -1, 2, 3, -1, 4, -1, -1, -1, 5, 6, -1, -1]


def test_a_word_does_not_run_over_sentences():
    ids = torch.tensor([[0, 1], [1, 1]])
    assert pack(torch.ones_like(ids), ids).word_of_token.tolist() == [0, 1, 2, 2]


def test_first_token_stands_in_where_no_word_is_marked():
    ids = torch.tensor([[-1, -1], [-1, 0]])
    packed = pack(torch.ones_like(ids), ids)
    assert packed.word_of_token.tolist() == [0, -1, -1, 1]
    assert packed.cu_words.tolist() == [0, 1, 2]


def test_word_ids_from_vocabulary_kinds():
    s, c, x = STARTS_WORD, CONTINUES_WORD, SPECIAL
    kinds = torch.tensor([[x, s, c, c, s, x, c, s], [c, c, s, x, x, s, s, s]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]])
    assert word_ids_from_kinds(kinds, mask).tolist() == [
        [-1, 0, 0, 0, 1, -1, 2, 3],
        [0, 0, 1, -1, -1, -1, -1, -1],
    ]


def test_all_active():
    packed = pack(torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.zeros(2, 3))
    active = Active.all(packed)
    values = torch.arange(5)
    assert active.tokens.tolist() == [0, 1, 2, 3, 4] and active.rows(values) is values
    index, cu_keys = active.keys
    assert index is None and cu_keys.tolist() == [0, 2, 5]
    assert active.positions.tolist() == [0, 1, 0, 1, 2]


def test_some_active_and_a_finished_sentence():
    packed = pack(torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 1]]), torch.zeros(3, 3))
    active = Active(packed, torch.tensor([1, 5]), torch.tensor([0, 1, 1, 2]))
    assert active.rows(10 * torch.arange(7)).tolist() == [10, 50]
    index, cu_keys = active.keys
    assert index.tolist() == [0, 1, 5, 6] and cu_keys.tolist() == [0, 2, 2, 4]
    assert active.positions.tolist() == [1, 0]


def test_nothing_active():
    packed = pack(torch.ones(2, 2), torch.zeros(2, 2))
    active = Active(packed, torch.empty(0).long(), torch.zeros(3).long())
    index, cu_keys = active.keys
    assert index.tolist() == [] and cu_keys.tolist() == [0, 0, 0]
    assert len(active.positions) == 0
