"""What training starts from: an encoder, or a tagger whose labels stay."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from tokenexit.loops.gpu import MOST_OUTPUTS
from tokenexit.models.assembly import head_of
from tokenexit.models.checkpoint import load_config
from tokenexit.models.configuration import NEIGHBOR_HEADS, check_neighbor_heads
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.text.scoring import shown

logger = logging.getLogger(__name__)


def load_to_train(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    new_classifier: bool = False,
    neighbor_heads: bool | str | None = None,
) -> TokenExitForTokenClassification:
    """The model at a folder or hub name, with a classifier that knows `labels`.

    A fine-tuned classifier stays and its labels are matched by name; those that it lacks are added
    behind its own. An encoder without one gets a new one.

    Args:
        labels: of the training data.
        new_classifier: start a new one in any case.
        neighbor_heads: see `choose_heads`; a new classifier hears, too, unless this says otherwise.

    Raises:
        ValueError: a fine-tuned classifier that has none of the labels; less than two labels for a
            new one; see also `choose_heads` and
            `TokenExitForTokenClassification.from_pretrained`.
    """
    model = _load(name, tokenizer, labels, new_classifier)
    is_new = model.config.num_hidden_layers in model.untrained_heads()
    choose_heads(model, neighbor_heads, "all" if is_new else True)
    return model


def _load(name, tokenizer, labels, new_classifier):
    load = TokenExitForTokenClassification.from_pretrained
    config = load_config(name)
    tokenizer = None if config.model_type == "tokenexit" else tokenizer
    with torch.random.fork_rng(devices=[]):  # an encoder is loaded once more, under its labels
        model = load(name, tokenizer=tokenizer)
    old = [model.config.id2label[i] for i in range(model.num_labels)]
    for_words = any("TokenClass" in x for x in config.architectures or ["TokenClassification"])
    is_new = model.config.num_hidden_layers in model.untrained_heads()
    if len(labels) < 2 and (is_new or new_classifier or not for_words):
        raise ValueError(
            f"the training data has no label but {shown(labels)}; expected two or more for a new "
            "classifier (--column says where labels are)"
        )
    if is_new and tokenizer is not None:
        ids = {label: i for i, label in enumerate(labels)}
        return load(name, tokenizer=tokenizer, id2label=dict(enumerate(labels)), label2id=ids)
    if is_new or new_classifier or not for_words:
        set_labels(model, labels, keep=False)
        return model
    missing = [label for label in labels if label not in old]
    if len(missing) == len(labels):
        raise ValueError(
            f"{name} has a classifier of the labels {shown(old)}, the data has {shown(labels)}; "
            "expected labels in common, or --new-classifier (new_classifier=True) to start a new "
            "one on its encoder"
        )
    if missing:
        logger.warning(
            "added to the %d labels of %s: %s (--new-classifier starts a new classifier)",
            len(old),
            name,
            shown(missing),
        )
        set_labels(model, [*old, *missing], keep=True)
    return model


@torch.no_grad()
def set_labels(model: TokenExitForTokenClassification, names: Sequence[str], keep: bool):
    """Give the classifiers of all layers other labels.

    Args:
        names: all labels; with `keep` the present ones first, in their order.
        keep: trained classifiers keep their rows. A new row starts as the mean of the others, so
            that no prediction changes until it is trained. Else all are new.
    """
    config, heads, before = model.config, [], model.num_labels
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    new = model.untrained_heads() if keep else range(1, config.num_hidden_layers + 1)
    for number, old in enumerate(model.exit_heads, 1):
        head = _like(old, config, number)
        model._init_weights(head)
        if number not in new:
            for rows, kept in ((head.weight, old.weight), (head.bias, old.bias)):
                # Of neighbor heads: for the token itself, the one after it, the one before it.
                for row, its in zip(rows.split(len(names)), kept.split(before), strict=True):
                    row[:before] = its
                    row[before:] = its.mean(0)
        heads.append(head)
    model.num_labels = len(names)
    model.exit_heads = heads
    model.mark_untrained(new)


def choose_heads(
    model: TokenExitForTokenClassification,
    neighbor_heads: bool | str | None,
    default: bool | str = True,
):
    """Make a model's heads such as hear their neighbours, if that is wanted.

    Args:
        neighbor_heads: whether it is, see `tokenexit.convert`. None: the default where the loop for
            GPUs takes it, up to 85 labels; heads that hear already stay.

    Raises:
        ValueError: heads hear already that are not to.
    """
    there = model.config.neighbor_heads
    if neighbor_heads is None:
        fits = 3 * model.num_labels <= MOST_OUTPUTS
        neighbor_heads = max(there, default if fits else False, key=NEIGHBOR_HEADS.index)
    check_neighbor_heads("neighbor_heads", neighbor_heads)
    if NEIGHBOR_HEADS.index(there) > NEIGHBOR_HEADS.index(neighbor_heads):
        which = "its last classifier hear its" if there == "all" else "heads that hear their"
        raise ValueError(
            f"the tagger has {which} neighbours; expected it to keep them, or an "
            "encoder to start from"
        )
    let_heads_hear(model, neighbor_heads)


@torch.no_grad()
def let_heads_hear(model: TokenExitForTokenClassification, neighbor_heads: bool | str = True):
    """Make heads such as hear their neighbours; what they say stays the same.

    Args:
        neighbor_heads: those below the last, or "all", see `tokenexit.convert`.
    """
    if model.config.neighbor_heads == neighbor_heads:
        return
    model.config.neighbor_heads = neighbor_heads
    model.encoder.neighbor_heads = model.config.num_neighbor_heads
    heads, new = [], model.untrained_heads()
    for number, old in enumerate(model.exit_heads, 1):
        head = _like(old, model.config, number)
        for part, its in ((head.weight, old.weight), (head.bias, old.bias)):
            part[: len(its)] = its
        heads.append(head)
    model.exit_heads = heads
    model.mark_untrained(new)


def _like(old, config, number):
    """A new head where an old one is, in its dtype and mode; whatever the user's defaults are."""
    with torch.device("cpu"):
        head = head_of(config, number)
    return head.to(old.weight).train(old.training)
