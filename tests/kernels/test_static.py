"""The loop with static shapes, by way of the model, against the reference."""

import itertools

import pytest
import torch
from assertions import assert_as_exact
from random_models import FAMILIES, random_batch, random_tagger
from test_reference import POLICIES

from tokenexit import ExitPolicy, compiled, static
from tokenexit.encoder import Schedule

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
            inputs = static.buffers((8, 32), rows, schedule)
        static.fill(*inputs, rows, schedule)
        roomy, exact = tagger._tag_static(*inputs), tagger._tag_static(rows, schedule)
        b, n = batch["input_ids"].shape
        assert len(exact[1].unique()) > 2 and exact[2] and roomy[2]
        assert torch.equal(roomy[1][:b, :n], exact[1])
        for large, small in zip(roomy[:2], exact[:2], strict=True):
            torch.testing.assert_close(large[:b, :n], small)
            assert not large[b:].any() and not large[:, n:].any()
