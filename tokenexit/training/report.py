"""How a tagger in training exits, told after each epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from tokenexit.evaluate import tag_windows
from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy

__all__ = ["ReportExits"]


class ReportExits(TrainerCallback):
    """Logs after each epoch how fast a policy is, and how often labels are those of full depth.

    What a Trainer reports to gets `exit_speedup` in multiply-adds, `exit_agreement`, a share of
    words, `exit_mean_layer`, and `exit_layer_1`, ..., the share of words that left at each. For any
    Trainer of a tagger: `trainer.add_callback(ReportExits(trainer, tokenizer, words, policy))`.

    Args:
        trainer: it logs.
        tokenizer: of its model.
        sentences: lists of words; a hundred tell much.
        policy: of which to tell. None: the model's as it then is.

    Raises:
        ValueError: no words.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        sentences: Sequence[Sequence[str]],
        policy: ExitPolicy | None = None,
    ):
        if not any(sentences):
            raise ValueError("got sentences without a word; expected some to tell exits of")
        self.trainer, self.policy = trainer, policy
        self.tagger = Tagger(trainer.model, tokenizer)
        self.windows = self.tagger.windows(sentences)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Tag the sentences with and without exits, and log."""
        if not state.is_world_process_zero:
            return
        policy = self.tagger.model.policy if self.policy is None else self.policy
        real = tag_windows(self.tagger, self.windows, policy)
        whole = tag_windows(self.tagger, self.windows, ExitPolicy.never())
        depth = self.tagger.model.config.num_hidden_layers
        exits = torch.tensor([x for its in real.exits for x in its], device="cpu")
        shares = exits.bincount(minlength=depth + 1)[1:] / len(exits)
        pairs = zip(sum(real.labels, []), sum(whole.labels, []), strict=True)
        self.trainer.log(
            {
                "exit_speedup": real.speedup,
                "exit_agreement": sum(a == b for a, b in pairs) / len(exits),
                "exit_mean_layer": float(exits.double().mean()),
                **{f"exit_layer_{layer}": float(x) for layer, x in enumerate(shares, 1)},
            }
        )
