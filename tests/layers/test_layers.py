"""ExitLayer and ExitHead: against Hugging Face's layer, and what a token that left costs."""

import pytest
import torch
from random_models import random_batch, random_classifier, random_tagger
from torch.utils.flop_counter import FlopCounterMode

import tokenexit
from tokenexit import flops
from tokenexit.layers import ConvolvedLayer, ExitHead, ExitLayer
from tokenexit.ops import extension_available
from tokenexit.ops.pack_tokens import pack
from tokenexit.packing import Active


def test_all_tokens_active_is_a_bert_layer():
    theirs = random_classifier()
    layer = tokenexit.convert(theirs).encoder.layers[0]
    h = torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = theirs.bert.encoder.layer[0](h)
        expected = expected if torch.is_tensor(expected) else expected[0]
        packed = pack(torch.ones(2, 9), torch.arange(9).expand(2, -1))
        got = layer(h.flatten(0, 1), Active.all(packed))
    torch.testing.assert_close(got, expected.flatten(0, 1), atol=1e-5, rtol=0)


def some_active():
    packed = pack(torch.ones(2, 9), torch.arange(9).expand(2, -1))
    return Active(packed, torch.tensor([0, 3, 8, 11]), torch.tensor([0, 3, 4]))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_with_and_without_gradients_the_states_are_the_same(pre_norm):
    layer = random_tagger(dtype=torch.float32).encoder.layers[0].eval()
    h, active = torch.randn(18, 32), some_active()
    trained = layer(h, active, pre_norm=pre_norm)
    assert trained.requires_grad
    with torch.no_grad():
        inferred = layer(h, active, pre_norm=pre_norm)
    torch.testing.assert_close(inferred, trained.detach(), atol=1e-5, rtol=1e-5)


def test_attention_dropout_follows_the_seed_of_torch():
    layer = ExitLayer(32, 4, 64, attention_dropout=0.3).train()
    h, active = torch.randn(18, 32), some_active()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        layer.zero_grad()
        out = layer(h, active)
        out.square().sum().backward()
        results.append((out.detach(), layer.key_value.weight.grad.clone()))
    assert all(map(torch.equal, results[0], results[1]))
    assert not torch.equal(results[0][0], results[2][0])
    assert torch.equal(layer.eval()(h, active), layer(h, active))


def test_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="hidden_size is 30; expected a multiple of num_heads, 4"):
        ExitLayer(30, 4, 60)


def test_refuses_convolutions_without_a_middle_or_whole_groups():
    terms = {"position_keys": True, "position_queries": True}
    for kernel, groups in ((4, 1), (3, 5)):
        with pytest.raises(ValueError, match=f"kernel_size is {kernel}, groups are {groups}; exp"):
            ConvolvedLayer(8, 2, 16, **terms, kernel_size=kernel, groups=groups)


def test_head_drops_its_input_in_training_only():
    head = ExitHead(64, 3, dropout=0.5)
    h = torch.ones(2, 64)
    assert not torch.equal(head(h)[0], head(h)[1])
    assert torch.equal(head.eval()(h)[0], head(h)[1])


@pytest.mark.parametrize("training", [False, True])
def test_operations_are_those_of_the_formula(training):
    """Counted as they run. A token that left costs its key and value, in training too."""
    tagger = random_tagger(dtype=torch.float32).train(training)
    batch = random_batch([9, 30, 4], seed=3)
    generator = torch.Generator().manual_seed(0)
    exits = torch.randint(1, 5, batch["input_ids"].shape, generator=generator)
    labels = torch.zeros_like(exits).masked_fill(batch["word_ids"] < 0, -100)
    with FlopCounterMode(display=False) as counter:
        output = tagger(**batch, labels=labels, exit_layers=exits)
        forward = counter.get_total_flops()
        if training:
            output.loss.backward()
    active = flops.active_tokens(output.exit_layers, 4)
    tokens = batch["attention_mask"].sum(1)
    assert flops.speedup(active, tokens, tagger.config) > 1.3
    expected = 2 * float(flops.multiply_adds(active, tokens, tagger.config).sum())
    # Attention's own products are counted where its dropout runs in the reference only.
    attention = float((2 * 2 * active * tokens[:, None] * 32).sum())
    in_the_reference = training and not extension_available()
    assert forward == pytest.approx(expected - attention * (not in_the_reference), rel=1e-6)
    if training:
        assert counter.get_total_flops() < 3.3 * expected


DROPOUTS = {
    "embeddings": lambda model: [model.embeddings.dropout],
    "sublayers": lambda model: [layer.dropout for layer in model.encoder.layers],
    "classifier": lambda model: [model.exit_heads[-1]],
}


@pytest.mark.parametrize("where", [*DROPOUTS, "all", "none"])
def test_dropout_is_where_hugging_face_has_it(where):
    """Under one seed: the same draws, in the same order, give the same logits."""
    theirs = random_classifier(attention_probs_dropout_prob=0.0)
    ours = tokenexit.convert(theirs)
    for head in ours.exit_heads[:-1]:
        head.dropout = 0.0  # theirs has none of these heads
    chosen = {where} if where in DROPOUTS else set(DROPOUTS) if where == "all" else set()
    for name, parts in DROPOUTS.items():
        for part in parts(ours):
            if isinstance(part, ExitHead):
                part.dropout = 0.4 * (name in chosen)
            else:
                part.p = 0.4 * (name in chosen)
    for name, part in theirs.named_modules():
        if isinstance(part, torch.nn.Dropout) and not name.endswith("attention.self.dropout"):
            of = "classifier" if name == "dropout" else name.split(".")[1]
            part.p = 0.4 * ({"encoder": "sublayers"}.get(of, of) in chosen)
    ids = torch.arange(5, 24)[None]
    results = {}
    for model in (theirs, ours):
        for seed in (0, 1):
            torch.manual_seed(seed)
            results[model, seed] = model.train()(ids).logits
        torch.manual_seed(0)
        evaluated = model.eval()(ids).logits
        assert torch.allclose(results[model, 0], evaluated, atol=1e-4) == (where == "none")
        assert torch.allclose(*(results[model, seed] for seed in (0, 1))) == (where == "none")
    for seed in (0, 1):
        torch.testing.assert_close(results[ours, seed], results[theirs, seed], atol=1e-4, rtol=1e-4)
