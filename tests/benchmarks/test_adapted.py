"""`benchmarks/adapted.py`: which speed is taken, and what is reported. No times."""

import adapted
import harness
import pytest
import torch
from datasets import Dataset
from random_models import random_classifier
from test_dial import SPEEDS, sentences

import tokenexit
from tokenexit import Dial, ExitPolicy, Speed, Tagger


def test_the_fastest_that_is_not_worse():
    scores = dict(zip(SPEEDS, [0.8, 0.81, 0.79, 0.7], strict=True))
    assert adapted.equal(SPEEDS, scores.get, 0.79) == SPEEDS[2]
    assert adapted.equal(SPEEDS, scores.get, 0.8) == SPEEDS[1]
    assert adapted.equal(SPEEDS, scores.get, 0.82) is None


@pytest.mark.slow
def test_rows_and_pages(tiny_tokenizer, tmp_path, monkeypatch):
    """With transformers in the place of the rival, which tests do without."""
    tokenizer = tiny_tokenizer()
    names = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    ids = {"id2label": names, "label2id": {x: i for i, x in names.items()}}
    theirs = random_classifier(vocab_size=len(tokenizer), **ids)
    speeds = (
        Speed(ExitPolicy.never(), 1.0, 0.0, 0.0, 4.0),
        Speed(ExitPolicy(threshold=0.9, window=0), 2.0, 0.1, 0.2, 2.0),
    )
    taggers = {}
    for dtype in ("fp32", "int8"):
        model = tokenexit.convert(theirs, tokenizer).eval()
        if dtype == "int8":
            tokenexit.quantize(model)
        model.dial = Dial(speeds, 1, 0.3, 0.9, 100)
        taggers[dtype] = Tagger(model, tokenizer)
    words = sentences(40)
    labels = [x.labels for x in taggers["fp32"].tag(words, ExitPolicy.never())]
    data = Dataset.from_dict({"words": words, "labels": labels})
    monkeypatch.setattr(adapted, "PEERS", ("Hugging Face sdpa",))
    monkeypatch.setattr(adapted, "RIVAL", "Hugging Face sdpa")
    rows = adapted.measure(
        theirs, taggers, data, data, words[:2], cases=((1, 3), (32, 40)), budget_s=0
    )
    systems = [(row["system"], row.get("exits")) for row in rows if row["batch"] == 1]
    assert systems == [(row["system"], row.get("exits")) for row in rows if row["batch"] == 32]
    assert systems[:3] == [
        ("Hugging Face sdpa", None), ("tokenexit", "full depth"), ("tokenexit", "equal F1"),
    ]  # fmt: skip
    found = {(row["system"], row.get("exits")): row for row in rows if row["batch"] == 32}
    assert found["Hugging Face sdpa", None]["f1"] == found["tokenexit", "full depth"]["f1"] == 1
    assert found["tokenexit", "equal F1"]["policy"] == "full depth"  # bolder ones are worse
    assert found["tokenexit", "promised"]["f1"] < 1 and "threshold" in str(
        found["tokenexit", "promised"]["policy"]
    )
    assert found["Hugging Face sdpa", None]["over_rival"] == 1

    facts = {"adapt_s": {"fp32": 61.0, "int8": 62.0}, "disagreement_at": [(2, 0.004)]}
    facts |= {"device": "A processor", "features": "avx2", "date": "2026-11-27T21:00:00"}
    pages = [tmp_path / "docs" / "adapt.md", tmp_path / "README.md"]
    pages[0].parent.mkdir()
    for page in pages:
        page.write_text("# A page\n<!-- adapted -->\n<!-- /adapted -->\n")
    adapted.publish(rows, facts, pages)
    first, second = (page.read_text() for page in pages)
    assert "took 61 s, with `--int8` 62 s" in first and "99.60% of the labels stay" in first
    assert "(adapted.png)" in first and "(docs/adapted.png)" in second
    assert "Two threads of A processor (avx2), 2026-11-27." in second
    assert "61 s" not in second and "| **tokenexit int8, promised** |" in second
    assert (tmp_path / "docs" / "adapted.png").read_bytes().startswith(b"\x89PNG")
    for page in adapted.PAGES:
        assert "<!-- adapted -->" in page.read_text()
    with torch.no_grad():
        theirs.classifier.bias.add_(1)
    with pytest.raises(AssertionError, match="tokenexit|fp32"):
        adapted.measure(theirs, taggers, data, data, words[:2], cases=((1, 3),), budget_s=0)
    assert harness.read("adapted", tmp_path) == []


def test_a_table_of_heads():
    def row(split, hears, promised, changed, f1):
        at = {"flops_speedup": 2.0, "disagreement": changed, "f1": f1}
        its = {"flops_speedup": promised, "disagreement": 0.0, "f1": f1 / 2}
        return {"split": split, "neighbor_heads": hears, "promised": its, "2": at, "3": at}

    rows = [row(0, False, 2.0, 0.01, 0.8), row(0, True, 3.0, 0.002, 0.9)]
    rows += [row(1, False, 2.5, 0.03, 0.6), row(1, True, 3.5, 0.004, 0.7)]
    lines = adapted.table_of_heads(rows).splitlines()
    assert lines[0].count("|") == lines[2].count("|") == 9
    assert lines[2] == "| plain | 2.00x | 2.50x | 0.3500 | 2.00% | 0.7000 | 2.00% | 0.7000 |"
    assert lines[3] == "| hearing | 3.00x | 3.50x | 0.4000 | 0.30% | 0.8000 | 0.30% | 0.8000 |"
