"""The loop with static shapes, by way of the model, against the reference."""

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import recording
import torch
from random_models import FAMILIES, HEARING, random_batch, random_tagger
from test_reference import POLICIES

from tokenexit import ExitPolicy
from tokenexit.loops import LOOPS, Call, gpu, graphs
from tokenexit.loops.memory import Held
from tokenexit.models import pipeline
from tokenexit.models.rows import Rows
from tokenexit.ops.pack_tokens import pack
from tokenexit.schedule import Schedule

LENGTHS = [5, 17, 1, 9, 2, 33] if torch.cuda.is_available() else [5, 17, 1, 9, 2]
MINE = [p for p in POLICIES if (p.copy, p.neighbors) == ("post_norm", "frozen")]


@pytest.fixture
def taken(device, monkeypatch):
    """The calls of the loop, which the interpreter runs on a CPU."""
    calls, loop = [], gpu.exit_loop
    monkeypatch.setattr(gpu, "_DEVICES", {device})
    monkeypatch.setattr(gpu, "exit_loop", lambda *a, **k: calls.append(a) or loop(*a, **k))
    return calls


def tag(tagger, rows, schedule):
    """Padded logits, layers and whether all was sound, as a graph of the model has them."""
    call = Call(tagger.encoder, torch.empty(1, 32), schedule)
    return pipeline.tag(tagger, Rows(**rows), call, LOOPS["gpu"])[:3]


def both(tagger, batch, **kwargs):
    tagger.cuda_graphs, results = False, []
    for backend in ("auto", "reference"):
        tagger.backend = backend
        results.append(tagger(**batch, **kwargs))
    return results


CHOSEN = [*MINE[:-1:4], MINE[-1], ExitPolicy(window=1, threshold=(0.0, 0.5, 0.0, 0.0))]


PAIRS = [
    *zip(itertools.cycle(FAMILIES), CHOSEN),
    *zip(itertools.cycle(HEARING), [*CHOSEN[::2], *CHOSEN[::2][::-1]]),
]


@pytest.mark.parametrize("family, policy", PAIRS, ids=str)
@torch.no_grad()
def test_equals_the_reference(family, policy, device, taken, poisoned):
    tagger = random_tagger(family, dtype=torch.float32).to(device)
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    ours, truth = both(tagger, batch, policy=policy)
    assert len(taken) == 1
    assert torch.equal(ours.exit_layers, truth.exit_layers)
    torch.testing.assert_close(ours.logits, truth.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_gelu_by_tanh(device, taken):
    tagger = random_tagger(dtype=torch.float32, hidden_act="gelu_new").to(device)
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    ours, truth = both(tagger, batch, policy=MINE[0])
    assert len(taken) == 1
    torch.testing.assert_close(ours.logits, truth.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_policy_for_each_sentence_and_few_words_left(device, taken):
    tagger = random_tagger(dtype=torch.float32).to(device)
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    policies = [ExitPolicy(threshold=0.05 * i, min_active=i + 1) for i in range(len(LENGTHS))]
    ours, truth = both(tagger, batch, policy=policies)
    assert len(taken) == 1 and len(truth.exit_layers.unique()) > 3
    assert torch.equal(ours.exit_layers, truth.exit_layers)
    torch.testing.assert_close(ours.logits, truth.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", *HEARING])
@torch.no_grad()
def test_given_exits(family, device, taken):
    tagger = random_tagger(family, dtype=torch.float32).to(device)
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    generator = torch.Generator().manual_seed(0)
    layers = torch.randint(1, 5, batch["input_ids"].shape, generator=generator).to(device)
    ours, truth = both(tagger, batch, exit_layers=layers)
    assert len(taken) == 1
    assert torch.equal(ours.exit_layers, truth.exit_layers)
    torch.testing.assert_close(ours.logits, truth.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision(device, taken):
    """The whole loop in fp16, with given exits, errs little more than the reference in fp16.

    Layers make more of a rounding in some tokens than in others, so errors are compared as a whole.
    """
    half = random_tagger(dtype=torch.float16).to(device)
    truth = random_tagger(dtype=torch.float16).double().to(device)  # of the same rounded weights
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    generator = torch.Generator().manual_seed(0)
    layers = torch.randint(1, 5, batch["input_ids"].shape, generator=generator).to(device)
    ours, plain = both(half, batch, exit_layers=layers)
    assert len(taken) == 1
    truth.backend = "reference"
    exact = truth(**batch, exit_layers=layers)
    assert torch.equal(ours.exit_layers, exact.exit_layers)
    error, of_plain = ((x.logits.double() - exact.logits).abs() for x in (ours, plain))
    assert error.max() <= 2 * of_plain.max() and error.mean() <= 1.5 * of_plain.mean()


@torch.no_grad()
def test_nan_is_told(device, taken):
    tagger = random_tagger(dtype=torch.float32).to(device)
    tagger.encoder.layers[2].up.weight[0, 0] = torch.nan
    tagger.cuda_graphs = False
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    with pytest.raises(ValueError, match="NaN logits at layer 3"):
        tagger(**batch, policy=ExitPolicy.never())
    assert len(taken) == 1


@torch.no_grad()
def test_nan_that_a_later_head_hides(device, taken):
    tagger = random_tagger(dtype=torch.float32).to(device)
    tagger.exit_heads[1].bias[0] = torch.nan
    tagger.cuda_graphs = False
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    with pytest.raises(ValueError, match="NaN logits at layer 2"):
        tagger(**batch, policy=ExitPolicy(threshold=0.3))
    assert len(taken) == 1


@torch.no_grad()
def test_loss_and_what_else_is_given(device, taken):
    """Labels, kinds of tokens, positions; padding on both sides."""
    tagger = random_tagger(dtype=torch.float32).to(device)
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    batch = {name: value.roll(3, 1) for name, value in batch.items()}
    batch["attention_mask"][:, :2] = 0
    real = batch["attention_mask"] != 0
    ids = batch["input_ids"]
    batch |= {"token_type_ids": ids % 2, "position_ids": ids + 100}
    batch["labels"] = (ids % 5).masked_fill(~real, -100)
    ids.masked_fill_(~real, 10**6)  # never looked at
    ours, truth = both(tagger, batch, policy=ExitPolicy(threshold=0.3))
    assert len(taken) == 1 and len(truth.exit_layers.unique()) > 2
    assert torch.equal(ours.exit_layers, truth.exit_layers)
    torch.testing.assert_close(ours.logits, truth.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.loss, truth.loss, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_hooks_of_embeddings_are_called(device, taken):
    tagger = random_tagger(dtype=torch.float32).to(device)
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    seen = []
    tagger.embeddings.word.register_forward_hook(lambda *_: seen.append(1))
    both(tagger, batch)
    assert len(seen) == 2 and not taken


@pytest.mark.parametrize("policy", [ExitPolicy(copy="pre_norm"), ExitPolicy(neighbors="recompute")])
@torch.no_grad()
def test_policies_that_it_leaves_to_others(policy, device, taken):
    tagger = random_tagger(dtype=torch.float32).to(device)
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    ours, truth = both(tagger, batch, policy=policy)
    assert not taken
    assert torch.equal(ours.exit_layers, truth.exit_layers)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_ids", 60, "input_ids has 60; expected values from 0 to 59"),
        ("input_ids", -1, "input_ids has -1"),
        ("token_type_ids", 2, "token_type_ids has 2"),
        ("position_ids", 160, "position_ids has 160"),
        ("exit_layers", 0, "exit_layers has 0; expected values from 1 to 1"),
        ("attention_mask", 0, "attention_mask is 0 everywhere"),
        ("labels", 5, "labels has 5"),
    ],
)
@torch.no_grad()
def test_bad_rows_are_told_and_do_no_harm(name, value, message, device, taken):
    tagger = random_tagger(dtype=torch.float32, layers=1).to(device)
    tagger.cuda_graphs = False
    batch = {name: value.to(device) for name, value in random_batch([2, 2]).items()}
    batch[name] = torch.full_like(batch["input_ids"], value)
    with pytest.raises(ValueError, match=message):
        tagger(**batch)
    assert len(taken) == 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_buffers_that_are_larger_than_the_batch(family, device):
    """What a graph runs on: filled by one batch, then by a smaller one."""
    tagger = random_tagger(family, dtype=torch.float32).to(device)
    inputs = None
    for lengths in ([5, 17, 1, 9], [12, 3]):
        batch = {name: value.to(device) for name, value in random_batch(lengths).items()}
        rows = dict.fromkeys(("token_type_ids", "position_ids", "exit_layers")) | batch
        rows["attention_mask"] = rows["attention_mask"] != 0
        like = torch.empty(0, device=device)
        schedule = Schedule.of(ExitPolicy(threshold=0.4, window=1), 4, len(lengths), like)
        if inputs is None:
            inputs = graphs.Inputs((8, 32), rows, schedule)
        inputs.fill(rows, schedule)
        roomy = tag(tagger, inputs.rows, inputs.schedule)
        exact = tag(tagger, rows, schedule)
        b, n = batch["input_ids"].shape
        assert len(exact[1].unique()) > 2 and exact[2] and roomy[2]
        assert torch.equal(roomy[1][:b, :n], exact[1])
        for large, small in zip(roomy[:2], exact[:2], strict=True):
            # Products of other sizes have other tiles.
            torch.testing.assert_close(large[:b, :n], small, atol=1e-4, rtol=1e-4)
            assert not large[b:].any() and not large[:, n:].any()


@pytest.fixture
def graphed(device, taken, monkeypatch):
    """Makes a tagger whose calls are recorded: for real on a GPU, as `recording` pretends else."""
    made = recording.pretend(monkeypatch) if device == "cpu" else None
    monkeypatch.setattr(gpu, "FALLBACKS", Counter())

    def graphed(dtype=torch.float32, **shape):
        tagger = random_tagger(dtype=dtype, **({"layers": 2} | shape)).to(device)
        tagger.cuda_graphs = True
        if made is not None:
            made.module = tagger
        return tagger

    return graphed


def batch_of(lengths, device, longest=0):
    batch = random_batch([*lengths, longest] if longest else lengths)
    if longest:  # the columns are there, the sentence is not
        batch = {name: value[:-1] for name, value in batch.items()}
    return {name: value.long().to(device) for name, value in batch.items()}


def check_graphs(tagger, batch, times=2, **kwargs):
    """Recorded and replayed, then replayed alone, against the reference."""
    ours = [tagger(**batch, **kwargs) for _ in range(times)]
    tagger.backend = "reference"
    truth = tagger(**batch, **kwargs)
    tagger.backend = "auto"
    for got in ours:
        assert torch.equal(got.exit_layers, truth.exit_layers)
        torch.testing.assert_close(got.logits, truth.logits, atol=1e-4, rtol=1e-4)
    assert not gpu.FALLBACKS and tagger._graphs._graphs
    return truth


POLICY = ExitPolicy(threshold=0.5, window=1)


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [([1], 0), ([3, 0, 2, 0], 0), ([0, 0, 4], 0), ([2, 1], 9), ([512] * 300, 0), ([512], 0)],
    ids=["1x1", "empty ones", "empty first", "empty columns", "300x512", "1x512"],
)
@torch.no_grad()
def test_odd_batches_in_graphs(lengths, longest, device, graphed):
    if device == "cpu" and max(lengths) > 100:
        pytest.skip("on a GPU only")
    tagger, batch = graphed(max_position_embeddings=600), batch_of(lengths, device, longest)
    if max(lengths) < 100:
        check_graphs(tagger, batch, policy=POLICY)
    else:  # of so many decisions some are within rounding of the threshold
        check_graphs(tagger, batch, exit_layers=1 + batch["input_ids"] % 2)


@torch.no_grad()
def test_a_policy_for_each_sentence_in_graphs(device, graphed):
    tagger, batch = graphed(), batch_of([5, 9, 1], device)
    policies = [ExitPolicy.never(), ExitPolicy.sentence(0.6), POLICY]
    truth = check_graphs(tagger, batch, policy=policies)
    assert len(truth.exit_layers.unique()) > 2
    check_graphs(tagger, batch, policy=[p.replace(criterion="max_prob") for p in policies])


@torch.no_grad()
def test_weights_that_change_between_calls(device, graphed):
    """In place, by other data, by other parameters, by other modules."""
    tagger, batch = graphed(), batch_of([5, 9, 1], device)
    layer, seen = tagger.encoder.layers[1], []

    def other_head():
        tagger.exit_heads[0] = torch.nn.Linear(32, 5).to(device)

    def other_words():
        tagger.embeddings.word.weight = torch.nn.Parameter(tagger.embeddings.word.weight * 1.5)

    def other_data():
        layer.up.weight.data = layer.up.weight * 2

    changes = (lambda: layer.down.bias.add_(1), other_data, other_words, other_head)
    for change in (lambda: None, *changes):
        change()
        seen.append(check_graphs(tagger, batch, times=1, policy=POLICY).logits)
    assert not any(map(torch.equal, seen, seen[1:]))


@torch.no_grad()
def test_nan_in_a_graph_is_told_and_mended(device, graphed):
    tagger, batch = graphed(), batch_of([5, 2], device)
    before = check_graphs(tagger, batch, times=1, policy=POLICY)
    kept = tagger.encoder.layers[1].up.weight.clone()
    tagger.encoder.layers[1].up.weight[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="met a NaN"), pytest.raises(ValueError, match="layer 2"):
        tagger(**batch, policy=ExitPolicy.never())
    assert gpu.FALLBACKS == {"unsound": 1}
    gpu.FALLBACKS.clear()
    tagger.encoder.layers[1].up.weight.copy_(kept)
    again = check_graphs(tagger, batch, times=1, policy=POLICY)
    assert torch.equal(again.logits, before.logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_dynamo_goes_round_what_it_cannot_trace(device, graphed):
    tagger, batch = graphed(), batch_of([5, 2], device)
    tagger.cuda_graphs = False
    wanted = tagger(**batch, policy=POLICY)
    got = torch.compile(tagger, backend="eager")(**batch, policy=POLICY)
    assert torch.equal(got.exit_layers, wanted.exit_layers)
    torch.testing.assert_close(got.logits, wanted.logits)


@torch.no_grad()
def test_autocast_leaves_the_loop_in_its_dtype(device, graphed):
    tagger, batch = graphed(torch.float16), batch_of([5, 2], device)
    for tagger.cuda_graphs in (False, True):
        wanted = tagger(**batch, policy=POLICY)
        with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
            got = tagger(**batch, policy=POLICY)
        assert torch.equal(got.logits, wanted.logits) and got.logits.dtype == torch.float16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_two_threads_and_two_streams_in_graphs(device, graphed):
    tagger = graphed()
    batches = [batch_of(lengths, device) for lengths in ([5, 9, 1], [16] * 8, [60] * 20, [2])]
    wanted = [tagger(**batch, policy=POLICY).logits for batch in batches]
    torch.cuda.synchronize()

    def calls(number):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for i in range(40):
                at = (i * (number + 1)) % len(batches)
                got = tagger(**batches[at], policy=POLICY).logits
                torch.testing.assert_close(got, wanted[at], atol=1e-5, rtol=1e-5)
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(calls, range(2)))
    # Of one thread, none of which is waited for by the host.
    held = lambda: Held(tagger).tensors  # noqa: E731
    recorder, streams, results = tagger._graphs, [torch.cuda.Stream() for _ in range(2)], []
    rows = dict.fromkeys(("token_type_ids", "position_ids", "exit_layers"))
    for i in range(40):
        with torch.cuda.stream(streams[i % 2]):
            batch = batches[i % 3]
            given = rows | batch | {"attention_mask": batch["attention_mask"] != 0}
            schedule = Schedule.of(POLICY, 2, len(batch["input_ids"]), wanted[0])
            results.append((i % 3, recorder(partial(tag, tagger), given, schedule, held)[0]))
    torch.cuda.synchronize()
    for at, got in results:
        torch.testing.assert_close(got, wanted[at], atol=1e-5, rtol=1e-5)
    assert not gpu.FALLBACKS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_out_of_memory_is_told_and_done_with(device, graphed):
    tagger, small = graphed(), batch_of([5, 9, 1], device)
    before = check_graphs(tagger, small, policy=POLICY)
    large = batch_of([128] * 4096, device)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total + 1e-4)
        with pytest.warns(UserWarning, match="memory"), pytest.raises(torch.OutOfMemoryError):
            tagger(**large, policy=POLICY)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gpu.FALLBACKS.clear()
    assert torch.equal(check_graphs(tagger, small, policy=POLICY).logits, before.logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_the_loop_compiled(device, graphed):
    """By torch.compile's own backend, in one graph."""
    tagger, batch = graphed(), batch_of([5, 9, 1], device)
    packed = pack(batch["attention_mask"] != 0, batch["word_ids"])
    ids = packed.pack(batch["input_ids"])
    h = tagger.embeddings(ids, packed.positions, torch.zeros_like(ids))
    arguments = tagger.encoder.layers, tagger.encoder.heads, h, packed
    arguments += (Schedule.of(POLICY, 2, 3, h),)
    wanted = gpu.exit_loop(*arguments)
    got = torch.compile(gpu.exit_loop, fullgraph=True)(*arguments)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0], atol=1e-4, rtol=1e-4)
