"""The layers that a configuration describes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers.activations import ACT2FN

from tokenexit.layers import (
    ConvolvedLayer,
    DisentangledLayer,
    ExitHead,
    ExitLayer,
    ExitNeck,
    NeighborHead,
    NormFirstLayer,
)
from tokenexit.models.configuration import TokenExitConfig
from tokenexit.models.families import activation_of


def layers_of(config: TokenExitConfig) -> list[nn.Module]:
    """L layers; where some share their weights, one module stands several times.

    Raises:
        ValueError: `config.layer_of` says of a layer what can't be.
    """
    numbers = range(config.num_hidden_layers)
    firsts = [*numbers] if config.layer_of is None else config.layer_of
    if len(firsts) != len(numbers) or not all(
        isinstance(first, int) and 0 <= first <= number
        for number, first in zip(numbers, firsts, strict=True)
    ):
        raise ValueError(
            f"config.layer_of is {firsts!r:.80}; expected of each of {len(numbers)} layers its own "
            "number, from 0, or that of one before it"
        )
    layers: list[nn.Module] = []
    for number, first in zip(numbers, firsts, strict=True):
        layers.append(layers[first] if first < number else _layer(config, number))
    return layers


def head_of(config: TokenExitConfig, number: int) -> ExitHead:
    """A new classifier after layer `number`, from 1; the last is as Hugging Face's models have."""
    kind = NeighborHead if number <= config.num_neighbor_heads else ExitHead
    return kind(config.hidden_size, config.num_labels, config.classifier_dropout)


def check_depth(layers: Sequence[nn.Module], heads: Sequence[nn.Module], depth: int):
    """Raise ValueError unless there are so many layers, and a classifier after each."""
    if not len(layers) == len(heads) == depth:
        raise ValueError(
            f"got {len(layers)} layers and {len(heads)} exit heads; expected {depth} of each, by "
            "config.num_hidden_layers"
        )


def check_parts(model):
    """Raise ValueError unless a tagger's layers and classifiers are as its configuration says."""
    config, heads = model.config, model.exit_heads
    check_depth(model.encoder.layers, heads, config.num_hidden_layers)
    for number, head in enumerate(heads, 1):
        expected = config.num_labels * (3 if number <= config.num_neighbor_heads else 1)
        if (outputs := getattr(head, "out_features", expected)) != expected:
            raise ValueError(
                f"exit head {number} has {outputs} outputs; expected {expected}, by "
                f"config.id2label of {config.num_labels} labels"
            )


def neck_of(config: TokenExitConfig) -> ExitNeck | None:
    """What comes before each classifier."""
    if not config.norm_first:
        return None
    return ExitNeck(
        config.hidden_size,
        activation_of(config.classifier_activation),
        config.layer_norm_eps,
        norm_bias=config.norm_bias,
        bias=config.classifier_bias,
    )


def _layer(config: TokenExitConfig, number: int) -> nn.Module:
    common = (
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        activation_of(config.hidden_act),
        config.layer_norm_eps,
        config.hidden_dropout_prob,
        config.attention_probs_dropout_prob,
    )
    if config.norm_first:
        *common, _, attention_dropout = common
        return NormFirstLayer(
            *common,
            attention_dropout,
            attention_dropout,
            theta=config.rotary_thetas[number],
            reach=config.attention_reach[number],
            reads_normed=number == 0,
            inner_dropout=config.mlp_dropout,
            norm_bias=config.norm_bias,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
        )
    terms, convolves = config.pos_att_type or (), config.conv_kernel_size and number == 0
    if not (config.relative_attention or terms or convolves):
        return ExitLayer(*common)
    disentangled = {
        "position_keys": "c2p" in terms,
        "position_queries": "p2c" in terms,
        # Without relative positions the terms are of no use but to the scale.
        "shared": config.share_att_key or not config.relative_attention,
    }
    if not convolves:
        return DisentangledLayer(*common, **disentangled)
    return ConvolvedLayer(
        *common,
        **disentangled,
        kernel_size=config.conv_kernel_size,
        groups=config.conv_groups,
        convolved=ACT2FN[config.conv_act],
    )


def other_names(module: nn.Module, buffers: bool = True) -> dict[str, str]:
    """Names of parameters, and of buffers, that have another one before: to that."""
    first, others = {}, {}
    for named in (module.named_parameters, *[module.named_buffers] * buffers):
        for name, tensor in named(remove_duplicate=False):
            if (known := first.setdefault(tensor, name)) != name:
                others[name] = known
    return others
