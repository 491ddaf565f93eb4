"""Operations that exits save, counted as the layers do them."""

from __future__ import annotations

import torch

from tokenexit.models.configuration import TokenExitConfig


def multiply_adds(
    active: torch.Tensor, tokens: torch.Tensor, config: TokenExitConfig
) -> torch.Tensor:
    """Multiply-adds spent on each sentence, `[B]` float64.

    A layer with a active of n tokens, of width d, feed-forward width f and C labels, costs

        a (2 d^2 + 2 d f + d C)    queries, attention output, feed-forward, head
        + 2 n d^2                  keys and values, of tokens that left too
        + 2 a n d                  scores and context

    and nothing once the sentence is finished. Gated inner states take a third product of d f, and a
    neck before the classifier one of d^2; heads that hear their neighbours are of 3 C outputs.

    Args:
        active: `[B, L]`, tokens computed in each layer.
        tokens: `[B]`, n.
        config: of the model.
    """
    d, f, labels = config.hidden_size, config.intermediate_size, config.num_labels
    a, n = active.double(), tokens.double()[:, None]
    products, neck = (3, d * d) if config.norm_first else (2, 0)
    outputs = torch.full(a.shape[1:], labels, dtype=torch.float64, device=a.device)
    outputs[: config.num_neighbor_heads] *= 3
    own = a * (2 * d * d + products * d * f + neck + d * outputs)
    shared = (a > 0) * n * 2 * d * d + 2 * a * n * d
    return (own + shared).sum(1)


def active_tokens(exit_layers: torch.Tensor, num_layers: int) -> torch.Tensor:
    """Tokens computed in each layer, `[B, L]`, from their exit layers `[B, N]` (0 at padding)."""
    layers = torch.arange(1, num_layers + 1, device=exit_layers.device)
    return (exit_layers[:, :, None] >= layers).sum(1)


def speedup(active: torch.Tensor, tokens: torch.Tensor, config: TokenExitConfig) -> float:
    """Multiply-adds of all sentences at full depth over those spent; see `multiply_adds`."""
    full = tokens[:, None].expand_as(active)
    return float(
        multiply_adds(full, tokens, config).sum() / multiply_adds(active, tokens, config).sum()
    )
