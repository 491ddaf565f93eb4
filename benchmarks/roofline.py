"""How close does each phase of a layer come to what the machine can do?

    PYTHONPATH=benchmarks python -m roofline          (part of make bench)

The floor of a phase is `max(operations / peak, weight bytes / bandwidth)` in each layer, with peaks
and bandwidth measured here: a peak is that of the best product known, a library's or ours. With
8-bit weights, products have the peak of bytes and a fourth of the bytes; all else is fp32, or bf16
where attention is. A layer is one op, which is called with what each layer gets in a pass; its
feed-forward part is what it saves when its inner width is next to nothing. Exit heads and
embeddings are watched through hooks on their modules.

The tagger of `make demo` is there with sentences one at a time, at full depth.

What exits cost where nobody leaves is the loop that users meet, asked in vain and not asked.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import cpu
import harness
import report
import texts
import torch
import torch.nn.functional as F
from torch import nn

import tokenexit
from tokenexit.costs import costs
from tokenexit.flops import active_tokens
from tokenexit.int8 import Int8Linear, largest
from tokenexit.ops import ATTEND_IN_BF16, instruction_set
from tokenexit.ops.exit_layer import DEVICES, exit_layer
from tokenexit.ops.linear import linear
from tokenexit.policy import ExitPolicy

ATTENTION, FEED_FORWARD = ("q", "kv", "attention", "output", "norm"), ("up", "down")
PRODUCTS = ("q", "kv", "output", "up", "down")  # with weights that may have 8 bits
THIN = 16  # inner width of a layer that has hardly any feed-forward part
ROUNDS = 7
ASKED_ROUNDS = 25  # a difference of some percent at most needs more
IN_VAIN = ExitPolicy(threshold=torch.finfo(torch.float32).tiny)  # decides, and nobody leaves
NOTHING = {"gflop": 0.0, "weight_mb": 0.0, "floor_ms": 0.0}


def peak_gflops(quick: bool = False, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a large matrix product, the best of some by torch and by ours."""
    rows, d, f = (64, 64, 64) if quick else (1024, 768, 3072)
    x, w = torch.randn(rows, d, dtype=dtype), torch.randn(f, d, dtype=dtype)
    products = (F.linear, lambda x, w: linear(x, w, None))
    best = min(harness.time_ms(lambda: p(x, w)) for _ in range(20) for p in products)  # noqa: B023
    return 2 * rows * d * f / best / 1e6


def peak_gops8(quick: bool = False) -> float:
    """The same of bytes, as the fastest of torch's libraries here does them."""
    rows, d, f = (64, 64, 64) if quick else (1024, 768, 3072)
    x, w = torch.randn(rows, d), torch.randn(f, d)
    w = torch.quantize_per_channel(
        w, w.abs().amax(1) / largest(), torch.zeros(f, dtype=torch.int64), 0, torch.qint8
    )
    times, before = [], torch.backends.quantized.engine
    for engine in {"fbgemm", "onednn"}.intersection(torch.backends.quantized.supported_engines):
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(w, None)
        run = torch.ops.quantized.linear_dynamic
        times += [harness.time_ms(lambda: run(x, packed)) for _ in range(20)]  # noqa: B023
    torch.backends.quantized.engine = before
    return 2 * rows * d * f / min(times) / 1e6


def bandwidth_gbs(quick: bool = False) -> float:
    """Bytes a second of reading a matrix that no cache holds, the best of some."""
    w = torch.ones(64 if quick else 2**15, 2**12)
    x = torch.ones(2**12)
    best = min(harness.time_ms(lambda: w @ x) for _ in range(8))
    return w.numel() * 4 / best / 1e6


@dataclass(frozen=True)
class Machine:
    """What it does at best: operations of products with weights, of attention and of the rest, and
    bytes from memory, in 10^9 a second, for weights of so many bytes."""

    products: float
    attention: float
    rest: float
    bandwidth: float
    weight_bytes: int = 4


def operations(
    active: Sequence[int], tokens: Sequence[int], config, machine: Machine
) -> dict[str, tuple]:
    """Operations and weight bytes of each phase of one layer.

    Args:
        active: tokens computed, of each sentence.
        tokens: of each sentence.

    Returns:
        Of each phase `(operations, bytes)`; none for a layer that nobody is in.
    """
    d, f = config.hidden_size, config.intermediate_size
    heads, labels = config.num_attention_heads, config.num_labels
    a = sum(active)
    if not a:
        return {}
    kv = attention = 0
    for a_s, n_s in zip(active, tokens, strict=True):
        if a_s:  # the cheaper of projected and absorbed attention
            projected = (4 * n_s * d * d, 4 * a_s * n_s * d)
            absorbed = (4 * a_s * d * d, 4 * a_s * heads * n_s * d)
            ops = min(
                projected,
                absorbed,
                key=lambda o: o[0] / machine.products + o[1] / machine.attention,
            )
            kv, attention = kv + ops[0], attention + ops[1]
    size = machine.weight_bytes
    return {
        "q": (2 * a * d * d, size * d * d),
        "kv": (kv, 2 * size * d * d),
        "attention": (attention, 0),
        "output": (2 * a * d * d, size * d * d),
        "up": (2 * a * d * f, size * d * f),
        "down": (2 * a * d * f, size * d * f),
        "norm": (16 * a * d, 16 * d),
        "head": (2 * a * d * labels, 4 * d * labels),
    }


def floors(active: torch.Tensor, tokens: torch.Tensor, config, machine: Machine) -> dict[str, dict]:
    """Each phase's work and least time, summed over layers.

    Args:
        active: `[B, L]`, of `tokenexit.flops.active_tokens`.
        tokens: `[B]`.
    """
    result = {}
    peaks = dict.fromkeys(PRODUCTS, machine.products) | {"attention": machine.attention}
    for layer in active.T.tolist():
        for phase, (ops, size) in operations(layer, tokens.tolist(), config, machine).items():
            peak = peaks.get(phase, machine.rest)
            row = result.setdefault(phase, {"gflop": 0.0, "weight_mb": 0.0, "floor_ms": 0.0})
            row["gflop"] += ops / 1e9
            row["weight_mb"] += size / 1e6
            row["floor_ms"] += max(ops / peak, size / machine.bandwidth) / 1e6
    return result


def floors_of(out, config, machine: Machine) -> dict[str, dict]:
    """`floors` of a call, from its output."""
    active = active_tokens(out.exit_layers, config.num_hidden_layers)
    return floors(active, (out.exit_layers > 0).sum(1), config, machine)


class Watch:
    """Milliseconds spent in a model's parts, by hooks."""

    def __init__(self, model):
        self.model = model
        self.times = {"head": 0.0, "embeddings": 0.0}

    def __enter__(self):
        parts = [("embeddings", self.model.embeddings)]
        parts += [("head", head) for head in self.model.exit_heads]
        self.hooks = []
        for name, module in parts:
            self.hooks.append(module.register_forward_pre_hook(self._start))
            self.hooks.append(module.register_forward_hook(lambda *_, n=name: self._stop(n)))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _start(self, *_):
        self.started = time.perf_counter()

    def _stop(self, name):
        self.times[name] += (time.perf_counter() - self.started) * 1e3


def layer_inputs(model, call) -> list[tuple]:
    """Each layer that runs, its states and its active tokens."""
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, x: inputs.append((m, x[0].clone(), x[1])))
        for layer in model.encoder.layers
    ]
    model(**call)
    for hook in hooks:
        hook.remove()
    return inputs


def layer_times(inputs: list[tuple], rounds: int) -> tuple[float, float]:
    """Milliseconds of the layers, and the share that goes when their inner width becomes `THIN`."""
    systems = {"whole": [], "thin": []}
    for layer, h, active in inputs:
        d, f = layer.down.weight.shape
        how = costs(d, f, layer.num_heads, layer.query.weight.dtype)
        inner = {"up": nn.Linear(d, THIN), "down": nn.Linear(THIN, d)}
        inner = {name: part.to(h.dtype) for name, part in inner.items()}
        if isinstance(layer.query, Int8Linear):
            inner = {name: Int8Linear(part) for name, part in inner.items()}
        thin = copy.copy(layer)
        thin._modules = {**layer._modules, **inner}
        for name, form in (("whole", layer), ("thin", thin)):
            scale, found = (d // layer.num_heads) ** -0.5, form.reads(h)
            weights = found.weights, found.scales
            systems[name].append(
                (h, active, *weights, how, layer.num_heads, scale, layer.output_norm.eps)
            )

    def clock(calls):
        return lambda: harness.time_ms(lambda: [exit_layer(*call) for call in calls])

    times = harness.alternate({name: clock(calls) for name, calls in systems.items()}, rounds)
    pairs = zip(times["thin"], times["whole"], strict=True)
    share = 1 - statistics.median(thin / whole for thin, whole in pairs)
    return statistics.median(times["whole"]), share


def bookkeeping(model, call, rounds: int) -> list[dict]:
    """Rows of what exits cost where nobody leaves: milliseconds, and shares of a call not asked.

    "decisions": the same loop with a policy by which every layer asks in vain and with
    `ExitPolicy.never()`, in alternation; the median of the differences within rounds, which may be
    negative. Exit heads run in both, so "exit heads" are those below the last by themselves.

    Raises:
        RuntimeError: the two did not compute the same.
    """
    calls = {
        "asked": {**call, "policy": IN_VAIN},
        "not asked": {**call, "policy": ExitPolicy.never()},
    }
    asked, full = (model(**call) for call in calls.values())
    if not torch.equal(asked.logits, full.logits):
        raise RuntimeError(f"words left under {IN_VAIN}; expected the logits of full depth")
    times = harness.alternate(
        {
            name: lambda call=call: harness.time_ms(lambda: model(**call))
            for name, call in calls.items()
        },
        rounds,
    )
    pairs = list(zip(times["asked"], times["not asked"], strict=True))
    below = list(model.exit_heads)[:-1]
    h = torch.randn(int((full.exit_layers > 0).sum()), model.config.hidden_size)
    h = h.to(full.logits.dtype)
    heads = harness.alternate(
        {"heads": lambda: harness.time_ms(lambda: [head(h) for head in below])}, rounds
    )["heads"]
    rows = {
        "exit heads": (
            statistics.median(heads),
            statistics.median(heads) / statistics.median(times["not asked"]),
        ),
        "decisions": (
            statistics.median(a - b for a, b in pairs),
            statistics.median((a - b) / b for a, b in pairs),
        ),
    }
    return [
        {"phase": phase, **NOTHING, "measured_ms": ms, "share": share}
        for phase, (ms, share) in rows.items()
    ]


def peak_of_ours(model, call, rounds: int = ROUNDS) -> float:
    """Operations a second of our layers' feed-forward part, in 10^9."""
    inputs = layer_inputs(model, call)[:3]
    times, share = layer_times(inputs, rounds)
    f, d = inputs[0][0].up.weight.shape
    return sum(4 * len(h) * d * f for _, h, _ in inputs) / (times * share) / 1e6


def phases(model, call, machine: Machine, rounds: int = ROUNDS) -> list[dict]:
    """Rows of one batch: each phase's floor, each part's time."""
    least = floors_of(model(**call), model.config, machine)
    passes = []
    for _ in range(rounds):
        with Watch(model) as watch:
            model(**call)
        passes.append(watch.times)
    taken = {name: statistics.median(p[name] for p in passes) for name in passes[0]}
    head, embeddings = taken["head"], taken["embeddings"]
    groups = {}
    if DEVICES:
        layers, share = layer_times(layer_inputs(model, call), rounds)
        groups = {
            "attention block": (ATTENTION, layers * (1 - share)),
            "feed-forward": (FEED_FORWARD, layers * share),
        }
    rows = []
    for group, (members, measured) in groups.items():
        rows += [{"phase": phase, **least[phase], "measured_ms": None} for phase in members]
        summed = {key: sum(least[phase][key] for phase in members) for key in NOTHING}
        rows.append({"phase": group, **summed, "measured_ms": measured})
    rows.append({"phase": "head", **least["head"], "measured_ms": head})
    rows.append({"phase": "embeddings", **NOTHING, "measured_ms": embeddings})
    return rows


def one_by_one(system: cpu.System, config, machine: Machine, rounds: int = ROUNDS) -> list[dict]:
    """The row of sentences that come one at a time: the floors of all phases, the time of calls."""
    total = dict(NOTHING)
    for out in system.run():
        for least in floors_of(out, config, machine).values():
            total = {key: total[key] + least[key] for key in NOTHING}
    times = [system.time_ms() for _ in range(rounds)]
    return [{"phase": "calls", **total, "measured_ms": statistics.median(times)}]


def rows_of(
    case: cpu.Case, model, dtype: str, exits: str, chosen, machine: Machine, quick: bool
) -> list[dict]:
    """Rows of a case: by phases, and at full depth what exits cost in vain, of a single batch."""
    if len(case.sentences) > case.batch:
        system = cpu.our_system(dtype, model, exits, chosen, case.sentences, case.batch)
        return one_by_one(system, model.config, machine)
    b = texts.batch(case.sentences)
    call = {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "word_ids": b.word_ids}
    call |= chosen(b)
    found = phases(model, call, machine)
    if exits == report.FULL:
        found += bookkeeping(model, call, ROUNDS if quick else ASKED_ROUNDS)
    return found


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None):
    """Measure and write rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, made-up text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="a folder")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    theirs, _, cases, _ = cpu.random_bert(args.quick)
    model = tokenexit.convert(theirs)
    ours = cpu.forms(model)
    large = max((texts.batch(case.sentences) for case in cases), key=lambda b: b.input_ids.numel())
    call = {"input_ids": large.input_ids, "attention_mask": large.attention_mask}
    best = dict.fromkeys(("fp32", "bf16", "int8"), 0.0)
    if DEVICES:
        best |= {name: peak_of_ours(each, call) for name, each in ours.items()}
    gbs = bandwidth_gbs(args.quick)
    gflops = max(best["fp32"], peak_gflops(args.quick))
    gflops16 = max(best["bf16"], peak_gflops(args.quick, torch.bfloat16))
    gops8 = max(best["int8"], peak_gops8(args.quick))
    attention = gflops16 if instruction_set() in ATTEND_IN_BF16 else gflops
    machines = {
        "fp32": Machine(gflops, gflops, gflops, gbs),
        "bf16": Machine(gflops16, attention, gflops, gbs, weight_bytes=2),
        "int8": Machine(gops8, attention, gflops, gbs, weight_bytes=1),
    }
    common = {"peak_gflops": round(gflops, 1), "peak_gops8": round(gops8, 1)}
    common |= {"peak_gflops16": round(gflops16, 1), "bandwidth_gbs": round(gbs, 1)}
    common |= harness.origin()
    wanted = (
        cases
        if args.quick
        else [
            case
            for case in cases
            if (case.text, case.batch)
            in {
                *((f"uniform {length}", batch) for length, batch in ((32, 1), (128, 1), (128, 8))),
                *((report.CONLL, batch) for batch in (1, 32)),
            }
        ]
    )
    _, narrow, decided, of_narrow, *_ = cpu.demo_tagger(args.quick)
    alone = [case for case in of_narrow if case.batch == 1]
    rows = []
    for name, taggers, chosen_by, these in (
        (report.BASE, ours, cpu.imposed(model.config.num_hidden_layers), wanted),
        (report.TAGGER, cpu.forms(narrow), {report.FULL: decided[report.FULL]}, alone),
    ):
        for case, (exits, chosen), (dtype, tagger) in product(
            these, chosen_by.items(), taggers.items()
        ):
            if exits.startswith("sentence"):
                continue
            facts = {"run": common["date"], "model": name, **case.facts()}
            facts |= {"exits": exits, "dtype": dtype}
            for row in rows_of(case, tagger, dtype, exits, chosen, machines[dtype], args.quick):
                row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                rows.append({**facts, **row, **common})
    harness.write("roofline", rows, args.results)


if __name__ == "__main__":
    sys.exit(main())
