"""What the compilers make of the kernels; compiled in a process that has no interpreter."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
TARGETS = ("sm_80", "sm_90", "sm_100")


def run(*arguments, **env):
    env = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"} | env
    command = [sys.executable, "-m", "tokenexit.kernels.report", *map(str, arguments)]
    return subprocess.run(
        command, env=env | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_kernel_fits(dtype, tmp_path):
    """At BERT-base's shapes: no spills, shared memory that is there, tensor cores for products."""
    path = tmp_path / "rows.jsonl"
    done = run("--model", "base", "--dtype", dtype, "--arch", *TARGETS, "--json", path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["arch"] for row in rows} == set(TARGETS)
    products = {row["kernel"].split("_")[0] for row in rows if row["wants_tensor_cores"]}
    assert {"linear", "query"} <= products
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["within_shared"], row
        assert bool(row["tensor_core_instructions"]) == row["wants_tensor_cores"], row
        assert 0 < row["occupancy"] <= 1, row
    large = {row["arch"]: row for row in rows if row["kernel"] == "linear_up_large"}
    kinds = [large[arch]["tensor_cores"] for arch in TARGETS]
    assert kinds == ["HMMA", "HGMMA", "UTCHMMA"]


def test_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('hidden')")
    done = run(PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.startswith("The report needs triton, which is not installed")


def test_only_what_is_asked_for():
    done = run("--arch", "gfx942", "--model", "minilm", "--dtype", "bf16", "--kernel", "bias_gelu")
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    assert lines[1].split()[:4] == ["bias_gelu", "minilm", "bf16", "gfx942"]
