"""Confidences that mean what they say: a temperature for each layer that words leave at.

The logits of a layer are divided by its temperature before they become a confidence. Labels and
exits do not change.

Source: Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv 1706.04599).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy

if TYPE_CHECKING:
    from datasets import Dataset

FEWEST = 200  # words that a layer's own temperature wants; with fewer it is that of all words
_LEAST, _MOST = 0.05, 20.0


def fit_temperatures(
    tagger: Tagger, data: Dataset, policies: Iterable[ExitPolicy]
) -> list[float] | None:
    """The temperature of each layer under which the right labels are likeliest.

    Args:
        tagger: is not changed; its `model.config.temperatures` takes the result.
        data: annotated sentences that it was not trained on.
        policies: words count at the layer where they leave, under each.

    Returns:
        L numbers above 0. None: of no word the model knows the label.
    """
    ids, depth = tagger.model.config.label2id, tagger.model.config.num_hidden_layers
    windows, gold = tagger.windows(data["words"]), list(data["labels"])
    logits, layers, wanted = [], [], []
    for policy in policies:
        for indices, output, firsts in tagger.run(windows, policy):
            found = zip(indices, output.logits.cpu(), output.exit_layers.cpu(), firsts, strict=True)
            for index, its_logits, its_layers, places in found:
                window = windows[index]
                start = window.first_word
                names = gold[window.sentence][start : start + window.n_words]
                logits.append(its_logits[places].double())
                layers.append(its_layers[places])
                wanted += [ids.get(name, -1) for name in names]
    if not wanted:
        return None
    logits, layers = torch.cat(logits), torch.cat(layers)
    wanted = torch.tensor(wanted, dtype=torch.int64, device="cpu")
    known = wanted >= 0
    if not known.any():
        return None
    together = best_temperature(logits[known], wanted[known])
    mine = [known & (layers == layer) for layer in range(1, depth + 1)]
    return [
        best_temperature(logits[its], wanted[its]) if its.sum() >= FEWEST else together
        for its in mine
    ]


def best_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """What to divide logits `[n, C]` by for the labels `[n]` to be likeliest, from 1/20 to 20.

    The loss is convex in what they are multiplied by.
    """
    low, high = 1 / _MOST, 1 / _LEAST
    for _ in range(80):
        third = (high - low) / 3
        losses = [F.cross_entropy(logits * x, labels) for x in (low + third, high - third)]
        low, high = (low, high - third) if losses[0] < losses[1] else (low + third, high)
    return 2 / (low + high)
