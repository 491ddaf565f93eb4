"""The check of a GPU, as far as it can be tried without one. No times."""

import argparse
import json
import os
import threading
import time
from functools import partial
from pathlib import Path

import gpu
import gpu_check
import gpu_exits
import gpu_page
import gpu_probes
import pytest
import torch
from texts import Sentence


@pytest.fixture
def check(tmp_path):
    options = dict(out=tmp_path / "out", budget=600, workers=1, device="cpu", tiny=True)
    return gpu_check.Check(argparse.Namespace(**options), tmp_path / "work")


def test_a_stage_that_fails_or_hangs_keeps_none_from_running(check, monkeypatch):
    """What a stage began ends with it."""
    forks = "sleep 600 & echo $! $$; wait"
    long = "i=0; while [ $i -lt 5000 ]; do printf a; i=$((i+1)); done"
    plan = {"env": (long, 60), "build": ("exit 3", 60), "smoke": (forks, 3), "speed": ("true", 60)}
    monkeypatch.setattr(gpu_check, "LEAST", 0)
    for name, (text, limit) in plan.items():
        run = partial(check.run, name, ["sh", "-c", text], limit)
        monkeypatch.setattr(check, f"run_{name}", lambda _, run=run: run())
        if name != "speed":
            check.stage(name)
    monkeypatch.delattr(gpu_check.Check, "run_sanitize")  # as one that raises
    check.stages("sanitize+speed")
    monkeypatch.setattr(gpu_check, "LEAST", 1000)
    check.stage("tests")
    assert check.failed == ["build", "smoke", "sanitize", "tests"]
    summary = check.summary()
    assert "== sanitize: FAILED by AttributeError" in summary and "== speed: ok" in summary
    assert "== env: ok" in summary and "== build: FAILED with status 3" in summary
    assert "== smoke: CUT OFF" in summary and "== tests: not run, the budget is spent" in summary
    assert (check.out / "summary.txt").exists() and summary.count("a") < 1000
    assert len(check.log("smoke").split()) == 2
    for pid in check.log("smoke").split():  # killed, but a kernel may end them a moment later
        for _ in range(1000):
            if not is_alive(pid):
                break
            time.sleep(0.01)
        assert not is_alive(pid)


@pytest.mark.parametrize("ended", [None, 3])
def test_what_was_not_sanitized_is_not_clean(check, monkeypatch, ended):
    statuses = [0, ended, 0, 0]
    monkeypatch.setattr(check, "run", lambda *_: statuses.pop())
    assert check.run_sanitize(100) == ended
    told = check.tell("sanitize")
    assert told.count(": clean") == 3
    assert told.count(": CUT OFF" if ended is None else ": FAILED with status 3") == 1


def test_joined_stages_run_at_once_and_an_end_from_without_is_told(check, monkeypatch):
    both, seen = threading.Barrier(2, timeout=60), []

    def waits(_):
        both.wait()
        seen.append((check.out / "summary.txt").read_text())
        both.wait()
        return 0

    for name in ("goals", "sizes"):
        monkeypatch.setattr(check, f"run_{name}", waits)
    check.stages("goals+sizes")
    assert not check.failed
    assert all(told.count("begun, not ended") == 2 for told in seen)
    assert check.summary().count(": ok") == 2 and "begun" not in check.summary()


def test_what_is_warmed_is_what_is_timed(check, monkeypatch, tmp_path):
    asked, folder = [], tmp_path / "build/gpu"
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "run", lambda name, command, limit: asked.append(command) or 0)
    assert check.run_exits(20) == 1 and "save-exits" in check.tell("exits")
    assert check.run_warm(20) == 0
    wanted = [part for parts in gpu_check.WARMED for part in parts]
    parts = [x for command in asked for x in command if x in wanted]
    assert (
        sorted(parts) == sorted(wanted) == sorted({"speed", "products", "peers", *gpu_check.GOALS})
    )
    assert len(asked) == 3 and set(wanted) <= gpu_probes.PARTS.keys()
    folder.mkdir(parents=True)
    (folder / "some.npz").touch()
    asked.clear()
    assert check.run_warm(20) == 0 and check.run_exits(20) == 0
    assert all("--warm" in command for command in asked[:4])
    exits = [command for command in asked if folder / "some.npz" in command]
    assert len(exits) == 2 and "--warm" not in exits[1] and len(asked) == 5


def is_alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_the_summary_is_short(check):
    for name, (_, characters) in gpu_check.LIMITS.items():
        check.told[name] = f"== {name}: FAILED with status 139, 150 s\n{'x' * characters}\n"
    assert len(check.summary()) < 12_000
    default = list(check.told)[:-5]
    assert sum(len(check.told[name]) for name in default) < gpu_check.MOST  # nothing is cut


def test_failures_of_tests_are_told_by_function(tmp_path):
    path = tmp_path / "tests.xml"
    case = "<testcase classname='tests.kernels.test_norm' name='{}'>{}</testcase>"
    bad = "<failure message='off by\n  one'/>"
    cases = [case.format(f"test_it[{i}]", bad if i else "") for i in range(3)]
    cases.append(case.format("test_other", "<error message='no memory'/>"))
    counts = "tests='4' failures='2' errors='1' skipped='0' time='1.5'"
    path.write_text(f"<x><testsuite {counts}>{''.join(cases)}</testsuite></x>")
    first, *rest = gpu_check.failures(path).splitlines()
    assert first == "4 tests, 2 failures, 1 errors, 0 skipped, 1.5 s"
    assert rest == [
        "FAILED 2 x test_norm::test_it [1, 2]: off by one",
        "FAILED 1 x test_norm::test_other []: no memory",
    ]


def test_unknown_stages(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["env", "odd"])
    assert "got stages ['odd']; expected some of ['env', 'build'" in capsys.readouterr().err


def test_stages_without_a_gpu(tmp_path, monkeypatch):
    """In processes of their own, with the package as it is here."""
    monkeypatch.setattr(gpu_check.Check, "run_build", lambda self, limit: 0)
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--budget", "10000"]
    limits = {name: (1000, most) for name, (_, most) in gpu_check.LIMITS.items()}
    monkeypatch.setattr(gpu_check, "LIMITS", limits)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert gpu_check.main(["env", "build", "smoke", *options]) == 0
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.count(": ok") == 3 and summary.count("right") == 6
    assert f"torch {torch.__version__}" in summary
    rows = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").open()]
    assert len(rows) == 6 and {row["check"] for row in rows} == {"right"}


@pytest.fixture
def probes(tmp_path, monkeypatch):
    """What the parts write, on a CPU at tiny sizes."""
    options = dict(out=tmp_path, stage="speed", device="cpu", tiny=True, seconds=1e9, warm=False)
    monkeypatch.setattr(gpu_probes, "CHOSEN", argparse.Namespace(**options))
    monkeypatch.setattr(gpu_probes, "BAD", [])
    return lambda: [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").open()]


@torch.inference_mode()
def test_products_are_held_against_fp32_before_they_are_timed(probes, monkeypatch):
    x, weight = torch.randn(6, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    gpu_probes.product_case("up", x, weight, 4)
    rows = probes()
    assert {row["system"] for row in rows} == {
        *("cuBLAS all", "cuBLAS exact"),
        "grouped_mm",
    }
    wanted = {"role": "up", "rows": 4, "capacity": 6, "columns": 5, "depth": 8, "stage": "speed"}
    assert all(wanted.items() <= row.items() and row["median_ms"] > 0 for row in rows)
    monkeypatch.setattr(gpu_probes.F, "grouped_mm", lambda x, *a, **k: x[:, :5] + 100)
    gpu_probes.product_case("down", x, weight, 4)
    late = [row["system"] for row in probes() if row["role"] == "down"]
    assert len(late) == 2 and "grouped_mm" not in late
    assert gpu_probes.BAD == ["down, grouped_mm"]


@torch.inference_mode()
def test_what_is_only_warmed_or_has_no_time_is_not_timed(probes, monkeypatch, tmp_path):
    gpu_probes.bench.cache_clear()
    monkeypatch.setattr(gpu_probes.CHOSEN, "warm", True)
    assert gpu_probes.bench().case(2, 8, 0.0, "even", ["layers, graph"]) == {}
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(gpu_probes.CHOSEN, "warm", False)
    monkeypatch.setattr(gpu_probes.CHOSEN, "seconds", 0)
    gpu_probes.one()
    told = (tmp_path / "notes/speed.txt").read_text()
    assert "-- 1 x 8, exits 0.75 goal: not run" in told and told.count("not run") == 2
    gpu_probes.bench.cache_clear()


@torch.inference_mode()
def test_packed_peers_give_hugging_faces_logits(probes):
    shape = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 2}
    model = gpu.base(**shape, num_hidden_layers=2, intermediate_size=64)
    made = [gpu_probes.texts.uniform(1, n, 60)[0] for n in (5, 9)]
    batch = gpu_probes.texts.batch(made)
    wanted = gpu.judges(model, batch, None)[gpu.HF]()[batch.real]
    for attention in (gpu_probes.varlen, gpu_probes.flexible):
        got = gpu_probes.packed_graph(model, batch, attention)()[batch.real]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_launches_by_layer(probes, tmp_path):
    names = ["_query_key_value_kernel", "_exit_attention_fwd_kernel", *["_linear_kernel"] * 3]
    names.append("_exit_step_kernel")
    events, at = [(0, 2, "Memcpy DtoD")], 2
    for _ in range(2):  # replays
        for layer in range(3):
            for place, name in enumerate(names):
                events.append((at, at + 10 * (layer + 1) + place, name))
                at = events[-1][1]
    gpu_probes.by_layer(events, "launches", 3)
    us = {(row["kernel"], row["layer"]): row["us"] for row in probes()}
    assert us["down", 1] == 14 and us["up", 2] == 23 and us["output", 3] == 32
    assert us["_query_key_value_kernel", 3] == 30 and us["Memcpy DtoD", 1] == 1
    assert "busy for 406 us a replay; layers 1, 2, 3" in (tmp_path / "notes/speed.txt").read_text()


def test_what_breaks_the_context_ends_the_stage(probes, monkeypatch):
    """Not what says no more than that it would be told by assertions on the device."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)

    def breaks():
        raise RuntimeError("CUDA error: ...\nCompile with `TORCH_USE_CUDA_DSA` to enable ...")

    assert gpu_probes.attempt("that", breaks) is None
    assert not ended and gpu_probes.BAD == ["that"]
    monkeypatch.setattr(gpu_probes, "lost", lambda: True)
    gpu_probes.attempt("this", breaks)
    assert ended == [4] and gpu_probes.BAD == ["that", "this"]


def test_a_step_of_training_beside_hugging_faces(probes):
    gpu_probes.training_step(gpu.base(**gpu_probes.TINY, vocab_size=60), 2, 8, 0.5)
    rows = probes()
    assert [row["system"] for row in rows] == ["Hugging Face", "full depth", "self-sampling"]
    assert all(row["longest"] == 8 and "busy_ms" not in row for row in rows)  # on a CPU
    told = gpu_page.training([row | {"busy_ms": 1.25, "stage": "goals"} for row in rows])
    assert told.count("| 1.2 |") == 3 and "| self-sampling | 2 x 8 | 0.500 |" in told


def test_launches_that_overlap_are_busy_once(probes):
    events = [(0, 10, "query_key_value"), (8, 20, "_linear_kernel"), (30, 31, "c")]
    assert gpu_probes.busy_us(events) == gpu_probes.busy_us(events[::-1]) == 21
    gpu_probes.by_layer(events, "launches", 1)
    assert [row["us"] for row in probes()] == [10, 10, 1]


def test_exits_that_were_kept_are_imposed(probes, tmp_path):
    windows = [Sentence([90, 7, 300, 5], [-1, 0, 1, -1]), Sentence([90, 8, 5], [-1, 0, -1])]
    exits = [[4, 1, 4, 4], [2, 2, 2]]
    file = tmp_path / "kept.npz"
    gpu_exits.save_exits(exits, windows, file)
    assert gpu_exits.read_exits(file) == (windows, exits)
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert gpu_exits.main([str(file), *options]) == 0
    rows = probes()
    assert {(row["order"], row["stage"]) for row in rows} == {
        ("file", "exits"),
        ("sorted", "exits"),
    }
    assert all(row["active_fraction"] == round(19 / 28, 4) for row in rows)
    names = {gpu.HF, gpu_exits.VARLEN, gpu_exits.FULL, gpu_exits.EXITS}
    assert {row["system"] for row in rows} == names
    assert gpu_page.text(rows).count("| BERT-base | 64 |") == 2 and not gpu_page.text([])
    with file.open("wb") as other:
        gpu_exits.np.savez(other, lengths=[1])
    with pytest.raises(ValueError, match="expected .'exits', 'input_ids', 'word_ids'."):
        gpu_exits.read_exits(file)


def test_without_a_gpu_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_probes.main(["smoke"]) == 2
    assert capsys.readouterr().err == "No GPU is at hand.\n"
