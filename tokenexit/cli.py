"""The command line."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import console
from rich.table import Table

from tokenexit import __version__
from tokenexit.policy import ExitPolicy

app = typer.Typer(
    help="Taggers whose tokens exit early: train, calibrate, evaluate, tag.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},  # of the commands, too
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
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
BatchSize = Annotated[int, typer.Option(help="Sentences a forward pass.", min=1)]
Threshold = Annotated[float | None, typer.Option(help="In place of the model's threshold.")]
Window = Annotated[int | None, typer.Option(help="In place of the model's window.")]
Level = Annotated[str | None, typer.Option(help="token or sentence, in place of the model's.")]
MinActive = Annotated[
    int | None, typer.Option(help="Active words worth a further layer, in place of the model's.")
]
Int8 = Annotated[bool, typer.Option("--int8", help="8-bit weights: faster on a CPU, less exact.")]
FullDepth = Annotated[bool, typer.Option("--full-depth", help="No early exits.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write the tagger to.")]
Epochs = Annotated[float | None, typer.Option(help="Default: 3, more for small data.")]
LearningRate = Annotated[float | None, typer.Option(help="Default: 5e-5 (768 / width)^2.")]
HeadLearningRate = Annotated[float, typer.Option(help="Learning rate of the exit heads.")]
Seed = Annotated[int, typer.Option(help="Runs with equal seeds are equal.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Dev = Annotated[str | None, typer.Option(help="Data to score after each epoch.")]
Copy = Annotated[str | None, typer.Option(help="post_norm or pre_norm. Default: the tagger's.")]
Criterion = Annotated[str | None, typer.Option(help="entropy or max_prob. Default: the tagger's.")]
Schedule = Annotated[str | None, typer.Option(help="constant or doubling. Default: the tagger's.")]
Neighbors = Annotated[str | None, typer.Option(help="frozen or recompute. Default: the tagger's.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE, any field of transformers.TrainingArguments."),
]


def _version(wanted: bool):
    if wanted:
        print(f"tokenexit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
):
    pass


@app.command()
def train(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Encoder or tagger: a folder or a hub name.")
    ],
    data: Data,
    output: Output,
    dev: Dev = None,
    column: Column = None,
    format: Format = None,
    epochs: Epochs = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: LearningRate = None,
    head_learning_rate: HeadLearningRate = 1e-3,
    metric: Metric = "auto",
    seed: Seed = 42,
    resume: Resume = False,
    new_classifier: Annotated[
        bool, typer.Option("--new-classifier", help="Take the encoder only of a fine-tuned tagger.")
    ] = False,
    set: Settings = None,
):
    """Stage 1: train an encoder with a head after each layer.

    Example: `tokenexit train -m bert-base-cased -d train.conll --dev dev.conll -o tagger`
    """
    from transformers import AutoTokenizer

    _quiet()
    from tokenexit.models.modeling import load_config
    from tokenexit.training.data import label_names
    from tokenexit.training.start import load_to_train

    run = _planned(
        output,
        dev,
        epochs,
        batch_size,
        learning_rate,
        head_learning_rate,
        metric,
        seed,
        resume,
        set,
    )
    load_config(model)  # told before the data is read, if there is none
    train_data = _read(data, column, format)
    dev_data = dev and _read(dev, column, format)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tagger_model = load_to_train(model, tokenizer, label_names(train_data), new_classifier)
    run(tagger_model, tokenizer, train_data, dev_data, ExitPolicy.never())


@app.command("self-sample")
def self_sample(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder that `train` wrote.")],
    data: Data,
    output: Output,
    dev: Dev = None,
    column: Column = None,
    format: Format = None,
    epochs: Epochs = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: LearningRate = None,
    head_learning_rate: HeadLearningRate = 1e-3,
    exits: Annotated[
        str, typer.Option(help="online (by the current model) or cached (by stage 1's).")
    ] = "online",
    flooding: Annotated[
        bool, typer.Option("--flooding", help="Keep each loss at its level after stage 1.")
    ] = False,
    copy: Annotated[str, typer.Option(help="post_norm or pre_norm.")] = "post_norm",
    criterion: Annotated[str, typer.Option(help="entropy or max_prob.")] = "entropy",
    max_threshold: Annotated[float, typer.Option(help="Highest threshold drawn.")] = 0.5,
    metric: Metric = "auto",
    seed: Seed = 42,
    resume: Resume = False,
    set: Settings = None,
):
    """Stage 2: train under exits that the model itself draws.

    Example: `tokenexit self-sample -m tagger -d train.conll --dev dev.conll -o tagger-exits`
    """
    from tokenexit.training.self_sampling import SelfSampling

    sampling = SelfSampling(
        ExitPolicy(copy=copy, criterion=criterion),
        thresholds=(min(SelfSampling.thresholds[0], max_threshold), max_threshold),
        exits=exits,
        flooding=flooding,
    )
    run = _planned(
        output,
        dev,
        epochs,
        batch_size,
        learning_rate,
        head_learning_rate,
        metric,
        seed,
        resume,
        set,
    )
    train_data = _read(data, column, format)
    dev_data = dev and _read(dev, column, format)
    tagger = _tagger(model, batch_size)
    _check_heads(tagger.model, model)
    # Calibration goes on with this kind of copies and criterion.
    policy = sampling.policy.replace(threshold=0.0)
    run(tagger.model, tagger.tokenizer, train_data, dev_data, policy, sampling)


def _planned(
    output, dev, epochs, batch_size, learning_rate, head_learning_rate, metric, seed, resume,
    settings,
):  # fmt: skip
    """What trains a model as the options say; these are checked now, before any work."""
    from tokenexit.files import disk_errors
    from tokenexit.models.modeling import check_output_folder
    from tokenexit.training.scoring import check_metric
    from tokenexit.training.trainer import (
        ExitTrainer,
        RichProgress,
        check_rate,
        check_same_run,
        last_checkpoint,
        training_arguments,
        write_record,
    )

    checkpoints = output / "checkpoints"
    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "disable_tqdm": True,
        "eval_strategy": "no" if dev is None else "epoch",
        **_settings(settings),
    }
    training_arguments(checkpoints, 768, 1, **options)
    check_rate("head_learning_rate", head_learning_rate)
    check_metric(metric)
    check_output_folder(output)
    checkpoint = last_checkpoint(checkpoints)
    if resume and checkpoint is None:
        raise ValueError(f"--resume: no complete checkpoint in {checkpoints}")
    if not resume and checkpoint is not None:
        raise ValueError(
            f"{checkpoints} has a run already: give --resume to go on with it, or remove it"
        )

    def run(model, tokenizer, train_data, dev_data, policy, sampling=None):
        if any(model.policy.thresholds(model.config.num_hidden_layers)[:-1]):
            err.print(
                f"the policy of before ({model.policy}) does not fit what is trained now: full "
                "depth until the next `calibrate`"
            )
        model.policy = policy
        arguments = training_arguments(
            checkpoints, model.config.hidden_size, len(train_data), **options
        )
        trainer = ExitTrainer(
            model,
            arguments,
            tokenizer,
            train_data,
            dev_data,
            sampling,
            head_learning_rate,
            metric=metric,
            progress=RichProgress(err),
        )
        record = trainer.record()
        if resume:
            check_same_run(checkpoints, record)
        elif trainer.is_world_process_zero():
            write_record(checkpoints, record)
        with disk_errors(output):
            trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
            if trainer.is_world_process_zero():
                trainer.tagger.save_pretrained(output)
                out.print(f"wrote {output}", soft_wrap=True)

    return run


@app.command()
def calibrate(
    model: Model,
    data: Data,
    target_speedup: Annotated[
        float | None, typer.Option(help="At least this much faster, in multiply-adds.")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="At most this much below full depth; 0.005 (default) is half a point."),
    ] = None,
    copy: Copy = None,
    criterion: Criterion = None,
    schedule: Schedule = None,
    neighbors: Neighbors = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for calibration.json and calibration.png.")
    ] = None,
    verify: Annotated[
        int | None,
        typer.Option(
            help="At most so many policies run with real exits. Default: all needed.", min=1
        ),
    ] = None,
    column: Column = None,
    format: Format = None,
    metric: Metric = "auto",
    batch_size: BatchSize = 32,
):
    """Pick the policy from development data and store it in the tagger.

    Examples: `tokenexit calibrate tagger -d dev.conll --max-loss 0.005`,
    `tokenexit calibrate tagger -d dev.conll --target-speedup 3 --report report`
    """
    from tokenexit.calibrate import calibrate as run
    from tokenexit.calibrate import plot, policy_grid
    from tokenexit.files import write_folder_aside
    from tokenexit.models.modeling import check_tagger_folder
    from tokenexit.training.scoring import check_metric

    check_metric(metric)
    check_tagger_folder(model)
    for folder in filter(None, (model, report)):
        with write_folder_aside(folder):  # told now, if it can't be
            pass
    tagger = _tagger(model, batch_size)
    kinds = {"criterion": criterion, "copy": copy, "schedule": schedule, "neighbors": neighbors}
    base = tagger.model.policy.replace(
        threshold=0.0, **{name: value for name, value in kinds.items() if value is not None}
    )
    with _progress() as progress:
        result = run(
            tagger,
            _read(data, column, format),
            target_speedup=target_speedup,
            max_loss=max_loss,
            policies=policy_grid(base),
            verify=verify,
            metric=metric,
            progress=progress,
        )
    tagger.model.policy = result.chosen.policy
    _save_config(tagger.model, model)
    table = Table("policy", result.metric, "speed-up", "", title="verified with real exits")
    table.add_row("full depth", f"{result.full_depth.score:.4f}", "1.00", "")
    for point in result.verified:
        mark = "chosen" if point.policy == result.chosen.policy else ""
        table.add_row(str(point.policy), f"{point.score:.4f}", f"{point.speedup:.2f}", mark)
    out.print(table)
    if report:
        with write_folder_aside(report) as aside:
            text = json.dumps(result.to_dict(), indent=2) + "\n"
            (aside / "calibration.json").write_text(text)
            plot(result, aside / "calibration.png")
        out.print(f"wrote {report}/calibration.json and {report}/calibration.png", soft_wrap=True)
    out.print(f"policy of {model}: {result.chosen.policy}", soft_wrap=True)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    threshold: Threshold = None,
    window: Window = None,
    level: Level = None,
    min_active: MinActive = None,
    full_depth: FullDepth = False,
    int8: Int8 = False,
    timing_runs: Annotated[
        int, typer.Option(help="Timed runs against full depth, in alternation; 0 for none.", min=0)
    ] = 3,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    column: Column = None,
    format: Format = None,
    metric: Metric = "auto",
    batch_size: BatchSize = 32,
):
    """Score a tagger, and what its exits save.

    Example: `tokenexit evaluate tagger -d test.conll`
    """
    from tokenexit.evaluate import evaluate as run
    from tokenexit.training.scoring import check_metric

    _need_stdout()
    check_metric(metric)
    tagger = _tagger(model, batch_size, int8)
    policy = _policy(tagger.model.policy, threshold, window, level, min_active, full_depth)
    _check_heads(tagger.model, model, policy)
    result = run(
        tagger, _read(data, column, format), policy, metric=metric, timing_runs=timing_runs
    )
    if json_output:
        print(json.dumps(result.to_dict()))
        return
    table = Table("", "", show_header=False)
    table.add_row("policy", str(policy))
    for name, value in result.scores.items():
        shown = f"{value:.4f}" if isinstance(value, float) else json.dumps(value)
        table.add_row(name, shown)
    table.add_row("mean exit layer", f"{result.mean_exit_layer:.2f}")
    table.add_row("words leaving at layer 1, 2, ...", " ".join(map(str, result.exits_per_layer)))
    table.add_row("speed-up, multiply-adds", f"{result.flops_speedup:.2f}")
    if result.wall_speedup is not None:
        table.add_row("speed-up, wall clock here", f"{result.wall_speedup:.2f}")
        table.add_row("words a second", f"{result.words_per_second:.0f}")
    out.print(table)


@app.command()
def predict(
    model: Model,
    input: Annotated[str, typer.Argument(help="File to tag; - for standard input.")] = "-",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File. Default: standard output.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Of the input: text, conll, conllu or jsonl. Default: by the name, else text.",
        ),
    ] = None,
    output_format: Annotated[
        str, typer.Option(help="jsonl, or conll: a row a word, an empty line after each sentence.")
    ] = "jsonl",
    threshold: Threshold = None,
    window: Window = None,
    level: Level = None,
    min_active: MinActive = None,
    full_depth: FullDepth = False,
    int8: Int8 = False,
    batch_size: BatchSize = 32,
    buffer: Annotated[int, typer.Option(help="Sentences held at a time.", min=1)] = 1024,
):
    """Tag a file or a stream, in order, in constant memory.

    Of text and JSON lines, the n-th result is that of line n, empty ones too. A file is written
    aside and renamed at the end, so that an interrupted run leaves none; pipes and devices are
    written to as they are.

    Examples: `echo "Ada lives in London" | tokenexit predict tagger`,
    `tokenexit predict tagger news.txt -o news.conll --output-format conll`
    """
    from tokenexit.training.data import stream_sentences

    formats = {"jsonl": _as_json, "conll": _as_conll}
    if output_format not in formats:
        raise ValueError(f"--output-format is {output_format!r}; expected jsonl or conll")
    with _open(input) as lines, _to(output) as write:
        sentences = stream_sentences(lines, format)
        tagger = _tagger(model, batch_size, int8)
        policy = _policy(tagger.model.policy, threshold, window, level, min_active, full_depth)
        _check_heads(tagger.model, model, policy)
        for number, tagged in enumerate(tagger.stream(sentences, policy, buffer), 1):
            write(formats[output_format](tagged, number))
    if output is not None:
        err.print(f"wrote {output}", soft_wrap=True)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the tagger, picture and tables.")
    ] = Path("tokenexit-demo"),
    sentences: Annotated[int, typer.Option(help="Training sentences.", min=1)] = 2000,
    seed: Seed = 42,
):
    """The main job on a real encoder and real text: train, self-sample, calibrate, tag.

    Example: `tokenexit demo`
    """
    from tokenexit.demo import run

    _quiet()
    run(output, sentences, seed, out)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Folder of a tagger.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the two ways of attention, for the tagger.")
    ] = False,
):
    """What is installed here; of a tagger, its shape, labels, policy, and what loop runs it.

    Last, what projecting all keys and carrying active queries have been measured to cost on this
    machine, in microseconds. `--measure` does so for layers of the tagger's sizes, fp32 and 8 bits:
    from then on these costs choose between the two ways, in place of a built-in table.

    Examples: `tokenexit info`, `tokenexit info tagger`, `tokenexit info tagger --measure`
    """
    import torch
    import transformers

    from tokenexit import costs, ops, static

    _need_stdout()
    table = Table("", "", show_header=False)
    table.add_row("tokenexit", __version__)
    table.add_row("python", sys.version.split()[0])
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    table.add_row("transformers", transformers.__version__)
    built = ops.extension_available()
    devices = " and ".join(sorted(ops.compiled_devices("compact_active"))).upper()
    table.add_row("compiled ops", f"for {devices}" if built else f"no: {ops.extension_error()}")
    if built:
        table.add_row("processor", costs.processor())
        have = ", ".join(ops.instruction_sets())
        table.add_row("instruction set", f"{ops.instruction_set()}, of {have}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if gpu != "none" and (what := static.lacks()):
        gpu += f", used slowly: {what} is missing"
    table.add_row("GPU", gpu)
    if model is not None:
        loaded = _tagger(model, 1).model
        config = loaded.config
        table.add_row("tagger", model)
        table.add_row(
            "encoder",
            f"{config.source_model_type}, {config.num_hidden_layers} layers of "
            f"{config.hidden_size}, at most {config.max_tokens} tokens",
        )
        table.add_row("parameters", f"{sum(p.numel() for p in loaded.parameters()) / 1e6:.1f} M")
        table.add_row("labels", " ".join(config.id2label.values()))
        table.add_row("policy", str(loaded.policy))
        table.add_row("loop", loaded.loop)
        if measure:
            if not built:
                raise ValueError(
                    f"nothing to measure without compiled ops: {ops.extension_error()}"
                )
            heads = config.num_attention_heads
            for dtype in (torch.float32, torch.int8, torch.bfloat16):
                costs.calibrate(config.hidden_size, config.intermediate_size, heads, dtype)
    elif measure:
        raise ValueError("--measure wants a tagger, whose layers to time")
    out.print(table)
    if measured := costs.measured():
        table = Table("attention here", *(name.replace("_", " ") for name in costs.NAMES))
        for shape, values in measured.items():
            table.add_row(shape, *(f"{values[name]:.2f}" for name in costs.NAMES))
        out.print(table)


def main():
    """Run the command line; a user's mistake is one line on stderr and a non-zero exit code."""
    _prepare_streams()
    try:
        with _signals_as_exceptions():
            code = app(standalone_mode=False)
            sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:  # as `| head` leaves
        code = 1
    except Exception as error:
        if hasattr(error, "show"):  # typer's own: a wrong option or argument
            error.show()
            sys.exit(error.exit_code)
        if os.environ.get("TOKENEXIT_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError))
        kind = "" if known else f"{type(error).__name__}: "
        print(f"error: {kind}{text}", file=sys.stderr)
        code = 1
    if code == 130:
        err.print("interrupted")
    _drop_unwritten()
    sys.exit(code)


def _prepare_streams():
    """Text is UTF-8 whatever the locale; what is closed stays so for the files opened later."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:  # else the next file gets its number, and what is printed
                os.open(os.devnull, os.O_RDWR)
            if name != "stdin":
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _drop_unwritten():
    """What a full disk or a reader gone did not take is not tried again at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP clean up as ^C does, where they would kill: no files are left aside."""

    def stop(number, frame):
        for other in before:  # a second one would stop the cleaning up
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tagger(model: str, batch_size: int, int8: bool = False):
    from tokenexit.models.tagger import Tagger

    _quiet()
    return Tagger.from_pretrained(model, int8=int8, batch_size=batch_size)


def _read(source: str, column: str | None, format: str | None):
    """Sentences of a file or folder, or of NAME[:CONFIG][@SPLIT]."""
    from tokenexit.training.data import check_hub_name, is_missing_path, read_sentences

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
    return read_sentences(
        source,
        column=_number(column),
        split=split or None,
        config=config or None,
        format=format,
    )


def _quiet():
    """Our own messages only."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _policy(policy, threshold, window, level, min_active, full_depth) -> ExitPolicy:
    changes = {
        "threshold": threshold,
        "window": window,
        "level": level,
        "min_active": min_active,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if full_depth:
        if changes:
            raise ValueError(
                f"--full-depth excludes {', '.join('--' + n.replace('_', '-') for n in changes)}"
            )
        return ExitPolicy.never()
    return policy.replace(**changes)


def _check_heads(model, name: str, policy: ExitPolicy | None = None):
    """Raise ValueError if labels would come from classifiers that were never trained."""
    if heads := model.untrained_heads(policy):
        no_tagger = heads[-1] == model.config.num_hidden_layers
        raise ValueError(
            f"{name} has {'no classifier' if no_tagger else 'no exits'} yet: those at layer "
            f"{', '.join(map(str, heads))} were never trained; expected a tagger that `tokenexit "
            f"train` wrote{'' if no_tagger or policy is None else ', or --full-depth'}"
        )


def _number(column: str | None) -> int | str | None:
    return int(column) if column is not None and column.lstrip("-").isdigit() else column


def _settings(pairs: list[str] | None) -> dict[str, Any]:
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


def _save_config(model, folder: str):
    from tokenexit.files import write_folder_aside

    with write_folder_aside(folder) as aside:
        model.config.save_pretrained(aside)


@contextmanager
def _open(name: str) -> Iterator[Any]:
    if name != "-":
        with Path(name).expanduser().open("rb") as file:
            yield file
    elif sys.stdin is None:
        raise OSError("standard input is closed; expected it open, or the name of a file")
    else:
        yield sys.stdin.buffer


@contextmanager
def _to(output: Path | None) -> Iterator[Callable[[str], Any]]:
    """What writes to a file or, at once, to standard output."""
    from tokenexit.files import write_aside

    if output is None:
        _need_stdout()

        def write(text: str):
            sys.stdout.write(text)
            sys.stdout.flush()

        yield write
    else:
        with write_aside(output) as aside, open(aside, "w", encoding="utf-8") as file:
            yield file.write


def _need_stdout():
    if sys.__stdout__ is None:
        raise OSError("standard output is closed; expected it open for the results")


@contextmanager
def _progress():
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=err) as bars:
        tasks = {}

        def update(what: str, done: int, total: int):
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=max(done, total))

        yield update


def _as_json(tagged, number: int) -> str:
    row = {"words": tagged.words, "labels": tagged.labels, "exit_layers": tagged.exit_layers}
    return json.dumps(row, ensure_ascii=False) + "\n"


# What would be read as another row or column, a comment, a byte order mark or a document's mark.
_NO_CONLL = re.compile("[\\t\\r\\n\\0]|\\A(# |\\ufeff|-DOCSTART- )")


def _as_conll(tagged, number: int) -> str:
    for text in (*tagged.words, *tagged.labels):
        if _NO_CONLL.search(text) or (text == "-DOCSTART-" and len(tagged.words) > 1):
            raise ValueError(
                f"sentence {number} has {text!r:.80}, which would not be read back from columns; "
                "expected --output-format jsonl"
            )
    rows = zip(tagged.words, tagged.labels, strict=True)
    return "".join(f"{word}\t{label}\n" for word, label in rows) + "\n"


if __name__ == "__main__":
    main()
