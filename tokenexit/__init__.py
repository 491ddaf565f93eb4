"""Token-level early exit for BERT-family taggers."""

from typing import TYPE_CHECKING

from tokenexit import reference
from tokenexit.dial import Dial, Speed
from tokenexit.int8 import quantize
from tokenexit.models.configuration import TokenExitConfig
from tokenexit.models.convert import convert, to_hugging_face
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.models.tagger import Span, Tagged, Tagger
from tokenexit.policy import ExitPolicy
from tokenexit.prepacking import prepack

if TYPE_CHECKING:
    from tokenexit.training.adapt import adapt

__version__ = "0.1.0"
__all__ = [
    "Dial",
    "ExitPolicy",
    "Span",
    "Speed",
    "Tagged",
    "Tagger",
    "TokenExitConfig",
    "TokenExitForTokenClassification",
    "adapt",
    "convert",
    "prepack",
    "quantize",
    "reference",
    "to_hugging_face",
]


def __getattr__(name: str):
    if name == "adapt":  # brings the Trainer and `datasets`, which tagging does without
        from tokenexit.training.adapt import adapt

        return adapt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
