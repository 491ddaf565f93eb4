"""The GPU benchmark's logic, on a CPU at tiny sizes, and the model on paper. No times."""

import gc
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import gpu
import gpu_model
import harness
import pytest
import texts
import torch
from gpu_model import B200, GPUS, H100, layer, loop, profile, total_us

from tokenexit.loops.eager import last_of

SHAPE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def model():
    return gpu.base(**SHAPE, intermediate_size=64)


def named(launches, name):
    (found,) = [x for x in launches if x.name == name]
    return found


def test_operations_of_full_depth_by_hand():
    done = layer(H100, 64, 128)
    t, d = 64 * 128, 768
    assert named(done, "query_key_value").gflop == pytest.approx(2 * t * d * 3 * d / 1e9)
    assert named(done, "exit_attention").gflop == pytest.approx(4 * t * 128 * d / 1e9)
    assert named(done, "output").gflop == pytest.approx(2 * t * d * d / 1e9)
    assert named(done, "up").gflop == pytest.approx(2 * t * d * 3072 / 1e9)
    assert named(done, "down").gflop == named(done, "up").gflop
    assert [x.name for x in done] == [
        *("query_key_value", "exit_attention", "output", "up", "down", "exit_step"),
        "compact_active",
    ]
    assert named(done, "up").mb == pytest.approx(2 * (t * d + d * 3072 + t * 3072) / 1e6)


def test_time_of_a_product_by_hand():
    # 64 blocks of rows x 24 of columns on 132 multiprocessors: 12 rounds of one tile each, with the
    # ends of the last two showing at a time.
    tile_us = 2 * 128 * 128 * 768 / (989e6 / 132 * 0.45)
    ends_us = {name: 2 * n / 1.83e3 for name, n in gpu_model.ENDS.items()}
    assert named(layer(H100, 64, 128), "up").us == pytest.approx(1.5 + 12 * tile_us + ends_us["up"])
    # 64 x 6 tiles of four times as many steps, alone on their multiprocessors.
    got = named(layer(H100, 64, 128), "down").us
    assert got == pytest.approx(1.5 + 3 * (4 * tile_us + ends_us["down"]))
    # 820 rows: 7 x 24 tiles, two rounds; no part of them would be faster.
    got = named(layer(H100, 64, 128, 0.1), "up").us
    assert got == pytest.approx(1.5 + 2 * tile_us + ends_us["up"])
    # 7 x 6 tiles in three parts; a part is stored and three are read, after two latencies.
    got = named(layer(H100, 64, 128, 0.1), "output").us
    adding_us = 1.5 + 4 * 128 * 128 * 4 / 0.1e6
    assert got == pytest.approx(1.5 + max(tile_us / 3, 4 * 0.25) + ends_us["output"] + adding_us)
    # Queries of as many, keys and values of all; 57 x 6 programs of 64 x 18 leave.
    got = named(layer(H100, 64, 128, 0.1), "query_key_value").us
    assert got == pytest.approx(1.5 + 7 * tile_us + ends_us["query_key_value"] + 2 * 0.3)


def test_what_shares_a_multiprocessor_is_what_the_kernels_let():
    """By the compile report on sm_90; `test_residents` holds the rest."""
    pytest.importorskip("triton")
    from tokenexit.kernels import linear

    x, tiles = torch.ones(300, 8, dtype=torch.float16), linear.tiles_of(300, 2)
    assert linear.residents(x, tiles)[0] == 1  # without a Hopper
    assert set(H100.shared) == gpu_model.ENDS.keys() - {"down"}
    assert all(card.shared in ((), ("query_key_value",)) for card in GPUS if card is not H100)


def test_splits_are_those_of_the_kernels():
    """And `tests/kernels/test_linear.py` holds `splits` against the kernels."""
    pytest.importorskip("triton")
    from tokenexit.kernels.linear import MOST_SPLITS

    assert {card.most_splits for card in GPUS} == {MOST_SPLITS}


def test_time_bound_by_bytes_by_hand():
    one = gpu_model.launch(H100, "x", flop=1e6, size=3.35e6 * 0.8, programs=132)
    assert one.us == pytest.approx(1.5 + 1)


def test_keys_and_values_of_finished_sentences_cost_nothing():
    parts = [named(layer(H100, 64, 128, 0.25, alive), "query_key_value") for alive in (1, 0.25)]
    assert parts[0].gflop == pytest.approx((0.25 + 2) / 3 * named(layer(H100, 64, 128),
                                           "query_key_value").gflop)  # fmt: skip
    assert parts[1].gflop == pytest.approx(parts[0].gflop * 0.75 / 2.25)


@pytest.mark.parametrize("kind", gpu_model.PROFILES)
@pytest.mark.parametrize("fewer", [1, 2, 4, 8])
def test_profiles_hit_their_share(kind, fewer):
    shares = profile(fewer, 128, kind)
    assert sum(a for a, _ in shares) == pytest.approx(12 / fewer)
    assert shares[0] == pytest.approx((1, 1))
    assert all(a <= u + 1e-9 for a, u in shares)
    assert sorted(shares, reverse=True) == shares
    if kind == "whole":
        assert all(a == pytest.approx(u) for a, u in shares)


@pytest.mark.parametrize("arguments", [(4, 128, "odd"), (0.5, 128, "even"), (12, 128, "even")])
def test_impossible_profiles(arguments):
    with pytest.raises(ValueError, match="expected 1 <= fewer < 12, one of"):
        profile(*arguments)


@pytest.mark.parametrize("card", GPUS, ids=lambda card: card.name)
@pytest.mark.parametrize("kind", gpu_model.PROFILES)
def test_fewer_tokens_and_better_cards_are_never_slower(card, kind):
    times = [total_us(loop(card, 64, 128, fewer, kind)) for fewer in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert total_us(loop(replace(card, whole_tiles=False), 64, 128, 4, kind)) < times[2]
    sizes = [total_us(loop(card, sentences, 128, 4, kind)) for sentences in (1, 8, 64, 256)]
    assert sizes == sorted(sizes)
    assert total_us(loop(card, 64, 128, 4, kind, "best")) <= times[2]
    faster = replace(card, tbs=2 * card.tbs, tflops=2 * card.tflops)
    assert total_us(loop(faster, 64, 128, 4, kind)) < times[2]


def test_crossing_points():
    assert gpu_model.absorbed_below(H100, 1, 128) == 0
    few = gpu_model.absorbed_below(B200, 256, 128)
    assert 0 < few < 1 / (1 / 128 + 11 / 768)  # later than by operations alone

    def every(sentences, m):
        return total_us(loop(H100, sentences, 128, 4, every=m))

    assert every(64, 1) < every(64, 2) < every(64, 4)


def test_document_is_up_to_date():
    text = gpu_model.DOCUMENT.read_text(encoding="utf-8")
    inside = text.partition("<!-- gpu model -->\n")[2].partition("<!-- /gpu model -->")[0]
    assert inside == gpu_model.tables() + "\n"
    assert "No GPU time has been measured" in text
    goal = dict((name, rest) for name, *rest in gpu_model.goal())
    even, whole = goal["**time of the layers, the prediction**"]
    assert f"**{even:.1f}** where words" in text.replace("\n", " ")
    assert f"**{whole:.1f}** where whole" in text.replace("\n", " ")


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["even", "whole"])
def test_exits_are_as_many_as_asked(rate, kind):
    batch = texts.batch(texts.uniform(20, 22, 60))
    exits = gpu.exits(batch, 12, rate, kind)
    words = exits[:, 1:-1]
    assert float((words == 2).double().mean()) == pytest.approx(rate)
    assert torch.equal(exits[:, 0], words.amax(1)) and torch.equal(exits[:, -1], words.amax(1))
    uneven = (words != words[:, :1]).any(1)
    assert uneven.all() if kind == "even" else not uneven.any()


def test_exits_of_the_goal():
    batch = texts.batch(texts.uniform(8, 40, 60))
    assert gpu.exits(batch, 12, 0.75, "goal").double().mean() == pytest.approx(3, rel=0.02)
    with pytest.raises(ValueError, match="expected 'even', 'whole' or 'goal'"):
        gpu.exits(batch, 12, 0.5, "none")


def test_a_wrong_system_gets_no_numbers(model, monkeypatch):
    real = gpu.systems

    def broken(*arguments):
        found = real(*arguments)
        return {**found, "odd": lambda: found[gpu.HF]() + 1}

    monkeypatch.setattr(gpu, "systems", broken)
    rows, failures = gpu.case(model, model, (2, 9), 0.0, "even", "cpu", 2)
    assert {row["system"] for row in rows} == {gpu.HF, gpu.PAPER}
    assert len(failures) == 1 and failures[0].startswith("odd: logits differ by 1")


def test_nothing_is_timed_where_ours_is_not_hugging_faces(model):
    other = gpu.Model(gpu.base(**SHAPE, intermediate_size=64).theirs, model.ours)
    with torch.no_grad():
        other.theirs.classifier.bias.add_(1)
    rows, failures = gpu.case(other, model, (2, 9), 0.0, "even", "cpu", 2)
    assert rows == [] and "our eager loop in fp32" in failures[0]


def test_wrong_allows_what_the_dtype_costs_others():
    truth, real = torch.zeros(1, 2, 3), torch.tensor([[True, False]])
    same = truth.clone()
    same[0, 0, 0] = 0.1
    assert gpu.wrong(2 * same, truth, same, real) is None
    assert "differ by 0.3" in gpu.wrong(3 * same, truth, same, real)
    assert "differ by nan" in gpu.wrong(truth * float("nan"), truth, same, real)
    padding = truth.clone()
    padding[0, 1] = 9
    assert gpu.wrong(padding, truth, same, real) is None


def test_layers_alone_are_the_models(model, monkeypatch):
    batch = texts.batch([texts.uniform(1, n, 60)[0] for n in (5, 9)])
    exits = gpu.exits(batch, 4, 0.5, "even")

    def loop(layers, heads, h, packed, schedule, bias, exit_layer):
        trace = model.ours.encoder(h, packed, schedule, bias, exit_layer)
        return last_of(trace, len(h))

    monkeypatch.setattr(gpu.gpu_loop, "exit_loop", loop)
    with torch.inference_mode():
        got = gpu.layers_alone(model.ours, batch, exits)()
        out = model.ours(batch.input_ids, batch.attention_mask, batch.word_ids, exit_layers=exits)
    assert len(exits[batch.real].unique()) == 2
    torch.testing.assert_close(got, out.logits)


def test_a_graph_keeps_what_it_reads(monkeypatch):
    """Memory that nobody holds goes to others, whose values a replay would read."""
    monkeypatch.setattr(gpu.graphs, "record", lambda run: (SimpleNamespace(replay=int), run()))

    def make():
        read = torch.ones(3)
        return gpu.capture(lambda: read + 1), weakref.ref(read)

    replay, read = make()
    gc.collect()
    assert read() is not None and torch.equal(replay(), torch.full((3,), 2.0))
    del replay
    gc.collect()
    assert read() is None


def test_measure_alternates_after_a_warm_up():
    calls = []
    found = {name: lambda name=name: calls.append(name) for name in "ab"}
    measured = gpu.measure(found, "cpu", 3)
    once = 3 + gpu.BACK_TO_BACK
    assert calls == ["a"] * once + ["b"] * once + ["a", "b"] * 3
    assert [len(m["times_ms"]) for m in measured.values()] == [3, 3]


def test_without_a_gpu_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "No GPU is at hand: nothing was measured.\n"
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    assert "status 2" in capsys.readouterr().out


def test_quick_run(tmp_path):
    assert (
        gpu.main(["--quick", "--device", "cpu", "--dtype", "bf16", "--results", str(tmp_path)]) == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").open()]
    assert {row["system"] for row in rows} == {gpu.HF, gpu.PAPER}
    assert len(rows) == 2 * 2 * 10 and {row["profile"] for row in rows} == {"even", "whole", "goal"}
    wanted = {
        "median_ms",
        "p20_ms",
        "p80_ms",
        "peak_mib",
        "tokens_per_s",
        "dtype",
        "commit",
        "date",
    }
    assert all(wanted <= row.keys() and row["check"] == "passed" for row in rows)
    assert {row["active_fraction"] for row in rows if row["exit_rate"] == 0} == {1}
    assert (tmp_path / "gpu.png").exists() and harness.read("gpu", tmp_path) == rows


def test_sizes_and_rates_are_chosen_and_the_truth_has_no_graphs(tmp_path, monkeypatch):
    of, real = [], gpu.systems
    monkeypatch.setattr(gpu, "systems", lambda model, *a: of.append(model) or real(model, *a))
    chosen = "--quick --device cpu --dtype bf16 --sizes 2x5 3x4 --rates 0.5".split()
    assert gpu.main([*chosen, "--results", str(tmp_path)]) == 0
    rows = harness.read("gpu", tmp_path)
    assert {(row["sentences"], row["longest"]) for row in rows} == {(2, 5), (3, 4)}
    assert {row["exit_rate"] for row in rows} == {0.5}
    assert {model.ours.dtype for model in of} == {torch.bfloat16}
    for wrong in ("5", "0x4", "2x", "axb"):
        with pytest.raises(SystemExit):
            gpu.main([*chosen, "--sizes", wrong])


def test_where_rows_come_from_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert harness.origin()["commit"] == ""
