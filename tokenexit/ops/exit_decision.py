"""Which words leave at a layer."""

from __future__ import annotations

import torch

from tokenexit import reference
from tokenexit.ops import check_vector, compiled_devices, register_fake, use_compiled, use_triton

_DEVICES = compiled_devices("exit_decision")


@torch.no_grad()
def exit_decision(
    logits: torch.Tensor,
    words: torch.Tensor,
    uncertainty: torch.Tensor,
    exit_layer: torch.Tensor,
    cu_words: torch.Tensor,
    window: torch.Tensor,
    threshold: torch.Tensor,
    layer: int,
    max_prob: bool = False,
    min_active: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """From one layer's logits: how unsure each word is, and which words leave.

    With `asked = words >= 0`, `p = logits[asked].softmax(-1)` and C labels::

        u = uncertainty.clone()
        u[words[asked]] = torch.special.entr(p).sum(-1) / log(C)      # or, if max_prob,
        u[words[asked]] = (1 - p.amax(-1)) / (1 - 1 / C)
        for b in range(B):                                            # one sentence
            mine, k = range(cu_words[b], cu_words[b + 1]), window[b]
            for w in mine:
                near = [u[v] for v in mine if abs(v - w) <= k]
                if exit_layer[w] == 0 and (max(near) < threshold[b] or threshold[b] == inf):
                    left[w] = layer                                   # left: a copy of exit_layer
            rest = [w for w in mine if left[w] == 0]
            if len(rest) < min(min_active[b], len(mine)):             # some left, too few are left
                left[rest] = layer

    One label is certain (uncertainty 0). Uncertainties are computed in fp32, fp64 for fp64
    logits. A NaN within a word's window keeps it from leaving, but for a threshold of inf.
    Decisions have no gradient, and neither have the results. No argument is changed.

    Args:
        logits: `[R, C]` fp16, bf16, fp32 or fp64, rows of the layer's head.
        words: `[R]` int64, the word whose first wordpiece a row is, or -1: the row is not asked.
            A word has one row at most.
        uncertainty: `[W]` fp32 (fp64 for fp64 logits), the last known one of each word, in [0, 1].
        exit_layer: `[W]` int64, the layer each word left at, 0 while it is active.
        cu_words: `[B+1]` int64, offsets of each sentence's words.
        window: `[B]` int64, words on each side that are looked at, 0 or more; any number that is
            large enough means the whole sentence.
        threshold: `[B]` in the dtype of uncertainty; inf: every active word leaves.
        layer: the layer's number, counted from 1.
        max_prob: whether uncertainty is `1 - max p` instead of the entropy; both are scaled to
            [0, 1].
        min_active: `[B]` int64, active words below which a sentence, once words of it have left, is
            finished; see `ExitPolicy`. None: 1, no effect.
        backend: "auto", or "reference" for plain PyTorch.

    Returns:
        The new uncertainty `[W]` and the new exit_layer `[W]`.

    Raises:
        TypeError: dtypes other than those above.
        ValueError: shapes that do not fit each other; tensors on several devices; a layer below
            1; an unknown backend.
        RuntimeError: a word, an offset or a window out of range. Only the compiled CPU op looks
            at values: on a GPU, the host would have to wait for them.

    Source: Li et al. 2021 (arXiv 2105.13878), sections 3.2 (uncertainty, exit of sentences) and
        3.3 (window, exit of tokens); max_prob and its scale are this project's.
    """
    if not logits.is_floating_point():
        raise TypeError(f"got logits of {logits.dtype}; expected fp16, bf16, fp32 or fp64")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"got logits {list(logits.shape)}; expected [R, C] with C >= 1")
    if layer < 1:
        raise ValueError(f"got layer {layer}; expected 1 or more (0 means active)")
    device, dtype = logits.device, torch.promote_types(logits.dtype, torch.float32)
    num_words, num_sentences = uncertainty.numel(), window.numel()
    check_vector("words", words, logits.shape[0], device)
    check_vector("uncertainty", uncertainty, num_words, device, dtype)
    check_vector("exit_layer", exit_layer, num_words, device)
    check_vector("cu_words", cu_words, num_sentences + 1, device)
    check_vector("window", window, num_sentences, device)
    check_vector("threshold", threshold, num_sentences, device, dtype)
    if min_active is not None:
        check_vector("min_active", min_active, num_sentences, device)
    state = (logits, words, uncertainty, exit_layer, cu_words, window, threshold)
    if use_triton(backend, logits):
        return torch.ops.tokenexit_triton.exit_decision(*state, layer, max_prob, min_active)
    compiled = use_compiled(backend, device, _DEVICES)
    run = torch.ops.tokenexit.exit_decision if compiled else reference.exit_decision
    return run(*state, layer, max_prob, min_active)


if _DEVICES:

    @register_fake("exit_decision")
    def _(logits, words, uncertainty, exit_layer, *_):
        return uncertainty.new_empty(uncertainty.shape), exit_layer.new_empty(exit_layer.shape)
