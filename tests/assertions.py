"""When a result is close enough: one rule, one table."""

import torch

from tokenexit import reference

# How many times the error of plain PyTorch in the same dtype ours may have.
FACTOR = {"forward": 2, "backward": 3}
# What rounding alone may do, as a share of what is summed.
ATOL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def assert_as_exact(ours, truth, plain, kind="forward", name="", scale=None):
    """`|ours - truth| <= k |plain - truth| + atol * scale`, of each element.

    Args:
        ours: in the dtype under test.
        truth: of the reference in fp64.
        plain: of the reference in the dtype under test.
        scale: the size of what is summed, a number or one an element. None: the truth's largest;
            not enough where the terms of every element cancel.
    """
    assert ours.shape == truth.shape == plain.shape, f"{name}: {ours.shape}, not {truth.shape}"
    if not truth.numel():
        return
    scale = truth.abs().max() if scale is None else torch.as_tensor(scale).expand_as(truth)
    error, of_plain = ((x.double() - truth).abs() for x in (ours, plain))
    limit = FACTOR[kind] * of_plain + ATOL[ours.dtype] * scale
    assert limit.isfinite().all(), f"{name}: plain PyTorch gives no finite result"
    wrong = ~(error <= limit)  # NaN is wrong
    if wrong.any():
        worst = torch.where(wrong, (error - limit).nan_to_num(torch.inf), -1).argmax()
        off, near, allowed = (x.flatten()[worst] for x in (error, of_plain, limit))
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.numel()} elements; the worst, number {worst}, is off "
            f"by {off:.2e}, plain PyTorch by {near:.2e}; allowed {allowed:.2e}"
        )


def attention_sizes(grad, q, k, v, cu_q, cu_k, scale, bias=None, positions=None, dropout_p=0.0):
    """What `exit_attention` sums up for the gradients, in absolute terms.

    Args:
        grad: of the output, `[A, H, D]`; the others are those of `reference.exit_attention`.

    Returns:
        The largest for q, k, v and, if there is one, the bias.
    """
    grad, q, k, v = (x.detach().double() for x in (grad, q, k, v))
    sizes = [torch.zeros_like(x) for x in (q, k, v)]
    if bias is not None:
        bias = bias.detach().double().requires_grad_()
        sizes.append(torch.zeros_like(bias))
    for b in range(len(cu_q) - 1):
        mine, seen = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        scores = torch.einsum("ahd,khd->hak", q[mine], k[seen]) * scale
        if bias is not None:
            added = reference.relative_bias(bias, positions[mine], scores.shape[-1])
            scores = scores + added.detach()
        weights = scores.softmax(-1) / (1 - dropout_p)
        of_weights = torch.einsum("ahd,khd->hak", grad[mine].abs(), v[seen].abs())
        of_scores = weights * (of_weights + (weights * of_weights).sum(-1, keepdim=True))
        sizes[0][mine] = torch.einsum("hak,khd->ahd", of_scores, k[seen].abs()) * scale
        sizes[1][seen] = torch.einsum("hak,ahd->khd", of_scores, q[mine].abs()) * scale
        sizes[2][seen] = torch.einsum("hak,ahd->khd", weights, grad[mine].abs())
        if bias is not None:
            sizes[3] += torch.autograd.grad(added, bias, of_scores)[0]
    return [size.max() if size.numel() else 0 for size in sizes]
