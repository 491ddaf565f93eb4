"""Stage 2: train under exits that the model itself draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from tokenexit.models.tagger import Tagger
from tokenexit.ops.pack_tokens import pack
from tokenexit.policy import ExitPolicy
from tokenexit.reference import uncertainty
from tokenexit.schedule import Schedule, simulate_exits
from tokenexit.text.encoding import Window


@dataclass(frozen=True)
class SelfSampling:
    """How the policy of each training sentence is drawn.

    Args:
        policy: what is not drawn of it: its criterion, copy, neighbors, growth and min_active.
        windows: windows to draw from, evenly.
        thresholds: (lowest, highest) threshold; drawn evenly between.
        full_depth: share of each batch that runs without exits (sandwich rule). Of a batch that it
            gives no whole number of, chance rounds it.
        aggressive: share that runs at the smallest window and the highest threshold.
        exits: "online": drawn by the model as it is. "cached": by the uncertainties it had
            after stage 1 (the authors' way).
        flooding: the loss of a token at a layer is `|loss - its loss after stage 1|`.

    Raises:
        ValueError: a value outside these.

    Source: Li et al. 2021 (arXiv 2105.13878), section 3.4; Yu and Huang 2019 for the sandwich.
    """

    policy: ExitPolicy = field(default_factory=ExitPolicy)
    windows: Sequence[int] = (0, 1, 2, 4)
    thresholds: tuple[float, float] = (0.02, 0.5)
    full_depth: float = 0.25
    aggressive: float = 0.25
    exits: str = "online"
    flooding: bool = False

    def __post_init__(self):
        if self.exits not in ("online", "cached"):
            raise ValueError(f"exits is {self.exits!r}; expected 'online' or 'cached'")
        if not self.windows:
            raise ValueError("windows is empty; expected at least one")
        low, high = self.thresholds
        if not 0 <= low <= high <= 1:
            raise ValueError(f"thresholds are {self.thresholds}; expected 0 <= low <= high <= 1")
        if min(self.full_depth, self.aggressive) < 0 or self.full_depth + self.aggressive > 1:
            raise ValueError(
                f"full_depth and aggressive are {self.full_depth} and {self.aggressive}; expected "
                "shares of a batch, at most 1 together"
            )

    @property
    def needs_cache(self) -> bool:
        """Whether the stage-1 model has to be run over the training data first."""
        return self.flooding or self.exits == "cached"

    def draw(self, num_sentences: int) -> list[ExitPolicy]:
        """A policy for each sentence of a batch, drawn with torch's generator."""
        windows = torch.randint(len(self.windows), (num_sentences,), device="cpu").tolist()
        shares = torch.rand(num_sentences, dtype=torch.float32, device="cpu").tolist()
        ends = [
            part * num_sentences for part in (self.full_depth, self.full_depth + self.aggressive)
        ]
        chance = 0 if all(end % 1 == 0 for end in ends) else torch.rand((), device="cpu").item()
        full, either = (int(end + chance) for end in ends)
        low, high = self.thresholds
        policies = []
        for i, (index, share) in enumerate(zip(windows, shares, strict=True)):
            window, threshold = self.windows[index], low + share * (high - low)
            if i < full:
                threshold = 0.0
            elif i < either:
                window, threshold = min(self.windows), high
            policies.append(
                self.policy.replace(
                    level="token", window=window, threshold=threshold, schedule="constant"
                )
            )
        return policies


@dataclass(frozen=True)
class Remembered:
    """What the stage-1 model made of the words of one window, layer by layer.

    Attributes:
        uncertainty: `[n, L]`.
        loss: `[n, L]` cross-entropy.
    """

    uncertainty: torch.Tensor
    loss: torch.Tensor


def remember(
    tagger: Tagger,
    windows: Sequence[Window],
    labels: Sequence[Sequence[int]],
    criterion: str = "entropy",
) -> list[Remembered]:
    """Run the model once at full depth over the training windows.

    Args:
        labels: for each window the label ids of all words of its sentence.
    """
    result = [None] * len(windows)
    for indices, output, firsts in tagger.run(
        windows, ExitPolicy.never(), output_layer_logits=True
    ):
        for row, index in enumerate(indices):
            logits = output.layer_logits[:, row, firsts[row]].float().cpu()  # [L, n, C]
            own = windows[index]
            wanted = torch.tensor(labels[index][own.first_word :][: own.n_words], device="cpu")
            wanted = wanted.long().expand(len(logits), -1)
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            result[index] = Remembered(
                uncertainty(logits, criterion == "max_prob").T.clone(),
                loss.view(len(logits), -1).T.clone(),
            )
    return result


def cached_exits(
    known: torch.Tensor,
    attention_mask: torch.Tensor,
    word_ids: torch.Tensor,
    policies: Sequence[ExitPolicy],
) -> torch.Tensor:
    """Exit layers `[B, N]` that remembered uncertainties `[B, N, L]` lead to.

    Read at words' first tokens; tokens that are no word's get the last layer.
    """
    packed = pack(attention_mask, word_ids)
    num_layers = known.shape[-1]
    schedule = Schedule.of(policies, num_layers, packed.num_sentences, known)
    # A sentence's stand-in word, where none is marked, has no label and may run to the end.
    at_words = packed.pack(known)[packed.first_token].nan_to_num(1.0)
    exits = simulate_exits(at_words.T.contiguous(), packed.cu_words, schedule)
    word = packed.word_of_token
    return packed.unpack(torch.where(word < 0, num_layers, exits[word.clamp(min=0)]))
