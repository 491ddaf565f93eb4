import gzip
import io
import json
import os
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

from tokenexit.cli import options
from tokenexit.text import data
from tokenexit.text.data import (
    Sentence,
    check_labels,
    label_names,
    read_sentences,
    read_texts,
    stream_rows,
    stream_sentences,
)


@pytest.fixture
def write(tmp_path):
    def write(text, name="data.conll"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def no_hub(monkeypatch):
    def load_dataset(*args, **kwargs):
        pytest.fail(f"asked the hub for {args}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def rows(dataset):
    """[(words, labels), ...]"""
    assert set(dataset.column_names) <= {"words", "labels"}
    return [(row["words"], row.get("labels")) for row in dataset]


TWO = [(["Ann", "ran"], ["B-PER", "O"]), (["ok"], ["O"])]


@pytest.mark.parametrize(
    "text",
    [
        "Ann B-PER\nran O\n\nok O\n",
        "Ann\tB-PER\nran\tO\n\nok\tO",
        "Ann  NNP B-PER\nran\tVBD \tO\n\nok UH O\n",
        "Ann\tNNP\tB-PER\nran\tVBD\tO\n\t\t\nok\tUH\tO\n",
        "Ann B-PER\r\nran O\r\n\r\nok O\r\n",
        "\ufeffAnn B-PER\nran O\n\nok O\n",
        "Ann B-PER \nran O\n   \n \t \n\n\nok O\n\n\n",
        "-DOCSTART- -X- O O\n\nAnn B-PER\nran O\n-DOCSTART- O\nok O\n",
        "\n\n-DOCSTART-\n\nAnn B-PER\nran O\n\nok O\n",
        "# id = 1\nAnn B-PER\nran O\n\n# a comment\nok O\n# the end of it\n",
    ],
    ids=[
        "blanks",
        "tabs-no-newline-at-end",
        "three-columns",
        "blank-line-of-tabs",
        "windows",
        "bom",
        "blank-lines-of-blanks",
        "docstart",
        "docstart-alone",
        "comments",
    ],
)
def test_column_files(write, text):
    path = write(text)
    assert rows(read_sentences(path)) == TWO
    assert rows(read_sentences(str(path))) == TWO
    words = [words for words, _ in TWO]
    for file in (path.open("rb"), path.open(encoding="utf-8"), path.open("r", newline="")):
        streamed = stream_sentences(file, "conll")
        assert [sentence for sentence in streamed if sentence != ["-DOCSTART-"]] == words


def test_a_stream_keeps_marks_of_documents():
    lines = ["-DOCSTART- -X- O\n", "\n", "a N O\n", "-DOCSTART- O\n", "b N O\n"]
    mark = ["-DOCSTART-"]
    assert list(stream_sentences(lines, "conll")) == [mark, ["a"], mark, ["b"]]
    assert list(stream_sentences(["-DOCSTART-ed O\n"], "conll")) == [["-DOCSTART-ed"]]


@pytest.mark.parametrize("name", ["x.txt", "x.tsv", "x.bio", "x.train", "x.dev", "x", "x.unknown"])
def test_column_files_of_any_name(write, name):
    assert rows(read_sentences(write("ok O\n", name))) == [(["ok"], ["O"])]


@pytest.mark.parametrize(
    ("column", "labels"),
    [(None, ["C", "F"]), (1, ["A", "D"]), ("2", ["B", "E"]), (3, ["C", "F"]), (-2, ["B", "E"])],
)
def test_column_of_the_labels(write, column, labels):
    dataset = read_sentences(write("x A B C\ny D E F\n"), column=column)
    assert rows(dataset) == [(["x", "y"], labels)]


def test_hash_is_a_word_unless_its_line_has_other_columns(write):
    text = "# three columns here\n#fb\t#\n#\tO\nhi\tO\n#1 a comment\n#ff\tO\n"
    assert rows(read_sentences(write(text))) == [(["#fb", "#", "hi", "#ff"], ["#", "O", "O", "O"])]
    assert rows(read_sentences(write("#fb\t#\n\n#a\tO\n"))) == [(["#fb"], ["#"]), (["#a"], ["O"])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# id 0a1\tdomain=xx\nhe _ _ O\nAda _ _ B\n\n# id 0a2\tdomain=xx\nParis _ _ B\n",
         [["he", "Ada"], ["Paris"]]),
        ("# id 0a1\tdomain=xx\nhe\tO\n", [["he"]]),
        ("# first\n# document\na O\n\n# second\nb O\n", [["a"], ["b"]]),
        ("# sent_id = 1\na x y O\n\n# sent_id = 2\nb x y O\n", [["a"], ["b"]]),
        ("# only\n# comments\n", []),
        ("# O\n1 O\n\na O\n# O\n", [["#", "1"], ["a", "#"]]),
        ("#\tX\n1\tO\n", [["#", "1"]]),
        ("#\tO\n# 1\tO\n", [["#", "# 1"]]),
        ("pay VB\n# #\n5 CD\n\n# #\n6 CD\n", [["pay", "#", "5"], ["#", "6"]]),
        ("#fb #\n#me O\n", [["#fb", "#me"]]),
        ("a O\n\n#\nb O\n# O O\n", [["a"], ["b"]]),
    ],
    ids=["tab-in-blanks", "tabs", "two-columns", "more-columns", "nothing-else", "word",
         "word-by-tabs", "blank-within-tabs", "pound-sign", "hashtags", "other-width"],
)  # fmt: skip
def test_comments_are_told_from_words_by_their_labels(write, text, expected):
    assert list(stream_sentences(io.StringIO(text), "conll")) == expected
    if expected:
        assert read_sentences(write(text))["words"][:] == expected


def test_a_label_known_only_later_makes_a_word(write):
    text = "# B-X\n1 I-X\n\na B-X\n"
    assert rows(read_sentences(write(text)))[0] == (["#", "1"], ["B-X", "I-X"])
    with pytest.raises(ValueError, match=r"<stream>:4: got the label 'B-X', which line 1 has too"):
        list(stream_sentences(text.splitlines(), "conll"))  # which could not wait for it


@pytest.mark.parametrize("text", ["a O\n# comment\nb O\n", "a\tO\n# my\tcomment\n"])
def test_a_comment_amid_a_sentence_is_refused_where_it_may_be_a_word(write, text):
    for read in (
        lambda: read_sentences(write(text)),
        lambda: list(stream_sentences(text.splitlines(), "conll")),
    ):
        with pytest.raises(ValueError, match=":2: got a row that begins with '# '.*'comment'"):
            read()


def test_a_stream_remembers_no_more_than_labels(monkeypatch):
    monkeypatch.setattr(data, "_MOST_LABELS", 10)
    lines = [line for i in range(20) for line in (f"word {i}", "")]
    assert len(list(stream_sentences(lines, "conll"))) == 20
    with pytest.raises(ValueError, match="<stream>:41: got a row that begins with '# '"):
        list(stream_sentences([*lines, "# x"], "conll"))


def test_words_without_labels(write):
    path = write("# a comment\nAnn\n#fb\n\nok\n")
    assert rows(read_sentences(path)) == [(["Ann", "#fb"], None), (["ok"], None)]
    with pytest.raises(ValueError, match=r"data.conll:2: got 1 columns; expected a column 1"):
        read_sentences(path, column=1)


def test_no_word_is_lost(write):
    # Between tabs: an empty word, one with a blank; anywhere: spaces that are not ASCII's.
    path = write("\tO\nNew York\tB\n \tO\n")
    assert rows(read_sentences(path)) == [(["", "New York", " "], ["O", "B", "O"])]
    spaces = ["\u3000", "\xa0", "\u200b", "\u2028", "\x85", "\x1c"]
    path = write("".join(f"{space} O\n" for space in spaces))
    assert rows(read_sentences(path)) == [(spaces, ["O"] * len(spaces))]
    assert list(stream_sentences(path.open(encoding="utf-8"), "conll")) == [spaces]


CONLLU = """\
# sent_id = 1
# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tvamos\tir\tVERB\tv1\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\tp1\t_\t1\tobj\t_\t_
2.1\thidden\t_\tX\tx\t_\t_\t_\t_\t_
3\t#\t#\tSYM\ts1\t_\t1\tpunct\t_\t_

# text = 10 000 .
1\t10 000\t_\tNUM\tn1\t_\t0\troot\t_\t_
"""


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a O\nb\n", {}, r"data.conll:2: got 1 columns in 'b'; expected 2, as in line 1"),
        ("\n# c\na O\n\nb X O\n", {}, r"data.conll:5: got 3 columns .* as in line 3"),
        ("a\tO\nb O\n", {}, r"data.conll:2: got 1 columns"),
        ("\na O\n", {"column": 2}, r"data.conll:2: got 2 columns; expected a column 2"),
        ("a O\n", {"column": -3}, r"data.conll:1: got 2 columns"),
        ("a O\n", {"column": 0}, r"data.conll:1: column 0 has the words"),
        ("a O\n", {"column": -2}, r"data.conll:1: column -2 has the words"),
        ("a O\n", {"column": "ner"}, r"column is 'ner'; expected a number"),
        ("a\tO\nb\t\n", {}, r"data.conll:2: column -1 is empty; expected a label"),
        ("a O\n", {"split": "train"}, r"split 'train'.*data.conll; expected neither"),
        ("a O\n", {"config": "en"}, r"config 'en'"),
        ("a O\n", {"format": "conl"}, r"format is 'conl'; expected one of \['conll'"),
        ("a b\n", {"format": "text", "column": 1}, r"column 1 .* which is text"),
        ("", {}, r"data.conll has no sentence"),
        ("\n \n-DOCSTART- O\n", {}, r"data.conll has no sentence"),
        (b"a O\n\xff\xfe O\n", {}, r"data.conll:2: .*expected UTF-8"),
        ("a O\n".encode("utf-16"), {}, r"data.conll:1: .*UTF-16; expected UTF-8"),
        ("a O\n".encode("utf-16-le"), {}, r"data.conll:1: .*NUL character .*expected UTF-8"),
        (gzip.compress(b"a O\n", mtime=0), {}, r"data.conll:1: the file is compressed by gzip"),
        ("a O\n\nb O\rc O\n", {}, r"data.conll:3: got a carriage return within"),
        ("a\tO\rb\tO\r", {}, r"data.conll:1: got a carriage return within"),
        ('{"words": ["a", "b"]}\n', {}, r"data.conll:1: .* looks like jsonl; expected conll"),
        ('["a",  "b"]\n', {}, r"data.conll:1: .* looks like jsonl; expected conll"),
        ("\n".join(CONLLU.splitlines()[3:5]), {}, r"data.conll:2: .* looks like conllu"),
        ("a,B-X\nb,O\n", {}, r"data.conll:2: .* looks like csv"),
        ("1 a O\n2 b O\n", {}, r"data.conll:2: .* of which the first counts the words"),
        ("0 a O\n1 b O\n", {}, r"data.conll:2: .* of which the first counts the words"),
        ("\tword\tlabel\n0\ta\tO\n", {}, r"data.conll:2: .* whose first line names its columns"),
        ("Token\tNER\na\tO\n", {}, r"data.conll:2: .* whose first line names its columns"),
    ],
)
def test_wrong_column_files(write, text, options, message):
    with pytest.raises(ValueError, match=message):
        read_sentences(write(text), **options)


def test_a_format_given_is_believed(write):
    assert rows(read_sentences(write('["a", "b"]\n'), format="conll")) == [(['["a",'], ['"b"]'])]
    assert rows(read_sentences(write("1 O\n2 O\n"), format="conll")) == [(["1", "2"], ["O", "O"])]
    assert rows(read_sentences(write("a O\n", "x.csv"), format="conll")) == [(["a"], ["O"])]
    head = write("word\tlabel\na\tO\n")
    assert rows(read_sentences(head, format="conll")) == [(["word", "a"], ["label", "O"])]
    with pytest.raises(ValueError, match="x.csv is by its name of no format that is read"):
        read_sentences(write("a,O\n", "x.csv"))


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (None, [["VERB", "PRON", "SYM"], ["NUM"]]),
        ("upos", [["VERB", "PRON", "SYM"], ["NUM"]]),
        ("xpos", [["v1", "p1", "s1"], ["n1"]]),
        ("deprel", [["root", "obj", "punct"], ["root"]]),
        (4, [["v1", "p1", "s1"], ["n1"]]),
    ],
)
def test_conllu(write, column, labels):
    words = [["vamos", "nos", "#"], ["10 000"]]
    for text in (CONLLU, CONLLU.rstrip("\n"), CONLLU.replace("\n", "\r\n")):
        path = write(text, "x.conllu")
        assert rows(read_sentences(path, column=column)) == list(zip(words, labels, strict=True))
        assert list(stream_sentences(path.open("rb"), "conllu")) == words


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("# c\n1\tdog\tNOUN\n", {}, r"x.conllu:2: got 3 columns .* expected 10"),
        (CONLLU.replace("3\t#", "x\t#"), {}, r"x.conllu:7: got 'x'; expected a word's number"),
        (CONLLU, {"column": 10}, r"x.conllu:4: got 10 columns; expected a column 10"),
        (CONLLU, {"column": "pos"}, r"column is 'pos'; expected a number, 'upos'"),
        (CONLLU.replace("\tSYM", "\t"), {}, r"x.conllu:7: column 3 is empty"),
        (CONLLU.replace("\tSYM", "\t_"), {}, r"x.conllu:7: column 3 is '_'; expected a label"),
        ("# only a comment\n", {}, r"no sentence"),
        (CONLLU.replace("\n\n", "\n"), {}, r"x.conllu:9: got '1'; .* here 4, or an empty line"),
        (CONLLU.replace("\n2\t", "\n3\t"), {}, r"x.conllu:5: got '3'; .* here 2"),
    ],
)
def test_wrong_conllu(write, text, options, message):
    with pytest.raises(ValueError, match=message):
        read_sentences(write(text, "x.conllu"), **options)


@pytest.mark.parametrize("words", ["words", "tokens"])
@pytest.mark.parametrize("labels", ["labels", "tags", "ner_tags", "pos_tags"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "X.JSONL"])
def test_json_lines(write, words, labels, name):
    lines = [{words: w, labels: t, "id": 1} for w, t in [*TWO, ([], []), ([""], ["O"])]]
    text = "\ufeff" + "\r\n\n".join(map(json.dumps, lines))
    assert rows(read_sentences(write(text, name))) == [*TWO, ([], []), ([""], ["O"])]


def test_json_key_of_the_labels(write):
    row = {"tokens": ["a"], "pos_tags": ["N"], "ner_tags": ["O"], "mine": ["X"]}
    path = write(json.dumps(row), "x.jsonl")
    assert rows(read_sentences(path)) == [(["a"], ["O"])]
    assert rows(read_sentences(path, column="pos_tags")) == [(["a"], ["N"])]
    assert rows(read_sentences(path, column="mine")) == [(["a"], ["X"])]
    with pytest.raises(ValueError, match=r"x.jsonl:1: got \['tokens', .* expected 'chunk_tags'"):
        read_sentences(path, column="chunk_tags")


def test_json_without_labels(write):
    path = write('{"words": ["a b", "c"]}\n["d"]\n"e  f"\n{"words": "g h"}\n', "x.jsonl")
    words = [["a b", "c"], ["d"], ["e", "f"], ["g", "h"]]
    assert rows(read_sentences(path)) == [(sentence, None) for sentence in words]
    assert list(stream_sentences(path.open("rb"), "jsonl")) == words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"words": ["a"], "labels": ["O", "O"]}', "got 2 labels for 1 words"),
        ('{"words": ["a"]}', "got no labels; expected some, as in the lines before"),
        ('{"text": "a", "labels": ["O"]}', r"got \['text', 'labels'\]; expected 'words' or 'to"),
        ('{"words": ["a"], "labels": [0]}', r"the labels are \[0\]; expected a list of strings"),
        ('{"words": ["a"], "labels": null}', "the labels are None"),
        ('{"words": ["a", null], "labels": ["O", "O"]}', r"the words are \['a', None\]"),
        ('{"words": ["\\ud83d"], "labels": ["O"]}', "the words are no valid Unicode"),
        ('{"words": ["a"', "expected a JSON value on each line"),
        ("[" * 100_000, "recursion.*expected a JSON value on each line"),
        ("\xa0", "expected a JSON value on each line"),
        ("17", "the words are 17; expected a list of strings"),
    ],
)
def test_wrong_json_lines(write, line, message):
    path = write('{"words": ["a"], "labels": ["O"]}\n\n' + line + "\n", "x.jsonl")
    with pytest.raises(ValueError, match=f"x.jsonl:3: .*{message}"):
        read_sentences(path)


def test_labels_only_in_later_json_lines(write):
    path = write('{"words": ["a"]}\n{"words": ["a"], "tags": ["O"]}\n', "x.jsonl")
    with pytest.raises(ValueError, match=r"x.jsonl:2: got labels; expected none"):
        read_sentences(path)


def test_text(write):
    path = write("Ann  ran\t. \r\n\n ok\n", "x.txt")
    words = [["Ann", "ran", "."], [], ["ok"]]
    assert rows(read_sentences(path, format="text")) == [(sentence, None) for sentence in words]
    assert list(stream_sentences(path.open("rb"), "text")) == words
    assert list(stream_sentences(["Ann  ran .\n", "", "ok"], "text")) == words


def test_one_idea_of_a_blank(write):
    words = ["10\xa0000", "\u3000", "a\u2028b\x85c\x1cd", "e\x0bf"]
    line = " ".join(words)
    for text, format in (
        (line, "text"),
        (json.dumps(line), "jsonl"),
        (json.dumps({"words": line.replace(" ", "\r\n\t")}), "jsonl"),
        ("\n".join(f"{word} O" for word in words), "conll"),
    ):
        assert read_sentences(write(text), format=format)["words"][:] == [words]
        assert list(stream_sentences(io.BytesIO(text.encode()), format)) == [words]


@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_a_sentence_for_each_line(format):
    line = {"text": "a b", "jsonl": '["a", "b"]'}[format]
    lines = ["", line, " \t", line, "", ""]
    expected = [[], ["a", "b"], [], ["a", "b"], [], []]
    assert list(stream_sentences([f"{line}\r\n" for line in lines], format)) == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.txt", "a b\n", [["a", "b"]]),
        ("x.jsonl", '["a"]\n', [["a"]]),
        ("x.ndjson", '["a"]\n', [["a"]]),
        ("x.conll", "a O\nb O\n", [["a", "b"]]),
        ("x.IOB2", "a O\nb O\n", [["a", "b"]]),
        ("x.conllu", CONLLU, [["vamos", "nos", "#"], ["10 000"]]),
        ("x.txt", "Ada O\nran fast O\n", [["Ada", "O"], ["ran", "fast", "O"]]),
        ("x.txt", "[1] a\n[2]\n[]\n", [["[1]", "a"], ["[2]"], ["[]"]]),
        ("x.txt", "# 1\nAda\tran\nBob ran\n", [["#", "1"], ["Ada", "ran"], ["Bob", "ran"]]),
        ("x.txt", "1 Ada\n2 Bob\n", [["1", "Ada"], ["2", "Bob"]]),
    ],
)
def test_a_stream_tells_its_format_by_name_and_content(write, name, text, words):
    assert list(stream_sentences(write(text, name).open("rb"))) == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"words": ["a"]}\n', ":1: .*looks like jsonl"),
        ('\n["a"]\n', ":2: .*looks like jsonl"),
        ("ada B-X\nsat O\n", ":2: .*looks like conll"),
        ("a O\nb O\n", ":2: .*looks like conll"),
        ("-DOCSTART- -X- O\n", ":1: .*looks like conll"),
        ("# c\nada\tN\n\nsat\tV\n", ":4: .*looks like conll"),
        (CONLLU, ":4: .*looks like conllu"),
        ("a,B-X\nb,O\n", ":2: .*looks like csv"),
    ],
)
def test_a_stream_refuses_what_is_clearly_no_text(write, text, message):
    with (
        write(text, "x.txt").open("rb") as file,
        pytest.raises(ValueError, match=f"x.txt{message}"),
    ):
        list(stream_sentences(file))
    with pytest.raises(ValueError, match=f"<stream>{message}; expected text"):
        list(stream_sentences(text.splitlines()))
    assert list(stream_sentences(text.splitlines(), "text"))


def test_stream_of_nothing_and_of_anything_else():
    for format in ("text", "conll", "conllu", "jsonl"):
        assert list(stream_sentences(io.StringIO(""), format)) == []
    with pytest.raises(ValueError, match="format is 'csv'; expected one of"):
        stream_sentences(io.StringIO(""), "csv")


def test_stream_ignores_labels():
    lines = ['{"tokens": ["a"], "tags": [1, 2]}', '{"tokens": ["b"]}']
    assert list(stream_sentences(lines, "jsonl")) == [["a"], ["b"]]
    assert list(stream_sentences(["a\t\n", "b\t\n"], "conll")) == [["a", "b"]]


def test_stream_names_the_line():
    with pytest.raises(ValueError, match="<stream>:2: got 2 columns"):
        list(stream_sentences(["a\n", "b c\n"], "conll"))
    for lines in ([b"a\n", b"\xff\n"], ["a\n", "\udcff\n"]):
        with pytest.raises(ValueError, match="<stream>:2: .*expected UTF-8"):
            list(stream_sentences(lines, "text"))
    with pytest.raises(ValueError, match="expected UTF-8"):
        list(stream_sentences(io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"), "text"))


@pytest.mark.parametrize(
    ("format", "line"), [("text", "a b"), ("conll", "a b\n"), ("jsonl", '["a"]')]
)
def test_stream_reads_no_further_than_it_must(format, line):
    read = 0

    def lines():
        nonlocal read
        while True:
            read += 1
            yield line if read % 3 else "\n"

    sentences = stream_sentences(lines(), format)
    for _ in range(10):
        next(sentences)
    assert read <= 31


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "name",
    [
        "missing.conll",
        "missing.json",
        "./missing",
        "a/b/c",
        "~/none",
        "dev.connl",
        "dev.gz",
        "a/x.v",
    ],
)
def test_missing_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"no such file: {name}"):
        read_sentences(name)
    with pytest.raises(ValueError, match="no such file"):
        read_sentences(Path(name))
    with pytest.raises(ValueError, match="no such file"):
        read_sentences("missing", format="conll")
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="no such file"):
        read_sentences("here/missing")


def test_wrong_source():
    with pytest.raises(TypeError, match="got a int; expected a path"):
        read_sentences(3)


def classes(names, values):
    """A data set as on the hub, with numbers for labels."""
    features = {
        "id": Value("int64"),
        "tokens": Sequence(Value("string")),
        "ner_tags": Sequence(ClassLabel(names=names)),
    }
    rows = [{"id": i, "tokens": ["w"] * len(v), "ner_tags": v} for i, v in enumerate(values)]
    return Dataset.from_list(rows, features=Features(features))


def test_dataset_in_memory():
    dataset = Dataset.from_dict({"tokens": [["a"], []], "tags": [["O"], []], "mine": [["X"], []]})
    assert rows(read_sentences(dataset)) == [(["a"], ["O"]), ([], [])]
    assert rows(read_sentences(dataset, column="mine")) == [(["a"], ["X"]), ([], [])]
    again = read_sentences(read_sentences(dataset))
    assert rows(again) == [(["a"], ["O"]), ([], [])]
    assert rows(read_sentences(dataset.select_columns("tokens"))) == [(["a"], None), ([], None)]
    assert rows(read_sentences(dataset.with_format("numpy"))) == [(["a"], ["O"]), ([], [])]


def test_labels_that_nobody_asks_for_may_be_anything(tmp_path):
    hidden = classes(["O", "B-PER"], [[-1, -1], [], [-1]])
    numbers = Dataset.from_dict({"tokens": [["a", "b"]], "labels": [[1, 0]]})
    for dataset in (hidden, numbers):
        with pytest.raises(ValueError, match="row 0: the labels are"):
            read_sentences(dataset)
        read = read_sentences(dataset, labelled=False)
        assert read.column_names == ["words"] and list(read["words"]) == list(dataset["tokens"])
    numbers.save_to_disk(tmp_path / "saved")
    assert list(options.read_texts(str(tmp_path / "saved"), None)) == [["a", "b"]]


def test_dataset_of_class_numbers():
    dataset = classes(["O", "B-PER"], [[0, 1], [], [1]])
    assert rows(read_sentences(dataset)) == [
        (["w", "w"], ["O", "B-PER"]),
        ([], []),
        (["w"], ["B-PER"]),
    ]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["a"]}, {}, r"got \['text'\]; expected 'words' or 'tokens'"),
        ({"words": [["a"]]}, {"column": "tags"}, r"expected 'tags'"),
        ({"words": [["a"]]}, {"column": 3}, r"expected 3"),
        ({"words": [["a"]], "tags": [[4]]}, {}, r"row 0: the labels are \[4\]"),
        ({"words": [["a"], ["a"]], "tags": [["O"], []]}, {}, r"row 1: got 0 labels for 1 words"),
        ({"words": ["a"], "tags": [["O"]]}, {}, r"row 0: the words are 'a'"),
        ({"words": [["a"], None]}, {}, r"row 1: the words are None"),
        ({"words": []}, {}, r"no sentence"),
        ({"words": [["a"]]}, {"split": "train"}, r"split 'train', but the data set has no splits"),
        ({"words": [["a"]]}, {"format": "conll"}, r"format 'conll' with a data set in memory"),
    ],
)
def test_wrong_datasets(columns, options, message):
    with pytest.raises(ValueError, match=message):
        read_sentences(Dataset.from_dict(columns), **options)


def test_unknown_class_numbers():
    with pytest.raises(ValueError, match=r"row 1: the labels are \['O', None\]"):
        read_sentences(classes(["O"], [[0], [0, -1]]))


@pytest.mark.usefixtures("no_hub")
def test_saved_folder(tmp_path):
    folder = tmp_path / "saved"
    classes(["O", "B"], [[1]]).save_to_disk(folder)
    before = sorted(folder.iterdir())
    assert rows(read_sentences(folder)) == [(["w"], ["B"])]
    assert sorted(folder.iterdir()) == before
    with pytest.raises(ValueError, match="has no splits"):
        read_sentences(folder, split="train")
    with pytest.raises(ValueError, match="no such file"):
        read_sentences(folder, format="conll")


@pytest.mark.usefixtures("no_hub")
def test_splits(tmp_path):
    splits = DatasetDict(train=classes(["O"], [[0]]), test=classes(["O"], [[0, 0]]))
    folder = tmp_path / "splits"
    splits.save_to_disk(folder)
    for source in (splits, folder, str(folder)):
        assert rows(read_sentences(source, split="test")) == [(["w", "w"], ["O", "O"])]
        for split in (None, "dev"):
            with pytest.raises(ValueError, match=rf"split is {split!r}; .*\['train', 'test'\]"):
                read_sentences(source, split=split)
    assert rows(read_sentences(DatasetDict(only=splits["train"]))) == [(["w"], ["O"])]


def test_named_dataset(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        splits = DatasetDict(train=classes(["O"], [[0]]))
        return splits if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows(read_sentences("owner/name", config="en", split="train")) == [(["w"], ["O"])]
    assert rows(read_sentences("name")) == [(["w"], ["O"])]
    assert asked == [("owner/name", "en", "train"), ("name", None, None)]


def test_name_of_no_dataset(monkeypatch):
    def load_dataset(name, config, split):
        raise FileNotFoundError("not on the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="nothing is no file and loads as no data set: not on"):
        read_sentences("nothing")


def test_folders_of_files(tmp_path, no_hub):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.conll").write_text("a O\n")
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder; expected a file, as .*x.conll"):
        read_sentences(tmp_path)
    with pytest.raises(ValueError, match=f"no such file: {tmp_path}, which is a folder"):
        read_sentences(tmp_path, format="conll")


def test_unknown_hub_names_are_told_at_once(monkeypatch):
    def unreachable(self, name, timeout):
        raise ConnectionError("no network")

    monkeypatch.setattr(data.huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(ValueError, match="no such file: trian; nor .* a data set: no network"):
        data.check_hub_name("trian")
    monkeypatch.setattr(datasets.load.CachedDatasetModuleFactory, "get_module", lambda self: None)
    data.check_hub_name("cached")


def test_labels_and_words_are_counted():
    dataset = Dataset.from_dict({"words": [["a"], ["b"]], "labels": [["O"], ["O", "O"]]})
    with pytest.raises(ValueError, match="sentence 1: got 2 labels for 1 words"):
        check_labels(dataset, ["O"])


def test_label_names():
    dataset = Dataset.from_dict({"words": [["a", "b"], ["c"]], "labels": [["b", "O"], ["A"]]})
    assert label_names(dataset) == ["O", "A", "b"]
    assert label_names(dataset, ["b", "X", "A", "O"]) == ["b", "X", "A", "O"]
    check_labels(dataset, ["A", "b", "O"])
    with pytest.raises(ValueError, match=r"sentence 1 has the label 'A'; expected one of 'O', "):
        check_labels(dataset, ["O", "b"])
    with pytest.raises(ValueError, match="sentence 1 has the label 'A'"):
        label_names(dataset, ["O", "b"])
    with pytest.raises(ValueError, match="expected each once"):
        check_labels(dataset, ["O", "A", "b", "b"])
    with pytest.raises(TypeError, match="got a list; expected a data set"):
        label_names([{"words": ["a"], "labels": ["O"]}])
    with pytest.raises(ValueError, match="expected 'labels'"):
        label_names(dataset.select_columns("words"))
    with pytest.raises(ValueError, match="sentences without a word only"):
        label_names(Dataset.from_dict({"words": [[], []], "labels": [[], []]}))
    no_o = Dataset.from_dict({"words": [["a", "b"]], "labels": [["V", "N"]]})
    assert label_names(no_o) == ["N", "V"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "He  ran.\n\n[1] said so\n", ["He  ran.", "[1] said so"]),
        ("a", "one line", ["one line"]),
        ("a.txt", "-DOCSTART- O\n\nAda B-PER\nran O\n\nx O\n", [["Ada", "ran"], ["x"]]),
        ("a.txt", "Ada B-PER\nran O\n", [["Ada", "ran"]]),
        ("a.txt", "Ada\tNN\nran\tVB\n", [["Ada", "ran"]]),
        ("a.conll", "Ada\nran\n\nx\n", [["Ada", "ran"], ["x"]]),
        ("a.txt", '{"text": "He ran."}\n', ["He ran."]),
        ("a.jsonl", '{"id": 1, "text": "He ran."}\n\n["a", "b"]\n', ["He ran.", ["a", "b"]]),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O"]}\n{"words": "a b"}\n', [["a"], "a b"]),
    ],
)
def test_texts_of_any_format(tmp_path, name, text, expected):
    path = tmp_path / name
    path.write_text(text)
    assert read_texts(path) == expected


def test_texts_by_a_format_that_is_given(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Ada B-PER\nran O\n")
    assert read_texts(path, format="text") == ["Ada B-PER", "ran O"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="a.txt has no sentence"):
        read_texts(path)
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match="a.txt:2: .*expected UTF-8"):
        read_texts(path)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="a pipe has no name here")
@pytest.mark.parametrize(
    "text, expected",
    [("Ada ran.\nBob ran.\n", ["Ada ran.", "Bob ran."]), ('["Ada", "ran."]\n', [["Ada", "ran."]])],
)
def test_texts_of_a_pipe(text, expected):
    """What a shell's `<(...)` is; it is read once, and its texts are no columns."""
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    assert options.read_texts(f"/dev/fd/{reader}", None) == expected
    os.close(reader)


def test_rows_have_texts_and_other_fields():
    lines = ['{"id": 1, "words": ["a", "b"], "labels": ["O", "O"]}', '{"text": " a  b"}', '"c"', ""]
    assert list(stream_rows(lines, "jsonl")) == [
        Sentence(["a", "b"], others={"id": 1, "labels": ["O", "O"]}),
        Sentence(["a", "b"], text=" a  b"),
        Sentence(["c"], text="c"),
        Sentence([], text=""),
    ]
    assert list(stream_rows([" a  b"], "text")) == [Sentence(["a", "b"], text=" a  b")]
    assert list(stream_rows(["a O", "b O"], "conll")) == [Sentence(["a", "b"])]
