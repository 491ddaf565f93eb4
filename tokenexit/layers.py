"""The BERT layer in which tokens that left are keys and values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn

from tokenexit.conditions import CALLS, TENSORS, Reads, is_plain, passable, refused, unmet
from tokenexit.costs import costs
from tokenexit.int8 import Int8Linear
from tokenexit.ops.add_layer_norm import add_layer_norm
from tokenexit.ops.bias_gelu import GELUS, bias_gelu, gelu_tanh
from tokenexit.ops.disentangled_attention import disentangled_attention
from tokenexit.ops.exit_attention import exit_attention
from tokenexit.ops.exit_layer import DEVICES, exit_layer
from tokenexit.ops.linear import linear
from tokenexit.packing import Active
from tokenexit.reference import rotated

# Parts of a layer, those with weights in the order of `exit_layer`'s; and the names of these.
_PARTS = {
    "query": nn.Linear,
    "key_value": nn.Linear,
    "attention_output": nn.Linear,
    "attention_norm": nn.LayerNorm,
    "up": nn.Linear,
    "down": nn.Linear,
    "output_norm": nn.LayerNorm,
    "dropout": nn.Dropout,
}
PREPACKED = "prepacked"  # the buffer of a product that `tokenexit.prepack` gives it
_WEIGHTS = [
    f"{part}.{name}"
    for part, kind in _PARTS.items()
    if kind is not nn.Dropout
    for name in ("weight", "bias")
]


@passable
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

    norm_first = convolves = False

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
        self.scale = (hidden_size // num_heads) ** -0.5  # of attention scores
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
        bias: torch.Tensor | Relative | Rotary | None = None,
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
        found = self.reads(h)
        if not isinstance(found, str):
            try:
                return exit_layer(
                    h,
                    active,
                    found.weights,
                    found.scales,
                    costs=costs_of(found, self),
                    num_heads=self.num_heads,
                    scale=self.scale,
                    eps=self.output_norm.eps,
                    pre_norm=pre_norm,
                    tanh=self.activation is gelu_tanh,
                    bias=bias,
                )
            except (RuntimeError, ValueError):
                refused(found)
        keys, cu_keys = active.keys
        seen = h if keys is None else h[keys]
        h = active.rows(h)
        k, v = self.key_value(seen).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        q = self.query(h).unflatten(-1, (self.num_heads, -1))
        context = self._attend(q, k, v, cu_keys, active, bias)
        attended = self.dropout(self.attention_output(context.flatten(1)))
        h = _add_norm(self.attention_norm, attended, h)
        if self.activation in GELUS and is_plain(self.up, nn.Linear):
            inner = bias_gelu(F.linear(h, self.up.weight), self.up.bias, GELUS[self.activation])
        else:
            inner = self.activation(self.up(h))
        update = self.dropout(self.down(inner))
        return update + h if pre_norm else _add_norm(self.output_norm, update, h)

    def reads(self, h: torch.Tensor) -> Reads | str:
        """What `tokenexit.ops.exit_layer` takes of the layer for states h, or why it can't run."""
        if failed := unmet(STATES, h):
            return failed
        found = reads([self], [], h)
        # Where the op is only traced, it can't refuse.
        asked = (*CALLS, *TENSORS) if torch.compiler.is_compiling() else CALLS
        return unmet(asked, found) or unmet(LAYERS, (h, [self])) or found

    def parts(self) -> list[nn.Module]:
        """Products and LayerNorms, in the order of computation."""
        return [self._modules[name] for name, kind in _PARTS.items() if kind is not nn.Dropout]

    def drops(self) -> bool:
        """Whether dropout has something to do; that of sublayers may be in a mode of its own."""
        dropout = self._modules["dropout"]
        share = dropout.training and getattr(dropout, "p", 0)  # it may have been replaced
        return bool((self.training and self.attention_dropout) or share)

    def has_one_eps(self) -> bool:
        """Whether both LayerNorms have the same."""
        return self._modules["attention_norm"].eps == self._modules["output_norm"].eps

    def _attend(self, q, k, v, cu_keys, active, bias):
        """`[A, H, D]` of queries `[A, H, D]`, keys and values `[K, H, D]`."""
        return exit_attention(
            q,
            k,
            v,
            active.cu_tokens,
            cu_keys,
            self.scale,
            bias,
            None if bias is None else active.positions,
            **self._attention_dropout(),
            max_length=active.packed.shape[1],
        )

    def _attention_dropout(self):
        if not self.training or not self.attention_dropout:
            return {}
        return {
            "dropout_p": self.attention_dropout,
            "seed": int(torch.randint(2**31, (), device="cpu")),
        }


@dataclass(frozen=True)
class Relative:
    """What layers of disentangled attention know of relative positions.

    Attributes:
        states: `[P, d]`, of buckets of relative positions.
        buckets: `[2R+1]` int64, see `tokenexit.ops.disentangled_attention`.
    """

    states: torch.Tensor
    buckets: torch.Tensor


class DisentangledLayer(ExitLayer):
    """`ExitLayer` whose scores have a term for a query and a distance, and one for a key and it.

    In its forward, `bias` is a `Relative`; None: neither term, but the scale stays.

    Args:
        position_keys, position_queries: whether scores have the term of a query and the key of a
            distance; and of a key and the query of a distance.
        shared: keys and queries of distances are projected as those of tokens are.
        args, kwargs: of `ExitLayer`.

    Source: He et al. 2021 (arXiv 2006.03654), section 3.1.
    """

    def __init__(
        self, *args, position_keys: bool, position_queries: bool, shared: bool = False, **kwargs
    ):
        super().__init__(*args, **kwargs)
        d = self.query.in_features
        self.terms = position_keys, position_queries
        self.scale *= (1 + sum(self.terms)) ** -0.5  # a score is the sum of so many products
        self.position_key = nn.Linear(d, d) if position_keys and not shared else None
        self.position_query = nn.Linear(d, d) if position_queries and not shared else None

    def position_states(
        self, relative: Relative
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and queries `[P, H, D]` of distances; None for a term that scores do not have."""
        states = self.dropout(relative.states)
        keys = queries = None
        if self.terms[0]:
            project = self.position_key or (lambda x: self.key_value(x).chunk(2, -1)[0])
            keys = project(states).unflatten(-1, (self.num_heads, -1))
        if self.terms[1]:
            project = self.position_query or self.query
            queries = project(states).unflatten(-1, (self.num_heads, -1))
        return keys, queries

    def _attend(self, q, k, v, cu_keys, active, bias):
        if bias is None:
            return super()._attend(q, k, v, cu_keys, active, None)
        return disentangled_attention(
            q,
            k,
            v,
            active.cu_tokens,
            cu_keys,
            self.scale,
            bias.buckets,
            active.positions,
            *self.position_states(bias),
            **self._attention_dropout(),
        )


class ConvolvedLayer(DisentangledLayer):
    """A first layer: what it gives is summed with a convolution of what it reads, and normalised.

    It stands before the first exit: what neighbours are convolved with are all tokens' embeddings,
    and what leaves has its share of them in its state. Beyond the ends of a sentence are zeros. The
    sum that it copies for `pre_norm` is that before the LayerNorm behind the convolution.

    Args:
        args, kwargs: of `DisentangledLayer`.
        kernel_size: tokens that are convolved, an odd number.
        groups: of the convolution.
        convolved: the elementwise function of what it gives.

    Raises:
        ValueError: an even kernel_size; a width that is no multiple of groups.

    Source: He et al. 2021 (arXiv 2006.03654), as DeBERTa-v2 was released.
    """

    convolves = True

    def __init__(
        self,
        *args,
        kernel_size: int,
        groups: int = 1,
        convolved: Callable[[torch.Tensor], torch.Tensor] = torch.tanh,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        d = self.query.in_features
        if kernel_size % 2 == 0 or d % groups:
            raise ValueError(
                f"kernel_size is {kernel_size}, groups are {groups}; expected an odd number, and "
                f"one that divides {d}"
            )
        self.convolution = nn.Conv1d(d, d, kernel_size, padding=kernel_size // 2, groups=groups)
        self.convolved = convolved
        self.inner_norm = nn.LayerNorm(d, self.output_norm.eps)

    def forward(self, h, active, bias=None, pre_norm=False):
        """See `ExitLayer`."""
        own = self.inner_norm(super().forward(h, active, bias, pre_norm=True))
        near = self._convolution_of(h, active.packed)
        total = own + self.convolved(self.dropout(active.rows(near)))
        return total if pre_norm else self.output_norm(total)

    def _convolution_of(self, h, packed):
        """`[T, d]`, of all sentences at once: one long row with room for zeros between them."""
        room = self.convolution.padding[0]
        at = torch.arange(h.shape[0], device=h.device) + room * packed.sentence_of_token
        row = h.new_zeros(h.shape[0] + room * packed.num_sentences, h.shape[1])
        return self.convolution(row.index_copy(0, at, h).T[None])[0].T[at]


@dataclass(frozen=True)
class Rotary:
    """What layers with rotary positions know of where tokens are.

    Attributes:
        turns: by theta, the cosines and the sines `[T, D/2]` of each token's angles.
    """

    turns: Mapping[float, tuple[torch.Tensor, torch.Tensor]]


class NormFirstLayer(ExitLayer):
    """A layer that normalises what it reads and gives the sum: gated, with rotary positions.

    A token that left is a key and a value by the sum it left with, under this layer's own
    LayerNorm. `output_norm` is the identity, so that the policy's two kinds of copies are one. In
    its forward, `bias` is a `Rotary`; None: tokens are nowhere in particular.

    Args:
        args, kwargs: of `ExitLayer`; intermediate_size is that of the gated inner states, and
            dropout that of the attention's output.
        theta: of its rotary positions.
        reach: how many tokens to either side a token sees. None: all.
        reads_normed: what it reads is normalised already, as embeddings are.
        inner_dropout: of the gated inner states, in training.
        norm_bias, attention_bias, mlp_bias: whether these parts have biases.

    Raises:
        ValueError: heads of an odd width.

    Source: Warner et al. 2024 (arXiv 2412.13663), section 2.1.
    """

    norm_first = True

    def __init__(
        self,
        *args,
        theta: float,
        reach: int | None = None,
        reads_normed: bool = False,
        inner_dropout: float = 0.0,
        norm_bias: bool = True,
        attention_bias: bool = True,
        mlp_bias: bool = True,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        d, f = self.query.in_features, self.down.in_features
        if d // self.num_heads % 2:
            raise ValueError(f"heads are {d // self.num_heads} wide; expected an even width")
        self.theta, self.reach = theta, reach
        self.up = nn.Linear(d, 2 * f)
        self.inner_norm = nn.LayerNorm(d, self.output_norm.eps)
        if reads_normed:
            self.attention_norm = nn.Identity()
        self.output_norm = nn.Identity()
        self.inner_dropout = nn.Dropout(inner_dropout)
        for has_bias, parts in (
            (attention_bias, (self.query, self.key_value, self.attention_output)),
            (mlp_bias, (self.up, self.down)),
            (norm_bias, (self.attention_norm, self.inner_norm)),
        ):
            for part in parts:
                if not has_bias:
                    part.bias = None

    def forward(self, h, active, bias=None, pre_norm=False):
        """See `ExitLayer`; pre_norm changes nothing."""
        keys, cu_keys = active.keys
        seen, own = h if keys is None else h[keys], active.rows(h)
        normed = self.attention_norm(seen)
        k, v = self.key_value(normed).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        q = self.query(normed if own is seen else self.attention_norm(own))
        q = q.unflatten(-1, (self.num_heads, -1))
        if bias is not None:
            cos, sin = bias.turns[self.theta]
            q = rotated(q, active.rows(cos), active.rows(sin))
            k = rotated(k, *((cos, sin) if keys is None else (cos[keys], sin[keys])))
        window = self._window(q, active.packed.shape[1])
        context = self._attend(q, k, v, cu_keys, active, window)
        h = own + self.dropout(self.attention_output(context.flatten(1)))
        inner, gate = self.up(self.inner_norm(h)).chunk(2, -1)
        return h + self.down(self.inner_dropout(self.activation(inner) * gate))

    def drops(self) -> bool:
        inner = self._modules["inner_dropout"]
        return super().drops() or bool(inner.training and getattr(inner, "p", 0))

    def _window(self, q, longest):
        """The bias of scores that leaves no weight to tokens out of reach; None if none is."""
        if self.reach is None or longest <= self.reach + 1:
            return None
        table = q.new_zeros(self.num_heads, 2 * self.reach + 3)
        # Finite, as a kernel may come to a block of keys all of which are out of reach; and far
        # from the end of fp32, as it may divide it by the scale.
        table[:, :: table.shape[1] - 1] = max(torch.finfo(q.dtype).min / 2, -1e9)
        return table


def _add_norm(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    if not is_plain(norm, nn.LayerNorm):
        return norm(x + residual)
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)


@passable
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


@passable
class NeighborHead(ExitHead):
    """A classifier that tells the tokens beside it what it knows: `[n, d] -> [n, 3C]`.

    The first C of what it gives are for the token itself; C more are told to the token after it, C
    to the one before it. A token's logits are its own and what those beside it told last: with the
    head of the layer that they left at, if they have. See `tokenexit.reference.heard`. It costs a
    token that left nothing.

    Args:
        hidden_size, num_labels, dropout: of `ExitHead`. What is told starts at zero: as an
            `ExitHead`.
    """

    def __init__(self, hidden_size: int, num_labels: int, dropout: float = 0.0):
        super().__init__(hidden_size, 3 * num_labels, dropout)
        self.quiet()

    @torch.no_grad()
    def quiet(self):
        """Tell nothing."""
        for part in (self.weight, self.bias):
            part[len(part) // 3 :] = 0


def labels_of(outputs: int, neighbor_heads: int, num_layers: int) -> int:
    """C, by how many outputs the last head has.

    Args:
        neighbor_heads: how many heads, from the first, are `NeighborHead`.
    """
    return outputs // 3 if neighbor_heads == num_layers else outputs


class ExitNeck(nn.Module):
    """What stands between states and the classifiers of all layers: `[n, d] -> [n, d]`.

    Args:
        hidden_size: d.
        activation: elementwise.
        eps: of both LayerNorms.
        norm_bias, bias: whether these have biases, and whether the product has.
    """

    def __init__(
        self,
        hidden_size: int,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu,
        eps: float = 1e-5,
        norm_bias: bool = True,
        bias: bool = True,
    ):
        super().__init__()
        self.final_norm = nn.LayerNorm(hidden_size, eps, bias=norm_bias)
        self.dense = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.activation = activation
        self.norm = nn.LayerNorm(hidden_size, eps, bias=norm_bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.norm(self.activation(self.dense(self.final_norm(h))))


_KINDS = {
    int8: [Int8Linear if int8 and kind is nn.Linear else kind for kind in _PARTS.values()]
    for int8 in (False, True)
}


def reads(
    layers: Sequence[nn.Module],
    heads: Sequence[nn.Module],
    like: torch.Tensor,
    others: Sequence[nn.Module] = (),
    kinds: Sequence[type] = (),
) -> Reads:
    """What a loop reads in place of calling layers and heads, see `tokenexit.conditions`.

    Args:
        layers, heads: L of each, or no heads.
        like: `[..., d]`, of the states' device and dtype.
        others: more modules that it does not call, each to be of the class in `kinds`.
    """
    # Straight from the dictionaries: Module.__getattr__ takes longer than a product of a few rows.
    parts = [layer._modules.get(name) for layer in layers for name in _PARTS]
    modules = [*parts, *layers, *heads, *others]
    int8 = type(parts[0]) is Int8Linear
    expected = _KINDS[int8] * len(layers)
    kinds = [*expected, *[ExitLayer] * len(layers), *map(_head_kind, heads), *kinds]
    if [*map(type, parts)] != expected:
        return Reads(modules, kinds)
    stores = [
        part._buffers if kind is Int8Linear else part._parameters
        for part, kind in zip(parts, expected, strict=True)
        if kind is not nn.Dropout
    ]
    weights = [store.get(name) for store in stores for name in ("weight", "bias")]
    scales = []
    if int8:
        none = like[:0]
        scales = [store.get(name, none) for store in stores for name in ("scale", "offset")]
    classifiers = [h._parameters.get(name) for h in heads for name in ("weight", "bias")]
    copied = _copied(parts, like)

    def shapes():
        of_up = slice(_WEIGHTS.index("up.bias"), None, len(_WEIGHTS))
        inner = tuple([bias.numel() for bias in weights[of_up]])
        labels = tuple([bias.numel() for bias in classifiers[1::2]])
        return _shapes(like.shape[-1], inner, labels, int8)

    def dtypes():
        return _dtypes(like.dtype, len(layers), len(scales) + len(classifiers), int8)

    beside = {"device": like.device, "shapes": shapes, "dtypes": dtypes}
    return Reads(modules, kinds, weights, scales, classifiers, copied, **beside)


def _copied(parts, like):
    """Of `Reads`: the products, if the weights of all have a second copy that is in fp32."""
    linear = [part for part in parts if type(part) is nn.Linear]
    copies = [part._buffers.get(PREPACKED) for part in linear]
    if any([x is None or x.dtype != torch.float32 for x in (like, *copies)]):
        return []
    of = [x for part in linear for x in (part._parameters["weight"], part._buffers[PREPACKED])]
    return [] if any([x.is_inference() for x in of]) else linear  # whose changes are not counted


def costs_of(found: Reads, layer: ExitLayer) -> list[float]:
    """`tokenexit.costs` of layers of which the first, `layer`, is read as found."""
    matrix, inner = (found.weights[_WEIGHTS.index(name)] for name in ("query.weight", "up.bias"))
    return costs(matrix.shape[1], inner.numel(), layer.num_heads, matrix.dtype)


def _head_kind(head):
    return type(head) if type(head) in (nn.Linear, NeighborHead) else ExitHead


@lru_cache
def _shapes(d, inner, labels, int8):
    """Of `Reads.tensors`, for layers of inner widths and heads of labels."""
    shapes, scales = [], []
    for f in inner:
        rows = {"query": d, "key_value": 2 * d, "attention_output": d, "up": f, "down": d}
        for name, kind in _PARTS.items():
            if kind is nn.Linear:
                shapes += [(rows[name], f if name == "down" else d), (rows[name],)]
                scales += [(rows[name],), (rows[name] + 1,)]
            elif kind is nn.LayerNorm:
                shapes += [(d,)] * 2
                scales += [(0, d)] * 2
    shapes += scales if int8 else []
    shapes += [shape for c in labels for shape in ((c, d), (c,))]
    return shapes


@lru_cache
def _dtypes(dtype, layers, others, int8):
    """Of `Reads.tensors`: of the weights of so many layers, and of so many more."""
    rounded = torch.int8 if int8 else dtype
    pairs = [(rounded if kind is nn.Linear else dtype, dtype) for kind in _PARTS.values()
             if kind is not nn.Dropout]  # fmt: skip
    return [*chain.from_iterable(pairs)] * layers + [dtype] * others


# What else the code that is compiled for CPUs needs, of states, and of these and layers.
STATES = [
    ("the compiled ops, and states on a CPU", lambda h: h.device.type in DEVICES),
    ("states in fp32 or bf16", lambda h: h.dtype in (torch.float32, torch.bfloat16)),
    ("no gradients", lambda h: not torch.is_grad_enabled()),
]


def _even(layer):
    return layer.down.in_features % 2 == layer.down.out_features // layer.num_heads % 2 == 0


LAYERS = [
    ("GELU, exact or by tanh", lambda both: all([x.activation in GELUS for x in both[1]])),
    ("one activation in all layers", lambda both: len({x.activation for x in both[1]}) == 1),
    ("no dropout to be done", lambda both: not any([layer.drops() for layer in both[1]])),
    ("one eps in a layer", lambda both: all([layer.has_one_eps() for layer in both[1]])),
    ("as many heads in each layer", lambda both: len({x.num_heads for x in both[1]}) == 1),
    ("one scale of scores in all layers", lambda both: len({x.scale for x in both[1]}) == 1),
    (
        "even widths of heads and of inner layers in bf16",  # it moves words of two
        lambda both: both[0].dtype != torch.bfloat16 or all(map(_even, both[1])),
    ),
]
# And of heads, as the code for GPUs does.
HEADS = [
    (
        "no dropout before a classifier",
        lambda heads: not any([head.training and getattr(head, "dropout", 0) for head in heads]),
    ),
]
