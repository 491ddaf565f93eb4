"""Writes the tables of docs/gpu.md from rows of `make gpu-check`: of each card, of its last run.

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
# Sentences, longest, of many lengths.
BATCHES = [(64, 128, False), (64, 128, True), (256, 128, False), (32, 512, False)]
PROFILES = {"goal": "words", "goal whole": "sentences"}  # that leave


def of(found: Sequence[dict], **wanted) -> dict[str, float]:
    """Median milliseconds by system of the rows that have these values."""
    found = [r for r in found if all(r.get(k) == v for k, v in wanted.items()) and "system" in r]
    return {row["system"]: row["median_ms"] for row in found}


def last_runs(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """By card, rows of the last commit whose call at full depth was timed; older cards first."""
    commits = {
        row["device"]: row["commit"]
        for row in rows
        if row["stage"] == "speed" and row.get("system") == CALL and row["exit_rate"] == 0
    }
    return {
        card(device): [r for r in rows if (r["device"], r["commit"]) == (device, commit)]
        for device, commit in commits.items()
    }


def card(device: str) -> str:
    return device.removeprefix("NVIDIA ").split()[0]


def facts(row: dict) -> str:
    """Where a row comes from."""
    versions = f"torch {row['torch']} (CUDA {row['cuda']}), Triton {row['triton']}"
    return (
        f"{row['device']}, {versions}, transformers {row['transformers']}; "
        f"commit {row['commit']}, {row['date'][:10]}."
    )


def beside(title: str, cards: dict[str, dict[str, float]], digits: int) -> str:
    """Milliseconds by system, and how many times as fast as Hugging Face's: a card by the other."""
    lines = []
    for name in dict.fromkeys(name for ms in cards.values() for name in ms):
        cells = (
            (f"{ms[name]:.2f}", f"{ms[HF] / ms[name]:.{digits}f}") if name in ms else ("", "")
            for ms in cards.values()
        )
        lines.append((name, *(cell for two in cells for cell in two)))
    heads = [head for name in cards for head in (f"{name}, ms", f"over {HF}")]
    return harness.table([title, *heads], lines)


def ways(cards) -> str:
    """Full depth, beside other ways to run the same tagger."""
    found = {}
    for name, rows in cards.items():
        call = of(rows, stage="speed", exit_rate=0.0)
        mine = (HF, CALL, LAYERS, "asked in vain", "tokenexit, no graph")
        found[name] = {system: call[system] for system in mine}
        found[name] |= of(rows, stage="peers", ragged=False)  # with ours, beside them
    return beside("64 x 128, fp16", found, 2)


def exits(cards) -> str:
    """A quarter of the token-layers, by what leaves."""
    lines = []
    for name, rows in cards.items():
        rows = [r for r in rows if r["stage"] in ("speed", "sizes", "goals")]
        for sentences, longest, ragged in BATCHES:
            where = dict(sentences=sentences, longest=longest, dtype="float16", ragged=ragged)
            full = of(rows, exit_rate=0.0, **where)
            for profile, what in PROFILES.items():
                ms = of(rows, profile=profile, **where)
                if not full or not ms:
                    continue
                ratios = full[CALL] / ms[CALL], full[HF] / ms[CALL], full[LAYERS] / ms[LAYERS]
                times = full[CALL], ms[CALL], full[LAYERS], ms[LAYERS]
                batch = f"{name}, {sentences} x {longest}{', ragged' * ragged}, {what}"
                lines.append((batch, *(f"{x:.2f}" for x in times + ratios)))
    heads = ["batch, what leaves", "call, all layers", "with exits", "layers alone, all"]
    heads += ["with exits", "call x", f"x over {HF}", "layers alone x"]
    return harness.table(heads, lines)


def launches(cards) -> str:
    """Microseconds of a pass in each kind of launch; the rate at full depth."""
    by = {}
    for name, rows in cards.items():
        for row in rows:
            if "kernel" in row:
                kind = name, row["profile"].partition("exits ")[2]
                each = by.setdefault(row["kernel"], {})
                each[kind] = each.get(kind, 0) + row["us"]
    kinds = {"0.0 even": "full depth", "0.75 goal": "words", "0.75 goal whole": "sentences"}
    first, lines = (next(iter(cards)), "0.0 even"), []
    for kernel, us in sorted(by.items(), key=lambda item: -item[1].get(first, 0)):
        cells = [kernel.strip("_").removesuffix("_kernel").removeprefix("tokenexit::")]
        for name in cards:
            cells += (f"{us[name, kind]:.0f}" if us.get((name, kind)) else "" for kind in kinds)
            full = kernel in GFLOP and us.get((name, "0.0 even"))
            cells.append(f"{12e3 * GFLOP[kernel] / full:.0f}" if full else "")
        lines.append(cells)
    heads = [f"{name}, {x}" for name in cards for x in (*kinds.values(), "TFLOP/s")]
    return harness.table(["us of a launch", *heads], lines)


def products(rows) -> str:
    """cuBLAS's, that is told how many rows there are, beside one that reads it on the GPU."""
    lines, found = [], [r for r in rows if r["stage"] == "products" and r.get("role")]
    for role, count in dict.fromkeys((r["role"], r["rows"]) for r in found):
        us = {k: 1e3 * v for k, v in of(found, role=role, rows=count).items()}
        lines.append((f"{role}, {count} rows", *(f"{us[x]:.1f}" for x in _LIBRARIES)))
    return harness.table(["product", *(f"us, {x}" for x in _LIBRARIES)], lines)


_LIBRARIES = ("cuBLAS exact", "grouped_mm")


def one(cards) -> str:
    where = dict(sentences=1, longest=32, exit_rate=0.0)
    found = {
        name: of(rows, stage="goals", **where) or of(rows, stage="sizes", **where)
        for name, rows in cards.items()
    }
    return beside("1 x 32, fp16", found, 1)


def text(rows) -> str:
    """Exits of a trained tagger on text in batches."""
    mine = [row for row in rows if row["stage"] == "exits"]
    return report.clocks(mine) if mine else ""


def training(rows) -> str:
    mine = [row for row in rows if "busy_ms" in row]
    return f"{facts(mine[-1])}\n\n{report.steps(mine)}" if mine else ""


def tables() -> str:
    rows = harness.read("gpu_check")
    cards = last_runs(rows)
    parts = [
        "\n".join(f"- {facts(mine[0])}" for mine in cards.values()),
        *(part(cards) for part in (ways, exits, launches, one)),
        *(part(rows) for part in (products, text, training)),
    ]
    return "\n\n".join(filter(None, parts))


def main():
    harness.between(DOCUMENT, "gpu", tables())


if __name__ == "__main__":
    main()
