"""Copies of weights in the order in which a CPU's products of few rows read them."""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tokenexit.conditions import Reads
from tokenexit.int8 import is_quantized, layers_of, products
from tokenexit.layers import PREPACKED, ExitLayer
from tokenexit.ops import instruction_set

_TOGETHER = 32  # features that lie beside each other, as csrc/cpu/panels.h has them
_OF = "_prepacked_of"  # a linear layer's `_Origin` of its copy
_Model = TypeVar("_Model", bound=nn.Module)


class _Origin:
    """The weight that a copy was made of, as it was. Copies and pickles, whose weights are others
    and count their changes anew, do not know."""

    def __init__(self, weight: torch.Tensor | None = None):
        self._weight = weight
        if weight is not None:
            _count_steps()
            self._version, self._address = weight._version, weight.data_ptr()

    def __reduce__(self):
        return type(self), ()

    def still(self, weight: torch.Tensor) -> bool:
        """Whether it is this weight, which has not changed."""
        return (
            weight is self._weight
            and weight._version == self._version
            and weight.data_ptr() == self._address
        )


@cache
def _count_steps():
    """Have optimizers' steps counted as changes from now on: fused ones, the Trainer's default, are
    not by themselves."""

    def count(optimizer, *_):
        for group in optimizer.param_groups:
            changed = [x for x in group["params"] if not x.is_inference()]
            torch.autograd.graph.increment_version(changed)

    register_optimizer_step_post_hook(count)


def prepack(model: _Model) -> _Model:
    """Keep a second copy of the layers' weights, in place, by which single sentences are faster.

    Where a call has few tokens, products spend much of their time on bringing weights into another
    order; so a copy is kept in that one, for calls of up to 64 tokens. It is for fp32 on a CPU with
    AVX-512; on another the model stays as it is. Results are the same to the bit, the layers take
    twice the memory, and what is saved is as before.

    Weights that change later are noticed at the next call, and their copies made anew; but not what
    is written through `weight.data`: then call this again.

    Args:
        model: a tagger, on the CPU, in fp32.

    Returns:
        The model.

    Raises:
        ValueError: a model on another device, of another dtype or in 8 bits; layers that are not
            as BERT's, or have a part that was replaced; weights made in inference mode, whose
            changes nobody notices; widths that are no multiples of 32.
        TypeError: what is no tagger.
    """
    layers = layers_of(model)
    if is_quantized(model):
        raise ValueError("got an 8-bit model; expected one in fp32")
    if others := [x for x in layers if type(x) is not ExitLayer]:
        raise ValueError(f"got a {type(others[0]).__name__} as layer; expected layers as BERT's")
    parts = []
    for _, name, part in products(layers):
        weight = part.weight
        kind = f"{weight.dtype} on {weight.device.type}"
        if kind != "torch.float32 on cpu":
            raise ValueError(f"got {name} of {kind}; expected torch.float32 on cpu")
        if weight.is_inference():
            raise ValueError(
                f"got {name} made in inference mode; expected weights made outside of it, whose "
                "changes are seen"
            )
        if len(weight) % _TOGETHER:
            raise ValueError(
                f"got {name} of {len(weight)} features; expected a multiple of {_TOGETHER}"
            )
        parts.append(part)
    if (instruction_set() or "").startswith(("avx512", "amx")):
        for part in parts:  # only once all can be
            part.register_buffer(PREPACKED, turned(part.weight), persistent=False)
            setattr(part, _OF, _Origin(part.weight))
    return model


def prepacked(found: Reads) -> list[torch.Tensor]:
    """The copies of the products that a fast loop reads, up to date; none unless all have one."""
    if torch.compiler.is_compiling():
        return []
    for part in found.copied:
        weight = part._parameters["weight"]
        if not part.__dict__[_OF].still(weight):
            origin = _Origin(weight)  # what changes meanwhile is seen next time
            part._buffers[PREPACKED].copy_(turned(weight))
            setattr(part, _OF, origin)
    return [part._buffers[PREPACKED] for part in found.copied]


def turned(weight: torch.Tensor) -> torch.Tensor:
    """`[out, in]` to `[out / 32, in, 32]`, the order in which csrc/cpu/panels.h reads a copy."""
    return weight.detach().unflatten(0, (-1, _TOGETHER)).transpose(1, 2).contiguous()
