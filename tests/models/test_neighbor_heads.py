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


@pytest.mark.parametrize("which", [True, "all"])
def test_full_depth_is_hugging_faces(which, tmp_path):
    theirs = random_classifier()
    ours = tokenexit.convert(theirs, neighbor_heads=which)
    hears = [type(head) is NeighborHead for head in ours.exit_heads]
    assert hears == [True] * 3 + [which == "all"]
    assert ours.untrained_heads() == [1, 2, 3]
    got, mask = layer_logits(ours), BATCH["attention_mask"] != 0
    with torch.no_grad():
        expected = theirs(BATCH["input_ids"], BATCH["attention_mask"]).logits
    torch.testing.assert_close(got.logits[mask], expected[mask], atol=1e-4, rtol=0)
    if which == "all":
        with pytest.raises(ValueError, match="whose last classifier hears the tokens beside"):
            tokenexit.to_hugging_face(ours)
    else:
        back = tokenexit.to_hugging_face(ours)
        assert all(torch.equal(back.state_dict()[k], v) for k, v in theirs.state_dict().items())
    theirs.save_pretrained(tmp_path)
    load = TokenExitForTokenClassification.from_pretrained
    again = load(tmp_path, neighbor_heads=which)
    again.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved", neighbor_heads=which).config.neighbor_heads == which
    with pytest.raises(ValueError, match="for a saved tagger of .*the heads it was trained with"):
        load(tmp_path / "saved", neighbor_heads="all" if which is True else True)
    with pytest.raises(
        ValueError, match="neighbor_heads is 'below'; expected True, False or 'all'"
    ):
        load(tmp_path / "saved", neighbor_heads="below")
    assert [type(head) is NeighborHead for head in again.exit_heads] == hears
    assert type(load(tmp_path).exit_heads[0]) is not NeighborHead


@pytest.mark.parametrize("which", ["below", 1, 0, None])
def test_others_are_refused(which):
    with pytest.raises(ValueError, match=f"neighbor_heads is {which!r}; expected True, False or"):
        tokenexit.convert(random_classifier(), neighbor_heads=which)


def test_new_ones_tell_nothing():
    head = tokenexit.convert(random_classifier(), neighbor_heads=True).exit_heads[0]
    own, tells = head.weight.tensor_split([5])
    assert own.any() and not tells.any() and not head.bias[5:].any()


@pytest.mark.parametrize("family", HEARING)
@pytest.mark.parametrize("kind", ["fp32", "int8", "bf16"])
@torch.no_grad()
def test_saved_and_loaded(kind, family, tmp_path):
    model = random_tagger(family, torch.bfloat16 if kind == "bf16" else torch.float32)
    if kind == "int8":
        model = tokenexit.quantize(model)
    model.policy = POLICY
    model.save_pretrained(tmp_path)
    again = TokenExitForTokenClassification.from_pretrained(tmp_path)
    assert again.loop == "cpu" and again.config.neighbor_heads == HEARING[family]
    got, expected = again(**BATCH), model(**BATCH)
    assert torch.equal(got.logits, expected.logits)
    assert len(got.exit_layers.unique()) > 2


@pytest.mark.parametrize("steps", [[True], ["all"], [True, "all"]])
def test_plain_heads_learn_to_hear_and_say_the_same(steps):
    model = random_tagger(dtype=torch.float32)
    model.mark_untrained([2])
    before = layer_logits(model).layer_logits
    with torch.no_grad():
        exits = model(**BATCH, policy=POLICY)
    for which in steps:
        let_heads_hear(model, which)
    with torch.no_grad():  # by the loop that remembers what it reads
        again = model(**BATCH, policy=POLICY)
    assert model.loop == "cpu" and torch.equal(again.exit_layers, exits.exit_layers)
    torch.testing.assert_close(again.logits, exits.logits)
    assert model.config.neighbor_heads == which and model.untrained_heads() == [2]
    torch.testing.assert_close(layer_logits(model).layer_logits, before, equal_nan=True)
    heads = [*model.exit_heads]
    let_heads_hear(model, which)
    assert all(a is b for a, b in zip(heads, model.exit_heads, strict=True))
    labels = (BATCH["word_ids"] % 5).masked_fill(BATCH["word_ids"] < 0, -100)
    model.train()(**BATCH, labels=labels).loss.backward()
    for head in model.exit_heads[: model.config.num_neighbor_heads]:
        assert head.weight.grad[5:].any()  # from what neighbours answered


@pytest.mark.parametrize("family", HEARING)
@torch.no_grad()
def test_more_labels_keep_what_is_told(family):
    model = random_tagger(family)
    before = layer_logits(model).layer_logits
    set_labels(model, [*"ABCDEFG"], keep=True)
    after = layer_logits(model).layer_logits
    torch.testing.assert_close(after[..., :5], before, equal_nan=True)
    mean = before.mean(-1, keepdim=True).expand_as(after[..., 5:])
    torch.testing.assert_close(after[..., 5:], mean, equal_nan=True)
    set_labels(model, [*"XYZ"], keep=False)
    assert model.exit_heads[0].out_features == 9 and not model.exit_heads[0].weight[3:].any()
    assert model.exit_heads[-1].out_features == (9 if HEARING[family] == "all" else 3)


@pytest.mark.parametrize("layer", [3, 4])
@torch.no_grad()
def test_what_was_told_before_leaving_is_heard_later(layer):
    """A token hears its neighbour as of the layer where that left, not as of now.

    Args:
        layer: the one that the last token of them leaves at.
    """
    model = random_tagger("bert, all hearing")
    ids = torch.randint(4, 60, (1, 3), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "word_ids": torch.arange(3)[None]}
    exits = torch.tensor([[1, layer, 2]])
    states = model(**call, exit_layers=exits, output_hidden_states=True).hidden_states
    said = [head(h[0]) for head, h in zip(model.exit_heads, states[1:], strict=True)]
    expected = said[layer - 1][1, :5] + said[0][0, 5:10] + said[1][2, 10:]
    for backend in ("eager", "reference"):
        model.backend = backend
        got = model(**call, exit_layers=exits)
        torch.testing.assert_close(got.logits[0, 1], expected)
        torch.testing.assert_close(got.logits[0, 0], said[0][0, :5] + said[0][1, 10:])


@pytest.mark.parametrize("family, last", [*zip(HEARING, (5, 15), strict=True)])
def test_heads_of_other_shapes_are_refused(family, last):
    model = random_tagger(family)
    expected = rf"got exit heads of shapes .*expected \[(\(32, 15\), ){{3}}\(32, {last}\)\]"
    with pytest.raises(ValueError, match=expected):
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
