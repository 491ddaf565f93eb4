"""The BERT layer in which tokens that left are keys and values only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from tokenexit.costs import costs
from tokenexit.int8 import Int8Linear
from tokenexit.ops.add_layer_norm import add_layer_norm
from tokenexit.ops.bias_gelu import bias_gelu
from tokenexit.ops.exit_attention import exit_attention
from tokenexit.ops.exit_layer import DEVICES, exit_layer
from tokenexit.ops.linear import linear
from tokenexit.packing import Active

# Parts of a layer in the order of `exit_layer`'s weights.
_PRODUCTS_AND_NORMS = (
    "query",
    "key_value",
    "attention_output",
    "attention_norm",
    "up",
    "down",
    "output_norm",
)
_KINDS = {nn.Linear, Int8Linear, nn.LayerNorm}


class ExitLayer(nn.Module):
    """A post-LayerNorm transformer layer over a packed batch, computed for active tokens only.

    The same module serves training and inference: autograd goes through it, and a token that
    left costs its key and value in both.

    Args:
        hidden_size: d, a multiple of num_heads.
        num_heads: H.
        intermediate_size: width of the feed-forward part.
        activation: its elementwise function.
        eps: of both LayerNorms.
        dropout: of both sublayers' outputs, in training.
        attention_dropout: of the attention weights, in training.

    Raises:
        ValueError: hidden_size is no multiple of num_heads.

    Source: Devlin et al. 2019 for the layer; Li et al. 2021 (arXiv 2105.13878), section 3.3.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu,
        eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size is {hidden_size}; expected a multiple of num_heads, {num_heads}"
            )
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.activation = activation
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps)
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        h: torch.Tensor,
        active: Active,
        bias: torch.Tensor | None = None,
        pre_norm: bool = False,
    ) -> torch.Tensor:
        """New states of the active tokens; the caller stores them.

        Args:
            h: `[T, d]` states of all tokens, those of active tokens from the layer before.
            active: which they are.
            bias: see `tokenexit.ops.exit_attention`.
            pre_norm: leave out `output_norm`: the sum before it.

        Returns:
            `[A, d]`.
        """
        scale = (self.query.out_features // self.num_heads) ** -0.5
        if self.is_compiled(h):
            weights, scales = self.tensors(h)
            return exit_layer(
                h,
                active,
                weights,
                scales,
                costs(h.shape[1], weights[9].shape[0], self.num_heads, self.is_int8),
                self.num_heads,
                scale,
                self.output_norm.eps,
                pre_norm,
                bias,
            )
        keys, cu_keys = active.keys
        seen = h if keys is None else h[keys]
        h = active.rows(h)
        k, v = self.key_value(seen).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        context = exit_attention(
            self.query(h).unflatten(-1, (self.num_heads, -1)),
            k,
            v,
            active.cu_tokens,
            cu_keys,
            scale,
            bias,
            None if bias is None else active.positions,
            **self._attention_dropout(),
            max_length=active.packed.shape[1],
        )
        norm = self.attention_norm
        attended = self.dropout(self.attention_output(context.flatten(1)))
        h = add_layer_norm(attended, h, norm.weight, norm.bias, norm.eps)
        if self.activation is F.gelu and isinstance(self.up, nn.Linear):
            inner = bias_gelu(F.linear(h, self.up.weight), self.up.bias)
        else:
            inner = self.activation(self.up(h))
        update = self.dropout(self.down(inner))
        if pre_norm:
            return update + h
        norm = self.output_norm
        return add_layer_norm(update, h, norm.weight, norm.bias, norm.eps)

    @property
    def is_int8(self) -> bool:
        """Whether `tokenexit.quantize` has been here."""
        return isinstance(self._modules["query"], Int8Linear)

    def is_compiled(self, h: torch.Tensor) -> bool:
        """Whether the compiled layer can run: no gradient, no dropout, its kind of layer and parts.

        Parts of another class, such as those of adapters, run as they are.
        """
        if (
            h.device.type not in DEVICES
            or h.dtype != torch.float32
            or torch.is_grad_enabled()
            or self.activation is not F.gelu
            or self.training
            and (self.dropout.p or self.attention_dropout)
        ):
            return False
        norm = self._modules["attention_norm"]
        return _KINDS.issuperset(map(type, self.parts())) and norm.weight.dtype == torch.float32

    def tensors(self, h: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The weights, and the scales of int8, that `tokenexit.ops.exit_layer` takes for h."""
        values = [part._buffers or part._parameters for part in self.parts()]
        weights = [v[name] for v in values for name in ("weight", "bias")]
        if not self.is_int8:
            return weights, []
        none = h[:0]
        return weights, [v.get(name, none) for v in values for name in ("scale", "offset")]

    def parts(self) -> list[nn.Module]:
        """Products and LayerNorms, in the order of computation."""
        # Straight from the dictionary: Module.__getattr__ 28 times would take longer than a product
        # of a few rows.
        return [self._modules[name] for name in _PRODUCTS_AND_NORMS]

    def _attention_dropout(self):
        if not self.training or not self.attention_dropout:
            return {}
        return {"dropout_p": self.attention_dropout, "seed": int(torch.randint(2**31, ()))}


def is_hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether a call of one of them does more than its forward."""
    return any([m._forward_hooks or m._forward_pre_hooks for m in modules])


class ExitHead(nn.Linear):
    """The classifier after a layer, `[n, d] -> [n, C]`, with dropout on its input in training."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float = 0.0):
        super().__init__(hidden_size, num_labels)
        self.dropout = dropout

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.training and self.dropout:
            h = F.dropout(h, self.dropout)
        return linear(h, self.weight, self.bias)
