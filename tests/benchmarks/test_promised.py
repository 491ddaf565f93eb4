"""The splits of `benchmarks/promised.py`: promises that fail are counted."""

import numpy as np
import promised
import pytest
import torch
from datasets import Dataset
from random_models import random_classifier
from test_dial import GRID, sentences

import tokenexit
from tokenexit import ExitPolicy, Speed, Tagger
from tokenexit.calibrate import make_dial


def step(rng, risk, speedup, count=3000):
    losses = (rng.random(count) < risk).astype(float)
    speed = Speed(ExitPolicy(), speedup, risk, 1.0, 6 / speedup)
    return promised.Step(speed, losses, losses + 0.05, 1 - risk)


def test_what_splits_come_to():
    rng = np.random.default_rng(0)
    steps = [step(rng, risk, v) for risk, v in ((0.0, 1.0), (0.001, 2.0), (0.01, 3.0), (0.5, 4.0))]
    steps[0].later[:] = 0
    row = promised.split(steps, 0.02, 1000, splits=50)
    assert row["failed"] == row["nothing"] == 0 and row["failed_later"] == 1  # 5 % there
    assert 2.5 < row["speedup"] <= 3 and 2 <= row["mean_exit_layer"] < 2.4
    assert 0.005 < row["disagreement"] < 0.015 and 0.99 <= row["score"] < 0.994
    few = promised.split(steps, 0.02, 50, splits=50)
    assert few["nothing"] == 1 and few["speedup"] == 1 and few["failed"] == few["failed_later"] == 0
    edge = promised.split([steps[0], step(rng, 0.0201, 2.0)], 0.02, 1000, splits=200)
    assert edge["failed"] < 0.15 < 0.3 < edge["failed_untested"]
    assert promised.split(steps, 0.02, 1000, splits=50) == row


def test_a_promise_without_a_test_is_found_to_fail(monkeypatch):
    """The count is not blind: steps taken by their means alone fail about half of the time."""
    rng = np.random.default_rng(1)
    steps = [step(rng, 0.0, 1.0), step(rng, 0.02, 2.0)]
    by_mean = lambda known, bound, _: 1 + int(known[1].mean() < bound)  # noqa: E731
    monkeypatch.setattr(promised, "fixed_sequence", by_mean)
    row = promised.split(steps, steps[1].losses.mean() + 1e-9, 1000, splits=200)
    assert row["failed"] == row["failed_untested"] > 0.3


def test_the_worst_that_can_be():
    rng = np.random.default_rng(2)
    steps = [step(rng, risk, 2.0) for risk in (0.0, 0.005, 0.02, 0.2)]
    rows = [{"tested": n, **promised.at_the_edge(steps, n, draws=300)} for n in (500, 1000)]
    for row in rows:
        assert row["steps"] == 2 and 0.005 < row["mean_passed"] <= row["most_passed"] < 0.16
    assert "(of 2 steps" in promised.edges(rows) and "draws of 1,000 sentences" in promised.edges(
        rows
    )


def test_a_path_is_run_with_real_exits(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    model = tokenexit.convert(random_classifier(vocab_size=len(tokenizer)), tokenizer).double()
    with torch.no_grad():
        for head in model.exit_heads[:-1]:
            head.weight.copy_(model.exit_heads[-1].weight + 0.05 * torch.randn_like(head.weight))
    tagger, words = Tagger(model.eval(), tokenizer), sentences(100)
    dial = make_dial(tagger, words, 0.3, 0.9, known=sentences(40, seed=1), policies=GRID).dial
    labels = [tagged.labels for tagged in tagger.tag(words, ExitPolicy.never())]
    kept = Dataset.from_dict({"words": words, "labels": labels})
    steps = promised.run_path(tagger, dial.speeds, kept, sentences(30, seed=2))
    assert len(steps) == len(dial.speeds) > 1 and steps[0].score == 1
    for one, speed in zip(steps, dial.speeds, strict=True):
        assert one.losses.shape == (100,) and one.later.shape == (30,)
        assert one.speed.disagreement == pytest.approx(speed.disagreement)
        assert one.speed.speedup == pytest.approx(speed.speedup)
    rows = [{"bound": 0.3, "tested": 60, **promised.split(steps, 0.3, 60, splits=20)}]
    head, line, row = promised.table(rows).splitlines()
    assert head.count("|") == line.count("|") == row.count("|") and "| 30.0% | 60 |" in row
