"""Fixtures for all tests."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

# Tests are run with nothing of the project's root on sys.path, so by file.
_spec = spec_from_file_location("tokenexit_fixtures", Path(__file__).with_name("fixtures.py"))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The builder of small tokenizers, see fixtures.py."""
    fixtures = module_from_spec(_spec)
    _spec.loader.exec_module(fixtures)
    return fixtures.tiny_tokenizer
