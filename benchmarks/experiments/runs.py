"""One run: how a tagger is made, and the trainer that makes it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import AutoTokenizer, TrainerCallback, set_seed

from experiments import sources
from experiments.signals import HEADS, heads_of, logits_of
from tokenexit.calibrate import WINDOWS
from tokenexit.models.loss import exit_loss
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.models.tagger import Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.text.data import label_names
from tokenexit.training.self_sampling import SelfSampling
from tokenexit.training.trainer import ExitTrainer, last_checkpoint, training_arguments

LOSSES = ("joint", "even", "last", "distilled")
DTYPES = ("float32", "bfloat16")
_HEADS = "heads.safetensors"


@dataclass(frozen=True)
class Run:
    """A tagger to make, and the policies to read it with.

    Attributes:
        name: of the run; `-SEED` is added where a plan gives several seeds.
        data, encoder: see `sources`.
        start: the run whose tagger this one goes on from. None: from the encoder.
        teacher: the run whose full-depth labels a "distilled" loss follows. None: the tagger's own
            last layer.
        loss: "joint" (each layer, weighted by its number), "even" (each alike), "last" (the last
            layer only), or "distilled" (each layer follows the teacher's last, and with a teacher
            labels as much).
        distill_last: only the last layer does.
        head: "linear", or a key of `signals.HEADS` for heads of another kind, whose exits are
            simulated only.
        neighbor_heads: heads that hear their neighbours, see `tokenexit.convert`.
        sampling: fields of `SelfSampling`, with those of its policy under "policy"; None: full
            depth.
        layers: keep the first so many layers of the encoder.
        sentences: of the training data, the first of a shuffle; None: all.
        epochs, batch_size, learning_rate, head_learning_rate: see `training_arguments`.
        seconds: train no longer than that; the learning rate falls with the steps or with the
            time, whichever is further.
        freeze_words: word embeddings stay as they are.
        seed: of everything random.
        read: names of `KINDS` of policies whose speeds are read; () for full depth only.
        dtype: "float32" or "bfloat16", that the tagger and a teacher are read in; it trains in
            float32.
        settings: more fields of `transformers.TrainingArguments`.
    """

    name: str
    data: str
    encoder: str
    start: str | None = None
    teacher: str | None = None
    loss: str = "joint"
    distill_last: bool = False
    head: str = "linear"
    neighbor_heads: bool | str = False
    sampling: Mapping | None = None
    layers: int | None = None
    sentences: int | None = None
    epochs: float = 3
    seconds: float | None = None
    batch_size: int = 16
    learning_rate: float | None = None
    head_learning_rate: float | None = 1e-3
    freeze_words: bool = False
    seed: int = 1
    read: tuple[str, ...] = ()
    dtype: str = "float32"
    settings: Mapping = field(default_factory=dict)

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"{self.name}: loss is {self.loss!r}; expected one of {LOSSES}")
        if self.head != "linear" and (self.head not in HEADS or self.read or self.start):
            raise ValueError(
                f"{self.name}: head is {self.head!r}; expected 'linear', or one of {[*HEADS]} "
                "without start and read"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name}: dtype is {self.dtype!r}; expected one of {DTYPES}")
        if self.sampling is not None and self.loss != "joint":
            raise ValueError(f"{self.name}: self-sampling has the joint loss; got {self.loss!r}")
        if unknown := set(self.read) - KINDS.keys():
            raise ValueError(f"{self.name}: read has {sorted(unknown)}; expected of {[*KINDS]}")

    @property
    def self_sampling(self) -> SelfSampling | None:
        """How stage 2 draws its policies."""
        if self.sampling is None:
            return None
        fields = dict(self.sampling)
        policy = ExitPolicy(**fields.pop("policy", {}))
        if "thresholds" in fields:
            fields["thresholds"] = tuple(fields["thresholds"])
        return SelfSampling(policy, **fields)


def _of(*growths: float, windows: Sequence[int] = WINDOWS, **fields) -> list[ExitPolicy]:
    """Of every growth with every window, whose thresholds are yet to be found."""
    growths = growths or (1.0,)
    return [ExitPolicy(window=k, growth=g, **fields) for g in growths for k in windows]


BY_CLOCK = "token, by clock"

# Policies by kind: of those the best is chosen.
KINDS: dict[str, list[ExitPolicy]] = {
    "token": _of(),
    "token, no window": _of(windows=[0]),
    "token, max_prob": _of(criterion="max_prob"),
    "token, pre_norm": _of(copy="pre_norm"),
    "token, recompute": _of(neighbors="recompute"),
    "token, doubling": _of(schedule="doubling"),
    "token, growing": _of(1.5, 2.0),
    "token, growing, no window": _of(1.5, 2.0, windows=[0]),
    "token, growing, max_prob": _of(1.5, 2.0, criterion="max_prob"),
    # Thresholds are learned, from the best of these.
    "token, per layer": _of(),
    "token, growing, per layer": _of(1.5, 2.0),
    # The best of those that a run has read before, as bold as the clock wants.
    BY_CLOCK: [],
    "authors": [ExitPolicy.authors_code(window=k) for k in WINDOWS],
    "sentence": [ExitPolicy.sentence()],
    "sentence, growing": _of(1.5, 2.0, windows=[0], level="sentence"),
    **{f"token, window {k}": _of(windows=[k]) for k in (1, 2, 4, 8)},
}


class OutOfTime(Exception):
    """The budget ended within a run; what it has trained lies in its last checkpoint."""


class _Deadline(TrainerCallback):
    """Ends training when a run's own time is up, and with a checkpoint when all time is."""

    def __init__(self, end: float, seconds: float | None):
        self.end, self.seconds = end, seconds
        self.reached, self.began = False, None

    def on_step_end(self, args, state, control, **kwargs):
        # A first step, in which kernels are compiled, is none of the run's time.
        self.began = self.began or time.monotonic()
        if self.share_spent() >= 1:
            control.should_training_stop = True
        elif time.monotonic() > self.end and state.global_step < state.max_steps:
            self.reached = control.should_save = control.should_training_stop = True

    def share_spent(self) -> float:
        """Of the run's own time."""
        if self.began is None or self.seconds is None:
            return 0.0
        return (time.monotonic() - self.began) / self.seconds


class _Trainer(ExitTrainer):
    """`ExitTrainer` with the losses of `Run`."""

    def __init__(
        self,
        *args,
        run: Run,
        teacher: nn.Module | None,
        deadline: _Deadline,
        heads: nn.ModuleList | None = None,
        **kwargs,
    ):
        super().__init__(*args, callbacks=[deadline], **kwargs)
        self.run, self.teacher, self.deadline, self.heads = run, teacher, deadline, heads

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Linear, by steps or by the run's own time."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.run.seconds is not None:
            scheduler.lr_lambdas = [self._slower(rate) for rate in scheduler.lr_lambdas]
        return scheduler

    def _slower(self, rate):
        return lambda step: min(rate(step), max(0.0, 1 - self.deadline.share_spent()))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.run.loss == "joint" and self.heads is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        at_words = labels != -100
        wanted = labels[at_words]
        if self.heads is None:
            output = model(**inputs, policy=ExitPolicy.never(), output_layer_logits=True)
            logits = output.layer_logits
        else:
            output = model(**inputs, policy=ExitPolicy.never(), output_hidden_states=True)
            logits = logits_of(self.heads, output.hidden_states, inputs["attention_mask"] != 0)
        logits = logits[:, at_words].float()  # [L, n, C]
        if self.run.loss == "joint":
            loss = exit_loss([(slice(None), layer) for layer in logits], wanted, len(logits))
        elif self.run.loss == "distilled":
            if self.teacher is None:
                target = logits[-1].detach()
            else:
                with torch.no_grad():
                    target = self.teacher(**inputs, policy=ExitPolicy.never()).logits
                target = target[at_words].float()
            target = target.softmax(-1)
            if self.run.distill_last:
                logits = logits[-1:]
            losses = torch.stack([F.cross_entropy(layer, target) for layer in logits])
            by_labels = torch.stack([F.cross_entropy(layer, wanted) for layer in logits])
            if self.teacher is None:
                loss = torch.cat([losses[:-1], by_labels[-1:]]).mean()
            else:
                loss = (losses + by_labels).mean() / 2
        elif self.run.loss == "last":
            loss = F.cross_entropy(logits[-1], wanted)
        else:
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.repeat(len(logits)))
        return (loss, output) if return_outputs else loss


def train(
    run: Run,
    splits: sources.Splits,
    folder: Path,
    finished: Mapping[str, Path],
    end: float,
    device: str,
    texts: Path | None = None,
) -> Tagger:
    """The run's tagger: trained, or as it was saved in `folder`.

    Args:
        folder: for checkpoints, from which a run that was cut off goes on, and the tagger.
        finished: taggers of other runs, by name.
        end: `time.monotonic()` at which to stop.
        device: "cpu" or "cuda".
        texts: see `sources.encoder`.

    Raises:
        OutOfTime: it was reached; the next call goes on.
    """
    done = folder / "tagger"
    if done.is_dir():
        return _load(done, device)
    set_seed(run.seed)
    data = splits.train
    if run.sentences is not None:
        data = data.shuffle(run.seed).take(run.sentences)
    if run.start is not None:
        tagger = _load(finished[run.start], device)
    else:
        tagger = new(run, splits, device, texts)
    model = tagger.model.train()
    if run.layers is not None:
        model = truncated(model, run.layers)
    model.embeddings.word.weight.requires_grad_(not run.freeze_words)
    checkpoints = folder / "checkpoints"
    arguments = training_arguments(
        checkpoints,
        model.config.hidden_size,
        len(data),
        epochs=run.epochs,
        batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        seed=run.seed,
        use_cpu=device == "cpu",
        disable_tqdm=True,
        **run.settings,
    )
    deadline = _Deadline(end, run.seconds)
    heads = None
    if run.head != "linear":
        heads = heads_of(run.head, model.config).to(device).train()
        for own, other in zip(model.exit_heads, heads, strict=True):
            own.other = other  # to be trained and kept in checkpoints as heads are
    teacher = None
    if run.teacher is not None:
        teacher = _load(finished[run.teacher], device).model.to(getattr(torch, run.dtype))
    trainer = _Trainer(
        model,
        arguments,
        tagger.tokenizer,
        data,
        sampling=run.self_sampling,
        head_learning_rate=run.head_learning_rate,
        run=run,
        deadline=deadline,
        teacher=teacher,
        heads=heads,
    )
    checkpoint = last_checkpoint(checkpoints)
    spent = seconds_trained(folder)
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    folder.mkdir(parents=True, exist_ok=True)
    spent += time.monotonic() - start
    (folder / "spent.json").write_text(
        json.dumps({"seconds": spent, "steps": trainer.state.global_step})
    )
    if deadline.reached:
        raise OutOfTime(run.name)
    trainer.tagger.model.eval()
    if heads is not None:
        save_model(heads, str(folder / _HEADS))
        for own in model.exit_heads:
            del own.other
    trainer.tagger.save_pretrained(done)
    return _load(done, device)  # without what the Trainer has put around its forward


def trained_heads(run: Run, folder: Path, config) -> nn.ModuleList | None:
    """A trained run's heads; None: those of its tagger."""
    if run.head == "linear":
        return None
    heads = heads_of(run.head, config)
    load_model(heads, str(folder / _HEADS))
    return heads.eval()


def seconds_trained(folder: Path) -> float:
    """Seconds that a run has trained so far."""
    path = folder / "spent.json"
    return json.loads(path.read_text())["seconds"] if path.exists() else 0.0


def told_of(folder: Path) -> str:
    """Steps and seconds that a run has trained, in words."""
    spent = json.loads((folder / "spent.json").read_text())
    each = 1e3 * spent["seconds"] / max(spent["steps"], 1)
    return f"{spent['steps']} steps in {spent['seconds']:.0f} s, {each:.1f} ms each"


def _load(folder: Path, device: str) -> Tagger:
    tagger = Tagger.from_pretrained(folder)
    tagger.model.to(device)
    return tagger


def new(run: Run, splits: sources.Splits, device: str, texts: Path | None = None) -> Tagger:
    """A tagger of the run's encoder, for the labels of its data, untrained."""
    folder = sources.encoder(run.encoder, texts)
    # Of all splits, as the label set of a task is known.
    names = sorted({name for part in dataclasses.astuple(splits) for name in label_names(part)})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = TokenExitForTokenClassification.from_pretrained(
        folder,
        tokenizer=tokenizer,
        neighbor_heads=run.neighbor_heads,
        dtype=torch.float32,  # though it may be stored in half precision
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return Tagger(model.to(device), tokenizer)


def truncated(model: TokenExitForTokenClassification, layers: int):
    """The same model with its first layers only, in place; its last head is new."""
    if not 0 < layers <= len(model.encoder.layers):
        raise ValueError(f"layers is {layers}; expected 1 to {len(model.encoder.layers)}")
    model.encoder.layers = model.encoder.layers[:layers]
    model.encoder.heads = model.encoder.heads[:layers]
    model.config.num_hidden_layers = layers
    return model
