"""Writes the tables of docs/gpu.md from the rows of the last `make gpu-check`.

PYTHONPATH=benchmarks python -m gpu_page          (rows: benchmarks/results/gpu_check.jsonl)
"""

from __future__ import annotations

from collections.abc import Sequence

import harness
from experiments import report

DOCUMENT = harness.RESULTS.parents[1] / "docs/gpu.md"
HF, CALL, LAYERS = "Hugging Face sdpa", "tokenexit graph", "layers, graph"
# Of BERT-base, 64 x 128: multiply-adds of a layer, in 1e9 operations, two each.
ROWS, WIDTH = 64 * 128, 768
GFLOP = {
    "_query_key_value_kernel": 2 * ROWS * WIDTH * 3 * WIDTH / 1e9,
    "_exit_attention_fwd_kernel": 4 * ROWS * 128 * WIDTH / 1e9,
    "output": 2 * ROWS * WIDTH * WIDTH / 1e9,
    "up": 2 * ROWS * WIDTH * 4 * WIDTH / 1e9,
    "down": 2 * ROWS * WIDTH * 4 * WIDTH / 1e9,
}
PROFILES = {"goal": "words", "goal whole": "sentences"}  # that leave


def table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Markdown: names to the left, numbers to the right."""
    rows = [heads, ["---", *["--:"] * (len(heads) - 1)], *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def of(found: Sequence[dict], **wanted) -> dict[str, float]:
    """Median milliseconds by system of the rows that have these values."""
    found = [r for r in found if all(r.get(k) == v for k, v in wanted.items()) and "system" in r]
    return {row["system"]: row["median_ms"] for row in found}


def ways(rows) -> str:
    """Full depth, beside other ways to run the same tagger."""
    call = of(rows, stage="speed", exit_rate=0.0)
    alone = of(rows, stage="peers", ragged=False)
    for name in (LAYERS, "asked in vain", "tokenexit, no graph"):
        alone[name] = call[name]
    lines = [(name, f"{ms:.2f}", f"{alone[HF] / ms:.2f}") for name, ms in alone.items()]
    return table(["64 x 128, fp16", "ms", f"over {HF}"], lines)


def exits(rows) -> str:
    """A quarter of the token-layers, by what leaves."""
    lines = []
    for size in ((64, 128), (256, 128)):
        where = dict(sentences=size[0], longest=size[1], dtype="float16", ragged=False)
        rows_of = [r for r in rows if r["stage"] in ("speed", "sizes", "goals")]
        full = of(rows_of, exit_rate=0.0, **where)
        for profile, what in PROFILES.items():
            ms = of(rows_of, profile=profile, **where)
            if not full or not ms:
                continue
            ratios = (full[CALL] / ms[CALL], full[HF] / ms[CALL], full[LAYERS] / ms[LAYERS])
            times = (full[CALL], ms[CALL], full[LAYERS], ms[LAYERS])
            lines.append((f"{size[0]} x {size[1]}, {what}", *(f"{x:.2f}" for x in times + ratios)))
    heads = "call, all layers", "with exits", "layers alone, all", "with exits"
    return table(["batch, what leaves", *heads, "call x", f"x over {HF}", "layers alone x"], lines)


def launches(rows) -> str:
    """Microseconds of a pass in each kind of launch; the rate at full depth."""
    by = {}
    for row in rows:
        if "kernel" in row:
            kind = row["profile"].partition("exits ")[2]
            each = by.setdefault(row["kernel"], {})
            each[kind] = each.get(kind, 0) + row["us"]
    kinds = {"0.0 even": "full depth", "0.75 goal": "words", "0.75 goal whole": "sentences"}
    lines = []
    for name, us in sorted(by.items(), key=lambda item: -item[1].get("0.0 even", 0)):
        rate = 12e3 * GFLOP[name] / us["0.0 even"] if name in GFLOP else None
        shown = name.strip("_").removesuffix("_kernel").removeprefix("tokenexit::")
        cells = [f"{us[kind]:.0f}" if us.get(kind) else "" for kind in kinds]
        lines.append((shown, *cells, f"{rate:.0f}" if rate else ""))
    return table(["launch", *(f"us, {name}" for name in kinds.values()), "TFLOP/s"], lines)


def products(rows) -> str:
    """cuBLAS's, that is told how many rows there are, beside one that reads it on the GPU."""
    lines, found = [], [r for r in rows if r.get("role")]
    for role, count in dict.fromkeys((r["role"], r["rows"]) for r in found):
        us = {k: 1e3 * v for k, v in of(found, role=role, rows=count).items()}
        lines.append((f"{role}, {count} rows", *(f"{us[x]:.1f}" for x in _LIBRARIES)))
    return table(["product", *(f"us, {x}" for x in _LIBRARIES)], lines)


_LIBRARIES = ("cuBLAS exact", "cuBLAS all", "grouped_mm")


def one(rows) -> str:
    where = dict(sentences=1, longest=32, exit_rate=0.0)
    ms = of(rows, stage="goals", **where) or of(rows, stage="sizes", **where)
    lines = [(name, f"{x:.2f}", f"{ms[HF] / x:.1f}") for name, x in ms.items()]
    return table(["1 x 32, fp16", "ms", f"over {HF}"], lines)


def text(rows) -> str:
    """Exits of a trained tagger on text in batches."""
    mine = [row for row in rows if row["stage"] == "exits"]
    return report.clocks(mine) if mine else ""


def training(rows) -> str:
    mine = [row for row in rows if "busy_ms" in row]
    return report.steps(mine) if mine else ""


def tables() -> str:
    rows = harness.read("gpu_check")
    first = next(row for row in rows if row["stage"] == "speed")
    facts = (f"{first['device']}, torch {first['torch']} (CUDA {first['cuda']}), Triton "
             f"{first['triton']}, transformers {first['transformers']}; commit {first['commit']}, "
             f"{first['date'][:10]}.")  # fmt: skip
    parts = [
        facts,
        *(part(rows) for part in (ways, exits, launches, one, products, text, training)),
    ]
    return "\n\n".join(filter(None, parts))


def main():
    harness.between(DOCUMENT, "gpu", tables())


if __name__ == "__main__":
    main()
