"""From a Hugging Face token classifier to one whose tokens exit early, and back."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenexit.int8 import is_quantized
from tokenexit.models.loading import of_hugging_face
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.models.translation import copy_weights_back, their_config


def convert(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    neighbor_heads: bool | str = False,
) -> TokenExitForTokenClassification:
    """A tagger with an exit head after each layer, with the weights of `model`.

    The head of the last layer is the classifier of `model`; those below are new and have to be
    trained. So the policy is `ExitPolicy.never()`, which equals `model`, until another is set.

    Args:
        model: a token classifier of a supported family; it is not changed.
        tokenizer: its fast tokenizer; the marks in its vocabulary are stored in the result and
            say which tokens make up a word where no `word_ids` are given. None: each token is
            a word.
        neighbor_heads: heads below the last hear those of the tokens beside a token, see
            `tokenexit.layers.NeighborHead`: nearly free, and better once trained. "all": the
            last one, too, which then is no longer one that `to_hugging_face` could give back.

    Returns:
        The tagger, on the device, in the dtype and in the mode (training or not) of `model`.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: an unsupported family; a model for another task, or with parts or code that
            the result would not have; labels with gaps; a tokenizer that is not a fast one or has
            more entries than the model has embeddings; other `neighbor_heads`.
    """
    if isinstance(model, TokenExitForTokenClassification):
        raise ValueError("the model is a TokenExitForTokenClassification already")
    return of_hugging_face(TokenExitForTokenClassification, model, tokenizer, neighbor_heads)


def to_hugging_face(model: TokenExitForTokenClassification) -> PreTrainedModel:
    """The Hugging Face token classifier that full depth of a tagger is: `convert` undone.

    Exit heads below the last layer, the policy and the marks of words have no place there.

    Args:
        model: a tagger; it is not changed.

    Returns:
        The classifier of the family that the tagger was converted from, on its device, in its
        dtype and mode.

    Raises:
        TypeError: another model.
        ValueError: an 8-bit one; one with parts that were pruned, parametrized or wrapped by an
            adapter; one whose last classifier hears the tokens beside a token, as no
            model of Hugging Face's does.
    """
    if not isinstance(model, TokenExitForTokenClassification):
        raise TypeError(f"got a {type(model).__name__}; expected a TokenExitForTokenClassification")
    if is_quantized(model):
        raise ValueError("got an 8-bit model; expected the fp32 one it was made from")
    if model.config.neighbor_heads == "all":
        raise ValueError(
            "got a tagger whose last classifier hears the tokens beside a token; expected one "
            "whose last does not (train --neighbor-heads below, neighbor_heads=True)"
        )
    with torch.device("cpu"):  # whatever the user's default is
        theirs = AutoModelForTokenClassification.from_config(their_config(model.config))
    theirs = theirs.to(model.device, model.dtype)
    copy_weights_back(model.state_dict(), theirs)
    return theirs.train(model.training)
