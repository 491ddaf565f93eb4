"""From a Hugging Face token classifier to one whose tokens exit early."""

from __future__ import annotations

import logging
import os
from dataclasses import fields

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from tokenexit.models.configuration import TokenExitConfig
from tokenexit.models.families import FAMILIES
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.text.vocabulary import token_kinds

logger = logging.getLogger(__name__)


def convert(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> TokenExitForTokenClassification:
    """A tagger with an exit head after each layer, with the weights of `model`.

    The head of the last layer is the classifier of `model`; those below are new and have to be
    trained. So the policy is `ExitPolicy.never()`, which equals `model`, until another is set.

    Args:
        model: a token classifier of a supported family; it is not changed.
        tokenizer: its fast tokenizer; the marks in its vocabulary are stored in the result and
            say which tokens make up a word where no `word_ids` are given. None: each token is
            a word.

    Returns:
        The tagger, on the device, in the dtype and in the mode (training or not) of `model`.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: an unsupported family; a model for another task, or with parts or code that
            the result would not have; labels with gaps; a tokenizer that is not a fast one or has
            more entries than the model has embeddings.
    """
    if isinstance(model, TokenExitForTokenClassification):
        raise ValueError("the model is a TokenExitForTokenClassification already")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"got a {type(model).__name__}; expected a Hugging Face PreTrainedModel (one with "
            "adapters around it has to be merged before)"
        )
    theirs = model.config
    family = FAMILIES.get(theirs.model_type)
    if family is None:
        raise unsupported(theirs.model_type)
    if getattr(theirs, "is_decoder", False):
        raise ValueError("got a decoder (config.is_decoder); expected an encoder")
    _refuse_other_code(model)
    expected = _token_classifier(theirs)
    if not isinstance(model, getattr(transformers, expected)):
        raise ValueError(
            f"got a {type(model).__name__} without a head for tokens; expected a token "
            f"classifier, {expected} (AutoModelForTokenClassification.from_pretrained loads any "
            "encoder as one)"
        )
    weights = model.state_dict()
    names = family.names(theirs)
    if any(value.is_meta for value in weights.values()):
        raise ValueError("got a model on the meta device; expected one with its weights")

    if family.prepare is not None:
        family.prepare(weights, theirs)

    # Fields that only ours has keep their defaults; the family says where theirs differ.
    shared = {
        f.name: getattr(theirs, f.name) for f in fields(TokenExitConfig) if hasattr(theirs, f.name)
    }
    shared.update({k: v(theirs) if callable(v) else v for k, v in family.config.items()})
    if shared.get("classifier_dropout") is None:
        shared["classifier_dropout"] = shared["hidden_dropout_prob"]
    for name in ("model_type", "architectures", "transformers_version"):
        shared.pop(name, None)
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(theirs, name, False):
            shared.pop(name, None)
            logger.warning("%s is not kept: not all tokens have them in all layers", name)
    config = TokenExitConfig(**shared, source_model_type=theirs.model_type)
    with torch.device("cpu"):  # whatever the user's default is
        converted = TokenExitForTokenClassification(config).to(model.dtype)
    converted.mark_untrained(range(1, config.num_hidden_layers))

    ours = converted.state_dict()
    for name, parts in names.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in ours:
                taken = [(f"{part}.{kind}", weights.pop(f"{part}.{kind}", None)) for part in parts]
                _copy(ours[f"{name}.{kind}"], taken, expected)
    if weights:
        raise ValueError(
            f"got a {type(model).__name__} with {len(weights)} weights that no {expected} has, "
            f"{sorted(weights)[:3]}; expected one without, as they would be dropped"
        )
    if tokenizer is not None:
        converted.token_kinds.copy_(token_kinds(tokenizer, config.vocab_size))
    return converted.to(model.device).train(model.training)


def unsupported(model_type: str) -> ValueError:
    """The error for an architecture that no family describes."""
    return ValueError(f"got a {model_type!r} model; supported architectures are {sorted(FAMILIES)}")


def _token_classifier(config: PreTrainedConfig) -> str:
    """The name of Hugging Face's token classifier of this family."""
    return MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES[config.model_type]


def check_checkpoint(name: str | os.PathLike, config: PreTrainedConfig, info: dict):
    """Raise ValueError where a checkpoint's head is for another task, or something is left over.

    Args:
        name: of the checkpoint, for the message.
        config: its configuration.
        info: what loading it as a token classifier told. A new classifier may stand on any encoder.
    """
    expected = _token_classifier(config)
    if "classifier.weight" in info["missing_keys"] or info["mismatched_keys"]:
        return
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
