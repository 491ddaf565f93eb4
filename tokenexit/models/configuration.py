"""Configuration of a converted model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

logger = logging.getLogger(__name__)

# Beyond these a configuration is damaged, and building its model would take minutes or all memory.
MOST_LAYERS, MOST_PARAMETERS = 1000, 4_000_000_000
NEIGHBOR_HEADS = (False, True, "all")  # more of them from one to the next


class TokenExitConfig(PreTrainedConfig):
    """Shape and policy of a `TokenExitForTokenClassification`, whatever family it came from.

    Args:
        source_model_type: the Hugging Face family it was converted from.
        embedding_size: width of the embeddings, which are projected to `hidden_size` where they
            differ. None: `hidden_size`.
        always_project: where they do not differ, too.
        layer_of: for each layer the number, from 0, of the one whose weights it has: its own, or
            one before it. None: each has its own.
        norm_after_projection: the embeddings' LayerNorm comes after a projection, which then has no
            bias.
        position_biased_input: whether embeddings have those of positions in them.
        relative_attention, max_relative_positions, position_buckets, pos_att_type, share_att_key,
            norm_rel_ebd: of disentangled attention, as a DeBERTa-v2 configuration has them.
        conv_kernel_size, conv_groups, conv_act: of the convolution behind the first layer, as a
            DeBERTa-v2 configuration has them; a size of 0: there is none.
        norm_first: layers normalise what they read, not what they give, and have rotary positions
            and gated inner states; before each classifier comes one neck, the same for all. What
            follows here is of these.
        rotary_thetas: of each layer.
        attention_reach: of each layer, how many tokens to either side a token sees; None: all.
        norm_bias, attention_bias, mlp_bias, mlp_dropout, classifier_bias, classifier_activation:
            as a ModernBERT configuration has them.
        position_padding_id: families that number positions from a padding id: positions start
            after it, and that token itself does not count. None: from 0.
        relative_attention_buckets: rows of the relative-position bias table; 0 for none.
        exit_policy: fields of the `ExitPolicy`.
        dial: fields of the `Dial` that calibration with a promise made.
        untrained_heads: layers, from 1, whose classifiers were never trained; see
            `TokenExitForTokenClassification.untrained_heads`.
        int8, int8_embeddings: whether the layers' products have 8-bit weights, and whether the
            table of words is of 8 bits, too, see `tokenexit.quantize`.
        neighbor_heads: whether classifiers below the last hear those of the tokens beside a token,
            see `tokenexit.layers.NeighborHead`; or "all": the last one, too.
        made_from: the model it was converted from: a name on the hub, or "./" and the name of a
            folder.
        temperatures: for each layer what logits are divided by for the confidences of a `Tagger`,
            see `tokenexit.temperature`. None: 1.

    The others are those of a BERT configuration.
    """

    model_type = "tokenexit"
    # What a Trainer's evaluation leaves out of its predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exit_layers", "layer_logits"]

    source_model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    embedding_size: int | None = None
    always_project: bool = False
    norm_after_projection: bool = False
    num_hidden_layers: int = 12
    layer_of: list[int] | None = None
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float = 0.1
    max_position_embeddings: int = 512
    position_padding_id: int | None = None
    position_biased_input: bool = True
    relative_attention: bool = False
    max_relative_positions: int = -1
    position_buckets: int = -1
    pos_att_type: list[str] | None = None
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    norm_first: bool = False
    rotary_thetas: list[float] | None = None
    attention_reach: list[int | None] | None = None
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    mlp_dropout: float = 0.0
    classifier_bias: bool = True
    classifier_activation: str = "gelu"
    type_vocab_size: int = 2
    relative_attention_buckets: int = 0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    cls_token_id: int | None = None
    sep_token_id: int | None = None
    exit_policy: dict | None = None
    dial: dict | None = None
    untrained_heads: list[int] | None = None
    int8: bool = False
    int8_embeddings: bool = False
    neighbor_heads: bool | str = False
    made_from: str | None = None
    temperatures: list[float] | None = None

    @property
    def num_neighbor_heads(self) -> int:
        """How many classifiers, from the first, are `tokenexit.layers.NeighborHead`."""
        return (0, self.num_hidden_layers - 1, self.num_hidden_layers)[
            NEIGHBOR_HEADS.index(self.neighbor_heads)
        ]

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sentence that the position embeddings cover."""
        settings = settings_of(self)
        padding = settings["position_padding_id"]
        return settings["max_position_embeddings"] - (0 if padding is None else padding + 1)


def settings_of(config: TokenExitConfig) -> Mapping[str, object]:
    """What was set, by name, to be read where a call waits for it.

    Hugging Face's configurations make a call in Python of each attribute that is read; a model of
    one sentence would wait for a dozen of them.
    """
    if torch.compiler.is_compiling():  # which traces that call, and no other way around it
        return config.__dict__
    return object.__getattribute__(config, "__dict__")


def check_sizes(config: PreTrainedConfig):
    """Raise ValueError for sizes of which there is no model, before one is built.

    Args:
        config: ours, or that of a Hugging Face encoder.
    """
    names = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers")
    names += ("num_attention_heads", "intermediate_size")
    sizes = {name: _size(config, name, 1) for name in names if hasattr(config, name)}
    labels = len(config.id2label or ())
    sizes.update(type_vocab_size=_size(config, "type_vocab_size", 0), num_labels=labels)
    d, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    has_width = getattr(config, "embedding_size", None) is not None
    width = _size(config, "embedding_size", 1) if has_width else d
    rows = sizes["vocab_size"] + sizes["max_position_embeddings"] + sizes["type_vocab_size"]
    layer = 4 * d + 2 * sizes.get("intermediate_size", 0) + labels
    parameters = width * rows + d * layers * layer
    if layers > MOST_LAYERS or parameters > MOST_PARAMETERS:
        raise ValueError(
            f"the configuration is of a model with {layers} layers and {parameters:.1e} "
            f"parameters, by {sizes}; expected at most {MOST_LAYERS} and {MOST_PARAMETERS:.0e}"
        )


def check_neighbor_heads(name: str, value: object):
    """Raise ValueError for what is none of `NEIGHBOR_HEADS`."""
    if value not in NEIGHBOR_HEADS or isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected True, False or 'all'")


def check_config(config: TokenExitConfig):
    """Raise ValueError for settings of which there is no model; labels are made whole."""
    check_sizes(config)
    for name in ("hidden_act", "classifier_activation", "conv_act"):
        check_activation(config, name)
    for name in (
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
        "mlp_dropout",
    ):
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"config.{name} is {value!r}; expected a number from 0 to 1")
    for name in ("conv_kernel_size", "relative_attention_buckets"):
        _size(config, name, 0)
    if config.position_padding_id is not None:
        _size(config, "position_padding_id", 0)
    eps = config.layer_norm_eps
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"config.layer_norm_eps is {eps!r}; expected a number of 0 or more")
    for name in ("layer_of", "pos_att_type"):
        if not isinstance(value := getattr(config, name), (list, tuple, type(None))):
            raise ValueError(f"config.{name} is {value!r}; expected a list, or None")
    for name in ("int8", "int8_embeddings"):
        if not isinstance(value := getattr(config, name), bool):
            raise ValueError(f"config.{name} is {value!r}; expected true or false")
    check_neighbor_heads("config.neighbor_heads", config.neighbor_heads)
    warmth, layers = config.temperatures, config.num_hidden_layers
    if warmth is not None and not (
        isinstance(warmth, list)
        and len(warmth) == layers
        and all(isinstance(value, (int, float)) and 0 < value < math.inf for value in warmth)
    ):
        raise ValueError(
            f"config.temperatures is {warmth!r:.80}; expected {layers} numbers above 0, or None"
        )
    heads, numbers = config.untrained_heads, range(1, layers + 1)
    if heads is not None and not (isinstance(heads, list) and all(x in numbers for x in heads)):
        raise ValueError(
            f"config.untrained_heads is {heads!r:.80}; expected numbers from 1 to {layers}, or None"
        )
    if config.max_tokens < 1:
        raise ValueError(
            f"config.max_position_embeddings is {config.max_position_embeddings}; expected more "
            f"than position_padding_id, {config.position_padding_id}, takes up"
        )
    if config.norm_first:
        _check_by_layer(config, "rotary_thetas", "a number above 0", _is_theta)
        _check_by_layer(config, "attention_reach", "an int of 0 or more, or None", _is_reach)
    config.id2label, config.label2id = label_maps(config.id2label, config.label2id)


def check_activation(config: PreTrainedConfig, name: str):
    """Raise ValueError if that field, ours or theirs, is no activation that Hugging Face knows."""
    value = getattr(config, name)
    if not isinstance(value, str) or value not in ACT2FN:
        raise ValueError(f"config.{name} is {value!r}; expected one of {[*ACT2FN]}")


def _is_theta(value):
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _is_reach(value):
    return value is None or (isinstance(value, int) and value >= 0)


def _check_by_layer(config, name, expected, is_right):
    values, layers = getattr(config, name), config.num_hidden_layers
    if not isinstance(values, list) or len(values) != layers or not all(map(is_right, values)):
        raise ValueError(
            f"config.{name} is {values!r:.80}; expected {expected}, of each of {layers} layers"
        )


def _size(config, name, least):
    value = getattr(config, name, 0)
    if not isinstance(value, int) or value < least:
        raise ValueError(f"config.{name} is {value!r}; expected an int of {least} or more")
    return value


def label_maps(
    id2label: Mapping[int | str, str | int] | None, label2id: Mapping[str, int | str] | None
) -> tuple[dict[int, str], dict[str, int]]:
    """Names of the labels 0 .. C-1 and the way back, from what foreign configurations have.

    `id2label` decides; of a `label2id` that says otherwise a warning tells, unless that is the
    default one ("LABEL_0"), which many have that renamed their labels.

    Raises:
        ValueError: less than two labels, ids with gaps, a name of two labels, what is no number
            or no name.
    """
    names = {_number(key): value for key, value in (id2label or {}).items()}
    if len(names) < 2:
        raise ValueError(
            f"config.num_labels is {len(names)}; expected 2 or more: with less there is nothing to "
            "be sure of"
        )
    wanted = range(len(names))
    if sorted(names) != list(wanted):
        missing = sorted(set(wanted) - set(names))
        raise ValueError(
            f"id2label has {len(names)} labels but none for {missing[:10]}; expected one for each "
            f"of 0 to {len(names) - 1}"
        )
    names = {key: names[key] for key in wanted}
    if not all(isinstance(value, (str, int)) for value in names.values()):
        raise ValueError(f"id2label has {list(names.values())!r:.80}; expected names")
    names = {key: str(value) for key, value in names.items()}
    ids = {}
    for key, name in names.items():
        if name in ids:
            raise ValueError(
                f"id2label has {name!r} for both {ids[name]} and {key}; expected different names"
            )
        ids[name] = key
    others = {name: _number(value) for name, value in (label2id or {}).items()}
    if others != ids and any(name != f"LABEL_{value}" for name, value in others.items()):
        logger.warning(
            "label2id is %.200s, which is not id2label, %.200s; that is taken", others, ids
        )
    return names, ids


def _number(value: int | str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"got {value!r} as the number of a label; expected an int") from None
