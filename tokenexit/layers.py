"""The BERT layer in which tokens that left are keys and values only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tokenexit.ops.exit_attention import exit_attention


class ExitLayer(nn.Module):
    """A post-LayerNorm transformer layer over a packed batch, computed for active tokens only.

    The same module serves training and inference: autograd goes through it, and a token that
    left costs its key and value in both.

    Args:
        hidden_size: d, a multiple of num_heads.
        num_heads: H.
        intermediate_size: width of the feed-forward part.
        activation: its elementwise function.
        eps: of both LayerNorms.
        dropout: of both sublayers' outputs, in training.
        attention_dropout: of the attention weights, in training.

    Raises:
        ValueError: hidden_size is no multiple of num_heads.

    Source: Devlin et al. 2019 for the layer; Li et al. 2021 (arXiv 2105.13878), section 3.3.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        activation: Callable[[torch.Tensor], torch.Tensor] = nn.functional.gelu,
        eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size is {hidden_size}; expected a multiple of num_heads, {num_heads}"
            )
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.activation = activation
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps)
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        h: torch.Tensor,
        keys: torch.Tensor,
        cu_active: torch.Tensor,
        cu_keys: torch.Tensor,
        bias: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum before `output_norm`, for active tokens; the caller normalises and stores it.

        Args:
            h: `[A, d]` states of the active tokens.
            keys: `[K, d]` states of all tokens of the sentences that have an active one.
            cu_active, cu_keys: `[B+1]` int64, offsets of the sentences in h and in keys.
            bias, positions: see `tokenexit.ops.exit_attention`.

        Returns:
            `[A, d]`.
        """
        q = self.query(h).unflatten(-1, (self.num_heads, -1))
        k, v = self.key_value(keys).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        context = exit_attention(
            q,
            k,
            v,
            cu_active,
            cu_keys,
            q.shape[-1] ** -0.5,
            bias,
            positions,
            self.attention_dropout if self.training else 0.0,
        )
        h = self.attention_norm(h + self.dropout(self.attention_output(context.flatten(1))))
        return h + self.dropout(self.down(self.activation(self.up(h))))


class ExitHead(nn.Linear):
    """The classifier after a layer, `[n, d] -> [n, C]`, with dropout on its input in training."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float = 0.0):
        super().__init__(hidden_size, num_labels)
        self.dropout = dropout

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return super().forward(F.dropout(h, self.dropout, self.training))
