"""States before the first layer, and what relative positions add to scores."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tokenexit.conditions import passable
from tokenexit.models.configuration import TokenExitConfig, settings_of
from tokenexit.ops.linear import linear
from tokenexit.packing import Packed

_PLAIN = {nn.Parameter, torch.Tensor}
_TABLES = ("word", "position", "token_type")
RELATIVE_REACH = 128  # relative positions beyond it share a bucket (T5's max_distance)


@passable
class Projection(nn.Linear):
    """From the embeddings' width to that of layers; a row is the same in every batch."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """`[T, w]` to `[T, d]`."""
        return linear(h, self.weight, self.bias)


@passable
class ExitEmbeddings(nn.Module):
    """Word, position and, where the family has them, token-type embeddings of packed tokens."""

    def __init__(self, config: TokenExitConfig):
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.word = nn.Embedding(config.vocab_size, width)
        self.position = self.token_type = self.projection = None
        if config.position_biased_input:
            self.position = nn.Embedding(config.max_position_embeddings, width)
        if config.type_vocab_size:
            self.token_type = nn.Embedding(config.type_vocab_size, width)
        if width != config.hidden_size or config.always_project:
            bias = not config.norm_after_projection
            self.projection = Projection(width, config.hidden_size, bias=bias)
        self.projects_last = not config.norm_after_projection
        width = width if self.projects_last else config.hidden_size
        self.norm = nn.LayerNorm(width, config.layer_norm_eps, bias=config.norm_bias)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, positions, token_type_ids=None, words=None):
        """`[T]` of each to `[T, d]`; words: `[T, d]` in place of the word embeddings."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        h = self.word(input_ids) if words is None else words
        if self.position is not None:
            h = h + self.position(positions)
        if self.token_type is not None:
            h = h + self.token_type(token_type_ids)
        return self.finished(h)

    def finished(self, h: torch.Tensor) -> torch.Tensor:
        """What becomes of the sum of embeddings."""
        if self.projection is None:
            return self.dropout(self.norm(h))
        if self.projects_last:
            return self.projection(self.dropout(self.norm(h)))
        return self.dropout(self.norm(self.projection(h)))

    def tensors(self, device: torch.device) -> list[torch.Tensor | None] | None:
        """What an op may read in place of a call: the tables of words, positions and types, the
        scales of a table of words in 8 bits, the LayerNorm's weight and bias, each or None.

        None if a call would do more, or they are not all contiguous, of one dtype and there. It
        asks for no hooks.
        """
        parts = self._modules  # Module.__getattr__ takes as long as a look at all of this
        norm, tables = parts["norm"], [parts.get(name) for name in _TABLES]
        found = [None if part is None else part.weight for part in tables]
        scales = tables[0]._buffers.get("scale")
        found += [scales, norm.weight, norm.bias]
        given = [x for x in found if x is not None]
        numbers = found if scales is None else found[1:]
        plain = (
            not parts["dropout"].training
            and all([part is None or part.max_norm is None for part in tables])
            and all([type(x) in _PLAIN and x.is_contiguous() for x in given])
            and all([x.device == device for x in given])
            and all([x is None or x.dtype == norm.weight.dtype for x in numbers])
        )
        return found if plain else None


def positions_of(config: TokenExitConfig, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
    """Positions `[T]` of packed ids, as the family numbers real tokens.

    All may be looked up, even those of sentences that are too long.
    """
    settings = settings_of(config)
    last = settings["max_position_embeddings"] - 1
    if (padding := settings["position_padding_id"]) is None:
        long = packed.shape[1] > last + 1
        return packed.positions.clamp(max=last) if long else packed.positions
    counted = ids != padding
    before = F.pad(counted.cumsum(0), (1, 0))[packed.cu_tokens[:-1]]
    within = counted.cumsum(0) - before[packed.sentence_of_token]
    # What `pack_rows` of the GPU has in excess may come to lie behind the last position.
    return torch.where(counted, padding + within, padding).clamp(max=last)


def relative_buckets(device, num_buckets=32):
    """Bucket of each relative position -R..R of key to query, as T5 and MPNet number them."""
    distance = -torch.arange(-RELATIVE_REACH, RELATIVE_REACH + 1, device=device)
    half = num_buckets // 2
    exact = half // 2
    far = distance.abs()
    log_scaled = torch.log(far.clamp(min=1).float() / exact) / math.log(RELATIVE_REACH / exact)
    large = (exact + (log_scaled * (half - exact)).long()).clamp(max=half - 1)
    return (distance < 0).long() * half + torch.where(far < exact, far, large)
