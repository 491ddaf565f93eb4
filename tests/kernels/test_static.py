"""The loop with static shapes, by way of the model, against the reference."""

import itertools

import pytest
import torch
from assertions import assert_as_exact
from random_models import FAMILIES, random_batch, random_tagger
from test_reference import POLICIES

from tokenexit import ExitPolicy, compiled, static
from tokenexit.encoder import Schedule
from tokenexit.ops.pack_tokens import pack

LENGTHS = [5, 17, 1, 9, 2, 33]
MINE = [p for p in POLICIES if (p.copy, p.neighbors) == ("post_norm", "frozen")]


@pytest.fixture
def taken(device, monkeypatch):
    """The calls of the loop, which the interpreter runs on a CPU."""
    calls, loop = [], static.exit_loop
    monkeypatch.setattr(compiled, "applies", lambda *a: False)
    monkeypatch.setattr(static, "_DEVICES", {device})
    monkeypatch.setattr(static, "exit_loop", lambda *a: calls.append(a) or loop(*a))
    return calls


def both(tagger, batch, **kwargs):
    tagger.cuda_graphs, results = False, []
    for backend in ("auto", "reference"):
        tagger.backend = backend
        results.append(tagger(**batch, **kwargs))
    return results


CHOSEN = [*MINE[:-1:4], MINE[-1], ExitPolicy(window=1, threshold=(0.0, 0.5, 0.0, 0.0))]


@pytest.mark.parametrize("family, policy", list(zip(itertools.cycle(FAMILIES), CHOSEN)), ids=str)
@torch.no_grad()
def test_equals_the_reference(family, policy, device, taken):
    tagger = random_tagger(family, dtype=torch.float32).to(device)
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    ours, truth = both(tagger, batch, policy=policy)
    assert len(taken) == 1
    assert torch.equal(ours.exit_layers, truth.exit_layers)
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


@torch.no_grad()
def test_given_exits(device, taken):
    tagger = random_tagger(dtype=torch.float32).to(device)
    batch = {name: value.to(device) for name, value in random_batch(LENGTHS).items()}
    generator = torch.Generator().manual_seed(0)
    layers = torch.randint(1, 5, batch["input_ids"].shape, generator=generator).to(device)
    ours, truth = both(tagger, batch, exit_layers=layers)
    assert len(taken) == 1
    assert torch.equal(ours.exit_layers, truth.exit_layers)
    torch.testing.assert_close(ours.logits, truth.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision(device, taken):
    """The whole loop in fp16, with given exits, errs little more than the reference in fp16."""
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
    assert_as_exact(ours.logits, exact.logits, plain.logits)


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
def test_buffers_that_are_larger_than_the_batch(device):
    """What a graph runs on: each part padded, filled by one batch, then by a smaller one."""
    tagger = random_tagger("mpnet", dtype=torch.float32).to(device)
    layers, heads = tagger.encoder.layers, tagger.encoder.heads
    bias = torch.randn(4, 9, device=device)
    inputs = None
    for lengths in ([5, 17, 1, 9], [12, 3]):
        mask = (torch.arange(17) < torch.tensor(lengths)[:, None]).long()
        packed = pack(mask, torch.arange(17).expand_as(mask).contiguous())
        generator = torch.Generator().manual_seed(len(lengths))
        h = torch.randn(sum(lengths), 32, generator=generator).to(device)
        for name in vars(packed):
            value = getattr(packed, name)
            if torch.is_tensor(value):
                object.__setattr__(packed, name, value.to(device))
        schedule = Schedule.of(ExitPolicy(threshold=0.4, window=1), 4, len(lengths), h)
        arguments = (h, packed, schedule, bias, None)
        if inputs is None:
            inputs = static.buffers(48, 8, 32, *arguments)
        static.fill(inputs, *arguments)
        padded = static.exit_loop(layers, heads, *inputs)
        plain = static.exit_loop(layers, heads, *arguments)
        assert len(plain[1].unique()) > 1
        for a, b in zip(padded, plain, strict=True):
            assert torch.equal(a[: len(h)], b) and not a[len(h) :].any()
