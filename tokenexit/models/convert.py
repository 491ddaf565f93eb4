"""From a Hugging Face token classifier to one whose tokens exit early."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import fields

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokenexit.models.configuration import TokenExitConfig
from tokenexit.models.families import FAMILIES
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.packing import CONTINUES_WORD, SPECIAL, STARTS_WORD

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
        ValueError: an unsupported family, a model without a token classifier, a tokenizer that
            is not a fast one or has more entries than the model has embeddings.
    """
    if isinstance(model, TokenExitForTokenClassification):
        raise ValueError("the model is a TokenExitForTokenClassification already")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"got a {type(model).__name__}; expected a Hugging Face PreTrainedModel")
    theirs = model.config
    family = FAMILIES.get(theirs.model_type)
    if family is None:
        raise unsupported(theirs.model_type)
    if getattr(theirs, "is_decoder", False):
        raise ValueError("got a decoder (config.is_decoder); expected an encoder")
    weights = model.state_dict()
    names = family.names(theirs)
    lacking = [
        part for parts in names.values() for part in parts if f"{part}.weight" not in weights
    ]
    if lacking:
        raise ValueError(
            f"got a {type(model).__name__} without {lacking[0]}; expected a token classifier "
            "(AutoModelForTokenClassification.from_pretrained loads any encoder as one)"
        )
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
    config = TokenExitConfig(**shared, source_model_type=theirs.model_type)
    with torch.device("cpu"):  # whatever the user's default is
        converted = TokenExitForTokenClassification(config).to(model.dtype)
    converted.mark_untrained(range(1, config.num_hidden_layers))

    ours = converted.state_dict()
    for name, parts in names.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in ours:
                value = torch.cat([weights[f"{part}.{kind}"].cpu() for part in parts])
                ours[f"{name}.{kind}"].copy_(value)
    if tokenizer is not None:
        converted.token_kinds.copy_(token_kinds(tokenizer, config.vocab_size))
    return converted.to(model.device).train(model.training)


def token_kinds(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """What each vocabulary entry is, `[vocab_size]` uint8: starts a word, continues one, special.

    WordPiece marks what continues a word ("##"); SentencePiece and byte-level BPE mark what
    starts one ("▁", "Ġ"). A vocabulary without marks makes each token a word.

    Raises:
        ValueError: not a fast tokenizer; more entries than `vocab_size`.
    """
    require_fast(tokenizer)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries; the model's vocabulary is {vocab_size}"
        )
    kinds = torch.full((vocab_size,), STARTS_WORD, dtype=torch.uint8, device="cpu")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    continuing = backend["model"].get("continuing_subword_prefix")
    starting = None
    if not continuing:
        spaces = json.dumps([backend.get("pre_tokenizer"), backend.get("decoder")])
        starting = "▁" if '"Metaspace"' in spaces else "Ġ" if '"ByteLevel"' in spaces else None
    for token, index in tokenizer.get_vocab().items():
        if (continuing and token.startswith(continuing)) or (
            starting and not token.startswith(starting)
        ):
            kinds[index] = CONTINUES_WORD
    # The unknown token stands for text.
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    kinds[sorted(special)] = SPECIAL
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ValueError(
            f"got a {type(tokenizer).__name__} of special tokens only; expected one with its "
            "vocabulary (are the tokenizer's files where it was loaded from?)"
        )
    return kinds


def marks_of(name: str | os.PathLike, vocab_size: int, **hub) -> torch.Tensor:
    """`token_kinds` of the tokenizer saved at `name`; with a warning no marks if there is none."""
    try:
        return token_kinds(AutoTokenizer.from_pretrained(name, **hub), vocab_size)
    except (OSError, ValueError) as error:
        logger.warning(
            "no words are marked in the vocabulary, each token is one unless word_ids say "
            "otherwise: %s",
            error,
        )
        return torch.full((vocab_size,), STARTS_WORD, dtype=torch.uint8, device="cpu")


def unsupported(model_type: str) -> ValueError:
    """The error for an architecture that no family describes."""
    return ValueError(f"got a {model_type!r} model; supported architectures are {sorted(FAMILIES)}")


def require_fast(tokenizer: PreTrainedTokenizerBase):
    """Raise ValueError unless the tokenizer can say which word a token belongs to."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"got {type(tokenizer).__name__}, which is not a fast tokenizer; expected one, as only "
            "those say which word a token belongs to"
        )
