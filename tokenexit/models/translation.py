"""Configurations and weights of Hugging Face's token classifiers as ours, and back."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from tokenexit.models.checkpoint import made_anew
from tokenexit.models.configuration import TokenExitConfig, check_activation, check_sizes
from tokenexit.models.families import FAMILIES, Family

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def config_of(model: PreTrainedModel) -> TokenExitConfig:
    """Our configuration of a Hugging Face token classifier.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: an unsupported family; a model for another task, or with code of others.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"got a {type(model).__name__}; expected a Hugging Face PreTrainedModel (one with "
            "adapters around it has to be merged before)"
        )
    theirs = model.config
    check_supported(theirs)
    family = family_of(theirs)
    _refuse_other_code(model)
    expected = token_classifier(theirs)
    if not isinstance(model, getattr(transformers, expected)):
        raise ValueError(
            f"got a {type(model).__name__} without a head for tokens; expected a token "
            f"classifier, {expected} (AutoModelForTokenClassification.from_pretrained loads any "
            "encoder as one)"
        )
    # Fields that only ours has keep their defaults; the family says where theirs differ.
    shared = {
        f.name: getattr(theirs, f.name) for f in fields(TokenExitConfig) if hasattr(theirs, f.name)
    }
    for name, value in family.config.items():
        shared[name] = getattr(theirs, value) if isinstance(value, str) else value
    shared |= family.settings(theirs)
    starts = family.layer_starts(theirs)
    shared["num_hidden_layers"] = len(starts)
    if len(set(starts)) < len(starts):
        shared["layer_of"] = [starts.index(start) for start in starts]
    if shared.get("classifier_dropout") is None:
        shared["classifier_dropout"] = shared["hidden_dropout_prob"]
    for name in ("model_type", "architectures", "transformers_version"):
        shared.pop(name, None)
    if made_from := str(getattr(theirs, "_name_or_path", None) or ""):
        # Of a folder its name: where it lay is nobody's business.
        is_folder = Path(made_from).is_dir() or not _HUB_NAME.fullmatch(made_from)
        shared["made_from"] = f"./{Path(made_from).resolve().name}" if is_folder else made_from
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(theirs, name, False):
            shared.pop(name, None)
            logger.warning("%s is not kept: not all tokens have them in all layers", name)
    return TokenExitConfig(**shared, source_model_type=theirs.model_type)


def copy_weights(model: PreTrainedModel, ours: Mapping[str, torch.Tensor]):
    """Copy the weights of a Hugging Face token classifier into those of ours, by name.

    Raises:
        ValueError: weights that lack, are left over, do not fit, or are on the meta device.
    """
    family = family_of(model.config)
    if any(value.is_meta for value in model.state_dict().values()):
        raise ValueError("got a model on the meta device; expected one with its weights")
    weights = _weights_of(model)
    expected = token_classifier(model.config)
    for name, parts in family.names(model.config).items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in ours:
                taken = [(f"{part}.{kind}", weights.pop(f"{part}.{kind}", None)) for part in parts]
                _copy(ours[f"{name}.{kind}"], taken, expected)
    if weights:
        raise ValueError(
            f"got a {type(model).__name__} with {len(weights)} weights that no {expected} has, "
            f"{sorted(weights)[:3]}; expected one without, as they would be dropped"
        )


def their_config(config: TokenExitConfig) -> PreTrainedConfig:
    """The configuration of the token classifier of Hugging Face that a tagger's full depth is."""
    family = FAMILIES[config.source_model_type]
    known, default = transformers.CONFIG_MAPPING[config.source_model_type], TokenExitConfig()
    shared = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _ONLY_OURS
        and (hasattr(known, name) or value != getattr(default, name, None))
    }
    named = {name: value for name, value in family.config.items() if isinstance(value, str)}
    for name in family.config:
        shared.pop(name, None)
    shared |= {theirs: getattr(config, ours) for ours, theirs in reversed(named.items())}
    if shared.get("embedding_size", 0) is None:
        del shared["embedding_size"]
    shared |= family.back(config)
    return transformers.AutoConfig.for_model(config.source_model_type, **shared)


_ONLY_OURS = frozenset(
    (
        *("model_type", "architectures", "transformers_version", "exit_policy", "dtype"),
        *("source_model_type", "position_padding_id", "relative_attention_buckets", "int8"),
        *("int8_embeddings", "neighbor_heads"),
        *("untrained_heads", "always_project", "layer_of", "norm_after_projection", "dial"),
        *("made_from", "temperatures", "norm_first", "rotary_thetas", "attention_reach"),
    )
)


def copy_weights_back(ours: Mapping[str, torch.Tensor], model: PreTrainedModel):
    """Copy the weights of ours, by name, into a Hugging Face token classifier.

    Raises:
        ValueError: one that it has is not among them.
    """
    family, theirs = family_of(model.config), _weights_of(model)
    for name, parts in family.names(model.config).items():
        for kind in ("weight", "bias"):
            if (value := ours.get(f"{name}.{kind}")) is not None:
                for part, rows in zip(parts, value.chunk(len(parts)), strict=True):
                    theirs[f"{part}.{kind}"].copy_(rows)
            elif f"{parts[0]}.{kind}" in theirs:
                raise ValueError(
                    f"got a tagger without {name}.{kind}, a part that was pruned, parametrized or "
                    "wrapped by an adapter; expected plain ones: merge adapters, remove the others"
                )


def _weights_of(model):
    """A Hugging Face model's weights that are read, by name, each part by itself."""
    family, weights = family_of(model.config), model.state_dict()
    if family.prepare is not None:
        family.prepare(weights, model.config)
    return family.parted(weights)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a Hugging Face configuration.

    Raises:
        ValueError: there is none.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"got a {config.model_type!r} model; supported architectures are {sorted(FAMILIES)}"
        )
    return FAMILIES[config.model_type]


def check_supported(config: PreTrainedConfig):
    """Raise ValueError for a Hugging Face configuration of which there is no tagger.

    To be asked before its model is built, too: what that would raise may be anything.
    """
    family = family_of(config)
    check_sizes(config)
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(f"got a decoder (config.{name}); expected an encoder")
    positions = getattr(config, "position_embedding_type", None)
    if positions not in (None, "absolute"):
        raise ValueError(
            f"config.position_embedding_type is {positions!r}; expected 'absolute', the only one "
            "that Hugging Face's models still have"
        )
    check_activation(config, family.config.get("hidden_act", "hidden_act"))
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"config.hidden_size is {config.hidden_size}; expected a multiple of "
            f"num_attention_heads, {config.num_attention_heads}"
        )
    if reason := family.unsupported_because(config):
        raise ValueError(reason)


def token_classifier(config: PreTrainedConfig) -> str:
    """The name of Hugging Face's token classifier of this family."""
    return MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES[config.model_type]


def check_checkpoint(name: str | os.PathLike, config: PreTrainedConfig, info: dict):
    """Raise ValueError where a checkpoint's head is for another task, or something is left over.

    Args:
        name: of the checkpoint, for the message.
        config: its configuration.
        info: what loading it as a token classifier told. A new classifier may stand on any encoder.
    """
    expected = token_classifier(config)
    if "classifier.weight" in made_anew(info):
        return
    if lacking := sorted({*info["missing_keys"]} & {*family_of(config).new_head}):
        raise ValueError(
            f"the checkpoint {name} lacks {len(lacking)} weights: {lacking[:3]}; expected them "
            "beside its classifier"
        )
    made_by = (config.architectures or [expected])[0]
    extra = sorted(key for key in info["unexpected_keys"] if not key.startswith("cls."))
    if made_by != expected:
        raise ValueError(
            f"the checkpoint {name} is of a {made_by}; expected an encoder or a {expected}, as its "
            "classifier is for another task"
        )
    if extra:
        raise ValueError(
            f"the checkpoint {name} has {len(extra)} weights that no {expected} has, {extra[:3]}; "
            "expected one without, as they would be dropped"
        )


def _refuse_other_code(model: nn.Module):
    """Raise ValueError if a part runs code of others than transformers and torch: it is dropped."""
    for name, part in model.named_modules():
        code = type(part).forward.__module__.partition(".")[0]
        # accelerate's hooks, which move weights about, replace the forward of an instance.
        replaced = "forward" in vars(part) and not hasattr(part, "_hf_hook")
        if replaced or code not in ("transformers", "torch"):
            raise ValueError(
                f"got a {type(model).__name__} whose {name or 'own'} forward is none of "
                f"Hugging Face's (a {type(part).__module__}.{type(part).__name__}); expected a "
                "plain token classifier, as what that forward does (a CRF, an adapter that is not "
                "merged) would be dropped"
            )


def _copy(ours: torch.Tensor, theirs: list[tuple[str, torch.Tensor | None]], expected: str):
    """Copy weights of theirs, given with their names, one below the other, into one of ours."""
    lacking = [name for name, value in theirs if value is None]
    if lacking:
        raise ValueError(f"got a model without {lacking[0]}, which a {expected} has")
    value = torch.cat([value.cpu() for _, value in theirs])
    if value.shape != ours.shape:
        name = theirs[0][0]
        raise ValueError(
            f"got {name} of shape {tuple(theirs[0][1].shape)}; by the configuration it would have "
            f"{(ours.shape[0] // len(theirs), *ours.shape[1:])}"
        )
    ours.copy_(value)
