"""Losses of a call: over all heads in training, of what tokens left with in evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenexit.loops.eager import Trace
from tokenexit.models.rows import out_of_range


def exit_loss(
    trace: Trace,
    labels: torch.Tensor,
    num_layers: int,
    num_items: torch.Tensor | int | None = None,
    floor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Training loss over all heads: `sum_l l * CE_l / sum_l l`.

    A token counts in the layers up to its exit; `CE_l` is the sum over those tokens divided by
    `num_items`, so that each token weighs the same whatever leaves beside it. Without exits this
    is the joint loss of stage 1; with exits, that of self-sampling.

    Args:
        trace: of the encoder, for T tokens.
        labels: `[T]` int, -100 where there is none.
        num_layers: L.
        num_items: None for the number of labels.
        floor: `[T, L]` or None. Flooding: the loss of a token at a layer is its distance to the
            one given here, `|CE - floor|`.

    Source: Li et al. 2021 (arXiv 2105.13878), section 3.4; Ishida et al. 2020 for flooding.
    """
    total = 0.0
    for number, (active, logits) in enumerate(trace, 1):
        losses = F.cross_entropy(_precise(logits), labels[active], reduction="none")
        if floor is not None:
            known = labels[active] != -100
            losses = torch.where(known, (losses - floor[active, number - 1]).abs(), 0)
        total = total + number * losses.sum()
    return total / (num_layers * (num_layers + 1) / 2) / _count(labels, num_items)


def final_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of the logits `[..., C]` that tokens left with; the rest as in `exit_loss`."""
    wanted = labels.flatten()
    loss = F.cross_entropy(_precise(logits).flatten(0, -2), wanted, reduction="sum")
    return loss / _count(wanted, num_items)


def check_labels(labels: torch.Tensor, real: torch.Tensor, num_labels: int):
    """Hold labels `[B, N]` against the tokens that are `real [B, N]` and the labels there are.

    Raises:
        ValueError: a label at padding, or beyond the last.
    """
    used = labels != -100
    if (used & (~real | (labels < 0) | (labels >= num_labels))).any():
        if (used & ~real).any():
            raise ValueError("labels has a label at padding; expected -100 there")
        raise out_of_range("labels", labels[used], 0, num_labels - 1)


def _precise(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _count(labels, num_items):
    return (labels != -100).sum().clamp(min=1) if num_items is None else max(num_items, 1)
