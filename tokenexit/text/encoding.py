"""Words to model inputs, and results back to words; long sentences go through in windows."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tokenexit.text.vocabulary import own_backend, require_fast, some_words

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


class WordTokenizer:
    """A fast tokenizer's own copy for sentences given as words: nothing but the words matters.

    Padding and truncation, which any call of a tokenizer sets for all who share it, and BPE
    dropout are off. What is done to the tokenizer afterwards does not come here. A word has the
    pieces that it has amid a text: where the tokenizer would join it to the one before, as
    byte-level ones do without `add_prefix_space=True`, it is given with a space.

    Args:
        tokenizer: a fast tokenizer.

    Raises:
        ValueError: one that is not fast, or joins words to those before whatever is done.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        require_fast(tokenizer)
        self.name = type(tokenizer).__name__
        self.pad_token_id = tokenizer.pad_token_id
        self.backend = own_backend(tokenizer)
        self.unk_token_id = tokenizer.unk_token_id
        if self.unk_token_id is None and (unk := getattr(self.backend.model, "unk_token", None)):
            self.unk_token_id = self.backend.token_to_id(unk)
        self.frame = _Frame.of(tokenizer)
        self.space = ""  # before a word
        if joined := self._joined_words():
            self.space = " "
            if self._joined_words():
                raise ValueError(joined)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase | WordTokenizer) -> WordTokenizer:
        """The tokenizer itself, if it is one already."""
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer)

    def pieces(
        self, sentences: list[list[str]], batch_size: int = 1000
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield token ids and word ids of each sentence, without special tokens."""
        for start in range(0, len(sentences), batch_size):
            for encoding in self._encode(sentences[start : start + batch_size], words=True):
                yield encoding.ids, encoding.word_ids

    def by_word(
        self, number: int, words: list[str], ids: list[int], word_ids: list[int]
    ) -> list[list[int]]:
        """Group the token ids of sentence `number` by word; the unknown token for words without."""
        pieces = [[] for _ in words]
        for piece, word in zip(ids, word_ids, strict=True):
            pieces[word].append(piece)
        if not all(pieces) and self.unk_token_id is None:
            word = pieces.index([])
            raise ValueError(
                f"got a {self.name} without an unknown token; expected one, for words that it "
                f"drops, such as word {word} of sentence {number}, {words[word]!r:.40}"
            )
        return [its_pieces or [self.unk_token_id] for its_pieces in pieces]

    def _encode(self, texts: list, words: bool) -> list[Encoding]:
        if words and self.space:
            texts = [[self._spaced(word) for word in words] for words in texts]
        return self.backend.encode_batch(texts, is_pretokenized=words, add_special_tokens=False)

    def _spaced(self, word: str) -> str:
        return word if not word or word[0].isspace() else self.space + word

    def _joined_words(self) -> str | None:
        """Unless a word given after another has the pieces that it has in a text: which has not.

        Byte-level and SentencePiece vocabularies mark the space before a word. Whether a word
        that comes alone gets that mark is up to several settings of several parts; so ask.
        """
        words = some_words(self.backend)
        texts = self._encode([f"{word} {word}" for word in words], words=False)
        pairs = self._encode([[word, word] for word in words], words=True)
        for word, text, pair in zip(words, texts, pairs, strict=True):
            end = len(word)
            if any(start < end < stop for start, stop in text.offsets):
                continue  # a tokenizer of words only: no text tells how they begin
            got = [i for i, its_word in zip(pair.ids, pair.word_ids, strict=True) if its_word == 1]
            # The space is a token of its own, or part of one, or nothing.
            expected = [
                [i for i, (_, stop) in zip(text.ids, text.offsets, strict=True) if stop > least]
                for least in (end + 1, end)
            ]
            if got not in expected:
                got, expected = (
                    [self.backend.id_to_token(i) for i in ids] for ids in (got, expected[1])
                )
                return (
                    f"got a {self.name} that joins words to those before; expected one loaded "
                    f"with add_prefix_space=True or whose pre-tokenizer marks each word: given "
                    f"after another one, {word!r} becomes {got}; in a text, {expected}"
                )
        return None


def load_tokenizer(name: str | os.PathLike, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer at a folder or hub name; a byte-level one with `add_prefix_space=True`.

    Then a text's first word has the pieces that it has later in the text, and words that are given
    one by one have those that `WordTokenizer` gives them, wherever the tokenizer is used.

    Args:
        kwargs: of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: a folder without a tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except ValueError as error:
        if not Path(name).is_dir():
            raise
        raise ValueError(
            f"{name} has no tokenizer that can be loaded; expected its files beside the model's"
        ) from error
    if not getattr(tokenizer, "is_fast", False) or not WordTokenizer(tokenizer).space:
        return tokenizer
    spaced = AutoTokenizer.from_pretrained(name, **{**kwargs, "add_prefix_space": True})
    part = spaced.backend_tokenizer.pre_tokenizer
    if isinstance(part, pre_tokenizers.ByteLevel) and part.use_regex:
        part.add_prefix_space = True  # not all classes of tokenizers do it themselves
        spaced.backend_tokenizer.pre_tokenizer = part
    return tokenizer if WordTokenizer(spaced).space else spaced


def encode(
    tokenizer: PreTrainedTokenizerBase | WordTokenizer,
    sentences: Sequence[Sequence[str]],
    max_length: int,
    overlap: int = 32,
    first: int = 0,
) -> list[Window]:
    """Turn sentences of words into windows of at most `max_length` tokens.

    A sentence that fits is one window. A longer one is cut between words into windows that
    overlap, and each word is kept in the one where the shorter of its two sides is longest. No
    word is lost: one that the tokenizer drops (empty, or of invisible characters) is the unknown
    token; one that alone overflows a window keeps its first tokens, with a logged warning.

    Args:
        tokenizer: a fast tokenizer, or what `WordTokenizer` made of it, once for many calls.
        sentences: lists of words; an empty one gives a window of special tokens only, of a token
            for padding where there are none.
        max_length: tokens, special ones included.
        overlap: words that neighboring windows share; fewer if that were more than half of one.
        first: the number that messages have for the first sentence.

    Returns:
        The windows, in the order of the sentences and of their words.

    Raises:
        TypeError: a sentence that is no sequence of str.
        ValueError: a tokenizer that is not fast, joins words, or has no unknown token for a word
            it drops; a `max_length` without room for a word; a negative `overlap`.
    """
    tokenizer = WordTokenizer.of(tokenizer)
    if overlap < 0:
        raise ValueError(f"overlap is {overlap}; expected 0 or more words")
    frame = tokenizer.frame
    room = max_length - len(frame.before) - len(frame.after)
    if room < 1:
        raise ValueError(
            f"max_length is {max_length}; expected at least {max_length - room + 1}, for the "
            "special tokens and a word"
        )

    windows = []
    sentences = [as_words(words, number) for number, words in enumerate(sentences, first)]
    for number, (ids, word_ids) in enumerate(tokenizer.pieces(sentences)):
        words = sentences[number]
        if not (words or frame.before or frame.after):  # a window has a token
            ids, word_ids = [tokenizer.pad_token_id], [NO_WORD]
            windows.append(frame.around(number, (0, 0), (0, 0), ids, word_ids))
            continue
        if len(ids) <= room and len(set(word_ids)) == len(words):
            all_words = (0, len(words))
            windows.append(frame.around(number, all_words, all_words, ids, word_ids))
            continue
        pieces = tokenizer.by_word(first + number, words, ids, word_ids)
        for word, its_pieces in enumerate(pieces):
            if len(its_pieces) > room:
                logger.warning(
                    "sentence %d, word %d (%.40r...) has %d tokens; only the first %d are read",
                    first + number,
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
    tokenizer: PreTrainedTokenizerBase | WordTokenizer | int,
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
        rows = [row + [value] * (longest - len(row)) for row in rows]
        # Of nested lists numpy makes an array in a fifth of torch.tensor's time.
        return torch.from_numpy(np.array(rows, dtype=np.int64))

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
        """What its post-processor puts around a word, whichever words it knows."""
        one_word = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
        if (post_processor := tokenizer.backend_tokenizer.post_processor) is not None:
            one_word.post_processor = post_processor
        encoding = one_word.encode(["word"], is_pretokenized=True)
        at = encoding.word_ids.index(0)
        types = None
        if "token_type_ids" in tokenizer.model_input_names:
            types = tuple(encoding.type_ids[position] for position in (0, at, -1))
        return _Frame(encoding.ids[:at], encoding.ids[at + 1 :], types)

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


def as_words(words: Sequence[str], number: int) -> list[str]:
    """The words of sentence `number`; TypeError or ValueError if it is no list of them."""
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
