"""Costs of both ways of attention: the same in every process, measured only where asked to."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tokenexit import costs
from tokenexit.ops import extension_available, extension_error

pytestmark = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENEXIT_CACHE", str(tmp_path))
    costs._costs.cache_clear()
    yield tmp_path
    costs._costs.cache_clear()


@pytest.mark.parametrize("kind", costs._RATES)
@pytest.mark.parametrize("d, heads", [(384, 12), (768, 12), (1024, 16)])
def test_the_table_s_crossing_lies_where_theory_and_measurements_have_it(
    d, heads, kind, monkeypatch
):
    """Few active tokens are carried, many are not; theory: d / H and more for long sentences."""
    numbers, _, instructions = kind.partition(", ")
    monkeypatch.setattr(costs, "instruction_set", lambda: instructions or "avx2")
    dtype = next(dtype for dtype, name in costs._KINDS.items() if name == numbers)
    key, block, row, pairs = costs.costs(d, 4 * d, heads, dtype)
    assert all(math.isfinite(x) and x > 0 for x in (key, block, row, pairs))
    # What instructions for narrow numbers make cheap is products of many rows, as those of all keys
    # are: of bytes by AMX the most.
    least = {"": 0.5, "amx": 0.12 if numbers == "int8" else 0.2}.get(instructions, 0.2)
    # Without instructions for it, bf16 takes its time at every block of queries.
    most = 2.5 if kind == "bf16" else 1.7
    for n in (64, 128, 512):

        def absorbed(a, n=n):
            projected = n * (key + math.ceil(a / 16) * block)
            return a * row + n * math.ceil(a * heads / 16) * pairs < projected

        crossing = next((a for a in range(1, n) if not absorbed(a)), n)
        exact = 1 / (1 / n + (heads - 1) / d)
        assert least * exact <= crossing <= most * exact + 8


def test_nothing_is_measured_or_written_unasked(cache, monkeypatch):
    monkeypatch.setattr(costs, "measure", None)
    before = torch.random.get_rng_state()
    assert costs.costs(32, 64, 4) == costs.modelled(32)
    assert costs.costs(32, 64, 4, dtype=torch.int8) == costs.modelled(32, dtype=torch.int8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not list(cache.iterdir())


def test_what_was_measured_is_kept_for_all_processes(cache):
    before = torch.random.get_rng_state()
    found = costs.calibrate(32, 64, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert costs.costs(32, 64, 4) == found
    assert costs.costs(32, 64, 4, dtype=torch.int8) == costs.modelled(32, dtype=torch.int8)
    assert costs.calibrate(32, 64, 4, dtype=torch.int8) == costs.costs(32, 64, 4, dtype=torch.int8)
    assert len(costs.measured()) == 2
    code = "from tokenexit import costs; print(costs.costs(32, 64, 4))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout.strip() == str(found), shown.stderr


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"KEY": {"key_row": 1}}', '{"KEY": 5}', '{"KEY": NAMES}']
)
def test_a_damaged_file_is_no_error(cache, text):
    wrong = json.dumps(dict.fromkeys(costs.NAMES, math.nan))
    text = text.replace("KEY", costs._key(32, 64, 4, torch.float32)).replace("NAMES", wrong)
    (cache / "attention-costs.json").write_text(text)
    assert costs.costs(32, 64, 4) == costs.modelled(32)
    assert costs.calibrate(32, 64, 4) == costs.costs(32, 64, 4)


DIGEST = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from random_models import random_tagger
from tokenexit import ExitPolicy

model = random_tagger(dtype=torch.float32, hidden=128, heads=8)
digest = hashlib.md5()
with torch.no_grad():
    for n in range(2, 60, 4):
        ids = torch.randint(4, 60, (4, n), generator=torch.Generator().manual_seed(n))
        out = model(ids, exit_layers=1 + (ids + n) % 4)
        digest.update(out.logits.numpy().tobytes())
print(digest.hexdigest())
"""


def digest_in(**environment):
    """A process that starts at once; of what `communicate` gives, the digest is first."""
    gone = ("HOME", "XDG_CACHE_HOME", "TOKENEXIT_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    command = [sys.executable, "-c", DIGEST, str(Path(__file__).parent)]
    return subprocess.Popen(
        command,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_each_process_has_the_same_bits(tmp_path):
    """Together on a new machine; where the cache can't be written; where it can."""
    file, home = tmp_path / "file", str(tmp_path / "home")
    file.touch()
    processes = [
        *(digest_in(TOKENEXIT_CACHE=str(file / "below")) for _ in range(2)),
        *(digest_in(HOME=home) for _ in range(2)),
        digest_in(TOKENEXIT_CACHE="~nobody-of-that-name/cache"),
    ]
    results = [process.communicate() for process in processes]
    assert len({out for out, _ in results}) == 1, results
    assert len(results[0][0].strip()) == 32, results[0][1]


def test_no_home_folder(monkeypatch):
    """As in a container with an arbitrary user id: neither HOME nor an entry of the user."""
    monkeypatch.delenv("TOKENEXIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    assert costs.costs(32, 64, 4) == costs.modelled(32)
    assert costs.measured() == {}
    with pytest.raises(OSError, match="no home folder; expected TOKENEXIT_CACHE to name one"):
        costs.calibrate(32, 64, 4)


@pytest.mark.parametrize("dtype", costs._KINDS, ids=str)
@pytest.mark.parametrize("true", [(3.0, 0.5, 40.0, 2.0), (1.0, 0.25, 7.0, 0.125)])
def test_measure_finds_the_costs_of_made_up_times(true, dtype, monkeypatch):
    """Each way's costs are those of its own runs."""
    now = [0.0]

    def layer(h, active, weights, scales, way, num_heads, scale, eps):
        key, block, row, pairs = true
        a = int(active.cu_tokens[1])
        n, b = len(h) // active.packed.num_sentences, active.packed.num_sentences
        spent = 50 + 5 * a * b  # what both ways share
        if way[0] == 0:
            spent += b * n * (key + math.ceil(a / 16) * block)
        else:
            spent += b * (a * row + n * math.ceil(a * num_heads / 16) * pairs)
        now[0] += spent / 1e6

    monkeypatch.setattr(costs, "exit_layer", layer)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert costs.measure(32, 64, 4, dtype) == pytest.approx(true, rel=1e-6)


def test_a_table_for_each_kind_of_weights():
    assert costs.modelled(768) != costs.modelled(768, dtype=torch.int8)
    twice = [2 * x for x in costs.modelled(384)]
    assert costs.modelled(768)[1::2] == pytest.approx(twice[1::2])
    assert costs.modelled(768)[::2] == pytest.approx([2 * x for x in twice[::2]])
