"""What all benchmarks share: alternating runs, medians, one JSON row a measurement."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def alternate(systems: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each system, A B C A B C ..., after a round of warming up."""
    times = {name: [] for name in systems}
    for _ in range(rounds + 1):
        for name, run in systems.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: values[1:] for name, values in times.items()}


def rows(times: Mapping[str, list[float]], baseline: str, **facts) -> list[dict]:
    """A row for each system: median, p20, p80, speed-up over the baseline (median of ratios).

    Args:
        facts: what was measured: shapes, dtype, exit rate, ...
    """
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS, capture_output=True, text=True
    ).stdout.strip()
    common = {
        **facts,
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    result = []
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=5)
        ratios = [a / b for a, b in zip(times[baseline], values, strict=True)]
        result.append(
            {
                "system": name,
                "median_ms": round(statistics.median(values), 3),
                "p20_ms": round(low, 3),
                "p80_ms": round(high, 3),
                f"speedup_over_{baseline}": round(statistics.median(ratios), 3),
                **common,
            }
        )
    return result


def write(name: str, measured: list[dict]):
    """Append rows to `results/NAME.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        for row in measured:
            file.write(json.dumps(row) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()
