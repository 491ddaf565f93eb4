"""Token-level early exit for BERT-family taggers."""

from tokenexit import reference
from tokenexit.policy import ExitPolicy

__version__ = "0.1.0"
__all__ = [
    "ExitPolicy",
    "TokenExitConfig",
    "TokenExitForTokenClassification",
    "Tagger",
    "convert",
    "reference",
]

# transformers takes a second to import: not before it is needed.
_LAZY = {
    "TokenExitConfig": "tokenexit.models.configuration",
    "TokenExitForTokenClassification": "tokenexit.models.modeling",
    "Tagger": "tokenexit.models.tagger",
    "convert": "tokenexit.models.convert",
}


def __getattr__(name: str):
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tokenexit' has no attribute {name!r}")
