"""Tagging beside training: results of evaluation, and the model keeps its mode and its hooks."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from random_models import random_batch, random_tagger
from torch import nn

import tokenexit
from tokenexit import Dial, ExitPolicy, Speed, Tagger
from tokenexit.loops.memory import Held
from tokenexit.models.evaluation import evaluating
from tokenexit.ops import extension_available, extension_error

SENTENCES = [["john", "smith"], ["paris"], ["red", "the", "new", "york"], ["in"]]


@pytest.fixture
def tagger(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    model = random_tagger(dtype=torch.float32, vocab_size=len(tokenizer))
    for layer, head in zip(model.encoder.layers, model.exit_heads, strict=True):
        layer.dropout.p = layer.attention_dropout = head.dropout = 0.5
    model.embeddings.dropout.p = 0.5
    model.policy = ExitPolicy(threshold=0.8, window=0)
    return Tagger(model, tokenizer)


class Adapter(nn.Module):
    """A module of another's, with dropout of its own."""

    def __init__(self, base):
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(0.5)

    def forward(self, x):
        return self.base(self.dropout(x))


def in_another_mode(model):
    model.encoder.layers[1].dropout.train()


def adapted(model):
    model.encoder.layers[1].up = Adapter(model.encoder.layers[1].up)
    model.train()


def own_forward(model):
    part = model.encoder.layers[1]
    whole = part.forward
    part.forward = lambda *a: whole(*a)
    model.train()


@pytest.mark.parametrize("change", [nn.Module.train, in_another_mode, adapted, own_forward])
def test_results_of_evaluation_in_any_mode(tagger, change):
    expected = tagger.tag(SENTENCES)
    change(tagger.model)
    modes = [module.training for module in tagger.model.modules()]
    assert tagger.tag(SENTENCES) == expected
    assert [module.training for module in tagger.model.modules()] == modes


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_not_changed_meanwhile(tagger, training):
    """Another thread sees it: it trains without dropout, or tags with it."""
    model, seen = tagger.model.train(training), []
    parts = [model, model.embeddings, model.encoder.layers[2], model.encoder.heads[0]]
    model.embeddings.word.register_forward_hook(
        lambda *_: seen.append({part.training for part in parts})
    )
    tagger.tag(SENTENCES)
    assert seen == [{training}]


def test_another_thread_changes_the_mode_meanwhile(tagger):
    expected, model = tagger.tag(SENTENCES), tagger.model
    model.embeddings.word.register_forward_hook(lambda *_: model.train() and None)
    assert tagger.tag(SENTENCES) == expected
    assert model.training


@pytest.mark.parametrize("change", [nn.Module.train, own_forward])
def test_many_threads(tagger, change):
    expected, results = tagger.tag(SENTENCES), []
    change(tagger.model)
    threads = [
        threading.Thread(target=lambda: results.extend(tagger.tag(SENTENCES) for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 20
    assert all(module.training for module in tagger.model.modules())


def test_what_is_changed_later_is_seen(tagger):
    """Weights, hooks and policies are the model's, not a copy's."""
    model = tagger.model.train()
    before = tagger.tag(SENTENCES)
    model.policy = ExitPolicy.never()
    assert {x for t in tagger.tag(SENTENCES) for x in t.exit_layers} == {4}
    model.policy = ExitPolicy(threshold=0.8, window=0)
    assert tagger.tag(SENTENCES) == before
    calls = []
    model.encoder.layers[0].up.register_forward_hook(lambda *_: calls.append(1))
    tagger.tag(SENTENCES)
    assert calls
    with evaluating(model) as twin:
        assert not twin.training and twin is not model
        assert [*map(id, twin.parameters())] == [*map(id, model.parameters())]
        assert [*twin.state_dict()] == [*model.state_dict()]


# Without compiled ops nothing sees modules' attributes: all is found anew, none is to be counted.
@pytest.mark.skipif(not extension_available(), reason=str(extension_error()))
def test_what_is_found_out_of_a_model_is_kept_from_batch_to_batch(tagger):
    model, made = tagger.model, []

    class Counted(Held):
        def __init__(self, root):
            made.append(root)
            super().__init__(root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenexit.loops.memory.Held", Counted)
        expected = tagger.tag(SENTENCES)
        for _ in range(3):
            assert tagger.tag(SENTENCES) == expected
            with torch.no_grad():
                model(**random_batch((2,)))
    assert len(made) == 2  # the model, and the one in evaluation mode


def test_what_is_set_on_a_kept_model_is_seen(tagger):
    model = tagger.model
    tagger.tag(SENTENCES)
    model.encoder.layers[0].activation = torch.relu
    model.backend = "eager"
    assert tagger.tag(SENTENCES) == Tagger(copy.deepcopy(model), tagger.tokenizer).tag(SENTENCES)
    model.encoder.layers[1].down = nn.Linear(64, 32)
    assert tagger.tag(SENTENCES) == Tagger(copy.deepcopy(model), tagger.tokenizer).tag(SENTENCES)
    model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tagger.tag(SENTENCES)


def test_weights_of_before_are_let_go(tagger):
    tagger.tag(SENTENCES)
    weight = weakref.ref(tagger.model.encoder.layers[0].up.weight)
    tokenexit.quantize(tagger.model)
    gc.collect()
    assert weight() is None


def test_a_part_that_stands_twice():
    shared = Adapter(nn.Linear(2, 2))
    with evaluating(nn.Sequential(shared, nn.Sequential(shared)).train()) as twin:
        assert twin[0] is twin[1][0] and not twin[0].dropout.training
    assert shared.dropout.training


def test_a_policy_for_each_sentence(tagger):
    """Sentences are sorted by length and cut into batches and windows; each keeps its own."""
    words = ["john", "smith", "in", "new", "york", "the", "red", "paris"]
    sentences = [[words[(i + j) % 8] for j in range(1 + i * 5 % 7)] for i in range(11)]
    sentences[4] = words * 40  # in several windows
    policies = [
        ExitPolicy(threshold=(i % 3) / 3, window=i % 2, min_active=1 + i) for i in range(11)
    ]
    tagger.batch_size = 3
    alone = [tagger.tag([s], p)[0] for s, p in zip(sentences, policies, strict=True)]
    assert tagger.tag(sentences, policies) == alone
    assert list(tagger.stream(iter(sentences), policies, buffer=4)) == alone
    assert len({x for t in alone for x in t.exit_layers}) > 2
    for wrong in (policies[:-1], policies * 2):
        with pytest.raises(ValueError, match=f"got {len(wrong)} policies or speeds for"):
            tagger.tag(sentences, wrong)


def test_a_speed_for_each_sentence_and_no_fewer(tagger):
    full = Speed(ExitPolicy.never(), 1.0, 0.0, 0.0, 4.0)
    tagger.model.dial = Dial((full,), 0, 0.01, 0.9, 500)
    with pytest.raises(ValueError, match="got 1 policies or speeds for more sentences"):
        tagger.tag(SENTENCES, speed=["full"])
    with pytest.raises(ValueError, match="got 5 policies or speeds for 4 sentences"):
        tagger.tag(SENTENCES, speed=["full"] * 5)
    with pytest.raises(TypeError, match="got None; expected a list of sentences"):
        tagger.tag(None)


def test_the_policy_is_what_the_configuration_says(tmp_path):
    model, policy = random_tagger(dtype=torch.float32), ExitPolicy(threshold=(0.2, 0.3, 0.4, 0.0))
    call = random_batch((9, 4))
    model.config.exit_policy = policy.to_dict()
    assert model.policy == policy
    expected = model(**call, policy=policy)
    assert torch.equal(model(**call).exit_layers, expected.exit_layers)
    model.config.exit_policy["threshold"][1] = 0.9
    assert model.policy.threshold == (0.2, 0.9, 0.4, 0.0)
    model.config.exit_policy = policy  # not yet its fields
    assert model.policy == policy
    model.save_pretrained(tmp_path)
    loaded = tokenexit.TokenExitForTokenClassification.from_pretrained(tmp_path)
    assert loaded.policy == policy
    model.config.exit_policy = None
    assert model.policy == ExitPolicy.never()
    model.policy = policy
    assert model.config.exit_policy == policy.to_dict()
    for wrong, error in (({"treshold": 1}, ValueError), ([0.1], TypeError), (0.1, TypeError)):
        model.config.exit_policy = wrong
        with pytest.raises(error, match="exit policy"):
            model(**call)
    model.config.exit_policy = {"threshold": [0.1, 0.2]}
    with pytest.raises(ValueError, match="expected one per layer, 4"):
        model(**call)


def test_models_of_one_configuration_have_policies_of_their_own():
    config = random_tagger().config
    one, other = (tokenexit.TokenExitForTokenClassification(config) for _ in range(2))
    one.policy = ExitPolicy(threshold=0.3)
    assert other.policy == ExitPolicy.never()


@pytest.fixture
def defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("kind", ["dtype", "device"])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
@torch.no_grad()
def test_defaults_of_the_user_change_nothing(family, kind, defaults, tiny_tokenizer):
    """No tensor is made of a dtype or on a device that nobody named."""
    from random_models import random_classifier

    tokenizer = tiny_tokenizer()
    theirs = random_classifier(family, vocab_size=len(tokenizer))
    batch, policies = (
        random_batch((9, 4)),
        [ExitPolicy(threshold=0.8), ExitPolicy.authors_code(0.8)],
    )

    def results():
        model = tokenexit.convert(theirs, tokenizer)
        found = [x.clone() for x in model.state_dict().values() if not x.is_floating_point()]
        model.load_state_dict(weights)
        for policy in policies:
            for model.backend in ("auto", "reference"):
                out = model(**batch, policy=policy)
                found += [out.logits, out.exit_layers]
        for _ in range(2):
            tagged = Tagger(model, tokenizer).tag(SENTENCES, policies[0])
            found += [torch.tensor(t.exit_layers, device="cpu") for t in tagged]
            model = tokenexit.quantize(model) if family == "bert" and _ == 0 else model
        return found

    weights = random_tagger(family, torch.float32, vocab_size=len(tokenizer)).state_dict()
    expected = results()
    if kind == "dtype":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")
    got = results()
    assert all(map(torch.equal, got, expected))


def test_hooks_see_evaluation_whatever_the_mode(tagger):
    model, seen = tagger.model.train(), []
    parts = (model.embeddings.word, model.encoder.layers[0].query, model.encoder.layers[0])
    for part in parts:
        part.register_forward_hook(lambda module, *_: seen.append(module.training))
    tagger.tag(SENTENCES)
    assert len(seen) >= len(parts) and not any(seen)
    assert all(part.training for part in parts)
