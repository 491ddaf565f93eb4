"""Texts in, spans out: words, places, confidences; and callers of several threads together."""

import copy
import html
import pickle
import re
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from random_models import random_classifier
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import tokenexit
from tokenexit import ExitPolicy, Span, Tagged, Tagger
from tokenexit.evaluate import evaluate, tag_windows
from tokenexit.models.batching import MicroBatcher
from tokenexit.reference import uncertainty
from tokenexit.text.decoding import broken, decode
from tokenexit.text.encoding import merge
from tokenexit.text.scoring import score, spans, warn_once
from tokenexit.text.splitting import Splitter

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TEXT = "John  Smiths lives (in) New-York.\tParis, the red!"


def tagger_of(tokenizer, seed=0, **settings):
    ids = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    hf = random_classifier(vocab_size=len(tokenizer), seed=seed, **ids)
    model = tokenexit.convert(hf, tokenizer)
    with torch.no_grad():
        for head in model.exit_heads[:-1]:
            head.weight.normal_(0, 0.5)
    return hf, Tagger(model.eval(), tokenizer, **settings)


@pytest.fixture(scope="module")
def tagger(tiny_tokenizer):
    _, tagger = tagger_of(tiny_tokenizer(), batch_size=4)
    windows = tagger.windows([tagger.split([TEXT])[0]])
    ((_, output, (firsts,)),) = tagger.run(windows, ExitPolicy.never(), output_layer_logits=True)
    unsure = uncertainty(output.layer_logits[0, 0, firsts]).sort().values
    half = len(unsure) // 2  # leave at the first layer
    threshold = float(unsure[half - 1 : half + 1].mean())
    tagger.model.policy = ExitPolicy(threshold=threshold, window=0)
    return tagger


def tokenizers_of_other_kinds():
    word_level = models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    for normalizer, pre_tokenizer in (
        (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
        (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        (normalizers.NFKC(), pre_tokenizers.Metaspace()),
        (
            normalizers.Lowercase(),
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        ),
        (None, None),
    ):
        tokenizer = Tokenizer(word_level)
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        yield PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize("kind", range(5))
def test_words_of_texts_and_their_places(kind):
    splitter = Splitter([*tokenizers_of_other_kinds()][kind])
    for text, words in (
        ("He lives in London.", ["He", "lives", "in", "London", "."]),
        ("  two\t\u3000blanks \n", ["two", "blanks"]),
        ('("New York")', ["(", '"', "New", "York", '"', ")"]),
        ("\u6211\u5728\u5317\u4eac ok", ["\u6211", "\u5728", "\u5317", "\u4eac", "ok"]),
        ("na\u00efve \u00c5sa", ["na\u00efve", "\u00c5sa"]),
        ("...", [".", ".", "."]),
        ("", []),
        (" ", []),
    ):
        assert splitter.words(text) == words
        places = splitter.spans(text)
        assert [text[start:stop] for start, stop in places] == words
        assert places == sorted(places)
    with pytest.raises(ValueError, match="no valid Unicode"):
        splitter.words("\ud800")


@pytest.mark.parametrize("pre", [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
def test_characters_that_a_normalizer_makes_several_of(pre):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre
    splitter = Splitter(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))
    for text in ("Muhammad \ufdfa said", "x\ufdfay", "wait\u2026 what", "\ufb01ne \ufdfa\ufdfa"):
        places = splitter.spans(text)
        assert "".join(text[start:stop] for start, stop in places) == text.replace(" ", "")
        assert all(a[1] <= b[0] for a, b in zip(places, places[1:], strict=False))


@pytest.mark.parametrize("kind", range(5))
def test_accents_belong_to_the_letter_before_them(kind):
    """A normalizer may take them off; text of some systems is decomposed throughout."""
    splitter = Splitter([*tokenizers_of_other_kinds()][kind])
    for words in (
        ["Jose\u0301", "in", "Malmo\u0308", "."],
        ["\u092e\u0948\u0902", "\u0939\u0942\u0901"],
        ["\u2764\ufe0f"],
    ):
        assert splitter.words(" ".join(words).replace(" .", ".")) == words
    alone = [] if kind == 0 else ["\u0301\u0301"]  # which that normalizer drops
    assert splitter.words("a \u0301\u0301") == ["a", *alone]


def test_texts_are_tagged_as_their_words(tagger):
    words = ["John", "Smiths", "lives", "(", "in", ")", "New", "-", "York", ".", "Paris", ",",
             "the", "red", "!"]  # fmt: skip
    by_text, again, by_words = tagger.tag([TEXT, "", words])[::1]
    assert again == Tagged([], [], [], text="", offsets=[]) and again.spans == []
    assert by_text.words == words and by_text.text == TEXT and by_words.text is None
    assert (by_text.labels, by_text.exit_layers) == (by_words.labels, by_words.exit_layers)
    assert [TEXT[start:stop] for start, stop in by_text.offsets] == words
    assert len(set(by_text.exit_layers)) > 1
    with pytest.raises(TypeError, match="got the text 'a text'; expected a list of texts"):
        tagger.tag("a text")
    with pytest.raises(TypeError, match="got a dict; expected a list of sentences"):
        tagger.tag({"words": [words]})
    with pytest.raises(TypeError, match="got the text 'a text'; expected a list of texts"):
        tagger.split("a text")
    with pytest.raises(TypeError, match="sentence 1 is {'words': .*; expected a list of words"):
        tagger.split(["a text", {"words": words}])


def test_confidences_are_those_of_the_layer_left_at(tagger):
    (tagged,) = tagger.tag([TEXT])
    (window,) = tagger.windows([tagged.words])
    ((_, output, (firsts,)),) = tagger.run([window], ExitPolicy.never(), output_layer_logits=True)
    ((_, real, _),) = tagger.run([window])
    expected = real.logits[0, firsts].softmax(-1).amax(-1)
    assert tagged.confidences == pytest.approx(expected.tolist())
    first = output.layer_logits[0, 0, firsts].softmax(-1).amax(-1).tolist()  # nobody left before
    left_first = [i for i, layer in enumerate(tagged.exit_layers) if layer == 1]
    assert left_first
    assert [tagged.confidences[i] for i in left_first] == pytest.approx(
        [first[i] for i in left_first]
    )


LONG = f"{TEXT} " * 40  # of several windows


def test_constrained_decoding(tiny_tokenizer):
    """Over whole sentences, by probabilities as confidences tell them; the rest stays."""
    tokenizer = tiny_tokenizer()
    _, tagger = tagger_of(tokenizer)
    tagger.model.policy = ExitPolicy(threshold=0.8, window=0)
    tagger.model.config.temperatures = [0.5, 3.0, 1.5, 1.0]
    texts = [TEXT, "", "john", "Paris!", "the red john", "new york", LONG]
    before = tagger.tag(texts)
    assert tagger.decoding == "argmax" and len({x for t in before for x in t.exit_layers}) > 1
    wrong = [broken([tagged.labels], NAMES) for tagged in before]
    assert wrong[0] and wrong[-1] and not all(wrong)
    windows = tagger.windows([tagged.words for tagged in before])
    assert len(windows) > len(texts)
    scores = [None] * len(windows)
    for indices, output, firsts in tagger.run(windows):
        each = torch.tensor([1.0, *tagger.model.config.temperatures])[output.exit_layers]
        for i, row, its in zip(indices, output.logits / each[..., None], firsts, strict=True):
            scores[i] = [*row[its].log_softmax(-1).numpy()]
    scores = merge(windows, scores)

    together = Tagger(tagger.model, tokenizer, window_ms=0, decoding="constrained")
    tagger.decoding = "constrained"
    after = tagger.tag(texts)
    assert after == together.tag(texts) == copy.deepcopy(tagger).tag(texts)
    assert [tagged.labels for tagged in after] == decode(scores, NAMES)
    for old, new, its_scores, was_wrong in zip(before, after, scores, wrong, strict=True):
        assert not broken([new.labels], NAMES) and new.exit_layers == old.exit_layers
        assert (old == new) == (not was_wrong)
        sure = [np.exp(s[NAMES.index(x)]) for x, s in zip(new.labels, its_scores, strict=True)]
        assert new.confidences == pytest.approx(sure, rel=1e-4)
        rows = zip(old.labels, new.labels, old.confidences, new.confidences, strict=True)
        assert all(p == q for a, b, p, q in rows if a == b)
    outcome = tag_windows(tagger, windows, tagger.model.policy)
    assert outcome.labels == [tagged.labels for tagged in after]
    with pytest.raises(ValueError, match="decoding is 'viterbi'; expected one of "):
        tagger.decoding = "viterbi"
    with pytest.raises(ValueError, match="decoding is None"):
        Tagger(tagger.model, tokenizer, decoding=None)


def test_labels_of_no_chunks_are_decoded_word_by_word(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tagger = Tagger(tokenexit.convert(random_classifier(vocab_size=len(tokenizer))), tokenizer)
    expected = tagger.tag([TEXT, LONG])
    tagger.decoding = "constrained"
    assert tagger.tag([TEXT, LONG]) == expected


def test_evaluations_go_by_the_decoding(caplog, tiny_tokenizer):
    warn_once.cache_clear()
    _, tagger = tagger_of(tiny_tokenizer())
    tagger.model.policy = ExitPolicy(threshold=0.8, window=0)
    words = tagger.split([TEXT, "the red", "new york john"])
    free = [tagged.labels for tagged in tagger.tag(words)]
    tagger.decoding = "constrained"
    gold = [tagged.labels for tagged in tagger.tag(words)]
    data = Dataset.from_dict({"words": words, "labels": gold})
    kept = evaluate(tagger, data)
    assert kept.scores == score(gold, gold) and kept.broken_labels == 0
    tagger.decoding = "argmax"
    result = evaluate(tagger, data)
    assert result.scores == score(gold, free) != kept.scores
    assert result.broken_labels == broken(free, NAMES) > 0
    first = Dataset.from_dict({"words": words, "labels": [["I-PER"] * len(its) for its in words]})
    evaluate(tagger, first)
    assert not caplog.records
    tagger.decoding = "constrained"
    evaluate(tagger, first)
    assert "3 annotated labels cannot stand where they do, as in IOB1" in caplog.text


def test_shown_in_a_notebook(tagger):
    """The text as it was, escaped; words by their layer, labels beside them."""
    text = "John  <b>Smith</b> & Paris."
    (tagged,) = tagger.tag([text], ExitPolicy(threshold=0.5, window=0))
    shown = tagged._repr_html_()
    plain = re.sub(r"<sub>.*?</sub>", "", shown)
    assert html.unescape(re.sub(r"<[^>]*>", "", plain)) == text
    layers = [int(layer) for layer in re.findall(r'title="layer (\d+), \d+%"', shown)]
    assert layers == tagged.exit_layers
    alphas = [float(x) for x in re.findall(r"139, ([\d.]+)\)", shown)]
    assert alphas == [round(0.6 * layer / 4, 2) for layer in layers]  # of 4 layers
    labels = [label for label in tagged.labels if label != "O"]
    assert re.findall(r"<sub><b>(.*?)</b></sub>", shown) == labels
    (of_words,) = tagger.tag([["a<b", "c"]])
    assert "a&lt;b</span>" in of_words._repr_html_()
    assert Tagged([], [], [])._repr_html_().startswith("<div")


def test_spans_of_schemes():
    words = ["Ada", "King", "met", "IBM", "."]
    labels, sure = ["B-PER", "I-PER", "O", "S-ORG", "O"], [0.9, 0.7, 1.0, 0.8, 1.0]
    listed = Tagged(words, labels, [1] * 5, sure, scheme="entity_f1")
    assert listed.spans == [Span("PER", "Ada King", 0, 8, 0.7), Span("ORG", "IBM", 13, 16, 0.8)]
    text = "Ada  King met IBM."
    places = [(0, 3), (5, 9), (10, 13), (14, 17), (17, 18)]
    given = Tagged(words, labels, [1] * 5, sure, text, places, scheme="entity_f1")
    assert given.spans == [Span("PER", "Ada  King", 0, 9, 0.7), Span("ORG", "IBM", 14, 17, 0.8)]
    assert spans(["B", "M", "E", "S", "B"], "word_f1") == [("_", 0, 2), ("_", 3, 3), ("_", 4, 4)]
    assert spans(["NN", "O", "VB"], "accuracy") == [("NN", 0, 0), ("VB", 2, 2)]


@pytest.mark.parametrize("seed", range(3))
def test_the_pipeline_of_transformers_agrees(seed, tiny_tokenizer):
    """Labels, places and scores of words, and the chunks of them, at full depth."""
    tokenizer = tiny_tokenizer()
    hf, tagger = tagger_of(tokenizer, seed)
    (tagged,) = tagger.tag([TEXT])
    theirs = pipeline(
        "token-classification", model=hf, tokenizer=tokenizer, aggregation_strategy="first",
        ignore_labels=[],
    )  # fmt: skip
    groups = theirs(TEXT)
    expected = []
    for (start, stop), label, sure in zip(
        tagged.offsets, tagged.labels, tagged.confidences, strict=True
    ):
        group = next(x for x in groups if x["start"] <= start and stop <= x["end"])
        assert group["entity_group"] == label.removeprefix("B-").removeprefix("I-")
        expected.append((group, sure))
    for group in groups:
        inside = [sure for of, sure in expected if of is group]
        assert group["score"] == pytest.approx(sum(inside) / len(inside), abs=1e-4)
    for span in tagged.spans:
        assert TEXT[span.start : span.stop] == span.text


def test_callers_of_many_threads_go_through_the_model_together(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    _, alone = tagger_of(tokenizer)
    texts = [TEXT, "Paris!", "the red", "new york john", "x", "", "john smith. in", "red " * 300]
    policies = [ExitPolicy(threshold=t, window=0) for t in (0.0, 0.5, 0.8)]
    policies.append(ExitPolicy(threshold=0.5, criterion="max_prob"))
    expected = [alone.tag([t], policies[i % 4]) for i, t in enumerate(texts)]
    together = Tagger(alone.model, tokenizer, window_ms=600_000, batch_size=len(texts))
    calls, run = [], together.run

    def recorded(windows, policy):
        calls.append(len(windows))
        return run(windows, policy)

    together.run = recorded
    results = [None] * len(texts)

    def ask(i):
        results[i] = together.tag([texts[i]], policies[i % 4])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected  # the window ended as soon as all had come
    assert len(calls) == 2 and sum(calls) > len(texts)  # of each criterion one; one text is long
    assert together.tag([]) == []
    with pytest.raises(ValueError, match="window_ms is -1"):
        Tagger(alone.model, tokenizer, window_ms=-1)


def test_copies_of_one_that_waits_for_others(tagger):
    one = Tagger(tagger.model, tagger.tokenizer, window_ms=0)
    expected = one.tag([TEXT])
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other.tag([TEXT]) == expected
        assert other._together._work.__self__ is other


def test_an_error_is_only_its_callers():
    started, go, works = threading.Event(), threading.Event(), []

    def work(wanted):
        works.append(list(wanted))
        if wanted == ["first"]:
            started.set()
            assert go.wait(60)
        if "bad" in wanted:
            raise ValueError("bad one")
        return [text.upper() for text in wanted]

    batcher, results = MicroBatcher(work, 0, 10), {}

    def ask(text):
        try:
            results[text] = batcher(text)
        except ValueError as error:
            results[text] = str(error)

    threads = [threading.Thread(target=ask, args=("first",))]
    threads[0].start()
    assert started.wait(60)
    for text in ("a", "bad", "c"):
        threads.append(threading.Thread(target=ask, args=(text,)))
        threads[-1].start()
    while len(batcher._waiting) < 3:
        threads[-1].join(0.001)
    go.set()
    for thread in threads:
        thread.join()
    assert results == {"first": "FIRST", "a": "A", "bad": "bad one", "c": "C"}
    assert works[0] == ["first"] and sorted(works[1]) == ["a", "bad", "c"] and len(works) == 5


def test_who_is_interrupted_leaves_the_work_to_others():
    interrupted, go = threading.Event(), threading.Event()

    def work(wanted):
        if "stopped" in wanted and not interrupted.is_set():
            interrupted.set()
            assert go.wait(60)
            raise KeyboardInterrupt
        return [text.upper() for text in wanted]

    batcher, results = MicroBatcher(work, 0, 10), {}

    def ask(text):
        try:
            results[text] = batcher(text)
        except KeyboardInterrupt:
            results[text] = "interrupted"

    threads = [threading.Thread(target=ask, args=("stopped",))]
    threads[0].start()
    assert interrupted.wait(60)
    threads.append(threading.Thread(target=ask, args=("other",)))
    threads[1].start()
    while not batcher._waiting:
        threads[1].join(0.001)
    go.set()
    for thread in threads:
        thread.join()
    assert results == {"stopped": "interrupted", "other": "OTHER"}
    assert batcher("later") == "LATER"
