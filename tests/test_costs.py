"""Costs of both ways of attention: measured once, kept, and no more than a hint."""

import json
import math
import subprocess
import sys

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


def test_measured_once_and_kept(cache, monkeypatch):
    assert costs.measured() == {}
    before = torch.random.get_rng_state()
    found = costs.costs(32, 64, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(found) == len(costs.NAMES)
    assert all(math.isfinite(value) and value >= 0 for value in found)
    other = costs.costs(32, 64, 4, int8=True)
    assert len(costs.measured()) == 2

    monkeypatch.setattr(costs, "measure", None)  # not called again
    costs._costs.cache_clear()
    assert costs.costs(32, 64, 4) == found
    assert costs.costs(32, 64, 4, int8=True) == other


def test_another_process_reads_them(cache):
    found = costs.costs(32, 64, 4)
    code = "from tokenexit import costs; costs.measure = None; print(costs.costs(32, 64, 4))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout.strip() == str(found), shown.stderr


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": {"key_row": 1}}', '{"a": 5}'])
def test_a_damaged_file_is_no_error(cache, text):
    (cache / "costs.json").write_text(text)
    found = costs.costs(32, 64, 4)
    kept = json.loads((cache / "costs.json").read_text())
    assert [list(values.values()) for values in kept.values()] == [found]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TOKENEXIT_CACHE", str(file / "below"))
    assert len(costs.costs(32, 64, 4)) == 4
