"""What `make test-matrix` goes through on this processor: `python matrix.py cores`, or `sets`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "ops"))

# Cores that NumPy's OpenBLAS has kernels for, and the flag of the processor that each needs.
CORES = {"Haswell": "avx2", "Zen": "avx2", "SkylakeX": "avx512bw"}


def cores() -> list[str]:
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return [core for core, flag in CORES.items() if flag in flags]


def sets() -> list[str]:
    from test_instruction_sets import NAMES

    return NAMES[:-1]


if __name__ == "__main__":
    print(*{"cores": cores, "sets": sets}[sys.argv[1]]())
