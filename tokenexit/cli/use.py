"""The commands that use a tagger."""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from rich.table import Table

from tokenexit import __version__
from tokenexit.cli.options import (
    MOST,
    BatchSize,
    Column,
    Data,
    Decoding,
    Device,
    Dtype,
    Format,
    FullDepth,
    Int8,
    Level,
    Metric,
    MinActive,
    Model,
    Revision,
    Speed,
    Threshold,
    Window,
    check_heads,
    err,
    load_tagger,
    need_stdout,
    out,
    progress_bars,
    read_data,
)
from tokenexit.cli.resuming import partial_results, skip_done
from tokenexit.policy import ExitPolicy

# As standard output. Half of a surrogate pair, as JSON may have in a field that is handed on, is
# written as JSON writes it.
_UTF_8 = {"encoding": "utf-8", "errors": "backslashreplace"}


def evaluate(
    model: Model,
    data: Data,
    threshold: Threshold = None,
    window: Window = None,
    level: Level = None,
    min_active: MinActive = None,
    speed: Speed = None,
    full_depth: FullDepth = False,
    decoding: Decoding = "argmax",
    int8: Int8 = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
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
    from tokenexit.text.decoding import check_decoding
    from tokenexit.text.scoring import check_metric

    need_stdout()
    check_metric(metric)
    check_decoding(decoding)
    settings = {"device": device, "revision": revision, "decoding": decoding}
    tagger = load_tagger(model, batch_size, int8, dtype, **settings)
    policy = _policy(tagger.model, threshold, window, level, min_active, speed, full_depth)
    check_heads(tagger.model, model, policy)
    result = run(
        tagger, read_data(data, column, format), policy, metric=metric, timing_runs=timing_runs
    )
    if json_output:
        print(json.dumps(result.to_dict()))
        return
    table = Table("", "", show_header=False)
    table.add_row("policy", str(policy))
    for name, value in result.scores.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{kind} {_rounded(one)}" for kind, one in value.items())
        table.add_row(name, _rounded(value))
    table.add_row("labels that cannot stand", str(result.broken_labels))
    table.add_row("mean exit layer", f"{result.mean_exit_layer:.2f}")
    table.add_row("words leaving at layer 1, 2, ...", " ".join(map(str, result.exits_per_layer)))
    table.add_row("speed-up, multiply-adds", f"{result.flops_speedup:.2f}")
    if result.wall_speedup is not None:
        table.add_row("speed-up, wall clock here", f"{result.wall_speedup:.2f}")
        table.add_row("words a second", f"{result.words_per_second:.0f}")
    out.print(table)


def _rounded(value):
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def predict(
    model: Model,
    input: Annotated[str, typer.Argument(help="File to tag; - for standard input.")] = "-",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File. Default, and -: standard output.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Of the input: text (a sentence a line, without --spans its words between "
            "blanks), conll, conllu or jsonl. Default: by the name, else text.",
        ),
    ] = None,
    output_format: Annotated[
        str, typer.Option(help="jsonl, or conll: a row a word, an empty line after each sentence.")
    ] = "jsonl",
    spans: Annotated[
        bool,
        typer.Option(
            "--spans",
            help="Lines are texts, whose words the tokenizer tells; entities with their places.",
        ),
    ] = False,
    threshold: Threshold = None,
    window: Window = None,
    level: Level = None,
    min_active: MinActive = None,
    speed: Speed = None,
    full_depth: FullDepth = False,
    decoding: Decoding = "argmax",
    int8: Int8 = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    batch_size: BatchSize = 32,
    buffer: Annotated[int, typer.Option(help="Sentences held at a time.", min=1, max=MOST)] = 1024,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what is tagged if the run is cut off, and go on from there; with --output.",
        ),
    ] = False,
):
    """Tag a file or a stream, in order, in constant memory.

    Of text and JSON lines, the n-th result is that of line n, empty ones too; other fields of a
    JSON line, such as an id, are handed on into JSON lines, but for those that results stand in
    place of; what is not is named. A file is written aside and renamed at the end, so that an
    interrupted run leaves none; pipes and devices are written to as they are. With `--resume`, what
    is tagged is kept in the folder `OUTPUT.partial` until all is, and the same command goes on from
    there.

    Examples: `echo "Ada lives in London" | tokenexit predict tagger`,
    `tokenexit predict tagger news.txt -o news.conll --output-format conll`,
    `tokenexit predict tagger news.jsonl --spans --speed 2.5`
    """
    from tokenexit.text.data import stream_rows
    from tokenexit.text.decoding import check_decoding

    check_decoding(decoding)
    formats = {"jsonl": _as_json, "conll": _as_conll}
    if output_format not in formats:
        raise ValueError(f"--output-format is {output_format!r}; expected jsonl or conll")
    if spans and output_format != "jsonl":
        raise ValueError(f"--spans excludes --output-format {output_format}; expected jsonl")
    output = None if output == Path("-") else output
    if resume and output is None:
        raise ValueError("got --resume without --output; expected both or neither")
    if output is not None and output.is_file() and Path(input).expanduser().exists():
        if output.samefile(Path(input).expanduser()):
            raise ValueError(f"--output is the input, {input}; expected another file")
    as_text = _as_spans if spans else formats[output_format]
    aside = nullcontext(None) if resume else _to(output)
    with _open(input) as lines, aside as write, _progress(output, lines) as step:
        rows = stream_rows(lines, format)
        settings = {"device": device, "revision": revision, "decoding": decoding}
        tagger = load_tagger(model, batch_size, int8, dtype, **settings)
        policy = _policy(tagger.model, threshold, window, level, min_active, speed, full_depth)
        check_heads(tagger.model, model, policy)

        def tag(write, done: int = 0):
            waiting = deque()  # what is read and not yet tagged

            def sentences():
                for row in rows:
                    waiting.append(row.others)
                    step()
                    text = _text_of(row) if spans else None
                    yield row.words if text is None else text

            told = set()
            for number, tagged in enumerate(tagger.stream(sentences(), policy, buffer), done + 1):
                others = waiting.popleft()
                if lost := _lost(as_text, tagged, others) - told:
                    told |= lost
                    names = ", ".join(sorted(lost))
                    why = "results have the same names"
                    if as_text is _as_conll:
                        why = "columns have no place for them"
                    err.print(f"not handed on, as {why}: {names}")
                write(as_text(tagged, number, others))

        if not resume:
            tag(write)
        else:
            record = {"model": model, "revision": revision, "policy": policy.to_dict()}
            record |= {"int8": int8, "dtype": dtype, "results": as_text.__name__}
            record |= {"decoding": decoding}
            mark = 0
            for part in tagger.model.exit_heads.parameters():  # all training changes these
                mark = zlib.crc32(part.detach().float().cpu().numpy(), mark)
            record["classifiers"] = f"{mark:08x}"
            with partial_results(output, record) as path:
                done = skip_done(path, rows, *_READ_BACK[as_text])
                if done:
                    err.print(f"going on after {done} sentences")
                with open(path, "a", **_UTF_8) as file:
                    tag(file.write, done)
    if output is not None:
        err.print(f"wrote {output}", soft_wrap=True)


def info(
    model: Annotated[str | None, typer.Argument(help="Folder of a tagger.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the two ways of attention, for the tagger.")
    ] = False,
    int8: Int8 = False,
    dtype: Dtype = None,
):
    """What is installed here; of a tagger, its shape, labels, policy, and what loop runs it.

    Last, what projecting all keys and carrying active queries have been measured to cost on this
    machine, in microseconds. `--measure` does so for layers of the tagger's sizes, fp32 and 8 bits:
    from then on these costs choose between the two ways, in place of a built-in table.

    Examples: `tokenexit info`, `tokenexit info tagger`, `tokenexit info tagger --measure`
    """
    import torch
    import transformers

    from tokenexit import costs, ops
    from tokenexit.loops import gpu as gpu_loop
    from tokenexit.text.scoring import shown

    need_stdout()
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
    if gpu != "none" and (what := gpu_loop.lacks()):
        gpu += f", used slowly: {what} is missing"
    table.add_row("GPU", gpu)
    if model is not None:
        loaded = load_tagger(model, 1, int8, dtype).model
        config = loaded.config
        table.add_row("tagger", model)
        table.add_row(
            "encoder",
            f"{config.source_model_type}, {config.num_hidden_layers} layers of "
            f"{config.hidden_size}, at most {config.max_tokens} tokens",
        )
        weights = [x for n, x in loaded.state_dict().items() if n.endswith((".weight", ".bias"))]
        table.add_row("parameters", f"{sum(x.numel() for x in weights) / 1e6:.1f} M")
        kind = str(loaded.encoder.layers[0].query.weight.dtype).removeprefix("torch.")
        table.add_row("weights of layers", kind)
        table.add_row("labels", shown([*config.id2label.values()], 50))
        table.add_row("policy", str(loaded.policy))
        table.add_row("loop", loaded.loop)
        if measure:
            if not built:
                raise ValueError(
                    f"nothing to measure without compiled ops: {ops.extension_error()}"
                )
            heads = config.num_attention_heads
            for numbers in (torch.float32, torch.int8, torch.bfloat16):
                costs.calibrate(config.hidden_size, config.intermediate_size, heads, numbers)
    elif measure:
        raise ValueError("--measure wants a tagger, whose layers to time")
    out.print(table)
    if measured := costs.measured():
        table = Table("attention here", *(name.replace("_", " ") for name in costs.NAMES))
        for shape, values in measured.items():
            table.add_row(shape, *(f"{values[name]:.2f}" for name in costs.NAMES))
        out.print(table)


def _policy(model, threshold, window, level, min_active, speed, full_depth) -> ExitPolicy:
    changes = {
        "threshold": threshold,
        "window": window,
        "level": level,
        "min_active": min_active,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if full_depth or speed is not None:
        excluded = [*changes, *(["speed"] if full_depth and speed is not None else [])]
        if excluded:
            raise ValueError(
                f"--{'full-depth' if full_depth else 'speed'} excludes "
                f"{', '.join('--' + name.replace('_', '-') for name in excluded)}"
            )
        return ExitPolicy.never() if full_depth else model.speed(speed).policy
    return model.policy.replace(**changes)


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
        need_stdout()

        def write(text: str):
            sys.stdout.write(text)
            sys.stdout.flush()

        yield write
    else:
        with write_aside(output) as aside, open(aside, "w", **_UTF_8) as file:
            yield file.write


@contextmanager
def _progress(output: Path | None, lines) -> Iterator[Callable[[], Any]]:
    """What shows on a terminal how many bytes of a file are read, if results go to another."""
    try:
        size = os.fstat(lines.fileno()).st_size if lines.seekable() else 0
    except OSError:
        size = 0
    if output is None or not size or not err.is_terminal:
        yield lambda: None
        return
    with progress_bars() as bars:
        yield lambda: bars("bytes read", lines.tell(), size)


def _as_json(tagged, number: int, others=MappingProxyType({})) -> str:
    row = {"words": tagged.words, "labels": tagged.labels, "exit_layers": tagged.exit_layers}
    return json.dumps({**others, **row}, ensure_ascii=False) + "\n"


def _as_spans(tagged, number: int, others=MappingProxyType({})) -> str:
    text = " ".join(tagged.words) if tagged.text is None else tagged.text
    row = {"text": text, "spans": [asdict(span) for span in tagged.spans]}
    return json.dumps({**others, **row}, ensure_ascii=False) + "\n"


def _text_of(row) -> str | None:
    """A row's text, which may stand beside its words."""
    text = row.others.get("text") if row.text is None else row.text
    return text if isinstance(text, str) else None


# What would be read as another row or column, a comment, a byte order mark or a document's mark.
_NO_CONLL = re.compile("[\\t\\r\\n\\0]|\\A(# |\\ufeff|-DOCSTART- )")


def _as_conll(tagged, number: int, others=MappingProxyType({})) -> str:
    for text in (*tagged.words, *tagged.labels):
        if _NO_CONLL.search(text) or (text == "-DOCSTART-" and len(tagged.words) > 1):
            raise ValueError(
                f"sentence {number} has {text!r:.80}, which would not be read back from columns; "
                "expected --output-format jsonl"
            )
    rows = zip(tagged.words, tagged.labels, strict=True)
    return "".join(f"{word}\t{label}\n" for word, label in rows) + "\n"


def _lost(as_text, tagged, others) -> set[str]:
    """Of a JSON line's other fields, those that results have no place for, or stand in place of."""
    if as_text is _as_conll:
        return set(others)
    if as_text is _as_json:
        return others.keys() & {"words", "labels", "exit_layers"}
    replaced = {"spans"} if others.get("text", tagged.text) == tagged.text else {"spans", "text"}
    return others.keys() & replaced


def _is_json_of(result: Sequence[bytes], row) -> bool:
    return json.loads(result[0])["words"] == list(row.words)


def _is_spans_of(result: Sequence[bytes], row) -> bool:
    text = _text_of(row)
    return json.loads(result[0])["text"] == (" ".join(row.words) if text is None else text)


def _is_conll_of(result: Sequence[bytes], row) -> bool:
    return [line.decode().split("\t")[0] for line in result[:-1]] == list(row.words)


# How to read results back: which line ends one, and whether it is that of a row.
_READ_BACK = {
    _as_json: (lambda line: True, _is_json_of),
    _as_spans: (lambda line: True, _is_spans_of),
    _as_conll: (lambda line: line == b"\n", _is_conll_of),
}
