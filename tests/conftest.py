"""Fixtures for all tests."""

import os
import sys
from pathlib import Path

import fixtures
import hypothesis
import pytest
import torch

# What is tested is what is installed: `python -m pytest` puts the project's root first, where a
# package without its kernels and compiled ops lies.
ROOT = Path(__file__).parents[1]
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != ROOT]

torch.set_num_threads(1)  # as many test processes as cores run beside each other

# The same examples in each run, and none that fails because a machine is slow.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The builder of small tokenizers, see fixtures.py."""
    return fixtures.tiny_tokenizer


# After these no GPU code runs in the process any more.
BROKEN = (
    "an illegal memory access",
    "an illegal instruction",
    "device-side assert",
    "misaligned address",
    "unspecified launch failure",
)


def pytest_runtest_logreport(report):
    """A process beside others whose GPU context is broken ends: else all its later tests fail.

    pytest-xdist has been told of the failure, and starts another process.
    """
    text = str(report.longrepr) if report.failed else ""
    if any(sign in text for sign in BROKEN) and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(3)


@pytest.fixture
def poisoned():
    """Fill what torch allocates, with NaN or the largest integer, so that none goes unwritten."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
