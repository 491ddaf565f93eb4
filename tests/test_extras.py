"""What works without the packages of extras, and what is said of the rest."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires

import pytest
import torch
from random_models import random_classifier
from test_dial import sentences

import tokenexit
from tokenexit import Tagger, cli

WITHOUT = """
import json, sys
for name in ("datasets", "accelerate", "matplotlib", "seqeval", "sklearn", "pandas"):
    sys.modules[name] = None
import tokenexit
from tokenexit import Tagger, cli

tagger = Tagger.from_pretrained("tagger")
print([(span.type, span.text) for span in tagger.tag(["new york"])[0].spans])
words = json.load(open("words.json"))
adapted = tokenexit.adapt("hf", words, max_disagreement=0.3, timing_runs=0)
print(adapted.calibration.dial.sentences)
adapted.tagger.save_pretrained("adapted")
promise = ["-d", "texts.txt", "--max-disagreement", "0.3", "--timing-runs", "0"]
for arguments in (
    ["predict", "tagger", "in.txt"],
    ["calibrate", "adapted", *promise, "--json"],
    ["evaluate", "tagger", "-d", "in.conll"],
):
    sys.argv = ["tokenexit", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        print(arguments[0], stop.code or 0)
"""


@pytest.mark.slow
def test_tagging_and_adapting_want_no_extras(tiny_tokenizer, tmp_path):
    tokenizer, names = tiny_tokenizer(), {0: "B-LOC", 1: "I-LOC"}
    ids = {"id2label": names, "label2id": {x: i for i, x in names.items()}}
    hf = random_classifier(vocab_size=len(tokenizer), labels=2, **ids)
    with torch.no_grad():
        hf.classifier.bias.copy_(torch.tensor([100.0, 0.0]))
    for part in (hf, tokenizer):
        part.save_pretrained(tmp_path / "hf")
    Tagger(tokenexit.convert(hf, tokenizer), tokenizer).save_pretrained(tmp_path / "tagger")
    (tmp_path / "in.txt").write_text("paris\n")
    (tmp_path / "in.conll").write_text("paris B-LOC\n")
    (tmp_path / "words.json").write_text(json.dumps(sentences(80)))
    (tmp_path / "texts.txt").write_text("".join(" ".join(s) + "\n" for s in sentences(60, 1)))
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    spans, held, row, *ends = done.stdout.splitlines()
    assert json.loads(ends.pop(1))["dial"]["max_disagreement"] == 0.3
    assert spans == "[('LOC', 'new'), ('LOC', 'york')]" and held == "40"
    assert json.loads(row)["labels"] == ["B-LOC"] and ends == [
        "predict 0",
        "calibrate 0",
        "evaluate 1",
    ]
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ") and "pip install 'tokenexit[train]'" in error


def test_each_package_of_an_extra_is_named_by_it():
    of = re.compile(r"(\w+).*extra == ['\"](train|plot)['\"]")
    assert cli._EXTRAS == dict(x.groups() for x in map(of.match, requires("tokenexit")) if x)
