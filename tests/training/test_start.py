"""What training starts from: labels of a fine-tuned classifier stay, by name."""

import logging

import pytest
import torch
from datasets import Dataset
from random_models import random_classifier

import tokenexit
from tokenexit import ExitPolicy, Tagger
from tokenexit.evaluate import evaluate
from tokenexit.models.modeling import TokenExitForTokenClassification
from tokenexit.training.start import load_to_train, set_labels
from tokenexit.training.trainer import ExitTrainer, training_arguments

NAMES = ["I-LOC", "O", "B-LOC", "B-PER"]  # in no sorted order
WORDS = [["john", "lives", "in", "paris"], ["new", "york", "the", "red", "smith"], ["xyz", "paris"]]


@pytest.fixture
def hf(tiny_tokenizer, tmp_path):
    """A folder of a fine-tuned Hugging Face tagger."""
    tokenizer = tiny_tokenizer()
    ids = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    random_classifier(vocab_size=len(tokenizer), labels=len(NAMES), **ids).save_pretrained(
        tmp_path / "hf"
    )
    tokenizer.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", tokenizer


def labelled(folder, tokenizer):
    """Text labelled by the tagger itself: its score is 1."""
    tagger = Tagger(TokenExitForTokenClassification.from_pretrained(folder), tokenizer)
    labels = [tagged.labels for tagged in tagger.tag(WORDS, ExitPolicy.never())]
    return Dataset.from_dict({"words": WORDS, "labels": labels})


def train_at_rate_0(model, tokenizer, data, folder):
    arguments = training_arguments(
        folder, 32, len(data), epochs=1, learning_rate=0, use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = ExitTrainer(model, arguments, tokenizer, data, head_learning_rate=0)
    trainer.train()
    return trainer.tagger


@pytest.mark.parametrize("kind", ["hf", "tagger"])
@pytest.mark.parametrize("extra", [[], ["B-CAR", "I-PER"]], ids=["known", "more"])
def test_a_learning_rate_of_0_keeps_the_score(hf, tmp_path, caplog, kind, extra):
    folder, tokenizer = hf
    data = labelled(folder, tokenizer)
    if kind == "tagger":
        folder = tmp_path / "tagger"
        model = TokenExitForTokenClassification.from_pretrained(hf[0], tokenizer=tokenizer)
        with torch.no_grad():
            for head in model.exit_heads[:-1]:
                head.weight.normal_()
        Tagger(model, tokenizer).save_pretrained(folder)
    present = sorted({label for labels in data["labels"] for label in labels})
    assert present != NAMES[: len(present)]  # a sorted list of the data's would be another
    with caplog.at_level(logging.WARNING):
        model = load_to_train(str(folder), tokenizer, sorted([*present, *extra]))
    assert [model.config.id2label[i] for i in range(model.num_labels)] == [*NAMES, *extra]
    assert model.config.label2id == {n: i for i, n in enumerate([*NAMES, *extra])}
    assert all(f"'{label}'" in caplog.text for label in extra) and bool(caplog.text) == bool(extra)
    tagger = train_at_rate_0(model, tokenizer, data, tmp_path / "out")
    assert evaluate(tagger, data, ExitPolicy.never()).score == 1.0
    assert model.untrained_heads() == ([1, 2, 3] if kind == "hf" else [])


def test_equally_many_other_labels_do_not_take_the_classifier_over(hf):
    folder, tokenizer = hf
    with pytest.raises(ValueError, match="'I-LOC'.*data has 'A', 'B'.*--new-classifier"):
        load_to_train(str(folder), tokenizer, ["A", "B", "C", "D"])
    old = TokenExitForTokenClassification.from_pretrained(folder).exit_heads[-1].weight
    for names in (["A", "B", "C", "D"], ["A", "B"], NAMES):
        model = load_to_train(str(folder), tokenizer, names, new_classifier=True)
        assert list(model.config.label2id) == names and model.untrained_heads() == [1, 2, 3, 4]
        assert model.exit_heads[-1].weight.shape == (3 * len(names), 32)
        own = model.exit_heads[-1].weight[: len(names)]
        assert own.shape != old.shape or not torch.equal(own, old)


def test_an_encoder_gets_the_labels_of_the_data(tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    random_classifier(vocab_size=len(tokenizer)).bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_to_train(str(tmp_path), tokenizer, ["O", "A", "B"])
    assert list(model.config.label2id) == ["O", "A", "B"]
    assert model.untrained_heads() == [1, 2, 3, 4]
    # One converted and saved before it was trained has no classifier either.
    Tagger(TokenExitForTokenClassification.from_pretrained(tmp_path), tokenizer).save_pretrained(
        tmp_path / "tagger"
    )
    model = load_to_train(str(tmp_path / "tagger"), tokenizer, ["O", "A", "B"])
    assert list(model.config.label2id) == ["O", "A", "B"]
    assert model.config.num_labels == 3 and model.exit_heads[-1].out_features == 9


def test_heads_hear_unless_they_are_many_or_not_to(hf, tmp_path):
    folder, tokenizer = hf
    hearing = load_to_train(str(folder), tokenizer, NAMES)
    assert hearing.config.neighbor_heads is True and hearing.exit_heads[0].out_features == 12
    new = load_to_train(str(folder), tokenizer, NAMES, new_classifier=True)
    assert new.config.neighbor_heads == "all" and new.exit_heads[-1].out_features == 12
    below = load_to_train(str(folder), tokenizer, NAMES, True, neighbor_heads=True)
    assert below.config.neighbor_heads is True and below.exit_heads[-1].out_features == 4
    plain = load_to_train(str(folder), tokenizer, NAMES, neighbor_heads=False)
    assert not plain.config.neighbor_heads and plain.exit_heads[0].out_features == 4
    many = [*NAMES, *map(str, range(86 - len(NAMES)))]
    assert not load_to_train(str(folder), tokenizer, many).config.neighbor_heads
    assert load_to_train(str(folder), tokenizer, many[:-1]).config.neighbor_heads
    assert load_to_train(str(folder), tokenizer, many, neighbor_heads=True).config.neighbor_heads
    Tagger(hearing, tokenizer).save_pretrained(tmp_path / "tagger")
    with pytest.raises(ValueError, match="has heads that hear their neighbours; expected it to"):
        load_to_train(str(tmp_path / "tagger"), tokenizer, NAMES, neighbor_heads=False)
    Tagger(new, tokenizer).save_pretrained(tmp_path / "all")
    again = load_to_train(str(tmp_path / "all"), tokenizer, NAMES)
    assert again.config.neighbor_heads == "all"
    with pytest.raises(ValueError, match="has its last classifier hear its neighbours; expected"):
        load_to_train(str(tmp_path / "all"), tokenizer, NAMES, neighbor_heads=True)


def test_a_default_device_of_the_user_does_not_matter():
    model = tokenexit.convert(random_classifier(labels=3))
    torch.set_default_device("meta")
    try:
        set_labels(model, ["LABEL_0", "LABEL_1", "LABEL_2", "X"], keep=True)
    finally:
        torch.set_default_device(None)
    assert {head.weight.device.type for head in model.exit_heads} == {"cpu"}


def test_new_rows_win_nothing(tiny_tokenizer):
    model = tokenexit.convert(random_classifier(labels=3)).double().eval()
    x = torch.randint(4, 60, (4, 12))
    before = model(input_ids=x).logits
    set_labels(model, ["LABEL_0", "LABEL_1", "LABEL_2", "X", "Y"], keep=True)
    after = model(input_ids=x).logits
    # Products of other widths are summed otherwise on some processors.
    torch.testing.assert_close(after[..., :3], before)
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    torch.testing.assert_close(after[..., 3], before.mean(-1))
    assert model.exit_heads[0].weight.dtype == torch.float64 and not model.exit_heads[0].training
