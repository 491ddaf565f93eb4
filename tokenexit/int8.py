"""8-bit weights for inference on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from tokenexit.conditions import CALLS, Reads, passable, unmet
from tokenexit.ops import instruction_set


def largest() -> int:
    """What a row's largest weight is rounded to: 127, or 63 where that is much faster.

    AVX2 and plain AVX-512 add products of a byte and a weight in pairs, in 16 bits, which weights
    beyond 64 may overflow: those go in two parts there. Once rounded, weights mean the same on
    every processor, and so do sums of their products, which are exact.
    """
    return 63 if instruction_set() in ("avx2", "avx512") else 127


_Model = TypeVar("_Model", bound=nn.Module)


@passable
class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, one scale an output feature.

    The compiled layer reads activations as bytes too, scaled row by row, so that a row's result
    does not depend on the others. Called by itself it computes with the rounded weights in fp32.

    Args:
        linear: the layer to round, `in_features` a multiple of 4, with or without a bias. Its
            weights are not kept. One on the meta device gives one there, to be loaded.

    Raises:
        ValueError: `in_features` is no multiple of 4; a weight is not finite.

    Source: Zafrir et al. 2019 (arXiv 1910.06188) for BERT in 8 bits.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        if self.in_features % 4:
            raise ValueError(f"got {self.in_features} inputs; expected a multiple of 4 for int8")
        rounded, scale = _rounded(linear.weight, largest())
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale)
        # What the bytes' zero point, 128, adds to a product; last, the largest weight, by which the
        # compiled layer knows what its sums need.
        most = rounded.abs().amax().float()
        self.register_buffer("offset", torch.cat([128 * scale * rounded.sum(1), most[None]]))
        bias = torch.zeros_like(scale) if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in] -> [..., out]`."""
        weight = self.weight * self.scale[:, None]
        return F.linear(x, weight.to(x.dtype), self.bias.to(x.dtype))


@passable
class Int8Embedding(nn.Module):
    """A table of embeddings in 8 bits, one scale a row: a fourth of the memory.

    Args:
        embedding: the table to round. Its weights are not kept. One on the meta device gives one
            there, to be loaded.

    Raises:
        ValueError: a weight is not finite.
    """

    max_norm = None

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx = embedding.padding_idx
        weight, scale = _rounded(embedding.weight, 127)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[...] -> [..., d]` in fp32."""
        return self.weight[ids] * self.scale[ids][..., None]


def _rounded(weight: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes `[rows, columns]`, at most so large, and the scale of each row."""
    weight = weight.detach().float()
    if not weight.is_meta and not weight.isfinite().all():
        raise ValueError("got a weight that is not finite; expected finite ones for int8")
    scale = (weight.abs().amax(1) / most).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize` has been here."""
    return any(isinstance(part, Int8Linear) for part in model.modules())


def dtype_of(model: nn.Module) -> str:
    """That of a tagger's weights, "int8" where `quantize` has been."""
    return "int8" if is_quantized(model) else str(model.dtype).removeprefix("torch.")


def layers_of(model: nn.Module) -> nn.ModuleList:
    """A tagger's layers; TypeError where it is none."""
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if layers is None:
        raise TypeError(
            f"got a {type(model).__name__}; expected a TokenExitForTokenClassification, which is "
            "the `model` of a Tagger"
        )
    return layers


def products(layers: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each linear layer of an encoder's layers, behind the layer that it is a part of and its name.

    Raises:
        ValueError: another part, or one that was hooked, pruned or the like, in its place: what
            such a one does beside its product would be lost.
    """
    for number, layer in enumerate(dict.fromkeys(layers)):  # one may stand several times
        for name, part in layer.named_children():
            # As an activation that is a module.
            has_none = next(part.parameters(), None) is None and type(part) is not Int8Linear
            if has_none or isinstance(part, (nn.LayerNorm, nn.Conv1d)):
                continue
            reads = Reads([part], [nn.Linear], [part._parameters.get("weight")])
            if failed := unmet(CALLS, reads):
                raise ValueError(
                    f"got a model with another encoder.layers.{number}.{name} than it was made "
                    f"with: {name}, a {type(part).__name__}; expected {failed} (merge adapters, "
                    "remove hooks and pruning first)"
                )
            yield layer, name, part


def quantize(model: _Model, embeddings: bool = True) -> _Model:
    """Round a tagger's products and its table of words to 8 bits, in place: for a CPU's inference.

    Other embeddings, LayerNorms, attention, convolutions and exit heads stay in fp32. The model
    takes about a fourth of the memory, in memory and on disk; saved, it is loaded as it is. It can
    no longer be trained or converted to another dtype: keep the original for that.

    Args:
        model: a tagger, on the CPU, in fp32.
        embeddings: whether the words' are rounded, too, which may be most of a model.

    Returns:
        The model.

    Raises:
        ValueError: a model on another device or of another dtype; one that is 8-bit already; layers
            of whose parts one has been replaced, hooked, pruned or the like; widths that are no
            multiples of 4.
        TypeError: what is no tagger.
    """
    layers = layers_of(model)
    devices = {(p.device.type, p.dtype) for p in model.parameters()}
    if devices not in ({("cpu", torch.float32)}, {("meta", torch.float32)}):  # or yet to be loaded
        raise ValueError(f"got a model of {sorted(map(str, devices))}; expected fp32 on the CPU")
    if is_quantized(model):
        raise ValueError("got a model that is 8-bit already; expected one in fp32")
    rounded, words = [], model.embeddings.word
    for layer, name, part in products(layers):
        rounded.append((layer, name, Int8Linear(part)))
    if embeddings:
        reads = Reads([words], [nn.Embedding], [words._parameters.get("weight")])
        if (failed := unmet(CALLS, reads)) or words.max_norm is not None:
            raise ValueError(
                "got another table of words than the model was made with; expected "
                f"{failed or 'one without max_norm'}, or quantize(model, embeddings=False)"
            )
        rounded.append((model.embeddings, "word", Int8Embedding(words)))
    for layer, name, part in rounded:  # only once all could be rounded
        setattr(layer, name, part)
    model._memory.forget()  # which keeps the weights that were there
    model.config.int8, model.config.int8_embeddings = True, embeddings
    return model.eval()
