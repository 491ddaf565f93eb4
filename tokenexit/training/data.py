"""Annotated text: one row a sentence, its words and, where known, their labels."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Value

WORD_KEYS = ("words", "tokens")
LABEL_KEYS = ("labels", "tags", "ner_tags", "pos_tags")

_CONLLU_WORD, _CONLLU_WIDTH = 1, 10
_CONLLU_LABELS = {"upos": 3, "xpos": 4, "deprel": 7}
_CONLLU_NO_WORD = re.compile(r"\d+-\d+|\d+\.\d+")  # multiword tokens and empty nodes
_FORMAT_OF_SUFFIX = {".conllu": "conllu", ".json": "jsonl", ".jsonl": "jsonl"}
_FILE_SUFFIXES = (
    *_FORMAT_OF_SUFFIX,
    ".conll",
    ".txt",
    ".tsv",
    ".bio",
    ".bioes",
    ".iob",
    ".iob2",
    ".bmes",
    ".train",
    ".dev",
    ".valid",
    ".test",
)
# Not str.split and str.strip: a no-break or an ideographic space can be a word.
_BLANK = " \t"
_BLANKS = re.compile("[ \t]+")


def read_sentences(
    source: str | os.PathLike | Dataset | DatasetDict,
    *,
    column: int | str | None = None,
    split: str | None = None,
    config: str | None = None,
    format: str | None = None,
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
    are skipped. A line that starts with `#` is a comment only if it has not as many columns as
    the first other row: `#` is a word of tweets.

    Args:
        source: a file, a folder, a data set's name, or a data set in memory.
        column: where the labels are, see the table. None: the default; of the keys or columns
            `labels`, `tags`, `ner_tags`, `pos_tags` the first that is there.
        split: which split of a data set. None: its only one.
        config: the configuration for `datasets.load_dataset`.
        format: one of the table. None: told by the file's name, `conll` if that tells nothing.

    Returns:
        A data set with the columns `words`, lists of str, and, where the source has labels,
        `labels`, lists of as many str.

    Raises:
        ValueError: a source that is missing or empty, or not as its format says (the message
            names file and line); an option that does not fit the source.
        TypeError: a source that is neither a path, a name nor a data set.
    """
    if isinstance(source, (Dataset, DatasetDict)):
        if config is not None or format is not None:
            raise ValueError(
                f"got config {config!r} and format {format!r} with a data set in memory; expected "
                "neither"
            )
        return _from_dataset(_one_split(source, split, "the data set"), column)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"got a {type(source).__name__}; expected a path, a name or a Dataset")
    if format is not None and format not in (*_PARSERS, "dataset"):
        raise ValueError(f"format is {format!r}; expected one of {[*_PARSERS, 'dataset']}")

    path = Path(source).expanduser()
    is_file = path.exists() and not path.is_dir()
    if not is_file or format == "dataset":
        if format in _PARSERS or (not path.exists() and _looks_like_a_path(source)):
            raise ValueError(f"no such file: {source}")
        return _from_dataset(_load(source, path, config, split), column)
    if split is not None or config is not None:
        raise ValueError(
            f"got split {split!r} and config {config!r} with the file {source}; expected neither"
        )
    format = format or _FORMAT_OF_SUFFIX.get(path.suffix.lower(), "conll")
    with path.open("rb") as file:
        sentences = list(_PARSERS[format](_lines(file, str(source)), str(source), column, True))
    if not sentences:
        raise ValueError(f"{source} has no sentence; expected at least one")
    words, labels = zip(*sentences, strict=True)
    rows = {"words": words} if labels[0] is None else {"words": words, "labels": labels}
    return Dataset.from_dict(rows, features=_features(rows))


def stream_sentences(file: Iterable[str] | Iterable[bytes], format: str) -> Iterator[list[str]]:
    """Yield the words of one sentence after another, in constant memory.

    Args:
        file: an open file, or lines. A binary one is read as UTF-8, and an error names the very
            line; of a text one, which decodes ahead, a line near it.
        format: `text` (a sentence a line; an empty line is an empty sentence), `conll` (the
            first column), `conllu`, or `jsonl` (a line is a list of words, a string to be split
            at blanks, or an object with either under `words` or `tokens`).

    Yields:
        The words of a sentence.

    Raises:
        ValueError: an unknown format, or a line that is not as the format says.
    """
    if format not in _PARSERS:
        raise ValueError(f"format is {format!r}; expected one of {[*_PARSERS]}")
    name = str(getattr(file, "name", "<stream>"))
    return (words for words, _ in _PARSERS[format](_lines(file, name), name, None, False))


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
    seen = {label for sentence in _label_lists(dataset) for label in sentence}
    return sorted(seen, key=lambda label: (label != "O", label))


def check_labels(dataset: Dataset, label_names: Sequence[str]) -> None:
    """Raise ValueError unless `label_names` has every label of the data set, each once.

    The message names the label and the sentence, counted from 0.
    """
    known = set(label_names)
    if len(known) != len(label_names):
        raise ValueError(f"the label names are {list(label_names)}; expected each once")
    for number, labels in enumerate(_label_lists(dataset)):
        for label in labels:
            if label not in known:
                raise ValueError(
                    f"sentence {number} has the label {label!r}; expected one of "
                    f"{list(label_names)}"
                )


def _label_lists(dataset: Dataset) -> Iterator[list[str]]:
    if "labels" not in dataset.column_names:
        raise ValueError(f"the data set has the columns {dataset.column_names}; expected 'labels'")
    for batch in dataset.select_columns("labels").iter(batch_size=1000):
        yield from batch["labels"]


_NumberedLines = Iterator[tuple[int, str]]
_Sentences = Iterator[tuple[list[str], list[str] | None]]  # words and labels


def _lines(file: Iterable[str] | Iterable[bytes], name: str) -> _NumberedLines:
    """Yield number and text of each line, without byte order mark and line end."""
    number = 0
    try:
        for number, line in enumerate(file, 1):
            if isinstance(line, bytes):
                line = line.decode()
            elif not line.isascii():
                line.encode()  # standard input may hand wrong bytes on as lone surrogates
            if number == 1:
                line = line.removeprefix("\ufeff")
            yield number, line.rstrip("\r\n")
    except UnicodeError as error:
        raise ValueError(f"{name}:{number}: {error}; expected UTF-8") from error


def _column_rows(lines: _NumberedLines, name: str) -> Iterator[tuple[int, list[str] | None]]:
    """Yield number and columns of each row of a column file; None where a sentence ends."""

    def ends_sentence(line: str) -> bool:
        return not line.strip(_BLANK) or line.startswith("-DOCSTART-")

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
        return
    tabs = "\t" in example[1]

    def cut(line: str) -> list[str]:
        return line.split("\t") if tabs else _BLANKS.split(line.strip(_BLANK))

    width = len(cut(example[1]))
    for number, line in chain(head, lines):
        if ends_sentence(line):
            yield number, None
        elif len(columns := cut(line)) == width:
            yield number, columns
        elif not line.startswith("#"):
            raise ValueError(
                f"{name}:{number}: got {len(columns)} columns in {line!r}; expected {width}, as "
                f"in line {example[0]}"
            )


def _read_columns(
    lines: _NumberedLines, name: str, column: int | str | None, labelled: bool
) -> _Sentences:
    index = -1 if column is None else _column_number(column, {})
    words, labels = [], []
    for number, columns in chain(_column_rows(lines, name), [(0, None)]):
        if columns is not None:
            where = f"{name}:{number}"
            words.append(columns[0])
            if labelled and (column is not None or len(columns) > 1):
                if index in (0, -len(columns)):
                    raise ValueError(f"{where}: column {column} has the words; expected another")
                labels.append(_label(columns, index, where))
        elif words:
            yield words, labels or None
            words, labels = [], []


def _read_conllu(
    lines: _NumberedLines, name: str, column: int | str | None, labelled: bool
) -> _Sentences:
    index = _column_number("upos" if column is None else column, _CONLLU_LABELS)
    words, labels = [], []
    for number, line in chain(lines, [(0, "")]):
        if not line.strip(_BLANK):
            if words:
                yield words, labels or None
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
            if not columns[0].isdecimal():
                raise ValueError(f"{name}:{number}: got {columns[0]!r}; expected a word's number")
            words.append(columns[_CONLLU_WORD])
            if labelled:
                labels.append(_label(columns, index, f"{name}:{number}"))


def _read_json(
    lines: _NumberedLines, name: str, column: int | str | None, labelled: bool
) -> _Sentences:
    had_labels = None
    for number, line in lines:
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: {error}; expected a JSON value on each line") from error
        words, labels = row, None
        if isinstance(row, dict):
            words = row[_key(row, WORD_KEYS, where)]
            if labelled and (column is not None or any(key in row for key in LABEL_KEYS)):
                labels = row[_key(row, LABEL_KEYS if column is None else [column], where)]
                labels = _strings(labels, "labels", where)
        words = words.split() if isinstance(words, str) else _strings(words, "words", where)
        if labels is not None and len(labels) != len(words):
            raise ValueError(f"{where}: got {len(labels)} labels for {len(words)} words")
        if labelled and had_labels not in (None, labels is not None):
            got, before = ("no labels", "some") if had_labels else ("labels", "none")
            raise ValueError(f"{where}: got {got}; expected {before}, as in the lines before")
        had_labels = labels is not None
        yield words, labels


def _read_text(
    lines: _NumberedLines, name: str, column: int | str | None, labelled: bool
) -> _Sentences:
    if column is not None:
        raise ValueError(f"got column {column!r} for {name}, which is text; expected none")
    for _, line in lines:
        yield line.split(), None


_PARSERS: dict[str, Callable[[_NumberedLines, str, int | str | None, bool], _Sentences]] = {
    "conll": _read_columns,
    "conllu": _read_conllu,
    "jsonl": _read_json,
    "text": _read_text,
}


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


def _looks_like_a_path(source: str | os.PathLike) -> bool:
    """Tell a mistyped path from the name of a data set, `name` or `owner/name`."""
    path = Path(source)
    return (
        not isinstance(source, str)
        or source.startswith((".", "~", os.sep))
        or "\\" in source
        or len(path.parts) > 2
        or path.suffix.lower() in _FILE_SUFFIXES
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def _load(source: str | os.PathLike, path: Path, config: str | None, split: str | None) -> Dataset:
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            loaded = datasets.load_from_disk(path)
        else:
            name = str(path if path.is_dir() else source)
            loaded = datasets.load_dataset(name, config, split=split)
            split = None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{source} is no file and loads as no data set: {error}") from error
    return _one_split(loaded, split, str(source))


def _one_split(dataset: Dataset | DatasetDict, split: str | None, name: str) -> Dataset:
    if isinstance(dataset, Dataset):
        if split is not None:
            raise ValueError(f"got split {split!r}, but {name} has no splits; expected none")
        return dataset
    if split is None and len(dataset) == 1:
        return next(iter(dataset.values()))
    if split not in dataset:
        raise ValueError(f"split is {split!r}; expected one of {name}: {list(dataset)}")
    return dataset[split]


def _from_dataset(dataset: Dataset, column: int | str | None) -> Dataset:
    """Bring a data set's columns to our names, and the numbers of classes to theirs."""
    keys = dataset.column_names
    word_key = _key(keys, WORD_KEYS, "columns of the data set")
    label_key = None
    if column is not None or any(key in keys for key in LABEL_KEYS):
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
    return datasets.Features({name: datasets.Sequence(Value("string")) for name in columns})
