"""What else could say that a word may leave: other signals and other heads, exits simulated.

All of it is read from one pass at full depth, as if words that left went on to be computed, so that
a signal or a head is compared before a loop has to know it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from experiments.reading import TARGETS
from experiments.thresholds import annotated
from tokenexit.calibrate import WINDOWS, Sweep
from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.reference import uncertainty

_TEMPERATURES = [2 ** (i / 8) for i in range(-24, 25)]
_HALVINGS = 14


class Adapter(nn.Module):
    """A classifier with a bottleneck of its own before it: `[B, N, d] -> [B, N, C]`.

    The trunk's states need not be what each layer's classifier wants.
    """

    def __init__(self, d: int, num_labels: int):
        super().__init__()
        self.down, self.up = nn.Linear(d, d // 4), nn.Linear(d // 4, d)
        self.classify = nn.Linear(d, num_labels)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.classify(h + self.up(F.gelu(self.down(h))))


class Neighbors(nn.Module):
    """A classifier of a token and those beside it: `[B, N, d] -> [B, N, C]`."""

    def __init__(self, d: int, num_labels: int):
        super().__init__()
        self.classify = nn.Conv1d(d, num_labels, 3, padding=1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.classify(h.mT).mT


HEADS: dict[str, type[nn.Module]] = {
    "plain": nn.Linear,  # what the others are held against: trained and read as they are
    "adapter": Adapter,
    "neighbors": Neighbors,
}


def heads_of(kind: str, config) -> nn.ModuleList:
    """A new head of that kind for each layer of a model, with dropout before it."""
    sizes, dropout = (config.hidden_size, config.num_labels), config.hidden_dropout_prob
    layers = range(config.num_hidden_layers)
    return nn.ModuleList([nn.Sequential(nn.Dropout(dropout), HEADS[kind](*sizes)) for _ in layers])


def logits_of(heads: nn.ModuleList, states: Sequence[torch.Tensor], real: torch.Tensor):
    """What heads say of a batch's states at full depth.

    Args:
        states: `[B, N, d]`, before the first layer and after each.
        real: `[B, N]` bool, False at padding.

    Returns:
        `[L, B, N, C]`.
    """
    real = real[..., None]
    return torch.stack([head(h * real) for head, h in zip(heads, states[1:], strict=True)])


class Words(Sweep):
    """A sweep of all words that keeps their logits, of a tagger's heads or of others."""

    def __init__(self, tagger: Tagger, data: Dataset, heads: nn.ModuleList | None = None):
        super().__init__(tagger, data, "auto")
        if heads is not None:
            heads = heads.to(tagger.model.device, tagger.model.dtype)
        logits = [None] * len(self.windows)
        wanted = "output_layer_logits" if heads is None else "output_hidden_states"
        for indices, output, firsts in tagger.run(
            self.windows, ExitPolicy.never(), **{wanted: True}
        ):
            if heads is None:
                found = output.layer_logits
            else:
                with torch.inference_mode():
                    found = logits_of(heads, output.hidden_states, output.exit_layers > 0)
            for row, index in enumerate(indices):
                logits[index] = found[:, row, firsts[row]].float().cpu()
        self.logits = torch.cat(logits, 1)  # [L, W, C]
        self.best = self.logits.argmax(-1)

    def by(self, signal: torch.Tensor) -> Sweep:
        """The same words, leaving by another signal `[L, W]` in [0, 1]."""
        other = copy.copy(self)
        other.uncertainty = dict.fromkeys(self.uncertainty, signal)
        return other


def _margin(logits: torch.Tensor) -> torch.Tensor:
    first, second = logits.softmax(-1).topk(2).values.unbind(-1)
    return 1 - (first - second)


def _agreeing(logits: torch.Tensor) -> torch.Tensor:
    """Entropy; a word whose label is not that of the layer before stays."""
    best, unsure = logits.argmax(-1), uncertainty(logits, False)
    same = F.pad(best[1:] == best[:-1], (0, 0, 1, 0))
    return torch.where(same, unsure, 1.0)


def _of_two_layers(logits: torch.Tensor) -> torch.Tensor:
    unsure = uncertainty(logits, False)
    return torch.cat([unsure[:1], (unsure[1:] + unsure[:-1]) / 2])


def _growing(signal: Callable[[torch.Tensor], torch.Tensor]):
    """The signal against thresholds that grow by half from layer to layer."""
    return lambda logits: signal(logits) / 1.5 ** torch.arange(len(logits))[:, None]


_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "entropy": lambda logits: uncertainty(logits, False),
    "max_prob": lambda logits: uncertainty(logits, True),
    "margin of the two best labels": _margin,
    "entropy, label as the layer before": _agreeing,
}
SIGNALS = {
    **_PLAIN,
    "entropy, mean with the layer before": _of_two_layers,
    **{f"{name}, growing": _growing(signal) for name, signal in _PLAIN.items()},
}
TEMPERED = "entropy, a temperature for each head"


def temperatures(words: Words) -> torch.Tensor:
    """Of each layer `[L, 1, 1]` the temperature under which annotated labels are likeliest."""
    gold = annotated(words)
    losses = [
        [F.cross_entropy(layer / t, gold, ignore_index=-1).item() for t in _TEMPERATURES]
        for layer in words.logits
    ]
    best = [_TEMPERATURES[loss.index(min(loss))] for loss in losses]
    return torch.tensor(best)[:, None, None]


def read_signals(dev: Words, test: Words) -> Iterator[dict]:
    """A row for each signal and target: the best window on development data, read on test data."""
    tempered = temperatures(dev)
    ways = {name: (way(dev.logits), way(test.logits)) for name, way in SIGNALS.items()}
    ways[TEMPERED] = tuple(uncertainty(x.logits / tempered, False) for x in (dev, test))
    for name, (of_dev, of_test) in ways.items():
        on_dev, on_test = dev.by(of_dev), test.by(of_test)
        for target in TARGETS:
            policies = [just_fast_enough(on_dev, window, target) for window in WINDOWS]
            points = [on_dev.point(policy) for policy in policies if policy is not None]
            if not points:
                continue
            best = max(points, key=lambda point: point.score)
            real = on_test.point(best.policy)
            yield {
                "signal": name,
                "target": target,
                "window": best.policy.window,
                "threshold": best.policy.threshold,
                "dev": best.score,
                "test": real.score,
                "dev_speedup": round(best.speedup, 3),
                "flops_speedup": round(real.speedup, 3),
            }


def just_fast_enough(sweep: Sweep, window: int, target: float) -> ExitPolicy | None:
    """The policy of that window with the lowest threshold that reaches the speed, if any does."""
    low, high = 0.0, 1.0
    policy = ExitPolicy(window=window, threshold=high)
    if sweep.speedup(sweep.exits(policy)) < target:
        return None
    for _ in range(_HALVINGS):
        middle = policy.replace(threshold=(low + high) / 2)
        if sweep.speedup(sweep.exits(middle)) >= target:
            policy, high = middle, middle.threshold
        else:
            low = middle.threshold
    return policy
