"""A user's program, as a type checker sees it: `make lint` has mypy read it, and nothing runs it.

Wrong calls are in it too: one that mypy took for right would leave an `ignore` unused, an error.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import assert_type

import tokenexit
from tokenexit import (
    Dial,
    ExitPolicy,
    Span,
    Speed,
    Tagged,
    Tagger,
    TokenExitForTokenClassification,
)
from tokenexit.training.adapt import Adapted


def convert(theirs: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tokenexit.convert(theirs, tokenizer)
    assert_type(model, TokenExitForTokenClassification)
    assert_type(tokenexit.quantize(model), TokenExitForTokenClassification)
    assert_type(tokenexit.to_hugging_face(model), PreTrainedModel)
    tokenexit.convert("a name")  # type: ignore[arg-type]


def steer(model: TokenExitForTokenClassification) -> None:
    assert_type(model.policy, ExitPolicy)
    model.policy = ExitPolicy(threshold=0.3, window=1, copy="pre_norm")
    model.policy = ExitPolicy(threshold=(0.1, 0.2)).replace(window=2)
    model.policy = ExitPolicy.paper([0.1, 0.2])
    model.policy = 0.3  # type: ignore[assignment]
    ExitPolicy(treshold=0.3)  # type: ignore[call-arg]
    assert_type(model.dial, Dial | None)
    assert_type(model.speed("promised"), Speed)
    assert_type(model.loop, str)
    model.backend = "eager"
    assert_type(model.untrained_heads(ExitPolicy.never()), list[int])
    assert_type(model.exit_heads, torch.nn.ModuleList)


def tag(folder: Path) -> None:
    tagger = Tagger.from_pretrained(folder, int8=True)
    assert_type(tagger, Tagger)
    for tagged in tagger.tag([["New", "York"], "a text"], speed=2.5):
        assert_type(tagged, Tagged)
        assert_type(tagged.labels, list[str])
        assert_type(tagged.spans, list[Span])
    tagger.tag(speed="full")  # type: ignore[call-arg]
    loaded = TokenExitForTokenClassification.from_pretrained(folder, policy=ExitPolicy.never())
    assert_type(loaded, TokenExitForTokenClassification)


def adapt(theirs: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    result = tokenexit.adapt(theirs, [["New", "York"]], tokenizer)
    assert_type(result, Adapted)
    assert_type(result.tagger, Tagger)
