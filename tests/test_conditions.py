"""What a fast loop needs of what it reads; and whatever users do to modules, a model heeds it."""

import copy

import pytest
import torch
from random_models import random_batch, random_tagger
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

import tokenexit
from tokenexit import ExitPolicy, conditions
from tokenexit.layers import reads
from tokenexit.loops import cpu
from tokenexit.loops.memory import Held, Memory
from tokenexit.ops import extension_available

PRODUCTS = ("query", "key_value", "attention_output", "up", "down")
NORMS = ("attention_norm", "output_norm")
PARTS = [f"encoder.layers.1.{name}" for name in (*PRODUCTS, *NORMS, "dropout")]
CALL = {**random_batch((19, 1, 3, 40)), "policy": ExitPolicy(threshold=0.7, window=1)}
POLICIES = [CALL["policy"], ExitPolicy(threshold=0.7, copy="pre_norm", neighbors="recompute")]


@pytest.fixture
def fast(monkeypatch):
    """Counts the calls of the fast loop."""
    made, loop = [], cpu.exit_loop

    def counted(*a, **k):
        result = loop(*a, **k)
        made.append(1)
        return result

    monkeypatch.setattr(cpu, "exit_loop", counted)
    return made


@pytest.fixture
def model():
    return random_tagger(dtype=torch.float32)


def by_reference(model, **call):
    model.backend = "reference"
    try:
        return model(**{**CALL, **call})
    finally:
        model.backend = "auto"


def agrees_with_the_reference(model, **call):
    """Whether results are those of the reference, which calls all parts, but for rounding."""
    got, expected = model(**{**CALL, **call}), by_reference(model, **call)
    assert torch.equal(got.exit_layers, expected.exit_layers)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
    return got.logits


@pytest.mark.skipif(not extension_available(), reason="not compiled")
@torch.no_grad()
def test_as_made_it_is_fast(model, fast):
    agrees_with_the_reference(model)
    tokenexit.quantize(model)(**CALL)
    assert fast == [1, 1]


@pytest.mark.parametrize("name", [*PARTS, "encoder.layers.1", "encoder.heads.1", "encoder"])
@torch.no_grad()
def test_hooks_run(model, fast, name):
    before, calls = model(**CALL).logits, []
    module = model.get_submodule(name)
    for register in (module.register_forward_pre_hook, module.register_forward_hook):
        handle = register(lambda *_: calls.append(1))
        del fast[:], calls[:]
        torch.testing.assert_close(model(**CALL).logits, before, atol=1e-4, rtol=1e-4)
        assert calls and not fast
        handle.remove()
    model(**CALL)
    assert not extension_available() or fast == [1]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", [*PARTS[:-1], "encoder.heads.1"])
@torch.no_grad()
def test_hooks_change_what_comes_of_a_part(model, name, policy):
    before = model(**{**CALL, "policy": policy}).logits
    model.get_submodule(name).register_forward_hook(lambda module, inputs, out: 0.9 * out)
    assert not torch.allclose(agrees_with_the_reference(model, policy=policy), before)


@pytest.mark.parametrize("name", [*PARTS[:-1], "encoder.heads.1"])
@torch.no_grad()
def test_a_forward_of_a_module_s_own(model, name):
    before, module = model(**CALL).logits, model.get_submodule(name)
    whole = module.forward
    module.forward = lambda x: 0.9 * whole(x)
    assert not torch.allclose(agrees_with_the_reference(model), before)


@pytest.mark.parametrize("name", ["encoder", "encoder.layers.1", "encoder.layers.1.dropout"])
@torch.no_grad()
def test_a_forward_of_its_own_is_called(model, fast, name):
    before, module, calls = model(**CALL).logits, model.get_submodule(name), []
    whole = module.forward
    module.forward = lambda *a: calls.append(1) or whole(*a)
    del fast[:]
    torch.testing.assert_close(model(**CALL).logits, before, atol=1e-4, rtol=1e-4)
    assert calls and not fast


@torch.no_grad()
def test_hooks_on_all_modules(model, fast):
    model(**CALL)
    del fast[:]
    calls = []
    handle = register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        model(**CALL)
    finally:
        handle.remove()
    assert not fast
    assert calls.count(nn.Linear) >= 5 and nn.LayerNorm in calls and nn.Dropout in calls


@torch.no_grad()
def test_a_forward_of_another_s_on_a_class(model, fast, monkeypatch):
    model(**CALL)
    del fast[:]
    calls, whole = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(1) or whole(self, x))
    model(**CALL)
    assert calls and not fast


class Doubled(nn.Linear):
    """As adapters do it: the same weights, another forward."""

    def forward(self, x):
        return 2 * super().forward(x)


class Adapter(nn.Module):
    """As PEFT does it: the part within, and a path beside it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


def doubled(part):
    other = Doubled(part.in_features, part.out_features)
    other.load_state_dict(part.state_dict())
    return other


def without_bias(part):
    return nn.Linear(part.in_features, part.out_features, bias=False)


def transposed(part):
    part.weight = nn.Parameter(part.weight.detach().t().contiguous().t())


def strided(part):
    part.weight.data = part.weight.repeat_interleave(2, 1)[:, ::2]


def weight_of_no_parameter(part):
    weight = part.weight.detach().clone()
    del part.weight
    part.weight = 0.5 * weight


class Marked(torch.Tensor):
    """A tensor of another class, as quantizers make them."""


def of_another_class(part):
    part.weight = nn.Parameter(part.weight.detach().as_subclass(Marked))


CHANGES = [
    doubled,
    Adapter,
    without_bias,
    transposed,
    strided,
    weight_of_no_parameter,
    of_another_class,
    lambda part: prune.l1_unstructured(part, "weight", amount=0.5),
    lambda part: prune.ln_structured(part, "weight", amount=0.5, n=2, dim=0),
    torch.nn.utils.weight_norm,
    torch.nn.utils.spectral_norm,
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
]
IDS = [
    *("another class", "adapter", "no bias", "transposed", "strided", "no parameter"),
    *("tensor's class", "prune", "prune rows", "weight_norm", "spectral_norm"),
    *("parametrized weight_norm", "parametrized spectral_norm", "orthogonal"),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("change", CHANGES, ids=IDS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_changed_products(model, fast, name, change):
    layer = model.encoder.layers[1]
    with torch.no_grad():
        part = change(getattr(layer, name))
        if part is not None:
            setattr(layer, name, part)
        for policy in POLICIES:
            agrees_with_the_reference(model, policy=policy)
    assert not fast
    model(**{**CALL, "policy": ExitPolicy.never()}).logits.sum().backward()
    assert all(p.grad is not None for p in getattr(layer, name).parameters())


class RMSNorm(nn.Module):
    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


def norm_without(**what):
    return lambda norm: nn.LayerNorm(norm.normalized_shape, norm.eps, **what)


def other_eps(norm):
    norm.eps = 0.1


@pytest.mark.parametrize(
    "change",
    [
        norm_without(bias=False),
        norm_without(elementwise_affine=False),
        lambda norm: RMSNorm(),
        lambda norm: nn.Identity(),
        other_eps,
    ],
    ids=["no bias", "no weight", "RMS", "identity", "eps"],
)
@pytest.mark.parametrize("name", NORMS)
def test_changed_norms(model, name, change):
    layer = model.encoder.layers[1]
    norm = change(getattr(layer, name))
    if norm is not None:
        setattr(layer, name, norm)
    with torch.no_grad():
        for policy in POLICIES:
            agrees_with_the_reference(model, policy=policy)
    agrees_with_the_reference(model)


@torch.no_grad()
def test_changed_heads(model):
    for head in (without_bias(model.exit_heads[0]), doubled(model.exit_heads[0])):
        model.encoder.heads[0] = head
        agrees_with_the_reference(model)
    model.encoder.heads[0].weight = nn.Parameter(torch.randn(32, 5).t())
    agrees_with_the_reference(model)
    model.exit_heads = [nn.Linear(32, 5) for _ in range(4)]
    agrees_with_the_reference(model)


@torch.no_grad()
def test_a_head_without_bias(model):
    model.encoder.heads[1].bias = None
    agrees_with_the_reference(model)


@torch.no_grad()
def test_fewer_inner_features(model, fast):
    """As structured pruning leaves it: in one layer, and in all."""
    for layer in model.encoder.layers:
        layer.up, layer.down = nn.Linear(32, 48), nn.Linear(48, 32)
        agrees_with_the_reference(model)


@torch.no_grad()
def test_fewer_heads(model, fast):
    """As pruning of heads leaves it: a layer attends in fewer features than it has."""
    layer = model.encoder.layers[1]
    for name in ("query", "key_value", "attention_output"):
        part = getattr(layer, name)
        kept = torch.arange(part.out_features).unflatten(0, (-1, 4, 8))[:, :3].flatten()
        if name == "attention_output":
            part.weight = nn.Parameter(part.weight[:, :24].clone())
        else:
            part.weight = nn.Parameter(part.weight[kept])
            part.bias = nn.Parameter(part.bias[kept])
    layer.num_heads = 3
    agrees_with_the_reference(model)
    assert not fast


@torch.no_grad()
def test_dropout_in_a_mode_of_its_own(model):
    """As for Monte-Carlo dropout: the model in evaluation, its dropout in training."""
    before, layer = model(**CALL).logits, model.encoder.layers[1]
    layer.dropout.p = 0.5
    torch.testing.assert_close(model(**CALL).logits, before)
    layer.dropout.train()
    assert not torch.allclose(model(**CALL).logits, before, atol=1e-2)
    layer.dropout.eval()
    head = model.encoder.heads[0].train()
    head.dropout = 0.5
    assert not torch.allclose(model(**CALL).logits, before, atol=1e-2)


@torch.no_grad()
def test_dropout_replaced_by_nothing(model, fast):
    model.encoder.layers[1].dropout = nn.Identity()
    agrees_with_the_reference(model.train().eval())
    assert not fast


@torch.no_grad()
def test_weights_replaced_in_place(model, fast):
    """What changes in a parameter that stays itself is seen: `to` does it so."""
    never = {"policy": ExitPolicy.never()}
    agrees_with_the_reference(model, **never)
    part = model.encoder.layers[2].down
    part.weight.data = torch.randn(64, 32).t()
    agrees_with_the_reference(model, **never)
    part.weight.data = part.weight.data.contiguous()
    agrees_with_the_reference(model, **never)
    assert not extension_available() or fast == [1, 1]


@pytest.mark.parametrize("name", ["encoder", "encoder.layers", "encoder.heads", ""])
@torch.no_grad()
def test_weights_that_are_elsewhere_between_calls(model, name):
    """As accelerate's offloading has them: on no device but while their module is called."""
    before = model(**CALL).logits
    for part in model.get_submodule(name).modules():
        if not part._parameters:
            continue
        kept = {n: p for n, p in part._parameters.items() if p is not None}

        def leave(part, *_, kept=kept):
            part._parameters.update({n: nn.Parameter(p.to("meta")) for n, p in kept.items()})

        part.register_forward_pre_hook(lambda part, _, kept=kept: part._parameters.update(kept))
        part.register_forward_hook(leave)
        leave(part)
    torch.testing.assert_close(model(**CALL).logits, before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_accelerate_offloads(model):
    accelerate = pytest.importorskip("accelerate")
    before = model(**CALL).logits
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.encoder.layers[0].query.weight.is_meta
    got = model(**CALL)
    torch.testing.assert_close(got.logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("bert", "encoder.layers.1.up"),
        ("modernbert", "encoder.layers.1.up"),  # without a bias
        ("modernbert", "encoder.layers.2.key_value"),
        ("modernbert", "encoder.neck"),
        ("modernbert", "embeddings.norm"),
    ],
)
@torch.no_grad()
def test_weights_on_no_device_are_no_result(family, part):
    model = random_tagger(family, dtype=torch.float32)
    model.get_submodule(part).to("meta")
    with pytest.raises(ValueError, match=rf"{part.split('.')[-1]}.*weight is on meta; expected it"):
        model(**random_batch([5, 3]))


@pytest.mark.parametrize("change", CHANGES[:2] + CHANGES[7:], ids=IDS[:2] + IDS[7:])
def test_what_is_changed_is_not_rounded(model, change):
    """8-bit weights are those of the part alone: the rest would be lost."""
    layer = model.encoder.layers[1]
    part = change(layer.up)
    if part is not None:
        layer.up = part
    with pytest.raises(ValueError, match=r"another encoder.layers.1.up than it was made with"):
        tokenexit.quantize(model)
    assert type(layer.down) is nn.Linear


@torch.no_grad()
def test_int8_without_bias(model):
    model.encoder.layers[1].up = without_bias(model.encoder.layers[1].up)
    expected = model(**CALL, exit_layers=torch.full_like(CALL["input_ids"], 4)).logits
    got = tokenexit.quantize(model)(**CALL, exit_layers=torch.full_like(CALL["input_ids"], 4))
    assert (got.logits - expected).abs().max() < 0.2 * expected.abs().max()


@torch.no_grad()
def test_each_condition_has_its_name(model):
    layers, heads = [*model.encoder.layers], [*model.encoder.heads]

    def failed():

        return conditions.unmet(
            (*conditions.CALLS, *conditions.TENSORS), reads(layers, heads, torch.randn(3, 32))
        )

    assert failed() is None
    part = layers[1].up
    handle = part.register_forward_hook(lambda *_: None)
    assert failed() == "no hooks"
    handle.remove()
    part.forward = part.forward
    assert failed() == "forwards that are their classes' own"
    del part.forward
    part.bias, bias = None, part.bias
    assert failed() == "a weight and a bias in each part"
    part.bias = bias
    kept = part.weight.data
    for data, name in [
        (kept.to("meta"), "weights where the states are"),
        (kept.double(), "weights of the states' dtype"),
        (kept.t().contiguous().t(), "contiguous weights"),
        (kept[:9], "weights of shapes that fit"),
    ]:
        part.weight = nn.Parameter(data)
        assert failed() == name
    part.weight = nn.Parameter(kept)
    assert failed() is None
    layers[1].up = Adapter(part)
    assert failed() == "modules of the classes they were made of"


def test_a_model_tells_its_loop(model):
    fast = "cpu" if extension_available() else "eager: a fast loop needs the compiled ops"
    assert model.loop.startswith(fast)
    if fast != "cpu":
        return
    model.policy = POLICIES[1]
    assert model.loop == "eager: a fast loop needs copy 'post_norm'"
    model.policy = CALL["policy"]
    handle = model.encoder.layers[2].down.register_forward_hook(lambda *_: None)
    assert model.loop == "eager: a fast loop needs no hooks"
    handle.remove()
    assert model.double().loop == "eager: a fast loop needs states in fp32 or bf16"
    model.float().encoder.layers[0].up.weight.data = torch.randn(32, 64).t()
    assert model.loop == "eager: a fast loop needs contiguous weights"
    model.backend = "reference"
    assert model.loop == "reference"


def renamed(model):
    layer = model.encoder.layers[1]
    layer.other = layer._modules.pop("dropout")  # the last of its names


def swapped(model):
    layers = model.encoder.layers
    layers[0], layers[1] = layers[1], layers[0]


def of_another_class(model):
    model.exit_heads[0].__class__ = nn.Linear


def of_other_dictionaries(model):
    part = model.encoder.layers[2].up
    part._parameters = {name: nn.Parameter(p * 2) for name, p in part._parameters.items()}


def more(model):
    model.encoder.layers[3].down.extra = nn.Identity()


def fewer(model):
    model.encoder.layers[3].down.bias = None


def another_buffer(model):
    model.token_kinds = model.token_kinds.clone()


def in_training(model):
    model.encoder.layers[1].dropout.train()


def of_another_eps(model):
    model.encoder.layers[2].output_norm.eps = 1e-3


def of_another_activation(model):
    model.encoder.layers[0].activation = torch.relu


def hooked(model):
    model.encoder.layers[1].up.register_forward_hook(lambda *_: None)


def hooked_before(model):
    model.embeddings.norm.register_forward_pre_hook(lambda *_: None)


def with_a_forward_of_its_own(model):
    model.embeddings.word.forward = lambda ids: ids


def of_another_dictionary(model):
    part = model.encoder.layers[3].up
    part.__dict__ = {**part.__dict__, "in_features": 3}


class Sub(nn.Parameter):
    pass


def swapped_in_place(model):
    part = model.encoder.layers[1].up
    torch.utils.swap_tensors(part.bias, nn.Parameter(part.bias.clone()).as_subclass(Sub))


HOLDS = [renamed, swapped, of_another_class, of_other_dictionaries, more, fewer, another_buffer]
ATTRIBUTES = [in_training, of_another_eps, of_another_activation, hooked, hooked_before]
ATTRIBUTES += [with_a_forward_of_its_own, of_another_dictionary, swapped_in_place]


@pytest.mark.skipif(not extension_available(), reason="not compiled")
@pytest.mark.parametrize("change", [*HOLDS, *ATTRIBUTES], ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_was_met_is_asked_anew_of_what_has_changed(model, change):
    memory = Memory()
    for failed in ("some", None):  # what is not met is asked every time
        assert memory.of(model).met("a", lambda failed=failed: failed) == failed
    held = memory.of(model)
    assert held.is_all and held.met("a", lambda: "some") is None
    handle = model.encoder.layers[0].up.register_forward_hook(lambda *_: None)
    assert memory.of(model) is not held
    handle.remove()
    held = memory.of(model)
    change(model)
    assert memory.of(model) is not held and memory.of(model).met("a", lambda: "some") == "some"


@torch.no_grad()
def test_a_policy_has_nothing_looked_at_anew(model):
    model(**CALL)
    held = model._memory.of(model)
    model.policy = ExitPolicy(threshold=0.3)
    model(CALL["input_ids"], CALL["attention_mask"])
    assert model._memory.of(model) is held


@pytest.mark.parametrize("sees", [True, False], ids=["attributes", "tensors alone"])
@pytest.mark.parametrize("change", HOLDS, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_is_remembered_is_of_what_is_still_held(model, change, sees, monkeypatch):
    if not sees:  # as without the compiled ops
        monkeypatch.setattr("tokenexit.loops.memory.facts", lambda modules: None)
    memory = Memory()
    held = memory.of(model)
    assert len(held.tensors) == len(model.state_dict())
    found = held.once("a", object)
    assert memory.of(model) is held and held.once("a", object) is found
    change(model)
    new = memory.of(model)
    assert new is not held and memory.of(model) is new and new.once("a", object) is not found
    assert memory.of(random_tagger(dtype=torch.float32)) is not new
    assert copy.deepcopy(memory)._last is None


@torch.no_grad()
def test_a_scripted_part_is_remembered_too(model):
    model.encoder.layers[1].up = torch.jit.script(model.encoder.layers[1].up)
    memory = Memory()
    assert len(memory.of(model).tensors) == len(model.state_dict())
    agrees_with_the_reference(model)
    tensors = [x.data_ptr() for x in memory.of(model).tensors]
    assert tensors == [x.data_ptr() for x in Held(model).tensors]
