"""What the compilers make of the kernels; compiled in a process that has no interpreter."""

import json
import os
import subprocess
import sys

import pytest
from tokenexit.kernels.report import (
    DTYPES,
    LIMITS,
    MODELS,
    launches,
    table,
    tensor_core_loops,
    waits_for_each,
)

pytest.importorskip("triton")
# Where registers are short, beside all in fp16: other dtypes and sizes. The rest by
# `python -m tokenexit.kernels.report --all`.
CASES = [
    ("exit_attention_dq", "base", "fp32", "sm_120"),
    ("linear_output_large", "base", "fp32", "sm_100"),
    ("linear_up_large", "base", "bf16", "sm_90"),
    ("linear_up_small", "minilm", "fp32", "sm_90"),
    ("linear_up_large", "base", "fp32", "sm_120"),
    ("exit_decision", "base", "fp32", "sm_80"),
    ("exit_step_44", "minilm", "fp32", "sm_80"),
    ("uncertainty", "base", "bf16", "sm_89"),
    ("bias_gelu", "base", "fp32", "sm_100"),
    ("large", "large", "fp16", "sm_90"),
    ("large", "base", "fp16", "sm_86"),
]
# What products are made of there; HMMA elsewhere.
TENSOR_CORES = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
# Tiles as wide as registers allow, at whose ends some bytes spill: on an H100 the fastest.
WIDE = ("linear_up_large", "linear_down_large", "query_key_value_large", "query_key_value_middle")
# One process for many: its imports take longer than many a kernel.
CODE = """
import json, sys
from tokenexit.kernels import report
for arguments in json.loads(sys.argv[1]):
    assert report.main(arguments) == 0
"""


def run(*command, **env):
    env = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"} | env
    return subprocess.run(
        [sys.executable, *command],
        env=env | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )


def compile_all(folder, cases):
    """Rows of cases (part of the kernel's name, model, dtype, arch), all of which must be there."""
    calls = []
    for i, (kernel, *rest) in enumerate(cases):
        chosen = zip(("--model", "--dtype", "--arch"), rest, strict=True)
        calls.append([f"--kernel={kernel}", *(x for pair in chosen for x in pair)])
        calls[-1] += ["--json", str(folder / f"{i}.jsonl")]
    done = run("-c", CODE, json.dumps(calls))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = []
    for i, (_, *case) in enumerate(cases):
        part = [json.loads(line) for line in (folder / f"{i}.jsonl").read_text().splitlines()]
        assert {(row["model"], row["dtype"], row["arch"]) for row in part} == {tuple(case)}
        rows += part
    return rows


def check(rows):
    """Few spills; shared memory that is there; tensor cores for products of their dtypes."""
    for row in rows:
        assert row["spill_bytes"] <= (96 if row["kernel"] in WIDE else 16), row
        # The loop over depth of `up` is made one with that over tiles, and holds their ends. The
        # backward of attention spills a register or two on sm_100, which nobody has timed.
        assert row["spills_in_loop"] <= (32 if row["kernel"] in WIDE else 8), row
        assert row["within_shared"], row
        assert bool(row["tensor_core_instructions"]) == row["wants_tensor_cores"], row
        assert 0 < row["occupancy"] <= 1, row
        if row["kernel"].endswith("_large"):
            # tf32 comes in half the rows, for as many instructions of addresses.
            most = 1 if row["dtype"] != "fp32" else 2
            timed = row["arch"] == "sm_90" and row["dtype"] != "fp32"  # and so not estimated
            assert timed or row["issue"] is None or 0 < row["issue"] < most, row
            assert not row["waits_for_each"], row


# Each takes half a minute. sm_86 has the memory and the instructions of sm_89.
FITS = [("base", arch) for arch in LIMITS if arch.startswith("sm_") and arch != "sm_86"]
FITS.append(("minilm", "sm_90"))


@pytest.mark.slow
@pytest.mark.parametrize("model, arch", FITS)
def test_every_kernel_fits(model, arch, tmp_path):
    rows = compile_all(tmp_path, [("", model, "fp16", arch)])
    check(rows)
    stems = {row["kernel"].split("_")[0] for row in rows}
    bookkeeping = {"count", "place", "unpack", "exit", "uncertainty"}
    assert stems == {"absorbed", "add", "bias", "embed", "linear", "query"} | bookkeeping
    products = {row["kernel"].split("_")[0] for row in rows if row["wants_tensor_cores"]}
    assert products == {"absorbed", "exit", "linear", "query"}
    (plain,) = (row for row in rows if row["kernel"] == "exit_attention_fwd")
    assert not plain["waits_for_each"]
    (large,) = (row["tensor_cores"] for row in rows if row["kernel"] == "linear_up_large")
    assert large == TENSOR_CORES.get(arch, "HMMA")


@pytest.mark.slow
def test_other_dtypes_fit(tmp_path):
    check(compile_all(tmp_path, CASES))


DEPENDENT = """
import re, sys
from tokenexit.kernels import dependent, report
code, read = [], report._nvidia
def kept(compiled):
    code.append(read(compiled))
    return code[-1]
report._nvidia = kept
dependent.is_possible, dependent._MOST_ROWS = lambda x: True, 1 << 20
kernels = ["exit_attention_fwd", "linear_up_small", "query_key_value_small", "exit_step_9"]
for kernel in kernels:
    assert report.main(["--arch", "sm_90", "--kernel", kernel]) == 0
for _, _, text in code:
    lines = [line for _, line in report.instructions(text)]
    waits = [i for i, line in enumerate(lines) if "ACQBULK" in line]
    reads = [i for i, line in enumerate(lines) if re.search(r"\\b(LDG|LDGSTS|UTMALDG|STG)", line)]
    assert waits and reads and waits[0] < reads[0], (waits, reads[:1])
    assert any("PREEXIT" in line for line in lines)
assert len(code) >= len(kernels), len(code)
"""


@pytest.mark.slow
def test_dependent_launches_wait_before_they_read():
    done = run("-c", DEPENDENT)
    assert done.returncode == 0, done.stdout + done.stderr


LOOP = """
import sys
from collections import Counter
sys.path.insert(0, "tests")
import torch, triton
from random_models import HEARING, random_batch, random_tagger
from tokenexit import ExitPolicy
from tokenexit.kernels import report
from tokenexit.loops import LOOPS, Call, gpu
from tokenexit.models.pipeline import tag
from tokenexit.models.rows import Rows
from tokenexit.schedule import Schedule

# No kernel runs: what they would fill is 0, and so are all lists.
torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
torch.Tensor.new_empty = torch.Tensor.new_zeros
gpu.compact_active = lambda active, cu, *_, **__: [x * 0 for x in (active, cu, active, cu)]
recorded = []
run = triton.JITFunction.run
def record(kernel, *args, grid, warmup, **named):
    recorded.append((kernel, {**dict(zip(kernel.arg_names, args)), **named}))
fields = ("word_ids", "token_type_ids", "position_ids", "exit_layers")
batch = random_batch([5, 17, 1])
with torch.no_grad():
    for family, given, threshold, options in (
        ("bert", (), (0, 0.5, 0, 0), {"hidden_act": "gelu_new"}),
        ("bert", fields, 0, {}),
        ("mpnet", fields[:1], 0.3, {}),
        *((hearing, (), (0, 0.5, 0, 0), {}) for hearing in HEARING),
        *((hearing, fields, 0, {}) for hearing in HEARING),
    ):
        tagger = random_tagger(family, dtype=torch.float16, **options)
        rows = {name: batch["input_ids"] for name in ("input_ids", *given)}
        rows |= {"attention_mask": batch["attention_mask"] != 0}
        policy = ExitPolicy(threshold=threshold)
        schedule = Schedule.of(policy, 4, 3, torch.zeros(0))
        triton.JITFunction.run = record
        tag(tagger, Rows(**rows), Call(tagger.encoder, torch.zeros(1, 32), schedule), LOOPS["gpu"])
        triton.JITFunction.run = run
seen = {}
for kernel, values in recorded:
    options = {k: v for k, v in values.items() if k not in kernel.arg_names}
    given = [(values[p.name], p.is_constexpr) for p in kernel.params]
    kinds = [x if fixed else (type(x), getattr(x, "dtype", 0)) for x, fixed in given]
    seen.setdefault((kernel.__name__, repr(kinds)), (kernel, values, options))
for kernel, values, options in seen.values():
    report.compile_kernel(kernel, values, options, "sm_90")
kinds = Counter(name for name, _ in seen)
assert {"_count_kernel", "_place_kernel", "_embed_kernel", "_unpack_kernel"} <= kinds.keys(), kinds
assert kinds["_exit_step_kernel"] == 6, kinds  # decides, answers alone, neither; hears or not
assert kinds["_linear_kernel"] >= 5 and kinds["_exit_attention_fwd_kernel"] == 2, kinds
"""


@pytest.mark.slow
def test_whatever_the_loop_launches_compiles():
    """The interpreter passes over what it does not reach, where a compiler stumbles."""
    done = run("-c", LOOP)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_only_what_is_asked_for():
    call = "--arch gfx942 --model minilm --dtype bf16 --kernel bias_gelu --table".split()
    done = run("-m", "tokenexit.kernels.report", *call)
    assert done.returncode == 0, done.stdout + done.stderr
    head, row, empty, *rest = done.stdout.splitlines()
    assert head.split()[:4] == ["kernel", "model", "dtype", "arch"]
    assert row.split()[:4] == ["bias_gelu", "minilm", "bf16", "gfx942"]
    assert empty == "" and rest[0] == "| kernel | gfx942 | tensor cores |"


def test_table_tells_the_worst():
    row = dict(kernel="a", arch="sm_80", registers=40, spill_bytes=0, shared_kib=1.0)
    row |= dict(occupancy=0.5, tensor_cores="HMMA", issue=0.4)
    worse = row | dict(registers=255, spill_bytes=8, shared_kib=64.0, occupancy=0.125, issue=None)
    rows = [row, worse, row | dict(arch="sm_90", tensor_cores="HGMMA")]
    lines = table(rows + [r | dict(kernel="b_large") for r in rows] + [rows[-1] | dict(kernel="c")])
    assert lines[4] == "| c |  | 40, 1, 50% | HGMMA |"
    assert lines[0] == "| kernel | sm_80 | sm_90 | tensor cores |"
    assert lines[2] == "| a | 255, 64, 12%, **spills 8 B** | 40, 1, 50% | HGMMA, HMMA |"
    assert lines[3].startswith("| b_large | 255, 64, 12%, 0.40, **spills 8 B** | 40, 1, 50%, 0.40")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_numbers_with_a_point_are_constants(dtype):
    """torch.compile hands others on in fp64, to which all that they meet then rises."""
    for name, kernel, values, _ in launches(*MODELS["minilm"], DTYPES[dtype], "sm_90"):
        for parameter in kernel.params:
            is_float = isinstance(values[parameter.name], float)
            assert not is_float or parameter.is_constexpr, (name, parameter.name)


def sass(*lines):
    return "".join(f"        /*{16 * at:04x}*/   {line} ;\n" for at, line in enumerate(lines))


def test_loops_with_tensor_cores():
    product = "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    inner = [product, wait, product, wait, "@P0 BRA 0x30"]
    code = sass("MOV R1, c[0x0]", "FADD R1, R2, R3", "BRA 0x200", *inner, "@!P1 BRA 0x10", "EXIT")
    (loop,) = tensor_core_loops(code)
    assert loop == inner and waits_for_each(loop)
    assert not waits_for_each([product, product, wait])
    assert not waits_for_each([product, wait])
    assert tensor_core_loops(sass("FADD R1, R2, R3", "@P0 BRA 0x0", product)) == []


def test_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('hidden')")
    done = run("-m", "tokenexit.kernels.report", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.startswith("The report needs triton, which is not installed")
