"""What of a layer is neither product nor attention, where it is not fused into one."""

import torch
import triton
import triton.language as tl
from tokenexit.kernels import autograd
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def gelu(x):
    """`x * P(X < x)` of a standard normal X, in fp32, to 5e-7 (plain erf in fp32: 1.2e-6).

    `log2(P(X < -a))` as a polynomial, fitted for the least largest error of the result up to
    a = 6; beyond, the result is within 1e-8 of 0 or x.
    """
    nan: tl.constexpr = tl.PropagateNan.ALL
    a = tl.minimum(tl.abs(x), 6.0, propagate_nan=nan)
    q = 0.007084556910482722 - 0.00047330927472115337 * a
    q = q * a - 0.05182738176768328
    q = q * a - 0.45999244077425233
    q = q * a - 1.1507878507902114
    q = q * a - 1.0000376226947512
    return tl.maximum(x, 0.0, propagate_nan=nan) - a * tl.exp2(q)


@triton.jit
def gelu_tanh(x):
    """`x / 2 (1 + tanh z)`, `z = sqrt(2 / pi) (x + 0.044715 x^3)`, in fp32.

    As `1 + tanh z = 2 / (1 + e^(-2 z))`, where e^ is 2^ of 1 / ln 2 times as much.
    """
    return x / (1.0 + tl.exp2(x * (x * x * -0.10294324 - 2.3022082)))


@triton.jit
def layer_norm(x, cols, mask_d, weight_ptr, bias_ptr, D, EPS: tl.constexpr):
    """Of rows in fp32, of which D columns count: the result, mean and 1 / standard deviation."""
    mean = tl.sum(x, 1) / D
    apart = tl.where(mask_d[None, :], x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(apart * apart, 1) / D + EPS)
    weight = tl.load(weight_ptr + cols, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask_d, other=0.0).to(tl.float32)
    return apart * rstd[:, None] * weight[None, :] + bias[None, :], mean, rstd


@triton.jit
def _add_layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr, count_ptr,
    num_rows, D, EPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    count = num_rows
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr), num_rows)
    start = tl.program_id(0).to(tl.int64) * BLOCK_R
    if start >= count:
        return
    rows = start + tl.arange(0, BLOCK_R)
    mask_r = rows < count
    cols = tl.arange(0, BLOCK_D)
    mask_d = cols < D
    mask = mask_r[:, None] & mask_d[None, :]
    at = rows[:, None] * D + cols[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out, mean, rstd = layer_norm(x, cols, mask_d, weight_ptr, bias_ptr, D, EPS)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=mask_r)
    tl.store(rstd_ptr + rows, rstd, mask=mask_r)


@triton.jit
def _bias_gelu_kernel(x_ptr, bias_ptr, out_ptr, numel, D, TANH: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + offs % D, mask=mask, other=0.0).to(tl.float32)
    out = gelu_tanh(x) if TANH else gelu(x)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton_op("tokenexit_triton::add_layer_norm", mutates_args={})
def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-12,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`F.layer_norm(x + residual, [d], weight, bias, eps)`; differentiable without a count.

    Args:
        x: `[A, d]` fp16, bf16 or fp32; residual: the same, or None.
        weight, bias: `[d]`.
        count: one int64 on the device, or None for all rows. Later rows are not touched.

    Returns:
        `[A, d]`, and the mean and 1 / standard deviation of each row, `[A, 1]` fp32.
    """
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    num_rows, d = x.shape
    out = torch.empty_like(x)
    mean = x.new_empty(num_rows, 1, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    block_d = triton.next_power_of_2(d)
    block_r = max(1, 4096 // block_d)
    if num_rows:
        wrap_triton(_add_layer_norm_kernel)[(triton.cdiv(num_rows, block_r),)](
            x, residual, weight, bias, out, mean, rstd, count, num_rows, d, eps, block_r, block_d
        )
    return out, mean, rstd


_backward, _setup = autograd.of_add_layer_norm()
add_layer_norm.register_autograd(_backward, setup_context=_setup)


@triton_op("tokenexit_triton::bias_gelu", mutates_args={})
def bias_gelu(x: Tensor, bias: Tensor, tanh: bool = False) -> Tensor:
    """`F.gelu(x + bias)`; differentiable.

    Args:
        x: `[.., d]` fp16, bf16 or fp32; bias: `[d]`.
        tanh: approximated by it.
    """
    x, bias = x.contiguous(), bias.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        wrap_triton(_bias_gelu_kernel)[(triton.cdiv(x.numel(), 1024),)](
            x, bias, out, x.numel(), x.shape[-1], tanh, 1024
        )
    return out


_backward, _setup = autograd.of_bias_gelu()
bias_gelu.register_autograd(_backward, setup_context=_setup)
