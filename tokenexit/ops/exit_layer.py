"""A whole layer of inference on the CPU, in one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenexit.ops import check_bias, check_vector, compiled_devices, register_fake
from tokenexit.packing import Active

DEVICES = compiled_devices("exit_layer")


def exit_layer(
    h: torch.Tensor,
    active: Active,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    costs: Sequence[float],
    num_heads: int,
    scale: float,
    eps: float,
    pre_norm: bool = False,
    tanh: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """New states of the active tokens: `tokenexit.layers.ExitLayer` without gradient or dropout.

    For each sentence with n tokens, a of them active, keys and values are either projected for all
    n, or the a queries are carried into the hidden space (`tokenexit.ops.absorbed_attention`),
    whichever `costs` says is cheaper for this sentence; results are equal but for rounding (with
    int8 or bf16 weights, that of activations to bytes or bf16). Products are computed here too, 16
    rows beside each other. A row's result is the same to the bit in every batch and on any number
    of threads.

    Args:
        h: `[T, d]` states of all tokens, fp32, or bf16 as the weights are.
        active: the tokens to compute.
        weights: contiguous, fp32, int8 or bf16, weight and bias of each: query `[d, d]`, keys and
            values `[2d, d]`, attention output `[d, d]`, its LayerNorm `[d]`, up `[f, d]`, down
            `[d, f]` (with GELU between them), the last LayerNorm `[d]`.
        scales: for int8 weights, scale and offset of each in that order (`Int8Linear`), empty
            for those of LayerNorms; else none.
        costs: times in any one unit: of projecting a key and value; of a key for 16 queries of all
            heads; of carrying an active token there and back; of a key for 16 pairs of a carried
            query and a head. See `tokenexit.costs`.
        num_heads: H.
        scale: of the attention scores.
        eps: of both LayerNorms.
        pre_norm: leave out the last LayerNorm.
        tanh: GELU approximated by it.
        bias: `[H, 2R+1]`, see `tokenexit.ops.exit_attention`.

    Returns:
        `[A, d]`.

    Raises:
        TypeError: indices that are not int64.
        ValueError: shapes that do not fit each other.
        RuntimeError: indices or offsets out of range; weights of another shape, dtype or layout.

    Source: Li et al. 2021 (arXiv 2105.13878), section 3.3.
    """
    if h.dim() != 2 or num_heads < 1 or h.shape[1] % num_heads:
        raise ValueError(f"got h {tuple(h.shape)} and {num_heads} heads; expected [T, d], H | d")
    sentences = active.packed.num_sentences
    check_vector("active.tokens", active.tokens, active.tokens.shape[0], h.device)
    check_vector("active.cu_tokens", active.cu_tokens, sentences + 1, h.device)
    positions = None
    if bias is not None:
        positions = active.positions
        check_bias(bias, positions, h.new_empty(active.tokens.shape[0], num_heads, 0))
        bias = bias.float()
    return torch.ops.tokenexit.exit_layer(
        h,
        active.tokens,
        active.cu_tokens,
        active.packed.cu_tokens,
        weights,
        scales,
        costs,
        num_heads,
        scale,
        eps,
        pre_norm,
        tanh,
        bias,
        positions,
    )


if DEVICES:

    @register_fake("exit_layer")
    def _(h, active, *_):
        return h.new_empty(active.shape[0], h.shape[1])
