"""Each instruction set gives the same results but for rounding, in a process of its own.

Run as a script, this file writes its results.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tokenexit import int8, layers
from tokenexit.int8 import Int8Linear
from tokenexit.ops import (
    ATTEND_IN_BF16,
    extension_available,
    extension_error,
    instruction_set,
    instruction_sets,
)
from tokenexit.ops.absorbed_attention import absorbed_attention
from tokenexit.ops.add_layer_norm import add_layer_norm
from tokenexit.ops.bias_gelu import bias_gelu
from tokenexit.ops.embed import embed
from tokenexit.ops.exit_attention import exit_attention
from tokenexit.ops.linear import linear
from tokenexit.ops.pack_tokens import pack
from tokenexit.packing import Active

pytestmark = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))

WAYS = {"projected": [0.0, 0.0, 1e30, 1e30], "absorbed": [1e30, 1e30, 0.0, 0.0]}
NAMES = instruction_sets()


def results(dtype=torch.float32):
    """What each op gives, gradients included; fp64 takes the plain PyTorch path."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    found = {}

    def keep(name, function, *inputs):
        leaves = [x.requires_grad_() for x in inputs]
        out = function(*leaves)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        found[name] = out.detach()
        found.update({f"{name} gradient {i}": grad for i, grad in enumerate(grads)})

    cu_q, cu_k = torch.tensor([0, 5, 5, 23, 24]), torch.tensor([0, 7, 9, 50, 90])
    positions = torch.cat([torch.arange(5), torch.arange(18), torch.tensor([33])])
    for dropout in (0.0, 0.25):
        keep(
            f"exit_attention, dropout {dropout}",
            lambda q, k, v, bias, p=dropout: exit_attention(
                q, k, v, cu_q, cu_k, 0.3, bias, positions, p, 7
            ),
            *(rand(24, 3, 20), rand(90, 3, 20), rand(90, 3, 20), rand(3, 11)),
        )
    keep("add_layer_norm", add_layer_norm, *(rand(*s) for s in ((5, 77), (5, 77), (77,), (77,))))
    keep("bias_gelu", bias_gelu, rand(5, 77), rand(77))
    keep("bias_gelu by tanh", lambda x, b: bias_gelu(x, b, "tanh"), rand(5, 77), rand(77))
    with torch.no_grad():
        bias = rand(3, 11)
        found["absorbed_attention"] = absorbed_attention(
            rand(24, 3, 37), rand(90, 37), cu_q, cu_k, 0.2, bias, positions
        )
        found["linear"] = linear(rand(37, 77), rand(10, 77), rand(10))
        mask = (torch.arange(41) < torch.tensor([7, 2, 41, 40])[:, None]).long()
        packed = pack(mask, torch.arange(41).expand_as(mask))
        tokens = torch.cat([torch.arange(5), torch.arange(9, 27), torch.tensor([83])])
        active = Active(packed, tokens, cu_q)
        for width in (48, 36):
            torch.manual_seed(0)
            layer = layers.ExitLayer(width, 3, 2 * width - 4).eval()
            h, bias = rand(90, width), rand(3, 11)
            for kind in ("fp32", "int8"):
                if kind == "int8":
                    for name, part in layer.named_children():
                        if isinstance(part, nn.Linear):
                            setattr(layer, name, Int8Linear(part))
                for name, way in WAYS.items():
                    layers.costs = lambda *_, way=way: way
                    found[f"layer of {width}, {kind}, {name}"] = layer.to(dtype)(h, active, bias)
    return found


def sums_of_embeddings(backend="auto"):
    """Of each kind of table, of 77 columns: whole vectors and a rest."""
    g = torch.Generator().manual_seed(0)
    numbers = [torch.randint(0, n, (9,), generator=g) for n in (50, 40, 2)]
    words, *others = (torch.randn(n, 77, generator=g) for n in (50, 40, 2))
    scale = words.abs().amax(1) / 127
    found = {
        f"embed, {dtype}": embed(
            *numbers, *(table.to(dtype) for table in (words, *others)), backend=backend
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    in_bytes = (words / scale[:, None]).round().char()
    found["embed, int8"] = embed(*numbers, in_bytes, *others, scale, backend=backend)
    return found


@pytest.fixture(scope="module")
def exact():
    costs, largest = layers.costs, int8.largest
    int8.largest = lambda: 127  # as below
    yield {**results(torch.float64), **sums_of_embeddings("reference")}
    layers.costs, int8.largest = costs, largest


@pytest.fixture(scope="module")
def by_name(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for name in NAMES:
        environment = {**os.environ, "TOKENEXIT_CPU": name}
        command = [sys.executable, __file__, str(folder / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return {name: torch.load(folder / name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_results_are_right(name, by_name, exact):
    assert by_name[name].keys() == exact.keys()
    for key, got in by_name[name].items():
        if key.startswith("embed"):
            limit = 0
        elif "int8" in key:  # rounded to bytes, activations are steps of a hundredth
            limit = 0.2
        else:
            limit = 1e-5 * max(1, exact[key].abs().max())
        assert (got - exact[key]).abs().max() <= limit, key


@pytest.mark.skipif(len(NAMES) < 2, reason="one instruction set here")
def test_the_name_is_heard(by_name):
    """Fused multiply-adds round once where the portable code rounds twice."""
    portable = by_name["portable"]
    for name in NAMES[1:]:
        for key in ("exit_attention, dropout 0.0", "linear", "layer of 48, fp32, absorbed"):
            assert not torch.equal(portable[key], by_name[name][key]), (name, key)


def test_8_bit_weights_mean_the_same_on_all(by_name):
    for name in NAMES[1:]:
        limit = 4e-3 if name in ATTEND_IN_BF16 else 2e-3
        for key, portable in by_name["portable"].items():
            if "int8" in key:  # a sum that falls between two bytes may be rounded to either
                difference = (portable - by_name[name][key]).abs()
                assert difference.max() < 0.1 and difference.mean() < limit, (name, key)


if __name__ == "__main__":
    assert instruction_set() == os.environ["TOKENEXIT_CPU"]
    int8.largest = lambda: 127
    torch.set_num_threads(1)
    torch.save({**results(), **sums_of_embeddings()}, sys.argv[1])
