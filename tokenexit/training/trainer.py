"""Both stages of training, on transformers' Trainer."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tokenexit.evaluate import evaluate
from tokenexit.models.encoding import Window, collate
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.training.data import check_labels
from tokenexit.training.self_sampling import Remembered, SelfSampling, cached_exits, remember

logger = logging.getLogger(__name__)


class ExitTrainer(Trainer):
    """Trains all exit heads and the encoder.

    Stage 1 (`sampling` None) runs at full depth under the joint loss; stage 2 under exits that
    the model draws. Either goes through the layers that inference uses: a token that left costs
    nothing more.

    Args:
        model: the tagger.
        args: of the Trainer; see `training_arguments`.
        tokenizer: its fast tokenizer.
        train_data: sentences with `words` and `labels`, see `tokenexit.training.data`.
        dev_data: likewise, scored at full depth when the Trainer evaluates; or None.
        sampling: stage 2's; None for stage 1.
        head_learning_rate: of the exit heads; None for that of the encoder.
        metric: how to score `dev_data`, see `tokenexit.training.scoring.score`.
        progress: shows how far it is, in place of the Trainer's own bar and prints.
        kwargs: of the Trainer.

    Raises:
        ValueError: a label that the model does not know; no labels.
    """

    def __init__(
        self,
        model: TokenExitForTokenClassification,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        train_data: Dataset,
        dev_data: Dataset | None = None,
        sampling: SelfSampling | None = None,
        head_learning_rate: float | None = None,
        metric: str = "auto",
        progress: TrainerCallback | None = None,
        **kwargs,
    ):
        for data in filter(None, (train_data, dev_data)):
            check_labels(data, list(model.config.label2id))
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}; expected 0: the Trainer "
                "would smooth the last layer's loss only and not train the other heads"
            )
        if args.n_gpu > 1:  # DataParallel, which cannot split a list of policies
            logger.warning(
                "training on one of %d GPUs; launch with torchrun or accelerate to use all",
                args.n_gpu,
            )
            args._n_gpu = 1
        self.sampling = sampling
        self.head_learning_rate = head_learning_rate
        self.metric = metric
        self.tagger = Tagger(model, tokenizer, args.per_device_eval_batch_size)
        windows = self.tagger.windows(train_data["words"])
        ids = [[model.config.label2id[x] for x in labels] for labels in train_data["labels"]]
        labels = [ids[window.sentence] for window in windows]
        remembered = [None] * len(windows)
        if sampling is not None and sampling.needs_cache:
            remembered = remember(self.tagger, windows, labels, sampling.policy.criterion)
        super().__init__(
            model,
            args,
            data_collator=_Collator(tokenizer),
            train_dataset=list(zip(windows, labels, remembered, strict=True)),
            eval_dataset=dev_data,
            processing_class=tokenizer,
            **kwargs,
        )
        if progress is not None:
            self.remove_callback(PrinterCallback)
            self.remove_callback(ProgressCallback)
            self.add_callback(progress)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss under full depth or under drawn policies."""
        inputs = dict(inputs)
        known = inputs.pop("uncertainty", None)
        if self.sampling is None:
            inputs["policy"] = ExitPolicy.never()
        else:
            policies = self.sampling.draw(len(inputs["input_ids"]))
            inputs["policy"] = policies
            if self.sampling.exits == "cached":
                inputs["exit_layers"] = cached_exits(
                    known, inputs["attention_mask"], inputs["word_ids"], policies
                )
            if not self.sampling.flooding:
                inputs.pop("loss_floor", None)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def create_optimizer(self, model=None):
        """The Trainer's optimizer, with a learning rate of their own for the heads."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new or self.head_learning_rate is None:
            return optimizer
        heads = {id(p) for p in self.model.exit_heads.parameters()}
        for group in list(optimizer.param_groups):
            mine = [p for p in group["params"] if id(p) in heads]
            group["params"] = [p for p in group["params"] if id(p) not in heads]
            optimizer.add_param_group({**group, "params": mine, "lr": self.head_learning_rate})
        return optimizer

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Score the development data at full depth."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        result = evaluate(self.tagger, data, ExitPolicy.never(), metric=self.metric)
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in result.scores.items()
            if isinstance(value, float)
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class RichProgress(TrainerCallback):
    """A progress bar with the loss, and a line for each evaluation."""

    def __init__(self, console: Console, name: str = "training"):
        self.name = name
        self.bars = Progress(
            *Progress.get_default_columns(),
            MofNCompleteColumn(),
            "{task.fields[note]}",
            console=console,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        """Show the bar."""
        if state.is_world_process_zero:
            self.task = self.bars.add_task(self.name, total=state.max_steps, note="")
            self.bars.start()

    def on_step_end(self, args, state, control, **kwargs):
        """Move it."""
        if state.is_world_process_zero:
            self.bars.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the loss beside it; print scores."""
        if not state.is_world_process_zero or logs is None:
            return
        if "loss" in logs:
            self.bars.update(self.task, note=f"loss {float(logs['loss']):.3f}")
        if "eval_score" in logs:
            self.bars.console.print(f"epoch {state.epoch:g}: score {logs['eval_score']:.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        """Leave it as it is."""
        if state.is_world_process_zero:
            self.bars.stop()


class _Collator:
    """Windows, label ids of their sentences and what stage 1 made of them, to a padded batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(
        self, rows: Sequence[tuple[Window, Sequence[int], Remembered | None]]
    ) -> dict[str, torch.Tensor]:
        windows, labels, remembered = zip(*rows, strict=True)
        batch = collate(windows, self.tokenizer, labels)
        if remembered[0] is not None:
            shape = (*batch["input_ids"].shape, remembered[0].loss.shape[-1])
            batch["uncertainty"] = torch.full(shape, math.nan, dtype=torch.float32, device="cpu")
            batch["loss_floor"] = torch.zeros(shape, dtype=torch.float32, device="cpu")
            for row, (window, memory) in enumerate(zip(windows, remembered, strict=True)):
                firsts = window.first_pieces()
                batch["uncertainty"][row, firsts] = memory.uncertainty
                batch["loss_floor"][row, firsts] = memory.loss
        return batch


def training_arguments(
    output: str | os.PathLike,
    hidden_size: int,
    num_sentences: int,
    *,
    epochs: float | None = None,
    batch_size: int = 16,
    learning_rate: float | None = None,
    seed: int = 42,
    **settings,
) -> TrainingArguments:
    """Settings that train most taggers well.

    Args:
        output: folder of the checkpoints.
        hidden_size: d of the model.
        num_sentences: of the training data.
        epochs: None: 3, more where that would be fewer than 500 steps, but at most 20.
        learning_rate: None: `5e-5 * (768 / d)^2`, as narrow encoders want larger steps.
        settings: any field of `transformers.TrainingArguments`.

    Raises:
        TypeError: an unknown setting.
    """
    steps = max(1, math.ceil(num_sentences / batch_size))
    if epochs is None:
        epochs = min(20, max(3, math.ceil(500 / steps)))
    if learning_rate is None:
        learning_rate = 5e-5 * (768 / hidden_size) ** 2
    defaults = {
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,  # a share of all steps
        "weight_decay": 0.01,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_steps": 50,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        # A layer that no token of a batch reaches has no gradient.
        "ddp_find_unused_parameters": True if "LOCAL_RANK" in os.environ else None,
    }
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        remove_unused_columns=False,
        **{**defaults, **settings},
    )


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint in a folder that was written to its end; None if there is none.

    The Trainer writes `trainer_state.json` last.
    """
    complete = []
    for state in Path(folder).glob("checkpoint-*/trainer_state.json"):
        try:
            complete.append((json.loads(state.read_text())["global_step"], state.parent))
        except (json.JSONDecodeError, KeyError):
            continue
    return max(complete)[1] if complete else None
