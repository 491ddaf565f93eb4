"""Calls that are recorded: a graph is replayed before the model is looked over, and never believed.

The eager loop stands in for the GPU's, which Triton's interpreter would take long for.
"""

import contextlib
from dataclasses import replace

import pytest
import recording
import torch
from random_models import random_batch, random_tagger
from torch import nn

from tokenexit import ExitPolicy
from tokenexit.loops import LOOPS, Loop, eager, gpu
from tokenexit.models import pipeline
from tokenexit.ops.bias_gelu import gelu_tanh

BATCH = random_batch([5, 9, 1])
POLICY = ExitPolicy(threshold=0.5, window=1)


def run(call, h, packed, schedule, bias, exits):
    """The eager loop, for a schedule that has room for more sentences."""
    tensors = zip(("window", "min_active", "threshold"), schedule.tensors, strict=True)
    mine = {name: tensor[..., : packed.num_sentences] for name, tensor in tensors}
    return eager.run(call, h, packed, replace(schedule, **mine), bias, exits)


class Steps(list):
    """What was done so far: "recorded", "replayed", "looked over"; and the recordings."""

    recorded = None


@pytest.fixture
def steps(monkeypatch):
    done, choose, record = Steps(), pipeline.choose, recording.Graph.__init__
    replay = recording.Graph.replay

    def then(name, step):
        return lambda *args: (done.append(name), step(*args))[1]

    monkeypatch.setattr(pipeline, "choose", then("looked over", choose))
    monkeypatch.setattr(recording.Graph, "__init__", then("recorded", record))
    monkeypatch.setattr(recording.Graph, "replay", then("replayed", replay))
    monkeypatch.setattr(gpu, "_DEVICES", {"cpu"})
    monkeypatch.setattr(gpu, "lacks", lambda device: None)
    loops = {**LOOPS, "gpu": Loop("gpu", run, waits=False)}
    monkeypatch.setattr("tokenexit.loops.LOOPS", loops)
    done.recorded = recording.pretend(monkeypatch)
    return done


@pytest.fixture
def tagger(steps):
    steps.recorded.module = tagger = random_tagger(dtype=torch.float32)
    tagger.policy = POLICY
    return tagger


def check(tagger, steps, expected, **kwargs):
    """A call gives what the eager loop gives, in these steps."""
    steps.clear()
    got = tagger(**BATCH, **kwargs)
    assert steps == expected
    tagger.backend = "eager"
    wanted = tagger(**BATCH, **kwargs)
    tagger.backend = "auto"
    assert torch.equal(got.exit_layers, wanted.exit_layers)
    torch.testing.assert_close(got.logits, wanted.logits)
    assert not gpu.FALLBACKS


FIRST = ["looked over", "recorded", "replayed"]
AHEAD = ["replayed", "looked over"]


@torch.no_grad()
def test_a_graph_is_replayed_before_the_model_is_looked_over(tagger, steps):
    for expected in (FIRST, AHEAD, AHEAD):
        check(tagger, steps, expected)
    tagger.cuda_graphs = False
    check(tagger, steps, ["looked over"])


def hooked(tagger):
    tagger.encoder.layers[1].up.register_forward_hook(lambda module, inputs, out: out + 1)


def adapted(tagger):  # as adapters do it: the same weights, another forward
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    old = tagger.encoder.layers[2].query
    tagger.encoder.layers[2].query = new = Adapted(*old.weight.shape)
    new.weight, new.bias = old.weight, old.bias


def bounded(tagger):
    tagger.encoder.layers[3].activation = torch.tanh


def turned(tagger):  # the same memory
    weight = tagger.encoder.layers[0].query.weight
    weight.data = weight.data.t()


CHANGES = [hooked, adapted, bounded, turned]  # what no graph does


def other_weight(tagger):
    layer = tagger.encoder.layers[1]
    layer.down.weight = nn.Parameter(layer.down.weight * 2)


def other_data(tagger):
    tagger.exit_heads[0].bias.data = tagger.exit_heads[0].bias + 1


def other_part(tagger):
    tagger.encoder.layers[3].up = nn.Linear(32, 64)


def other_kinds(tagger):
    tagger.token_kinds = torch.ones_like(tagger.token_kinds)


def other_eps(tagger):
    layer = tagger.encoder.layers[2]
    layer.attention_norm.eps = layer.output_norm.eps = 0.5


def other_activation(tagger):
    for layer in tagger.encoder.layers:
        layer.activation = gelu_tanh


# What is recorded anew.
OTHERS = [other_weight, other_data, other_part, other_kinds, other_eps, other_activation]


@pytest.mark.parametrize("change", CHANGES + OTHERS, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_has_changed_is_found_after_a_replay(change, tagger, steps):
    for expected in (FIRST, AHEAD):
        check(tagger, steps, expected)
    change(tagger)
    then = AHEAD, ["looked over"]  # not replayed in vain again
    if change in OTHERS:
        then = [*AHEAD, "recorded", "replayed"], AHEAD
    for expected in then:
        check(tagger, steps, expected)
    assert len(steps.recorded.alive) == (change in OTHERS)


@torch.no_grad()
def test_calls_of_other_kinds_leave_graphs_alone(tagger, steps):
    check(tagger, steps, FIRST)
    for more in (
        {"policy": POLICY.replace(copy="pre_norm")},
        {"policy": POLICY.replace(neighbors="recompute")},
        {"output_hidden_states": True},
        {"output_layer_logits": True},
    ):
        check(tagger, steps, ["looked over"], **more)
    with torch.enable_grad():
        check(tagger, steps, ["looked over"])
    tagger.train()
    tagger(**BATCH)
    tagger.eval()
    check(tagger, steps, AHEAD)


@torch.no_grad()
def test_what_is_wrong_is_told_of_a_replay_too(tagger, steps):
    check(tagger, steps, FIRST)
    bad = BATCH | {"input_ids": BATCH["input_ids"].masked_fill(BATCH["attention_mask"] != 0, 60)}
    with pytest.warns(UserWarning, match="value out of range"):
        with pytest.raises(ValueError, match="input_ids has 60; expected values from 0 to 59"):
            tagger(**bad)
    tagger.encoder.layers[2].up.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN logits at layer 3"):
        tagger(**BATCH, policy=ExitPolicy.never().replace(threshold=1e-9))
    assert steps[-2:] == AHEAD


@torch.no_grad()
def test_a_model_that_is_moved_forgets_its_graphs(tagger, steps):
    check(tagger, steps, FIRST)
    tagger.float()
    assert not steps.recorded.alive
    check(tagger, steps, FIRST)


@torch.no_grad()
def test_kernels_are_launched_on_the_device_of_the_model(tagger, steps, monkeypatch):
    """Triton asks for the current one; and a call can't be part of another graph."""
    entered = []

    @contextlib.contextmanager
    def device(of):
        entered.append(of)
        yield

    expected = tagger(**BATCH).logits
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(pipeline, "_is_on_gpu", lambda model: True)
    assert torch.equal(tagger(**BATCH).logits, expected) and entered[0] == tagger.device
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="a call within a CUDA graph that is being recorded"):
        tagger(**BATCH)
