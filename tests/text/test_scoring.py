from itertools import product

import pytest
import seqeval.metrics
from seqeval.metrics.sequence_labeling import get_entities

from tokenexit.text.scoring import choose_metric, detect_metric, score, spans, warn_once


@pytest.mark.parametrize(
    ("labels", "metric"),
    [
        ("O B-PER I-PER", "entity_f1"),
        ("O I-PER", "entity_f1"),
        ("O", "entity_f1"),
        ("O B I", "entity_f1"),
        ("O B-PER M-PER E-PER S-PER", "entity_f1"),
        ("O B-PER I-PER L-PER U-PER", "entity_f1"),
        ("O B-PER.NOM I-creative-work", "entity_f1"),
        ("B-NN E-NN S-VV", "entity_f1"),
        ("B M E S", "word_f1"),
        ("B I E S", "word_f1"),
        ("B I", "word_f1"),
        ("S", "word_f1"),
        ("NOUN VERB", "accuracy"),
        ("N V O , ^ S E", "accuracy"),
        ("NN -LRB- PRP$ O", "accuracy"),
        ("O B-PER X", "accuracy"),
        ("n-1 v-2", "accuracy"),
        ("0 1", "accuracy"),
    ],
)
def test_detect_metric(labels, metric):
    assert detect_metric(labels.split()) == metric
    assert detect_metric(set(labels.split())) == metric


def split(*sentences):
    return [sentence.split() for sentence in sentences]


def test_entity_f1_by_hand():
    gold = split("B-PER I-PER O B-LOC", "O B-ORG I-ORG I-ORG", "O O")
    predicted = split("B-PER I-PER O O", "O B-ORG I-ORG O", "B-LOC O")
    result = score(gold, predicted)
    # Three in gold, three predicted, one of them right.
    assert result == {
        "metric": "entity_f1",
        "score": pytest.approx(1 / 3),
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
        "accuracy": pytest.approx(7 / 10),
        "types": {"LOC": 0.0, "ORG": 0.0, "PER": 1.0},
    }
    assert result["score"] == pytest.approx(seqeval.metrics.f1_score(gold, predicted))


@pytest.mark.parametrize("names", [("A", "B"), ("_",)])
def test_chunks_are_those_of_seqeval(names):
    """Of all sequences of four labels."""
    labels = ["O", *(f"{tag}-{name}" for tag in "BIES" for name in names)]
    labels = [label.removesuffix("-_") for label in labels]
    for sequence in product(labels, repeat=4):
        assert spans(sequence, "entity_f1") == get_entities(list(sequence)), sequence


def test_entity_f1_with_unequal_precision_and_recall():
    result = score(split("B-A O B-A O B-B"), split("B-A O O O O"))
    assert (result["precision"], result["recall"]) == (1, pytest.approx(1 / 3))
    assert result["score"] == pytest.approx(0.5)
    assert result["types"] == {"A": pytest.approx(2 / 3), "B": 0.0}
    assert score(split("B-A O"), split("B-A B-C"))["types"] == {"A": 1.0, "C": 0.0}


def test_entities_do_not_reach_over_sentences():
    assert score(split("O B-A", "I-A O"), split("O B-A", "O O"))["recall"] == 0.5


@pytest.mark.parametrize(
    ("labels", "same"),
    [
        # IOB1: I- starts an entity, B- only one right after another of its type.
        ("I-PER I-PER O I-LOC B-LOC I-ORG", "B-PER I-PER O B-LOC B-LOC B-ORG"),
        ("B-PER E-PER O S-LOC S-LOC S-ORG", "B-PER I-PER O B-LOC B-LOC B-ORG"),
        ("B-PER M-PER E-PER S-LOC B-LOC E-LOC", "B-PER I-PER I-PER B-LOC B-LOC I-LOC"),
        ("B-PER I-PER L-PER U-LOC B-LOC L-LOC", "B-PER I-PER I-PER B-LOC B-LOC I-LOC"),
        ("B I O B B I", "B-_ I-_ O B-_ B-_ I-_"),
        ("B-creative-work I-creative-work B-a I-a O O",) * 2,
    ],
    ids=["IOB1", "BIOES", "BMES", "BILOU", "typeless", "hyphens"],
)
def test_schemes_name_the_same_entities(labels, same):
    for gold, predicted in ((labels, same), (same, labels), (labels, labels)):
        result = score(split(gold), split(predicted))
        assert (result["metric"], result["score"]) == ("entity_f1", 1)
    assert score(split(labels), split("O O O O O O"))["score"] == 0
    assert set(result["types"]) == {label[2:] for label in same.split()} - {""}


def test_word_f1_by_hand():
    # AB C DEF G against AB CD EF G: two of four words, each way.
    gold, predicted = split("B E S B M E S"), split("B E B E B E S")
    result = score(gold, predicted)
    assert result == {
        "metric": "word_f1",
        "score": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "accuracy": pytest.approx(4 / 7),
    }
    # AB C DEF G against AB C D E FG (five words): AB and C.
    result = score(gold, split("B E S S S B E"))
    assert (result["precision"], result["recall"]) == (pytest.approx(2 / 5), pytest.approx(2 / 4))
    assert result["score"] == pytest.approx(4 / 9)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("B M M E S", [4, 1]),
        ("B I I E S", [4, 1]),
        ("B I I I B", [4, 1]),
        ("S S S S S", [1, 1, 1, 1, 1]),
        ("B E B E S", [2, 2, 1]),
        # What a model may say though no rule allows it: still words that cover all.
        ("M M E M M", [3, 2]),
        ("E E S M B", [1, 1, 1, 1, 1]),
        ("B B M S E", [1, 2, 1, 1]),
    ],
)
def test_words_of_a_segmentation(labels, words):
    well_formed = [label for n in words for label in ("S" if n == 1 else "B" + "M" * (n - 2) + "E")]
    result = score([well_formed], split(labels), metric="word_f1")
    assert (result["precision"], result["recall"]) == (1, 1)
    # One word as long as the sentence is right only where the labels say so.
    one = score([list("BMMME")], split(labels), metric="word_f1")
    assert one["precision"] == 0 and one["recall"] == 0


def test_accuracy():
    result = score(split("N V O", "D N"), split("N N O", "D N"))
    assert result == {
        "metric": "accuracy",
        "score": 0.8,
        "precision": 0.8,
        "recall": 0.8,
        "accuracy": 0.8,
    }


def test_named_metric():
    gold, predicted = split("B E S S"), split("B E B E")
    assert score(gold, predicted)["metric"] == "word_f1"
    assert score(gold, predicted, metric="accuracy")["score"] == 0.5
    assert score(gold, predicted, metric="entity_f1")["types"] == {"_": pytest.approx(2 / 5)}


def test_empty_sentences_and_no_entities():
    result = score(split("", "O O"), split("", "O O"))
    assert (result["score"], result["accuracy"], result["types"]) == (0, 1, {})
    assert score(((), ("O", "B-A")), ((), ("O", "B-A")))["score"] == 1


@pytest.mark.parametrize(
    ("gold", "predicted", "metric", "message"),
    [
        (["O"], ["O", "O"], "auto", "got 2 predicted sentences; expected 1"),
        (["O", "O O"], ["O", "O"], "auto", "sentence 1: got 1 predicted labels; expected 2"),
        (["O"], ["O"], "f1", "metric is 'f1'; expected 'auto' or one of"),
        ([""], [""], "auto", "got no labels"),
        ([""], [""], "accuracy", "got no labels"),
        (["B-A", "O"], ["B-A", "X"], "auto", "sentence 1: got the label 'X'; expected O or"),
        (["N"], ["N"], "entity_f1", "sentence 0: got the label 'N'"),
        (["B E"], ["B O"], "word_f1", "sentence 0: got the label 'O'; expected B, M, I, E or S"),
    ],
)
def test_wrong_labels(gold, predicted, metric, message):
    with pytest.raises(ValueError, match=message):
        score(split(*gold), split(*predicted), metric)


def test_a_metric_is_checked_against_all_labels():
    assert choose_metric("auto", ["O", "B-A"]) == "entity_f1"
    assert choose_metric("accuracy", ["O", "B-A", "X"]) == "accuracy"
    assert choose_metric("word_f1", "BMES") == "word_f1"
    with pytest.raises(ValueError, match="metric is 'f1'; expected 'auto' or one of"):
        choose_metric("f1", ["O"])
    with pytest.raises(
        ValueError, match=r"entity_f1 does not fit.*'NOUN' \(1 of 2 labels\).*B-PER"
    ):
        choose_metric("entity_f1", ["O", "NOUN"])
    with pytest.raises(ValueError, match="expected B, M, I, E or S") as error:
        choose_metric("word_f1", map(str, range(20000)))
    assert "'10002' and 19992 more" in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ("O B-PER I-PER -X-", "entity_f1 does not fit the labels: got '-X-' (1 of 4 labels)"),
        ("O B-PER X", "entity_f1 does not fit the labels: got 'X' (1 of 3 labels)"),
        ("B M E S X", "word_f1 does not fit the labels: got 'X' (1 of 5 labels)"),
        ("NOUN VERB", None),
        ("O NOUN VERB", None),
        ("N V O , ^ S E", None),
        ("O B-PER", None),
    ],
)
def test_f1_that_turns_to_accuracy_is_said_once(labels, told, caplog):
    warn_once.cache_clear()
    metrics = {choose_metric("auto", labels.split()) for _ in range(3)}
    assert metrics == {detect_metric(labels.split())}
    if told is None:
        assert not caplog.records
    else:
        (record,) = caplog.records
        assert record.message.startswith(f"scoring accuracy, as {told}")


def test_no_label_names():
    with pytest.raises(ValueError, match="got no labels"):
        detect_metric([])
