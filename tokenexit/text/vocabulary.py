"""What a tokenizer's vocabulary says of words, and a copy of it that no one else sets."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tokenexit.packing import CONTINUES_WORD, SPECIAL, STARTS_WORD

logger = logging.getLogger(__name__)

_MARKS = ("Ġ", "▁")  # of a space before a word: in byte-level vocabularies, and SentencePiece's


def require_fast(tokenizer: PreTrainedTokenizerBase):
    """Raise ValueError unless the tokenizer can say which word a token belongs to."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"got {type(tokenizer).__name__}, which is not a fast tokenizer; expected one, as only "
            "those say which word a token belongs to"
        )


def require_vocabulary(tokenizer: PreTrainedTokenizerBase):
    """Raise ValueError for a tokenizer of special tokens only, to which all words are unknown."""
    if len(tokenizer) <= len({*tokenizer.all_special_ids}):
        raise ValueError(
            f"got a {type(tokenizer).__name__} of special tokens only; expected one with its "
            "vocabulary (are the tokenizer's files where it was loaded from?)"
        )


def token_kinds(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """What each vocabulary entry is, `[vocab_size]` uint8: starts a word, continues one, special.

    WordPiece marks what continues a word ("##"); SentencePiece and byte-level BPE mark what
    starts one ("▁", "Ġ"). A vocabulary without marks makes each token a word; a token that was
    added to the vocabulary is one.

    Raises:
        ValueError: not a fast tokenizer; no entries but special ones, or more than `vocab_size`.
    """
    require_fast(tokenizer)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries; the model's vocabulary is {vocab_size}"
        )
    require_vocabulary(tokenizer)
    vocab = tokenizer.get_vocab()
    backend = own_backend(tokenizer)
    continuing = getattr(backend.model, "continuing_subword_prefix", None)
    starting = None if continuing else _starting_mark(backend)
    kinds = torch.full((vocab_size,), STARTS_WORD, dtype=torch.uint8, device="cpu")
    # The unknown token stands for text, a piece of it.
    added = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    for token, index in vocab.items():
        if index not in added and (
            (continuing and token.startswith(continuing))
            or (starting and not token.startswith(starting))
        ):
            kinds[index] = CONTINUES_WORD
    kinds[sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})] = SPECIAL
    return kinds


def marks_of(name: str | os.PathLike, vocab_size: int, **hub) -> torch.Tensor:
    """`token_kinds` of the tokenizer saved at `name`; with a warning no marks if there is none."""
    try:
        return token_kinds(AutoTokenizer.from_pretrained(name, **hub), vocab_size)
    except (OSError, ValueError) as error:
        logger.warning(
            "no words are marked in the vocabulary, each token is one unless word_ids say "
            "otherwise: %s",
            error,
        )
        return torch.full((vocab_size,), STARTS_WORD, dtype=torch.uint8, device="cpu")


def own_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the backend that encodes alike, and whose settings are its own.

    Padding, truncation and BPE dropout are off. The vocabulary, large and never changed, is
    shared where that is possible.
    """
    theirs = tokenizer.backend_tokenizer
    added = theirs.get_added_tokens_decoder()
    own = Tokenizer(theirs.model)
    for part in ("normalizer", "pre_tokenizer"):
        if (value := getattr(theirs, part)) is not None:
            setattr(own, part, value)
    own.add_tokens([token for _, token in sorted(added.items())])
    dropout = getattr(theirs.model, "dropout", None)
    if dropout or _text_of(own.get_added_tokens_decoder()) != _text_of(added):
        own = copy.deepcopy(theirs)
        own.no_truncation()
        own.no_padding()
        if dropout:
            own.model.dropout = None
    own.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
    return own


def _text_of(added) -> dict[int, str]:
    return {index: repr(token) for index, token in added.items()}


def some_words(backend: Tokenizer, most: int = 200) -> list[str]:
    """Words that the vocabulary has, those first that it marks as such."""
    size = backend.get_vocab_size(with_added_tokens=False)
    tokens = [backend.id_to_token(i) or "" for i in range(0, size, size // 5000 + 1)]
    tokens.sort(key=lambda token: not token.startswith(_MARKS))
    words = (token.lstrip("".join(_MARKS)) for token in tokens)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    return [word for word in dict.fromkeys(words) if word.isalnum() and word not in added][:most]


def _starting_mark(backend: Tokenizer) -> str | None:
    """The character that most words of a text have in front, "▁" or "Ġ" or another; or None."""
    found = Counter()
    words = some_words(backend)
    texts = [f"{word} {word}" for word in words]
    for word, text in zip(
        words, backend.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        after = [i for i, (_, stop) in enumerate(text.offsets) if stop > len(word)]
        if not after or text.offsets[after[0]][0] < len(word):
            continue  # nothing, or a piece of both words
        piece, folded = text.tokens[after[0]], word.casefold()
        begins = folded.startswith(piece.casefold())
        if piece in _MARKS or not begins and piece[1:] and folded.startswith(piece[1:].casefold()):
            found[piece[0]] += 1
    return found.most_common(1)[0][0] if found else None
