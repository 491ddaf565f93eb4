"""Annotated text: one row a sentence, its words and, where known, their labels."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import huggingface_hub

from tokenexit.text.scoring import shown

if TYPE_CHECKING:  # else imported where it is needed: tagging does without
    import datasets
    from datasets import Dataset, DatasetDict

WORD_KEYS = ("words", "tokens")
LABEL_KEYS = ("labels", "tags", "ner_tags", "pos_tags")

_CONLLU_WORD, _CONLLU_WIDTH = 1, 10
_CONLLU_LABELS = {"upos": 3, "xpos": 4, "deprel": 7}
_CONLLU_NO_WORD = re.compile(r"\d+-\d+|\d+\.\d+")  # multiword tokens and empty nodes
_FORMAT_OF_SUFFIX = {
    ".conllu": "conllu",
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".conll", ".tsv", ".bio", ".bioes", ".iob", ".iob2", ".bmes"), "conll"),
    **dict.fromkeys((".csv", ".parquet", ".arrow", ".xlsx", ".xml"), None),  # not read
}
_NOT_TEXT = {
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# The one idea of a blank. Not str.split and str.strip: a no-break or an ideographic space is part
# of a word, and can be one. Line ends are met within strings of JSON only.
_BLANK = " \t\r\n"
_BLANKS = re.compile(f"[{_BLANK}]+")
_DOCUMENT = "-DOCSTART-"
# What columns of words and of labels are called, where a table says so.
_WORD_HEADS = frozenset(("word", "words", "token", "tokens", "form"))
_LABEL_HEADS = frozenset(("label", "labels", "tag", "tags", "ner", "ner_tag", "ner_tags", "pos"))
_CHUNK_LABEL = re.compile(r"O|[BIESMLU]-\S+")
_MOST_LABELS = 10_000  # that a stream of columns remembers; more are no labels


def read_sentences(
    source: str | os.PathLike | Dataset | DatasetDict,
    *,
    column: int | str | None = None,
    split: str | None = None,
    config: str | None = None,
    format: str | None = None,
    labelled: bool = True,
) -> Dataset:
    """Read sentences of words, with their labels where the source has them.

    | format | source | `column` |
    | --- | --- | --- |
    | `conll` | file of columns between tabs or blanks, first the word | number; default the last |
    | `conllu` | CoNLL-U file; syntactic words | `upos` (default), `xpos`, `deprel` or number |
    | `jsonl` | file with a JSON object a line, words under `words` or `tokens` | key |
    | `text` | file with a sentence a line, words between blanks, no labels | |
    | `dataset` | folder of `save_to_disk`, or name for `datasets.load_dataset` | its column |

    A `conll` file whose rows have one column holds words without labels. Its `-DOCSTART-` lines
    are skipped. `#` is a word of tweets, so a line that starts with `#` is a comment only if it
    has not as many columns as the first other row; or if it starts with `# `, before the words of
    a sentence, and where its label would be stands one that no other row has.

    Args:
        source: a file, a folder, a data set's name, or a data set in memory.
        column: where the labels are, see the table. None: the default; of the keys or columns
            `labels`, `tags`, `ner_tags`, `pos_tags` the first that is there.
        split: which split of a data set. None: its only one.
        config: the configuration for `datasets.load_dataset`.
        format: one of the table. None: told by the file's name, `conll` if that tells nothing; a
            file that begins like one of another format is refused.
        labelled: False: labels of a data set are not read, whatever they are.

    Returns:
        A data set with the columns `words`, lists of str, and, where the source has labels,
        `labels`, lists of as many str.

    Raises:
        ValueError: a source that is missing or empty, or not as its format says (the message
            names file and line); an option that does not fit the source.
        TypeError: a source that is neither a path, a name nor a data set.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(source, (Dataset, DatasetDict)):
        if config is not None or format is not None:
            raise ValueError(
                f"got config {config!r} and format {format!r} with a data set in memory; expected "
                "neither"
            )
        return _from_dataset(_one_split(source, split, "the data set"), column, labelled)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"got a {type(source).__name__}; expected a path, a name or a Dataset")
    if format is not None and format not in (*_PARSERS, "dataset"):
        raise ValueError(f"format is {format!r}; expected one of {[*_PARSERS, 'dataset']}")

    path = Path(source).expanduser()
    is_file = path.exists() and not path.is_dir()
    if not is_file or format == "dataset":
        if format in _PARSERS and path.is_dir():
            raise ValueError(f"no such file: {source}, which is a folder")
        if format in _PARSERS or (format is None and is_missing_path(source)):
            raise ValueError(f"no such file: {source}")
        return _from_dataset(_load(source, path, config, split), column, labelled)
    if split is not None or config is not None:
        raise ValueError(
            f"got split {split!r} and config {config!r} with the file {source}; expected neither"
        )
    with path.open("rb") as file:
        sentences = list(_sentences(file, str(source), format, "conll", column, True))
    if not sentences:
        raise ValueError(f"{source} has no sentence; expected at least one")
    words, labels, *_ = zip(*sentences, strict=True)
    rows = {"words": words} if labels[0] is None else {"words": words, "labels": labels}
    return Dataset.from_dict(rows, features=_features(rows))


def read_texts(source: str | os.PathLike, *, format: str | None = None) -> list[str | list[str]]:
    """Read what is to be tagged from a file: texts, or lists of words where it has these.

    Args:
        source: a file or a pipe; of JSON lines, a string under `words`, `tokens` or `text` is a
            text.
        format: as of `stream_rows`. None: told by the file's name, else by its first lines.

    Raises:
        ValueError: not as the format says; no sentence.
    """
    path = Path(source).expanduser()
    with path.open("rb") as file:
        lines = list(file)  # at once, as a pipe is read once
    if format is None and path.suffix.lower() not in _FORMAT_OF_SUFFIX:
        head = [line for _, line in islice(_lines(lines, str(source)), 1000)]
        rows = [line for line in head if line.strip(_BLANK) and not line.startswith("#")][:2]
        found = {_looks_like(rows[:n], "text") for n in range(1, len(rows) + 1)} - {None}
        format = found.pop() if found else "text"
    found = _sentences(lines, str(source), format, "text", None, False)
    rows = [row for row in found if row.words not in ([], [_DOCUMENT])]
    if not rows:
        raise ValueError(f"{source} has no sentence; expected at least one")
    return [row.words if row.text is None else row.text for row in rows]


class Sentence(NamedTuple):
    """What a file has of a sentence.

    Attributes:
        words: of it.
        labels: theirs, where they are read.
        text: what was split at blanks into these words; None where the words came as such.
        others: further fields of a row of JSON lines, where labels are not read.
    """

    words: list[str]
    labels: list[str] | None = None
    text: str | None = None
    others: Mapping[str, object] = MappingProxyType({})


def stream_sentences(
    file: Iterable[str] | Iterable[bytes], format: str | None = None
) -> Iterator[list[str]]:
    """Yield the words of one sentence after another, in constant memory: of `stream_rows`."""
    return (sentence.words for sentence in stream_rows(file, format))


def stream_rows(
    file: Iterable[str] | Iterable[bytes], format: str | None = None
) -> Iterator[Sentence]:
    """Yield one sentence after another, without labels, in constant memory.

    Args:
        file: an open file, or lines. A binary one is read as UTF-8, and an error names the very
            line; of a text one, which decodes ahead, a line near it.
        format: `text` (a sentence a line), `conll` (the first column; a `-DOCSTART-` line is a
            sentence of that word), `conllu`, or `jsonl` (a line is a list of words, a string to be
            split at blanks, or an object with either under `words`, `tokens` or `text`). None: told
            by the file's name, `text` if that tells nothing; a file that begins like one of another
            format is refused.

    Yields:
        A sentence. In `text` and `jsonl` the n-th is that of line n: an empty line is an empty
        sentence.

    Raises:
        ValueError: an unknown format, or a line that is not as the format says.
    """
    name = str(getattr(file, "name", "<stream>"))
    return _sentences(file, name, format, "text", None, False)


def label_names(dataset: Dataset, labels: Sequence[str] | None = None) -> list[str]:
    """Return the names of the labels: `O` first where present, the others sorted.

    Args:
        dataset: as `read_sentences` returns it.
        labels: names in an order of one's own, which may be more than the data set has. None:
            those of the data set.

    Raises:
        ValueError: no labels; a label that is not in `labels`; a name twice in `labels`.
    """
    if labels is not None:
        check_labels(dataset, labels)
        return list(labels)
    seen = {label for sentence in label_lists(dataset) for label in sentence}
    return sorted(seen, key=lambda label: (label != "O", label))


def check_labels(dataset: Dataset, label_names: Sequence[str]) -> None:
    """Raise ValueError unless `label_names` has every label of the data set, each once.

    So it does where a sentence has not as many labels as words. The message names the label and
    the sentence, counted from 0.
    """
    known = set(label_names)
    if len(known) != len(label_names):
        raise ValueError(f"the label names are {shown(label_names)}; expected each once")
    for number, labels in enumerate(label_lists(dataset)):
        for label in labels:
            if label not in known:
                raise ValueError(
                    f"sentence {number} has the label {label!r}; expected one of "
                    f"{shown(label_names)}"
                )


def label_lists(dataset: Dataset) -> Iterator[list[str]]:
    """Yield the labels of one sentence after another.

    Raises:
        TypeError: no data set.
        ValueError: no labels; more or fewer than words; no word in any sentence.
    """
    if not hasattr(dataset, "column_names"):
        raise TypeError(f"got a {type(dataset).__name__}; expected a data set of `datasets`")
    if "labels" not in dataset.column_names:
        raise ValueError(f"the data set has the columns {dataset.column_names}; expected 'labels'")
    words = dataset["words"] if "words" in dataset.column_names else repeat(None)
    batches = dataset.select_columns("labels").iter(batch_size=1000)
    rows, found = chain.from_iterable(batch["labels"] for batch in batches), False
    for number, (labels, its_words) in enumerate(zip(rows, words, strict=False)):
        if its_words is not None and len(its_words) != len(labels):
            raise ValueError(
                f"sentence {number}: got {len(labels)} labels for {len(its_words)} words"
            )
        found = found or bool(labels)
        yield labels
    if len(dataset) and not found:
        raise ValueError("the data set has sentences without a word only; expected some with words")


_NumberedLines = Iterator[tuple[int, str]]
_Sentences = Iterator[Sentence]


def _sentences(
    file: Iterable[str] | Iterable[bytes],
    name: str,
    format: str | None,
    default: str,
    column: int | str | None,
    labelled: bool,
) -> _Sentences:
    """Choose the parser by format, name and content; it starts at once, so that checks do."""
    if format is not None and format not in _PARSERS:
        raise ValueError(f"format is {format!r}; expected one of {[*_PARSERS]}")
    lines = _lines(file, name)
    if format is None:
        format = _FORMAT_OF_SUFFIX.get(Path(name).suffix.lower(), default)
        if format is None:
            raise ValueError(
                f"{name} is by its name of no format that is read; expected one of {[*_PARSERS]}, "
                "or the format to be given"
            )
        lines = _of_no_other_format(lines, name, format)
    return _PARSERS[format](lines, name, column, labelled)


def _lines(file: Iterable[str] | Iterable[bytes], name: str) -> _NumberedLines:
    """Yield number and text of each line, without byte order mark and line end."""
    number = 0
    try:
        for number, line in enumerate(file, 1):
            if isinstance(line, bytes):
                for magic, what in _NOT_TEXT.items():
                    if number == 1 and line.startswith(magic):
                        raise ValueError(f"{name}:1: the file is {what}; expected UTF-8 text")
                line = line.decode()
            elif not line.isascii():
                line.encode()  # standard input may hand wrong bytes on as lone surrogates
            if number == 1:
                line = line.removeprefix("\ufeff")
            line = line.rstrip("\r\n")
            if "\r" in line or "\0" in line:
                what = "a carriage return" if "\r" in line else "a NUL character"
                raise ValueError(
                    f"{name}:{number}: got {what} within {line!r:.60}; expected UTF-8 text whose "
                    "lines end in a line feed"
                )
            yield number, line
    except UnicodeError as error:
        raise ValueError(f"{name}:{number}: {error}; expected UTF-8") from error


def _of_no_other_format(lines: _NumberedLines, name: str, format: str) -> _NumberedLines:
    """Hand lines on; refuse those that begin like another format than the name tells."""
    first = []
    for number, line in lines:
        if len(first) < 2 and line.strip(_BLANK) and not line.startswith("#"):
            first.append(line)
            found = _looks_like(first, format)
            if found not in (None, format):
                raise ValueError(
                    f"{name}:{number}: {line!r:.60} looks like {found}; expected {format}, as the "
                    "name tells, or the format to be given"
                )
        yield number, line


def _looks_like(rows: list[str], format: str) -> str | None:
    """What the first one or two rows of a file are clearly of; None if that cannot be told."""
    if rows[0].startswith(("[", "{")):
        try:
            row = json.loads(rows[0])
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) or (row and all(isinstance(word, str) for word in row)):
            return "jsonl"
    columns = [_BLANKS.split(row.strip(_BLANK)) for row in rows]
    if columns[0][0] == _DOCUMENT:
        return "conll"
    if len(rows) < 2 or format in ("jsonl", "conllu"):  # whose own readers refuse others
        return None
    tabs = [row.count("\t") for row in rows]
    if tabs[0] == tabs[1] == _CONLLU_WIDTH - 1 and columns[0][0].split("-")[0] == "1":
        return "conllu"
    if all("," in row and _CHUNK_LABEL.fullmatch(row.rpartition(",")[2]) for row in rows):
        return "csv"
    even = len(columns[0]) == len(columns[1]) > 1
    if format == "conll":
        heads = {cell.strip(_BLANK).lower() for cell in rows[0].split("\t")}
        if heads & _WORD_HEADS and heads & _LABEL_HEADS:
            return "a table whose first line names its columns"
        firsts = [row[0] for row in columns]
        numbered = even and len(columns[0]) > 2 and firsts in (["1", "2"], ["0", "1"])
        return "columns of which the first counts the words" if numbered else None
    labels = all(_CHUNK_LABEL.fullmatch(row[-1]) for row in columns)
    return "conll" if tabs[0] == tabs[1] > 0 or (even and labels) else None


def _column_rows(lines: _NumberedLines, name: str) -> Iterator[tuple[int, str, list[str] | None]]:
    """Yield number, line and columns of each row of a column file; None where a sentence ends."""

    def ends_sentence(line: str) -> bool:
        return not line.strip(_BLANK) or _BLANKS.split(line, maxsplit=1)[0] == _DOCUMENT

    # Whether a line with '#' is a comment is known only from another row: read up to that.
    head = []
    example = None
    for number, line in lines:
        head.append((number, line))
        if not ends_sentence(line):
            if not line.startswith("#"):
                example = number, line
                break
            example = example or (number, line)
    if example is None:
        example = 0, ""
    tabs = "\t" in example[1]

    def cut(line: str) -> list[str]:
        return line.split("\t") if tabs else _BLANKS.split(line.strip(_BLANK))

    width = len(cut(example[1]))
    for number, line in chain(head, lines):
        if ends_sentence(line):
            yield number, line, None
        elif len(columns := cut(line)) == width:
            yield number, line, columns
        elif not line.startswith("#"):
            raise ValueError(
                f"{name}:{number}: got {len(columns)} columns in {line!r}; expected {width}, as "
                f"in line {example[0]}"
            )


class _Row(NamedTuple):
    """A row of a column file that is or may be a word."""

    number: int
    word: str
    label: str | None
    unsure: bool  # it may be a comment


def _without_comments(rows: Iterable[_Row | None], name: str, whole: bool) -> Iterator[_Row | None]:
    """Decide by the labels which rows are comments; None where a sentence ends.

    Args:
        whole: by all labels of the file, not only by those up to the end of the sentence.
    """

    def groups() -> Iterator[list[_Row | None]]:
        group = []
        for row in rows:
            group.append(row)
            if row is None and not whole:
                yield group
                group = []
        yield group

    known = {"#", None}  # the label of '#' in the Penn Treebank; that of rows without labels
    comments = {}
    for group in groups():
        sure = {row.label: row.number for row in group if row is not None and not row.unsure}
        if len(known) < _MOST_LABELS:
            known.update(sure)
        for label in comments.keys() & sure.keys():
            raise ValueError(
                f"{name}:{sure[label]}: got the label {label!r}, which line {comments[label]} has "
                "too, but that begins with '# ' and was taken for a comment; expected tabs between "
                "the columns, or comments of another number of columns"
            )
        inside = False
        for row in group:
            if row is None or not row.unsure or row.label in known:
                yield row
                inside = row is not None
            elif not inside and len(known) < _MOST_LABELS:
                comments[row.label] = row.number
            else:
                raise ValueError(
                    f"{name}:{row.number}: got a row that begins with '# ', as comments do, but "
                    f"stands amid a sentence and has a label of its own, {row.label!r}; expected a "
                    "label of other rows, or comments between sentences only"
                )


def _read_columns(
    lines: _NumberedLines, name: str, column: int | str | None, labelled: bool
) -> _Sentences:
    index = -1 if column is None else _column_number(column, {})

    def rows() -> Iterator[_Row | None]:
        for number, line, columns in _column_rows(lines, name):
            if columns is None:
                yield None
                if line.strip(_BLANK) and not labelled:
                    yield _Row(number, _DOCUMENT, None, False)
                    yield None
                continue
            label = None
            if len(columns) > 1 or (labelled and column is not None):
                where = f"{name}:{number}"
                if labelled and index in (0, -len(columns)):
                    raise ValueError(f"{where}: column {column} has the words; expected another")
                label = _label(columns, index, where) if labelled else columns[-1]
            yield _Row(number, columns[0], label, line.startswith("# "))

    words, labels = [], []
    for row in chain(_without_comments(rows(), name, labelled), [None]):
        if row is not None:
            words.append(row.word)
            if labelled and row.label is not None:
                labels.append(row.label)
        elif words:
            yield Sentence(words, labels or None)
            words, labels = [], []


def _read_conllu(
    lines: _NumberedLines, name: str, column: int | str | None, labelled: bool
) -> _Sentences:
    index = _column_number("upos" if column is None else column, _CONLLU_LABELS)
    words, labels = [], []
    for number, line in chain(lines, [(0, "")]):
        if not line.strip(_BLANK):
            if words:
                yield Sentence(words, labels or None)
                words, labels = [], []
        elif not line.startswith("#"):
            columns = line.split("\t")
            if len(columns) != _CONLLU_WIDTH:
                raise ValueError(
                    f"{name}:{number}: got {len(columns)} columns in {line!r}; expected "
                    f"{_CONLLU_WIDTH} between tabs"
                )
            if _CONLLU_NO_WORD.fullmatch(columns[0]):
                continue
            if columns[0] != str(len(words) + 1):
                raise ValueError(
                    f"{name}:{number}: got {columns[0]!r}; expected a word's number, here "
                    f"{len(words) + 1}, or an empty line before another sentence"
                )
            words.append(columns[_CONLLU_WORD])
            if labelled:
                where = f"{name}:{number}"
                labels.append(_label(columns, index, where))
                if labels[-1] == "_" and index == _CONLLU_LABELS["upos"]:
                    raise ValueError(f"{where}: column {index} is '_'; expected a label")


def _read_json(
    lines: _NumberedLines, name: str, column: int | str | None, labelled: bool
) -> _Sentences:
    had_labels = None
    keys = WORD_KEYS if labelled else (*WORD_KEYS, "text")
    for number, line in lines:
        where = f"{name}:{number}"
        if not line.strip(_BLANK):
            if not labelled:
                yield Sentence([], text="")
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}; expected a JSON value on each line") from error
        words, labels, others = row, None, {}
        if isinstance(row, dict):
            key = _key(row, keys, where)
            words = row[key]
            if not labelled:
                others = {name: value for name, value in row.items() if name != key}
            if labelled and (column is not None or any(key in row for key in LABEL_KEYS)):
                labels = row[_key(row, LABEL_KEYS if column is None else [column], where)]
                labels = _strings(labels, "labels", where)
        text = words if isinstance(words, str) else None
        words = _strings(words if text is None else _split(text), "words", where)
        if labels is not None and len(labels) != len(words):
            raise ValueError(f"{where}: got {len(labels)} labels for {len(words)} words")
        if labelled and had_labels not in (None, labels is not None):
            got, before = ("no labels", "some") if had_labels else ("labels", "none")
            raise ValueError(f"{where}: got {got}; expected {before}, as in the lines before")
        had_labels = labels is not None
        yield Sentence(words, labels, text, others)


def _read_text(
    lines: _NumberedLines, name: str, column: int | str | None, labelled: bool
) -> _Sentences:
    if column is not None:
        raise ValueError(f"got column {column!r} for {name}, which is text; expected none")
    for _, line in lines:
        yield Sentence(_split(line), text=line)


_PARSERS: dict[str, Callable[[_NumberedLines, str, int | str | None, bool], _Sentences]] = {
    "conll": _read_columns,
    "conllu": _read_conllu,
    "jsonl": _read_json,
    "text": _read_text,
}


def _split(text: str) -> list[str]:
    """The words between blanks."""
    return [word for word in _BLANKS.split(text) if word]


def _column_number(column: int | str, named: dict[str, int]) -> int:
    if column in named:
        return named[column]
    try:
        return int(column)
    except ValueError:
        names = "".join(f", {name!r}" for name in named)
        raise ValueError(f"column is {column!r}; expected a number{names}") from None


def _label(columns: list[str], index: int, where: str) -> str:
    if not -len(columns) <= index < len(columns):
        raise ValueError(f"{where}: got {len(columns)} columns; expected a column {index} (from 0)")
    label = columns[index].strip(_BLANK)
    if not label:
        raise ValueError(f"{where}: column {index} is empty; expected a label")
    return label


def _key(keys: Iterable[str], wanted: Sequence[int | str], where: str) -> str:
    for key in wanted:
        if key in keys:
            return key
    raise ValueError(f"{where}: got {list(keys)}; expected {' or '.join(map(repr, wanted))}")


def _strings(values: object, what: str, where: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: the {what} are {values!r:.80}; expected a list of strings")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as of an emoji cut in two
        raise ValueError(f"{where}: the {what} are no valid Unicode: {error}") from error
    return values


def is_missing_path(source: str | os.PathLike) -> bool:
    """Tell a mistyped path from the name of a data set, `name` or `owner/name`."""
    path = Path(source).expanduser()
    if path.exists():
        return False
    return (
        not isinstance(source, str)
        or source.startswith((".", "~", os.sep))
        or "\\" in source
        or len(path.parts) > 2
        or re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) is not None
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def check_hub_name(name: str) -> None:
    """Raise ValueError at once if `name` is no data set, where `datasets` would try for long."""
    import datasets

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except Exception as error:
        try:
            datasets.load.CachedDatasetModuleFactory(name).get_module()
        except OSError:
            raise ValueError(
                f"no such file: {name}; nor is it known as a data set: {error}"
            ) from error


def _load(source: str | os.PathLike, path: Path, config: str | None, split: str | None) -> Dataset:
    import datasets

    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if path.is_dir() and not saved:
        # `datasets` has ideas of its own of these: it would drop labels.
        suffixes = {".txt", *(s for s, f in _FORMAT_OF_SUFFIX.items() if f in ("conll", "conllu"))}
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in suffixes:
                raise ValueError(f"{source} is a folder; expected a file, as {file}")
    try:
        if saved:
            loaded = datasets.load_from_disk(path)
        else:
            name = str(path if path.is_dir() else source)
            loaded = datasets.load_dataset(name, config, split=split)
            split = None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = "a folder" if path.is_dir() else "no file"
        raise ValueError(f"{source} is {what} and loads as no data set: {error}") from error
    return _one_split(loaded, split, str(source))


def _one_split(dataset: Dataset | DatasetDict, split: str | None, name: str) -> Dataset:
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        if split is not None:
            raise ValueError(f"got split {split!r}, but {name} has no splits; expected none")
        return dataset
    if split is None and len(dataset) == 1:
        return next(iter(dataset.values()))
    if split not in dataset:
        raise ValueError(f"split is {split!r}; expected one of {name}: {list(dataset)}")
    return dataset[split]


def _from_dataset(dataset: Dataset, column: int | str | None, labelled: bool) -> Dataset:
    """Bring a data set's columns to our names, and the numbers of classes to theirs."""
    from datasets import ClassLabel

    keys = dataset.column_names
    word_key = _key(keys, WORD_KEYS, "columns of the data set")
    label_key = None
    if labelled and (column is not None or any(key in keys for key in LABEL_KEYS)):
        label_key = _key(
            keys, LABEL_KEYS if column is None else [column], "columns of the data set"
        )
    if not len(dataset):
        raise ValueError("the data set has no sentence; expected at least one")
    classes = getattr(dataset.features.get(label_key), "feature", None)

    def normalize(rows: dict[str, list], numbers: list[int]) -> dict[str, list]:
        result = {"words": []}
        for number, words in zip(numbers, rows[word_key], strict=True):
            result["words"].append(_strings(words, "words", f"row {number}"))
        if label_key is None:
            return result
        result["labels"] = []
        for number, words, labels in zip(numbers, rows[word_key], rows[label_key], strict=True):
            if isinstance(classes, ClassLabel) and labels is not None:
                labels = [
                    classes.names[label] if label is not None and label >= 0 else None
                    for label in labels
                ]
            result["labels"].append(_strings(labels, "labels", f"row {number}"))
            if len(labels) != len(words):
                raise ValueError(f"row {number}: got {len(labels)} labels for {len(words)} words")
        return result

    # In memory: a cache file would be written into the folder that the data set came from.
    return dataset.with_format(None).map(
        normalize,
        batched=True,
        with_indices=True,
        remove_columns=keys,
        features=_features(["words"] if label_key is None else ["words", "labels"]),
        keep_in_memory=True,
        desc="reading sentences",
    )


def _features(columns: Iterable[str]) -> datasets.Features:
    from datasets import Features, Sequence, Value

    return Features({name: Sequence(Value("string")) for name in columns})
