"""Which classifiers were trained: told by the model, saved with it, asked for by who needs them."""

import copy
import json
import logging

import pytest
import torch
from random_models import random_classifier

import tokenexit
from tokenexit import Dial, ExitPolicy, Speed
from tokenexit.models.modeling import TokenExitForTokenClassification

EXITS = ExitPolicy(threshold=0.5)


def test_convert_leaves_the_last(tmp_path):
    model = tokenexit.convert(random_classifier())
    assert model.untrained_heads() == model.config.untrained_heads == [1, 2, 3]
    for same in (
        copy.deepcopy(model).bfloat16(),
        copy.deepcopy(model).bfloat16().float(),
        copy.deepcopy(model).half().double(),
        model.double(),
        model.float(),
    ):
        assert same.untrained_heads() == [1, 2, 3]
    assert model.untrained_heads(ExitPolicy.never()) == []
    assert model.untrained_heads(ExitPolicy(threshold=(0.0, 0.5, 0.0, 0.0))) == [2]
    model.save_pretrained(tmp_path)
    again = TokenExitForTokenClassification.from_pretrained(tmp_path)
    assert again.untrained_heads() == [1, 2, 3]


def test_heads_that_were_cut_off_are_nobodys(tmp_path):
    """As a student has that keeps the first layers."""
    model = tokenexit.convert(random_classifier())
    model.encoder.layers, model.encoder.heads = model.encoder.layers[:2], model.encoder.heads[:2]
    model.config.num_hidden_layers = 2
    assert model.untrained_heads() == [1, 2]
    model.save_pretrained(tmp_path)
    assert TokenExitForTokenClassification.from_pretrained(tmp_path).untrained_heads() == [1, 2]


def test_an_encoder_has_none_trained(tmp_path):
    random_classifier().bert.save_pretrained(tmp_path)
    model = TokenExitForTokenClassification.from_pretrained(tmp_path)
    assert model.untrained_heads() == [1, 2, 3, 4]
    assert model.untrained_heads(ExitPolicy.never()) == [4]
    model.save_pretrained(tmp_path / "tagger")
    again = TokenExitForTokenClassification.from_pretrained(tmp_path / "tagger")
    assert again.untrained_heads() == [1, 2, 3, 4]


def test_a_classifier_of_another_size_is_a_new_one(tmp_path):
    random_classifier(labels=5).save_pretrained(tmp_path)
    model = TokenExitForTokenClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True
    )
    assert model.untrained_heads() == [1, 2, 3, 4]


def step(model):
    """One by hand, as any loop makes it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ids = torch.randint(4, 60, (2, 8))
    model.train()(input_ids=ids, labels=ids % 5).loss.backward()
    optimizer.step()


def distil(model):
    """The lower heads alone, in evaluation, without labels."""
    optimizer = torch.optim.SGD(model.exit_heads[:-1].parameters(), 0.1)
    out = model(input_ids=torch.randint(4, 60, (2, 8)), output_layer_logits=True)
    (out.layer_logits[:-1] - out.layer_logits[-1].detach()).pow(2).mean().backward()
    optimizer.step()


def assign(model):
    model.exit_heads = list(model.exit_heads)


@pytest.mark.parametrize("train", [step, distil, assign])
def test_whatever_changes_them_trains_them(tmp_path, train):
    model = tokenexit.convert(random_classifier())
    train(model)
    assert model.untrained_heads() == []
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["untrained_heads"] == []
    again = TokenExitForTokenClassification.from_pretrained(tmp_path)
    assert again.untrained_heads() == []


def test_taggers_saved_before_this_was_kept_count_as_trained(tmp_path):
    tokenexit.convert(random_classifier()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["untrained_heads"]
    path.write_text(json.dumps(config))
    assert TokenExitForTokenClassification.from_pretrained(tmp_path).untrained_heads() == []


def test_a_policy_on_untrained_heads_warns_once(tmp_path, caplog):
    model = tokenexit.convert(random_classifier())
    model.policy = ExitPolicy.never()
    assert not caplog.text
    for _ in range(2):
        model.policy = EXITS
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "layers 1, 2, 3" in record.message
    model.save_pretrained(tmp_path)
    caplog.clear()
    TokenExitForTokenClassification.from_pretrained(tmp_path)  # saved under such a policy
    assert len(caplog.records) == 1
    caplog.clear()
    trained = tokenexit.convert(random_classifier())
    step(trained)
    trained.policy = EXITS
    assert not caplog.text


@pytest.mark.parametrize("value", [[0], [5], ["1"], "1", [1.5], [[1]]])
def test_what_no_layers_are_is_refused(tmp_path, value):
    model = tokenexit.convert(random_classifier())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "untrained_heads": value}))
    with pytest.raises(ValueError, match="config.untrained_heads is .*; expected numbers from 1"):
        TokenExitForTokenClassification.from_pretrained(tmp_path)


def test_heads_that_did_not_fit_are_new(tmp_path):
    model = tokenexit.convert(random_classifier())
    step(model)
    model.save_pretrained(tmp_path)
    load = TokenExitForTokenClassification.from_pretrained
    assert load(tmp_path).untrained_heads() == []
    other = load(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert other.untrained_heads() == [1, 2, 3, 4]


def test_new_heads_have_none_of_what_was_measured(tmp_path):
    """A promise that was tested, and temperatures, are of the heads of before."""
    model, load = tokenexit.convert(random_classifier()), TokenExitForTokenClassification
    speed = Speed(ExitPolicy(threshold=0.9), 2.0, 0.001, 0.01, 2.0)
    model.dial = Dial((speed,), 0, 0.01, 0.95, 1000, "float32")
    model.config.temperatures = [1.5] * 4
    model.save_pretrained(tmp_path)
    same = load.from_pretrained(tmp_path)
    assert same.dial == model.dial and same.config.temperatures == [1.5] * 4
    other = load.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    model.exit_heads = [torch.nn.Linear(32, 5) for _ in range(4)]
    for each in (other, model):
        assert each.dial is None and each.config.temperatures is None
        with pytest.raises(ValueError, match="the tagger has no dial"):
            each.speed("promised")
