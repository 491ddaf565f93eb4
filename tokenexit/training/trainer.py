"""Both stages of training, on transformers' Trainer."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
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

from tokenexit.evaluate import check_annotated, evaluate
from tokenexit.files import check_same_record, remove_files, write_aside
from tokenexit.int8 import is_quantized
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.text.data import check_labels
from tokenexit.text.encoding import Window, collate
from tokenexit.text.scoring import choose_metric
from tokenexit.training.self_sampling import Remembered, SelfSampling, cached_exits, remember
from tokenexit.training.settings import OURS

__all__ = [
    "ExitTrainer",
    "RichProgress",
    "check_rate",
    "check_run",
    "check_same_run",
    "last_checkpoint",
    "remove_run",
    "training_arguments",
    "write_record",
]

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Fields of TrainingArguments that decide what comes out of a run.
_DECISIVE = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate", "seed"),
    *("gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "bf16", "fp16", "neftune_noise_alpha", "data_seed", "full_determinism"),
    *("dataloader_drop_last", "train_sampling_strategy"),
)
_RECORD = "run.json"
_SCORES = ("score", "precision", "recall", "accuracy")  # of an evaluation, always there


class ExitTrainer(Trainer):
    """Trains all exit heads and the encoder.

    Stage 1 (`sampling` None) runs at full depth under the joint loss; stage 2 under exits that
    the model draws. Either goes through the layers that inference uses: a token that left costs
    nothing more.

    Args:
        model: the tagger.
        args: of the Trainer; see `training_arguments`.
        tokenizer: its fast tokenizer.
        train_data: sentences with `words` and `labels`, see `tokenexit.text.data`.
        dev_data: likewise, scored at full depth when the Trainer evaluates; or None.
        sampling: stage 2's; None for stage 1.
        head_learning_rate: of the exit heads; None for that of the encoder.
        metric: how to score `dev_data`, see `tokenexit.text.scoring.score`.
        progress: shows how far it is, in place of the Trainer's own bar and prints.
        kwargs: of the Trainer.

    Raises:
        ValueError: a label in the training data that the model does not know; no labels; a metric
            that does not fit them; an 8-bit model; a setting outside its range.
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
        names = list(model.config.label2id)
        check_labels(train_data, names)
        if is_quantized(model):
            raise ValueError("got an 8-bit model to train; expected the fp32 one it was made from")
        check_rate("head_learning_rate", head_learning_rate)
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}; expected 0: the Trainer "
                "would smooth the last layer's loss only and not train the other heads"
            )
        if kwargs.get("compute_loss_func"):
            raise ValueError(
                "got a compute_loss_func; expected none: it would be of the last layer's logits "
                "only and not train the other heads"
            )
        if args.neftune_noise_alpha:
            raise ValueError(
                f"neftune_noise_alpha is {args.neftune_noise_alpha}; expected none: its noise is "
                "for padded embeddings, and these are packed"
            )
        if args.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "train_sampling_strategy is 'group_by_length'; expected another: packed sentences "
                "have no padding to save"
            )
        if args.n_gpu > 1:  # DataParallel, which cannot split a list of policies
            logger.warning(
                "training on one of %d GPUs; launch with torchrun or accelerate to use all",
                args.n_gpu,
            )
            args._n_gpu = 1
        self.sampling = sampling
        self.head_learning_rate = head_learning_rate
        self.tagger = Tagger(model, tokenizer, args.per_device_eval_batch_size)
        if dev_data is None:
            self.metric = choose_metric(metric, names)
        else:
            self.metric = check_annotated(self.tagger, dev_data, metric)
        best = (args.metric_for_best_model or "score").removeprefix("eval_")
        if best not in _SCORES:
            raise ValueError(f"metric_for_best_model is {best!r}; expected one of {_SCORES}")
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

    def record(self) -> dict[str, object]:
        """What the result of this run depends on, JSON-ready; to be asked before training."""
        data = model = 0
        for window, labels, _ in self.train_dataset:
            data = zlib.crc32(repr((window.input_ids, window.word_ids, labels)).encode(), data)
        ids = sorted(self.model.config.label2id.items())
        new = {id(self.model.exit_heads[n - 1]) for n in self.model.untrained_heads()}
        for part in self.model.modules():
            if id(part) not in new:
                for value in part.parameters(recurse=False):
                    bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                    model = zlib.crc32(bits.numpy(), model)
        return {
            "training data": f"{len(self.train_dataset)} sentences, {data:08x}",
            "labels": f"{self.model.num_labels}, {zlib.crc32(repr(ids).encode()):08x}",
            "model": f"{model:08x}",
            "neighbor_heads": self.model.config.neighbor_heads or None,  # as older runs say it
            "sampling": str(self.sampling),
            "head_learning_rate": self.head_learning_rate,
            **{name: str(getattr(self.args, name, None)) for name in _DECISIVE},
            "best": self._best(),
        }

    def _best(self):
        """What a choice among checkpoints, or a rate by scores, hangs on; None without."""
        args, data = self.args, self.eval_dataset
        if not _wants_best(vars(args)):
            return None
        dev = None if data is None else [list(data[name]) for name in ("words", "labels")]
        dev = zlib.crc32(repr(dev).encode())
        return f"{args.metric_for_best_model}, {args.eval_strategy}, {args.eval_steps}, {dev:08x}"

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

    @torch.inference_mode(False)
    @torch.enable_grad()
    def train(self, *args, **kwargs):
        """As in `Trainer`; within `torch.inference_mode` or `no_grad`, too.

        The model's dial and temperatures, which say what its weights do, are gone with these.

        Raises:
            ValueError: weights made in `torch.inference_mode`, which have no gradients; the weights
                it ends with are not finite.
        """
        if any(weight.is_inference() for weight in self.model.parameters()):
            raise ValueError(
                "got a model made in torch.inference_mode; expected one made or loaded outside, "
                "as its weights have no gradients"
            )
        self.model.dial = self.model.config.temperatures = None
        result = super().train(*args, **kwargs)
        for name, weight in self.model.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(
                    f"training ended with weights of {name} that are not finite; expected a lower "
                    f"learning rate than {self.args.learning_rate:g}, or sound data"
                )
        return result

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
        ValueError: a value outside its range; a setting that is an argument of its own.
    """
    for name, ours in OURS.items():
        if name in settings:
            raise ValueError(f"got the setting {name!r}; expected it as {ours}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    if epochs is None:
        a_step = batch_size * max(1, settings.get("gradient_accumulation_steps", 1))
        steps = max(1, math.ceil(num_sentences / a_step))
        epochs = min(20, max(3, math.ceil(500 / steps)))
    if learning_rate is None:
        learning_rate = 5e-5 * (768 / hidden_size) ** 2
    check_run(epochs, seed)
    check_rate("learning_rate", learning_rate)
    defaults = {
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,  # a share of all steps
        "weight_decay": 0.01,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_steps": 50,
        "report_to": settings.pop("report_to", None) or "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        # A layer that no token of a batch reaches has no gradient.
        "ddp_find_unused_parameters": True if "LOCAL_RANK" in os.environ else None,
        # The Trainer's default is the loss, which our evaluation does not give.
        "metric_for_best_model": "score" if _wants_best(settings) else None,
        "greater_is_better": True if _wants_best(settings) else None,
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


def _wants_best(settings) -> bool:
    return (
        bool(settings.get("load_best_model_at_end"))
        or settings.get("save_strategy") == "best"
        or settings.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    )


def check_run(epochs: float | None, seed: int):
    """Raise ValueError unless there can be so many epochs, and such a seed."""
    if epochs is not None and not 0 < epochs <= 10_000:
        raise ValueError(f"epochs is {epochs}; expected more than 0 and at most 10000")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; expected 0 to {2**32 - 1}")


def check_rate(name: str, rate: float | None):
    """Raise ValueError unless a learning rate is one that can be meant."""
    if rate is not None and not 0 <= rate <= 1:
        raise ValueError(f"{name} is {rate}; expected 0 to 1")


def write_record(folder: str | os.PathLike, record: dict[str, object]):
    """Keep an `ExitTrainer.record` beside its checkpoints."""
    with write_aside(Path(folder) / _RECORD) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")


def check_same_run(folder: str | os.PathLike, record: dict[str, object]):
    """Raise ValueError if the checkpoints in a folder are of another run than `record` says.

    Those of a version that kept no record are taken as they are, with a warning.
    """
    try:
        before = json.loads((Path(folder) / _RECORD).read_text())
    except (OSError, json.JSONDecodeError):
        logger.warning("%s does not say with which data and settings its run was started", folder)
        return
    check_same_record(folder, before, record)


def remove_run(folder: str | os.PathLike):
    """Remove what a run left in the folder of its checkpoints, and the folder if that was all."""
    for part in Path(folder).glob("checkpoint-*"):
        shutil.rmtree(part)
    remove_files(Path(folder), Path(folder) / _RECORD)


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint in a folder to go on from; None if there is none.

    That is one that was written to its end, of which the Trainer writes `trainer_state.json` last,
    with the state of the optimizer and of the rate, which `save_only_model` leaves out.
    """
    complete = []
    for state in Path(folder).glob("checkpoint-*/trainer_state.json"):
        if not state.with_name("scheduler.pt").exists():
            continue
        try:
            complete.append((json.loads(state.read_text())["global_step"], state.parent))
        except (json.JSONDecodeError, KeyError):
            continue
    return max(complete)[1] if complete else None
