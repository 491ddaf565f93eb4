"""Confidences are brought to what they mean; labels and exits stay."""

import pytest
import torch
from datasets import Dataset
from random_models import random_classifier, random_tagger
from test_dial import sentences

import tokenexit
from tokenexit import ExitPolicy, Tagger
from tokenexit.temperature import FEWEST, best_temperature, fit_temperatures

POLICY = ExitPolicy(threshold=0.55, window=0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_known_temperature_is_found(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    assert best_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.1)


def test_what_is_always_right_or_wrong_stays_within_bounds():
    logits = torch.tensor([[3.0, 0.0]]).double()
    assert best_temperature(logits, torch.tensor([0])) == pytest.approx(1 / 20, rel=1e-3)
    assert best_temperature(logits, torch.tensor([1])) == pytest.approx(20, rel=1e-3)


@pytest.fixture(scope="module")
def tagger(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    model = random_tagger(vocab_size=len(tokenizer), max_position_embeddings=24)
    return Tagger(model.eval(), tokenizer)


def logits_of(tagger, words, policy):
    """Of each word, by the layer it left at."""
    (_, output, (firsts,)), *_ = tagger.run(tagger.windows([words]), policy)
    return output.logits[0, firsts], output.exit_layers[0, firsts]


def test_each_layer_has_its_own(tagger, tmp_path):
    """Labels drawn as if the layers were over- and underconfident by known factors."""
    generator, factors = torch.Generator().manual_seed(1), torch.tensor([0, 3.0, 0.5, 2.0, 1.5])
    words = [*sentences(900, seed=2), ["john", "paris"] * 30]  # one takes several windows
    names, labels, counts = tagger.model.config.id2label, [], torch.zeros(5)
    for its in words[:-1]:
        logits, layers = logits_of(tagger, its, POLICY)
        drawn = (logits / factors[layers][:, None]).softmax(-1).multinomial(1, generator=generator)
        labels.append([names[i] for i in drawn[:, 0].tolist()])
        counts += layers.bincount(minlength=5)
    labels.append(["?"] * 60)  # of which the model does not know the label
    found = fit_temperatures(
        tagger, Dataset.from_dict({"words": words, "labels": labels}), [POLICY]
    )
    many = [layer for layer in range(1, 5) if counts[layer] >= 4 * FEWEST]
    assert len(many) >= 2
    for layer in many:
        assert found[layer - 1] == pytest.approx(float(factors[layer]), rel=0.4)

    before = tagger.tag(words[:20], POLICY)
    tagger.model.config.temperatures = found
    try:
        after = tagger.tag(words[:20], POLICY)
        tagger.save_pretrained(tmp_path)
        back = tokenexit.to_hugging_face(tagger.model).config.to_dict()
    finally:
        tagger.model.config.temperatures = None
    assert after == before and "temperatures" not in back  # confidences are not compared
    for tagged in after:
        logits, layers = logits_of(tagger, tagged.words, POLICY)
        each = torch.tensor(found).double()[layers - 1]
        sure = (logits / each[:, None]).softmax(-1).amax(-1)
        assert tagged.confidences == pytest.approx(sure.tolist())
    again = Tagger.from_pretrained(tmp_path).tag(words[:20], POLICY)
    assert [x.confidences for x in again] == [pytest.approx(x.confidences) for x in after]


def test_layers_with_few_words_share_one(tagger):
    words = sentences(30)
    labels = [[tagger.model.config.id2label[0]] * len(its) for its in words]
    data = Dataset.from_dict({"words": words, "labels": labels})
    found = fit_temperatures(tagger, data, [POLICY])
    assert len(found) == 4 and len(set(found)) == 1
    unknown = Dataset.from_dict({"words": words, "labels": [["?"] * len(x) for x in words]})
    assert fit_temperatures(tagger, unknown, [POLICY]) is None


@pytest.mark.parametrize("value", [[1.0], [1.0, 1.0, 0.0, 1.0], "1", [1.0, 1.0, 1.0, None]])
def test_what_no_temperatures_are_is_refused(tmp_path, value):
    model = tokenexit.convert(random_classifier())
    model.config.temperatures = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.temperatures is .*; expected 4 numbers above 0"):
        tokenexit.TokenExitForTokenClassification.from_pretrained(tmp_path)


def test_no_sentences_and_no_policies_tell_nothing(tagger):
    none = Dataset.from_dict({"words": [], "labels": []})
    assert fit_temperatures(tagger, none, [POLICY]) is None
    some = Dataset.from_dict({"words": [["john"]], "labels": [["B-PER"]]})
    assert fit_temperatures(tagger, some, []) is None
