"""Tables and plot from the rows that `cpu` and `roofline` wrote."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness

from tokenexit.files import write_aside

BASE, TAGGER = "BERT-base", "MiniLM-L6 tagger"
CONLL, CHINESE = "CoNLL-2003", "People's Daily"
ORT, HF, OURS, INT8 = "ONNX Runtime", "Hugging Face sdpa", "tokenexit", "tokenexit int8"
BF16 = "tokenexit bf16"
FULL, STRONG, EXTREME = "full depth", "token exit, strong", "token exit, extreme"


def processor(row: dict) -> str:
    """The kind of processor that a row is of: "Intel Xeon, amx"."""
    name = re.sub(r"\((R|TM)\)| Processor| CPU| @.*", "", row["device"]).strip()
    return ", ".join([name, *row.get("features", "").split()[-1:]])


def slug(row: dict) -> str:
    """That as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", processor(row).lower())


def latest(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Those of the last run on each kind of processor, the last run first."""
    runs = {}
    for row in rows:
        runs[processor(row)] = row["run"]  # the last one's stays
    last = sorted(runs.items(), key=lambda item: item[1], reverse=True)
    return {kind: [row for row in rows if row["run"] == run] for kind, run in last}


@dataclass(frozen=True)
class Goal:
    """A number to reach.

    Attributes:
        measured: None if it was not.
        at_most: it is to be that or less, not that or more.
        allowed: what would be measured if each phase of ours took its floor of the roofline; None
            if there is none.
    """

    text: str
    goal: float
    measured: float | None
    at_most: bool = False
    allowed: float | None = None

    @property
    def reached(self) -> str:
        if self.measured is None:
            return "not measured"
        good = self.measured <= self.goal if self.at_most else self.measured >= self.goal
        return "yes" if good else "**no**"


class Rows:
    """The rows of one run, to look up."""

    def __init__(self, rows: Iterable[dict]):
        self.all = list(rows)
        self.timed = [row for row in self.all if "times_ms" in row]

    def find(self, model: str, text: str, batch: int, system: str, kind: str = "") -> dict | None:
        """The row of a system; `kind` is its exits, or "padded", else the best batching."""
        for row in self.timed:
            if (row["model"], row["text"], row["batch"], row["system"]) != (
                model,
                text,
                batch,
                system,
            ):
                continue
            if row.get("exits", kind if row["setting"] == kind else "") == kind:
                return row
        return None

    def faster(self, row: dict | None, than: dict | None) -> float | None:
        """How many times as fast a row is, the median of ratios within rounds."""
        if row is None or than is None:
            return None
        pairs = zip(row["times_ms"], than["times_ms"], strict=True)
        return statistics.median(slow / fast for fast, slow in pairs)

    def peak(self, model: str, system: str, exits: str | None = None) -> int | None:
        for row in self.all:
            if "peak_mib" in row and (row["model"], row["system"]) == (model, system):
                if row.get("exits") == exits:
                    return row["peak_mib"]
        return None


def best(values: Iterable[float | None]) -> float | None:
    """The largest of those that there are."""
    return max((x for x in values if x is not None), default=None)


class Allowed:
    """What would be measured if each phase of ours took its floor of the roofline.

    None, each time, where there is no roofline of this machine for the case.
    """

    DTYPES = {OURS: "fp32", BF16: "bf16", INT8: "int8"}

    def __init__(self, rows: Rows, roofline: Sequence[dict]):
        self.rows = rows
        self.roofline = [row for row in roofline if row["device"] == rows.all[0]["device"]]

    def floor_ms(self, exits, ours=OURS, text=CONLL, batch=32, model=BASE):
        wanted = model, text, batch, exits, self.DTYPES[ours]
        facts = ("model", "text", "batch", "exits", "dtype")
        mine = (r for r in self.roofline if tuple(r[fact] for fact in facts) == wanted)
        return sum(r["floor_ms"] for r in mine if r["measured_ms"]) or None

    def speedup(self, exits, *case):
        full, some = (self.floor_ms(e, *case) for e in (FULL, exits))
        return full / some if full and some else None

    def eta(self, exits, ours=OURS, text=CONLL, batch=32):
        row = self.rows.find(BASE, text, batch, ours, exits)
        faster = self.speedup(exits, ours, text, batch)
        return faster * row["active_fraction"] if row and faster else None

    def over_flops(self, exits):
        row, faster = self.rows.find(BASE, CONLL, 32, OURS, exits), self.speedup(exits)
        return faster / row["flops_speedup"] if row and faster else None

    def over(self, peer: dict | None, exits, ours=OURS, text=CONLL, batch=32, model=BASE):
        """Over a peer's row."""
        floor = self.floor_ms(exits, ours, text, batch, model)
        return peer["median_ms"] / floor if peer and floor else None


def goals(rows: Rows, roofline: Sequence[dict] = ()) -> list[Goal]:
    """The goals for the CPU, measured; what the roofline of another machine allows is left out."""
    allowed = Allowed(rows, roofline)

    def eta(text, batch, exits, systems=(OURS,), model=BASE):
        found = [rows.find(model, text, batch, system, exits) for system in systems]
        return best(row["eta"] for row in found if row and "eta" in row)

    def allowed_over(peer, exits, kind="", ours=OURS):
        return allowed.over(rows.find(BASE, CONLL, 32, peer, kind), exits, ours)

    def against(exits, peer, *, text=CONLL, batch=32, kind="", ours=OURS, model=BASE):
        return rows.faster(
            rows.find(model, text, batch, ours, exits), rows.find(model, text, batch, peer, kind)
        )

    def over_flops(exits):
        row, full = (rows.find(BASE, CONLL, 32, OURS, e) for e in (exits, FULL))
        faster = rows.faster(row, full)
        return None if faster is None else faster / row["flops_speedup"]

    both = (OURS, INT8)
    uniform = [("uniform 128", 1), ("uniform 128", 8), ("uniform 512", 1)]
    cases = {(row["text"], row["batch"]) for row in rows.timed if row["model"] == BASE}

    def least(peer, where):
        found = [against(FULL, peer, text=t, batch=b) for t, b in where]
        return min((x for x in found if x is not None), default=None)

    ours_mib = rows.peak(BASE, OURS, FULL)
    theirs_mib = rows.peak(BASE, HF)
    memory = ours_mib / theirs_mib if ours_mib and theirs_mib else None
    few = ("uniform 32", 1)
    return [
        *(
            Goal(
                f"eta, {name}",
                goal,
                eta(*case, exits, systems),
                allowed=best(allowed.eta(exits, ours, *case) for ours in systems),
            )
            for name, goal, case, exits, systems in (
                ("32 ragged sentences, strong exits", 0.95, (CONLL, 32), STRONG, (OURS,)),
                ("32 ragged sentences, extreme exits", 0.90, (CONLL, 32), EXTREME, (OURS,)),
                ("one sentence of 128, strong, fp32 or int8", 0.80, uniform[0], STRONG, both),
                ("one sentence of 32, strong, fp32 or int8", 0.65, few, STRONG, both),
            )
        ),
        *(
            Goal(
                f"wall-clock speed-up over that in FLOPs, {name}",
                1.25,
                over_flops(exits),
                allowed=allowed.over_flops(exits),
            )
            for name, exits in (("strong", STRONG), ("extreme", EXTREME))
        ),
        Goal(
            f"full depth over {ORT} fp32, 32 ragged",
            1.1,
            against(FULL, ORT),
            allowed=allowed_over(ORT, FULL),
        ),
        Goal(f"full depth over {ORT} fp32, uniform, the least", 1.0, least(ORT, uniform)),
        Goal(f"full depth over {HF}, the least of all cases", 1.0, least(HF, cases)),
        *(
            Goal(
                f"{name} exits, fp32, over {ORT} int8",
                goal,
                against(exits, f"{ORT} int8"),
                allowed=allowed_over(f"{ORT} int8", exits),
            )
            for name, exits, goal in (("strong", STRONG, 2.0), ("extreme", EXTREME, 2.75))
        ),
        Goal(
            f"strong exits, int8, over {ORT} int8",
            3.5,
            against(STRONG, f"{ORT} int8", ours=INT8),
            allowed=allowed_over(f"{ORT} int8", STRONG, ours=INT8),
        ),
        Goal(
            f"strong exits over {HF}, padded",
            9.0,
            against(STRONG, HF, kind="padded"),
            allowed=allowed_over(HF, STRONG, "padded"),
        ),
        Goal("real exits, 32 sentences: eta", 0.95, eta(CONLL, 32, "token exit", model=TAGGER)),
        Goal("real exits: F1 lost, in points", 0.5, _lost(rows), at_most=True),
        Goal(
            "exit heads and bookkeeping at full depth, %, the most of all cases",
            3.0,
            _overhead(roofline),
            True,
        ),
        Goal(f"peak memory at full depth over {HF}", 1.0, memory, True),
    ]


def goals_of_today(rows: Rows, roofline: Sequence[dict] = ()) -> list[Goal]:
    """Those for processors that multiply bytes and bf16; [] on others."""
    if not {"vnni", "bf16"}.issubset(rows.all[0].get("features", "").split()):
        return []
    allowed = Allowed(rows, roofline)

    def peers(dtype, model, *case):
        names = dict.fromkeys(r["system"] for r in rows.timed if "exits" not in r)
        found = (rows.find(model, *case, name) for name in names)
        return [peer for peer in found if peer and peer["dtype"] == dtype]

    def against(exits, ours, dtype, *case, model=BASE):
        """Over the best peer of a dtype."""
        row = rows.find(model, *case, ours, exits)
        ratios = (rows.faster(row, peer) for peer in peers(dtype, model, *case))
        return min((x for x in ratios if x is not None), default=None)

    def fastest(dtype, model, *case):
        return min(peers(dtype, model, *case), key=lambda r: r["median_ms"], default=None)

    def over_best(text, goal, exits, systems, dtype, *case):
        """A goal of BERT-base: the fastest of ours over the best peer of a dtype."""
        peer = fastest(dtype, BASE, *case)
        return Goal(
            f"{text} over the best {dtype} peer",
            goal,
            best(against(exits, ours, dtype, *case) for ours in systems),
            allowed=best(allowed.over(peer, exits, ours, *case) for ours in systems),
        )

    def eta(ours):
        return (rows.find(BASE, CONLL, 32, ours, STRONG) or {}).get("eta")

    many, alone, uniform = (CONLL, 32), (CONLL, 1), ("uniform 128", 8)
    own = Allowed.DTYPES
    tagger = [against(FULL, ours, dtype, *alone, model=TAGGER) for ours, dtype in own.items()]
    narrow = [
        allowed.over(fastest(dtype, TAGGER, *alone), FULL, ours, *alone, model=TAGGER)
        for ours, dtype in own.items()
    ]
    return [
        over_best("int8, full depth,", 1.5, FULL, [INT8], "int8", *many),
        over_best("the same, uniform 128 x 8,", 1.1, FULL, [INT8], "int8", *uniform),
        over_best("int8, strong exits,", 4.0, STRONG, [INT8], "int8", *many),
        over_best("int8, extreme exits,", 6.0, EXTREME, [INT8], "int8", *many),
        over_best("bf16, full depth,", 1.0, FULL, [BF16], "int8", *many),
        over_best("bf16, strong exits,", 2.75, STRONG, [BF16], "int8", *many),
        over_best("one sentence, strong exits, our best,", 2.5, STRONG, own, "int8", *alone),
        over_best("fp32, full depth, uniform 128 x 8,", 1.1, FULL, [OURS], "fp32", *uniform),
        *(
            Goal(
                f"eta, strong exits, {own[ours]}",
                goal,
                eta(ours),
                allowed=allowed.eta(STRONG, ours),
            )
            for ours, goal in ((OURS, 0.95), (BF16, 0.9), (INT8, 0.9))
        ),
        Goal(
            "the tagger, one sentence, full depth, over every peer of the dtype",
            1.1,
            min((x for x in tagger if x is not None), default=None),
            allowed=min((x for x in narrow if x is not None), default=None),
        ),
    ]


def _lost(rows: Rows) -> float | None:
    full, exits = (rows.find(TAGGER, CONLL, 32, OURS, e) for e in (FULL, "token exit"))
    return None if not full or not exits else 100 * (full["f1"] - exits["f1"])


def _overhead(roofline: Sequence[dict]) -> float | None:
    percents = Counter()
    for row in roofline:
        if "share" in row:
            percents[row["text"], row["batch"], row["dtype"]] += 100 * row["share"]
    return max(percents.values(), default=None)


def tables(
    rows: Sequence[dict], roofline: Sequence[dict] = (), latency: Sequence[dict] = ()
) -> str:
    """All of the report, in Markdown."""
    if not rows:
        return "No rows yet: run `make bench`."
    first, found = rows[0], Rows(rows)
    versions = ", ".join(
        f"{name} {first[name]}"
        for name in ("torch", "transformers", "onnxruntime", "openvino", "ctranslate2")
        if name in first
    )
    parts = [
        f"{_origin(first)}; {versions}; run `{first['run']}` of `benchmarks/results/cpu.jsonl`.",
        "## Goals",
        harness.table(
            ["", "goal", "measured", "reached", "roofline allows"],
            [
                [
                    g.text,
                    f"{'<=' if g.at_most else '>='} {g.goal:g}",
                    "" if g.measured is None else f"{g.measured:.2f}",
                    g.reached,
                    "" if g.allowed is None else f"{g.allowed:.2f}",
                ]
                for g in [*goals(found, roofline), *goals_of_today(found, roofline)]
            ],
        ),
    ]
    for model in dict.fromkeys(row["model"] for row in found.timed):
        parts += [f"## {model}: tokens a second", _speeds(found, model)]
        parts += [f"### {model}: what exits save", _savings(found, model)]
    parts += ["## Where we lose", _losses(found)]
    if latency:
        parts += ["## One sentence at a time", _latency(latency)]
    memory = [row for row in rows if "peak_mib" in row]
    if memory:
        parts += ["## Peak memory", _memory(memory)]
    if roofline:
        parts += ["## Roofline", _roofline(roofline)]
    return "\n\n".join(parts)


def overview(runs: Mapping[str, Sequence[dict]]) -> str:
    """Tokens a second of each system on each kind of processor, side by side, in Markdown.

    Args:
        runs: see `latest`.
    """
    found = {kind: Rows(rows).timed for kind, rows in runs.items()}
    parts = []
    for model in (BASE, TAGGER):
        mine = {k: [r for r in rows if r["model"] == model] for k, rows in found.items()}
        cases = [(kind, (CONLL, batch)) for batch in (1, 32) for kind in mine]
        labels = dict.fromkeys(
            r["system"] if "exits" not in r else _label(r) for rows in mine.values() for r in rows
        )
        head = [f"{model}: {CONLL}", *(f"x {case[1]}: {kind}" for kind, case in cases)]
        lines = [[x, *(_cell(mine[kind], case, x, "best") for kind, case in cases)] for x in labels]
        parts.append(harness.table(head, lines))
    pages = [f"[{kind}](cpu-{slug(rows[0])}.md)" for kind, rows in runs.items()]
    return "\n\n".join([*parts, f"All of each run: {', '.join(pages)}."])


def _origin(row: dict) -> str:
    return f"{row['device']}, {row['threads']} threads; commit {row['commit']}; {row['date'][:10]}"


def _label(row: dict) -> str:
    if "exits" in row:
        return f"{row['system']}, {row['exits']}"
    return f"{row['system']}, padded" if row["setting"] == "padded" else row["system"]


def _speeds(found: Rows, model: str) -> str:
    mine = [row for row in found.timed if row["model"] == model]
    cases = list(dict.fromkeys((row["text"], row["batch"]) for row in mine))
    # A peer whose best batching is the whole batch has no second row for that case.
    labels = list(dict.fromkeys(r["system"] if "exits" not in r else _label(r) for r in mine))
    padded = {row["system"] for row in mine if row["setting"] == "padded" and _has_best(mine, row)}
    lines = []
    for label in labels:
        for kind in ("best", "padded") if label in padded else ("best",):
            cells = [_cell(mine, case, label, kind) for case in cases]
            lines.append([f"{label}, padded" if kind == "padded" else label])
            lines[-1] += [_quality(mine, label), *cells]
    quality = "F1" if any("f1" in row for row in mine) else "same label"
    return harness.table(["", quality, *(f"{text} x {batch}" for text, batch in cases)], lines)


def _has_best(rows, padded):
    return any(
        row["setting"] != "padded" and all(row[k] == padded[k] for k in ("system", "text", "batch"))
        for row in rows
    )


def _cell(rows, case, label, kind):
    mine = [
        row
        for row in rows
        if (row["text"], row["batch"]) == case
        and label == (_label(row) if "exits" in row else row["system"])
    ]
    if not mine:
        return ""
    row = mine[-1] if kind == "padded" else mine[0]
    if kind == "padded" and row["setting"] != "padded":
        return ""
    size = f" ({row['size']})" if kind == "best" and "size" in row and row["batch"] > 1 else ""
    return f"{row['tokens_per_s']:.0f}{size}"


def _quality(rows, label):
    mine = [r for r in rows if label == (_label(r) if "exits" in r else r["system"])]
    if "f1" in mine[0]:
        return f"{100 * mine[0]['f1']:.1f}"
    known = [row["agreement"] for row in mine if "agreement" in row]
    return f"{100 * min(known):.1f} %" if known else ""


def _savings(found: Rows, model: str) -> str:
    lines = []
    for row in found.timed:
        if row["model"] != model or row.get("exits", FULL) == FULL:
            continue
        full = found.find(model, row["text"], row["batch"], row["system"], FULL)
        lines.append(
            [
                f"{row['text']} x {row['batch']}",
                _label(row),
                f"{100 * row['active_fraction']:.1f} %",
                f"{row['flops_speedup']:.2f}",
                f"{found.faster(row, full):.2f}",
                f"{row['eta']:.2f}",
                f"{row['median_ms']:.1f} ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})",
            ]
        )
    head = ["", "", "computed", "FLOPs", "wall-clock", "eta", "ms (p20 to p80)"]
    return harness.table(head, lines)


def _losses(found: Rows) -> str:
    """Where a peer is faster than ours: at full depth those of the same dtype, with exits all."""
    lines = []
    for ours in found.timed:
        if "exits" not in ours:
            continue
        case = ours["model"], ours["text"], ours["batch"]
        slower = []
        for peer in dict.fromkeys(row["system"] for row in found.timed if "exits" not in row):
            row = found.find(*case, peer)
            ratio = found.faster(ours, row)
            comparable = row and (ours["exits"] != FULL or row["dtype"] == ours["dtype"])
            if comparable and ratio < 1:
                slower.append(f"{ratio:.2f} of {peer}")
        if slower:
            lines.append(
                f"- {case[0]}, {case[1]} x {case[2]}, {_label(ours)}: " + ", ".join(slower)
            )
    return (
        "\n".join(["Our speed as a share of each faster peer's:", "", *lines])
        if lines
        else ("Nowhere, of what was measured.")
    )


def _latency(rows: Sequence[dict]) -> str:
    """A table for each model: by threads, one caller's time and that of several at once."""
    threads = list(dict.fromkeys(row["threads"] for row in rows))
    callers = max(row["callers"] for row in rows)
    head = [""]
    for n in threads:
        head += [f"{n} thread{'s' * (n > 1)}", f"{callers} callers", "a second"]
    parts = [
        "Milliseconds that a sentence takes, median / 99th percentile, by the threads of a call; "
        f"with {callers} callers at once, also how many sentences all get in a second. In "
        "parentheses, the share of a call that is not the one op of all layers: Python, checks, "
        "packing, embeddings. "
        f"{_origin(rows[0]).partition(',')[0]}, {rows[0]['date'][:10]}."
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = {}
        for row in rows:
            if row["model"] != model:
                continue
            name = ", ".join(filter(None, (row["system"], row.get("exits"))))
            line = lines.setdefault(name, [name, *[""] * (len(head) - 1)])
            at = 1 + 3 * threads.index(row["threads"]) + (row["callers"] > 1)
            line[at] = f"{row['p50_ms']:.2f} / {row['p99_ms']:.2f}"
            if "around" in row:
                line[at] += f" ({100 * row['around']:.0f} %)"
            if "sentences_per_s" in row:
                line[at + 1] = f"{row['sentences_per_s']:.0f}"
        head[0] = f"{model}, {rows[0]['text']}"
        parts.append(harness.table(head, list(lines.values())))
    return "\n\n".join(parts)


def _memory(rows):
    lines = [[row["model"], _label({**row, "setting": ""}), f"{row['peak_mib']}"] for row in rows]
    return harness.table(["", "", "MiB"], lines)


def _roofline(rows: Sequence[dict]) -> str:
    first = rows[0]
    peak, peak8, bandwidth = (first[x] for x in ("peak_gflops", "peak_gops8", "bandwidth_gbs"))
    bf16 = f", of bf16 {first['peak_gflops16']:.0f} GFLOP/s" if "peak_gflops16" in first else ""
    text = (
        f"Floor of a phase: `max(operations / {peak:.0f} GFLOP/s, weight bytes / "
        f"{bandwidth:.1f} GB/s)`, both measured in the run, summed over layers, with the kind of "
        f"attention that is faster so; products of 8-bit weights have {peak8:.0f} GOP/s{bf16}. "
        "Milliseconds of floor / measured (the first as a share of the second). A layer is one op: "
        "its attention block is q to norm, its feed-forward part up and down. Exit heads (those "
        "below the last, by themselves) and decisions (a call in which each layer asks in vain, "
        "less one in which none asks, in alternation): ms, and the share of the latter call. "
        "Calls: all that a call does, of sentences that come one at a time. "
        f"{_origin(first)}."
    )
    parts = [text]
    facts = ("model", "text", "batch", "dtype")
    for case in dict.fromkeys(tuple(r[fact] for fact in facts) for r in rows):
        model, name, batch, dtype = case
        mine = [r for r in rows if tuple(r[fact] for fact in facts) == case]
        exits = list(dict.fromkeys(row["exits"] for row in mine))
        cells = {(row["phase"], row["exits"]): _phase(row) for row in mine}
        phases = dict.fromkeys(row["phase"] for row in mine)
        lines = [[phase, *(cells.get((phase, e), "") for e in exits)] for phase in phases]
        parts.append(harness.table([f"{model}, {name} x {batch}, {dtype}", *exits], lines))
    return "\n\n".join(parts)


def _phase(row: dict) -> str:
    floor, measured = f"{row['floor_ms']:.2f}", row["measured_ms"]
    if measured is None:
        return floor
    if "share" in row:
        return f"{measured:+.2f} ({100 * row['share']:+.2f} %)"
    share = f" ({100 * row['floor_ms'] / measured:.0f} %)" if row["floor_ms"] and measured else ""
    return f"{floor} / {measured:.2f}{share}"


def plot(rows: Sequence[dict], path: Path):
    """Tokens a second of each system on ragged sentences, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = Rows(rows).timed
    models = list(dict.fromkeys(row["model"] for row in timed))
    if not models:
        return
    figure, panels = pyplot.subplots(
        len(models), 1, figsize=(9, 5.2 * len(models)), squeeze=False, layout="constrained"
    )
    for panel, model in zip(panels[:, 0], models, strict=True):
        mine = [r for r in timed if r["model"] == model and r["text"] == CONLL]
        batch = min({row["batch"] for row in mine}, key=lambda b: abs(b - 32))
        mine = sorted((r for r in mine if r["batch"] == batch), key=lambda r: r["tokens_per_s"])
        names = [_label(row) for row in mine]
        speeds = [row["tokens_per_s"] for row in mine]
        spread = [
            [
                row["tokens"] / row["median_ms"] * 1e3 - row["tokens"] / row["p80_ms"] * 1e3
                for row in mine
            ],
            [
                row["tokens"] / row["p20_ms"] * 1e3 - row["tokens"] / row["median_ms"] * 1e3
                for row in mine
            ],
        ]
        colors = [_color(row) for row in mine]
        panel.barh(names, speeds, xerr=spread, color=colors, error_kw={"lw": 1, "ecolor": "#444"})
        for row, speed in zip(mine, speeds, strict=True):
            f1 = f"   F1 {100 * row['f1']:.1f}" if "f1" in row else ""
            panel.annotate(
                f"{speed:.0f}{f1}",
                (row["tokens"] / row["p20_ms"] * 1e3, _label(row)),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        fastest = max(row["tokens"] / row["p20_ms"] * 1e3 for row in mine)
        panel.set_xlim(0, 1.25 * fastest)  # room for the labels
        panel.set_xlabel("real tokens a second")
        panel.set_title(f"{model}, {batch} sentences of {CONLL} at a time", loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", labelsize=8)
    figure.suptitle(f"{timed[0]['device']}, {timed[0]['threads']} threads", fontsize=9)
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=130, format="png")
    pyplot.close(figure)


def _color(row: dict) -> str:
    if not row["system"].startswith(OURS):
        return "#9aa5b1"
    return "#2f6f9f" if row["dtype"] == "fp32" else "#5fa86b"
