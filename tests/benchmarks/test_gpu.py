"""The GPU benchmark's logic, on a CPU at tiny sizes. No times."""

import gc
import json
import weakref
from types import SimpleNamespace

import gpu
import gpu_page
import harness
import pytest
import texts
import torch

from tokenexit.loops.eager import last_of

SHAPE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def model():
    return gpu.base(**SHAPE, intermediate_size=64)


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

    def loop(layers, heads, h, packed, schedule, bias, exit_layer, neighbor_heads):
        trace = model.ours.encoder(h, packed, schedule, bias, exit_layer)
        return last_of(trace, len(h))

    monkeypatch.setattr(gpu.gpu_loop, "exit_loop", loop)
    with torch.inference_mode():
        got = gpu.layers_alone(model.ours, batch, exits)()
        out = model.ours(
            batch.input_ids, batch.attention_mask, word_ids=batch.word_ids, exit_layers=exits
        )
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


def test_a_table_has_names_to_the_left():
    table = harness.table(["a", "b", "c"], [("x", "y", 1)], names=2)
    assert table == "| a | b | c |\n| --- | --- | --: |\n| x | y | 1 |"
    assert harness.table(["a", "b"], [("x", 1)]) == "| a | b |\n| --- | --: |\n| x | 1 |"


def test_the_page_is_written_from_its_rows():
    text = gpu_page.DOCUMENT.read_text(encoding="utf-8")
    inside = text.partition("<!-- gpu -->\n")[2].partition("<!-- /gpu -->")[0]
    assert inside == gpu_page.tables() + "\n"


def test_the_page_shows_the_last_run_of_each_card_that_has_full_depth():
    call, exits = dict(system=gpu_page.CALL, exit_rate=0.0), dict(system="x", exit_rate=0.75)
    runs = [("NVIDIA A", "1", call), ("NVIDIA B C", "1", call), ("NVIDIA A", "2", call)]
    runs += [("NVIDIA A", "2", exits), ("NVIDIA A", "3", exits)]  # 3 timed exits only
    rows = [dict(stage="speed", device=d, commit=c, **row) for d, c, row in runs]
    assert gpu_page.last_runs(rows) == {"A": rows[2:4], "B": rows[1:2]}
    told = gpu_page.beside("t", {"A": {gpu_page.HF: 3.0, "x": 2.0}, "B": {gpu_page.HF: 1.0}}, 1)
    assert told.splitlines()[-1] == "| x | 2.00 | 1.5 |  |  |"
