"""calibrate: what it sweeps, what it picks, what it promises."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from random_models import random_classifier

import tokenexit
import tokenexit.calibrate
from tokenexit import ExitPolicy, Tagger
from tokenexit.calibrate import (
    Point,
    Sweep,
    calibrate,
    pareto_front,
    plot,
    policy_grid,
)
from tokenexit.evaluate import Evaluation, evaluate, time_evaluations
from tokenexit.text.scoring import warn_once

NAMES = ["A", "B", "C"]
GRID = policy_grid(windows=(0, 2), thresholds=(0.2, 0.5, 0.6, 0.7))


@pytest.fixture(scope="module")
def setting(tiny_tokenizer):
    """A tagger, and text labelled by its own last layer: full depth is right, exits lose."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    model = tokenexit.convert(
        random_classifier(vocab_size=len(tokenizer), labels=3, max_position_embeddings=24, **names),
        tokenizer,
    ).double()
    with torch.no_grad():
        for head in model.exit_heads:
            head.weight.normal_(0, 0.4)
    tagger = Tagger(model, tokenizer, batch_size=8)
    words = ["john", "smiths", "lives", "in", "new", "york", "paris", "xyz"]
    g = torch.Generator().manual_seed(0)
    lengths = [*torch.randint(1, 9, (40,), generator=g).tolist(), 60]  # one takes several windows
    rows = [[words[i] for i in torch.randint(8, (n,), generator=g)] for n in lengths]
    labels = [tagged.labels for tagged in tagger.tag(rows)]
    return tagger, Dataset.from_dict({"words": rows, "labels": labels})


def test_target_speedup(setting):
    tagger, data = setting
    result = calibrate(tagger, data, target_speedup=1.5, policies=GRID)
    assert result.metric == "accuracy" and result.full_depth.score == 1.0
    assert result.full_depth.speedup == 1.0
    assert result.chosen in result.verified and result.chosen.speedup >= 1.5
    real = evaluate(tagger, data, result.chosen.policy)
    assert (real.score, real.flops_speedup) == (result.chosen.score, result.chosen.speedup)
    for other in result.verified:
        assert other.speedup < 1.5 or other.score <= result.chosen.score
    assert tagger.model.policy == ExitPolicy.never()  # not changed


def test_max_loss(setting):
    tagger, data = setting
    results = [calibrate(tagger, data, max_loss=loss, policies=GRID) for loss in (0.0, 0.05, 0.3)]
    speeds = [r.chosen.speedup for r in results]
    assert speeds == sorted(speeds) and speeds[0] >= 1 and speeds[-1] > 1.2
    for result, loss in zip(results, (0.0, 0.05, 0.3), strict=True):
        assert result.chosen.score >= 1 - loss


def test_a_loss_is_of_full_depth_as_the_tagger_decodes(setting):
    tagger, data = setting
    names = {0: "O", 1: "B-X", 2: "I-X"}
    model = copy.deepcopy(tagger.model)
    model.config.id2label, model.config.label2id = names, {name: i for i, name in names.items()}
    other = Tagger(model, tagger.tokenizer, decoding="constrained")
    labels = [tagged.labels for tagged in other.tag(data["words"])]
    again = Dataset.from_dict({"words": data["words"], "labels": labels})
    asked = {"max_loss": 0.02, "policies": GRID, "metric": "accuracy"}
    found = calibrate(other, again, **asked)
    assert found.full_depth.score == 1 and found.chosen.score >= 0.98
    other.decoding = "argmax"
    assert calibrate(other, again, **asked).full_depth.score < 0.95


def test_a_loss_is_of_the_original_where_it_is_given(setting):
    """One that was better allows for less than full depth does, one that was worse for more."""
    tagger, data = setting
    worse = Tagger(copy.deepcopy(tagger.model), tagger.tokenizer)
    with torch.no_grad():
        worse.model.exit_heads[-1].weight.add_(0.1 * torch.randn(3, 32))
    score = evaluate(worse, data, ExitPolicy.never()).score
    assert 0.7 < score < 1
    own, other = (
        calibrate(tagger, data, max_loss=0.0, policies=GRID, original=original)
        for original in (None, worse)
    )
    assert (own.original, other.original) == (None, score)
    assert other.chosen.speedup > own.chosen.speedup and other.chosen.score >= score
    assert other.to_dict()["original"] == score and "original" not in own.to_dict()
    with pytest.raises(
        ValueError, match=r"no policy scores 1\.0000, 0 below the original; the best"
    ):
        calibrate(worse, data, max_loss=0, policies=GRID, original=tagger)
    with pytest.raises(ValueError, match="got original with target_speedup"):
        calibrate(tagger, data, target_speedup=2, original=tagger)
    promised = {"max_disagreement": 0.6, "policies": GRID}
    dials = [calibrate(worse, data, original=x, **promised).dial for x in (None, tagger)]
    assert [dial.reference for dial in dials] == ["full depth", "the original"]
    assert dials[0].speeds[0].disagreement == 0 < dials[1].speeds[0].disagreement
    assert "are not those of the original; tested on" in dials[1].promise


def test_simulation_is_exact_where_nobody_left_before(setting):
    """All words of a sentence leave together: nothing is copied, so simulated is real."""
    tagger, data = setting
    policies = [ExitPolicy.sentence(t) for t in (0.3, 0.6, 0.9)]
    result = calibrate(tagger, data, max_loss=1.0, policies=policies, verify=6)
    simulated = {p.policy: p for p in result.simulated}
    assert len(result.verified) >= 2
    for point in result.verified:
        assert simulated[point.policy].score == pytest.approx(point.score)
        assert simulated[point.policy].speedup == pytest.approx(point.speedup)
    assert len({p.speedup for p in result.simulated}) > 1


def test_targets_out_of_reach_and_bad_ones(setting):
    tagger, data = setting
    with pytest.raises(ValueError, match="no policy reaches a speed-up of 100; the fastest"):
        calibrate(tagger, data, target_speedup=100, policies=GRID)
    with pytest.raises(ValueError, match="got both"):
        calibrate(tagger, data, target_speedup=2, max_loss=0.1)
    with pytest.raises(ValueError, match="target_speedup is 0.5"):
        calibrate(tagger, data, target_speedup=0.5)
    with pytest.raises(ValueError, match="max_loss is -1"):
        calibrate(tagger, data, max_loss=-1)
    for name in ("target_speedup", "max_loss"):
        with pytest.raises(ValueError, match=f"{name} is nan; expected"):
            calibrate(tagger, data, **{name: float("nan")})
    with pytest.raises(ValueError, match="no sentences"):
        calibrate(tagger, data.take(0))


def fake(monkeypatch, simulated, real, cheap):
    """Make simulation and real exits say what they are told to; return the policies run."""
    full = {ExitPolicy.never(): (0.9, 1.0)}
    run = []

    class Sweep:
        metric = "accuracy"

        def __init__(self, *args):
            pass

        def point(self, policy):
            return Point(policy, *{**full, **simulated}[policy])

    def evaluated(tagger, data, policy, metric):
        run.append(policy)
        score, speedup = real[policy]
        return Evaluation(policy, {"score": score}, 1.0, [], speedup)

    monkeypatch.setattr(tokenexit.calibrate, "Sweep", Sweep)
    monkeypatch.setattr(tokenexit.calibrate, "evaluate", evaluated)
    monkeypatch.setattr(tokenexit.calibrate, "CHEAP", 10**9 if cheap else 0)
    return run


A, B, C, D = (ExitPolicy(threshold=t) for t in (0.1, 0.2, 0.3, 0.4))
# A is best in simulation, B in truth; C is too bad, and D too slow to come in question.
SIMULATED = {A: (0.9, 1.65), B: (0.885, 1.6), C: (0.8, 3.0), D: (0.88, 1.1)}
REAL = {A: (0.895, 1.67), B: (0.9, 2.2), C: (0.82, 3.6), D: (0.9, 1.1)}


@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("target", [{"max_loss": 0.01}, {"target_speedup": 1.5}])
def test_a_better_policy_than_simulation_says_is_found(setting, monkeypatch, cheap, target):
    run = fake(monkeypatch, SIMULATED, REAL, cheap)
    result = calibrate(*setting, policies=list(SIMULATED), **target)
    assert result.chosen == Point(B, *REAL[B])
    assert sorted(run, key=lambda p: p.threshold) == ([A, B, C, D] if cheap else [A, B, C])
    assert [p.policy for p in result.verified] == sorted(set(run), key=lambda p: REAL[p][1])


def test_simulation_that_is_too_hopeful(setting, monkeypatch):
    real = {policy: (0.7, speed) for policy, (_, speed) in SIMULATED.items()}
    fake(monkeypatch, SIMULATED, {**real, D: (0.9, 1.1)}, cheap=False)
    assert calibrate(*setting, policies=list(SIMULATED)).chosen.policy == ExitPolicy.never()
    fake(monkeypatch, SIMULATED, {**real, D: (0.9, 1.1)}, cheap=True)
    assert calibrate(*setting, policies=list(SIMULATED)).chosen.policy == D


def test_at_most_so_many_runs_the_likeliest_first(setting, monkeypatch):
    run = fake(monkeypatch, SIMULATED, REAL, cheap=True)
    calibrate(*setting, policies=list(SIMULATED), verify=2)
    assert run == [A, B]
    with pytest.raises(ValueError, match="verify is 0; expected 1 or more"):
        calibrate(*setting, verify=0)


def test_the_whole_grid_is_run_where_that_is_cheap(setting):
    tagger, data = setting
    result = calibrate(tagger, data, max_loss=0.1, policies=GRID)
    assert {p.policy for p in result.verified} == set(GRID)
    good = [p for p in result.verified if p.score >= 0.9]
    assert result.chosen.speedup == max(p.speedup for p in good)


def test_empty_sentences_make_nothing_faster(setting):
    tagger, data = setting
    rows = {name: [*data[name], *[[]] * 30] for name in ("words", "labels")}
    result = calibrate(tagger, Dataset.from_dict(rows), max_loss=0.1, policies=GRID)
    assert result.full_depth.speedup == 1
    sweep = Sweep(tagger, rows, "accuracy")
    assert sweep.speedup(sweep.exits(ExitPolicy.never())) == 1
    assert sweep.speedup(sweep.exits(GRID[-1])) > 1


def test_data_and_taggers_that_can_say_nothing(setting, tiny_tokenizer):
    tagger, data = setting
    labels = {"id2label": {0: "O", 1: "B-A"}, "label2id": {"O": 0, "B-A": 1}}
    tokenizer = tiny_tokenizer()
    model = tokenexit.convert(
        random_classifier(vocab_size=len(tokenizer), labels=2, **labels), tokenizer
    )
    new = Tagger(model, tokenizer)
    words = [["john", "lives"], ["paris"]]
    outside = Dataset.from_dict({"words": words, "labels": [["O", "O"], ["O"]]})
    with pytest.raises(ValueError, match="no entity, only the label 'O'.*or the metric accuracy"):
        calibrate(new, outside)
    some = Dataset.from_dict({"words": words, "labels": [["B-A", "O"], ["O"]]})
    with pytest.raises(ValueError, match="classifiers of layers 1, 2, 3 were never trained"):
        calibrate(new, some)


def test_labels_that_the_model_does_not_know_are_wrong(setting, caplog):
    tagger, data = setting
    labels = [["X", *labels[1:]] for labels in data["labels"]]
    other = Dataset.from_dict({"words": data["words"], "labels": labels})
    warn_once.cache_clear()
    words = sum(map(len, labels))
    result = calibrate(tagger, other, max_loss=0.5, policies=[ExitPolicy(threshold=0.5)])
    assert result.full_depth.score == pytest.approx(1 - len(labels) / words)
    (record,) = caplog.records  # once, not for each policy
    assert f"{len(labels)} of {words} words" in record.message and "'X'" in record.message
    many = [[f"{i}-{j}" for j in range(len(row))] for i, row in enumerate(labels)]
    evaluate(tagger, Dataset.from_dict({"words": data["words"], "labels": many}))
    assert len(caplog.records[-1].message) < 300


def test_progress_and_plot(setting, tmp_path, monkeypatch):
    for name in ("matplotlib.use", "matplotlib.pyplot.subplots"):  # hidden from a notebook's own
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("changed the user's figures"))
    tagger, data = setting
    seen = []
    result = calibrate(
        tagger, data, policies=policy_grid(windows=(0,), thresholds=(0.5, 0.9)),
        progress=lambda *args: seen.append(args),
    )  # fmt: skip
    assert ("simulate", 12, 12) in seen and any(what == "verify" for what, *_ in seen)
    plot(result, tmp_path / "curve.png", "title", [result.full_depth])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert result.to_dict()["chosen"]["policy"] == result.chosen.policy.to_dict()


@pytest.mark.parametrize("criterion", ["entropy", "max_prob"])
def test_a_sweep_has_both_criteria(setting, criterion):
    """Words that stand alone leave by themselves, as if simulated: no neighbor, no window."""
    tagger, data = setting
    alone = {"words": [words[:1] for words in data["words"]], "labels": [["A"]] * len(data)}
    sweep = Sweep(tagger, alone, "auto")
    policy = ExitPolicy(window=0, threshold=0.4, criterion=criterion)
    real = evaluate(tagger, Dataset.from_dict(alone), policy)
    exits = sweep.exits(policy)
    counts = exits.bincount(minlength=5)[1:].tolist()
    assert counts == real.exits_per_layer and len(set(exits.tolist())) > 1
    found = calibrate(tagger, data, policies=[policy], max_loss=1.0)
    assert found.chosen.policy == policy


def test_the_grid_has_growing_thresholds_which_are_those_of_the_second_layer():
    grid = policy_grid(windows=(0, 1), thresholds=(0.2, 0.6), growths=(1, 2))
    assert len(grid) == len(set(grid)) == 2 * 3 * 2
    growing = [policy for policy in grid if policy.growth == 2]
    assert {policy.thresholds(4)[1] for policy in grid} == {0.2, 0.6}
    assert {policy.thresholds(4)[2] for policy in growing} == {0.4, 1.0}
    assert {policy.level for policy in growing} == {"token", "sentence"}
    doubling = policy_grid(ExitPolicy(schedule="doubling"), windows=(0,), thresholds=(0.2,))
    assert [policy.growth for policy in doubling] == [1, 1]
    both = policy_grid(windows=(0,), thresholds=(0.2,), criteria=("entropy", "max_prob"))
    assert [policy.criterion for policy in both] == ["entropy"] * 6 + ["max_prob"] * 6
    listed = policy_grid(ExitPolicy(threshold=(0.1, 0.2)), windows=(0,), thresholds=(0.2,))
    assert listed == policy_grid(windows=(0,), thresholds=(0.2,))


def test_pareto_front():
    policy = ExitPolicy()
    points = [Point(policy, s, v) for s, v in ((0.9, 1), (0.8, 2), (0.85, 3), (0.5, 4), (0.5, 3.5))]
    assert [(p.score, p.speedup) for p in pareto_front(points)] == [(0.9, 1), (0.85, 3), (0.5, 4)]


def test_evaluation(setting):
    tagger, data = setting
    with pytest.raises(ValueError, match="timing_runs is -1; expected 0 or more"):
        evaluate(tagger, data, timing_runs=-1)
    never = evaluate(tagger, data, ExitPolicy.never(), timing_runs=1)
    words = sum(map(len, data["words"]))
    assert never.score == 1 and never.mean_exit_layer == 4 and never.flops_speedup == 1
    assert never.exits_per_layer == [0, 0, 0, words]
    assert never.wall_speedup > 0 and never.words_per_second > 0
    some = evaluate(tagger, data, ExitPolicy(threshold=0.5, window=0))
    assert sum(some.exits_per_layer) == words and some.wall_speedup is None
    assert 1 < some.mean_exit_layer < 4 and some.flops_speedup > 1
    agreement = [
        a == b
        for gold, tagged in zip(data["labels"], tagger.tag(data["words"], some.policy), strict=True)
        for a, b in zip(gold, tagged.labels, strict=True)
    ]
    assert some.score == pytest.approx(sum(agreement) / words)
    assert some.to_dict()["policy"]["threshold"] == 0.5
    with pytest.raises(ValueError, match="the metric entity_f1 does not fit the labels: got 'A'"):
        evaluate(tagger, data, metric="entity_f1")
    ones = Dataset.from_dict({"words": [["john"]], "labels": [["B"]]})  # by itself a segmentation
    assert evaluate(tagger, ones).scores["metric"] == "accuracy"
    tagger.model.policy = some.policy
    assert evaluate(tagger, data) == some
    tagger.model.policy = ExitPolicy.never()
    with pytest.raises(ValueError, match="no sentences"):
        evaluate(tagger, data.take(0))


def test_times_are_ratios_within_rounds_of_alternation(monkeypatch):
    """By a stand-in for the tagger, whose calls take as long as is said."""
    now, calls = 0.0, []
    policies = [ExitPolicy(threshold=0.2), ExitPolicy.sentence(0.3)]
    seconds = {  # a round to warm up; in the third the machine is ten times as slow
        ExitPolicy.never(): [90, 6.0, 60.0, 6.0],
        policies[0]: [90, 3.0, 30.0, 2.0],
        policies[1]: [90, 4.0, 60.0, 2.0],
    }

    class StandIn:
        def windows(self, sentences):
            return [*sentences]

        def run(self, windows, policy):
            nonlocal now
            calls.append(policy)
            assert windows == words
            for share in (0.25, 0.75):  # batches
                now += share * seconds[policy][(len(calls) - 1) // 3]
                yield [0], SimpleNamespace(logits=torch.zeros(1, 1, 1)), [0]

    monkeypatch.setattr("tokenexit.evaluate.time.perf_counter", lambda: now)
    words = [["a"] * 9, ["b"] * 3]
    results = [Evaluation(policy, {}, 1.0, [], 1.0) for policy in policies]
    timed = time_evaluations(StandIn(), Dataset.from_dict({"words": words}), results, runs=3)
    assert calls == [*seconds] * 4
    assert [t.policy for t in timed] == policies
    assert [t.wall_speedup for t in timed] == [2.0, 1.5]
    assert [t.words_per_second for t in timed] == [4.0, 3.0]
