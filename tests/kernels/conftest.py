"""Kernels are tested on the GPU if there is one, else in Triton's interpreter.

The interpreter has to be chosen before triton is imported, and other tests must not meet it. So
without a GPU each file of this folder is one test, that runs pytest on the file in a process of its
own; to pick tests of a file, set TRITON_INTERPRET=1. The files are plain ones, that import kernels
at their top and take the fixture `device`; what must not be interpreted is named below. With a GPU
each of their tests is marked as one of it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED_ONLY = {"test_report.py"}
HERE = Path(__file__).parent


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    if INTERPRETED or not torch.cuda.is_available():
        return
    for item in items:
        if item.path.parent == HERE and item.path.name not in COMPILED_ONLY:
            item.add_marker(pytest.mark.gpu)


class InterpretedFile(pytest.File):
    def collect(self):
        yield InterpretedRun.from_parent(self, name="in_the_interpreter")


class InterpretedRun(pytest.Item):
    def runtest(self):
        if importlib.util.find_spec("triton") is None:
            pytest.skip("needs triton")
        env = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", self.path],
            cwd=self.config.rootpath,
            env={
                **env,
                "TRITON_INTERPRET": "1",
                "PYTHONSAFEPATH": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            pytest.fail(done.stdout, pytrace=False)


def pytest_pycollect_makemodule(module_path, parent):
    if INTERPRETED or torch.cuda.is_available() or module_path.name in COMPILED_ONLY:
        return None  # collected as usual
    return InterpretedFile.from_parent(parent, path=module_path)
