"""How fast are exits on a GPU, beside other ways to run the same tagger there?

    PYTHONPATH=benchmarks python -m gpu          (--help for options)

Same weights (BERT-base, random), same tokens, all systems in alternation on one GPU, timed by CUDA
events. A share of the words leaves after layer 2, the rest after the last: words of all sentences
("even"), or whole sentences ("whole"). At the goal's share they leave as `texts.imposed_exits` has
it. Before anything is timed, its logits are held against Hugging Face's in fp32, or with exits
against our own eager loop's in fp32; what is wrong gets no numbers, and the exit status is 1.
Without a GPU there is one line and status 2.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import harness
import texts
import torch
import transformers

import tokenexit
from tokenexit import ExitPolicy
from tokenexit.flops import active_tokens
from tokenexit.loops import gpu as gpu_loop
from tokenexit.loops import graphs
from tokenexit.ops.pack_tokens import pack
from tokenexit.schedule import Schedule

HF, OURS, PAPER, LAYERS = "Hugging Face sdpa", "tokenexit graph", "the paper's way", "layers, graph"
EXIT_RATES, LEAVES_AFTER = (0.0, 0.5, 0.75, 0.9, 0.95), 2
GOAL = (64, 128, 0.25)  # sentences, tokens, share of token-layers
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = [(b, n) for b in (1, 8, 64, 256) for n in (16, 64, 128, 512)]
CLOSE, ROUNDS, BACK_TO_BACK = 1e-3, 20, 4


@dataclass(frozen=True)
class Model:
    """A tagger of one dtype, Hugging Face's and ours, on a device."""

    theirs: transformers.BertForTokenClassification
    ours: tokenexit.TokenExitForTokenClassification

    def to(self, device, dtype) -> Model:
        return Model(*(copy.deepcopy(m).to(device, dtype) for m in (self.theirs, self.ours)))


def base(**shape) -> Model:
    """Random weights, Hugging Face's and ours the same, on the CPU in fp32."""
    torch.manual_seed(0)
    config = transformers.BertConfig(num_labels=9, **shape)
    theirs = transformers.BertForTokenClassification(config).eval()
    theirs.set_attn_implementation("sdpa")
    ours = tokenexit.convert(theirs).eval()
    ours.policy = ExitPolicy.never()
    return Model(theirs, ours)


def exits(batch: texts.Batch, num_layers: int, rate: float, kind: str) -> torch.Tensor:
    """Layers to leave at, `[B, N]`: a share of words, or of sentences, after layer 2.

    Args:
        kind: "even", "whole", or "goal" (the rate is then the share of token-layers saved).

    Raises:
        ValueError: another kind.
    """
    if kind == "goal":
        return texts.imposed_exits(batch, num_layers, 1 - rate)
    if kind not in ("even", "whole"):
        raise ValueError(f"got exits {kind!r}; expected 'even', 'whole' or 'goal'")
    g = torch.Generator().manual_seed(0)
    is_word = batch.word_ids >= 0
    if kind == "even":  # words first, in random order
        place = (
            torch.rand(is_word.shape, generator=g).masked_fill(~is_word, 2).argsort(1).argsort(1)
        )
        leaves = place < (rate * is_word.sum(1, keepdim=True)).round()
    else:
        leaves = torch.randperm(len(is_word), generator=g)[:, None] < round(rate * len(is_word))
    result = torch.where(leaves, min(LEAVES_AFTER, num_layers), num_layers).expand_as(is_word)
    last = result.masked_fill(~is_word, 0).amax(1, keepdim=True)
    return torch.where(is_word, result, last).masked_fill(~batch.real, 0)


def judges(model: Model, batch: texts.Batch, layers: torch.Tensor | None) -> dict:
    """Of `systems` the two that others are held against; nothing is recorded or compiled."""
    padded = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    def paper():
        model.ours.backend = "eager"
        try:
            return model.ours(**padded, word_ids=batch.word_ids, exit_layers=layers).logits
        finally:
            model.ours.backend = "auto"

    return {HF: lambda: model.theirs(**padded).logits, PAPER: paper}


def systems(model: Model, batch: texts.Batch, layers: torch.Tensor | None, flash=None) -> dict:
    """By name, what gives the logits `[B, N, C]`; of ours, with exit layers if they are given.

    Args:
        batch, layers: on the device of the model.
        flash: Hugging Face's with another attention, or None.
    """
    theirs, ours = model.theirs, model.ours
    padded = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    call = {**padded, "word_ids": batch.word_ids, "exit_layers": layers}

    def with_graphs(on, **more):
        ours.cuda_graphs = on
        return ours(**call, **more).logits

    found = judges(model, batch, layers)
    if flash is not None:
        found["Hugging Face flash"] = lambda: flash(**padded).logits
    if batch.input_ids.is_cuda:
        compiled = _compiled(theirs)
        found["torch.compile"] = lambda: compiled(**padded).logits
        found[OURS] = lambda: with_graphs(True)
        found["tokenexit, no graph"] = lambda: with_graphs(False)
        found[LAYERS] = layers_alone(ours, batch, layers)
        if layers is None:  # what asking costs: nobody is ever that sure
            asks = ExitPolicy(threshold=1e-30)
            found["tokenexit graph, asked in vain"] = lambda: with_graphs(True, policy=asks)
    return found


def layers_alone(ours, batch: texts.Batch, layers) -> Callable[[], torch.Tensor]:
    """The layers without packing and embedding, which the model on paper leaves out, too."""
    packed = pack(batch.attention_mask, batch.word_ids)
    ids = packed.pack(batch.input_ids)
    h = ours.embeddings(ids, packed.positions, torch.zeros_like(ids))
    schedule = Schedule.of(ours.policy, len(ours.encoder.layers), packed.num_sentences, h)
    given = None if layers is None else packed.pack(layers)[packed.first_token]
    parts = ours.encoder.layers, ours.encoder.heads, h, packed, schedule, None, given
    hears = ours.encoder.neighbor_heads
    run = lambda: gpu_loop.exit_loop(*parts, neighbor_heads=hears)[0]  # noqa: E731
    replay = capture(run) if h.is_cuda else run
    return lambda: packed.unpack(replay())


def capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """run in a CUDA graph, which is replayed at each call."""
    graph, result = graphs.record(run)

    def replay(kept=run):  # what a replay reads
        graph.replay()
        return result

    return replay


def _compiled(theirs):
    if not hasattr(theirs, "_compiled_copy"):  # its parameters are the same, it is no submodule
        compiled = copy.deepcopy(theirs)
        for layer in compiled.bert.encoder.layer:
            layer.compile(dynamic=True)
        object.__setattr__(theirs, "_compiled_copy", compiled)
    return theirs._compiled_copy


def flash_of(theirs):
    """Hugging Face's with FlashAttention, or None where that is not installed or does not load."""
    if importlib.util.find_spec("flash_attn") is None or theirs.dtype == torch.float32:
        return None
    flash = copy.deepcopy(theirs)
    try:
        flash.set_attn_implementation("flash_attention_2")
    except (ImportError, ValueError) as error:
        print(f"Hugging Face flash is left out: {error}", flush=True)
        return None
    return flash


def wrong(got: torch.Tensor, truth: torch.Tensor, same_dtype: torch.Tensor, real) -> str | None:
    """Why logits are not right: further from the truth than twice what the dtype costs others."""
    got, truth, same_dtype = (x[real].float() for x in (got, truth, same_dtype))
    apart = float((got - truth).detach().abs().max())
    allowed = 2 * float((same_dtype - truth).detach().abs().max()) + CLOSE
    return None if apart <= allowed else f"logits differ by {apart:.4g}, allowed {allowed:.4g}"


def timer(device: str) -> Callable[[Callable, int], float]:
    """Milliseconds of a call, of so many back to back; by CUDA events, or the clock on a CPU."""

    def by_clock(run, times=1):
        start = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - start) * 1e3 / times

    def by_events(run, times=1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    return by_events if device.startswith("cuda") else by_clock


def measure(found: Mapping[str, Callable], device: str, rounds: int) -> dict[str, dict]:
    """Of each system its `times_ms`, alternating, `back_to_back_ms` and `peak_mib`.

    The peak is of all that is allocated, the models and recorded graphs with it; 0 on a CPU.
    """
    time_ms, cuda = timer(device), device.startswith("cuda")
    result = {}
    for name, run in found.items():
        for _ in range(3):
            run()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        result[name] = {"times_ms": [], "back_to_back_ms": time_ms(run, BACK_TO_BACK)}
        result[name]["peak_mib"] = torch.cuda.max_memory_allocated() >> 20 if cuda else 0
    for _ in range(rounds):
        for name, run in found.items():
            result[name]["times_ms"].append(time_ms(run, 1))
    return result


def size_of(text: str) -> tuple[int, int]:
    """Of "64x128": sentences and tokens.

    Raises:
        ValueError: another text.
    """
    sentences, tokens = map(int, text.split("x"))
    if min(sentences, tokens) < 1:
        raise ValueError(f"got {text!r}; expected at least one sentence and one token")
    return sentences, tokens


def case(truth: Model, model: Model, sizes, rate, kind, device, rounds, flash=None):
    """Check and time the systems on one batch; rows, and what is wrong with those left out."""
    sentences, n = sizes
    config = truth.theirs.config
    batch = texts.batch(texts.uniform(sentences, n, config.vocab_size))
    layers = None if not rate else exits(batch, config.num_hidden_layers, rate, kind)
    of_token = batch.attention_mask * config.num_hidden_layers if layers is None else layers
    share = float(active_tokens(of_token, config.num_hidden_layers).sum())
    share /= config.num_hidden_layers * int(batch.real.sum())
    batch = texts.Batch(*(getattr(batch, x).to(device) for x in batch.__dataclass_fields__))
    layers = None if layers is None else layers.to(device)
    found, failures, same = systems(model, batch, layers, flash), [], {}
    expected = {name: run() for name, run in judges(truth, batch, layers).items()}
    if not rate and (why := wrong(expected[PAPER], *[expected[HF]] * 2, batch.real)):
        return [], [f"our eager loop in fp32: {why}"]
    for name in (HF, PAPER):
        same[name] = found[name]()
    for name, run in list(found.items()):
        like = HF if not rate or name not in _OURS else PAPER
        if why := wrong(run(), expected[like], same[like], batch.real):
            failures.append(f"{name}: {why}")
            del found[name]
    if HF not in found:
        return [], failures
    measured = measure(found, device, rounds)
    facts = {
        **{"sentences": sentences, "tokens": sentences * n, "longest": n, "exit_rate": rate},
        **{"profile": kind, "active_fraction": round(share, 4), "check": "passed"},
    }
    rows = harness.rows({k: v["times_ms"] for k, v in measured.items()}, HF, **facts)
    for row in rows:
        more = measured[row["system"]]
        row |= {**more, "tokens_per_s": round(sentences * n / more["back_to_back_ms"] * 1e3)}
        row["device"] = torch.cuda.get_device_name() if device != "cpu" else row["device"]
    return rows, failures


_OURS = {PAPER, OURS, LAYERS, "tokenexit, no graph", "tokenexit graph, asked in vain"}


def plot(rows: list[dict], path: Path):
    """Times as fast as Hugging Face against the share of token-layers, at the goal's size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(row["tokens"] for row in rows)
    goal = [r for r in rows if (r["sentences"], r["longest"]) == GOAL[:2]]
    goal = goal or [r for r in rows if r["tokens"] == most]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    key = lambda row: (row["system"], row["profile"], row["dtype"])  # noqa: E731
    for name in sorted({key(row) for row in goal}):
        points = sorted((r["active_fraction"], r[f"speedup_over_{HF}"]) for r in goal if
                        key(r) == name)  # fmt: skip
        axes.plot(*zip(*points, strict=True), marker="o", label=", ".join(name))
    axes.set(xlabel="share of token-layers computed", ylabel="times as fast as padded Hugging Face")
    axes.legend(fontsize=6)
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cpu: only to try the program (--quick)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp16", "bf16"])
    parser.add_argument("--sizes", nargs="+", type=size_of, help="like 64x128; default: 16")
    parser.add_argument("--rates", nargs="+", type=float, default=EXIT_RATES)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two sizes")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("No GPU is at hand: nothing was measured.", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    small = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    model = base(**(small | {"vocab_size": 100} if options.quick else {}))
    truth, rows, failed = model.to(options.device, torch.float32), [], False
    with torch.inference_mode():
        for dtype in options.dtype:
            ours = model.to(options.device, DTYPES[dtype])
            flash = flash_of(ours.theirs)
            for sizes in options.sizes or ([(1, 8), (4, 16)] if options.quick else SIZES):
                rates = options.rates
                plan = [(r, k) for r in rates for k in ("even", "whole") if r or k == "even"]
                if sizes == GOAL[:2] or options.quick:
                    plan.append((1 - GOAL[2] if not options.quick else 0.5, "goal"))
                for rate, kind in plan:
                    rounds = 3 if options.quick else ROUNDS
                    new, failures = case(
                        truth, ours, sizes, rate, kind, options.device, rounds, flash
                    )
                    failed |= bool(failures)
                    for why in failures:
                        print(f"RED {dtype} {sizes} {rate} {kind}: {why}", flush=True)
                    new = [{**row, "dtype": dtype} for row in new]
                    for row in new:
                        text = f"{row['system']}: {row['median_ms']} ms, {row['tokens_per_s']}/s"
                        print(dtype, *sizes, rate, kind, text, flush=True)
                    harness.write("gpu", new, options.results)
                    rows += new
    if rows:
        plot(rows, options.results / "gpu.png")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
