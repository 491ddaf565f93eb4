"""The ops' user functions on Triton, by way of a model in training, against the reference."""

import importlib

import pytest
import torch
from assertions import ATOL, assert_as_exact
from random_models import FAMILIES, random_batch, random_tagger

from tokenexit import ExitPolicy, ops

OPS = ("exit_attention", "add_layer_norm", "bias_gelu", "exit_decision")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = [("pre_norm", "frozen"), ("post_norm", "recompute")]


@pytest.fixture
def taken(device, monkeypatch):
    """The ops that took Triton, which the interpreter runs on a CPU too."""
    names = set()
    for name in OPS:
        module = importlib.import_module(f"tokenexit.ops.{name}")

        def choose(backend, *tensors, name=name, real=module.use_triton):
            takes = real(backend, *tensors)
            if device == "cpu":
                takes = backend == "auto" and ops._load_kernels()
            names.update({name} if takes else ())
            return takes

        monkeypatch.setattr(module, "use_triton", choose)
    return names


def step(family, dtype, device, backend, policy=None, exact=False):
    """Loss, exits and gradients of a step of training; exact: of the same weights in fp64."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tagger = random_tagger(family, dtype=torch.float32, layers=3, **off).to(device, dtype).train()
    tagger = tagger.double() if exact else tagger
    tagger.backend = backend
    batch = {name: value.to(device) for name, value in random_batch([5, 17, 1, 9]).items()}
    labels = torch.where(batch["attention_mask"] > 0, batch["input_ids"] % 5, -100)
    generator = torch.Generator().manual_seed(0)
    exits = torch.randint(1, 4, labels.shape, generator=generator).to(device)
    out = tagger(
        **batch, labels=labels, **({"policy": policy} if policy else {"exit_layers": exits})
    )
    out.loss.backward()
    return [out.loss, *(p.grad for p in tagger.parameters() if p.grad is not None)], out.exit_layers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_training(family, dtype, device, taken):
    if device == "cpu" and dtype != torch.float32:
        pytest.skip("on a GPU only")
    ours, exits = step(family, dtype, device, "auto")
    assert taken == set(OPS) - {"exit_decision"}  # exits are given
    plain, _ = step(family, dtype, device, "reference")
    truth, wanted = step(family, dtype, device, "reference", exact=True)
    assert torch.equal(exits, wanted)
    for i, results in enumerate(zip(ours, truth, plain, strict=True)):
        # What three layers sum up, forth and back, and what that does to plain PyTorch somewhere:
        # one element it may get right by chance.
        somewhere = (results[2].double() - results[1]).abs().max() / ATOL[results[0].dtype]
        size = 6 * results[1].abs().max() + somewhere
        assert_as_exact(*results, "backward" if i else "forward", str(i), size)


@pytest.mark.parametrize("copy, neighbors", KINDS)
def test_policies_that_the_static_loop_leaves_out(copy, neighbors, device, taken):
    policy = ExitPolicy(window=1, threshold=0.6, copy=copy, neighbors=neighbors)
    ours, exits = step("bert", torch.float32, device, "auto", policy)
    assert taken == set(OPS)
    truth, wanted = step("bert", torch.float32, device, "reference", policy)
    assert torch.equal(exits, wanted) and len(wanted.unique()) > 2
    torch.testing.assert_close(ours[0], truth[0], atol=1e-5, rtol=1e-5)
