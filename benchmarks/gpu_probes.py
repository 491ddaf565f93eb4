"""What `gpu_check.py` asks in stages from smoke to sizes; its --help tells of them.

    PYTHONPATH=benchmarks:tests python -m gpu_probes PART ...          (--help for options)

Each answer is printed as it comes and kept in the folder --out: for reading in notes/STAGE.txt, for
programs in gpu_check.jsonl. What fails is told, and the rest goes on. What is wrong is not timed.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import functools
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

import gpu
import harness
import texts
import torch
import torch.nn.functional as F

import tokenexit
from tokenexit import ExitPolicy
from tokenexit.loops import gpu as gpu_loop
from tokenexit.ops.pack_tokens import pack

STARTED = time.perf_counter()
TINY = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
GRAPHS = ["tokenexit graph", "layers, graph"]
IN_A_GRAPH = 10  # products, so that what starts it is not what is timed
CHOSEN = None
BAD = []


def say(*words, keep=False):
    text = " ".join(str(word) for word in words)
    print(f"[{time.perf_counter() - STARTED:6.1f}] {text}", flush=True)
    if keep and not CHOSEN.warm:
        notes = CHOSEN.out / "notes"
        notes.mkdir(parents=True, exist_ok=True)
        with open(notes / f"{CHOSEN.stage}.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")


@functools.cache
def origin() -> dict:
    device = torch.cuda.get_device_name() if CHOSEN.device != "cpu" else "tried on a CPU"
    return harness.origin() | {"cuda": torch.version.cuda, "device": device}


def write(**row):
    if CHOSEN.warm:
        return
    harness.write("gpu_check", [{"stage": CHOSEN.stage, **row, **origin()}], CHOSEN.out)


def left() -> float:
    """Seconds of --seconds that are left."""
    return CHOSEN.seconds - (time.perf_counter() - STARTED)


def time_for(what, seconds=6) -> bool:
    """Whether so many are left; told if not."""
    enough = left() >= seconds
    if not enough:
        say(f"-- {what}: not run, the stage's time is over", keep=True)
    return enough


def attempt(name, run):
    """run()'s result; None, told and remembered, where it raises."""
    faulthandler.dump_traceback_later(45)  # says where it stands if it takes long
    try:
        return run()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        told = f"{type(error).__name__} at {where}: {str(error)[:300]}"
        say(f"FAILED {name}: {told}", keep=True)
        traceback.print_exc(limit=-12, file=sys.stdout)
        BAD.append(name)
        if lost():
            say("the GPU's context is lost: the rest of this stage is left out", keep=True)
            sys.stdout.flush()
            os._exit(4)
        return None
    finally:
        faulthandler.cancel_dump_traceback_later()


def lost() -> bool:
    """Whether the GPU answers no more, as after an illegal access; a failed capture is none."""
    if CHOSEN.device == "cpu":
        return False
    try:
        return (torch.ones(1, device=CHOSEN.device) + 1).item() != 2
    except RuntimeError:
        return True


# What runs


def ours(model, batch, layers=None, graph=True, **more):
    model.ours.cuda_graphs = graph
    padded = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return model.ours(**padded, word_ids=batch.word_ids, exit_layers=layers, **more).logits


def capture(run):
    """run in a CUDA graph; itself without a GPU."""
    return run if CHOSEN.device == "cpu" else gpu.capture(run)


def theirs_graph(theirs, batch):
    """Hugging Face's modules in a CUDA graph, all sentences of full length: no mask.

    Its model looks whether a mask is of any use, but in a capture, where it makes one. Compiled
    layers would be compiled for that anew.
    """
    bert, head, ids = theirs.bert, theirs.classifier, batch.input_ids

    def run():
        h = bert.embeddings(input_ids=ids)
        for layer in bert.encoder.layer:
            h = layer(h, None)
            h = h[0] if isinstance(h, tuple) else h
        return head(h)

    if CHOSEN.device == "cpu":
        return run
    aside = torch.cuda.Stream()  # as it is captured: all is compiled then
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run(), run()
    torch.cuda.synchronize()
    with torch.compiler.set_stance("fail_on_recompile"):
        return capture(run)


def sentence_by_sentence(packed):
    ends = packed.cu_tokens.tolist()

    def attention(q, k, v):
        done = []
        for a, b in zip(ends, ends[1:], strict=False):
            one = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            done.append(F.scaled_dot_product_attention(*one)[0].transpose(0, 1))
        return torch.cat(done)

    return attention


def varlen(packed):
    """PyTorch's attention over packed sentences; one by one on a CPU, which has none."""
    if CHOSEN.device == "cpu":
        return sentence_by_sentence(packed)
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = packed.cu_tokens.int(), packed.shape[1]
    return lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest)


def flexible(packed):
    """FlexAttention over packed sentences, compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sentence, size = packed.sentence_of_token, len(packed.sentence_of_token)

    def same(b, h, q, k):
        return sentence[q] == sentence[k]

    mask = create_block_mask(same, None, None, size, size, device=sentence.device)
    gpu_is_here = CHOSEN.device != "cpu"
    attend = torch.compile(flex_attention, dynamic=False) if gpu_is_here else flex_attention

    def attention(q, k, v):
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(*heads_first, block_mask=mask)[0].transpose(0, 1)

    return attention


def packed_graph(model, batch, attention_of):
    """Hugging Face's weights on packed tokens: cuBLAS, such an attention, a CUDA graph."""
    bert, head = model.theirs.bert, model.theirs.classifier
    packed = pack(batch.attention_mask, batch.word_ids)
    ids, words, attention = packed.pack(batch.input_ids), bert.embeddings, attention_of(packed)
    parts = [
        [getattr(layer.attention.self, name) for name in ("query", "key", "value")]
        for layer in bert.encoder.layer
    ]
    weights = [torch.cat([p.weight for p in part]) for part in parts]
    biases = [torch.cat([p.bias for p in part]) for part in parts]
    heads = bert.config.num_attention_heads

    def run():
        h = words.word_embeddings(ids) + words.position_embeddings(packed.positions)
        h = words.LayerNorm(h + words.token_type_embeddings(torch.zeros_like(ids)))
        for layer, weight, bias in zip(bert.encoder.layer, weights, biases, strict=True):
            qkv = F.linear(h, weight, bias).unflatten(-1, (3, heads, -1))
            h = layer.attention.output(attention(*qkv.unbind(1)).flatten(1), h)
            h = layer.output(layer.intermediate(h), h)
        return head(h)

    replay = capture(run)
    return lambda: packed.unpack(replay())


def compiled(theirs):
    net = copy.deepcopy(theirs)
    if CHOSEN.device != "cpu":  # where a compiler may be missing
        for layer in net.bert.encoder.layer:
            layer.compile(dynamic=False)
    return net


# How it is judged and timed


def judge(name, got, truth, same, real) -> bool:
    """Whether logits are right, as `gpu.wrong` has it; told if not."""
    why = gpu.wrong(got, truth, same, real)
    if why:
        BAD.append(name)
        say(f"WRONG {name}: {why}", keep=True)
    return why is None


def table(
    title, found, base, tokens=0, each=1, brief=False, rounds=20, busy=False, **facts
) -> dict[str, float]:
    """Time the systems, tell a line of each, write a row of each; milliseconds by name.

    Args:
        base: the system that others are held against, or the first.
        tokens: of a call, for a rate; 0 for none.
        each: how often a call does it; times are of one.
        brief: the lines are for the log only.
        busy: tell for how long the GPU is busy with a call, which may wait for the host.
    """
    found = {name: run for name, run in found.items() if attempt(name, run) is not None}
    if not found or CHOSEN.warm:
        return {}
    measured = gpu.measure(found, CHOSEN.device, rounds if CHOSEN.device != "cpu" else 2)
    if busy and CHOSEN.device != "cpu":
        for name, run in found.items():
            measured[name]["busy_ms"] = round(busy_us(on_gpu(run)) / 1e3, 3)
    base = base if base in measured else next(iter(measured))
    for m in measured.values():
        m["times_ms"] = [ms / each for ms in m["times_ms"]]
        m["back_to_back_ms"] /= each
    say(title, keep=not brief)
    rows = harness.rows({name: m["times_ms"] for name, m in measured.items()}, base, **facts)
    for row in rows:
        m = measured[row["system"]]
        close, ratio = m["back_to_back_ms"], row[f"speedup_over_{base}"]
        median = statistics.median(m["times_ms"])
        rate = f" {tokens / close / 1e3:6.2f} Mtok/s" if tokens else ""
        line = f"  {row['system']:24} {median:8.3f} ms {close:8.3f}{rate} x{ratio:.2f}"
        line += f", the GPU busy for {m['busy_ms']:.2f}" if "busy_ms" in m else ""
        say(line, keep=not brief)
        write(**{**row, **m, "median_ms": median, "tokens": tokens})
    return {name: statistics.median(m["times_ms"]) for name, m in measured.items()}


def on_gpu(run, times=1) -> list[tuple[float, float, str]]:
    """Start, end and name of what a GPU does for some calls, in microseconds, by their ends.

    A launch may begin while the one before ends.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    events = (
        (event.time_range.start, event.time_range.end, event.name)
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return sorted(events, key=lambda event: (event[1], event[0]))


def busy_us(events) -> float:
    """Microseconds in which any of them runs."""
    total, until = 0.0, float("-inf")
    for start, end, _ in sorted(events):
        total, until = total + max(0.0, end - max(start, until)), max(until, end)
    return total


class Bench:
    """BERT-base with random weights, Hugging Face's and ours, in fp32 and the dtype under test."""

    def __init__(self):
        self.dtype = torch.float16 if CHOSEN.device != "cpu" else torch.bfloat16
        self.shape = TINY | {"vocab_size": 200} if CHOSEN.tiny else {}
        self.cpu = gpu.base(**self.shape)
        self.truth = self.cpu.to(CHOSEN.device, torch.float32)
        self.model = self.cpu.to(CHOSEN.device, self.dtype)
        config = self.cpu.theirs.config
        self.vocab, self.layers = config.vocab_size, config.num_hidden_layers
        self.width, self.inner = config.hidden_size, config.intermediate_size
        self.size = (4, 16) if CHOSEN.tiny else gpu.GOAL[:2]
        say("models are on the device")

    def of_dtype(self, dtype):
        other = copy.copy(self)
        other.dtype, other.model = dtype, self.cpu.to(CHOSEN.device, dtype)
        return other

    def batch(self, sentences, n, lengths=None):
        made = texts.uniform(sentences, n, self.vocab)
        if lengths is not None:
            made = [texts.uniform(1, m, self.vocab, seed)[0] for seed, m in enumerate(lengths)]
        return texts.batch(made)

    def ragged(self):
        """Lengths of sentences as text has them: most are short, the longest is the limit."""
        g = torch.Generator().manual_seed(0)
        lengths = 6 + 30 * torch.empty(self.size[0]).exponential_(generator=g)
        return [self.size[1], *lengths.clamp(max=self.size[1]).long().tolist()[1:]]

    def exits(self, batch, rate, kind):
        if not rate:
            return None
        if kind != "goal whole":
            return gpu.exits(batch, self.layers, rate, kind)
        # Sentences leave as words do in "goal".
        each = gpu.exits(batch, self.layers, rate, "goal")[batch.real].sort().values
        place = (torch.arange(len(batch.real)) + 0.5) / len(batch.real) * len(each)
        order = torch.randperm(len(place), generator=torch.Generator().manual_seed(0))
        return each[place.long()][order][:, None] * batch.real

    def case(self, sentences, n, rate, kind, systems, lengths=None):
        """Check and time; the systems are names of `of`. Milliseconds by name."""
        if not time_for(f"{sentences} x {n}{' ragged' * bool(lengths)}, exits {rate} {kind}"):
            return {}
        cpu = self.batch(sentences, n, lengths)
        layers, tokens = self.exits(cpu, rate, kind), int(cpu.real.sum())
        share = 1.0 if layers is None else float(layers[cpu.real].double().mean()) / self.layers
        batch = on_device(cpu)
        layers = None if layers is None else layers.to(CHOSEN.device)
        judge_name = gpu.HF if layers is None else gpu.PAPER
        truth, same = (
            attempt(f"{judge_name}, {what}", gpu.judges(model, batch, layers)[judge_name])
            for what, model in (("fp32", self.truth), (str(self.dtype), self.model))
        )
        if truth is None or same is None:
            return {}
        found = {gpu.HF: gpu.judges(self.model, batch, layers)[gpu.HF]}
        for name in systems:
            run = attempt(f"making {name}", lambda name=name: self.of(name, batch, layers))
            got = None if run is None else attempt(name, run)
            if got is not None and judge(name, got, truth, same, batch.real):
                found[name] = run
        what = f"{sentences} x {n}" + (f" ragged, {tokens} tokens" if lengths else "")
        dtype = str(self.dtype)[6:]
        title = f"-- {what}, {dtype}, exits {rate} {kind}: {share:.3f} of token-layers"
        facts = dict(sentences=sentences, longest=n, exit_rate=rate, profile=kind, dtype=dtype)
        facts |= dict(active_fraction=round(share, 4), ragged=bool(lengths))
        return table(title, found, gpu.HF, tokens, **facts)

    def of(self, name, batch, layers):
        """What gives the logits; of our own ways, once it is sure that they are taken."""
        model = self.model
        if name == "Hugging Face, graph":
            return theirs_graph(model.theirs, batch)
        if name == "layers, graph":
            if CHOSEN.device == "cpu":
                return gpu.judges(model, batch, layers)[gpu.PAPER]
            return gpu.layers_alone(model.ours, batch, layers)
        vain = ExitPolicy(threshold=1e-30)  # nobody is ever that sure
        run = {
            "tokenexit graph": lambda: ours(model, batch, layers),
            "tokenexit, no graph": lambda: ours(model, batch, layers, graph=False),
            "asked in vain": lambda: ours(model, batch, layers, policy=vain),
            gpu.PAPER: gpu.judges(model, batch, layers)[gpu.PAPER],
        }[name]
        if CHOSEN.device != "cpu" and name != gpu.PAPER:
            gpu_loop.FALLBACKS.clear()
            model.ours.backend = "gpu"  # an error where that is not possible
            try:
                run()
            finally:
                model.ours.backend = "auto"
            if gpu_loop.FALLBACKS:
                raise RuntimeError(f"a slower path served: {dict(gpu_loop.FALLBACKS)}")
        return run


def on_device(batch):
    return texts.Batch(*(getattr(batch, x).to(CHOSEN.device) for x in batch.__dataclass_fields__))


@functools.cache
def bench():
    return Bench()


# The parts


def smoke():
    """A tiny tagger, directly and in a graph, against the reference on the same device."""
    missing = gpu_loop.lacks() if CHOSEN.device != "cpu" else None
    if missing:
        BAD.append("the CUDA op")
        say(f"MISSING: {missing}; the static loop is not taken", keep=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with torch.no_grad():
            attempt(f"tiny tagger, {dtype}", lambda dtype=dtype: tiny_tagger(dtype))


def tiny_tagger(dtype):
    from random_models import random_batch, random_tagger

    tagger = random_tagger(dtype=dtype).to(CHOSEN.device)
    batch = random_batch([5, 17, 1, 9, 2, 33])
    batch = {name: value.to(CHOSEN.device) for name, value in batch.items()}
    results, text, policy = {}, str(dtype)[6:], ExitPolicy(threshold=0.4, window=1)
    gpu_loop.FALLBACKS.clear()
    for name, backend, graph in (
        ("reference", "reference", False), ("direct", "auto", False), ("graph", "auto", True)
    ):  # fmt: skip
        tagger.backend, tagger.cuda_graphs = backend, graph
        start = time.perf_counter()
        out = attempt(f"tiny {text} {name}", lambda: tagger(**batch, policy=policy))
        if out is None:
            return
        results[name] = out
        took, seen = time.perf_counter() - start, out.exit_layers.unique().tolist()
        say(f"tiny {text} {name}: {took:.1f} s at first, exits at {seen}")
    truth = results.pop("reference")
    for name, got in results.items():
        alike = got.exit_layers == truth.exit_layers
        share = alike.double().mean().item()
        apart = (got.logits - truth.logits)[alike].abs().max().item()
        strict = dtype == torch.float32
        limit = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.8}[dtype]
        good = (share == 1 if strict else share > 0.8) and apart < limit
        verdict = "right" if good else "WRONG"
        told = f"{share:.3f} of exits the same, logits within {apart:.1e}: {verdict}"
        say(f"tiny {text} {name}: {told}", keep=True)
        write(system=f"tiny {name}", dtype=text, same_exits=share, apart=apart, check=verdict)
        BAD.extend([] if good else [f"tiny {text} {name}"])
    if gpu_loop.FALLBACKS:
        BAD.append(f"tiny {text}")
        say(f"tiny {text}: a slower path served: {dict(gpu_loop.FALLBACKS)}", keep=True)


def speed():
    """At the goal's size, with and without exits."""
    full = None
    for rate, kind in kinds("goal whole", "even", "whole"):
        names = [*GRAPHS, "asked in vain"] if not rate else GRAPHS
        if kind in ("even", "goal") and (not rate or kind == "goal"):
            names = [*names, "tokenexit, no graph", gpu.PAPER]
        ms = bench().case(*bench().size, rate, kind, names).get("layers, graph")
        full = full or ms
        if full and ms:
            say(f"  layers: {full / ms:.2f} times as fast as full depth", keep=True)


PLAN = ((0.0, "even"), (0.75, "goal"))


def kinds(*more):
    """Those of `PLAN`, and more that launch what those do, unless they are only warmed."""
    return PLAN if CHOSEN.warm else (*PLAN, *((0.75, kind) for kind in more))


def large():
    """A large batch, without exits and with a quarter of the token-layers."""
    for rate, kind in kinds("goal whole"):
        bench().case(*(6, 16) if CHOSEN.tiny else (256, 128), rate, kind, GRAPHS)


def one():
    """One sentence, beside Hugging Face's graph."""
    size = (1, 8) if CHOSEN.tiny else (1, 32)
    for rate, kind in PLAN:
        peer = ["Hugging Face, graph"] * (not rate)
        bench().case(*size, rate, kind, [*GRAPHS, "tokenexit, no graph", *peer])


def ragged():
    """Sentences of many lengths; those that are packed have rivals among `peers`."""
    for rate, kind in PLAN:
        bench().case(*bench().size, rate, kind, GRAPHS, lengths=bench().ragged())


def sizes():
    """Few sentences, bf16, long sentences."""
    for size in [(8, 64), (1, 128)] if not CHOSEN.tiny else [(1, 8)]:
        for rate, kind in PLAN:
            bench().case(*size, rate, kind, [*GRAPHS, "tokenexit, no graph"])
    long = (2, 24) if CHOSEN.tiny else (32, 512)
    for b, size in ((bench().of_dtype(torch.bfloat16), bench().size), (bench(), long)):
        for rate, kind in PLAN:
            b.case(*size, rate, kind, GRAPHS)


def train():
    """A training step under exits as self-sampling may draw them, at full depth, and of theirs."""
    with torch.inference_mode(False), torch.enable_grad():
        model = gpu.base(**bench().shape).to(CHOSEN.device, torch.float32)
        for size in [(4, 16)] if CHOSEN.tiny else [(32, 128), (256, 128)]:
            if time_for("training step, {} x {}".format(*size), 8):
                step = functools.partial(training_step, model, *size, 0.25)
                attempt("training step, {} x {}".format(*size), step)


def training_step(model: gpu.Model, sentences: int, length: int, share: float, warm: bool = False):
    """Time a step at full depth, under exits as self-sampling draws them, and Hugging Face's own.

    Args:
        model: in fp32.
        share: of token-layers that are computed.
    """
    device = model.ours.device.type
    ours, theirs = (copy.deepcopy(m).train() for m in (model.ours, model.theirs))
    batch = texts.batch(texts.uniform(sentences, length, ours.config.vocab_size))
    exits = texts.imposed_exits(batch, len(ours.encoder.layers), share)
    batch, exits = on_device(batch), exits.to(ours.device)
    labels = (batch.word_ids % ours.num_labels).masked_fill(batch.word_ids < 0, -100)
    rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    rows["labels"] = labels
    call = {**rows, "word_ids": batch.word_ids, "policy": ExitPolicy.never()}

    def step_of(net, inputs):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=device != "cpu")

        def step():
            with torch.autocast(device, torch.bfloat16):
                loss = net(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    found = {
        "Hugging Face": step_of(theirs, rows),
        "full depth": step_of(ours, call),
        "self-sampling": step_of(ours, {**call, "exit_layers": exits}),
    }
    if warm:
        return [run() for run in found.values()]
    title = f"-- training step, {sentences} x {length}, bf16, {share:.3f} of token-layers"
    facts = dict(sentences=sentences, longest=length, active_fraction=round(share, 4))
    tokens = sentences * length
    return table(title, found, "Hugging Face", tokens, rounds=10, busy=True, **facts)


def in_graphs(what, found, truth, same, base, **facts):
    """Times of some in a CUDA graph each, by name; who is wrong is left out."""
    made = {}
    for name, run in found.items():
        got = attempt(f"{what}, {name}", run)
        if got is None or not judge(f"{what}, {name}", got[: len(truth)], truth, same, slice(None)):
            continue

        def several(run=run):
            return [run() for _ in range(IN_A_GRAPH)][-1]

        replay = attempt(f"a graph of {what}, {name}", lambda several=several: capture(several))
        made |= {} if replay is None else {name: replay}
    return table(f"-- {what}", made, base, each=IN_A_GRAPH, brief=True, **facts)


def peers():
    """Beside other ways to run the same tagger, without exits; then sentences of many lengths."""
    model = bench().model
    for lengths in (None, bench().ragged()):
        cpu = bench().batch(*bench().size, lengths)
        layers, tokens = bench().exits(cpu, 0.75, "goal").to(CHOSEN.device), int(cpu.real.sum())
        batch = on_device(cpu)
        judges = [gpu.judges(m, batch, None)[gpu.HF] for m in (bench().truth, model)]
        truth, same = judges[0](), judges[1]()
        net = compiled(model.theirs)
        makers = {
            "packed varlen, graph": lambda batch=batch: packed_graph(model, batch, varlen),
            "Hugging Face, graph": lambda batch=batch: theirs_graph(model.theirs, batch),
            "tokenexit graph": lambda batch=batch: lambda: ours(model, batch),
            "packed flex, graph": lambda batch=batch: packed_graph(model, batch, flexible),
            "torch.compile": lambda batch=batch, net=net: gpu.judges(
                gpu.Model(net, model.ours), batch, None
            )[gpu.HF],
            "torch.compile, graph": lambda batch=batch, net=net: theirs_graph(net, batch),
        }
        if lengths is not None:  # those without a mask do not apply
            for name in ("Hugging Face, graph", "torch.compile, graph", "packed flex, graph"):
                makers.pop(name)
        found = {gpu.HF: judges[1]}
        for name, make in makers.items():
            if not time_for(name, 9 if "flex" in name or "compile" in name else 4):
                continue
            start = time.perf_counter()
            run = attempt(f"making {name}", make)
            got = None if run is None else attempt(name, run)
            say(f"{name}: {time.perf_counter() - start:.1f} s at first")
            if got is not None and judge(name, got.clone(), truth, same, batch.real):
                found[name] = run
        found["tokenexit graph, goal"] = lambda b=batch, x=layers: ours(model, b, x)
        what = "{} x {}".format(*bench().size) + (f" ragged, {tokens} tokens" if lengths else "")
        facts = dict(sentences=bench().size[0], longest=bench().size[1], profile="peers")
        facts |= dict(ragged=bool(lengths), dtype=str(bench().dtype)[6:])
        table(f"-- peers, {what}", found, gpu.HF, tokens, **facts)
        if not time_for("more peers", 9):
            return


def products():
    """The products of a layer over the first rows of a buffer, how many being told on the device.

    cuBLAS, that is told by the host, is the bound: over "all" rows, and over those that count,
    "exact"ly.
    """
    device, dtype = CHOSEN.device, torch.bfloat16
    capacity, width, inner = bench().size[0] * bench().size[1], bench().width, bench().inner
    if device != "cpu" and not CHOSEN.warm:
        x = torch.randn(8192, 8192, device=device, dtype=dtype)
        found = {"8192 cubed": lambda: x @ x, "copy of 128 MiB": lambda: x.clone()}
        ms = table("-- what the GPU can do, bf16", found, "8192 cubed", dtype="bfloat16")
        rates = 2 * 8192**3 / ms["8192 cubed"] / 1e9, 4 * 8192**2 / ms["copy of 128 MiB"] / 1e9
        say("  peak: {:.0f} TFLOP/s, {:.2f} TB/s read plus written".format(*rates), keep=True)
    roles = {"keys and values": (2 * width, width), "output": (width, width)}
    roles |= {"up": (inner, width), "down": (width, inner)}
    generator = torch.Generator().manual_seed(0)
    for role, (n, k) in roles.items():
        x, weight = (
            torch.randn(size, k, generator=generator).to(device, dtype) for size in (capacity, n)
        )
        weight *= k**-0.5
        for rows in (capacity, capacity // 4, capacity // 10):
            if time_for(f"{role}, {rows} rows"):
                product_case(role, x, weight, rows)


def product_case(role, x, weight, rows):
    capacity, (n, k) = len(x), weight.shape
    count = torch.tensor([rows], device=x.device)
    ends = count.int()
    makers = {
        "cuBLAS all": lambda: F.linear(x, weight),
        "cuBLAS exact": lambda: F.linear(x[:rows], weight),
        "grouped_mm": lambda: F.grouped_mm(x, weight.T[None], offs=ends),
    }
    if x.is_cuda:
        from tokenexit.kernels.linear import linear

        makers["tokenexit"] = lambda: linear(x, weight, count=count)
    truth, same = F.linear(x[:rows].float(), weight.float()), F.linear(x[:rows], weight)
    facts = dict(role=role, rows=rows, capacity=capacity, columns=n, depth=k, dtype="bfloat16")
    title = f"-- {role} {k}>{n}, {rows} of {capacity} rows"
    ms = in_graphs(role, makers, truth, same, "cuBLAS exact", **facts)
    told = ", ".join(f"{name} {1e3 * t:.1f}" for name, t in ms.items())
    rate = 2 * rows * n * k / 1e9 / min(ms.values(), default=1)
    # The summary is short: what lies between is in the rows.
    say(f"{title}, us: {told}; {rate:.0f} TFLOP/s", keep=rows in (capacity, capacity // 10))


ROLES = ["output", "up", "down"]


def launches():
    """Microseconds of each launch in a replayed graph of the layers, by its place in the layer."""
    cpu = bench().batch(*bench().size)
    batch = on_device(cpu)
    if CHOSEN.device == "cpu":
        return
    for rate, kind in (*PLAN, (0.75, "goal whole")):
        if not time_for(f"launches, exits {rate} {kind}", 4):
            return
        layers = bench().exits(cpu, rate, kind)
        layers = None if layers is None else layers.to(CHOSEN.device)
        replay = gpu.layers_alone(bench().model.ours, batch, layers)
        for _ in range(3):
            replay()
        size = "{} x {}".format(*bench().size)
        by_layer(on_gpu(replay, 5), f"launches at {size}, exits {rate} {kind}", bench().layers)


def by_layer(events, title, num_layers):
    """Of what `on_gpu` gives for some replays: microseconds of one, by name and layer.

    What runs while the one before ends counts from that end on.
    """
    of, layer, product, replays, until = {}, -1, 0, 0, float("-inf")
    for start, end, name in events:
        name = name.split("(")[0][:40]
        if "query_key_value" in name:
            layer, product = (layer + 1) % num_layers, 0
            replays += layer == 0
        elif name.startswith("_linear_kernel"):
            name, product = ROLES[min(product, 2)], product + 1
        of.setdefault(name, {}).setdefault(max(layer, 0), []).append(end - max(start, until))
        until = end
    if not replays:
        say(f"-- {title}: the profiler saw no launches of the layers", keep=True)
        return
    busy = busy_us(events) / replays
    shown = [i for i in (0, 1, 2, 5, 11) if i < num_layers]  # the whole is in the rows
    numbers = ", ".join(str(i + 1) for i in shown)
    say(f"-- {title}: busy for {busy:.0f} us a replay; layers {numbers}:", keep=True)
    for name, layers in sorted(of.items(), key=lambda x: -sum(map(sum, x[1].values())))[:7]:
        each = [sum(layers.get(i, [])) / replays for i in range(num_layers)]
        some = " ".join(f"{each[i]:.1f}" for i in shown)
        say(f"  {name:28} {sum(each):8.1f} us {some}", keep=True)
        for number, us in enumerate(each, 1):
            write(profile=title, kernel=name, layer=number, us=round(us, 3))


PARTS = {
    part.__name__: part
    for part in (
        smoke, speed, launches, products, large, one, ragged, sizes, train, peers
    )
}  # fmt: skip


def choose(parser, arguments, stage: str) -> argparse.Namespace | None:
    """Options that those of `parser` come with; None, told, without a GPU that they ask for."""
    global CHOSEN
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"))
    parser.add_argument("--stage", default=stage, help="in whose name it is told")
    parser.add_argument("--device", default="cuda", help="cpu: only to try the program (--tiny)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    parser.add_argument("--warm", action="store_true", help="compile and judge, time nothing")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing that ends later")
    CHOSEN = parser.parse_args(arguments)
    BAD.clear()
    if CHOSEN.device != "cpu" and not torch.cuda.is_available():
        print("No GPU is at hand.", file=sys.stderr)
        return None
    torch.set_float32_matmul_precision("highest")
    say("imported", tokenexit.__file__)
    return CHOSEN


def ended() -> int:
    """Say what failed; the status to end with."""
    say("nothing failed" if not BAD else f"FAILED OR WRONG: {sorted(set(BAD))}", keep=bool(BAD))
    return int(bool(BAD))


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    if choose(parser, arguments, "probes") is None:
        return 2
    for name in CHOSEN.parts:
        say(f"==== {name}")
        with torch.inference_mode():
            attempt(name, PARTS[name])
    return ended()


if __name__ == "__main__":
    sys.exit(main())
