"""Products of narrow numbers on every instruction set of this machine: of bytes, exact integers.

Run as a script, this file checks the one that it is asked for in TOKENEXIT_CPU.
"""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpp import CSRC, built, needs_compiler

from tokenexit.ops import instruction_sets

SOURCE = """
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tiles.h"
using namespace tokenexit;

extern "C" const char* taken() { return CPU_NAMES[static_cast<int>(cpu())]; }
extern "C" bool by_rows(int64_t rows) { return engine(Kind::int8).by_rows(rows); }

// y [panels][out][16]; features below n0 and from n1 on are left alone.
extern "C" void multiply(
    bool bf16, const Word* weight, int64_t depth, const Word* x, int64_t rows, int64_t out,
    int64_t n0, int64_t n1, Word* y, bool wide) {
  multiply_words(
      bf16 ? Kind::bf16 : Kind::int8, weight, depth, x, rows, n0, n1,
      [&](const Word* sums, int64_t n, int64_t count, int64_t panel) {
        std::memcpy(y + (panel * out + n) * 16, sums, count * 16 * sizeof(Word));
      },
      wide);
}
"""
# Features: how many, the first and the last of a thread's
OUTS = ((1, 0, 1), (3, 0, 3), (40, 0, 40), (40, 8, 39), (75, 24, 75), (75, 0, 31))
DEPTHS = (1, 16, 37)  # words
ROWS = (1, 2, 4, 5, 7, 8, 9, 12, 13, 16, 17, 25, 32, 33, 50)


def padded(x, rows):
    """Rows [rows, depth, *] as panels [panels, depth, 16, *]; what fills them up is large."""
    full = torch.full((-(-rows // 16) * 16, *x.shape[1:]), 99, dtype=x.dtype)
    full[:rows] = x
    return full.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def multiply(library, bf16, w, x, rows, bounds, wide=False):
    out, first, last = bounds
    y = torch.full((-(-rows // 16), out, 16), -7, dtype=torch.int32)
    sizes = [ctypes.c_int64(n) for n in (w.shape[1], rows, out, first, last)]
    library.multiply(
        bf16, ctypes.c_void_p(w.data_ptr()), sizes[0], ctypes.c_void_p(x.data_ptr()), *sizes[1:],
        ctypes.c_void_p(y.data_ptr()), wide,
    )  # fmt: skip
    assert (y[:, :first] == -7).all() and (y[:, last:] == -7).all()
    return y.transpose(1, 2).flatten(0, 1)[:rows, first:last]


def check(path):
    library = ctypes.CDLL(path)
    library.taken.restype = ctypes.c_char_p
    assert library.taken().decode() == os.environ["TOKENEXIT_CPU"]
    library.by_rows.restype = ctypes.c_bool
    g = torch.Generator().manual_seed(0)
    for rows, bounds, depth in itertools.product(ROWS, OUTS, DEPTHS):
        some = slice(bounds[1], bounds[2])
        x = torch.randint(0, 256, (rows, depth, 4), generator=g)
        x[0] = 255
        lies = x.byte() if library.by_rows(ctypes.c_int64(rows)) else padded(x.byte(), rows)
        for least, most in ((-128, 127), (-64, 63)):  # more than 16 bits hold, and what they do
            w = torch.randint(least, most + 1, (bounds[0], depth, 4), generator=g)
            w[0], w[-1] = least, most
            got = multiply(library, False, w.to(torch.int8), lies, rows, bounds, most > 64)
            assert torch.equal(got, (x.flatten(1) @ w[some].flatten(1).T).int())

        x = torch.randn(rows, depth, 2, generator=g).bfloat16()
        w = torch.randn(bounds[0], depth, 2, generator=g).bfloat16()
        got = multiply(library, True, w, padded(x, rows), rows, bounds)
        wide, tall = (v.flatten(1).double() for v in (x, w[some]))
        limit = 1e-6 * (wide.abs() @ tall.abs().T).max()
        assert (got.view(torch.float32) - wide @ tall.T).abs().max() <= limit
        # A row's bits depend neither on the others nor on where a thread's features begin.
        alone = multiply(library, True, w, padded(x[-1:], 1), 1, bounds)
        assert torch.equal(alone, got[-1:])
        end = (*bounds[:1], bounds[2] - 1, bounds[2])
        assert torch.equal(multiply(library, True, w, padded(x, rows), rows, end), got[:, -1:])
        x[0, 0, 0] = torch.nan
        bad = multiply(library, True, w, padded(x, rows), rows, bounds).view(torch.float32).isnan()
        assert bad[0].all() and not bad[1:].any()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "multiply.cpp").write_text(SOURCE)
    sources = [folder / "multiply.cpp", CSRC / "cpu" / "tiles.cpp", CSRC / "cpu" / "simd.cpp"]
    built(sources, folder / "multiply.so", "-std=c++20", "-O2", "-Wno-psabi")
    return folder / "multiply.so"


@needs_compiler
@pytest.mark.parametrize("name", instruction_sets())
def test_sums(name, library):
    helpers = str(Path(__file__).parents[1])
    environment = {**os.environ, "TOKENEXIT_CPU": name, "PYTHONPATH": helpers}
    command = [sys.executable, __file__, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    check(sys.argv[1])
