"""What the two ways of attention cost on this machine, measured once."""

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
from tokenexit.ops.exit_layer import exit_layer
from tokenexit.ops.pack_tokens import pack
from tokenexit.packing import Active

NAMES = ("key_row", "projected_block", "active_row", "absorbed_block")
# (sentences, tokens, active tokens) of the batches that are timed
_BATCHES = ((16, 16, 1), (16, 64, 1), (4, 16, 4), (8, 32, 4), (2, 256, 16), (1, 128, 128))
_ROUNDS = 8


@torch.compiler.assume_constant_result
def costs(d: int, inner: int, num_heads: int, int8: bool = False) -> list[float]:
    """Costs of `tokenexit.ops.exit_layer`, in microseconds, for layers of these sizes here.

    Measured at the first call on a machine, which takes a fraction of a second, and kept in
    `costs.json` in the cache folder (`tokenexit.files.cache_folder`). Only their ratios count,
    which hardly depend on the number of threads: one measurement serves all, so that results do
    not depend on it either.

    Args:
        d: width of the layer.
        inner: width of its feed-forward part.
        num_heads: H.
        int8: of 8-bit weights.
    """
    return _costs(d, inner, num_heads, int8)


@lru_cache
def _costs(d: int, inner: int, num_heads: int, int8: bool) -> list[float]:
    kind = "int8" if int8 else "fp32"
    key = f"{processor()}, {d} x {inner}, {num_heads} heads, {kind}"
    known = measured()
    if key not in known:
        known[key] = dict(zip(NAMES, measure(d, inner, num_heads, int8), strict=True))
        try:
            with write_aside(_path()) as aside:
                aside.write_text(json.dumps({**measured(), **known}, indent=1))
        except OSError:
            pass  # a read-only home: measured anew by each process
    return [known[key][name] for name in NAMES]


def _path() -> Path:
    return cache_folder() / "costs.json"


def measured() -> dict[str, dict[str, float]]:
    """What has been measured here so far: shape to `NAMES` to microseconds.

    None if the file is missing or of another form.
    """
    try:
        known = json.loads(_path().read_text())
        return {key: value for key, value in known.items() if set(value) == set(NAMES)}
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
def measure(d: int, inner: int, num_heads: int, int8: bool = False) -> list[float]:
    """Time layers on random weights, both ways, and fit the costs to the times.

    The model: `time = c0 + c1 * active + keys * key_row + ...`, linear in `NAMES`.
    """
    matrices = ((d, d), (2 * d, d), (d, d), None, (inner, d), (d, inner), None)
    weights, scales = [], []
    with torch.random.fork_rng([]):  # the caller's numbers stay as they were
        layer = [nn.Linear(*s[::-1]) if s else nn.LayerNorm(d) for s in matrices]
    for part in layer:
        if int8 and isinstance(part, nn.Linear):
            part = Int8Linear(part)
        weights += [part.weight.detach(), part.bias.detach()]
        if int8:
            scales += [getattr(part, name, torch.empty(0)) for name in ("scale", "offset")]
    never = 1e30
    ways = ([0.0, 0.0, never, never], [never, never, 0.0, 0.0])
    rows, runs = [], []
    for sentences, tokens, active in _BATCHES:
        packed = pack(torch.ones(sentences, tokens), torch.arange(tokens).expand(sentences, -1))
        chosen = torch.arange(sentences * tokens).view(sentences, -1)[:, :active].flatten()
        batch = Active(packed, chosen, torch.arange(sentences + 1) * active)
        h = torch.ones(sentences * tokens, d)
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
    least = torch.tensor([min(mine) for mine in times], dtype=torch.float64)
    facts = torch.tensor(rows, dtype=torch.float64)
    # Relative errors count: each row is divided by its time.
    fit = torch.linalg.lstsq(facts / least[:, None], torch.ones_like(least)[:, None]).solution
    return fit.flatten()[2:].clamp(min=0).tolist()
