"""What all benchmarks share: alternating runs, medians, one JSON row a measurement."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from tokenexit.files import write_aside

RESULTS = Path(__file__).parent / "results"
_PEERS = ("onnxruntime", "openvino", "nncf", "ctranslate2")
PACKAGES = ("torch", "triton", "transformers", *_PEERS)
# What decides which kernels run, and the kernel's names for it.
FEATURES = {
    "avx2": {"avx2"},
    "avx512": {"avx512vl"},
    "vnni": {"avx512_vnni", "avx_vnni"},
    "bf16": {"avx512_bf16", "amx_bf16"},
    "amx": {"amx_tile"},
}
_CPUINFO = Path("/proc/cpuinfo")


def time_ms(run: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def alternate(
    systems: Mapping[str, Callable[[], float]],
    rounds: int,
    budget_s: float = 0,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of each system, A B C A B C ..., after a round of warming up.

    Args:
        systems: by name, what runs each once and returns its milliseconds.
        rounds: at least.
        budget_s: more rounds, up to four times as many, as long as they fit into it.
        warm: they have run before; no such round.
    """
    start = time.perf_counter()
    times = {name: [] for name in systems}
    skipped = 0 if warm else 1
    done = 0
    while done < rounds + skipped or (
        done < 4 * rounds and (time.perf_counter() - start) * (done + 1) / done < budget_s
    ):
        for name, run in systems.items():
            times[name].append(run())
        done += 1
    return {name: values[skipped:] for name, values in times.items()}


def summary(times: Sequence[float]) -> dict:
    """Median and spread of a system's rounds."""
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    values = {"median_ms": statistics.median(times), "p20_ms": low, "p80_ms": high}
    return {name: round(value, 3) for name, value in values.items()}


def ratio(baseline: Sequence[float], times: Sequence[float]) -> float:
    """How many times as fast as the baseline: the median of the ratios within each round."""
    return round(statistics.median(a / b for a, b in zip(baseline, times, strict=True)), 3)


def origin() -> dict:
    """Where and when a row comes from: device, threads, versions, commit, date."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    options = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        commit = subprocess.run(["git", "describe", "--always"], **options).stdout.strip()
        # What benchmarks write is none of what they measured.
        changed = ["git", "status", "--porcelain", "--", ":/", ":!/benchmarks/results", ":!/docs"]
        if subprocess.run(changed, **options).stdout:
            commit += "-dirty"
    except FileNotFoundError:
        commit = ""  # without git
    return {
        "device": _processor(),
        "features": " ".join(features()),
        "threads": torch.get_num_threads(),
        **versions,
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def rows(times: Mapping[str, list[float]], baseline: str, **facts) -> list[dict]:
    """A row for each system: median, p20, p80, speed-up over the baseline (median of ratios).

    Args:
        facts: what was measured: shapes, dtype, exit rate, ...
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    common = {**facts, **origin(), "peak_mib": peak}
    return [
        {
            "system": name,
            **summary(values),
            f"speedup_over_{baseline}": ratio(times[baseline], values),
            **common,
        }
        for name, values in times.items()
    ]


def write(name: str, measured: Sequence[dict], folder: Path = RESULTS):
    """Append rows to `NAME.jsonl` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
        for row in measured:
            file.write(json.dumps(row) + "\n")


def write_anew(name: str, rows: Sequence[dict], folder: Path = RESULTS):
    """Put rows in place of those of `NAME.jsonl`."""
    with write_aside(folder / f"{name}.jsonl") as aside:
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(name: str, folder: Path = RESULTS) -> list[dict]:
    """The rows of `NAME.jsonl`, [] where there is none."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []


def table(heads: Sequence[str], lines: Sequence[Sequence[object]], names: int = 1) -> str:
    """Markdown: columns of names to the left, those of numbers to the right."""
    rule = ["---"] * names + ["--:"] * (len(heads) - names)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (heads, rule, *lines))


def between(document: Path, marker: str, text: str):
    """Put the text between the lines `<!-- MARKER -->` and `<!-- /MARKER -->` of a document."""
    start, end = f"<!-- {marker} -->\n", f"<!-- /{marker} -->"
    before, _, rest = document.read_text(encoding="utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{document} lacks the lines {start.strip()!r} and {end!r}")
    document.write_text(before + start + text.strip() + "\n" + end + after, encoding="utf-8")


def page(document: Path, title: str, text: str, picture: Path):
    """Write a document that holds what was measured and nothing else."""
    shown = os.path.relpath(picture, document.parent)
    body = f"# {title}\n\nWritten by `make bench`; see [Speed on a CPU](cpu.md).\n\n{text}\n"
    with write_aside(document) as aside:
        aside.write_text(f"{body}\n![Real tokens a second]({shown})\n", encoding="utf-8")


def features() -> list[str]:
    """What this processor has of `FEATURES`."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return []
    there = set(flags[1].split()) if flags else set()
    return [name for name, either in FEATURES.items() if there & either]


def _processor() -> str:
    try:
        lines = _CPUINFO.read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()
