"""What the commands share: their options, the streams, loading and reading."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from rich import console
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column as TableColumn
from rich.table import Table

from tokenexit.dial import percent, rounded_down
from tokenexit.policy import ExitPolicy

# Names and texts of users are no markup: brackets in a path are its own.
Console = partial(console.Console, markup=False, emoji=False)
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Folder of a tagger that `train` wrote.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        help="CoNLL columns, CoNLL-U, JSON lines, or NAME[:CONFIG][@SPLIT] of `datasets`.",
    ),
]
Column = Annotated[
    str | None,
    typer.Option(help="Where the labels are: a column's number or a key. Default: the last."),
]
Format = Annotated[
    str | None,
    typer.Option("--format", help="conll, conllu, jsonl, text or dataset. Default: by the name."),
]
Metric = Annotated[str, typer.Option(help="auto, entity_f1, word_f1 or accuracy.")]
MOST = 2**31 - 1  # that a number of things may be
BatchSize = Annotated[int, typer.Option(help="Sentences a forward pass.", min=1, max=MOST)]
Threshold = Annotated[
    float | None, typer.Option(help="In place of the model's; the first layer's, if they grow.")
]
Window = Annotated[int | None, typer.Option(help="In place of the model's window.")]
Level = Annotated[str | None, typer.Option(help="token or sentence, in place of the model's.")]
MinActive = Annotated[
    int | None, typer.Option(help="Active words worth a further layer, in place of the model's.")
]
Int8 = Annotated[bool, typer.Option("--int8", help="8-bit weights: faster on a CPU, less exact.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="fp32, bf16 or fp16, to compute in; not with --int8. Default: as saved."),
]
Speed = Annotated[
    str | None,
    typer.Option(
        help="Of the calibrated ones: full, promised, fastest, a number of times fewer "
        "multiply-adds, or as '2 wall', a number of times as fast where they were timed."
    ),
]
PerLayer = Annotated[
    bool,
    typer.Option(
        "--per-layer",
        help="Promise it of the words that left by each layer by themselves, too.",
    ),
]
PerType = Annotated[
    str | None,
    typer.Option(
        help="Promise it of the words of each type by themselves, too: 'all', or some as 'PER,LOC'."
    ),
]
Decoding = Annotated[
    str,
    typer.Option(
        help="argmax: each word's best label; constrained: the best labels of a sentence that can "
        "stand beside each other."
    ),
]
Device = Annotated[str | None, typer.Option(help="To run on, as cuda. Default: the CPU.")]
Revision = Annotated[
    str | None, typer.Option(help="Of a tagger on the hub: a branch, a tag or a commit.")
]
FullDepth = Annotated[bool, typer.Option("--full-depth", help="No early exits.")]


def _folder(name: str) -> Path:
    if not name:  # as of a variable that is not set: Path("") is "."
        raise typer.BadParameter("is empty; expected a folder")
    return Path(name)


Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", parser=_folder, metavar="PATH", help="Folder to write the tagger to."
    ),
]
Epochs = Annotated[float | None, typer.Option(help="Default: 3, more for small data.")]
LearningRate = Annotated[float | None, typer.Option(help="Default: 5e-5 (768 / width)^2.")]
HeadLearningRate = Annotated[float, typer.Option(help="Learning rate of the exit heads.")]
NeighborHeads = Annotated[
    str | None,
    typer.Option(
        help="Which classifiers hear those of the tokens beside a token: none, those below the "
        "last, or all. Default: all new ones, up to 85 labels, which GPUs take.",
    ),
]
Seed = Annotated[int, typer.Option(help="Runs with equal seeds are equal.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Dev = Annotated[str | None, typer.Option(help="Data to score after each epoch.")]
Copy = Annotated[str | None, typer.Option(help="post_norm or pre_norm. Default: the tagger's.")]
Criterion = Annotated[
    str | None, typer.Option(help="entropy or max_prob. Default: both are tried.")
]
Schedule = Annotated[str | None, typer.Option(help="constant or doubling. Default: the tagger's.")]
Growth = Annotated[
    float | None,
    typer.Option(help="From layer to layer, of thresholds. Default: 1, 1.5 and 2 are tried."),
]
Neighbors = Annotated[str | None, typer.Option(help="frozen or recompute. Default: the tagger's.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE, any field of transformers.TrainingArguments."),
]


def load_tagger(
    model: str, batch_size: int, int8: bool = False, dtype: str | None = None, **settings
):
    """The tagger; of settings, what `Tagger.from_pretrained` takes, those that are not None."""
    import torch

    from tokenexit.models.tagger import Tagger

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in (None, *dtypes):
        raise ValueError(f"--dtype is {dtype!r}; expected {', '.join(dtypes)}")
    if int8 and dtype is not None:
        raise ValueError(f"--int8 excludes --dtype {dtype}")
    be_quiet()
    check_model_name(model)
    settings = {name: value for name, value in settings.items() if value is not None}
    if "revision" in settings and Path(model).exists():
        got = settings["revision"]
        raise ValueError(f"got --revision {got} for a folder, {model}; expected a name on the hub")
    with device_errors(settings.get("device")):
        return Tagger.from_pretrained(
            model, int8, dtypes.get(dtype), batch_size=batch_size, **settings
        )


@contextmanager
def device_errors(device: str | None):
    """A ValueError in place of what torch says of a device that it was built without."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"--device is {device!r}: {error}") from None


def check_model_name(name: str):
    """Raise OSError at once if no model has this name; loading would try for long."""
    import huggingface_hub

    if Path(name).is_dir():
        return
    if Path(name).exists():
        raise NotADirectoryError(f"{name} is a file; expected a model's folder, or its hub name")
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor a name on the hub: {error}"
        ) from error


def read_data(source: str, column: str | None, format: str | None, labelled: bool = True):
    """Sentences of a file or folder, or of NAME[:CONFIG][@SPLIT]."""
    from tokenexit.text.data import check_hub_name, is_missing_path, read_sentences

    def is_there() -> bool:
        return Path(source).expanduser().exists()

    split = config = None
    if not is_there():
        source, _, split = source.partition("@")
    if not is_there():
        source, _, config = source.partition(":")
    by_name = format == "dataset" or (format is None and not is_missing_path(source))
    if by_name and not is_there():
        check_hub_name(source)
    found = read_sentences(
        source,
        column=_number(column),
        split=split or None,
        config=config or None,
        format=format,
        labelled=labelled,
    )
    if labelled and "labels" not in found.column_names:
        raise ValueError(
            f"{source} has words without labels; expected a column or key of labels (--column)"
        )
    return found


def read_texts(source: str, format: str | None) -> list[str | list[str]]:
    """Like `read_data`, without labels: texts, or lists of words where the source has these."""
    from tokenexit.text import data

    path = Path(source).expanduser()
    if path.exists() and not path.is_dir() and format != "dataset":
        return data.read_texts(source, format=format)
    return read_data(source, None, format, labelled=False)["words"]


def _number(column: str | None) -> int | str | None:
    return int(column) if re.fullmatch("-?[0-9]+", column or "") else column


def be_quiet():
    """Our own messages only."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with suppress(ImportError):  # tagging does without
        import datasets

        datasets.disable_progress_bars()


def check_heads(model, name: str, policy: ExitPolicy | None = None):
    """Raise ValueError if labels would come from classifiers that were never trained."""
    if heads := model.untrained_heads(policy):
        no_tagger = heads[-1] == model.config.num_hidden_layers
        raise ValueError(
            f"{name} has {'no classifier' if no_tagger else 'no exits'} yet: those at layer "
            f"{', '.join(map(str, heads))} were never trained; expected a tagger that `tokenexit "
            f"train` wrote{'' if no_tagger or policy is None else ', or --full-depth'}"
        )


_OF_POLICY = 16  # at least: "threshold 0.0065"
_TYPES_BESIDE = 6  # with names of ten letters in 80 columns


def dial_table(dial, columns: Mapping[str, list[str]] = MappingProxyType({})) -> Group:
    """The speeds of a dial, from full depth to the boldest, and how far the promise goes.

    As narrow as they can be: most terminals have 80 columns. Types have a table of their own.

    Args:
        columns: more of them, by their heads, each with a text for each speed.
    """
    speeds = dial.speeds
    within = 0 if dial.promised is None else dial.promised + 1
    texts = {"multiply-\nadds": [f"{rounded_down(one.speedup)}x" for one in speeds]}
    if speeds[0].wall_speedup:
        texts["wall\nclock"] = [f"{rounded_down(one.wall_speedup)}x" for one in speeds]
    texts["other\nlabels"] = [f"{one.disagreement:.2%}" for one in speeds]
    texts[f"with {percent(dial.confidence, 0)}\nbelow"] = [f"{one.bound:.2%}" for one in speeds]
    texts |= {**columns, "": ["\u2713" if i < within else "" for i in range(len(speeds))]}
    policy = TableColumn("policy", overflow="fold", min_width=_OF_POLICY)
    table = Table(policy, box=SIMPLE_HEAD, pad_edge=False)
    for name in texts:
        table.add_column(name, justify="right", no_wrap=True)
    for policy, *cells in zip((one.policy for one in speeds), *texts.values(), strict=True):
        table.add_row(str(policy), *cells)
    parts = [table, f"\u2713 promised: {dial.promise}" if within else "nothing is promised"]
    for start in range(0, len(dial.per_type), _TYPES_BESIDE):
        names = dial.per_type[start : start + _TYPES_BESIDE]
        kinds = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("other labels of", *names):
            kinds.add_column(name, justify="right", overflow="fold")
        for text, one in zip(texts["multiply-\nadds"], speeds, strict=True):
            kinds.add_row(text, *(f"{one.by_type[name]:.2%}" for name in names))
        parts.append(kinds)
    return Group(*parts)


def parse_types(names: str | None) -> bool | list[str]:
    """What `--per-type` says, as `make_dial` takes it."""
    if names is None or names == "all":
        return names is not None
    return [name.strip() for name in names.split(",")]


def parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    from tokenexit.training.settings import parse_setting

    settings = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set got {pair!r}; expected NAME=VALUE")
        try:
            settings[name] = parse_setting(name, value)
        except ValueError as error:
            raise ValueError(f"--set {pair}: {error}") from None
    return settings


def hearing(neighbor_heads: str | None, last: bool = True) -> bool | str | None:
    """What `--neighbor-heads` means in Python; without `last`, all is not offered."""
    values = {None: None, "none": False, "below": True, "all": "all"}
    if neighbor_heads not in values or (neighbor_heads == "all" and not last):
        expected = "none, below or all" if last else "none or below"
        raise ValueError(f"got --neighbor-heads {neighbor_heads}; expected {expected}")
    return values[neighbor_heads]


def need_stdout():
    if sys.__stdout__ is None:
        raise OSError("standard output is closed; expected it open for the results")


@contextmanager
def progress_bars():
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=err) as bars:
        tasks = {}

        def update(what: str, done: int, total: int):
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=max(done, total))

        yield update
