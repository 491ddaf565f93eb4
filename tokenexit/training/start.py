"""What training starts from: an encoder, or a tagger whose labels stay."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tokenexit.layers import ExitHead
from tokenexit.models.checkpoint import load_config
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.text.scoring import shown

logger = logging.getLogger(__name__)


def load_to_train(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    new_classifier: bool = False,
) -> TokenExitForTokenClassification:
    """The model at a folder or hub name, with a classifier that knows `labels`.

    A fine-tuned classifier stays and its labels are matched by name; those that it lacks are added
    behind its own. An encoder without one gets a new one.

    Args:
        labels: of the training data.
        new_classifier: start a new one in any case.

    Raises:
        ValueError: a fine-tuned classifier that has none of the labels; see also
            `TokenExitForTokenClassification.from_pretrained`.
    """
    load = TokenExitForTokenClassification.from_pretrained
    config = load_config(name)
    tokenizer = None if config.model_type == "tokenexit" else tokenizer
    with torch.random.fork_rng(devices=[]):  # an encoder is loaded once more, under its labels
        model = load(name, tokenizer=tokenizer)
    old = [model.config.id2label[i] for i in range(model.num_labels)]
    for_words = any("TokenClass" in x for x in config.architectures or ["TokenClassification"])
    is_new = model.config.num_hidden_layers in model.untrained_heads()
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
    config, heads = model.config, []
    new = model.untrained_heads() if keep else range(1, config.num_hidden_layers + 1)
    for number, old in enumerate(model.exit_heads, 1):
        head = ExitHead(config.hidden_size, len(names), config.classifier_dropout)
        nn.init.normal_(head.weight, std=config.initializer_range)
        nn.init.zeros_(head.bias)
        if number not in new:
            for row, kept in ((head.weight, old.weight), (head.bias, old.bias)):
                row[: len(kept)] = kept
                row[len(kept) :] = kept.mean(0)
        heads.append(head.to(old.weight).train(old.training))
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    model.num_labels = len(names)
    model.exit_heads = heads
    model.mark_untrained(new)
