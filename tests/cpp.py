"""C++ of ours that a test compiles for itself."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Where a wheel was installed there may be none; where the extension was built, as in CI, there is.
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a compiler"
)
CSRC = Path(__file__).parents[1] / "csrc"


def built(sources, library, *flags):
    """C++ sources, with the project's headers, loaded."""
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{path}" for path in (CSRC, *include_paths())]
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", *flags, *includes]
    subprocess.run([*command, *sources, "-o", library], check=True)
    return ctypes.CDLL(str(library))
