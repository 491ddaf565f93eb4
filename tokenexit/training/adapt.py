"""From a fine-tuned tagger to one whose tokens leave early, with text and no labels."""

from __future__ import annotations

import copy
import inspect
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from tokenexit import promise
from tokenexit.calibrate import (
    TIMED_SENTENCES,
    Calibration,
    check_types,
    chosen_types,
    make_dial,
)
from tokenexit.dial import percent
from tokenexit.evaluate import check_annotated, check_timing_runs, check_wanted, evaluate
from tokenexit.int8 import quantize
from tokenexit.models.convert import convert
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.temperature import fit_temperatures
from tokenexit.text.encoding import Window, collate, load_tokenizer
from tokenexit.training.heads import distill_heads
from tokenexit.training.self_sampling import SelfSampling
from tokenexit.training.start import choose_heads
from tokenexit.training.trainer import (
    ExitTrainer,
    check_run,
    check_same_run,
    last_checkpoint,
    training_arguments,
    write_record,
)

if TYPE_CHECKING:
    from datasets import Dataset

_MOST_HELD_OUT = 3000


@dataclass(frozen=True)
class Adapted:
    """Result of `adapt`.

    Attributes:
        tagger: at the fastest speed that is promised; its model has the dial.
        calibration: of the sentences kept aside, against the model that was adapted.
        scores: for each speed of the dial the score on annotated data, of `metric`; or None.
        original_wall: time of the model as transformers runs it, in padded batches of equal
            lengths, over that of the result at full depth, here; or None.
    """

    tagger: Tagger
    calibration: Calibration
    scores: list[float] | None = None
    metric: str | None = None
    original_wall: float | None = None

    def to_dict(self) -> dict:
        """What was measured, JSON-ready."""
        return {
            **self.calibration.to_dict(),
            "scored": self.metric,
            "scores": self.scores,
            "original_wall": self.original_wall,
        }


@torch.inference_mode(False)  # what it makes is to be trained
def adapt(
    model: str | os.PathLike | PreTrainedModel,
    texts: Sequence[str] | Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    tune: bool = False,
    neighbor_heads: bool | None = None,
    int8: bool = False,
    max_disagreement: float = 0.01,
    confidence: float = 0.9,
    per_layer: bool = False,
    per_type: bool | Sequence[str] = False,
    annotated: Dataset | None = None,
    metric: str = "auto",
    epochs: float | None = None,
    batch_size: int = 32,
    timing_runs: int = 3,
    device: str | torch.device | None = None,
    memory_mib: int = 2048,
    seed: int = 42,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    checkpoints: str | os.PathLike | None = None,
    resume: bool = False,
) -> Adapted:
    """Make a fine-tuned token classifier one whose tokens leave early; no labels are needed.

    The encoder and the classifier stay as they are, so at full depth the result is the model. The
    heads below are trained on a part of the texts to say what the classifier says; by this part,
    too, a path of policies is found. The other part tests it, see
    `tokenexit.calibrate.make_dial`.

    Args:
        model: a fine-tuned Hugging Face token classifier, or its folder or name on the hub. It is
            not changed, nor is anything written.
        texts: texts, or lists of words, as those that will be tagged.
        tokenizer: of the model. None: the one beside it, for a folder or a name.
        tune: train encoder and classifier as well, by self-sampling on the labels that the model
            gives the texts; takes longer, goes faster, and full depth is no longer the model.
        neighbor_heads: heads below the last that hear their neighbours, see `tokenexit.convert`.
            None: where the loop for GPUs takes them, up to 85 labels.
        int8: give the result 8-bit weights, for the CPU; all that is measured and promised is of
            these, held against the labels of the model as it was. With this or `tune`, one that
            was saved in 16 bits goes on in fp32: 16 bits lose the small steps of training.
        max_disagreement, confidence, per_layer, per_type: of the promise, see `make_dial`: labels
            are held against the model's.
        annotated: sentences with `words` and `labels`, to score each speed on, and to fit the
            temperatures of confidences by.
        metric: of that, see `tokenexit.text.scoring.score`.
        epochs: of `tune`; None: see `training_arguments`.
        batch_size: sentences a forward pass.
        timing_runs: of the wall clock of each speed.
        device: to do it on, as "cuda", where the result stays. None: where the model is.
        memory_mib: that the states of words may take, see `distill_heads`.
        seed: of everything random.
        progress: called with (what, done, total).
        checkpoints: of `tune`: a folder for them, after each epoch. None: none are kept.
        resume: of `tune`: go on from the last of them.

    Raises:
        ValueError: epochs or a seed out of range; a model without a trained classifier; too few
            texts for the promise; see also `tokenexit.convert`.
        TypeError: a model without its tokenizer.
    """
    check_run(epochs, seed)
    check_timing_runs(timing_runs)
    for name, value in (("max_disagreement", max_disagreement), ("confidence", confidence)):
        promise.check_share(name, value)
    check_wanted("epochs", epochs is not None, "tune", tune)
    check_wanted("checkpoints", checkpoints is not None, "tune", tune)
    check_wanted("resume", resume, "tune", tune)
    check_wanted("metric", metric != "auto", "annotated", annotated is not None)
    if memory_mib < 1:
        raise ValueError(f"memory_mib is {memory_mib}; expected 1 or more")
    checkpoint = None if checkpoints is None else last_checkpoint(checkpoints)
    if resume and checkpoint is None:
        raise ValueError(f"got resume, but no complete checkpoint is in {checkpoints}")
    if not resume and checkpoint is not None:
        raise ValueError(f"{checkpoints} has a run already; expected resume, or it removed")
    if tune:  # told now, if it can't be
        from datasets import Dataset
    if neighbor_heads == "all":
        raise ValueError("neighbor_heads is 'all'; expected True or False: the last one stays")
    if isinstance(model, (str, os.PathLike)):
        tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
        adapted = TokenExitForTokenClassification.from_pretrained(model, tokenizer=tokenizer)
    elif tokenizer is None:
        raise TypeError(f"got a {type(model).__name__} without its tokenizer; expected that, too")
    else:
        adapted = convert(model, tokenizer)
    if adapted.config.num_hidden_layers in adapted.untrained_heads():
        raise ValueError(
            f"{model if isinstance(model, str) else 'the model'} has no trained classifier; "
            "expected a token classifier that was fine-tuned"
        )
    choose_heads(adapted, neighbor_heads)
    adapted.eval()
    if (tune or int8) and adapted.dtype.itemsize < 4:
        adapted.float()
    if device is not None:
        adapted.to(device)
    if int8:
        quantize(copy.deepcopy(adapted))  # told now, if it can't be
    adapted.policy, adapted.dial, adapted.config.temperatures = ExitPolicy.never(), None, None
    tagger = Tagger(adapted, tokenizer, batch_size)
    if annotated is not None:
        metric = check_annotated(tagger, annotated, metric)
    words = [words for words in tagger.split(texts) if words]
    held = _held_out(len(words), max_disagreement, confidence)
    order = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(len(words), generator=order, device="cpu").tolist()
    words = [words[i] for i in order]
    apart, words = words[:held], words[held:]

    reference = labels = None
    if tune or int8:
        labels = [x.labels for x in tagger.stream(words)]
        reference = [x.labels for x in tagger.stream(apart)]
    if type_of := chosen_types(tagger, per_type):  # told now, if these are too few
        check_types(
            reference or [x.labels for x in tagger.stream(apart)],
            type_of,
            max_disagreement,
            confidence,
            lambda tested: 2 * tested,
        )
    distill_heads(
        tagger, tagger.windows(words), memory_mib=memory_mib, seed=seed, progress=progress
    )
    if tune:
        data = Dataset.from_dict({"words": words, "labels": labels})
        _tune(tagger, data, epochs, seed, progress, checkpoints, resume)
    if int8:
        quantize(adapted)
    found = make_dial(
        tagger,
        apart,
        max_disagreement,
        confidence,
        reference=reference,
        known=words,
        known_reference=labels,
        per_layer=per_layer,
        per_type=per_type,
        timing_runs=timing_runs,
        seed=seed,
        progress=progress,
    )
    adapted.policy, adapted.dial = found.chosen.policy, found.dial
    scores = None
    if annotated is not None:
        scores = []
        for number, speed in enumerate(found.dial.speeds, 1):
            scores.append(evaluate(tagger, annotated, speed.policy, metric=metric).score)
            progress("score", number, len(found.dial.speeds))
        speeds = zip(found.dial.speeds, scores, strict=True)
        speeds = tuple(replace(speed, score=score) for speed, score in speeds)
        found = replace(found, dial=replace(found.dial, speeds=speeds, metric=metric))
        adapted.dial = found.dial
        some = (found.dial.at("full"), found.dial.at("fastest"))
        policies = dict.fromkeys((adapted.policy, *(speed.policy for speed in some)))
        adapted.config.temperatures = fit_temperatures(tagger, annotated, policies)
    original_wall, original = None, model
    if timing_runs and not isinstance(original, PreTrainedModel):
        original = AutoModelForTokenClassification.from_pretrained(model)
    if timing_runs and not isinstance(original, TokenExitForTokenClassification):
        some = tagger.windows(apart[-TIMED_SENTENCES:])
        original_wall = _time_original(original, tagger, some, timing_runs)
    return Adapted(tagger, found, scores, metric if scores else None, original_wall)


def _held_out(sentences: int, max_disagreement: float, confidence: float) -> int:
    """How many of the sentences are kept aside for calibration: half, more for few."""
    least = promise.least(max_disagreement, confidence)
    held = max(min(sentences // 2, _MOST_HELD_OUT), least)
    if 5 * held > 4 * sentences:
        raise ValueError(
            f"got {sentences} texts with words; expected at least {-(-5 * least // 4)}, to promise "
            f"that less than {percent(max_disagreement, 2)} of labels change with a confidence of "
            f"{confidence:g}"
        )
    return held


class _Steps(TrainerCallback):
    """Tells the Trainer's steps."""

    def __init__(self, progress: Callable[[str, int, int], None]):
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        """One more."""
        self.progress("tune", state.global_step, state.max_steps)


def _tune(tagger: Tagger, data: Dataset, epochs, seed, progress, checkpoints, resume):
    device = tagger.model.device
    with tempfile.TemporaryDirectory() as nowhere:
        folder = Path(nowhere if checkpoints is None else checkpoints)
        settings = training_arguments(
            folder,
            tagger.model.config.hidden_size,
            len(data),
            epochs=epochs,
            seed=seed,
            save_strategy="no" if checkpoints is None else "epoch",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        trainer = ExitTrainer(
            tagger.model,
            settings,
            tagger.tokenizer,
            data,
            sampling=SelfSampling(),
            head_learning_rate=1e-3,
            progress=_Steps(progress),
        )
        if resume:
            check_same_run(folder, trainer.record())
        else:
            write_record(folder, trainer.record())
        trainer.train(resume_from_checkpoint=str(last_checkpoint(folder)) if resume else None)
    tagger.model.to(device).eval()  # from where the Trainer had it


@torch.inference_mode()
def _time_original(
    original: PreTrainedModel, tagger: Tagger, windows: Sequence[Window], runs: int
) -> float:
    """Time of a model of transformers over that of the tagger at full depth, in alternation."""
    original = copy.deepcopy(original).to(tagger.model.device).eval()
    order = sorted(windows, key=lambda window: len(window.input_ids))
    batches, taken = [], inspect.signature(original.forward).parameters
    for start in range(0, len(order), tagger.batch_size):
        batch = collate(order[start : start + tagger.batch_size], tagger.tokenizer).items()
        batches.append({name: value.to(original.device) for name, value in batch if name in taken})
    ratios = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        for batch in batches:
            original(**batch).logits[0, 0, 0].item()
        theirs = time.perf_counter() - start
        start = time.perf_counter()
        for _, output, _ in tagger.run(windows, ExitPolicy.never()):
            output.logits[0, 0, 0].item()
        ratios.append(theirs / (time.perf_counter() - start))
    return statistics.median(ratios[1:])  # the first round warms up
