"""The loop of all layers in one op: the same bits as layer by layer, and when it stands back."""

import dataclasses

import pytest
import torch
from random_models import CONVOLVED, FAMILIES, HEARING, random_batch, random_tagger
from torch import nn

import tokenexit
from tokenexit import ExitPolicy
from tokenexit.conditions import unmet
from tokenexit.loops import CONDITIONS, Call, cpu
from tokenexit.ops.bias_gelu import gelu_tanh
from tokenexit.ops.pack_tokens import pack
from tokenexit.schedule import Schedule

pytestmark = pytest.mark.usefixtures("poisoned")

POLICIES = [
    ExitPolicy.never(),
    ExitPolicy(threshold=0.7, window=1),
    ExitPolicy(threshold=0.9, window=0, min_active=4),
    ExitPolicy(threshold=(0.0, 0.8, 0.0, 0.5), window=0, criterion="max_prob"),
    ExitPolicy.sentence(0.95),
]
LENGTHS = (19, 1, 3, 40, 7, 2, 25)


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the loop."""
    made, loop = [], cpu.exit_loop
    monkeypatch.setattr(cpu, "exit_loop", lambda *a, **k: made.append(1) or loop(*a, **k))
    return made


def arguments():
    """Of the loop: two sentences, 14 tokens, 4 layers."""
    model, batch = random_tagger(dtype=torch.float32), random_batch((5, 9))
    packed, h = pack(batch["attention_mask"], batch["word_ids"]), torch.randn(14, 32)
    return model.encoder, h, packed, Schedule.of(POLICIES[1], 4, 2, h)


def loop(encoder, h, packed, schedule):
    call = Call(encoder, h, schedule)
    assert unmet(CONDITIONS["cpu"], call) is None
    return cpu.exit_loop(call.layers, call.reads, h, packed, schedule)


def layer_by_layer(model, **call):
    model.backend = "eager"
    try:
        return model(**call)
    finally:
        model.backend = "auto"


@pytest.fixture
def sums(monkeypatch):
    """Counts the calls of the op that sums embeddings."""
    made, op = [], cpu.sum_of_embeddings
    monkeypatch.setattr(cpu, "sum_of_embeddings", lambda *a: made.append(1) or op(*a))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["albert", "bert", "distilbert", "electra", "mpnet", "roberta"])
@torch.no_grad()
def test_embeddings_are_the_module_s_to_the_bit(family, dtype, calls, sums):
    model, batch = random_tagger(family, dtype=dtype), random_batch(LENGTHS)
    batch["input_ids"] = batch["input_ids"].clamp(min=2)
    got = model(**batch)
    assert calls == sums == [1]
    expected = layer_by_layer(model, **batch)
    assert sums == [1] and torch.equal(got.logits, expected.logits)
    if family == "bert":
        more = {"token_type_ids": batch["input_ids"] % 2}
        more["position_ids"] = torch.arange(40).flip(0).expand_as(batch["input_ids"])
        got, expected = model(**batch, **more), layer_by_layer(model, **batch, **more)
        assert len(sums) == 2 and torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.register_forward_hook(lambda module, given, out: out * 2),
        lambda e: e.word.register_forward_hook(lambda module, given, out: out * 2),
        lambda e: e.norm.register_forward_pre_hook(lambda module, given: (given[0] * 2,)),
        lambda e: setattr(e.position, "forward", lambda at: torch.ones(len(at), 32)),
        lambda e: setattr(e.word, "max_norm", 0.1),
        lambda e: setattr(e, "norm", nn.Identity()),
        lambda e: setattr(e.word, "weight", nn.Parameter(torch.randn(32, 60).T)),
    ],
)
@torch.no_grad()
def test_embeddings_that_are_not_plain_are_called(change, calls, sums):
    model, batch = random_tagger(dtype=torch.float32), random_batch(LENGTHS)
    model(**batch)
    change(model.embeddings)
    if isinstance(model.embeddings.norm, nn.Identity):
        model.embeddings.norm.weight = model.embeddings.position.weight  # whose dtype is asked
    del calls[:], sums[:]
    got, expected = model(**batch), layer_by_layer(model, **batch)
    assert calls == [1] and not sums
    # A largest norm changes the weights at each call.
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_too_few_embeddings_are_told_as_ever(calls):
    model, batch = random_tagger(dtype=torch.float32), random_batch((5,))
    model.embeddings.word = nn.Embedding(3, 32)
    with pytest.raises(IndexError, match="index out of range"):
        model(**{**batch, "input_ids": batch["input_ids"].clamp(min=4)})


@pytest.mark.parametrize("kind", ["fp32", "int8", "bf16"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *HEARING])
@torch.no_grad()
def test_same_bits_as_layer_by_layer(family, policy, given, kind, calls):
    model = random_tagger(family, torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind == "int8":
        model = tokenexit.quantize(model)
    call = {**random_batch(LENGTHS), "policy": policy}
    if given:
        generator = torch.Generator().manual_seed(0)
        shape = call["input_ids"].shape
        call["exit_layers"] = torch.randint(1, 5, shape, generator=generator)
    got, expected = model(**call), layer_by_layer(model, **call)
    assert calls == [1]
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.exit_layers, expected.exit_layers)
    if given:
        assert len(got.exit_layers.unique()) == 5


@pytest.mark.parametrize("kind", ["fp32", "int8", "bf16"])
@torch.no_grad()
def test_gelu_by_tanh(kind, calls):
    """In the loop as layer by layer, and it is another function."""
    model = random_tagger(
        dtype=torch.bfloat16 if kind == "bf16" else torch.float32, hidden_act="gelu_new"
    )
    if kind == "int8":
        model = tokenexit.quantize(model)
    call = {**random_batch(LENGTHS), "policy": ExitPolicy.never()}
    got, expected = model(**call).logits, layer_by_layer(model, **call).logits
    assert calls == [1] and model.loop == "cpu"
    assert torch.equal(got, expected)
    for layer in model.encoder.layers:
        layer.activation = torch.nn.functional.gelu
    assert not torch.equal(got, model(**call).logits)
    model.encoder.layers[0].activation = gelu_tanh
    assert "one activation in all layers" in model.loop


@torch.no_grad()
def test_a_policy_for_each_sentence(calls):
    """A layer decides if it does for any of them."""
    model = random_tagger(dtype=torch.float32)
    policies = [ExitPolicy.never(), ExitPolicy(threshold=0.1, window=0), ExitPolicy.sentence(0.95)]
    call = {**random_batch((9, 19, 7)), "policy": policies}
    got, expected = model(**call), layer_by_layer(model, **call)
    assert calls == [1] and len(got.exit_layers[1].unique()) > 2
    assert torch.equal(got.exit_layers, expected.exit_layers)
    assert torch.equal(got.logits, expected.logits)


@torch.no_grad()
def test_leaves_its_input_alone(calls):
    encoder, h, packed, schedule = arguments()
    before = h.clone()
    loop(encoder, h, packed, schedule)
    assert torch.equal(h, before)


@torch.no_grad()
def test_nan_of_a_head_whose_words_leave_later_is_told(calls):
    model = random_tagger(dtype=torch.float32)
    model.exit_heads[1].bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN logits at layer 2.*encoder.heads.1.bias"):
        model(**random_batch((5, 9)), policy=ExitPolicy.never())
    assert calls == [1]


@torch.no_grad()
def test_nan_leaves_no_layers_that_nobody_wrote(calls, poisoned):
    """A program made by torch.export gives them to its user."""
    encoder, h, packed, schedule = arguments()
    encoder.heads[0].bias[0] = torch.nan
    logits, layers, no_nan = loop(encoder, h, packed, schedule)
    assert logits.isnan().all() and not layers.any() and not no_nan


class Adapted(nn.Linear):
    """As adapters do it: the same weights, another forward."""

    def forward(self, x):
        return 2 * super().forward(x)


def wrap_query(model):
    layer = model.encoder.layers[1]
    layer.query = Adapted(32, 32)


def hook_a_head(model):
    model.exit_heads[0].register_forward_hook(lambda module, inputs, out: out + 1)


def other_eps(model):
    model.encoder.layers[2].output_norm.eps = 0.1  # of one of the layer's two


def other_eps_of_a_layer(model):
    layer = model.encoder.layers[2]
    layer.attention_norm.eps = layer.output_norm.eps = 0.1


def other_heads(model):
    model.encoder.layers[2].num_heads = 2


def other_scale(model):
    model.encoder.layers[2].scale = 0.9


def other_scale_of_all(model):
    for layer in model.encoder.layers:
        layer.scale = 0.9


@pytest.mark.parametrize(
    "change, applies",
    [
        (wrap_query, 0),
        (hook_a_head, 0),
        (other_eps, 0),
        (other_eps_of_a_layer, 1),
        (other_heads, 0),
        (other_scale, 0),
        (other_scale_of_all, 1),
    ],
)
@torch.no_grad()
def test_changed_parts_count(change, applies, calls):
    model, call = random_tagger(dtype=torch.float32), random_batch(LENGTHS)
    call["policy"] = ExitPolicy.never()
    before = model(**call).logits
    change(model)
    changed = model(**call).logits
    assert len(calls) == 1 + applies
    expected = layer_by_layer(model, **call).logits
    assert torch.equal(changed, expected)
    # What the last layer's logits hang on is seen in them.
    assert (change is hook_a_head) == torch.equal(before, changed)


@torch.no_grad()
def test_odd_widths_go_by_pytorch_in_bf16_only(calls):
    model = random_tagger(dtype=torch.float32, intermediate_size=33)
    assert model.loop == "cpu"
    model.bfloat16()
    assert model(**random_batch(LENGTHS)).logits.isfinite().all() and not calls
    assert "needs even widths of heads and of inner layers in bf16" in model.loop


@pytest.mark.parametrize("change", [{"copy": "pre_norm"}, {"neighbors": "recompute"}])
@torch.no_grad()
def test_other_policies_go_layer_by_layer(change, calls):
    model = random_tagger(dtype=torch.float32)
    model(**random_batch((5, 9)), policy=ExitPolicy(threshold=0.7, **change))
    model.double()(**random_batch((5, 9)))
    assert calls == []


def test_gradients_go_layer_by_layer(calls):
    random_tagger(dtype=torch.float32)(**random_batch((5, 9))).logits.sum().backward()
    assert calls == []


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("word_at", torch.full((14,), 99), RuntimeError, "got word 99 of"),
        ("cu_tokens", torch.tensor([0, 5, 20]), RuntimeError, "cu_tokens ends at 20; expected 14"),
        ("cu_words", torch.tensor([0, 9, 3]), RuntimeError, "cu_words falls from 9 to 3"),
        (
            "word_of_token",
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            r"got word_of_token \[3\]",
        ),
        ("positions", torch.zeros(14), TypeError, "got positions of torch.float32"),
    ],
)
@torch.no_grad()
def test_refuses_what_does_not_fit(name, value, error, message):
    *others, packed, schedule = arguments()
    packed = dataclasses.replace(packed, **{name: value})
    with pytest.raises(error, match=message):
        loop(*others, packed, schedule)


@torch.no_grad()
def test_one_graph_for_torch_compile():
    torch._dynamo.reset()
    encoder, h, packed, schedule = arguments()

    def run(h):
        return loop(encoder, h, packed, schedule)

    expected = run(h)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(h)
    assert all(map(torch.equal, got, expected))


# Those that go layer by layer, all sizes of which hang on values in a program, too.
BY_LAYER = [("deberta-v2", CONVOLVED), ("modernbert", {}), *((x, {}) for x in HEARING)]
SLOW = ExitPolicy(threshold=0.7, window=1, copy="pre_norm", neighbors="recompute")


@pytest.mark.parametrize("family, more", [*((f, {}) for f in (*FAMILIES, "albert")), *BY_LAYER])
@pytest.mark.parametrize("policy", [*POLICIES[:2], SLOW], ids=str)
@torch.no_grad()
def test_torch_export_takes_the_whole_model(family, more, policy):
    """Of one example, for batches with other tokens and another number of them."""
    model = random_tagger(family, torch.float32, **more)
    model.policy = policy
    by_bits = model.loop == "cpu"
    example, other = random_batch((5, 9, 2)), random_batch((9, 1, 7), seed=3)
    program = torch.export.export(model, (), example, strict=False).module()
    for batch in (example, other):
        got, expected = program(**batch), model(**batch)
        assert torch.equal(got.exit_layers, expected.exit_layers)
        close = {"atol": 0, "rtol": 0} if by_bits else {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(got.logits, expected.logits, **close)


@pytest.mark.parametrize(
    "changes, lacks",
    [
        ({"backend": "reference"}, "loop 'reference', of which .*; expected another backend"),
        ({"dtype": torch.float64}, "loop 'eager', of which .*; expected states in fp32 or bf16"),
        ({"training": True}, "loop 'eager', of which .*; expected no dropout in layers"),
        ({"gradients": True}, "loop 'eager', of which .*; expected no gradients"),
    ],
    ids=str,
)
def test_torch_export_of_what_there_is_no_program_of(changes, lacks):
    model = random_tagger("modernbert", changes.get("dtype", torch.float32), attention_dropout=0.1)
    model.backend = changes.get("backend", "auto")
    model.train("training" in changes)
    with torch.set_grad_enabled("gradients" in changes), pytest.raises(ValueError, match=lacks):
        torch.export.export(model, (), random_batch((5, 9)), strict=False)
