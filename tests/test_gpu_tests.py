"""How tests for a GPU are chosen, and what happens where one breaks it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_of(*arguments, cwd, path):
    """What a pytest says, with that folder on its path."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    kept |= {"PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    kept.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_with_a_gpu_all_tests_of_kernels_are_marked(tmp_path):
    pytest.importorskip("triton")
    pretends = "import torch\ntorch.cuda.is_available = lambda: True\n"
    (tmp_path / "pretends.py").write_text(pretends)
    files = [HERE / "kernels/test_norm.py", HERE / "kernels/test_report.py"]
    options = "--collect-only", "-m", "gpu", "-p", "pretends"
    out = pytest_of(*options, *files, cwd=HERE.parent, path=tmp_path)
    listed = [line for line in out.splitlines() if "::" in line]
    assert len(listed) > 10 and all("test_norm.py" in line for line in listed), out


def test_who_breaks_the_gpu_harms_no_other(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.parametrize('number', range(4))\n"
        "def test_it(number):\n"
        "    if number == 1:\n"
        "        raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
    )
    out = pytest_of("-n", 1, "-p", "conftest", tmp_path, cwd=tmp_path, path=HERE)
    assert "3 passed" in out and "an illegal memory access" in out, out
    assert "worker 'gw0' crashed while running 'test_it.py::test_it[1]'" in out
