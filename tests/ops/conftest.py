"""The ops write every element of what they return."""

import pytest


@pytest.fixture(autouse=True)
def memory(poisoned):
    """See tests/conftest.py."""
