"""Token-level early exit for BERT-family taggers."""

from tokenexit import reference
from tokenexit.int8 import quantize
from tokenexit.models.configuration import TokenExitConfig
from tokenexit.models.convert import convert, to_hugging_face
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.models.tagger import Tagged, Tagger
from tokenexit.policy import ExitPolicy

__version__ = "0.1.0"
__all__ = [
    "ExitPolicy",
    "Tagged",
    "Tagger",
    "TokenExitConfig",
    "TokenExitForTokenClassification",
    "convert",
    "quantize",
    "reference",
    "to_hugging_face",
]
