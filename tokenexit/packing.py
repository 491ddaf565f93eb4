"""Padded to packed and back; which tokens make up which word."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

# What a vocabulary entry is, as `token_kinds` marks it.
STARTS_WORD, CONTINUES_WORD, SPECIAL = 0, 1, 2


def same_length(tensor: torch.Tensor, length: int) -> bool:
    """Whether a tensor has so many rows; where a program is exported, that is not known."""
    return not torch.compiler.is_exporting() and tensor.shape[0] == length


@dataclass(frozen=True)
class Packed:
    """The layout of a packed batch: T real tokens of B sentences and their W words.

    Attributes:
        shape: (B, N) of the padded batch it came from.
        slots: `[T]`, where each token stood in the flattened padded batch.
        positions: `[T]`, each token's position in its sentence, from 0.
        cu_tokens, cu_words: `[B+1]`, offsets of the sentences' tokens and words.
        first_token: `[W]`, packed index of each word's first token.
        word_of_token: `[T]`, the word of each token; -1 for [CLS], [SEP] and their like.
        word_at: `[T]`, the word a token is the first of; -1 for all other tokens.
        sentence_of_token: `[T]`.

    All tensors are int64, on one device. Every sentence with tokens has a word: where none is
    marked, its first token stands in as one, so that something decides when it is finished.
    """

    shape: tuple[int, int]
    slots: torch.Tensor
    positions: torch.Tensor
    cu_tokens: torch.Tensor
    cu_words: torch.Tensor
    first_token: torch.Tensor
    word_of_token: torch.Tensor
    word_at: torch.Tensor
    sentence_of_token: torch.Tensor

    @classmethod
    def of(cls, shape, by_token, offsets, first_token, **more) -> Packed:
        """Of what `pack_tokens` or `pack_rows` gives, and what else a kind of layout has."""
        slots, positions, sentence_of_token, word_of_token, word_at = by_token.unbind()[:5]
        cu_tokens, cu_words = offsets.unbind()
        return cls(
            shape=tuple(shape),
            slots=slots,
            positions=positions,
            cu_tokens=cu_tokens,
            cu_words=cu_words,
            first_token=first_token,
            word_of_token=word_of_token,
            word_at=word_at,
            sentence_of_token=sentence_of_token,
            **more,
        )

    @property
    def num_sentences(self) -> int:
        return self.cu_tokens.shape[0] - 1

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """`[B, N, ...] -> [T, ...]`; a view of padded if there is no padding."""
        flat = padded.flatten(0, 1)
        return flat if self._is_full() else flat[self.slots]

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """`[T, ...] -> [B, N, ...]`, zero at padding; a view of values if there is none."""
        if self._is_full():
            return values.view(*self.shape, *values.shape[1:])
        padded = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
        return padded.index_copy(0, self.slots, values).unflatten(0, self.shape)

    def _is_full(self):
        return same_length(self.slots, self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Active:
    """The tokens of a packed batch that a layer computes.

    Attributes:
        packed: the layout of the batch.
        tokens: `[A]` int64, their packed indices, ascending.
        cu_tokens: `[B+1]` int64, offsets of each sentence's in tokens; a finished one has none.
    """

    packed: Packed
    tokens: torch.Tensor
    cu_tokens: torch.Tensor

    @classmethod
    def all(cls, packed: Packed) -> Active:
        """Before the first layer."""
        tokens = torch.arange(packed.slots.shape[0], device=packed.slots.device)
        return cls(packed, tokens, packed.cu_tokens)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """`values[tokens]` of `[T, ...]`, without a copy where that is all rows."""
        return values if same_length(self.tokens, values.shape[0]) else values[self.tokens]

    @cached_property
    def keys(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """All tokens of the sentences that are not finished: indices (None: all), offsets."""
        in_use = self.cu_tokens.diff() > 0
        if not torch.compiler.is_exporting() and in_use.all():
            return None, self.packed.cu_tokens
        index = in_use[self.packed.sentence_of_token].nonzero().squeeze(1)
        return index, F.pad((self.packed.cu_tokens.diff() * in_use).cumsum(0), (1, 0))

    @cached_property
    def positions(self) -> torch.Tensor:
        """`[A]`, the tokens' positions in their sentences."""
        return self.rows(self.packed.positions)


def word_ids_from_kinds(kinds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Word ids `[B, N]` of tokens whose vocabulary entries are of `kinds [B, N]`.

    A token continues the word before it if it is so marked and there is one; after a special
    token or padding it starts a word all the same.
    """
    real = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
    inside = real > (kinds == SPECIAL)  # and not
    after_word = F.pad(inside[:, :-1], (1, 0))
    starts = inside > ((kinds == CONTINUES_WORD) & after_word)
    return starts.cumsum(1) * inside - 1
