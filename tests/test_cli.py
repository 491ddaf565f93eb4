"""The command line, from training to tagging, and its one-line errors."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib import metadata

import huggingface_hub
import pytest
import torch
import transformers
import typer
from random_models import random_classifier
from test_dial import DIAL
from test_trainer import data
from transformers import AutoConfig

import tokenexit
from tokenexit import ExitPolicy, Tagger, cli, costs
from tokenexit.cli import options, use
from tokenexit.cli.resuming import partial_results
from tokenexit.dial import Dial, Speed
from tokenexit.loops import gpu
from tokenexit.models.tagger import Tagged
from tokenexit.ops import extension_available, instruction_sets
from tokenexit.text.data import stream_sentences


def call(capsys, *arguments):
    """Exit code, stdout, stderr of a command."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["tokenexit", *map(str, arguments)])
        patch.setattr(options.out, "width", 200)
        patch.setattr(options.err, "width", 200)
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_the_table_of_speeds_fits_a_terminal():
    types = {name: 0.01 for name in ("LOC", "MISC", "ORG", "PER")}
    speeds = [
        Speed(policy, speed, 0.005, 0.009, 2.0, wall_speedup=speed, by_type=types)
        for policy, speed in ((ExitPolicy.never(), 1.0), (ExitPolicy(window=2, threshold=0.35), 3))
    ]
    dial = Dial(tuple(speeds), 0, 0.01, 0.9, 500, per_type=tuple(types))
    columns = {"beside\ntrans-\nformers": ["1.50x", "4.50x"], "F1": ["0.8030", "0.7972"]}
    terminal = options.Console(width=80, file=io.StringIO())
    terminal.print(options.dial_table(dial, columns))
    text = terminal.file.getvalue()
    assert "…" not in text and all(len(line) <= 80 for line in text.splitlines())
    full, bold = (next(x for x in text.splitlines() if y in x) for y in ("1.50x", "4.50x"))
    assert full.rstrip().endswith("0.8030   ✓") and bold.rstrip().endswith("0.7972")
    assert re.search(r"threshold 0.35\b", text)  # in one piece
    assert "other labels of     LOC    MISC     ORG     PER" in text
    assert "          3.00x   1.00%   1.00%   1.00%   1.00%" in text
    terminal.print(options.dial_table(replace(dial, promised=None)))
    more = terminal.file.getvalue().removeprefix(text)
    assert "nothing is promised" in more and "✓" not in more


def test_many_speeds_and_types_keep_their_numbers():
    names = [f"TYPE-{i}" for i in range(8)]
    speeds = [
        Speed(ExitPolicy(threshold=n / 100), 1 + n, 0, 0, 1.0)
        for n in range(25)
    ]  # fmt: skip
    speeds = [
        replace(one, by_type={name: (100 * n + i) / 1e4 for i, name in enumerate(names)})
        for n, one in enumerate(speeds)
    ]
    dial = Dial(tuple(speeds), None, 0.01, 0.9, 500, per_type=tuple(names))
    terminal = options.Console(width=80, file=io.StringIO())
    terminal.print(options.dial_table(dial))
    text = terminal.file.getvalue()
    assert "…" not in text and all(name in text for name in names)
    for n in range(25):
        assert all(f"{(100 * n + i) / 1e4:.2%}" in text for i in range(8))


def write_conll(path, count, seed=0):
    rows = data(count, seed)
    path.write_text(
        "".join(
            "".join(f"{w} {x}\n" for w, x in zip(words, labels, strict=True)) + "\n"
            for words, labels in zip(rows["words"], rows["labels"], strict=True)
        )
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """Data files, an encoder, and taggers that the commands made of it."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer()
    encoder = random_classifier(vocab_size=len(tokenizer), initializer_range=0.1)
    for name, model in (("encoder", encoder.bert), ("hf", encoder)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, count, seed in (("train", 256, 0), ("dev", 32, 1), ("test", 32, 2)):
        write_conll(folder / f"{name}.conll", count, seed)
    return folder


SETTINGS = ("--learning-rate", "3e-3", "--batch-size", "8", "--set", "use_cpu=true")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    capsys = _Quiet()
    train = ("-d", folder / "train.conll", "--dev", folder / "dev.conll")
    code, out, err = call(
        capsys, "train", "-m", folder / "encoder", *train, "-o", folder / "tagger",
        "--epochs", 4, *SETTINGS,
    )  # fmt: skip
    assert code == 0, err
    code, out, err = call(
        capsys, "self-sample", "-m", folder / "tagger", *train, "-o", folder / "exits",
        "--epochs", 1, *SETTINGS,
    )  # fmt: skip
    assert code == 0, err
    # No word leaves early until calibration, or the user, says when.
    policy = json.loads((folder / "exits" / "config.json").read_text())["exit_policy"]
    assert policy["threshold"] == 0
    return folder / "exits"


def test_runs_with_equal_seeds_are_equal(folder, tmp_path, capsys):
    """New classifiers are drawn before the Trainer seeds."""
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(len(weights))  # whatever was drawn before
        code, _, err = call(
            capsys, "train", "-m", folder / "encoder", "-d", folder / "dev.conll",
            "-o", tmp_path / name, "--epochs", 1, "--seed", seed, *SETTINGS,
        )  # fmt: skip
        assert code == 0, err
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def contents(folder):
    """Every file in a folder, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


class _Quiet:
    """capsys for fixtures of a module: keeps nothing."""

    def readouterr(self):
        class Nothing:
            out = err = "(not captured)"

        return Nothing


def test_train_calibrate_evaluate(trained, folder, capsys):
    report = folder / "report"
    weights = (trained / "model.safetensors").read_bytes()
    code, out, err = call(
        capsys, "calibrate", trained, "-d", folder / "dev.conll", "--target-speedup", 1.5,
        "--report", report,
    )  # fmt: skip
    assert code == 0, err
    points = json.loads((report / "calibration.json").read_text())["verified"]
    shown, count = re.search(r"verified with real exits: (\d+) of (\d+)", out).groups()
    assert int(count) == len(points) and out.count("token, window") + out.count(
        "sentence,"
    ) <= 1 + int(shown)
    pairs = {(x["speedup"], x["score"]) for x in points}
    ahead = [a for a in pairs if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in pairs)]
    assert len(ahead) <= int(shown) < len(points) and "chosen" in out
    chosen = json.loads((report / "calibration.json").read_text())["chosen"]
    assert (report / "calibration.png").stat().st_size > 10_000
    tagger = Tagger.from_pretrained(trained)
    assert tagger.model.policy == ExitPolicy.from_dict(chosen["policy"])
    assert (trained / "model.safetensors").read_bytes() == weights
    assert len(tagger.model.config.temperatures) == 4

    code, out, err = call(capsys, "evaluate", trained, "-d", folder / "test.conll", "--json")
    result = json.loads(out)
    assert code == 0 and result["policy"] == chosen["policy"]
    assert result["scores"]["metric"] == "entity_f1" and result["scores"]["score"] > 0.9
    assert result["flops_speedup"] > 1.3 and result["wall_speedup"] > 0
    code, out, err = call(
        capsys, "evaluate", trained, "-d", folder / "test.conll", "--full-depth", "--timing-runs", 0
    )
    assert code == 0 and "full depth" in out and "mean exit layer" in out


def test_calibrate_with_growing_thresholds(trained, folder, capsys, tmp_path):
    tagger = shutil.copytree(trained, tmp_path / "tagger")
    given = ("calibrate", tagger, "-d", folder / "dev.conll", "--target-speedup", 1.5, "--json")
    for growth in (3, 1):  # the tagger's own does not count
        code, out, err = call(capsys, *given, "--growth", growth)
        assert code == 0, err
        tried = json.loads(out)["simulated"]
        assert {point["policy"]["growth"] for point in tried} <= {growth, 1}
        assert Tagger.from_pretrained(tagger).model.policy.growth == growth
    for more, message in (
        (("--growth", 0.5), "growth is 0.5; expected 1 to 100"),
        (("--growth", 2, "--schedule", "doubling"), "the schedule 'doubling'; expected 'constant'"),
    ):
        code, _, err = call(capsys, *given, *more)
        assert code == 1 and message in err


def test_decoding(trained, folder, capsys, tmp_path):
    tagger = Tagger.from_pretrained(trained)
    with torch.no_grad():  # of all words
        tagger.model.exit_heads[-1].bias[tagger.label_names.index("I-PER")] += 50
    tagger.save_pretrained(tmp_path / "tagger")
    source = tmp_path / "in.txt"
    source.write_text("john smith\nparis\n")
    labels, counts = {}, {}
    for decoding in ("argmax", "constrained"):
        given = ("--full-depth", "--decoding", decoding)
        code, out, err = call(capsys, "predict", tmp_path / "tagger", source, *given)
        assert code == 0, err
        labels[decoding] = [json.loads(line)["labels"] for line in out.splitlines()]
        data = ("-d", folder / "test.conll", "--timing-runs", 0)
        _, out, _ = call(capsys, "evaluate", tmp_path / "tagger", *data, *given, "--json")
        counts[decoding] = json.loads(out)["broken_labels"]
        code, out, _ = call(capsys, "evaluate", tmp_path / "tagger", *data, *given)
        assert re.search(rf"labels that cannot stand\W+{counts[decoding]}\b", out)
    assert labels == {"argmax": [["I-PER"] * 2, ["I-PER"]], "constrained": labels["constrained"]}
    assert labels["constrained"][0] == ["B-PER", "I-PER"] and counts["constrained"] == 0
    assert labels["constrained"][1][0] in ("B-LOC", "B-PER", "O") and counts["argmax"] == 32


def test_predict_keeps_order_in_every_format(trained, folder, capsys, tmp_path, monkeypatch):
    text = tmp_path / "in.txt"
    text.write_text("john smith lives in paris\n\nnew york\n")
    code, out, err = call(capsys, "predict", trained, text)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [len(r["words"]) for r in rows] == [5, 0, 2]
    assert rows[0]["labels"] == ["B-PER", "I-PER", "O", "O", "B-LOC"]
    assert all(1 <= x <= 4 for r in rows for x in r["exit_layers"])

    target = tmp_path / "out.conll"
    conll = ("--format", "conll", "--output-format", "conll")
    code, out, err = call(
        capsys, "predict", trained, folder / "test.conll", *conll, "-o", target, "--buffer", 5
    )
    assert code == 0 and out == ""
    gold = (folder / "test.conll").read_text().splitlines()
    got = target.read_text().splitlines()
    assert [line.split()[:1] for line in got] == [line.split()[:1] for line in gold]
    agree = sum(a.split() == b.split() for a, b in zip(got, gold, strict=True))
    assert agree > 0.9 * len(gold)
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "predict", trained, folder / "test.conll", *conll, "-o", "-")
    assert code == 0 and out == target.read_text() and not (tmp_path / "-").exists()


def test_evaluate_in_a_narrow_terminal(trained, folder, capsys, monkeypatch):
    """Whole numbers, of four digits as everywhere."""
    terminal = options.Console(width=40, file=io.StringIO())
    monkeypatch.setattr("tokenexit.cli.use.out", terminal)
    code, _, err = call(capsys, "evaluate", trained, "-d", folder / "test.conll")
    text = terminal.file.getvalue()
    assert code == 0 and "…" not in text and not re.search(r"\d\.\d{5}", text), err
    assert "entity_f1" in text and '"' not in text


@pytest.fixture(scope="module")
def texts(folder):
    """Lines of text, none twice."""
    rows = {" ".join(words) + "." for words in data(400, seed=3)["words"] if len(words) > 2}
    (folder / "texts.txt").write_text("".join(f"{row}\n" for row in sorted(rows)) + "\n")
    return folder / "texts.txt"


def test_adapt_with_the_encoder_trained_too(folder, texts, capsys, tmp_path):
    """What it needs to go on with lies beside the result, until that is there."""
    cut_off = tmp_path / "tagger-checkpoints"  # before the first checkpoint was whole
    (cut_off / "checkpoint-9").mkdir(parents=True)
    (cut_off / "run.json").write_text("{}")
    code, out, err = call(
        capsys, "adapt", folder / "hf", "-t", texts, "-o", tmp_path / "tagger", "--tune",
        "--epochs", 1, "--max-disagreement", 0.5, "--timing-runs", 0, "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["dial"]["reference"] == "the original", err
    assert [path.name for path in tmp_path.iterdir()] == ["tagger"]


def test_adapt_leaves_what_others_have_where_its_checkpoints_lie(folder, texts, capsys, tmp_path):
    theirs = tmp_path / "ner-checkpoints"
    shutil.copytree(folder / "hf", theirs)
    arguments = ("-t", texts, "-o", tmp_path / "ner", "--tune", "--epochs", 1)
    arguments += ("--max-disagreement", 0.5, "--timing-runs", 0)
    before = sorted(path.name for path in theirs.iterdir())
    code, _, err = call(capsys, "adapt", theirs, *arguments)
    assert code == 1 and "where the checkpoints for" in err and "expected another --output" in err
    code, _, err = call(capsys, "adapt", folder / "hf", *arguments)
    assert code == 0, err
    assert sorted(path.name for path in theirs.iterdir()) == before


def test_adapt_then_speeds(folder, texts, capsys, tmp_path):
    model, tagger = folder / "hf", tmp_path / "tagger"
    before = contents(model)
    (tmp_path / "dev.conll").write_text("john LABEL_1\nparis LABEL_0\n\n")
    code, out, err = call(
        capsys, "adapt", model, "-t", texts, "-o", tagger, "--max-disagreement", 0.3,
        "--timing-runs", 1, "--data", tmp_path / "dev.conll",
    )  # fmt: skip
    assert code == 0, err
    assert contents(model) == before
    out = " ".join(out.split())
    assert "full depth 1.00x" in out and f"wrote {tagger}: " in out
    assert "✓ promised: with a confidence of" in out
    dial = Tagger.from_pretrained(tagger).model.dial
    assert dial.max_disagreement == 0.3 and dial.sentences > 50
    assert dial.metric == "accuracy" and {one.score for one in dial.speeds} <= {0, 0.5, 1}
    about = (tagger / "README.md").read_text()
    assert "| accuracy |" in about and dial.promise in about
    (tmp_path / "odd.conll").write_text("john LABEL_1\n\n")
    for speed, number in (("full", 0), ("promised", dial.promised), ("1", 0)):
        code, out, err = call(
            capsys, "evaluate", tagger, "-d", tmp_path / "odd.conll", "--speed", speed, "--json",
            "--timing-runs", 0,
        )  # fmt: skip
        assert code == 0, err
        assert json.loads(out)["policy"] == dial.speeds[number].policy.to_dict()
    code, out, err = call(
        capsys, "calibrate", tagger, "-d", texts, "--max-disagreement", 0.4, "--confidence", 0.8,
        "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["metric"] == "agreement" and found["dial"]["confidence"] == 0.8
    assert Tagger.from_pretrained(tagger).model.dial.max_disagreement == 0.4
    assert found["dial"]["sentences"] > dial.sentences  # nothing was trained on them, by this
    about = (tagger / "README.md").read_text()
    assert "Made from `hf`: bert, 4 layers of 32" in about and "with 80% below" in about
    tagged = Tagger.from_pretrained(tagger).tag(texts.read_text().splitlines(), speed="full")
    (kind, _), *_ = Counter(label for row in tagged for label in row.labels).most_common(1)
    code, out, err = call(
        capsys, "calibrate", tagger, "-d", texts, "--max-disagreement", 0.4, "--original", model,
        "--json", "--per-layer", "--per-type", kind,
    )  # fmt: skip
    assert code == 0 and json.loads(out)["dial"]["reference"] == "the original", err
    assert json.loads(out)["dial"]["per_layer"] and json.loads(out)["dial"]["per_type"] == [kind]
    code, out, err = call(
        capsys, "calibrate", tagger, "-d", tmp_path / "odd.conll", "--metric", "accuracy",
        "--max-loss", 1, "--original", model,
    )  # fmt: skip
    assert code == 0 and "│ the original │" in " ".join(out.split()), err


def test_predict_spans_and_other_fields(trained, capsys, tmp_path):
    text = tmp_path / "in.txt"
    text.write_text("John Smith lives  in Paris.\n\nnew york\n")
    code, out, err = call(capsys, "predict", trained, text, "--spans")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["text"] for row in rows] == text.read_text().splitlines()
    assert [(x["type"], x["text"]) for x in rows[0]["spans"]] == [
        ("PER", "John Smith"),
        ("LOC", "Paris"),
    ]
    for row in rows:
        for span in row["spans"]:
            assert row["text"][span["start"] : span["stop"]] == span["text"]
            assert 0 < span["confidence"] <= 1
    lines = [{"id": 7, "text": "in Paris."}, {"words": ["paris"], "x": {"y": None}}, {"tokens": []}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for arguments, last in ((("--spans",), "spans"), ((), "exit_layers")):
        code, out, err = call(capsys, "predict", trained, source, *arguments, "--buffer", 1)
        rows = [json.loads(line) for line in out.splitlines()]
        assert code == 0 and rows[0]["id"] == 7 and rows[1]["x"] == {"y": None}
        assert all([*row][-1] == last for row in rows) and len(rows[2]) == len(rows[1]) - 1


def test_predict_takes_texts_and_tells_what_it_replaces(trained, capsys, tmp_path):
    text, source = "John lives in Paris.", tmp_path / "in.jsonl"
    row = {"id": 1, "tokens": ["John", "lives", "in", "Paris", "."], "text": text}
    row |= {"labels": ["B-PER", "O", "O", "B-LOC", "O"], "spans": []}
    source.write_text(f"{json.dumps(row)}\n" * 2)
    code, out, err = call(capsys, "predict", trained, source, "--spans")
    found = json.loads(out.splitlines()[0])
    assert code == 0 and found["text"] == text and found["labels"] == row["labels"]
    assert [(x["text"], x["stop"]) for x in found["spans"]] == [("John", 4), ("Paris", 19)]
    assert err.count("not handed on, as results have the same names: spans\n") == 1
    code, out, err = call(capsys, "predict", trained, source)
    assert code == 0 and json.loads(out.splitlines()[1])["text"] == text
    assert err.count("not handed on, as results have the same names: labels\n") == 1
    whole, output = call(capsys, "predict", trained, source, "--spans")[1], tmp_path / "out.jsonl"
    call(capsys, "predict", trained, source, "--spans", "-o", output, "--resume")
    assert output.read_text() == whole


@pytest.mark.parametrize(
    ("row", "arguments", "told"),
    [
        ({"id": 1, "words": ["john"], "labels": ["O"]}, ("--output-format", "conll"),
         "columns have no place for them: id, labels"),
        ({"words": ["john"], "text": ["raw", "pieces"]}, ("--spans",),
         "results have the same names: text"),
        ({"words": "john lives", "text": "John Lives!"}, ("--spans",),
         "results have the same names: text"),
    ],
)  # fmt: skip
def test_no_field_is_lost_in_silence(trained, capsys, tmp_path, row, arguments, told):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(row) + "\n")
    code, out, err = call(capsys, "predict", trained, source, *arguments)
    assert code == 0 and out and f"not handed on, as {told}\n" in err


@pytest.mark.parametrize("output_format", ["jsonl", "conll"])
def test_predict_gives_an_output_for_each_input(trained, capsys, tmp_path, output_format):
    cases = {
        "in.txt": ("john\n\nnew york\n\n", [["john"], [], ["new", "york"], []]),
        "in.jsonl": ('["john"]\n\n{"words": "new  york"}\n', [["john"], [], ["new", "york"]]),
        "in.conll": ("-DOCSTART- O\n\njohn O\n\n", [["-DOCSTART-"], ["john"]]),
    }
    for name, (text, words) in cases.items():
        (tmp_path / name).write_text(text)
        code, out, err = call(
            capsys, "predict", trained, tmp_path / name, "--output-format", output_format
        )
        assert code == 0, err
        if output_format == "jsonl":
            assert [json.loads(line)["words"] for line in out.splitlines()] == words
        else:
            rows = out.split("\n")
            assert [row.split("\t")[0] for row in rows] == [w for x in words for w in [*x, ""]] + [
                ""
            ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b\tc"], r"sentence 7 has 'b\\tc', which would not be read back"),
        (["a\nb"], r"'a\\nb'"),
        (["a\rb"], r"'a\\rb'"),
        (["a\0b"], r"'a\\x00b'"),
        (["# a"], "'# a'"),
        (["\ufeffa"], "ufeffa"),
        (["a", "-DOCSTART-"], "'-DOCSTART-'"),
        (["-DOCSTART- x"], "'-DOCSTART- x'"),
    ],
)
def test_words_that_columns_cannot_hold_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        use._as_conll(Tagged(words, ["O"] * len(words), [1] * len(words)), 7)
    with pytest.raises(ValueError, match="'B\\\\tX'"):
        use._as_conll(Tagged(["a"], ["B\tX"], [1]), 1)


def test_words_that_columns_hold_are_read_back():
    sentences = [["#", "#fb", "", " x ", "New York", "\u2028\xa0", '"'], ["-DOCSTART-"], ["1", "2"]]
    sentences.append(["["])
    rows = [
        use._as_conll(Tagged(words, ["O"] * len(words), [1] * len(words)), 1) for words in sentences
    ]
    for format in ("conll", None):
        file = io.BytesIO("".join(rows).encode())
        file.name = "x.conll"
        assert list(stream_sentences(file, format)) == sentences


def test_predict_writes_utf_8_whatever_the_terminal(trained, capsys, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("Zoë 北京\n", encoding="utf-8")
    stdout = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, "cp1252"))
    code, _, err = call(capsys, "predict", trained, tmp_path / "in.txt")
    assert code == 0, err
    assert json.loads(stdout.getvalue())["words"] == ["Zoë", "北京"]


@pytest.mark.parametrize("name", ["r[exp1].jsonl", "x[/b].jsonl", "[bold].jsonl", "a:smile:.jsonl"])
def test_brackets_in_names_are_no_markup(trained, folder, capsys, tmp_path, name):
    target = tmp_path / ("a" * 200) / name  # nor is a long line broken
    (tmp_path / "in.txt").write_text("john\n")
    code, out, err = call(capsys, "predict", trained, tmp_path / "in.txt", "-o", target)
    assert code == 0 and err.strip() == f"wrote {target}"
    assert target.is_file()
    table = use.Table("", "[red]", title="[/x]")
    table.add_row("[bold]", ":car:")
    console = options.Console(file=io.StringIO(), width=80)
    console.print(table, "[/]")
    for text in ("[red]", "[/x]", "[bold]", ":car:", "[/]"):
        assert text in console.file.getvalue()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_predict_writes_into_a_pipe(trained, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("john\n")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    code, _, err = call(capsys, "predict", trained, tmp_path / "in.txt", "-o", tmp_path / "pipe")
    assert code == 0 and (tmp_path / "pipe").is_fifo(), err
    assert json.loads(os.read(reader, 999))["words"] == ["john"]
    os.close(reader)


def run_predict(*arguments, **kwargs):
    # A shell's background jobs, and so their children, ignore SIGINT.
    kwargs["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, "-m", "tokenexit", "predict", *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


def test_interrupted_predict_leaves_no_file(trained, folder, capsys, tmp_path, monkeypatch):
    whole = Tagger.stream

    def stopped(self, *args, **kwargs):
        for number, tagged in enumerate(whole(self, *args, **kwargs)):
            if number == 7:
                raise KeyboardInterrupt
            yield tagged

    monkeypatch.setattr(Tagger, "stream", stopped)
    target = tmp_path / "out.jsonl"
    target.write_text("of an earlier run")
    arguments = ("predict", trained, folder / "test.conll", "--format", "conll", "-o", target)
    code, out, err = call(capsys, *arguments)
    assert code == 130 and err.strip() == "interrupted"
    assert target.read_text() == "of an earlier run"
    assert [f.name for f in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    "arguments",
    [(), ("--spans",), ("--output-format", "conll"), ("--full-depth",)],
    ids=["json", "spans", "columns", "full depth"],
)
@pytest.mark.parametrize("torn", [b"", b'{"words": ["jo', b"john\tB-"], ids=["", "json", "row"])
def test_predict_goes_on_where_it_was_cut_off(
    trained, capsys, tmp_path, monkeypatch, arguments, torn
):
    source, target, whole = tmp_path / "in.txt", tmp_path / "out", tmp_path / "whole"
    lines = [*(" ".join(words) for words in data(23, seed=4)["words"]), "", "in  Paris.", ""]
    source.write_text("".join(f"{line}\n" for line in lines))
    predict = ("predict", trained, source, *arguments, "--buffer", 4)
    code, _, err = call(capsys, *predict, "-o", whole)
    assert code == 0, err
    stream, sizes = Tagger.stream, []

    def stopped(self, sentences, *args):
        tagged = list(stream(self, sentences, *args))
        sizes.append(len(tagged))
        yield from tagged[:7]
        if len(tagged) > 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Tagger, "stream", stopped)
    predict += ("-o", target, "--resume")
    partial = tmp_path / "out.partial"
    for before in (0, 7, 14):
        code, _, err = call(capsys, *predict)
        assert code == 130 and (f"going on after {before} sentences" in err) == (before > 0)
        assert not target.exists()
        with open(partial / "rows", "ab") as rows:
            rows.write(torn)  # as a kill leaves it
    code, _, err = call(capsys, *predict)
    assert code == 0, err
    assert sizes == [26, 19, 12, 5] and target.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out", "whole"]


def test_predict_goes_on_with_the_same_only(trained, capsys, tmp_path, monkeypatch):
    source, target = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("john\nparis\nnew york\n")
    predict = ("predict", trained, source, "-o", target, "--resume")
    stream = Tagger.stream

    def stopped(self, *args):
        for number, tagged in enumerate(stream(self, *args)):
            if number == 2:
                raise KeyboardInterrupt
            yield tagged

    with monkeypatch.context() as patch:
        patch.setattr(Tagger, "stream", stopped)
        assert call(capsys, *predict)[0] == 130
    rows = (tmp_path / "out.partial" / "rows").read_bytes()
    for other, message in (
        (("--threshold", 0.2), "was started otherwise: policy .*; expected the same"),
        (("--spans",), "was started otherwise: results _as_json, now _as_spans"),
        (("--decoding", "constrained"), "otherwise: decoding argmax, now constrained; expected"),
    ):
        code, _, err = call(capsys, *predict, *other)
        assert code == 1 and re.search(message, err), err
    load = Tagger.from_pretrained

    def trained_on(*args, **kwargs):
        tagger = load(*args, **kwargs)
        tagger.model.exit_heads[1].bias.data[0] += 1
        return tagger

    with monkeypatch.context() as patch:
        patch.setattr(Tagger, "from_pretrained", trained_on)
        code, _, err = call(capsys, *predict)
        assert code == 1 and "was started otherwise: classifiers " in err
    for text in ("john\nyork\nnew york\n", "john\n"):
        source.write_text(text)
        code, _, err = call(capsys, *predict)
        assert code == 1 and "result 2 in " in err and "expected the input of before" in err
    assert (tmp_path / "out.partial" / "rows").read_bytes() == rows and not target.exists()
    source.write_text("john\nparis\nnew york\nthe\n")  # it may have grown
    assert call(capsys, *predict)[0] == 0
    assert [json.loads(line)["words"] for line in target.read_text().splitlines()] == [
        ["john"], ["paris"], ["new", "york"], ["the"]
    ]  # fmt: skip
    code, _, err = call(capsys, "predict", trained, source, "--resume")
    assert code == 1 and "got --resume without --output" in err
    code, _, err = call(capsys, *predict[:3], "-o", tmp_path, "--resume")
    assert code == 1 and "is no file; expected one, or a new name" in err
    source.write_text("a O\nb O\n")
    assert call(capsys, *predict)[0] == 1 and not (tmp_path / "out.partial").exists()


def test_a_sentence_is_numbered_from_the_first_run(trained, capsys, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps([word]) + "\n" for word in ("john", "paris", "a\tb")))
    predict = ("predict", trained, source, "-o", tmp_path / "out", "--output-format", "conll")
    for run in range(2):
        code, _, err = call(capsys, *predict, "--resume")
        assert code == 1 and "sentence 3 has 'a\\tb'" in err
        assert ("going on after 2 sentences" in err) == (run == 1)


def test_results_of_a_run_are_its_own(tmp_path):
    with partial_results(tmp_path / "out", {}) as rows:
        with pytest.raises(ValueError, match="another process is at .*partial; expected one"):
            with partial_results(tmp_path / "out", {}):
                pass
        rows.write_text("done")
        mine = rows.with_name("mine")
        mine.write_text("")
    assert (tmp_path / "out").read_text() == "done" and [*mine.parent.iterdir()] == [mine]


def test_results_lie_where_a_link_leads(tmp_path):
    """Else they could not be renamed from one file system into another."""
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "out", tmp_path / "link"
    link.symlink_to(target)
    with partial_results(link, {}) as rows:
        assert rows.parent.parent == target.parent
        rows.write_text("done")
    assert link.is_symlink() and target.read_text() == "done"


@pytest.mark.parametrize("more", [(), ("--resume",)], ids=["whole", "in parts"])
def test_half_of_a_surrogate_pair_in_another_field(trained, capsys, tmp_path, more):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"words": ["john"], "id": "\\ud83d"}\n')
    code, _, err = call(capsys, "predict", trained, source, "-o", target, *more)
    assert code == 0 and json.loads(target.read_text())["id"] == "\ud83d", err


def test_predict_shows_how_far_it_is(trained, capsys, tmp_path, monkeypatch):
    source = tmp_path / "in.txt"
    source.write_text("john\n" * 30)
    steps = []
    monkeypatch.setattr(
        use, "progress_bars", lambda: contextlib.nullcontext(lambda *x: steps.append(x))
    )
    for terminal in (False, True):
        monkeypatch.setattr(options.err, "_force_terminal", terminal)
        code, _, err = call(capsys, "predict", trained, source, "-o", tmp_path / "out")
        assert code == 0, err
        assert bool(steps) == terminal
    assert steps[-1] == ("bytes read", 150, 150)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_cleans_up_as_an_interrupt_does(
    trained, folder, capsys, tmp_path, monkeypatch, name
):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # `nohup` has it ignored, and so would we

    def stopped(self, *args):
        assert [f.name.startswith(".writing-") for f in tmp_path.iterdir()] == [True]
        try:
            os.kill(os.getpid(), number)
        finally:  # a second one stops no cleaning up
            assert signal.getsignal(number) is signal.SIG_IGN
        yield from ()

    monkeypatch.setattr(Tagger, "stream", stopped)
    code, _, _ = call(
        capsys, "predict", trained, folder / "test.conll", "-o", tmp_path / "out.jsonl"
    )
    assert code == 128 + number
    assert not list(tmp_path.iterdir())
    assert signal.signal(number, before) is signal.SIG_DFL


def test_names_that_are_no_unicode_are_printed(monkeypatch):
    """As Python has them of file names in other encodings."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    cli._prepare_streams()
    print("Zo\xeb \udcff", flush=True)
    assert stream.buffer.getvalue() == b"Zo\xc3\xab \\udcff\n"


def test_closed_streams(trained, folder, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", None)
        code, _, err = call(capsys, "predict", trained)
        assert code == 1 and "error: standard input is closed" in err
    with monkeypatch.context() as patch:
        patch.setattr(sys, "__stdout__", None)
        for arguments in (("predict",), ("evaluate", "-d", folder / "test.conll")):
            code, _, err = call(capsys, *arguments, trained)
            assert code == 1 and "error: standard output is closed" in err
    opened = []
    fstat = os.fstat

    def closed(number):
        if number < 3:
            raise OSError("Bad file descriptor")
        return fstat(number)

    with monkeypatch.context() as patch:
        for name in ("stdin", "stdout", "stderr"):
            patch.setattr(sys, name, None)
        patch.setattr(os, "fstat", closed)
        patch.setattr(os, "open", lambda path, flags: opened.append(path))
        cli._prepare_streams()
        print("nowhere", file=sys.stderr)
        print("nowhere")
    assert opened == [os.devnull] * 3  # or the next files would be what is printed to


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk to write to")
def test_results_that_standard_output_does_not_take(trained, folder, capsys, monkeypatch):
    evaluate = ("evaluate", trained, "-d", folder / "dev.conll", "--timing-runs", 0, "--json")
    for arguments in (("predict", trained, folder / "dev.conll"), ("info",), evaluate):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            code, _, err = call(capsys, *arguments)
        assert code == 1 and err.count("error: ") == 1 and "No space left" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "No such file"),
        (["dev.conll", "--format", "xml"], "format is 'xml'"),
        (["dev.csv"], "dev.csv is by its name of no format"),
        (["dev.conll", "--output-format", "xml"], "--output-format is 'xml'"),
        (["dev.conll", "-o", "."], "is a folder"),
        (["dev.conll", "-o", "dev.conll/x"], "dev.conll"),
    ],
)
def test_predict_checks_its_options_first(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(use, "load_tagger", lambda *_: pytest.fail("loaded the tagger"))
    monkeypatch.chdir(folder)
    (folder / "dev.csv").write_text("a,O\n")
    code, _, err = call(capsys, "predict", "tagger", *arguments)
    assert code == 1 and message in err


def test_names_of_data(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert len(options.read_data("~/dev.conll", None, None)) == 32
    columns = {
        "3": 3,
        "-1": -1,
        "ner_tags": "ner_tags",
        "--1": "--1",
        "\u00b2": "\u00b2",
        None: None,
    }
    assert {x: options._number(x) for x in columns} == columns

    def check(name):
        raise ValueError(f"asked for {name}")

    monkeypatch.setattr("tokenexit.text.data.check_hub_name", check)
    for name in ("trian", "trian:en@test"):
        with pytest.raises(ValueError, match="asked for trian$"):
            options.read_data(name, None, None)
    with pytest.raises(ValueError, match="asked for tra.in$"):
        options.read_data("tra.in", None, "dataset")
    with pytest.raises(ValueError, match="no such file: tra.in"):
        options.read_data("tra.in", None, None)
    with pytest.raises(ValueError, match="no such file: trian"):
        options.read_data("trian", None, "conll")


@pytest.mark.slow
def test_predict_as_a_stream_and_interrupted(trained):
    stream = run_predict(trained, "--buffer", "1")
    stream.stdin.write("john lives\n")
    stream.stdin.flush()
    assert json.loads(stream.stdout.readline())["words"] == ["john", "lives"]  # before the end
    stream.stdin.write("paris\n")
    out, err = stream.communicate()
    assert stream.returncode == 0 and json.loads(out)["words"] == ["paris"] and not err

    stopped = run_predict(trained, "--buffer", "1")
    stopped.stdin.write("paris\n")
    stopped.stdin.flush()
    stopped.stdout.readline()  # now it waits for more
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate()
    assert stopped.returncode == 130 and err.strip() == "interrupted"

    closed = run_predict(trained, "--buffer", "1")
    closed.stdin.write("john\n")
    closed.stdin.flush()
    closed.stdout.readline()
    closed.stdout.close()
    try:
        closed.stdin.write("paris\n" * 50)
        closed.stdin.close()
    except BrokenPipeError:
        pass
    assert closed.wait() == 1  # typer's quiet end where the reader went away
    assert "Traceback" not in closed.stderr.read()


def test_resume_goes_on_and_nothing_is_overwritten(trained, folder, capsys):
    tagger = folder / "tagger"
    arguments = (
        "train", "-m", folder / "encoder", "-d", folder / "train.conll", "-o", tagger,
        "--epochs", 4, *SETTINGS,
    )  # fmt: skip
    code, _, err = call(capsys, *arguments)
    assert code == 1 and "has a run already: give --resume" in err
    code, out, err = call(capsys, *arguments, "--resume")
    assert code == 0 and "wrote" in out
    code, _, err = call(capsys, *arguments[:-2], "-o", folder / "new", "--resume")
    assert code == 1 and "no complete checkpoint" in err
    for other in (("-d", folder / "dev.conll"), ("--seed", 5), ("--set", "weight_decay=0")):
        code, _, err = call(capsys, *arguments, "--resume", *other)
        assert code == 1 and "was started otherwise" in err and "expected the same" in err


def test_training_on_starts_at_full_depth_and_adds_labels(trained, folder, capsys, tmp_path):
    shutil.copytree(trained, tmp_path / "tagger")
    config = json.loads((tmp_path / "tagger" / "config.json").read_text())
    config["exit_policy"]["threshold"] = 0.7
    config |= {"dial": DIAL.to_dict(), "temperatures": [2.0] * 4}
    (tmp_path / "tagger" / "config.json").write_text(json.dumps(config))
    (tmp_path / "cars.conll").write_text("red B-CAR\njohn B-PER\n\n")
    arguments = ("train", "-m", tmp_path / "tagger", "-d", tmp_path / "cars.conll", "--epochs", 1)
    code, out, err = call(capsys, *arguments, "-o", tmp_path / "on", "--set", "use_cpu=True")
    assert code == 0 and "full depth until the next `calibrate`" in err
    on = Tagger.from_pretrained(tmp_path / "on").model
    assert on.policy == ExitPolicy.never()
    assert on.dial is None and on.config.temperatures is None
    assert on.config.label2id == {**config["label2id"], "B-CAR": 5}
    code, out, err = call(
        capsys, *arguments, "-o", tmp_path / "new", "--set", "use_cpu=True", "--new-classifier"
    )
    assert code == 0
    new = Tagger.from_pretrained(tmp_path / "new").model
    assert new.config.label2id == {"B-CAR": 0, "B-PER": 1}


def test_calibrate_stores_the_policy_though_the_report_fails(trained, folder, capsys, tmp_path):
    shutil.copytree(trained, tmp_path / "tagger")
    path = tmp_path / "tagger" / "config.json"
    config = json.loads(path.read_text())
    config["exit_policy"]["threshold"] = 0.0
    path.write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenexit.calibrate.plot", lambda *_: 1 / 0)
        code, _, err = call(
            capsys, "calibrate", tmp_path / "tagger", "-d", folder / "dev.conll",
            "--target-speedup", 1.5, "--report", tmp_path / "report", "--verify", 2,
        )  # fmt: skip
    assert code == 1 and "ZeroDivisionError" in err
    assert Tagger.from_pretrained(tmp_path / "tagger").model.policy.threshold > 0


def test_what_a_picture_lacks_is_told_before_the_work(trained, folder, capsys, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr("tokenexit.cli.train.load_tagger", work)
    monkeypatch.setattr("tokenexit.demo_assets.fetch", work)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = ("-d", folder / "dev.conll", "--report", folder / "report")
    for arguments in (("calibrate", trained, *data), ("demo", "-o", folder / "demo")):
        code, _, err = call(capsys, *arguments)
        assert code == 1 and "pip install 'tokenexit[plot]'" in err
    monkeypatch.undo()
    monkeypatch.setattr("tokenexit.demo_assets.fetch", work)
    code, _, err = call(capsys, "demo", "-o", folder / "dev.conll")
    assert code == 1 and "dev.conll is a file; expected a folder to write" in err


def test_info(trained, capsys):
    code, out, _ = call(capsys, "info", trained)
    assert code == 0 and "attention here" not in out
    assert "compiled ops" in out and "bert, 4 layers of 32" in out and "B-PER" in out
    assert all(name in out for name in instruction_sets())
    assert call(capsys, "info")[0] == 0


@pytest.mark.skipif(not extension_available(), reason="not compiled")
def test_info_measures_when_asked(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENEXIT_CACHE", str(tmp_path))
    code, out, _ = call(capsys, "info", trained, "--measure")
    out = " ".join(out.split())
    assert code == 0 and "loop │ cpu" in out
    assert "32 x 64, 4 heads, fp32" in out and "4 heads, int8" in out and "absorbed block" in out
    assert "4 heads, fp32" in " ".join(call(capsys, "info")[1].split())
    costs._costs.cache_clear()
    assert "--measure wants a tagger" in call(capsys, "info", "--measure")[2]


def test_info_tells_what_keeps_a_gpu_slow(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(gpu, "_DEVICES", frozenset())
    out = " ".join(call(capsys, "info")[1].split())
    assert "H100, used slowly: the CUDA op compact_active (" in out
    monkeypatch.setattr(gpu, "_DEVICES", {"cuda"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert "slowly" not in call(capsys, "info")[1]


def test_int8_and_min_active(trained, folder, capsys):
    arguments = ("evaluate", trained, "-d", folder / "test.conll", "--timing-runs", 0, "--json")
    rows = {}
    for given in ((), ("--int8",), ("--min-active", 3)):
        code, out, _ = call(capsys, *arguments, "--threshold", 0.3, *given)
        assert code == 0
        rows[given] = json.loads(out)
    exact, rounded, least = rows.values()
    assert abs(rounded["scores"]["score"] - exact["scores"]["score"]) < 0.1
    assert least["policy"]["min_active"] == 3
    assert least["mean_exit_layer"] <= exact["mean_exit_layer"]
    text = call(capsys, *arguments, "--full-depth", "--min-active", 3)
    assert text[0] == 1 and "--full-depth excludes --min-active" in text[2]


def test_a_mistyped_model_is_told_by_one_question(folder, capsys, monkeypatch):
    asked = []

    def model_info(self, name, timeout):
        asked.append((name, timeout))
        raise ConnectionError("no such name")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_: pytest.fail("tried for long"))
    data = folder / "dev.conll"
    for arguments in (
        ("predict", "tager"),
        ("evaluate", "tager", "-d", data),
        ("train", "-m", "tager", "-d", data, "-o", folder / "x"),
    ):
        code, _, err = call(capsys, *arguments)
        assert code == 1 and "tager is neither a folder nor a name on the hub: no such" in err
    assert asked == 3 * [("tager", 10)]
    cached = str(folder / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: cached)
    options.check_model_name("tager")


def test_dtype(trained, folder, capsys):
    for dtype, kind in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
        code, out, err = call(capsys, "info", trained, "--dtype", dtype)
        assert code == 0, err
        out = " ".join(out.split())
        assert f"weights of layers │ {kind} │" in out
        if extension_available():
            assert ("loop │ cpu" in out) == (dtype != "fp16")
        code, out, err = call(
            capsys, "evaluate", trained, "-d", folder / "test.conll", "--dtype", dtype,
            "--timing-runs", 0, "--json",
        )  # fmt: skip
        assert code == 0 and json.loads(out)["scores"]["score"] > 0.5, err
    assert "│ int8 │" in " ".join(call(capsys, "info", trained, "--int8")[1].split())
    for given, message in (
        (("--dtype", "fp8"), "--dtype is 'fp8'; expected fp32, bf16, fp16"),
        (("--dtype", "fp32", "--int8"), "--int8 excludes --dtype fp32"),
    ):
        code, _, err = call(capsys, "predict", trained, folder / "test.conll", *given)
        assert code == 1 and message in err


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_where_and_which_are_handed_on(trained, folder, capsys, monkeypatch, command):
    seen, load = [], Tagger.from_pretrained

    def recorded(name, *args, device=None, revision=None, **kwargs):
        seen.append((name, device, revision))
        return load(trained, *args, **kwargs)

    monkeypatch.setattr(Tagger, "from_pretrained", recorded)
    monkeypatch.setattr(options, "check_model_name", lambda name: None)
    data = ("-d", folder / "test.conll") if command == "evaluate" else (folder / "test.conll",)
    for given, expected in (
        ((), (None, None)),
        (("--device", "cuda:1", "--revision", "v2"), ("cuda:1", "v2")),
    ):
        code, _, err = call(capsys, command, "owner/name", *data, *given)
        assert code == 0, err
        assert seen.pop() == ("owner/name", *expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["predict", "{folder}/nowhere"], "nowhere is neither a folder nor a name on the hub"),
        (
            ["train", "-m", "{folder}/no", "-d", "{folder}/dev.conll", "-o", "{folder}/x"],
            "no is neither a folder nor",
        ),
        (["predict", "{exits}", "{folder}/missing.txt"], "No such file.*missing.txt"),
        (["predict", "{exits}", "{folder}/test.conll", "--format", "xml"], "xml"),
        (["predict", "{exits}", "{folder}/x.txt"], "x.txt:2: 'b O' looks like conll"),
        (["predict", "{exits}", "{folder}/test.conll", "--output-format", "xml"], "expected jsonl"),
        (["predict", "{exits}", "{folder}/test.conll", "-o", "{folder}"], "is a folder"),
        (["predict", "{exits}", "{folder}/test.conll", "-o", "/proc/x/y"], "/proc/x"),
        (["predict", "{exits}", "--threshold", "2"], r"threshold has 2.0"),
        (["calibrate", "{exits}", "-d", "{folder}/dev.conll", "--max-loss", "nan"],
         "max_loss is nan"),
        (["predict", "{exits}", "--full-depth", "--window", "2"], "excludes --window"),
        (["evaluate", "{exits}", "-d", "{folder}/missing.conll"], "missing.conll"),
        (["evaluate", "{exits}", "-d", "{folder}/missing.conll", "--decoding", "x"],
         r"decoding is 'x'; expected one of \('argmax', 'constrained'\)"),
        (["predict", "{exits}", "{folder}/missing.conll", "--decoding", "x"], "decoding is 'x'"),
        (["evaluate", "{exits}", "-d", "{folder}/cars.conll", "--metric", "word_f1"], "not fit"),
        (["evaluate", "{exits}", "-d", "{folder}/cars.conll", "--metric", "f1"], "metric is 'f1'"),
        (["evaluate", "{exits}", "-d", "{folder}/test.conll", "--column", "5"], "column"),
        (["evaluate", "{exits}", "-d", "{folder}/test.conll", "--level", "word"], "'word'"),
        (["calibrate", "{exits}", "-d", "{folder}/dev.conll", "--target-speedup", "99"], "reaches"),
        (["train", "-m", "{folder}/gpt", "-d", "{folder}/dev.conll", "-o", "{folder}/x"], "gpt2"),
        (
            ["train", "-m", "{folder}/encoder", "-d", "{folder}/dev.conll", "-o", "{folder}/y",
             "--set", "no_such_thing=1"],
            "no_such_thing",
        ),
        *(
            (["train", "-m", "{folder}/none", "-d", "none", "-o", "{folder}/y", *option], message)
            for *option, message in (
                ("--epochs", "0", "epochs is 0.0; expected more than 0"),
                ("--epochs", "-1", "epochs is -1.0"),
                ("--learning-rate", "-1", "learning_rate is -1"),
                ("--head-learning-rate", "nan", "head_learning_rate is nan"),
                ("--seed", "-3", "seed is -3"),
                ("--metric", "f1", "metric is 'f1'"),
                ("--set", "bf16=maybe", "--set bf16=maybe: bf16 is 'maybe'; expected bool"),
                ("--set", "seed=3", "--set seed=3: seed has an option of its own: --seed"),
                ("-o", "{folder}/encoder", "holds a model of type 'bert'; expected a new folder"),
            )
        ),
        (["predict", "{exits}", "--speed", "2"], "speed is 2.0, but the tagger has no dial"),
        (["predict", "{exits}", "--speed", "fast"], "speed is 'fast'; expected a number or one of"),
        (["predict", "{exits}", "--speed", "2", "--window", "2"], "--speed excludes --window"),
        (["predict", "{exits}", "--speed", "2", "--full-depth"], "--full-depth excludes --speed"),
        (["predict", "{exits}", "--spans", "--output-format", "conll"], "--spans excludes"),
        (["calibrate", "{exits}", "-d", "none", "--max-disagreement", "0"], "--max-disagreement"),
        (["calibrate", "{exits}", "-d", "{folder}/dev.conll", "--max-disagreement", "0.01"],
         "got 32 sentences with words; expected at least"),
        (["adapt", "{folder}/hf", "-t", "{folder}/dev.conll", "-o", "{folder}/new"],
         "got 32 texts with words; expected at least"),
        (["adapt", "{folder}/hf", "-t", "none", "-o", "{folder}/hf"], "holds a model of type"),
        (["adapt", "{exits}", "-t", "none", "-o", "{exits}"], "is the folder of the model"),
        (["adapt", "{folder}/hf", "-t", "n.txt", "-o", "{folder}/n"], "no such file: n.txt"),
        (["adapt", "{folder}/no", "-t", "none", "-o", "{folder}/n"], "no is neither a folder nor"),
        (["adapt", "{folder}/hf", "-t", "x", "-o", "{folder}/n", "--confidence", "1"],
         "--confidence is 1.0"),
        (["adapt", "{folder}/hf", "-t", "x", "-o", "{folder}/n", "--epochs", "2"],
         "got --epochs without --tune"),
        (["adapt", "{folder}/hf", "-t", "x", "-o", "{folder}/n", "--column", "1"],
         "got --column without --data"),
        (["adapt", "{folder}/hf", "-t", "x", "-o", "{folder}/x.txt"], "x.txt is a file; expected"),
        (["adapt", "{folder}/hf", "-t", "none.txt", "-o", "."], "no such file: none.txt"),
        (["calibrate", "{exits}", "-d", "{folder}/dev.conll", "--timing-runs", "1"],
         "timing_runs without max_disagreement"),
        (["calibrate", "{exits}", "-d", "x", "--max-disagreement", "0.1", "--column", "1"],
         "got --column with --max-disagreement"),
        (["predict", "{exits}", "{folder}/dev.conll", "-o", ".", "--resume"], "is no file"),
        (["predict", "{exits}", "{folder}/x.txt", "-o", "{folder}/x.txt"], "is the input, .*x.txt"),
        (["info", "{folder}/x.txt"], "x.txt is a file; expected a model's folder"),
        (["adapt", "{folder}/hf", "-t", "{folder}/x.txt", "-o", "{folder}/n", "--seed", "-1"],
         "seed is -1; expected 0 to"),
        (["calibrate", "{folder}/encoder", "-d", "none"], "holds a model of type 'bert'"),
        (["calibrate", "{folder}", "-d", "none"], "holds no model; expected a tagger"),
        (["calibrate", "owner/name", "-d", "none"], "no folder.*saved to a folder first"),
        (["calibrate", "{exits}", "-d", "none", "--metric", "f1"], "metric is 'f1'"),
        (["calibrate", "{exits}", "-d", "none", "--report", "{exits}/a"], "a is a file"),
        (["calibrate", "{exits}", "-d", "{folder}/outside.conll"], "no entity"),
        (["calibrate", "{exits}", "-d", "{folder}/cars.conll", "--max-loss", "0.1"],
         "the data has the labels .*B-CAR.*, of which the tagger knows none; expected some of"),
        (["calibrate", "{exits}", "-d", "{folder}/dev.conll", "--confidence", "0.8"],
         "got --confidence without --max-disagreement"),
        (["calibrate", "{exits}", "-d", "{folder}/dev.conll", "--max-loss", "0.1", "--original",
          "{folder}/encoder"], "the original's classifier, after layer 4, was never trained"),
        (["predict", "{folder}/bare"], "bare has no tokenizer that can be loaded; expected its"),
        (["predict", "{folder}/bare-hf"], "of special tokens only; expected one with its vocab"),
        (["evaluate", "{folder}/bare-hf", "-d", "{folder}/dev.conll"], "of special tokens only"),
        (["info", "{folder}/gpt/.."], "holds no model, as it has no config.json"),
        (["predict", "{folder}/encoder"], "has no classifier yet.*at layer 4 were"),
        (["evaluate", "{folder}/encoder", "-d", "{folder}/dev.conll"], "has no classifier yet"),
        (["self-sample", "-m", "{folder}/hf", "-d", "{folder}/dev.conll", "-o", "{folder}/y"],
         "has no exits yet: those at layer 1, 2, 3"),
        (["predict", "{folder}/hf", "--threshold", "0.1"], "at layer 1, 2, 3.*or --full-depth"),
        (["evaluate", "{exits}", "-d", "{folder}/dev.conll", "--revision", "v1"],
         "got --revision v1 for a folder, .*exits; expected a name on the hub"),
        (["train", "-m", "{folder}/hf", "-d", "{folder}/no.conll", "-o", "{folder}/y",
          "--neighbor-heads", "some"], "got --neighbor-heads some; expected none, below or all"),
        (["adapt", "{folder}/hf", "-t", "{folder}/no.txt", "-o", "{folder}/y",
          "--neighbor-heads", "all"], "got --neighbor-heads all; expected none or below"),
        (["train", "-m", "{folder}/hf", "-d", "{folder}/cars.conll", "-o", "{folder}/y"],
         "expected labels in common, or --new-classifier"),
        (
            ["train", "-m", "{folder}/encoder", "-d", "{folder}/dev.conll", "-o", "{exits}/a/b"],
            "exits/a",
        ),
        (["train", "-m", "{folder}/encoder", "-d", "{folder}/outside.conll", "-o", "{folder}/y"],
         "the training data has no label but 'O'; expected two or more"),
        (["train", "-m", "{folder}/encoder", "-d", "{folder}/dev.conll", "-o", "{folder}/y",
          "--dev", "{folder}/bare.conll"], "bare.conll has words without labels; expected"),
        (["evaluate", "{exits}", "-d", "{folder}/bare.conll"], "bare.conll has words without"),
        (["adapt", "{folder}/hf", "-t", "none", "-o", "{folder}/n", "--tune", "--resume"],
         "--resume: no complete checkpoint is in .*n-checkpoints; expected one"),
    ],
)  # fmt: skip
def test_errors_are_one_line(trained, folder, capsys, arguments, message):
    (trained / "a").write_text("")
    (folder / "gpt").mkdir(exist_ok=True)
    (folder / "x.txt").write_text("a B-X\nb O\n")
    (folder / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "cars.conll").write_text("red B-CAR\n")
    (folder / "outside.conll").write_text("red O\n")
    (folder / "bare.conll").write_text("red\n")
    for name, model in (("bare", trained), ("bare-hf", folder / "hf")):  # without the tokenizer
        (folder / name).mkdir(exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(model / file, folder / name)
    filled = [a.format(folder=folder, exits=trained) for a in arguments]
    before = contents(folder)
    code, out, err = call(capsys, *filled)
    assert code != 0 and not out and contents(folder) == before
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize(
    "command", [["train", "-m", "x", "-d"], ["self-sample", "-m", "x", "-d"], ["adapt", "x", "-t"]]
)
def test_an_output_of_no_name_is_refused(command, capsys):
    code, out, err = call(capsys, *command, "x", "-o", "")
    assert code == 2 and not out and "is empty; expected a folder" in " ".join(err.split()), err


def test_version_and_short_help(capsys):
    code, out, _ = call(capsys, "--version")
    assert (code, out) == (0, f"tokenexit {metadata.version('tokenexit')}\n")
    names = [*typer.main.get_command(cli.app).commands]
    assert {"train", "self-sample", "info"} < set(names)
    for command in ([], *([name] for name in names)):
        short, long = (call(capsys, *command, flag) for flag in ("-h", "--help"))
        assert short == long and long[0] == 0 and "Usage: " in long[1]


def test_runs_as_a_module():
    command = [sys.executable, "-m", "tokenexit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"tokenexit {tokenexit.__version__}\n")


def test_a_device_that_torch_was_not_built_for(trained, folder, capsys, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.nn.Module, "to", refuse)
    texts = folder / "test.conll"
    for command in (
        ("predict", trained, texts),
        ("adapt", folder / "hf", "-t", texts, "-o", folder / "n"),
    ):
        code, _, err = call(capsys, *command, "--device", "cuda")
        assert code == 1
        assert err.endswith("error: --device is 'cuda': Torch not compiled with CUDA enabled\n")


def test_weights_of_16_bits_are_trained_in_fp32(folder, capsys, tmp_path):
    """Pure half precision loses the steps, or has no number for them."""
    half = transformers.AutoModel.from_pretrained(folder / "encoder", dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "encoder")
    tokenizer.save_pretrained(tmp_path / "half")
    code, _, err = call(
        capsys, "train", "-m", tmp_path / "half", "-d", folder / "dev.conll",
        "-o", tmp_path / "tagger", "--epochs", 1, *SETTINGS,
    )  # fmt: skip
    assert code == 0 and "in float16, are trained and saved in fp32" in err, err
    assert Tagger.from_pretrained(tmp_path / "tagger").model.dtype == torch.float32


@pytest.mark.parametrize("name", ["train", "self-sample", "evaluate", "predict", "calibrate"])
def test_numbers_have_an_end(capsys, name):
    required = {"train": ("-m", "x", "-d", "x", "-o", "x"), "predict": ("x",)}
    required["self-sample"] = required["train"]
    arguments = required.get(name, ("x", "-d", "x"))
    code, _, err = call(capsys, name, *arguments, "--batch-size", 10**20)
    assert code == 2 and "Invalid value for '--batch-size'" in err


def test_usage(capsys):
    code, out, err = call(capsys, "predict")
    assert code == 2 and "Missing argument" in err
    for command in (
        "adapt",
        "train",
        "self-sample",
        "calibrate",
        "evaluate",
        "predict",
        "demo",
        "info",
    ):
        code, out, err = call(capsys, command, "--help")
        assert code == 0 and f"tokenexit {command}" in out
