"""What the compilers make of every kernel, without a GPU: registers, spills, loops, tensor cores.

`python -m tokenexit.kernels.report [--all] [--table] [--json FILE] [--arch sm_90 ...]
[--model base ...] [--dtype fp16 ...] [--kernel PART_OF_NAME]`

Ops are called on CPU tensors of a model's shapes (`calls`). Nothing is launched; what a call would
launch is recorded, and compiled for each target as it would be there.
"""

import argparse
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

MODELS = {"minilm": (384, 12), "base": (768, 12), "large": (1024, 16)}  # hidden size, heads
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
NAMES |= {torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
# Shared memory of a block and of a multiprocessor in KiB, and its warps and blocks, by the CUDA
# programming guide (technical specifications by compute capability) and AMD's CDNA3 manual.
LIMITS = {
    "sm_80": (163, 164, 64, 32),
    "sm_86": (99, 100, 48, 16),
    "sm_89": (99, 100, 48, 24),
    "sm_90": (227, 228, 64, 32),
    "sm_100": (227, 228, 64, 32),
    "sm_120": (99, 100, 48, 24),
    "gfx942": (64, 64, 32, 32),
}
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTC[A-Z]*MMA|v_mfma)")
# Multiply-adds a cycle of the tensor cores of a multiprocessor, fp16 or bf16 summed in fp32, by the
# datasheets of A100, A40, L40S, H100, B200 and RTX PRO 6000; in tf32 half as many.
RATES = {
    "sm_80": 1024, "sm_86": 512, "sm_89": 512, "sm_90": 2048, "sm_100": 4096, "sm_120": 512
}  # fmt: skip


def calls(hidden, num_heads, dtype):
    """(name, op, arguments) that launch every kernel; attention in training with all options."""
    from tokenexit.kernels import attention, decision, embed, linear, norm, pack_rows, unpack

    def numbers(*shape):
        return torch.empty(shape, dtype=dtype)

    def indices(size):
        return torch.empty(size).long()

    q, i, u, b = numbers(4096, num_heads, hidden // num_heads), indices(8192), torch.empty(8192), 64
    k, v = numbers(8192, 2, *q.shape[1:]).unbind(1)
    cu, lse, x, weight = (
        i[: b + 1],
        torch.empty(q.shape[:2]),
        numbers(8192, hidden),
        numbers(hidden),
    )
    training = cu, cu, 0.125, numbers(num_heads, 255), i[:4096], 0.1, 7, 128
    yield "", attention.exit_attention, (q, k, v, cu, cu, 0.125, None, None, 0.0, 0, 128)
    yield "training", attention.exit_attention, (q, k, v, *training)
    yield "training", attention.exit_attention_backward, (q, q, k, v, q, lse, *training)
    if hidden * dtype.itemsize <= attention.ABSORBED_BYTES:
        wide = numbers(4096, num_heads, hidden)
        yield "", attention.absorbed_attention, (wide, x, cu, cu, 0.125, None, None, 128)

    def stats_of(x):
        _, tiles = linear.tiles_of(x, len(x), hidden, hidden)
        return torch.empty(len(x), math.ceil(hidden / tiles["BLOCK_N"]), 2)

    for labels in (9, 44):
        logits, head = numbers(8192, labels), numbers(labels, hidden)
        rest = cu, i[:b], u[:b], 3, False, i[:b], i
        yield f"{labels}", decision.exit_decision, (logits, i, u, i, *rest)
        step = x, stats_of(x), weight, weight, 1e-12, head, weight, i, cu, i, x, logits, i, u, i
        rest = cu, i[:b], u[:b], i[:b], torch.empty(b).int(), 3, 128
        yield f"{labels}", decision.exit_step_, (*step, *rest)
        said, telling = numbers(8192, 3 * labels), numbers(3 * labels, hidden)
        step = *step[:5], telling, telling[:, 0], *step[7:]
        rest = *rest, False, True, True, said, cu
        yield f"hearing_{labels}", decision.exit_step_, (*step, *rest)

    square, up, down = (
        numbers(hidden, hidden),
        numbers(4 * hidden, hidden),
        numbers(hidden, 4 * hidden),
    )
    sizes = {"small": 256, "large": 8192}
    if linear.is_wide(x) and x.element_size() == 2:
        sizes |= {"tiny": 64, "low": 512, "middle": 1024}
    for size, rows in sizes.items():
        h, index, bias = x[:rows], i[:rows], up[:, 0].contiguous()
        packed = h, square, bias, numbers(2 * hidden, hidden), bias, index, cu, index, cu
        yield size, linear.query_key_value, (*packed, bias, bias, up, bias)
        packed = *packed[:5], None, cu, None, cu
        yield f"all_{size}", linear.query_key_value, (*packed, bias, bias, up, bias)
        normal = partial(linear.linear, norm_weight=bias, norm_bias=bias)
        beside = dict(residual=h, residual_gather=index, want_stats=True, norm_on="out")
        yield f"output_{size}", partial(normal, **beside), (h, square, bias, index[:1])
        normal = partial(normal, norm_stats=stats_of(h))
        folded = torch.empty(2, 4 * hidden)
        first = partial(normal, norm_on="x", folded=folded, activation="gelu")
        yield f"up_{size}", first, (h, up, None, index[:1])
        second = partial(normal, norm_on="residual", residual=h, want_stats=True)
        yield f"down_{size}", second, (numbers(rows, 4 * hidden), down, bias, index[:1])

    yield "", norm.add_layer_norm, (x, x, weight, weight, 1e-12, i[:1])
    yield "", norm.bias_gelu, (x, weight)
    yield "", embed.embed, (i, i, None, x, x, x, weight, weight, 1e-12, i[:1])
    cells = i.view(b, 128)
    rows = cells, cells, cells, i.to(torch.uint8), cells, cells
    yield "", pack_rows.pack_rows, (*rows, 100, 100, 100, 128)
    yield "", unpack.unpack_, (logits, i, cells, lse[0], cells[0, 0] > 0)


def launches(hidden, num_heads, dtype, arch="sm_80"):
    """(name, kernel, arguments, options) of all that `calls` launch on a GPU like that."""
    import triton
    from tokenexit.kernels import linear

    recorded = []
    original = triton.JITFunction.run, torch.version.hip, linear.is_wide
    torch.version.hip = "7" if arch.startswith("gfx") else None
    linear.is_wide = lambda x: arch == "sm_90"
    triton.JITFunction.run = lambda kernel, *args, grid, warmup, **named: recorded.append(
        (kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **named})
    )
    try:
        for name, launcher, arguments in calls(hidden, num_heads, dtype):
            launcher(*arguments)
            for kernel, values in recorded:
                options = {k: v for k, v in values.items() if k not in kernel.arg_names}
                stem = kernel.__name__.removeprefix("_").removesuffix("_kernel")
                yield f"{stem}_{name}".rstrip("_"), kernel, values, options
            recorded.clear()
    finally:
        triton.JITFunction.run, torch.version.hip, linear.is_wide = original


def compile_kernel(kernel, values, options, arch):
    """Compile for `arch`, "sm_90" or "gfx942"; a dict of what was measured.

    "issue" is the time to issue the instructions of the loop about the kernel's only product, over
    the time that tensor cores take for it; None for other kernels and on AMD's GPUs, of whose code
    no loop is read either.
    "waits_for_each": whether some loop waits for each HGMMA before the next.
    "spills_in_loop": how many instructions of the loops about products spill.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value, name = values[parameter.name], parameter.name
        aligned = isinstance(value, torch.Tensor)
        if aligned:
            signature[name] = "*" + NAMES[value.dtype]
        elif hasattr(value, "block_shape"):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{NAMES[value.base.dtype]}[{block}]>"
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options)
    registers, spill_bytes, code = _nvidia(compiled) if nvidia else _amd(compiled)
    names = TENSOR_CORES.findall(code)
    dots = [line for line in compiled.asm["ttir"].splitlines() if "tt.dot" in line]
    slow = [line for line in dots if "f32>" in line.split("->")[0] and "tf32" not in line]
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    loops = tensor_core_loops(code)
    in_loop = max(map(len, loops), default=0)
    issue = None
    if nvidia and loops and len(dots) == 1:
        sizes = re.search(r"tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x(\w+)>", dots[0])
        rows, depth, columns = map(int, sizes.group(1, 2, 3))
        cycles = rows * depth * columns / RATES[arch] * (2 if sizes[4] == "f32" else 1)
        issue = in_loop * warps / 4 / cycles
    return {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "spills_in_loop": sum(bool(re.search(r"\b(STL|LDL)\b", x)) for loop in loops for x in loop),
        "shared_kib": shared / 1024,
        "within_shared": shared <= LIMITS[arch][0] * 1024,
        "wants_tensor_cores": len(dots) > len(slow),
        "tensor_cores": "+".join(sorted(set(names))),
        "tensor_core_instructions": len(names),
        "occupancy": occupancy(arch, registers, shared, warps),
        "loop_instructions": in_loop,
        "other_instructions": len(instructions(code)) - in_loop,
        "issue": issue,
        "waits_for_each": any(map(waits_for_each, loops)),
    }


def instructions(code):
    """(address, instruction) of each line of SASS."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", code)
    return [(int(at, 16), text.strip()) for at, text in found]


def tensor_core_loops(code):
    """The instructions of each innermost loop of SASS that has tensor-core instructions."""
    lines = instructions(code)
    jumps = [(at, re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)) for at, text in lines]
    spans = {(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at}
    loops = {span: [text for at, text in lines if span[0] <= at <= span[1]] for span in spans}
    loops = {span: loop for span, loop in loops.items() if any(map(TENSOR_CORES.search, loop))}

    def is_outer(span):
        return any(span[0] <= first and last <= span[1] for first, last in loops.keys() - {span})

    return [loop for span, loop in loops.items() if not is_outer(span)]


def waits_for_each(loop):
    """Whether ptxas has the loop wait for each HGMMA before the next, as it does if in doubt."""
    products = sum("HGMMA" in line for line in loop)
    return products > 1 and sum("WARPGROUP.DEPBAR" in line for line in loop) >= products


def _nvidia(compiled):
    folder = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin"
    path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump calls its neighbors
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [folder / "cuobjdump", "-res-usage", "-sass", file.name]
        done = subprocess.run(
            command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
        )
    read = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return read["REG"], read["STACK"] + read["LOCAL"], done.stdout


def _amd(compiled):
    code = compiled.asm["amdgcn"]
    read = {name: int(n) for name, n in re.findall(r"\.(vgpr\w+):\s+(\d+)", code)}
    return read["vgpr_count"], 4 * read["vgpr_spill_count"], code


def occupancy(arch, registers, shared, warps):
    """Share of a multiprocessor's warps that can be resident, by registers and shared memory."""
    _, shared_kib, max_warps, max_blocks = LIMITS[arch]
    if arch.startswith("gfx"):  # 4 SIMDs of 8 waves; 512 registers a lane, by 8
        fit = 4 * min(8, 512 // max(8, 8 * math.ceil(registers / 8))) // warps
        reserved = 0
    else:  # 64 Ki registers, given to warps by 256; a KiB of shared memory is the system's
        fit = 65536 // (256 * max(1, math.ceil(registers * 32 / 256))) // warps
        reserved = 1024
    by_shared = shared_kib * 1024 // max(1, shared + reserved)
    return min(fit, by_shared, max_blocks, max_warps // warps) * warps / max_warps


def table(rows):
    """Lines of a Markdown table: a row a kernel, a column a target, the worst of all the rest.

    "issue" is told of large products; others wait for memory.
    """
    arches = list(dict.fromkeys(row["arch"] for row in rows))
    lines = [
        f"| kernel | {' | '.join(arches)} | tensor cores |",
        "| --- " * (len(arches) + 2) + "|",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for arch in arches:
            here = [row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch)]
            if not here:  # tiles of Hopper alone
                cells.append("")
                continue
            registers, spill, shared = (
                max(row[name] for row in here)
                for name in ("registers", "spill_bytes", "shared_kib")
            )
            low = min(row["occupancy"] for row in here)
            spilled = f", **spills {spill} B**" if spill else ""
            issue = max((row["issue"] or 0 for row in here if kernel.endswith("large")), default=0)
            issued = f", {issue:.2f}" if issue else ""
            cells.append(f"{registers}, {shared:.0f}, {low:.0%}{issued}{spilled}")
        names = {row["tensor_cores"] for row in rows if row["kernel"] == kernel} - {""}
        cells.append(", ".join(sorted(names)) or "-")
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return lines


def main(arguments=None):
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenexit.kernels.report")
    parser.add_argument("--all", action="store_true", help="all models and dtypes, not just a pair")
    parser.add_argument("--table", action="store_true", help="end with a Markdown table by kernel")
    parser.add_argument("--json", type=Path, help="write JSON lines there, too")
    parser.add_argument("--arch", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--model", nargs="+", choices=MODELS, help="default: base")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: fp16")
    parser.add_argument("--kernel", default="", help="only kernels whose name has this part")
    chosen = parser.parse_args(arguments)
    try:
        importlib.import_module("triton")
    except ImportError:
        print("The report needs triton, which is not installed (pip install triton).")
        return 0
    models = chosen.model or (MODELS if chosen.all else ["base"])
    dtypes = chosen.dtype or (DTYPES if chosen.all else ["fp16"])
    rows = []
    line = "{:32} {:7} {:5} {:7} {:>5} {:>6} {:>7} {:>14} {:>6}"
    heads = "kernel,model,dtype,arch,regs,spill,KiB,tensor cores,occup."
    print(line.format(*heads.split(",")))
    for model, dtype, arch in itertools.product(models, dtypes, chosen.arch):
        of_model = launches(*MODELS[model], DTYPES[dtype], arch)
        for name, kernel, values, options in of_model:
            if chosen.kernel not in name:
                continue
            row = {"kernel": name, "model": model, "dtype": dtype, "arch": arch}
            row |= compile_kernel(kernel, values, options, arch)
            rows.append(row)
            cores = f"{row['tensor_core_instructions']} {row['tensor_cores']}".strip()
            print(line.format(
                name, model, dtype, arch, row["registers"], row["spill_bytes"],
                f"{row['shared_kib']:.1f}", cores, f"{row['occupancy']:.0%}",
            ), flush=True)  # fmt: skip
    if chosen.table:
        print("", *table(rows), sep="\n")
    if chosen.json:
        chosen.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
