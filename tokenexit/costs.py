"""What the two ways of attention cost on this machine, measured once."""

from __future__ import annotations

import json
import platform
import statistics
import time
from functools import lru_cache
from pathlib import Path

import torch

from tokenexit.files import cache_folder, write_aside
from tokenexit.ops.exit_layer import exit_layer
from tokenexit.packing import Active, pack

NAMES = ("key_row", "projected_block", "projected", "active_row", "absorbed_block", "absorbed")
# (sentences, tokens, active tokens) of the batches that are timed
_BATCHES = (
    (16, 16, 1),
    (16, 64, 1),
    (4, 16, 4),
    (8, 32, 4),
    (2, 128, 16),
    (2, 256, 32),
    (8, 64, 16),
)
_ROUNDS = 5


def costs(d: int, inner: int, num_heads: int) -> list[float]:
    """Costs of `tokenexit.ops.exit_layer`, in microseconds, for layers of these sizes here.

    Measured at the first call on a machine, which takes a fraction of a second, and kept in
    `costs.json` in the cache folder (`tokenexit.files.cache_folder`).

    Args:
        d: width of the layer.
        inner: width of its feed-forward part.
        num_heads: H.
    """
    return _costs(d, inner, num_heads, torch.get_num_threads())


@lru_cache
def _costs(d: int, inner: int, num_heads: int, threads: int) -> list[float]:
    path = cache_folder() / "costs.json"
    key = f"{processor()}, {threads} threads, {d} x {inner}, {num_heads} heads"
    known = read(path)
    if key not in known:
        known[key] = dict(zip(NAMES, measure(d, inner, num_heads), strict=True))
        try:
            with write_aside(path) as aside:
                aside.write_text(json.dumps({**read(path), **known}, indent=1))
        except OSError:
            pass  # a read-only home: measured anew by each process
    return [known[key][name] for name in NAMES]


def read(path: Path) -> dict[str, dict[str, float]]:
    """All costs measured so far; none if the file is missing or of another form."""
    try:
        known = json.loads(path.read_text())
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
def measure(d: int, inner: int, num_heads: int) -> list[float]:
    """Time layers on random weights, both ways, and fit the costs to the times.

    The model: `T = c0 + c1 A + keys * key_row + ...`, see `NAMES`. Projecting at all and carrying
    at all read about as many weights, which takes as long as computing some eight rows.
    """
    g = torch.Generator().manual_seed(0)
    shapes = ((d, d), (2 * d, d), (d, d), (d,), (inner, d), (d, inner), (d,))
    weights = [w for s in shapes for w in (torch.randn(s, generator=g) * 0.02, torch.zeros(s[0]))]
    never = 1e30
    ways = ([0.0, 0.0, 0.0, never, never, never], [never, never, never, 0.0, 0.0, 0.0])
    rows, runs = [], []
    for sentences, tokens, active in _BATCHES:
        packed = pack(torch.ones(sentences, tokens), torch.arange(tokens).expand(sentences, -1))
        chosen = torch.arange(sentences * tokens).view(sentences, -1)[:, :active].flatten()
        batch = Active(packed, chosen, torch.arange(sentences + 1) * active)
        h = torch.randn(sentences * tokens, d, generator=g)
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
                    h, batch, weights, num_heads, (d // num_heads) ** -0.5, 1e-12, way
                )
            )
    times = [[] for _ in runs]
    for _ in range(_ROUNDS + 1):
        for run, mine in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            mine.append((time.perf_counter() - start) * 1e6)
    medians = torch.tensor([statistics.median(mine[1:]) for mine in times], dtype=torch.float64)
    facts = torch.tensor(rows, dtype=torch.float64)
    # Relative errors count: each row is divided by its time.
    fit = torch.linalg.lstsq(facts / medians[:, None], torch.ones_like(medians)[:, None]).solution
    key_row, projected_block, active_row, absorbed_block = fit.flatten()[2:].clamp(min=0).tolist()
    fixed = 8 * key_row
    return [key_row, projected_block, fixed, active_row, absorbed_block, fixed]
