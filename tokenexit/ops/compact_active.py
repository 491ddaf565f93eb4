"""The list of active tokens, without those that left."""

from __future__ import annotations

import torch

from tokenexit import reference
from tokenexit.ops import check_vector, compiled_devices, register_fake, use_compiled

_DEVICES = compiled_devices("compact_active")


def compact_active(
    active: torch.Tensor,
    cu_active: torch.Tensor,
    word_of_token: torch.Tensor,
    exit_layer: torch.Tensor,
    cu_tokens: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, ...]:
    """Drop the tokens of words that left from the list of active tokens.

    All wordpieces of a word leave with it; special tokens leave when no word of their sentence
    stays. For sentence b::

        mine = active[cu_active[b] : cu_active[b + 1]]
        word = word_of_token[mine]
        stays = (word >= 0) & (exit_layer[word] == 0)
        stays |= (word < 0) & stays.any()
        kept = torch.cat([kept, mine[stays]])
        if stays.any():
            seen = torch.cat([seen, torch.arange(cu_tokens[b], cu_tokens[b + 1])])

    The results have the sizes of the inputs, so that the host need not wait for the counts.

    Args:
        active: `[A]` int64, packed indices of the active tokens, ascending, sentence by sentence.
            Entries beyond `cu_active[B]` are ignored.
        cu_active: `[B+1]` int64, offsets of each sentence's entries in active.
        word_of_token: `[T]` int64, the word of each token, -1 for special tokens.
        exit_layer: `[W]` int64, the layer each word left at, 0 while it is active.
        cu_tokens: `[B+1]` int64, offsets of each sentence's tokens, ascending from 0, or None: no
            list of seen tokens.
        scratch: int64 zeros on active's device, at least `[B / 8 + 3]`, which are zeros again
            afterwards; with them the op is one launch on a GPU. None: they are made. Calls that
            share them must not overlap.
        backend: "auto", or "reference" for plain PyTorch.

    Returns:
        The new active `[A]`, filled up with zeros, and the new cu_active `[B+1]`; with cu_tokens
        also seen `[T]`, all tokens of sentences that have active ones, and their offsets cu_seen
        `[B+1]`, of the same kind.

    Raises:
        TypeError: dtypes other than those above.
        ValueError: tensors that are not vectors; an empty cu_active; tensors on several devices;
            an unknown backend.
        RuntimeError: a token, a word or an offset out of range. Only the compiled CPU op looks
            at values: on a GPU, the host would have to wait for them.

    Source: Li et al. 2021 (arXiv 2105.13878), section 3.3: a token that left is not computed
        again.
    """
    device = active.device
    if cu_active.numel() == 0:
        raise ValueError("got an empty cu_active; expected [B+1]")
    check_vector("active", active, active.numel(), device)
    check_vector("cu_active", cu_active, cu_active.numel(), device)
    check_vector("word_of_token", word_of_token, word_of_token.numel(), device)
    check_vector("exit_layer", exit_layer, exit_layer.numel(), device)
    if cu_tokens is not None:
        check_vector("cu_tokens", cu_tokens, cu_active.numel(), device)
    if scratch is not None:
        check_vector("scratch", scratch, scratch.numel(), device)
    compiled = use_compiled(backend, device, _DEVICES)
    run = torch.ops.tokenexit.compact_active if compiled else reference.compact_active
    results = run(active, cu_active, word_of_token, exit_layer, cu_tokens, scratch)
    return results[:2] if cu_tokens is None else results


if _DEVICES:

    @register_fake("compact_active")
    def _(active, cu_active, word_of_token, exit_layer, cu_tokens=None, scratch=None):
        results = active.new_empty(active.shape), cu_active.new_empty(cu_active.shape)
        if cu_tokens is None:
            return *results, active.new_empty(0), cu_active.new_empty(0)
        seen = active.new_empty(word_of_token.shape)
        return *results, seen, cu_active.new_empty(cu_active.shape)
