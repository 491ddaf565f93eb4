"""How fast should exits be on a GPU? A model on paper: no time in it was measured.

    PYTHONPATH=benchmarks python -m gpu_model [--write]          (the tables of docs/gpu.md)

A launch takes `gap + max(operations, bytes) + programs that leave at once`. Operations come in
tiles, dealt to the multiprocessors, and no tile is faster than its chain of loads. BERT-base, fp16;
the layers are those of `tokenexit.loops.gpu`.
"""

import argparse
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

import harness

DOCUMENT = Path(__file__).parents[1] / "docs/gpu.md"


@dataclass(frozen=True)
class Gpu:
    """A datasheet, and what is assumed to be reached of it.

    Attributes:
        tflops, tbs: dense fp16 operations (1e12/s) and memory bandwidth (TB/s), by the datasheet.
        sms, ghz: multiprocessors, and their boost clock.
        shared: products of which two large programs share a multiprocessor (docs/kernels.md).
        ours, library: share of tflops that large products in Triton and in cuBLAS reach.
        most_splits: of kernels/linear.py; 1: no product is split.
        whole_tiles: False for a bound: tiles as fine as would be needed to keep all busy.
    """

    name: str
    tflops: float
    tbs: float
    sms: int
    ghz: float
    ours: float
    library: float
    shared: tuple[str, ...] = ()
    most_splits: int = 8
    whole_tiles: bool = True


A100 = Gpu("A100", 312, 2.04, 108, 1.41, 0.60, 0.75)
H100 = Gpu("H100", 989, 3.35, 132, 1.83, 0.45, 0.65, ("query_key_value", "output", "up"))
B200 = Gpu("B200", 2250, 8.0, 148, 1.85, 0.30, 0.60, ("query_key_value",))
GPUS = (A100, H100, B200)
GAP_US = 1.5  # of a launch within a graph or a full queue, with filling and draining
EAGER_US = 7.0  # of the host, for a launch that PyTorch makes
TRITON_US = 40.0  # of the host, for a launch through torch.library.triton_op
WAIT_US = 15.0  # of the host, for a value from the device
# Of a call beside its layers, for checks, packing and embedding: launches in its graph, launches of
# the host (copies into and out of the graph's buffers), waits.
OUTSIDE = 61, 16, 1
# Instructions of a warp before and after the loop of a large tile: those outside the loop on sm_90
# (rows of `python -m tokenexit.kernels.report --kernel large --arch sm_90 --json FILE`; 798, 2025,
# 2251 and 2195), less an estimate of what only splits and `folded` run.
ENDS = {"query_key_value": 450, "output": 1600, "up": 1850, "down": 1800}
LATENCY_US = 0.75  # of a load, or to tell another program something
STEP_US = LATENCY_US / 3  # of a chain of loads, three in flight
SM_TBS = 0.1  # from and to the L2 cache, of one multiprocessor
EMPTY_US = 0.3  # that a program that leaves at once holds its place
MEMORY, ATTENTION, ABSORBED = 0.8, 0.35, 0.25  # shares of bandwidth and of tflops reached
D, F, HEADS, LAYERS, LABELS, SIZE = 768, 3072, 12, 12, 9, 2  # SIZE: bytes of a number
PROFILES = ("even", "whole")
ABSORBED_N = (32, 64, 128, 256, 512)


class Launch(NamedTuple):
    name: str
    gflop: float
    mb: float
    us: float


def bytes_us(gpu, size):
    return size / (gpu.tbs * 1e6 * MEMORY)


def launch(
    gpu, name, flop, size, programs=0, empty=0, share=1.0, steps=0, resident=1,
    fixed_us=0, ends_us=0,
):  # fmt: skip
    """A launch of programs alike, `flop` operations on `size` bytes in all.

    What a program does before and after its loop (ends_us) shows where no other is resident, and
    of the last programs.
    """
    load = programs / gpu.sms  # of a multiprocessor
    work = flop / (gpu.tflops * 1e6 * share)  # if all are busy
    if programs and gpu.whole_tiles:
        work = max(work * ceil(load) / load, ceil(load / resident) * steps * STEP_US)
        work += ends_us * (ceil(load) if resident == 1 else 1)
    leaving = ceil(empty / (gpu.sms * resident)) * EMPTY_US
    us = GAP_US + fixed_us + max(work, bytes_us(gpu, size)) + leaving
    return Launch(name, flop / 1e9, size / 1e6, us)


def splits(tiles, steps, slots, most):
    """`_splits` of kernels/linear.py."""
    ways = [n for n in range(2, most + 1) if tiles * n <= 2 * slots]
    cost = {1: ceil(tiles / slots) * steps}
    cost |= {n: ceil(tiles * n / slots) * (ceil(steps / n) + 1) + n + 2 for n in ways}
    return min(cost, key=cost.get)


def product(gpu, name, parts, k, capacity, extra=0, persistent=True):
    """A matrix product; parts are (rows, columns).

    If it is persistent few tiles are split, else programs of the rest of capacity leave.
    """
    rows, cols, depth, resident = (128, 128, 64, 1) if capacity > 256 else (32, 32, 128, 4)
    ends_us = 0
    if capacity > 256:  # 8 warps for 4 that issue at a time
        ends_us, resident = ENDS[name] * 8 / 4 / gpu.ghz / 1e3, 1 + (name in gpu.shared)
    grid = ceil(capacity / rows) * sum(ceil(n / cols) for _, n in parts)
    tiles = sum(ceil(m / rows) * ceil(n / cols) for m, n in parts)
    size = SIZE * sum(m * k + n * k + m * n for m, n in parts) + extra
    # Operations for each byte, of those of 128 x 128.
    share, flop = gpu.ours * rows * cols / (rows + cols) / 64, 2 * tiles * rows * cols * k
    if not persistent:
        chain = k / depth, resident, 0, ends_us
        return launch(gpu, name, flop, size, tiles, grid - tiles, share, *chain)
    most = gpu.most_splits if gpu.whole_tiles else 1
    slots = gpu.sms * resident
    n = splits(tiles, ceil(k / depth), slots, most)
    # Parts are stored, then read by the last, which has to know that it is.
    moved = (ceil(tiles * n / slots) + n) * 4 * rows * cols
    adding = 2 * LATENCY_US + moved / (SM_TBS * 1e6) if n > 1 else 0
    chain = ceil(k / depth / n), resident, adding, ends_us
    return launch(gpu, name, flop, size, tiles * n, 0, share, *chain)


def layer(gpu, sentences, n, active=1.0, alive=1.0, decide=True, compact=True, keys="projected"):
    """The launches of one layer.

    Args:
        n: tokens of a sentence.
        active, alive: share of tokens still active, and of sentences not finished.
        keys: "projected"; "absorbed" (active queries over raw states: two products more, and no
            keys and values); "active": as if tokens that left had theirs for nothing, a bound.
    """
    capacity, block = sentences * n, 128 if sentences * n > 256 else 32
    a, s = ceil(active * capacity), max(1, round(alive * sentences))
    each = ceil(a / s)  # active tokens of a sentence that is not finished
    blocks = ceil(a / block)
    parts, attend, sides = [(a, D)], (ATTENTION, n / 32, 3), []
    tile, rows, rows_all = min(64, max(16, n)), each, n
    if keys == "projected":
        parts.append((s * n, 2 * D))
    elif keys == "active":
        parts.append((a, 2 * D))
    else:  # a head's queries are carried over to D numbers and back
        carry = 2 * a * D * D, SIZE * (D * D + a * D * (HEADS + 1)), blocks * HEADS * 6
        sides = [launch(gpu, f"carry_{to}", *carry, 0, gpu.ours) for to in ("in", "out")]
        attend, tile, rows, rows_all = (ABSORBED, n / 16, 1), 64, each * HEADS, n * HEADS
    per_row, heads = (D, 1) if sides else (D // HEADS, HEADS)
    programs, most = s * ceil(rows / tile) * heads, sentences * ceil(rows_all / tile) * heads
    flop = 4 * programs * tile * n * per_row
    size = SIZE * (2 * a * D * (HEADS if sides else 1) + (1 if sides else 2) * s * n * D)
    row = SIZE * a * D
    ends, all_ends = s * ceil(each / 16), sentences * ceil(n / 16)
    end = 2 * a * D * LABELS, 2 * row + SIZE * LABELS * (a + D), ends, all_ends - ends
    # The last program of a sentence decides on 32 words at a time, in two steps.
    scan_us = 8 * STEP_US
    last_us = ceil(n / 32) * 2 * STEP_US if decide else 0
    return [
        product(gpu, "query_key_value", parts, D, capacity, persistent=False),
        *sides[:1],
        launch(gpu, "exit_attention", flop, size, programs, most - programs, *attend),
        *sides[1:],
        product(gpu, "output", [(a, D)], D, capacity, row),
        product(gpu, "up", [(a, F)], D, capacity),
        product(gpu, "down", [(a, D)], F, capacity, row),
        launch(gpu, "exit_step", *end, 0.02, D / 64, 7, last_us),
        *([launch(gpu, "compact_active", 0, 32 * a, fixed_us=scan_us)] * (decide and compact)),
    ]


def profile(fewer, n, kind):
    """Of each layer the shares (active tokens, sentences not finished), `fewer` times fewer.

    After layer l a word is active with probability `(l + 1)^-e`, as in `texts.imposed_exits`. Words
    leave one by one ("even": [CLS] and [SEP] wait for the last), or a sentence's at once ("whole").
    """
    if kind not in PROFILES or not 1 <= fewer < LAYERS:
        raise ValueError(f"got {fewer!r}, {kind!r}; expected 1 <= fewer < 12, one of {PROFILES}")

    def shares(e):
        left = [number**-e for number in range(1, LAYERS + 1)]
        alive = [p if kind == "whole" else 1 - (1 - p) ** (n - 2) for p in left]
        return [((p * (n - 2) + 2 * u) / n, u) for p, u in zip(left, alive, strict=True)]

    low, high = 0.0, 50.0
    for _ in range(60):
        e = (low + high) / 2
        low, high = (low, e) if sum(a for a, _ in shares(e)) * fewer < LAYERS else (e, high)
    return shares(low)


def loop(gpu, sentences, n, fewer=1, kind="even", keys="projected", every=1):
    """The launches of all layers.

    Args:
        keys: as of `layer`, or "best": the faster of projected and absorbed in each layer.
        every: compaction after each so many layers; between, tokens that left are computed on.
    """
    shares, done = profile(fewer, n, kind), []
    for number in range(LAYERS):
        decide = fewer > 1 and number < LAYERS - 1
        options = *shares[number - number % every], decide, (number + 1) % every == 0
        ways = ("projected", "absorbed") if keys == "best" else (keys,)
        done += min((layer(gpu, sentences, n, *options, way) for way in ways), key=total_us)
    return done


def total_us(launches):
    return sum(x.us for x in launches)


def outside_us():
    """Microseconds of a call beside its layers, one after the other."""
    return OUTSIDE[0] * GAP_US + OUTSIDE[1] * EAGER_US + OUTSIDE[2] * WAIT_US


def hugging_face_us(gpu, sentences, n):
    """Microseconds of the layers on padded tokens: cuBLAS, fused attention, 12 launches each."""
    t, weights = sentences * n, D * (4 * D + 2 * F)
    products = max(2 * t * weights / (gpu.tflops * 1e6 * gpu.library), bytes_us(gpu, 2 * weights))
    attention = max(4 * t * n * D / (gpu.tflops * 1e6 * ATTENTION), bytes_us(gpu, 8 * t * D))
    rest = bytes_us(gpu, 2 * t * (2 * F + 10 * D))  # GELU; twice a sum and a LayerNorm
    return LAYERS * max(products + attention + rest + 12 * GAP_US, 12 * EAGER_US)


def absorbed_below(gpu, sentences, n):
    """The most active tokens of each sentence with which an absorbed layer is the faster one."""

    def pays(a):
        ways = ("projected", "absorbed")
        p, b = (total_us(layer(gpu, sentences, n, a / n, keys=way)) for way in ways)
        return b < p

    return max((a for a in range(1, n + 1) if pays(a)), default=0)


def goal():
    """The goal's case step by step: `(what is counted, even, whole)`, speed-ups over full depth."""

    def ops(kind, whole):
        full, fewer = loop(H100, 64, 128), loop(H100, 64, 128, 4, kind, whole)
        return sum(x.gflop for x in full) / sum(x.gflop for x in fewer)

    def speed(kind, gpu=H100, keys="projected", more_us=0.0):
        full, fewer = (loop(gpu, 64, 128, *exits) for exits in ((), (4, kind, keys)))
        return (total_us(full) + more_us) / (total_us(fewer) + more_us)

    whole, ideal = replace(H100, most_splits=1), replace(H100, whole_tiles=False)
    lines = {
        "operations, keys and values of tokens that left for nothing": lambda k: ops(k, "active"),
        "operations": lambda k: ops(k, "projected"),
        "time, if small products kept the GPU as busy as large ones": lambda k: speed(k, ideal),
        "time, with no product split along its depth": lambda k: speed(k, whole),
        "**time of the layers, the prediction**": speed,
        "the same, projected or absorbed, the faster": lambda k: speed(k, keys="best"),
        "the same, keys and values of tokens that left for nothing": lambda k: speed(
            k, keys="active"
        ),
        "time of a call, packing and embedding with it": lambda k: speed(k, more_us=outside_us()),
    }
    return [(text, *(round(value(kind), 2) for kind in PROFILES)) for text, value in lines.items()]


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def tables():
    """All tables, in Markdown."""

    def times(sentences, n, gpu=H100, **options):
        return total_us(loop(gpu, sentences, n, **options))

    sheet = [(g.name, g.tflops, g.tbs, g.sms, g.ours, g.library) for g in GPUS]
    cases = {"all active": (1, 1), "10 % active, evenly": (0.1, 1), "10 % alive": (0.1, 0.1)}
    parts = []
    for text, shares in cases.items():
        for row in zip(*(layer(g, 64, 128, *shares) for g in GPUS), strict=True):
            first = row[0]
            numbers = f"{first.gflop:.2f}", f"{first.mb:.1f}", *(f"{x.us:.1f}" for x in row)
            parts.append((text, first.name, *numbers))
    speed = []
    for g in GPUS:
        full, theirs = times(64, 128, g), hugging_face_us(g, 64, 128)
        for few in (1, 2, 4, 8):
            us = [times(64, 128, g, fewer=few, kind=kind) for kind in PROFILES]
            pairs = [f"{full / x:.2f} / {theirs / x:.2f}" for x in us]
            speed.append((g.name, few, *(f"{x / 1e3:.2f}" for x in us), *pairs))
    grid = []
    for size in (1, 8, 32, 64, 256):
        row = [size]
        for n in (16, 64, 128, 512):
            x = [times(size, n, fewer=4, kind=kind) for kind in PROFILES]
            full, theirs = times(size, n), hugging_face_us(H100, size, n)
            row.append(", ".join(f"{full / t:.1f} / {theirs / t:.1f}" for t in x))
        grid.append(row)
    absorbed = [
        (g.name, size, *(absorbed_below(g, size, n) for n in (32, 64, 128, 256, 512)))
        for g in GPUS for size in (16, 64, 256)
    ]  # fmt: skip
    operations = [
        "operations alone",
        "",
        *(round(1 / (1 / n + (HEADS - 1) / D)) for n in ABSORBED_N),
    ]
    graph, every = [], []
    for size in (1, 2, 4, 8, 16, 32, 64, 256):
        done = loop(H100, size, 128, 4, "even")
        us, host = total_us(done), [len(done) * x for x in (EAGER_US, TRITON_US)]
        faster = [f"{max(x, us) / us:.1f}" for x in host]
        graph.append((size * 128, f"{us / 1e3:.2f}", *(f"{x / 1e3:.2f}" for x in host), *faster))
        row = [times(size, 128, fewer=4, every=m) / 1e3 for m in (1, 2, 3, 4)]
        every.append((size * 128, *(f"{x:.2f}" for x in row)))
    lengths = [f"n = {n}" for n in (16, 64, 128, 512)]
    return "\n\n".join(
        (
            "### Datasheets, and the shares of the peak assumed",
            table(["GPU", "TFLOP/s", "TB/s", "multiprocessors", "ours", "cuBLAS"], sheet),
            "### One layer, 64 sentences of 128 tokens",
            table(["", "launch", "GFLOP", "MB", *(f"{g.name} µs" for g in GPUS)], parts),
            "### The goal's case on an H100, step by step: times as fast as full depth",
            table(["what is counted", "even", "whole"], goal()),
            "### 64 x 128: ms, and times as fast as own full depth / as padded Hugging Face",
            table(["GPU", "fewer", "even ms", "whole ms", "even", "whole"], speed),
            "### 4 times fewer on an H100: the same two ratios, even, then whole",
            table(["sentences", *lengths], grid),
            "### Absorbed attention is the faster up to so many active tokens of each sentence",
            table(["GPU", "sentences", *(f"n = {n}" for n in ABSORBED_N)], [operations, *absorbed]),
            "### A graph against single launches, H100, 4 times fewer, evenly, n = 128",
            table(["tokens", "GPU ms", "host ms at 7 µs", "at 40 µs", "graph x", "x"], graph),
            "### Compaction after every m layers, H100, 4 times fewer, evenly, n = 128: ms",
            table(["tokens", *(f"m = {m}" for m in (1, 2, 3, 4))], every),
        )
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/gpu.md")
    text = tables()
    print(text)
    if parser.parse_args(arguments).write:
        harness.between(DOCUMENT, "gpu model", text)


if __name__ == "__main__":
    main()
