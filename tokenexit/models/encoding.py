"""Words to model inputs, and results back to words; long sentences go through in windows."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from tokenexit.models.convert import require_fast

logger = logging.getLogger(__name__)

NO_WORD, NO_LABEL = -1, -100

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Window:
    """A sentence, or the part of a long one that goes through the model at once.

    Attributes:
        sentence: its index among those given to `encode`.
        first_word, n_words: the words of the sentence that the window has.
        keep: (start, stop) of the words, numbered within the sentence, whose result is read from
            this window. The windows of a sentence share its words out: each is kept once.
        input_ids: with special tokens.
        word_ids: for each token its word's number within the sentence, -1 for none.
        token_type_ids: None if the tokenizer's model does not take them.
    """

    sentence: int
    first_word: int
    n_words: int
    keep: tuple[int, int]
    input_ids: list[int]
    word_ids: list[int]
    token_type_ids: list[int] | None = None

    def first_pieces(self) -> list[int]:
        """Return the position of the first token of each of the window's `n_words` words."""
        before = [NO_WORD, *self.word_ids]
        return [
            position
            for position, word in enumerate(self.word_ids)
            if word != NO_WORD and word != before[position]
        ]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[Sequence[str]],
    max_length: int,
    overlap: int = 32,
) -> list[Window]:
    """Turn sentences of words into windows of at most `max_length` tokens.

    A sentence that fits is one window. A longer one is cut between words into windows that
    overlap, and each word is kept in the one where the shorter of its two sides is longest. No
    word is lost: one that the tokenizer drops (empty, or of invisible characters) is the unknown
    token; one that alone overflows a window keeps its first tokens, with a logged warning.

    Args:
        tokenizer: a fast tokenizer.
        sentences: lists of words; an empty one gives a window of special tokens only.
        max_length: tokens, special ones included.
        overlap: words that neighboring windows share; fewer if that were more than half of one.

    Returns:
        The windows, in the order of the sentences and of their words.

    Raises:
        TypeError: a sentence that is no sequence of str.
        ValueError: a tokenizer that is not fast, joins words, or has no unknown token for a word
            it drops; a `max_length` without room for a word; a negative `overlap`.
    """
    require_fast(tokenizer)
    if getattr(tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", True) is False:
        raise ValueError(
            f"got a {type(tokenizer).__name__} that joins words to those before; expected one "
            "loaded with add_prefix_space=True"
        )
    if overlap < 0:
        raise ValueError(f"overlap is {overlap}; expected 0 or more words")
    frame = _Frame.of(tokenizer)
    room = max_length - len(frame.before) - len(frame.after)
    if room < 1:
        raise ValueError(
            f"max_length is {max_length}; expected at least {max_length - room + 1}, for the "
            "special tokens and a word"
        )

    windows = []
    sentences = [_words(words, number) for number, words in enumerate(sentences)]
    for number, (ids, word_ids) in enumerate(_tokenize(tokenizer, sentences)):
        words = sentences[number]
        if len(ids) <= room and len(set(word_ids)) == len(words):
            all_words = (0, len(words))
            windows.append(frame.around(number, all_words, all_words, ids, word_ids))
            continue
        pieces = _pieces_of_words(tokenizer, ids, word_ids, len(words))
        for word, its_pieces in enumerate(pieces):
            if len(its_pieces) > room:
                logger.warning(
                    "sentence %d, word %d (%.40r...) has %d tokens; only the first %d are read",
                    number,
                    word,
                    words[word],
                    len(its_pieces),
                    room,
                )
                del its_pieces[room:]
        for span, keep in _cut([len(its_pieces) for its_pieces in pieces], room, overlap):
            ids = [piece for word in range(*span) for piece in pieces[word]]
            word_ids = [word for word in range(*span) for _ in pieces[word]]
            windows.append(frame.around(number, span, keep, ids, word_ids))
    return windows


def collate(
    windows: Sequence[Window],
    tokenizer: PreTrainedTokenizerBase | int,
    labels: Sequence[Sequence[int]] | None = None,
) -> dict[str, torch.Tensor]:
    """Pad B windows on the right to the longest, N tokens.

    Args:
        windows: of `encode`, at least one.
        tokenizer: the tokenizer, or the id to pad with.
        labels: for each window the label ids of all words of its *sentence*. None: no labels.

    Returns:
        int64 tensors `[B, N]`: `input_ids`; `attention_mask`; `word_ids`, -1 at special tokens
        and padding; `token_type_ids` if the windows have them; with labels `labels`: a word's
        label at its first token if the window keeps the word, so that none counts twice, and
        -100 elsewhere.

    Raises:
        ValueError: no window, no padding token, labels that do not fit the windows.
    """
    if not windows:
        raise ValueError("got no windows; expected at least one")
    pad = tokenizer if isinstance(tokenizer, int) else tokenizer.pad_token_id
    if pad is None:
        raise ValueError(f"got a {type(tokenizer).__name__} without a padding token; expected one")

    longest = max(len(window.input_ids) for window in windows)

    def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    batch = {
        "input_ids": padded([window.input_ids for window in windows], pad),
        "attention_mask": padded([[1] * len(window.input_ids) for window in windows], 0),
        "word_ids": padded([window.word_ids for window in windows], NO_WORD),
    }
    if windows[0].token_type_ids is not None:
        batch["token_type_ids"] = padded([window.token_type_ids for window in windows], 0)
    if labels is not None:
        if len(labels) != len(windows):
            raise ValueError(f"got labels for {len(labels)} windows; expected {len(windows)}")
        rows = [_label_row(*pair) for pair in zip(windows, labels, strict=True)]
        batch["labels"] = padded(rows, NO_LABEL)
    return batch


def merge(windows: Sequence[Window], values: Sequence[Sequence[_Value]]) -> list[list[_Value]]:
    """Put the results of windows together: for each sentence one value a word.

    Args:
        windows: all that `encode` made, in any order.
        values: for each window a value for each of its `n_words` words.

    Raises:
        ValueError: values that do not fit the windows; a window missing before another.
    """
    if len(values) != len(windows):
        raise ValueError(f"got values for {len(values)} windows; expected {len(windows)}")
    merged: dict[int, list[_Value]] = {}
    for window, row in sorted(
        zip(windows, values, strict=True), key=lambda pair: (pair[0].sentence, pair[0].first_word)
    ):
        if len(row) != window.n_words:
            raise ValueError(
                f"got {len(row)} values for a window of sentence {window.sentence}; expected one "
                f"for each of its {window.n_words} words"
            )
        sentence = merged.setdefault(window.sentence, [])
        start, stop = window.keep
        if len(sentence) != start or window.sentence != len(merged) - 1:
            raise ValueError(
                f"a window before word {start} of sentence {window.sentence} is missing; expected "
                "all that encode made"
            )
        sentence.extend(row[start - window.first_word : stop - window.first_word])
    return list(merged.values())


@dataclass(frozen=True)
class _Frame:
    """The special tokens that the tokenizer puts around a sentence."""

    before: list[int]
    after: list[int]
    types: tuple[int, int, int] | None  # token types before, in and after the sentence

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> _Frame:
        """Read the special tokens off a sentence of one word."""
        encoding = _call(tokenizer, [[tokenizer.unk_token or "a"]], add_special_tokens=True)[0]
        first = encoding.word_ids.index(0)
        last = len(encoding.ids) - encoding.word_ids[::-1].index(0)
        types = None
        if "token_type_ids" in tokenizer.model_input_names:
            types = tuple(encoding.type_ids[position] for position in (0, first, -1))
        return _Frame(encoding.ids[:first], encoding.ids[last:], types)

    def around(
        self,
        sentence: int,
        span: tuple[int, int],
        keep: tuple[int, int],
        ids: list[int],
        word_ids: list[int],
    ) -> Window:
        types = None
        if self.types is not None:
            counts = (len(self.before), len(ids), len(self.after))
            types = [t for t, n in zip(self.types, counts, strict=True) for _ in range(n)]
        return Window(
            sentence=sentence,
            first_word=span[0],
            n_words=span[1] - span[0],
            keep=keep,
            input_ids=[*self.before, *ids, *self.after],
            word_ids=[NO_WORD] * len(self.before) + word_ids + [NO_WORD] * len(self.after),
            token_type_ids=types,
        )


def _words(words: Sequence[str], number: int) -> list[str]:
    if (
        not isinstance(words, Sequence)
        or isinstance(words, str)
        or not all(isinstance(word, str) for word in words)
    ):
        raise TypeError(f"sentence {number} is {words!r:.80}; expected a list of words")
    try:
        "".join(words).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"sentence {number} is no valid Unicode: {error}") from error
    return list(words)


def _call(tokenizer, sentences, add_special_tokens):
    return tokenizer(
        sentences,
        is_split_into_words=True,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # it would warn of long sentences, which are cut here
    ).encodings


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, sentences: list[list[str]], batch_size: int = 1000
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield token ids and word ids of each sentence, without special tokens."""
    for start in range(0, len(sentences), batch_size):
        batch = sentences[start : start + batch_size]
        for encoding in _call(tokenizer, batch, add_special_tokens=False):
            yield encoding.ids, encoding.word_ids


def _pieces_of_words(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], word_ids: list[int], n_words: int
) -> list[list[int]]:
    """Group token ids by word; the unknown token for words that have none."""
    pieces = [[] for _ in range(n_words)]
    for piece, word in zip(ids, word_ids, strict=True):
        pieces[word].append(piece)
    if not all(pieces) and tokenizer.unk_token_id is None:
        raise ValueError(
            f"got a {type(tokenizer).__name__} without an unknown token; expected one, for the "
            "words that it drops"
        )
    return [its_pieces or [tokenizer.unk_token_id] for its_pieces in pieces]


def _cut(
    lengths: list[int], room: int, overlap: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield (span, keep) of windows over words of the given lengths, none above `room`."""
    offsets = [0, *accumulate(lengths)]
    start = kept = 0
    while True:
        stop = bisect_right(offsets, offsets[start] + room) - 1
        if stop == len(lengths):
            yield (start, stop), (kept, stop)
            return
        following = max(stop - overlap, (start + stop + 1) // 2)
        while offsets[stop + 1] - offsets[following] > room:
            following += 1
        # The middle of the overlap: from there on, the next window knows more to the left than
        # this one knows to the right.
        middle = (following + stop + 1) // 2
        yield (start, stop), (kept, middle)
        start, kept = following, middle


def _label_row(window: Window, labels: Sequence[int]) -> list[int]:
    start, stop = window.keep
    if stop > len(labels):
        raise ValueError(
            f"got {len(labels)} labels for sentence {window.sentence}; expected one a word, at "
            f"least {stop}"
        )
    row = [NO_LABEL] * len(window.input_ids)
    for word, position in enumerate(window.first_pieces(), window.first_word):
        if start <= word < stop:
            row[position] = labels[word]
    return row
