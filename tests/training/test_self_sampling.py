"""Drawing policies, remembering stage 1, exits from the cache."""

import pytest
import torch
import torch.nn.functional as F
from random_models import random_classifier

import tokenexit
from tokenexit import ExitPolicy, Tagger
from tokenexit.text.encoding import collate
from tokenexit.training.self_sampling import SelfSampling, cached_exits, remember


def test_sandwich():
    sampling = SelfSampling(
        ExitPolicy(copy="pre_norm"), windows=(1, 3), thresholds=(0.1, 0.4), aggressive=0.375
    )
    torch.manual_seed(0)
    policies = sampling.draw(16)
    assert [p.threshold for p in policies[:4]] == [0.0] * 4
    assert {(p.threshold, p.window) for p in policies[4:10]} == {(0.4, 1)}
    drawn = policies[10:]
    assert all(0.1 <= p.threshold <= 0.4 for p in drawn) and len(set(drawn)) > 3
    assert {p.copy for p in policies} == {"pre_norm"}
    torch.manual_seed(0)
    assert sampling.draw(16) == policies
    many = SelfSampling(windows=(1, 3), full_depth=0, aggressive=0).draw(200)
    assert {p.window for p in many} == {1, 3}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_shares_of_small_batches_are_met_in_the_mean(number):
    sampling = SelfSampling(full_depth=0.25, aggressive=0.25, windows=(0, 1), thresholds=(0.1, 0.4))
    torch.manual_seed(0)
    drawn = [policy for _ in range(3000 // number) for policy in sampling.draw(number)]
    full = sum(policy.threshold == 0 for policy in drawn) / len(drawn)
    aggressive = sum(policy.threshold == 0.4 for policy in drawn) / len(drawn)
    assert 0.22 < full < 0.28 and 0.22 < aggressive < 0.28


def test_what_is_not_drawn_is_that_of_the_policy():
    base = ExitPolicy(growth=2.0, min_active=3, criterion="max_prob", level="sentence")
    for policy in SelfSampling(base).draw(4):
        assert (policy.growth, policy.min_active, policy.criterion) == (2.0, 3, "max_prob")
        assert policy.level == "token"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"exits": "offline"}, "'offline'; expected 'online' or 'cached'"),
        ({"windows": ()}, "windows is empty"),
        ({"thresholds": (0.5, 0.1)}, "expected 0 <= low <= high <= 1"),
        ({"full_depth": 0.7, "aggressive": 0.7}, "at most 1 together"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        SelfSampling(**fields)


@pytest.fixture
def tagger(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = tokenexit.convert(random_classifier(vocab_size=len(tokenizer), labels=3), tokenizer)
    with torch.no_grad():
        for head in model.exit_heads:
            head.weight.normal_(0, 0.5)
    return Tagger(model.double(), tokenizer, batch_size=2)


SENTENCES = [["john", "smiths", "lives"], ["red"], ["the", "xyz", "in", "new", "york"], []]
LABELS = [[0, 1, 2], [1], [2, 2, 0, 1, 1], []]


@pytest.mark.parametrize("criterion", ["entropy", "max_prob"])
def test_remembered_losses_and_uncertainties(tagger, criterion):
    windows = tagger.windows(SENTENCES)
    remembered = remember(tagger, windows, LABELS, criterion)
    batch = collate(windows, tagger.tokenizer)
    with torch.no_grad():
        logits = tagger.model(**batch, output_layer_logits=True).layer_logits
    for row, (window, labels, memory) in enumerate(zip(windows, LABELS, remembered, strict=True)):
        assert memory.loss.shape == memory.uncertainty.shape == (len(labels), 4)
        for word, position in enumerate(window.first_pieces()):
            for layer in range(4):
                at = logits[layer, row, position]
                loss = F.cross_entropy(at, torch.tensor(labels[word])).float()
                assert memory.loss[word, layer] == pytest.approx(float(loss), rel=1e-4)
                p = at.softmax(-1)
                u = float(-(p * p.log()).sum() / torch.tensor(3.0).log())
                if criterion == "max_prob":
                    u = (1 - float(p.max())) / (1 - 1 / 3)
                assert memory.uncertainty[word, layer] == pytest.approx(u, abs=1e-5)


def test_cached_exits_are_those_of_full_depth_uncertainties(tagger):
    """With no window and no neighbor to see, a first exit is where its own u falls below."""
    windows = tagger.windows(SENTENCES)
    remembered = remember(tagger, windows, LABELS)
    batch = collate(windows, tagger.tokenizer)
    known = torch.full((*batch["input_ids"].shape, 4), torch.nan)
    for row, (window, memory) in enumerate(zip(windows, remembered, strict=True)):
        known[row, window.first_pieces()] = memory.uncertainty
    policies = [ExitPolicy(threshold=t, window=0) for t in (0.5, 0.9, 0.7, 0.5)]
    exits = cached_exits(known, batch["attention_mask"], batch["word_ids"], policies)
    for row, (window, memory) in enumerate(zip(windows, remembered, strict=True)):
        for word, position in enumerate(window.first_pieces()):
            below = [u < policies[row].threshold for u in memory.uncertainty[word]]
            expected = below.index(True) + 1 if any(below[:3]) else 4
            assert exits[row, position] == expected
        assert exits[row, 0] == 4  # [CLS], or the stand-in of a sentence without words
    model = tagger.model
    output = model(**batch, exit_layers=exits.clamp(min=1))
    for row, window in enumerate(windows):
        firsts = window.first_pieces()
        assert torch.equal(output.exit_layers[row, firsts], exits[row, firsts])
