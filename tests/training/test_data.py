import io
import json
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

from tokenexit.training.data import check_labels, label_names, read_sentences, stream_sentences


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
    assert list(stream_sentences(path.open("rb"), "conll")) == words
    assert list(stream_sentences(path.open(encoding="utf-8"), "conll")) == words
    assert list(stream_sentences(path.open(encoding="utf-8", newline=""), "conll")) == words


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
        ("a O\n".encode("utf-16"), {}, r"data.conll:1: .*expected UTF-8"),
    ],
)
def test_wrong_column_files(write, text, options, message):
    with pytest.raises(ValueError, match=message):
        read_sentences(write(text), **options)


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
        ("# only a comment\n", {}, r"no sentence"),
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
@pytest.mark.parametrize("name", ["missing.conll", "missing.json", "./missing", "a/b/c", "~/none"])
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


def test_label_names():
    dataset = Dataset.from_dict({"words": [["a", "b"], ["c"]], "labels": [["b", "O"], ["A"]]})
    assert label_names(dataset) == ["O", "A", "b"]
    assert label_names(dataset, ["b", "X", "A", "O"]) == ["b", "X", "A", "O"]
    check_labels(dataset, ["A", "b", "O"])
    with pytest.raises(ValueError, match=r"sentence 1 has the label 'A'; expected one of \['O"):
        check_labels(dataset, ["O", "b"])
    with pytest.raises(ValueError, match="sentence 1 has the label 'A'"):
        label_names(dataset, ["O", "b"])
    with pytest.raises(ValueError, match="expected each once"):
        check_labels(dataset, ["O", "A", "b", "b"])
    with pytest.raises(ValueError, match="expected 'labels'"):
        label_names(dataset.select_columns("words"))
    no_o = Dataset.from_dict({"words": [["a", "b"]], "labels": [["V", "N"]]})
    assert label_names(no_o) == ["N", "V"]
