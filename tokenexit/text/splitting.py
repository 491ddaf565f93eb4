"""Raw text to words with their places in it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from tokenizers import PreTokenizedString
from transformers import PreTrainedTokenizerBase

from tokenexit.text.vocabulary import own_backend, require_fast

# Of scripts without blanks, by whose characters taggers go: Chinese ideographs.
_IDEOGRAPHS = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x20000, 0x323AF))


class Splitter:
    """Words of raw text as the tokenizer sees them: by its own pre-tokenizer.

    Marks of punctuation at the ends of a word are words, and so is each Chinese character, also
    where the pre-tokenizer, as SentencePiece's, splits at blanks only.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        require_fast(tokenizer)
        backend = own_backend(tokenizer)
        self._normalizer, self._pre_tokenizer = backend.normalizer, backend.pre_tokenizer

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, stop) of each word, in characters of the text.

        Raises:
            ValueError: no valid Unicode.
        """
        try:
            split = PreTokenizedString(text)
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is no valid Unicode: {error}") from error
        if self._normalizer is not None:
            split.normalize(self._normalizer.normalize)
        if self._pre_tokenizer is not None:
            self._pre_tokenizer.pre_tokenize(split)
        spans, end = [], 0
        for _, (start, stop), _ in split.get_splits("original", "char"):
            # Of a character that the normalizer makes several of, each part is said to be all.
            spans += _words_in(text, max(start, end), stop)
            end = max(end, stop)
        return _with_accents(text, spans)

    def words(self, text: str) -> list[str]:
        """The words of a text."""
        return [text[start:stop] for start, stop in self.spans(text)]


def _with_accents(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Marks belong to the letter before them; normalizers take them off, pre-tokenizers split."""
    found = []
    for (start, stop), most in zip(spans, [*(at for at, _ in spans[1:]), len(text)], strict=False):
        if found and start == found[-1][1]:
            start = _behind_marks(text, start, stop)
            found[-1] = found[-1][0], start
        if start < stop:
            found.append((start, stop))
        if found[-1][1] == stop:
            found[-1] = found[-1][0], _behind_marks(text, stop, most)
    return found


def _behind_marks(text: str, at: int, most: int) -> int:
    while at < most and unicodedata.category(text[at]).startswith("M"):
        at += 1
    return at


def _words_in(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Words of what a pre-tokenizer takes for one."""
    if (part := text[start:stop]).isalnum() and part.isascii():
        yield start, stop
        return
    begin = start
    for at in range(start, stop):
        space, single = text[at].isspace(), _is_ideograph(text[at])
        if space or single:
            yield from _without_marks(text, begin, at)
            begin = at + 1
        if single:
            yield at, at + 1
    yield from _without_marks(text, begin, stop)


def _without_marks(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """A word, and the marks of punctuation before and after it."""
    first, last = start, stop
    while first < last and _is_mark(text[first]):
        yield first, first + 1
        first += 1
    while last > first and _is_mark(text[last - 1]):
        last -= 1
    if first < last:
        yield first, last
    yield from ((at, at + 1) for at in range(last, stop))


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def _is_ideograph(character: str) -> bool:
    return any(low <= ord(character) <= high for low, high in _IDEOGRAPHS)
