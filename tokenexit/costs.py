"""What the two ways of attention cost: by a table, so that every process here chooses the same."""

from __future__ import annotations

import json
import platform
import time
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from tokenexit.files import cache_folder, write_aside
from tokenexit.int8 import Int8Linear
from tokenexit.ops import instruction_set
from tokenexit.ops.exit_layer import exit_layer
from tokenexit.ops.pack_tokens import pack
from tokenexit.packing import Active

NAMES = ("key_row", "projected_block", "active_row", "absorbed_block")
_KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
# Nanoseconds for 1,000 multiply-adds of each, by the kind of weights and, where that makes a
# difference, the instruction set: medians of `measure` for widths of 128 to 1024 on a Xeon, of
# avx512_bf16 on a Zen 4. Only ratios count; those of fp32 are the same with AVX2 and AVX-512. They
# choose as well as what is measured for one width: see docs/cpu.md.
_RATES = {
    "fp32": (18.0, 140.0, 55.0, 22.0),
    "bf16": (18.0, 190.0, 52.0, 20.0),
    "bf16, avx512_bf16": (8.8, 75.0, 23.0, 12.0),
    "bf16, amx": (2.8, 79.0, 23.0, 9.5),
    "int8": (18.0, 80.0, 42.0, 24.0),
    "int8, avx_vnni": (11.0, 105.0, 55.0, 33.0),
    "int8, avx512_vnni": (5.1, 87.0, 32.0, 18.0),
    "int8, avx512_bf16": (4.7, 67.0, 16.0, 14.0),
    "int8, amx": (1.4, 75.0, 23.0, 13.0),
}
# (sentences, tokens, active tokens) of the batches that are timed
_BATCHES = ((16, 16, 1), (16, 64, 1), (4, 16, 4), (8, 32, 4), (2, 256, 16), (1, 128, 128))
_ROUNDS = 8


@torch.compiler.assume_constant_result
def costs(d: int, inner: int, num_heads: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Costs of `tokenexit.ops.exit_layer`, in microseconds, for layers of these sizes.

    By a table of rates for each instruction set and kind of weights: the same in every process on a
    machine, so that results are the same to the bit. Only where `calibrate` has measured layers of
    these sizes on this machine, what it found is taken; a process reads that once.

    Args:
        d: width of the layer.
        inner: width of its feed-forward part.
        num_heads: H.
        dtype: of the weights: float32, bfloat16, or int8 (`tokenexit.int8`).
    """
    return _costs(d, inner, num_heads, dtype)


@lru_cache
def _costs(d: int, inner: int, num_heads: int, dtype: torch.dtype) -> list[float]:
    found = measured().get(_key(d, inner, num_heads, dtype))
    return modelled(d, dtype) if found is None else [found[name] for name in NAMES]


def modelled(d: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """The costs that the table gives for layers of width d."""
    kind = _KINDS[dtype]
    rates = _RATES.get(f"{kind}, {instruction_set()}", _RATES[kind])
    # Projecting a key and value; 16 queries of all heads by a key, and its value; carrying a query
    # there and back; 16 pairs of a query and a head by a state, twice.
    work = 2 * d * d, 32 * d, 2 * d * d, 32 * d
    return [rate * amount / 1e6 for rate, amount in zip(rates, work, strict=True)]


def calibrate(
    d: int, inner: int, num_heads: int, dtype: torch.dtype = torch.float32
) -> list[float]:
    """Measure the costs here, in a second or two, and keep them: other processes take them too.

    Returns:
        The costs.

    Raises:
        OSError: the cache folder (`tokenexit.files.cache_folder`) may not be written.
    """
    found = measure(d, inner, num_heads, dtype)
    known = {**measured(), _key(d, inner, num_heads, dtype): dict(zip(NAMES, found, strict=True))}
    with write_aside(_path()) as aside:
        aside.write_text(json.dumps(known, indent=1))
    _costs.cache_clear()
    return found


def _key(d, inner, num_heads, dtype):
    how = f"{_KINDS[dtype]}, {instruction_set()}"
    return f"{processor()}, {d} x {inner}, {num_heads} heads, {how}"


def _path() -> Path:
    return cache_folder() / "attention-costs.json"


def measured() -> dict[str, dict[str, float]]:
    """What `calibrate` has measured so far: shape to `NAMES` to microseconds.

    Empty if the file is missing or of another form.
    """
    try:
        known = json.loads(_path().read_text(encoding="utf-8"))
        return {
            key: values
            for key, values in known.items()
            if set(values) == set(NAMES) and all(0 <= float(x) < 1e30 for x in values.values())
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def processor() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


@torch.inference_mode()
def measure(d: int, inner: int, num_heads: int, dtype: torch.dtype = torch.float32) -> list[float]:
    """Time layers on random weights, both ways, and fit the costs to the times.

    The model: `time = c0 + c1 * active + keys * key_row + ...`, linear in `NAMES`.
    """
    matrices = ((d, d), (2 * d, d), (d, d), None, (inner, d), (d, inner), None)
    weights, scales = [], []
    int8 = dtype == torch.int8
    of = {
        "dtype": torch.float32 if int8 else dtype,
        "device": "cpu",
    }  # whatever the user's defaults are
    with torch.random.fork_rng([]):  # the caller's numbers stay as they were
        layer = [nn.Linear(*s[::-1], **of) if s else nn.LayerNorm(d, **of) for s in matrices]
    for part in layer:
        if int8 and isinstance(part, nn.Linear):
            part = Int8Linear(part)
        weights += [part.weight.detach(), part.bias.detach()]
        if int8:
            scales += [getattr(part, name, torch.empty(0, **of)) for name in ("scale", "offset")]
    never = 1e30
    ways = ([0.0, 0.0, never, never], [never, never, 0.0, 0.0])
    rows, runs = [], []
    for sentences, tokens, active in _BATCHES:
        each = torch.arange(sentences * tokens, device="cpu").view(sentences, -1)
        packed = pack(each >= 0, each[:1].expand(sentences, -1))
        starts = torch.arange(sentences + 1, device="cpu") * active
        batch = Active(packed, each[:, :active].flatten(), starts)
        h = torch.ones(sentences * tokens, d, **of)
        keys = sentences * tokens
        total = sentences * active
        for way in ways:
            projected = way is ways[0]
            blocks = -(-active // 16) if projected else -(-active * num_heads // 16)
            facts = [1, total, 0, 0, 0, 0]
            facts[2:4] = [keys, blocks * keys] if projected else [0, 0]
            facts[4:6] = [0, 0] if projected else [total, blocks * keys]
            rows.append(facts)
            runs.append(
                lambda h=h, batch=batch, way=way: exit_layer(
                    h, batch, weights, scales, way, num_heads, (d // num_heads) ** -0.5, 1e-12
                )
            )
    times = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for run, mine in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            mine.append((time.perf_counter() - start) * 1e6)
    # The least, which what else runs on the machine disturbs least.
    of["dtype"] = torch.float64
    least = torch.tensor([min(mine) for mine in times], **of)
    facts = torch.tensor(rows, **of)
    # Relative errors count: each row is divided by its time.
    fit = torch.linalg.lstsq(facts / least[:, None], torch.ones_like(least)[:, None]).solution
    return fit.flatten()[2:].clamp(min=0).tolist()
