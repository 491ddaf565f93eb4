"""Fixtures for all tests."""

import fixtures
import pytest
import torch

torch.set_num_threads(1)  # as many test processes as cores run beside each other


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The builder of small tokenizers, see fixtures.py."""
    return fixtures.tiny_tokenizer
