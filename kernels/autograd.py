"""Gradients of ops that a kernel and the compiled op for CPUs share: their formulas stand once.

Each function gives the backward and the `setup_context` of an op. They need no triton.
"""

from collections.abc import Callable

import torch


def of_exit_attention(op_backward: Callable) -> tuple[Callable, Callable]:
    """Of `exit_attention(q, k, v, cu_q, cu_k, scale, bias, positions, ...) -> (out, lse)`.

    Args:
        op_backward: the op that gives the gradients of q, k, v and bias.
    """

    def setup(ctx, inputs, output):
        q, k, v, cu_q, cu_k, scale, bias, positions, *rest = inputs
        ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, bias, positions)
        ctx.scale, ctx.rest = scale, rest

    def backward(ctx, grad, _lse):
        *rows, bias, positions = ctx.saved_tensors
        *grads, dbias = op_backward(grad, *rows, ctx.scale, bias, positions, *ctx.rest)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return *grads, None, None, None, dbias, None, *[None] * len(ctx.rest)

    return backward, setup


def of_add_layer_norm() -> tuple[Callable, Callable]:
    """Of `add_layer_norm(x, residual, weight, bias, eps, ...) -> (out, mean, rstd)`, by row."""

    def setup(ctx, inputs, output):
        x, residual, weight, bias, _, *rest = inputs
        ctx.save_for_backward(x, residual, weight, bias, *output[1:])
        ctx.rest = rest

    def backward(ctx, grad, _mean, _rstd):
        if any(value is not None for value in ctx.rest):
            raise ValueError("add_layer_norm has no gradient with a count")
        x, residual, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grads = torch.ops.aten.native_layer_norm_backward(
            grad.float().contiguous(),
            x.float() if residual is None else x.float() + residual,  # as in forward
            x.shape[1:],
            mean.view(-1, 1),
            rstd.view(-1, 1),
            weight.float(),
            bias.float(),
            [wanted[0] or wanted[1], wanted[2], wanted[3]],
        )
        dx, dweight, dbias = (None if g is None else g.to(x.dtype) for g in grads)
        dresidual = None if residual is None else dx
        return dx, dresidual, dweight, dbias, None, *[None] * len(ctx.rest)

    return backward, setup


def of_bias_gelu() -> tuple[Callable, Callable]:
    """Of `bias_gelu(x, bias, tanh) -> out`."""

    def setup(ctx, inputs, output):
        x, bias, tanh = inputs
        ctx.save_for_backward(x, bias)
        ctx.approximate = "tanh" if tanh else "none"

    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        dx = torch.ops.aten.gelu_backward(grad, x + bias, approximate=ctx.approximate)
        return dx, dx.flatten(0, -2).sum(0), None

    return backward, setup
