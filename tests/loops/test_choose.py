"""The door to the loops: which one runs a call, what happens if the one asked for can't."""

import pytest
import torch
from random_models import random_batch, random_tagger
from torch import nn

import tokenexit
from tokenexit import ExitPolicy
from tokenexit.layers import ExitNeck
from tokenexit.loops import BACKENDS, CONDITIONS, LOOPS
from tokenexit.ops import extension_available, extension_error

needs_ops = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))
CALL = {**random_batch((19, 1, 3, 40)), "policy": ExitPolicy(threshold=0.7, window=1)}


@pytest.fixture
def model():
    return random_tagger(dtype=torch.float32)


def test_each_loop_has_a_name_and_conditions():
    assert BACKENDS == ("auto", "cpu", "eager", "gpu", "reference")
    assert LOOPS.keys() == CONDITIONS.keys() and all(LOOPS[name].name == name for name in LOOPS)


@needs_ops
@torch.no_grad()
def test_asked_for_by_name(model):
    found = {}
    for name in ("auto", "cpu", "eager", "reference"):
        model.backend = name
        assert model.loop == ("cpu" if name == "auto" else name)
        found[name] = model(**CALL)
    for name in ("auto", "eager"):
        assert torch.equal(found[name].logits, found["cpu"].logits)
        assert torch.equal(found[name].exit_layers, found["cpu"].exit_layers)
    assert torch.equal(found["reference"].exit_layers, found["cpu"].exit_layers)
    torch.testing.assert_close(found["reference"].logits, found["cpu"].logits, atol=1e-4, rtol=1e-4)


def other_policy(model):
    return {"policy": ExitPolicy(copy="pre_norm")}


def hooked(model):
    model.encoder.layers[1].up.register_forward_hook(lambda *_: None)


def replaced(model):
    model.encoder.layers[1].up = nn.Sequential(model.encoder.layers[1].up)


def turned(model):  # which the op itself finds
    part = model.encoder.layers[0].down
    part.weight.data = torch.randn(64, 32).t()


def dropping(model):
    model.encoder.layers[0].dropout.train().p = 0.1


def necked(model):
    model.encoder.neck = ExitNeck(32)


CHANGES = [
    (other_policy, "copy 'post_norm'"),
    (lambda model: {"output_layer_logits": True}, "no logits of each layer"),
    (lambda model: model.double() and None, "states in fp32 or bf16"),
    (hooked, "no hooks"),
    (replaced, "modules of the classes they were made of"),
    (turned, "contiguous weights"),
    (dropping, "no dropout to be done"),
    (necked, "classifiers on the states themselves"),
]


@needs_ops
@pytest.mark.parametrize("change, lacks", CHANGES, ids=[lacks for _, lacks in CHANGES])
@torch.no_grad()
def test_one_that_cannot_is_told(model, change, lacks):
    call = {**CALL, **(change(model) or {})}
    model.backend = "cpu"
    with pytest.raises(ValueError, match=f"backend is 'cpu', whose loop needs {lacks}; expected"):
        model(**call)
    model.backend = "auto"
    torch.manual_seed(0)
    got = model(**call)
    model.backend = "eager"
    torch.manual_seed(0)
    assert torch.equal(got.logits, model(**call).logits)


@needs_ops
def test_gradients_are_not_for_the_fast_loop(model):
    model.backend = "cpu"
    with pytest.raises(ValueError, match="'cpu', whose loop needs no gradients"):
        model(**CALL)
    with torch.no_grad(), pytest.raises(ValueError, match="needs no logits of each layer"):
        model.train()(**CALL)


@torch.no_grad()
def test_the_loop_of_a_gpu_where_there_is_none(model):
    model.backend = "gpu"
    assert model.loop == "none: the loop 'gpu' needs states on a GPU"
    with pytest.raises(ValueError, match="backend is 'gpu', whose loop needs states on a GPU"):
        model(**CALL)


def test_the_reference_has_no_dropout(model):
    model.backend = "reference"
    model.train()
    with pytest.raises(ValueError, match="'reference', whose loop needs no dropout in layers"):
        model(**CALL)
    assert model.loop == "none: the loop 'reference' needs no dropout in layers"


@needs_ops
@torch.no_grad()
def test_embeddings_in_another_dtype_than_their_weights(model):
    """A hook may give anything; what is chosen before is mended after."""
    expected = model(**CALL)
    model.embeddings.register_forward_hook(lambda module, inputs, h: h.double())
    model.encoder.double()
    got = model(**CALL)
    assert torch.equal(got.exit_layers, expected.exit_layers)
    torch.testing.assert_close(got.logits.float(), expected.logits, atol=1e-4, rtol=1e-4)
    model.backend = "cpu"
    with pytest.raises(ValueError, match="whose loop needs states of the dtype"):
        model(**CALL)


@needs_ops
@torch.no_grad()
def test_bytes_in_each_loop_that_can(model):
    tokenexit.quantize(model)
    found = []
    for model.backend in ("cpu", "eager"):
        found.append(model(**CALL).logits)
    assert torch.equal(*found)
