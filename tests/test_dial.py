"""The dial: what calibration with a promise measures, and how a tagger is set to a speed."""

import copy
import dataclasses
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from random_models import random_batch, random_classifier, random_tagger

import tokenexit
from tokenexit import Dial, ExitPolicy, Speed, Tagger
from tokenexit import calibrate as calibration
from tokenexit.calibrate import (
    Point,
    _by_speed,
    _rising,
    calibrate,
    for_path,
    make_dial,
    policy_grid,
    promise_grid,
)
from tokenexit.dial import rounded_down
from tokenexit.promise import fixed_sequence, needed, upper_bound

ROOT = Path(__file__).parents[1]
WORDS = ["john", "smiths", "lives", "in", "new", "york", "paris", "xyz", "the", "red"]
GRID = policy_grid(windows=(0, 2), thresholds=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
BOUND = 0.2

SPEEDS = tuple(
    Speed(ExitPolicy(threshold=t), s, d, b, 4.0, w)
    for t, s, d, b, w in (
        (0.0, 1.0, 0.0, 0.0, 1.0),
        (0.1, 1.5, 0.001, 0.004, 1.4),
        (0.3, 2.5, 0.004, 0.009, None),
        (0.5, 3.5, 0.02, 0.03, 2.9),
    )
)
DIAL = Dial(SPEEDS, promised=2, max_disagreement=0.01, confidence=0.9, sentences=700)


def sentences(count, seed=0):
    """All different."""
    g, found = torch.Generator().manual_seed(seed), {}
    while len(found) < count:
        n = int(torch.randint(2, 9, (), generator=g))
        found[tuple(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=g))] = 1
    return [list(words) for words in found]


@pytest.fixture(scope="module")
def tagger(tiny_tokenizer):
    """Exits lose labels, more at bolder policies: heads are the last one, blurred."""
    tokenizer = tiny_tokenizer()
    model = tokenexit.convert(random_classifier(vocab_size=len(tokenizer)), tokenizer).double()
    with torch.no_grad():
        for head in model.exit_heads:
            head.weight.copy_(model.exit_heads[-1].weight)
            head.bias.copy_(model.exit_heads[-1].bias)
        for head in model.exit_heads[:-1]:
            head.weight.add_(0.05 * torch.randn_like(head.weight))
    return Tagger(model, tokenizer, batch_size=16)


@pytest.fixture(scope="module")
def found(tagger):
    return make_dial(tagger, [*sentences(200), []], BOUND, 0.9, policies=GRID, timing_runs=1)


def parts(count, seed=0):
    """The sentences that the path is chosen by, and the others."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    every = sentences(count)
    shuffled = [every[i] for i in order]
    return shuffled[: for_path(count)], shuffled[for_path(count) :]


def test_what_is_measured_is_so(tagger, found):
    dial, (_, apart) = found.dial, parts(200)
    assert dial.sentences == len(apart) == 140
    assert (dial.max_disagreement, dial.confidence, dial.dtype) == (BOUND, 0.9, "float64")
    whole = [tagged.labels for tagged in tagger.tag(apart, ExitPolicy.never())]
    losses = []
    for speed in dial.speeds:
        tagged = tagger.tag(apart, speed.policy)
        loss = [
            sum(a != b for a, b in zip(one.labels, labels, strict=True)) / len(labels)
            for one, labels in zip(tagged, whole, strict=True)
        ]
        assert speed.disagreement == pytest.approx(np.mean(loss))
        assert speed.mean_exit_layer == pytest.approx(
            np.mean([x for one in tagged for x in one.exit_layers])
        )
        assert speed.wall_speedup > 0
        losses.append(loss)
    assert [speed.bound for speed in dial.speeds[1:]] == [
        pytest.approx(upper_bound(loss, 0.9)) for loss in losses[1:]
    ]
    assert dial.promised == fixed_sequence(losses, BOUND, 0.9) - 1 >= 1
    first = dial.speeds[0]
    assert (first.policy.threshold, first.speedup, first.disagreement, first.bound) == (0, 1, 0, 0)
    assert found.chosen.policy == dial.at("promised").policy and found.needed is None
    assert [p.policy for p in found.verified] == [s.policy for s in dial.speeds[1:]]
    assert tagger.model.policy == ExitPolicy.never() and tagger.model.dial is None  # not changed


def test_a_promise_of_each_layer(tagger, found):
    """The bound is that of the worst layer, of the words that left by it; few are not asked."""
    words = sentences(200)
    dial = make_dial(tagger, words, BOUND, 0.9, policies=GRID, per_layer=True).dial
    assert dial.per_layer and "by each layer, too; tested" in dial.promise
    assert [s.policy for s in dial.speeds] == [s.policy for s in found.dial.speeds]
    _, apart = parts(200)
    whole = [tagged.labels for tagged in tagger.tag(apart, ExitPolicy.never())]
    kinds, least = [], needed(BOUND, 0.9)
    for speed in dial.speeds:
        tagged = tagger.tag(apart, speed.policy)
        losses = []
        for layer in (4, 1, 2, 3):
            rows = [
                [a != b for a, b, x in zip(t.labels, w, t.exit_layers, strict=True) if x <= layer]
                for t, w in zip(tagged, whole, strict=True)
            ]
            rows = [np.mean(row) for row in rows if row]
            losses += [rows] if len(rows) >= least else []
        kinds.append(tuple(losses))
        if speed is not dial.speeds[0]:
            assert speed.bound == pytest.approx(max(upper_bound(x, 0.9) for x in losses))
    assert any(len(losses) > 2 for losses in kinds)
    assert dial.promised == fixed_sequence(kinds, BOUND, 0.9) - 1 <= found.dial.promised
    for one, other in zip(dial.speeds[1:], found.dial.speeds[1:], strict=True):
        assert one.bound >= other.bound and one.disagreement == other.disagreement


def test_a_promise_of_each_type(tagger, found):
    """By the labels at full depth; the bound is that of the worst type."""
    names = tagger.model.config.id2label
    words = sentences(400)
    labels = [tagged.labels for tagged in tagger.tag(words, ExitPolicy.never())]
    counts = {name: sum(name in its for its in labels) for name in names.values()}
    common = [name for name in sorted(counts) if counts[name] > 200][:2]
    assert common, counts
    dial = make_dial(tagger, words, BOUND, 0.9, policies=GRID, per_type=common).dial
    assert dial.per_type == tuple(x for x in names.values() if x in common)
    assert f"each type by itself ({', '.join(dial.per_type)}), too; tested" in dial.promise
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
    apart = [words[i] for i in order][for_path(400) :]
    whole = [tagged.labels for tagged in tagger.tag(apart, ExitPolicy.never())]
    kinds = []
    for speed in dial.speeds:
        tagged = tagger.tag(apart, speed.policy)
        losses = {None: [], **{name: [] for name in common}}
        for t, w in zip(tagged, whole, strict=True):
            for name, its in losses.items():
                rows = [a != b for a, b in zip(t.labels, w, strict=True) if name in (None, b)]
                its += [np.mean(rows)] if rows else []
        for name in common:
            assert speed.by_type[name] == pytest.approx(np.mean(losses[name]))
        kinds.append(tuple(losses.values()))
        if speed is not dial.speeds[0]:
            assert speed.bound == pytest.approx(max(upper_bound(x, 0.9) for x in losses.values()))
    assert dial.promised == fixed_sequence(kinds, BOUND, 0.9) - 1
    saved = json.loads(json.dumps(dial.to_dict()))
    assert Dial.from_dict(saved) == dial and hash(dial) == hash(Dial.from_dict(saved))
    del saved["per_type"], saved["speeds"][0]["by_type"]  # as older versions saved it
    assert Dial.from_dict(saved).per_type == ()


def test_too_little_text_for_a_type_is_told(tagger):
    names = tagger.model.config.id2label
    words, least = sentences(200), needed(BOUND, 0.9)
    rare, common = names[0], names[1]
    labels = [[rare if i == 0 and not n % 20 else common for i in range(len(x))]
              for n, x in enumerate(words)]  # fmt: skip
    ask = {"policies": GRID, "reference": labels}
    with pytest.raises(ValueError) as told:
        make_dial(tagger, words, BOUND, 0.9, per_type=True, **ask)
    tested, text = 140, str(told.value)
    has = int(text.partition(f"{rare} (")[2].split(",")[0])
    assert 0 < has < least and f"at least {least} of the {tested} that are tested" in text
    wanted = math.ceil(least * tested / has)
    enough = next(n for n in range(1000) if n - for_path(n) >= wanted)
    assert f"{rare} ({has}, about {enough} would do)" in text
    assert f"{names[2]} (0)" in text and common not in text.replace(rare, "")
    make_dial(tagger, words, BOUND, 0.9, per_type=[common], **ask)
    for wrong, error, message in (
        (["PER", common], ValueError, "per_type has 'PER'; expected types"),
        ("PER", TypeError, "per_type is 'PER'; expected True, False or a list"),
    ):
        with pytest.raises(error, match=message):
            make_dial(tagger, words, BOUND, 0.9, per_type=wrong)
    data = Dataset.from_dict({"words": words, "labels": labels})
    with pytest.raises(ValueError, match="got per_layer, per_type or timing_runs without max_dis"):
        calibrate(tagger, data, max_loss=0.1, per_type=True)


def test_how_much_would_do_of_which_few_have_a_type(tagger, monkeypatch):
    rare, common = (tagger.model.config.id2label[i] for i in range(2))
    words, (_, tested) = sentences(200), parts(200)
    short = {tuple(x) for x in tested if len(x) < 4}
    labels = [[rare if tuple(x) in short else common] * len(x) for x in words]
    monkeypatch.setattr(calibration.promise, "needed", lambda *_: 9)  # of whatever is looked at
    monkeypatch.setattr(calibration.promise, "fixed_sequence", lambda *_: 0)
    found = make_dial(tagger, words, BOUND, policies=GRID, reference=labels, per_type=[rare])
    wanted = math.ceil(9 * len(tested) / len(short))
    assert wanted > 9 and found.needed - for_path(found.needed) == wanted


def test_nothing_is_chosen_by_what_is_tested(tagger, found, monkeypatch):
    """The path is the same whatever the labels of the others are, which decide how far it goes."""
    first, apart = parts(200)
    labels = {tuple(t.words): t.labels for t in tagger.tag(first, ExitPolicy.never())}
    wrong = [labels.get(tuple(words), ["?"] * len(words)) for words in sentences(200)]
    other = make_dial(tagger, sentences(200), BOUND, 0.9, policies=GRID, reference=wrong)
    assert [s.policy for s in other.dial.speeds] == [s.policy for s in found.dial.speeds]
    assert {s.disagreement for s in other.dial.speeds} == {1.0}
    assert other.dial.promised is None and other.needed is None
    assert other.chosen.policy.threshold == 0
    with pytest.raises(ValueError, match="speed is 'promised', but nothing is"):
        other.dial.at("promised")

    run, seen = calibration.tag_windows, []

    def recorded(tagger, windows, policy):
        seen.append((policy, {tuple(w.input_ids) for w in windows}))
        return run(tagger, windows, policy)

    monkeypatch.setattr(calibration, "tag_windows", recorded)
    make_dial(tagger, sentences(200), BOUND, 0.9, policies=GRID)
    texts = [{tuple(w.input_ids) for w in tagger.windows(part)} for part in (first, apart)]
    path = [speed.policy for speed in found.dial.speeds]
    assert [policy for policy, text in seen if text == texts[1]] == path
    assert seen[-len(path) :] == [(policy, texts[1]) for policy in path]
    assert all(text == texts[0] for _, text in seen[1 : -len(path)])


def test_the_path_may_be_found_with_other_sentences(tagger, found):
    """Then all are tested on, and those of the path not."""
    first, apart = parts(200)
    dial = make_dial(tagger, [*apart, []], BOUND, 0.9, policies=GRID, known=first).dial
    assert dial.sentences == 140
    assert [s.policy for s in dial.speeds] == [s.policy for s in found.dial.speeds]
    for one, other in zip(dial.speeds, found.dial.speeds, strict=True):
        assert one.disagreement == pytest.approx(other.disagreement)
    labels = [[t.labels for t in tagger.tag(x, ExitPolicy.never())] for x in (apart, first)]
    again = make_dial(
        tagger, apart, BOUND, 0.9, policies=GRID, known=[*first, []], reference=labels[0],
        known_reference=[*labels[1], []],
    ).dial  # fmt: skip
    assert [s.policy for s in again.speeds] == [s.policy for s in dial.speeds]
    assert [s.disagreement for s in again.speeds] == [s.disagreement for s in dial.speeds]
    least = needed(BOUND, 0.9)
    few = make_dial(tagger, apart[:least], BOUND, 0.9, policies=GRID, known=first).dial
    assert few.sentences == least


def test_another_seed_tests_other_sentences(tagger, found):
    dial = make_dial(tagger, sentences(200), BOUND, 0.9, policies=GRID, seed=3).dial
    _, apart = parts(200, seed=3)
    pairs = [tagger.tag(apart, p) for p in (dial.speeds[-1].policy, ExitPolicy.never())]
    losses = [np.not_equal(a.labels, b.labels).mean() for a, b in zip(*pairs, strict=True)]
    assert dial.speeds[-1].disagreement == pytest.approx(np.mean(losses))
    assert apart != parts(200)[1]


def test_steps_that_a_faster_one_beats_by_chance_stay():
    policy = ExitPolicy()
    points = [Point(policy, s, v) for s, v in ((0.99, 3), (0.98, 1), (0.988, 2), (0.995, 2.5))]
    assert [p.speedup for p in _rising(points, 0.01)] == [2, 2.5, 3]


def test_cautious_steps_stay_though_bolder_ones_look_as_good():
    policy = ExitPolicy()
    points = [Point(policy, 1.0, 1 + i / 10) for i in range(30)]
    points += [Point(policy, 0.9, p.speedup + 0.001) for p in points]
    steps = _by_speed(points)
    assert 15 < len(steps) <= 24 and steps[0].speedup == 1.1 and steps[-1].speedup == 3.9
    assert all(step.score == 1 for step in steps)
    assert _by_speed([Point(policy, 1.0, 1.0)]) == []


def test_another_model_may_be_what_is_held_against(tagger, found):
    """Where full depth is not what counts, it is tested like any other."""
    same = [t.labels for t in tagger.tag(sentences(200), ExitPolicy.never())]
    other = make_dial(tagger, sentences(200), BOUND, 0.9, policies=GRID, reference=same)
    assert other.dial.promised == found.dial.promised
    assert 0 < other.dial.speeds[0].bound < BOUND and other.dial.speeds[0].disagreement == 0


def test_the_speeds_of_a_dial_share_a_criterion(tagger, found):
    """The one whose simulated exits are fastest within the bound."""
    other = [policy.replace(criterion="max_prob") for policy in GRID]
    alone = make_dial(tagger, sentences(200), BOUND, 0.9, policies=other)
    both = make_dial(tagger, sentences(200), BOUND, 0.9, policies=[*other, *GRID])
    fastest = [
        max(point.speedup for point in one.simulated if point.score >= 1 - BOUND)
        for one in (alone, found)
    ]
    assert fastest[0] != fastest[1]
    best = (alone, found)[fastest[1] > fastest[0]].dial
    assert [s.policy for s in both.dial.speeds] == [s.policy for s in best.speeds]
    mixed = tagger.tag(sentences(3), [speed.policy for speed in both.dial.speeds[:3]])
    assert len(mixed) == 3


def test_calibrate_promises(tagger):
    data = Dataset.from_dict({"words": sentences(200)})
    seen = []
    result = calibrate(
        tagger, data, max_disagreement=BOUND, policies=GRID, progress=lambda *x: seen.append(x)
    )
    assert result.metric == "agreement" and result.dial.promised >= 1
    assert result.chosen.speedup > 1
    assert json.loads(json.dumps(result.to_dict()))["dial"]["promised"] == result.dial.promised
    stages = ["simulate", "find the path", "test the path"]
    assert list(dict.fromkeys(what for what, *_ in seen)) == stages
    for stage in stages:
        last = [x for x in seen if x[0] == stage][-1]
        assert last[1] == last[2]


def test_what_is_asked_for_is_what_is_tested(tagger, monkeypatch):
    """Bound and confidence come to the tests as they were given, whoever asks."""
    seen = []

    def recorded(real):
        def called(*args):
            seen.append(args[0 if real is needed else 1 :][:2])
            return real(*args)

        return called

    for real in (fixed_sequence, upper_bound, needed):
        monkeypatch.setattr(calibration.promise, real.__name__, recorded(real))
    words = sentences(200)
    make_dial(tagger, words, 0.25, 0.85, policies=GRID)
    data = Dataset.from_dict({"words": words})
    calibrate(tagger, data, max_disagreement=0.25, confidence=0.85, policies=GRID)
    hf = tokenexit.to_hugging_face(tagger.model)
    tokenexit.adapt(
        hf, words, tagger.tokenizer, max_disagreement=0.25, confidence=0.85, timing_runs=0
    )
    assert {(0.25, 0.85), (0.85,)} == set(seen) and len(seen) > 9


def test_no_number_is_given_where_none_would_do(tagger):
    """The first step has to pass before the next: full depth, beside another reference."""
    bold, words = GRID[-1], sentences(200)
    reference = [one.labels for one in tagger.tag(words, bold)]
    disagrees = np.mean(
        [
            np.not_equal(a.labels, b).mean()
            for a, b in zip(tagger.tag(words, ExitPolicy.never()), reference, strict=True)
        ]
    )
    made = make_dial(tagger, words, 0.5 * disagrees, 0.9, policies=[bold], reference=reference)
    assert made.dial.promised is None and made.dial.speeds[-1].disagreement == 0
    assert made.needed is None


def test_few_sentences_and_none_known(tagger):
    made = make_dial(tagger, sentences(3), 0.5, 0.5, policies=GRID)
    assert made.dial.sentences == 2
    for known in ([], [[]]):
        with pytest.raises(ValueError, match="known has no sentence with words"):
            make_dial(tagger, sentences(100), BOUND, 0.9, policies=GRID, known=known)


def test_too_little_is_refused_with_how_much_would_do(tagger, found):
    least = needed(0.01, 0.9)
    with pytest.raises(ValueError, match=r"got 200 sentences.*expected at least (\d+)") as refused:
        make_dial(tagger, sentences(200), 0.01)
    enough = int(str(refused.value).split("at least ")[1].split(":")[0])
    assert enough - for_path(enough) >= least > enough - 1 - for_path(enough - 1)

    data = Dataset.from_dict({"words": sentences(200)})
    bold = found.dial.at("promised")
    near = {"max_disagreement": 1.05 * bold.disagreement, "policies": [bold.policy]}
    few = make_dial(tagger, data["words"], **near)
    assert few.dial.promised == 0 and few.needed > 200
    _, apart = parts(200)
    pairs = [tagger.tag(apart, policy) for policy in (bold.policy, ExitPolicy.never())]
    losses = [np.not_equal(a.labels, b.labels).mean() for a, b in zip(*pairs, strict=True)]
    fewest = needed(near["max_disagreement"], 0.9, losses)  # beside those for the path
    assert few.needed - for_path(few.needed) == fewest
    with pytest.raises(ValueError, match=f"200 sentences are too few.*about {few.needed} would do"):
        calibrate(tagger, data, **near)
    for wrong in ({"max_disagreement": 0.0}, {"max_disagreement": 2}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match=f"{[*wrong][0]} is .*expected a number between"):
            calibrate(tagger, data, **{"max_disagreement": 0.1, **wrong})
    with pytest.raises(ValueError, match="got both max_loss and max_disagreement"):
        calibrate(tagger, data, max_disagreement=0.1, max_loss=0.1)
    for other in ({"verify": 2}, {"metric": "accuracy"}):
        with pytest.raises(ValueError, match=f"got {[*other][0]} .*with max_disagreement"):
            calibrate(tagger, data, max_disagreement=0.1, **other)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"policies": []}, "got no policies; expected at least one"),
        ({"timing_runs": -1}, "timing_runs is -1; expected 0 or more"),
        ({"reference": [["a"]]}, "got labels of 1 sentences for 200"),
        ({"reference": [["a"]] * 200, "known": [["a"]]}, "expected known_reference if known and"),
        ({"known_reference": [["a"]]}, "expected known_reference if known and"),
    ],
    ids=str,
)
def test_what_a_dial_is_not_made_of(tagger, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_dial(tagger, sentences(200), 0.3, **wrong)


def test_a_dial_is_no_dict(tagger):
    with pytest.raises(TypeError, match="dial is a dict; expected a Dial"):
        tagger.model.dial = DIAL.to_dict()


def test_no_exits_that_hold_are_full_depth(tagger):
    """Where more text would not help, there is nothing to refuse."""
    bold = [ExitPolicy(threshold=1.0, window=0)]
    result = make_dial(tagger, sentences(200), 0.05, 0.9, policies=bold)
    assert result.chosen.policy.threshold == 0 and result.dial.promised == 0


def test_speeds_are_chosen_by_name_and_number():
    for speed, number in (
        ("full", 0), ("promised", 2), ("fastest", 3), (1, 0), (1.2, 1), (1.5, 1), (2.5, 2),
        ("2.6", 3), ("3.5x", 3), (np.float64(2), 2),
    ):  # fmt: skip
        assert DIAL.at(speed) == SPEEDS[number], speed
    with pytest.raises(ValueError, match="speed is 3.6; expected at most 3.50"):
        DIAL.at(3.6)
    for wrong in (0.5, float("nan"), float("inf"), "fast", "-1"):
        with pytest.raises(ValueError, match="speed is .*expected"):
            DIAL.at(wrong)
    for wrong in (None, True, [2.0]):
        with pytest.raises(TypeError, match="expected a number or one of"):
            DIAL.at(wrong)


def test_a_dial_is_saved_with_the_model(tmp_path):
    assert Dial.from_dict(json.loads(json.dumps(DIAL.to_dict()))) == DIAL
    model = random_tagger(dtype=torch.float32)
    with pytest.raises(ValueError, match="the tagger has no dial; expected one calibrated"):
        model.set_speed("full")
    model.dial = DIAL
    model.set_speed(2.0)
    model.save_pretrained(tmp_path)
    loaded = tokenexit.TokenExitForTokenClassification.from_pretrained(tmp_path)
    assert loaded.dial == DIAL and loaded.policy == SPEEDS[2].policy
    loaded.set_speed("full")
    assert loaded.policy == ExitPolicy.never()
    for wrong in ([], {"speeds": []}, {**DIAL.to_dict(), "promised": 4}, {"speeds": [{}]}):
        loaded.config.dial = wrong
        with pytest.raises(ValueError, match="the dial is"):
            loaded.set_speed("full")


def test_speeds_in_wall_clock():
    """By the times that were measured; where one was not, none can be asked for."""
    with pytest.raises(ValueError, match="speed is '2 wall', but speeds were not timed; expected"):
        DIAL.at("2 wall")
    walls = (1.0, 1.2, 1.1, 2.0)
    timed = zip(SPEEDS, walls, strict=True)
    dial = dataclasses.replace(
        DIAL, speeds=tuple(dataclasses.replace(speed, wall_speedup=wall) for speed, wall in timed)
    )
    for speed, number in (("1 wall", 0), ("1.15x wall", 1), ("1.2 wall", 1), ("1.3 wall", 3)):
        assert dial.at(speed) == dial.speeds[number]
    near = (*dial.speeds[:3], dataclasses.replace(SPEEDS[3], wall_speedup=1.20000049))
    near = dataclasses.replace(dial, speeds=near)
    assert near.at("1.2000004 wall") == near.speeds[3] and near.at("1.2 wall") == near.speeds[1]
    with pytest.raises(ValueError, match="speed is '?2.1 wall'?; expected at most 2.00"):
        dial.at("2.1 wall")
    with pytest.raises(ValueError, match="speed is 0.5 wall; expected 1 or more"):
        dial.at("0.5 wall")
    with pytest.raises(ValueError, match="speed is 'x wall'; expected a number or one of"):
        dial.at("x wall")
    model = random_tagger("bert", torch.float32)
    model.dial = dial
    model.set_speed("1.3 wall")
    assert model.policy == SPEEDS[3].policy


def test_the_dial_is_turned_while_others_tag(tiny_tokenizer):
    """Each call goes by one policy, whichever it met."""
    tokenizer = tiny_tokenizer()
    model = random_tagger(dtype=torch.float32, vocab_size=len(tokenizer))
    model.dial = Dial(
        tuple(Speed(ExitPolicy(threshold=t), 1 + t, 0, 0, 4.0) for t in (0.0, 0.8)), 0, 0.1, 0.9, 1
    )
    tagger, some = Tagger(model, tokenizer, batch_size=4), sentences(9)
    known = [tagger.tag(some, speed=speed) for speed in ("full", "fastest")]
    assert known[0] != known[1]
    results, stop = [], threading.Event()

    def turn():
        while not stop.is_set():
            model.set_speed("fastest")
            model.set_speed("full")

    turning = threading.Thread(target=turn)
    turning.start()
    try:
        for _ in range(40):
            results.append(tagger.tag(some))
    finally:
        stop.set()
        turning.join()
    assert all(result in known for result in results)


def test_speeds_of_a_tagger_and_of_its_calls(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    model = random_tagger(dtype=torch.float32, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="no dial"):
        Tagger(model, tokenizer, speed="full")
    policies = [ExitPolicy(threshold=t, window=0) for t in (0.0, 0.5, 0.8)]
    model.dial = Dial(
        tuple(Speed(p, n, 0, 0, 4.0) for n, p in enumerate(policies, 1)), 1, 0.1, 0.9, 1
    )
    tagger, some = Tagger(model, tokenizer, speed="promised"), sentences(9)
    expected = [tagger.tag(some, policy) for policy in policies]
    assert expected[0] != expected[1] != expected[2]
    assert tagger.tag(some) == expected[1] and model.policy == ExitPolicy.never()
    assert tagger.tag(some, speed="fastest") == expected[2]
    mixed = tagger.tag(some, speed=["full", 2, 3] * 3)
    assert mixed == [expected[i % 3][i] for i in range(9)]
    tagger.speed = None
    assert tagger.tag(some) == expected[0]
    with pytest.raises(ValueError, match="got both the policy .* and the speed 2"):
        tagger.tag(some, policies[0], speed=2)
    with pytest.raises(ValueError, match="speed is 9; expected at most 3.00"):
        tagger.speed = 9
    out = model(**random_batch((5,)), policy=model.speed("fastest").policy)
    assert int(out.exit_layers.max()) <= 4


@pytest.mark.parametrize(("seen", "warns"), [(4.0, False), (3.7, False), (3.5, True)])
def test_text_that_leaves_elsewhere_is_told_once(tiny_tokenizer, caplog, seen, warns):
    """All leave at the last of four layers; a tenth of these is what may differ."""
    tokenizer = tiny_tokenizer()
    model = random_tagger(dtype=torch.float32, vocab_size=len(tokenizer))
    model.dial = Dial((Speed(ExitPolicy.never(), 1.0, 0, 0, seen),), 0, 0.1, 0.9, 1)
    tagger, some = Tagger(model, tokenizer), sentences(150)
    for calls in range(8):
        assert len(caplog.records) == (warns and calls > 3)  # after 500 sentences
        tagger.tag(some, speed="full")
    tagger.tag(some * 4, ExitPolicy(threshold=0.1))  # which the dial does not have
    assert len(caplog.records) == warns
    if warns:
        assert "600 sentences left at layer 4.00 in the mean" in caplog.messages[0]
        assert "calibrated with at 3.50" in caplog.messages[0]


@torch.no_grad()
def test_text_that_changes_later_is_told_once(tiny_tokenizer, caplog):
    """All leave at the last of four layers; then, as of other text, at the first."""
    tokenizer = tiny_tokenizer()
    model = random_tagger(dtype=torch.float32, vocab_size=len(tokenizer))
    for head in [*model.exit_heads][:-1]:
        head.weight.zero_()
        head.bias.zero_()
    policy = ExitPolicy(threshold=0.5, window=0)
    model.dial = Dial((Speed(policy, 1.0, 0, 0, 4.0),), 0, 0.1, 0.9, 1)
    tagger, some = Tagger(model, tokenizer), sentences(150)
    for _ in range(9):
        tagger.tag(some, speed="full")
    assert not caplog.records
    model.exit_heads[0].bias[0] = 50
    for calls in range(12):
        assert len(caplog.records) == (calls > 2)  # 150 had left at the last since a comparison
        tagger.tag(some, speed="full")
    assert "600 sentences left at layer 1.75 in the mean" in caplog.messages[0]


def test_a_speed_that_is_shown_can_be_asked_for():
    times = zip(SPEEDS, (1, 1.499, 2.4961, 3.4567), strict=True)
    speeds = tuple(dataclasses.replace(one, speedup=speedup) for one, speedup in times)
    dial = dataclasses.replace(DIAL, speeds=speeds)
    for one in speeds:
        assert dial.at(float(rounded_down(one.speedup))) == one
    with pytest.raises(ValueError, match="expected at most 3.45,"):
        dial.at(3.46)
    assert [rounded_down(x) for x in (1, 1.15, 2.3, 2.999)] == ["1.00", "1.15", "2.30", "2.99"]


def test_what_the_docs_say_is_needed():
    """And the bound of half as many as is promised: by the test of test_promise's power."""
    text = (ROOT / "docs" / "promise.md").read_text()
    for bound, name in ((0.01, "1 %"), (0.005, "0.5 %")):
        assert f"| {name} | {needed(bound, 0.9)} |" in text


def test_a_promise_is_of_the_dtype_that_it_was_tested_in():
    model = random_tagger("bert", torch.float32)
    model.dial = dataclasses.replace(DIAL, dtype="float32")
    model.set_speed("promised")
    assert model.policy == SPEEDS[2].policy
    for change, now in ((torch.nn.Module.bfloat16, "bfloat16"), (tokenexit.quantize, "int8")):
        other = change(copy.deepcopy(model))
        with pytest.raises(ValueError, match=f"tested in float32, but the tagger is in {now}"):
            other.set_speed("promised")
        other.set_speed(1.2)
        assert other.policy == SPEEDS[1].policy


def test_a_tagger_given_back_has_no_dial():
    model = random_tagger("bert", torch.float32)
    model.dial = DIAL
    assert "dial" not in tokenexit.to_hugging_face(model).config.to_dict()


def test_a_promise_is_taken_from_words_with_neighbors():
    """Others look better on text that classifiers learnt from than they are."""
    base = ExitPolicy(copy="pre_norm", level="sentence")
    grid = promise_grid(base, growths=(1.5,), criteria=("max_prob",))
    assert {(p.level, p.window) for p in grid} == {("token", 1), ("token", 2), ("token", 4)}
    assert {p.kind for p in grid} == {("max_prob", "pre_norm", "frozen")}
    assert {p.growth for p in grid} == {1.5}
    both = promise_grid()
    assert {p.criterion for p in both} == {"entropy", "max_prob"}
    assert {p.growth for p in both} == {1, 1.5, 2}


def test_a_promise_says_its_numbers():
    assert "a confidence of 90%, the labels of fewer than 1.00% of" in DIAL.promise
    dial = dataclasses.replace(DIAL, confidence=0.999, max_disagreement=0.00004)
    assert "a confidence of 99.9%, the labels of fewer than 0.004% of" in dial.promise
