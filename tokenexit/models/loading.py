"""From a checkpoint, a tagger's or a Hugging Face model's, to a tagger."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenexit.models.checkpoint import (
    HUB_ARGUMENTS,
    check_dtype_of_int8,
    load_config,
    load_whole,
    made_anew,
)
from tokenexit.models.configuration import TokenExitConfig, check_neighbor_heads
from tokenexit.models.translation import (
    check_checkpoint,
    check_supported,
    config_of,
    copy_weights,
    family_of,
)
from tokenexit.policy import ExitPolicy
from tokenexit.text.vocabulary import marks_of, token_kinds

_HEAD = "encoder.heads.{}."


def check_encoder(name: str | os.PathLike):
    """Raise ValueError unless there is a tagger, or a model of which one is made.

    To be asked before its tokenizer is loaded: what that would raise says nothing of the model.
    """
    config = load_config(name)
    if config.model_type != TokenExitConfig.model_type:
        check_supported(config)


def load_tagger(
    cls: type,
    load_saved: Callable,
    name: str | os.PathLike,
    *args,
    tokenizer: PreTrainedTokenizerBase | None,
    policy: ExitPolicy | None,
    neighbor_heads: bool | str,
    **kwargs,
):
    """See `TokenExitForTokenClassification.from_pretrained`.

    Args:
        cls: that class.
        load_saved: `PreTrainedModel.from_pretrained` of it.
    """
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    config = kwargs.get("config", name)
    if not isinstance(config, PreTrainedConfig):
        config = load_config(config, **hub)
    if config.model_type == TokenExitConfig.model_type:
        # Weights come from safetensors only: no pickle is ever opened.
        kwargs["use_safetensors"] = True
        check_neighbor_heads("neighbor_heads", neighbor_heads)
        if neighbor_heads and neighbor_heads != config.neighbor_heads:
            raise ValueError(
                f"got neighbor_heads {neighbor_heads!r} for a saved tagger of "
                f"{config.neighbor_heads!r}; expected False: it has the heads it was trained with"
            )
        if config.int8:
            check_dtype_of_int8(kwargs.get("dtype"))
            kwargs["dtype"] = torch.float32
        model, info = load_whole(load_saved, name, (), False, *args, **kwargs)
        other = made_anew(info)
        heads = range(1, len(model.exit_heads) + 1)
        new = {n for n in heads if f"{_HEAD.format(n - 1)}weight" in other}
        model.mark_untrained(sorted(new.union(model.config.untrained_heads or ())))
        if other:  # what was measured was of the weights of before
            model.dial = model.config.temperatures = None
    else:
        check_supported(config)
        new = family_of(config).new_head
        loader = AutoModelForTokenClassification.from_pretrained
        theirs, info = load_whole(loader, name, new, True, *args, **kwargs)
        check_checkpoint(name, config, info)
        model = of_hugging_face(cls, theirs, tokenizer, neighbor_heads)
        if made_anew(info).intersection(new):
            model.mark_untrained(range(1, model.config.num_hidden_layers + 1))
        if tokenizer is None:
            model.token_kinds.copy_(marks_of(name, model.config.vocab_size, **hub))
    if policy is not None:
        model.policy = policy
    else:
        model.warn_of_untrained_heads()
    return (model, info) if kwargs.get("output_loading_info") else model


def of_hugging_face(
    cls: type,
    theirs: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    neighbor_heads: bool | str,
):
    """See `tokenexit.convert`; cls: that of its result."""
    check_neighbor_heads("neighbor_heads", neighbor_heads)
    config = config_of(theirs)
    config.neighbor_heads = neighbor_heads
    with torch.device("cpu"):  # whatever the user's default is
        model = cls(config).to(theirs.dtype)
    model.mark_untrained(range(1, config.num_hidden_layers))
    weights, last = model.state_dict(), _HEAD.format(config.num_hidden_layers - 1)
    own = {x: weights[x][: config.num_labels] for x in weights if x.startswith(last)}
    copy_weights(theirs, weights | own)  # one that hears starts by telling nothing
    if tokenizer is not None:
        model.token_kinds.copy_(token_kinds(tokenizer, config.vocab_size))
    return model.to(theirs.device).train(theirs.training)
