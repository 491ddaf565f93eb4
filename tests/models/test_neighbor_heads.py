"""Heads that hear the tokens beside a token: how they are made, kept, and what they hear."""

import pytest
import torch
from random_models import HEARING, random_batch, random_classifier, random_tagger

import tokenexit
from tokenexit import ExitPolicy, reference
from tokenexit.layers import NeighborHead
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.training.start import let_heads_hear, set_labels

POLICY = ExitPolicy(threshold=0.8, window=1)
BATCH = random_batch([5, 17, 1, 9])


def layer_logits(model, **more):
    with torch.no_grad():
        return model(**BATCH, policy=ExitPolicy.never(), output_layer_logits=True, **more)


def test_full_depth_is_hugging_faces(tmp_path):
    theirs = random_classifier()
    ours = tokenexit.convert(theirs, neighbor_heads=True)
    assert [type(head) is NeighborHead for head in ours.exit_heads] == [True] * 3 + [False]
    assert ours.untrained_heads() == [1, 2, 3]
    got, mask = layer_logits(ours), BATCH["attention_mask"] != 0
    with torch.no_grad():
        expected = theirs(BATCH["input_ids"], BATCH["attention_mask"]).logits
    torch.testing.assert_close(got.logits[mask], expected[mask], atol=1e-4, rtol=0)
    back = tokenexit.to_hugging_face(ours)
    assert all(torch.equal(back.state_dict()[k], v) for k, v in theirs.state_dict().items())
    theirs.save_pretrained(tmp_path)
    load = TokenExitForTokenClassification.from_pretrained
    assert type(load(tmp_path, neighbor_heads=True).exit_heads[0]) is NeighborHead
    assert type(load(tmp_path).exit_heads[0]) is not NeighborHead


def test_new_ones_tell_nothing():
    head = tokenexit.convert(random_classifier(), neighbor_heads=True).exit_heads[0]
    own, tells = head.weight.tensor_split([5])
    assert own.any() and not tells.any() and not head.bias[5:].any()


@pytest.mark.parametrize("kind", ["fp32", "int8", "bf16"])
@torch.no_grad()
def test_saved_and_loaded(kind, tmp_path):
    model = random_tagger(HEARING, torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind == "int8":
        model = tokenexit.quantize(model)
    model.policy = POLICY
    model.save_pretrained(tmp_path)
    again = TokenExitForTokenClassification.from_pretrained(tmp_path)
    assert again.loop == "cpu" and again.config.neighbor_heads
    got, expected = again(**BATCH), model(**BATCH)
    assert torch.equal(got.logits, expected.logits)
    assert len(got.exit_layers.unique()) > 2


def test_plain_heads_learn_to_hear_and_say_the_same():
    model = random_tagger(dtype=torch.float32)
    model.mark_untrained([2])
    before = layer_logits(model).layer_logits
    with torch.no_grad():
        exits = model(**BATCH, policy=POLICY)
    let_heads_hear(model)
    with torch.no_grad():  # by the loop that remembers what it reads
        again = model(**BATCH, policy=POLICY)
    assert model.loop == "cpu" and torch.equal(again.exit_layers, exits.exit_layers)
    torch.testing.assert_close(again.logits, exits.logits)
    assert model.config.neighbor_heads and model.untrained_heads() == [2]
    torch.testing.assert_close(layer_logits(model).layer_logits, before, equal_nan=True)
    heads = [*model.exit_heads]
    let_heads_hear(model)
    assert all(a is b for a, b in zip(heads, model.exit_heads, strict=True))
    labels = (BATCH["word_ids"] % 5).masked_fill(BATCH["word_ids"] < 0, -100)
    model.train()(**BATCH, labels=labels).loss.backward()
    assert model.exit_heads[0].weight.grad[5:].any()  # from what neighbours answered


@torch.no_grad()
def test_more_labels_keep_what_is_told():
    model = random_tagger(HEARING)
    before = layer_logits(model).layer_logits
    set_labels(model, [*"ABCDEFG"], keep=True)
    after = layer_logits(model).layer_logits
    torch.testing.assert_close(after[..., :5], before, equal_nan=True)
    mean = before.mean(-1, keepdim=True).expand_as(after[..., 5:])
    torch.testing.assert_close(after[..., 5:], mean, equal_nan=True)
    set_labels(model, [*"XYZ"], keep=False)
    assert model.exit_heads[0].out_features == 9 and not model.exit_heads[0].weight[3:].any()


@torch.no_grad()
def test_what_was_told_before_leaving_is_heard_later():
    """A token hears its neighbour as of the layer where that left, not as of now."""
    model = random_tagger(HEARING)
    ids = torch.randint(4, 60, (1, 3), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "word_ids": torch.arange(3)[None]}
    exits = torch.tensor([[1, 3, 2]])
    states = model(**call, exit_layers=exits, output_hidden_states=True).hidden_states
    said = [head(h[0]) for head, h in zip(model.exit_heads, states[1:], strict=True)]
    expected = said[2][1, :5] + said[0][0, 5:10] + said[1][2, 10:]
    for backend in ("eager", "reference"):
        model.backend = backend
        got = model(**call, exit_layers=exits)
        torch.testing.assert_close(got.logits[0, 1], expected)
        torch.testing.assert_close(got.logits[0, 0], said[0][0, :5] + said[0][1, 10:])


def test_heads_of_other_shapes_are_refused():
    model = random_tagger(HEARING)
    with pytest.raises(ValueError, match=r"got exit heads of shapes .*expected \[\(32, 15\)"):
        model.exit_heads = [torch.nn.Linear(32, 5).double() for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_heard_is_a_sum_rounded_once(dtype):
    own, told = torch.randn(4, 3).to(dtype), torch.randn(5, 6).to(dtype)
    tokens, positions = torch.tensor([0, 1, 3, 4]), torch.tensor([0, 1, 2, 0, 1])
    got = reference.heard(own, told, tokens, positions)
    wide = told.double()
    expected = own.double()
    expected[0] += wide[1, 3:]
    expected[1] += wide[0, :3] + wide[2, 3:]
    expected[2] += wide[4, 3:]
    expected[3] += wide[3, :3]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected.to(dtype).double(), atol=0, rtol=8e-3)
    if dtype == torch.float64:
        torch.testing.assert_close(got, expected)
