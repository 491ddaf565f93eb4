"""The CUDA sources by nvcc alone: for data-center GPUs, against the headers of any torch."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
# The headers of the torch that is here, and of those whose `include` TORCH_INCLUDES lists.
INCLUDES = [str(Path(torch.__file__).parent / "include")]
INCLUDES += filter(None, os.environ.get("TORCH_INCLUDES", "").split(os.pathsep))
ARCHES = ("80", "90", "100")
# What later torches have in their stable headers and 2.10, the oldest promised, has not.
LATER = {"STABLE_TORCH_ERROR_CODE_CHECK"}


def tool(name):
    """The path of a program of the CUDA toolkit, or of Triton's copy of it; or None."""
    folders = [os.environ.get("PATH", "")]
    if home := os.environ.get("CUDA_HOME"):
        folders.insert(0, f"{home}/bin")
    if spec := importlib.util.find_spec("triton"):
        folders.append(f"{spec.submodule_search_locations[0]}/backends/nvidia/bin")
    return shutil.which(name, path=os.pathsep.join(folders))


NVCC = tool("nvcc")


def test_sources_name_nothing_that_the_oldest_torch_lacks():
    for path in CSRC.rglob("*.*"):
        assert not LATER & set(re.findall(r"\w+", path.read_text())), path


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc, in CUDA_HOME or on PATH")
@pytest.mark.parametrize("source", sorted(CSRC.glob("cuda/*.cu")), ids=lambda path: path.name)
@pytest.mark.parametrize("include", INCLUDES, ids=range(len(INCLUDES)))
def test_compiles_without_spills(include, source, tmp_path):
    built = tmp_path / "built.o"
    command = [NVCC, "-c", source, "-o", built, "-O3", "-std=c++20", f"-I{include}", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    for arch in ARCHES:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if (cuobjdump := tool("cuobjdump")) is None:
        return  # compiled, which is the most that can be told
    path = f"{Path(cuobjdump).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # for its neighbors
    usage = subprocess.run(
        [cuobjdump, "-res-usage", built],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert set(re.findall(r"arch = sm_(\d+)", usage)) == set(ARCHES), usage
    kernels = re.findall(r"REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", usage)
    written = [path.read_text() for path in CSRC.glob(f"cuda/{source.stem}.cu*")]
    assert len(kernels) == "".join(written).count("__global__") * len(ARCHES), usage
    assert set(kernels) == {("0", "0")}, usage
