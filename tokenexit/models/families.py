"""How each Hugging Face family names its parts.

A family is a table: our parameter name to theirs, and the settings in which it differs. Several
of their names for one of ours are concatenated along the first dimension.

A new family that is BERT's layer under other names needs a table here, and nothing else: the parity
tests take it from here and hold it against Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from tokenexit.models.configuration import TokenExitConfig
from tokenexit.ops.bias_gelu import gelu_tanh


@dataclass(frozen=True)
class Family:
    """Names of one architecture's token classifier.

    Attributes:
        prefix: of the encoder in its state dict.
        outer: parameters outside the layers.
        layer: parameters of layer i, with `{i}` for its number from 0.
        layer_prefix: what their layer names start with.
        more: of their configuration, parameters that only some have, in place of those above where
            they are named anew.
        shared_layers: of their configuration, what the names of each layer start with, in the order
            of computation: one that stands twice is one layer, computed twice. None: each has its
            own, `layer_prefix` with its number.
        fused: the end of a name of theirs that holds several matrices one below the other, to the
            ends that `outer` and `layer` know these by.
        config: our configuration's fields where names or meanings differ: the name of theirs, or a
            value that is no text.
        prepare: changes their weights, given by name, where values differ, and takes out those
            that ours needs no more; or None.
        settings: of their configuration, fields of ours that `config` does not give; back: of ours,
            settings of theirs.
        new_head: their parameters that an encoder without a classifier lacks.
        unsupported_because: what of their configuration there is no layer for, and what is
            expected; None where there is.
    """

    prefix: str
    outer: Mapping[str, str]
    layer: Mapping[str, str | tuple[str, ...]]
    layer_prefix: str = "encoder.layer.{i}."
    more: Callable[[PreTrainedConfig], dict[str, str]] = lambda config: {}
    shared_layers: Callable[[PreTrainedConfig], list[str]] | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    prepare: Callable[[dict[str, Tensor], PreTrainedConfig], None] | None = None
    settings: Callable[[PreTrainedConfig], dict[str, object]] = lambda config: {}
    back: Callable[[TokenExitConfig], dict[str, object]] = lambda config: {}
    new_head: tuple[str, ...] = ("classifier.weight", "classifier.bias")
    unsupported_because: Callable[[PreTrainedConfig], str | None] = lambda config: None

    def names(self, config: PreTrainedConfig) -> dict[str, tuple[str, ...]]:
        """Our parameter, without `.weight` or `.bias`, to their names in the state dict.

        Args:
            config: theirs.
        """
        starts = self.layer_starts(config)
        names = {ours: (self.prefix + theirs,) for ours, theirs in self.outer.items()}
        width = getattr(config, "embedding_size", config.hidden_size)
        if width == config.hidden_size and not self.config.get("always_project"):
            names.pop("embeddings.projection", None)
        for i, start in enumerate(starts):
            if start in starts[:i]:
                continue
            for ours, theirs in self.layer.items():
                parts = (theirs,) if isinstance(theirs, str) else theirs
                names[f"encoder.layers.{i}.{ours}"] = tuple(start + part for part in parts)
        names |= {ours: (self.prefix + theirs,) for ours, theirs in self.more(config).items()}
        names[f"encoder.heads.{len(starts) - 1}"] = ("classifier",)
        return names

    def parted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their weights by name, with views of the parts in place of those that hold several."""
        result = {}
        for name, value in weights.items():
            stem, _, kind = name.rpartition(".")
            end = next((end for end in self.fused if stem.endswith(end)), None)
            parts = (stem,)
            if end is not None:
                parts = [stem.removesuffix(end) + part for part in self.fused[end]]
            for part, rows in zip(parts, value.tensor_split(len(parts)), strict=True):
                result[f"{part}.{kind}"] = rows
        return result

    def layer_starts(self, config: PreTrainedConfig) -> list[str]:
        """What their names of each layer start with, in the order of computation."""
        if self.shared_layers is not None:
            return [self.prefix + start for start in self.shared_layers(config)]
        each = range(config.num_hidden_layers)
        return [self.prefix + self.layer_prefix.format(i=i) for i in each]


_FEED_FORWARD = {
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}

_BERT_EMBEDDINGS = {
    **_EMBEDDINGS,
    "embeddings.token_type": "embeddings.token_type_embeddings",
}
_BERT_LAYER = {
    "query": "attention.self.query",
    "key_value": ("attention.self.key", "attention.self.value"),
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    **_FEED_FORWARD,
}


def _add_task(weights: dict[str, Tensor], config: PreTrainedConfig):
    """ERNIE adds the first of its task embeddings to every token."""
    if config.use_task_id:
        types = "ernie.embeddings.token_type_embeddings.weight"
        task = weights.pop("ernie.embeddings.task_type_embeddings.weight")[0]
        weights[types] = weights[types] + task


def _albert_layers(config: PreTrainedConfig) -> list[str]:
    """Groups of layers, each gone through some times in succession."""
    times = config.num_hidden_layers / config.num_hidden_groups
    return [
        f"encoder.albert_layer_groups.{int(number / times)}.albert_layers.{inner}."
        for number in range(config.num_hidden_layers)
        for inner in range(config.inner_group_num)
    ]


def _albert_groups(config: TokenExitConfig) -> dict[str, object]:
    """Groups that share layers as ours do: those of the shortest groups."""
    wanted = [*range(config.num_hidden_layers)] if config.layer_of is None else config.layer_of
    different = len(set(wanted))
    for inner in range(1, different + 1):
        settings = {
            "num_hidden_layers": len(wanted) // inner,
            "num_hidden_groups": different // inner,
            "inner_group_num": inner,
        }
        starts = _albert_layers(SimpleNamespace(**settings))
        if [starts.index(start) for start in starts] == wanted:
            return settings
    raise ValueError(f"no groups of layers are shared as config.layer_of says, {wanted}")


def _idle_groups(config: PreTrainedConfig) -> str | None:
    groups, layers = config.num_hidden_groups, config.num_hidden_layers
    if 1 <= groups <= layers and config.inner_group_num >= 1:
        return None
    return (
        f"config has num_hidden_groups {groups} and inner_group_num {config.inner_group_num} for "
        f"{layers} layers; expected 1 or more, and groups that are all used"
    )


def _drop_unread_norm(weights: dict[str, Tensor], config: PreTrainedConfig):
    """DeBERTa has a LayerNorm of states of distances, even where it reads none."""
    if not config.relative_attention:
        for kind in ("weight", "bias"):
            weights.pop(f"deberta.encoder.LayerNorm.{kind}", None)


def _deberta_convolution(config: PreTrainedConfig) -> dict[str, str]:
    """A convolution, and its LayerNorm, that stand behind the first layer and its LayerNorm."""
    if not getattr(config, "conv_kernel_size", 0):
        return {}
    return {
        "encoder.layers.0.inner_norm": "encoder.layer.0.output.LayerNorm",
        "encoder.layers.0.convolution": "encoder.conv.conv",
        "encoder.layers.0.output_norm": "encoder.conv.LayerNorm",
    }


def _unlike_deberta(config: PreTrainedConfig) -> str | None:
    width = config.hidden_size // config.num_attention_heads
    if (got := getattr(config, "attention_head_size", width)) != width:
        return f"config.attention_head_size is {got}; expected {width}"
    size, groups = getattr(config, "conv_kernel_size", 0), getattr(config, "conv_groups", 1)
    if not isinstance(size, int) or size < 0 or (size and size % 2 == 0):
        return f"config.conv_kernel_size is {size!r}; expected 0 or an odd number"
    if not isinstance(groups, int) or groups < 1 or config.hidden_size % groups:
        return f"config.conv_groups is {groups!r}; expected a divisor of {config.hidden_size}"
    if (name := getattr(config, "conv_act", "tanh")) not in ACT2FN:
        return f"config.conv_act is {name!r}; expected one of {[*ACT2FN]}"
    if getattr(config, "position_buckets", -1) == 1:
        return "config.position_buckets is 1; expected none (-1) or 2 or more"
    unknown = sorted({*(config.pos_att_type or ())} - {"c2p", "p2c"})
    return f"config.pos_att_type has {unknown}; expected 'c2p' and 'p2c'" if unknown else None


def _unlike_modernbert(config: PreTrainedConfig) -> str | None:
    kinds, width = config.layer_types, config.hidden_size // config.num_attention_heads
    if len(kinds) != config.num_hidden_layers or not {*kinds} <= {*_REACHES}:
        return (
            f"config.layer_types is {kinds!r:.80}; expected one of {[*_REACHES]} for each of "
            f"{config.num_hidden_layers} layers"
        )
    for kind in sorted({*kinds}):
        if (got := config.rope_parameters[kind]["rope_type"]) != "default":
            return f"config.rope_parameters has {kind} of rope_type {got!r}; expected 'default'"
    if (name := config.classifier_activation) not in ACT2FN:
        return f"config.classifier_activation is {name!r}; expected one of {[*ACT2FN]}"
    if width % 2:
        return f"heads are {width} wide, by config.hidden_size; expected an even width"
    return None


# How far each kind of ModernBERT's layers sees, as its configuration says.
_REACHES: Mapping[str, Callable[[PreTrainedConfig], int | None]] = {
    "full_attention": lambda config: None,
    "sliding_attention": lambda config: config.sliding_window,
}


def _modernbert_layers(config: PreTrainedConfig) -> dict[str, object]:
    kinds = config.layer_types
    thetas = [float(config.rope_parameters[kind]["rope_theta"]) for kind in kinds]
    return {"rotary_thetas": thetas, "attention_reach": [_REACHES[kind](config) for kind in kinds]}


def _modernbert_kinds(config: TokenExitConfig) -> dict[str, object]:
    """Kinds of layers that see as far as ours, each with one theta and one reach."""
    full, sliding = _REACHES
    kinds = [full if reach is None else sliding for reach in config.attention_reach]
    pairs = {*zip(kinds, config.attention_reach, config.rotary_thetas, strict=True)}
    if len(pairs) > len({*kinds}):
        raise ValueError(
            f"config has layers of {sorted(map(str, pairs))}; expected one reach and one theta in "
            "each kind"
        )
    rope = {kind: {"rope_type": "default", "rope_theta": theta} for kind, _, theta in pairs}
    reaches = [2 * reach for _, reach, _ in pairs if reach is not None]
    return {
        "layer_types": kinds,
        "rope_parameters": rope,
        **({"local_attention": reaches[0]} if reaches else {}),
    }


def _roberta(prefix: str = "roberta.") -> Family:
    """RoBERTa, and those that only differ from it in vocabulary, or in their prefix."""
    return Family(
        prefix=prefix,
        outer=_BERT_EMBEDDINGS,
        layer=_BERT_LAYER,
        config={"position_padding_id": "pad_token_id"},
    )


_GELUS = {
    **dict.fromkeys(("gelu", "gelu_python"), F.gelu),
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
        gelu_tanh,
    ),
}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that Hugging Face calls so; of GELUs, that which the ops know."""
    return _GELUS.get(name) or ACT2FN[name]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "albert": Family(
            prefix="albert.",
            outer={
                **_BERT_EMBEDDINGS,
                "embeddings.projection": "encoder.embedding_hidden_mapping_in",
            },
            layer={
                "query": "attention.query",
                "key_value": ("attention.key", "attention.value"),
                "attention_output": "attention.dense",
                "attention_norm": "attention.LayerNorm",
                "up": "ffn",
                "down": "ffn_output",
                "output_norm": "full_layer_layer_norm",
            },
            shared_layers=_albert_layers,
            unsupported_because=_idle_groups,
            config={
                "always_project": True,
                "classifier_dropout": "classifier_dropout_prob",
            },
            back=_albert_groups,
        ),
        "bert": Family(
            prefix="bert.",
            outer=_BERT_EMBEDDINGS,
            layer=_BERT_LAYER,
        ),
        "camembert": _roberta(),
        "data2vec-text": _roberta("data2vec_text."),
        "deberta-v2": Family(
            prefix="deberta.",
            outer={
                **_BERT_EMBEDDINGS,
                "embeddings.projection": "embeddings.embed_proj",
                "relative_states.embedding": "encoder.rel_embeddings",
                "relative_states.norm": "encoder.LayerNorm",
            },
            layer={
                "query": "attention.self.query_proj",
                "key_value": ("attention.self.key_proj", "attention.self.value_proj"),
                "position_key": "attention.self.pos_key_proj",
                "position_query": "attention.self.pos_query_proj",
                "attention_output": "attention.output.dense",
                "attention_norm": "attention.output.LayerNorm",
                **_FEED_FORWARD,
            },
            config={"norm_after_projection": True},
            prepare=_drop_unread_norm,
            more=_deberta_convolution,
            unsupported_because=_unlike_deberta,
        ),
        "distilbert": Family(
            prefix="distilbert.",
            outer=_EMBEDDINGS,
            layer={
                "query": "attention.q_lin",
                "key_value": ("attention.k_lin", "attention.v_lin"),
                "attention_output": "attention.out_lin",
                "attention_norm": "sa_layer_norm",
                "up": "ffn.lin1",
                "down": "ffn.lin2",
                "output_norm": "output_layer_norm",
            },
            layer_prefix="transformer.layer.{i}.",
            config={
                "type_vocab_size": 0,
                "intermediate_size": "hidden_dim",
                "hidden_act": "activation",
                "hidden_dropout_prob": "dropout",
                "attention_probs_dropout_prob": "attention_dropout",
                "classifier_dropout": "dropout",
                "layer_norm_eps": 1e-12,
            },
        ),
        "electra": Family(
            prefix="electra.",
            outer={**_BERT_EMBEDDINGS, "embeddings.projection": "embeddings_project"},
            layer=_BERT_LAYER,
        ),
        "ernie": Family(
            prefix="ernie.", outer=_BERT_EMBEDDINGS, layer=_BERT_LAYER, prepare=_add_task
        ),
        "modernbert": Family(
            prefix="",
            outer={
                "embeddings.word": "model.embeddings.tok_embeddings",
                "embeddings.norm": "model.embeddings.norm",
                "encoder.neck.final_norm": "model.final_norm",
                "encoder.neck.dense": "head.dense",
                "encoder.neck.norm": "head.norm",
            },
            layer={
                "attention_norm": "attn_norm",
                "query": "attn.query",
                "key_value": ("attn.key", "attn.value"),
                "attention_output": "attn.Wo",
                "inner_norm": "mlp_norm",
                "up": "mlp.Wi",
                "down": "mlp.Wo",
            },
            layer_prefix="model.layers.{i}.",
            fused={"attn.Wqkv": ("attn.query", "attn.key", "attn.value")},
            config={
                "norm_first": True,
                "type_vocab_size": 0,
                "position_biased_input": False,
                "hidden_act": "hidden_activation",
                "hidden_dropout_prob": "embedding_dropout",
                "attention_probs_dropout_prob": "attention_dropout",
                "layer_norm_eps": "norm_eps",
                **{
                    name: name  # whose defaults are others
                    for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
                },
            },
            settings=_modernbert_layers,
            back=_modernbert_kinds,
            new_head=(
                *("classifier.weight", "classifier.bias", "head.dense.weight", "head.dense.bias"),
                *("head.norm.weight", "head.norm.bias"),
            ),
            unsupported_because=_unlike_modernbert,
        ),
        "mpnet": Family(
            prefix="mpnet.",
            outer={**_EMBEDDINGS, "relative_bias": "encoder.relative_attention_bias"},
            layer={
                "query": "attention.attn.q",
                "key_value": ("attention.attn.k", "attention.attn.v"),
                "attention_output": "attention.attn.o",
                "attention_norm": "attention.LayerNorm",
                **_FEED_FORWARD,
            },
            config={
                "type_vocab_size": 0,
                "position_padding_id": 1,
                "relative_attention_buckets": "relative_attention_num_buckets",
            },
        ),
        "roberta": _roberta(),
        "xlm-roberta": _roberta(),
    }
)
