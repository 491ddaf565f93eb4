"""What `make test-matrix` goes through on this processor: `python matrix.py cores`, or `sets`."""

import ctypes
import sys
from pathlib import Path

import numpy

sys.path.append(str(Path(__file__).parent / "ops"))

# Cores that NumPy's OpenBLAS has kernels for, and the flag of the processor that each needs.
CORES = {"Haswell": "avx2", "SkylakeX": "avx512bw"}
SAME = {"Zen": "Haswell"}  # products by the same code


def cores() -> list[str]:
    """Those that this processor can run, but for the one that is taken anyhow."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    here = SAME.get(taken(), taken())
    return [core for core, flag in CORES.items() if flag in flags and core != here]


def taken() -> str | None:
    """The core whose kernels NumPy's OpenBLAS takes here; None where it does not say."""
    for path in (Path(numpy.__file__).parents[1] / "numpy.libs").glob("*openblas*"):
        name = getattr(ctypes.CDLL(str(path)), "scipy_openblas_get_corename64_", None)
        if name is not None:
            name.restype = ctypes.c_char_p
            return name().decode()
    return None


def sets() -> list[str]:
    from test_instruction_sets import NAMES

    return NAMES[:-1]


if __name__ == "__main__":
    print(*{"cores": cores, "sets": sets}[sys.argv[1]]())
