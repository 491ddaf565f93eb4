import json
import random

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors
from tokenizers import pre_tokenizers as pre
from transformers import (
    AlbertTokenizer,
    AutoTokenizer,
    BertTokenizer,
    CamembertTokenizer,
    DebertaV2Tokenizer,
    MPNetTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from tokenexit.packing import word_ids_from_kinds
from tokenexit.text.encoding import (
    Window,
    WordTokenizer,
    collate,
    encode,
    load_tokenizer,
    merge,
)
from tokenexit.text.vocabulary import token_kinds

ZERO_WIDTH_SPACE, CONTROL = "\u200b", "\x01"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer()


def tokens(tokenizer, window):
    return tokenizer.convert_ids_to_tokens(window.input_ids)


def words_of(window):
    return range(window.first_word, window.first_word + window.n_words)


def random_sentences(seed, count=30, longest=60):
    """Sentences of words with 1 to 6 pieces."""
    rng = random.Random(seed)
    return [
        ["q" * rng.choice([1, 1, 1, 2, 3, 6]) for _ in range(rng.randint(0, longest))]
        for _ in range(count)
    ]


def test_a_sentence_that_fits_is_one_window(tokenizer):
    (window,) = encode(tokenizer, [["John", "Smiths", "lives"]], max_length=6)
    assert tokens(tokenizer, window) == ["[CLS]", "john", "smith", "##s", "lives", "[SEP]"]
    assert window.word_ids == [-1, 0, 1, 1, 2, -1]
    assert window.token_type_ids == [0] * 6
    assert (window.sentence, window.first_word, window.n_words) == (0, 0, 3)
    assert window.keep == (0, 3)
    assert window.first_pieces() == [1, 2, 4]


def test_types_of_uneven_special_tokens(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    template = processors.TemplateProcessing("[CLS]:1 $A:0 [SEP]:1 [SEP]:1", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = template
    (window,) = encode(tokenizer, [["John", "Smiths"]], max_length=9)
    assert tokens(tokenizer, window) == ["[CLS]", "john", "smith", "##s", "[SEP]", "[SEP]"]
    assert window.token_type_ids == [1, 0, 0, 0, 1, 1]


def test_same_inputs_as_the_tokenizer_makes(tokenizer):
    sentences = [s for s in random_sentences(0) if s] + [["a-b", "NEW"], ["x" * 150]]
    theirs = tokenizer(sentences, is_split_into_words=True)
    windows = encode(tokenizer, sentences, max_length=512)
    assert [w.input_ids for w in windows] == theirs["input_ids"]
    assert [w.token_type_ids for w in windows] == theirs["token_type_ids"]
    for i, window in enumerate(windows):
        assert window.word_ids == [-1 if w is None else w for w in theirs.word_ids(i)]


def test_more_sentences_than_a_call_of_the_tokenizer_takes(tokenizer):
    windows = encode(tokenizer, [["new"] * (n % 3) for n in range(2001)], max_length=8)
    assert [(w.sentence, w.n_words) for w in windows] == [(n, n % 3) for n in range(2001)]


def test_no_sentences(tokenizer):
    assert encode(tokenizer, [], max_length=8) == []


def test_an_empty_sentence_has_special_tokens_only(tokenizer):
    empty, other = encode(tokenizer, [[], ("paris",)], max_length=8)
    assert tokens(tokenizer, empty) == ["[CLS]", "[SEP]"]
    assert (empty.word_ids, empty.n_words, empty.keep) == ([-1, -1], 0, (0, 0))
    assert empty.first_pieces() == []
    assert tokens(tokenizer, other) == ["[CLS]", "paris", "[SEP]"]


@pytest.mark.parametrize("nothing", ["", ZERO_WIDTH_SPACE, CONTROL, " ", "\u00a0"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_words_that_are_nothing_to_the_tokenizer(tokenizer, nothing, place):
    words = ["the", "reds"]
    words.insert(place, nothing)
    (window,) = encode(tokenizer, [words], max_length=8)
    pieces = [["the"], ["red", "##s"]]
    pieces.insert(place, ["[UNK]"])
    assert tokens(tokenizer, window) == ["[CLS]", *sum(pieces, []), "[SEP]"]
    assert window.word_ids == [-1, *(i for i in range(3) for _ in pieces[i]), -1]
    (alone,) = encode(tokenizer, [[nothing]], max_length=8)
    assert tokens(tokenizer, alone) == ["[CLS]", "[UNK]", "[SEP]"]


def test_words_that_look_like_special_tokens(tokenizer):
    (window,) = encode(tokenizer, [["[SEP]", "red", "[PAD]"]], max_length=8)
    assert window.word_ids == [-1, 0, 1, 2, -1]
    assert window.first_pieces() == [1, 2, 3]


@pytest.mark.parametrize("overlap", [0, 1, 5, 32])
@pytest.mark.parametrize("max_length", [8, 9, 20, 63])
def test_windows_of_long_sentences(tokenizer, max_length, overlap):
    sentences = random_sentences(max_length + overlap)
    whole = {w.sentence: w for w in encode(tokenizer, sentences, max_length=1000)}
    windows = encode(tokenizer, sentences, max_length, overlap)
    for number, sentence in enumerate(sentences):
        parts = [w for w in windows if w.sentence == number]
        assert parts == sorted(parts, key=lambda w: w.first_word)
        for w in parts:
            assert len(w.input_ids) == len(w.word_ids) == len(w.token_type_ids) <= max_length
            assert sorted({i for i in w.word_ids if i >= 0}) == list(words_of(w))
            # Words come whole, the very tokens of the uncut sentence.
            of_words = [i for i, word in enumerate(whole[number].word_ids) if word in words_of(w)]
            assert w.input_ids[1:-1] == [whole[number].input_ids[i] for i in of_words]
        for before, after in zip(parts, parts[1:], strict=False):
            shared = before.first_word + before.n_words - after.first_word
            assert 0 <= shared <= min(overlap, before.n_words // 2)
            assert shared < after.n_words  # something new
        kept = [word for w in parts for word in range(*w.keep)]
        assert kept == list(range(len(sentence)))


def poorer_side(words, word, n):
    # Where the sentence begins or ends there is nothing more to know.
    left = word - words.start if words.start else n
    right = words.stop - 1 - word if words.stop < n else n
    return min(left, right)


@pytest.mark.parametrize("max_length", [8, 20, 63])
def test_words_are_kept_where_their_poorer_side_is_best(tokenizer, max_length):
    sentences = random_sentences(max_length, longest=200)
    windows = encode(tokenizer, sentences, max_length, overlap=9)
    for number, sentence in enumerate(sentences):
        parts = [w for w in windows if w.sentence == number]
        for word in range(len(sentence)):
            sides = {
                w.first_word: poorer_side(words_of(w), word, len(sentence))
                for w in parts
                if word in words_of(w)
            }
            (keeper,) = [w for w in parts if w.keep[0] <= word < w.keep[1]]
            assert sides[keeper.first_word] == max(sides.values())


def test_windows_by_hand(tokenizer):
    windows = encode(tokenizer, [["new"] * 10], max_length=8, overlap=2)
    assert [(w.first_word, w.n_words, w.keep) for w in windows] == [(0, 6, (0, 5)), (4, 6, (5, 10))]
    windows = encode(tokenizer, [["new"] * 11], max_length=8, overlap=1)
    assert [(w.first_word, w.n_words, w.keep) for w in windows] == [(0, 6, (0, 6)), (5, 6, (6, 11))]


def test_a_word_longer_than_a_window_keeps_its_first_pieces(tokenizer, caplog):
    sentence = ["red", "x" * 20, "paris"]
    windows = encode(tokenizer, [["new"], sentence], max_length=8)
    assert "sentence 1, word 1" in caplog.text and "20 tokens" in caplog.text
    assert [len(w.input_ids) for w in windows] == [3, 3, 8, 3]
    assert tokens(tokenizer, windows[2])[1:3] == ["x", "##x"]
    assert merge(windows, [words_of(w) for w in windows]) == [[0], [0, 1, 2]]
    caplog.clear()
    assert len(encode(tokenizer, [sentence], max_length=24)) == 1
    assert not caplog.text


@pytest.mark.parametrize(
    ("sentences", "options", "error", "message"),
    [
        ([["a"]], {"max_length": 2}, ValueError, "max_length is 2; expected at least 3"),
        ([["a"]], {"overlap": -1}, ValueError, "overlap is -1"),
        (["a b"], {}, TypeError, "sentence 0 is 'a b'; expected a list of words"),
        ([["a"], ["b", 3]], {}, TypeError, r"sentence 1 is \['b', 3\]"),
        ([["a"], ["\ud83d"]], {}, ValueError, "sentence 1 is no valid Unicode"),
    ],
)
def test_wrong_sentences(tokenizer, sentences, options, error, message):
    with pytest.raises(error, match=message):
        encode(tokenizer, sentences, **{"max_length": 8, **options})


def test_a_slow_tokenizer_is_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match="SlowTokenizer.*fast tokenizer"):
        encode(SlowTokenizer(), [["a"]], max_length=8)


def byte_level_tokenizer(add_prefix_space):
    """As RoBERTa's: no token types, no unknown token, `Ġ` before words."""
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3, "Ġ": 4, "Ġa": 5}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def test_byte_level_tokenizer():
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    (window,) = encode(tokenizer, [["a", "aa"]], max_length=8)
    assert window.input_ids == [0, 5, 5, 3, 2]
    assert window.word_ids == [-1, 0, 1, 1, -1]
    assert window.token_type_ids is None
    assert collate([window], tokenizer).keys() == {"input_ids", "attention_mask", "word_ids"}
    with pytest.raises(ValueError, match="without an unknown token.*word 1 of sentence 0, ''"):
        encode(tokenizer, [["a", ""]], max_length=8)
    (same,) = encode(byte_level_tokenizer(add_prefix_space=False), [["a", "aa"]], max_length=8)
    assert same == window


TEXT = [
    "the tagger leaves as soon as the tagger is sure of the words it has seen",
    "a word leaves the model, and it's seen by the words that have not left",
    "layers 1 to 12 are the same for each word, 300 of them in the 7 sentences",
]


def trained(model, pre_tokenizer=None, normalizer=None, **options):
    """A tokenizer with the vocabulary of a few sentences."""
    core = Tokenizer(model)
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        core.normalizer = normalizer
    if isinstance(model, models.Unigram):
        options["unk_token"] = "<unk>"
    trainer = type(model.get_trainer())
    special = ["<pad>", "<unk>"]
    core.train_from_iterator(
        TEXT, trainer(vocab_size=400, special_tokens=special, show_progress=False, **options)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


def bpe(*parts, **options):
    options = {"initial_alphabet": pre.ByteLevel.alphabet(), **options}
    return trained(models.BPE(unk_token="<unk>"), *parts, **options)


def split():
    """As most byte-level tokenizers of today cut a text before their `ByteLevel`."""
    return pre.Split(Regex(r"'s| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")


def ends_of_words(pre_tokenizer):
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return trained(model, pre_tokenizer, end_of_word_suffix="</w>")


TOLD_APART = {
    "byte-level": lambda: bpe(pre.ByteLevel(add_prefix_space=True)),
    "byte-level, digits": lambda: bpe(pre.Sequence([pre.Digits(), pre.ByteLevel()])),
    "byte-level, split": lambda: bpe(pre.Sequence([split(), pre.ByteLevel(use_regex=False)])),
    "Metaspace": lambda: trained(models.Unigram(), pre.Metaspace()),
    "Metaspace, first": lambda: trained(models.Unigram(), pre.Metaspace(prepend_scheme="first")),
    "Metaspace, sequence": lambda: trained(
        models.Unigram(), pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()])
    ),
    "prepended by the normalizer": lambda: bpe(
        pre.Split("▁", "merged_with_next"),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "ends marked, byte-level": lambda: ends_of_words(
        pre.Sequence([split(), pre.WhitespaceSplit(), pre.ByteLevel(add_prefix_space=False)])
    ),
    "ends marked": lambda: ends_of_words(pre.Whitespace()),
    "WordPiece": lambda: trained(models.WordPiece(unk_token="<unk>"), pre.BertPreTokenizer()),
    "words only": lambda: trained(models.WordLevel(unk_token="<unk>")),
    "dropout": lambda: trained(models.BPE(unk_token="<unk>", dropout=0.5), pre.ByteLevel()),
}


@pytest.mark.parametrize("kind", TOLD_APART)
def test_a_word_has_the_pieces_that_it_has_in_a_text(kind):
    tokenizer = TOLD_APART[kind]()
    sentence = ["words", "leaves", "there", "the", "sure"]
    (window,) = encode(tokenizer, [sentence], max_length=64)
    assert [window.word_ids.count(word) > 0 for word in range(5)] == [True] * 5
    if kind == "dropout":  # which is off, in our copy only
        assert encode(tokenizer, [sentence] * 9, max_length=64)[8].input_ids == window.input_ids
        assert tokenizer.backend_tokenizer.model.dropout == 0.5
    elif kind != "words only":
        text = tokenizer(" ".join(sentence), add_special_tokens=False)["input_ids"]
        assert window.input_ids == text


WITHOUT = {"add_prefix_space": False}
JOINED = {
    "byte-level": lambda: bpe(pre.ByteLevel(**WITHOUT)),
    "digits": lambda: bpe(pre.Sequence([pre.Digits(), pre.ByteLevel(**WITHOUT)])),
    "split": lambda: bpe(pre.Sequence([split(), pre.ByteLevel(**WITHOUT, use_regex=False)])),
    "nested": lambda: bpe(
        pre.Sequence([pre.Sequence([split()]), pre.Sequence([pre.ByteLevel(**WITHOUT)])])
    ),
    "Metaspace": lambda: trained(models.Unigram(), pre.Metaspace(prepend_scheme="never")),
    "Metaspace, sequence": lambda: trained(
        models.Unigram(),
        pre.Sequence([pre.Punctuation(), pre.Metaspace(replacement="_", prepend_scheme="never")]),
    ),
    "replaced by the normalizer": lambda: bpe(None, normalizers.Replace(" ", "▁")),
    "byte-level normalizer": lambda: bpe(None, normalizers.ByteLevel()),
}


@pytest.mark.parametrize("kind", JOINED)
def test_a_tokenizer_that_joins_words_gets_them_with_a_space(kind):
    """Each word has the pieces that it has amid a text, with what stands within a word."""
    tokenizer, sentence = JOINED[kind](), ["the", "words", "it's", "leaves"]
    assert WordTokenizer(tokenizer).space
    (window,) = encode(tokenizer, [sentence], max_length=64)
    pieces = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in sentence]
    assert window.input_ids == sum(pieces, [])
    assert window.word_ids == [i for i, its_pieces in enumerate(pieces) for _ in its_pieces]
    if "normalizer" not in kind:  # without a pre-tokenizer a piece may have parts of two words
        text = tokenizer(" " + " ".join(sentence), add_special_tokens=False)["input_ids"]
        assert window.input_ids == text
    (spaced,) = encode(tokenizer, [[f" {word}" for word in sentence]], max_length=64)
    assert spaced.input_ids == window.input_ids


def test_a_tokenizer_that_joins_words_whatever_is_done_is_refused():
    tokenizer = bpe(pre.ByteLevel(**WITHOUT))
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()  # of a word, what stands before it
    with pytest.raises(ValueError, match="joins words to those before; expected one loaded with"):
        encode(tokenizer, [["the", "words"]], max_length=64)


def test_a_tokenizer_that_knows_few_words():
    core = Tokenizer(models.BPE({"北": 0, "京": 1, "<pad>": 2, "<s>": 3}, []))
    core.pre_tokenizer = pre.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    (window,) = encode(tokenizer, [["北京", "北"]], max_length=8)
    assert window.input_ids == [3, 3, 0, 1, 0]
    assert window.word_ids == [-1, -1, 0, 0, 1]


def test_the_unknown_token_that_only_the_model_of_the_tokenizer_names():
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    (window,) = encode(PreTrainedTokenizerFast(tokenizer_object=core), [["a", CONTROL]], 8)
    assert (window.input_ids, window.word_ids) == ([1, 0], [0, 1])


def test_added_tokens_are_words():
    tokenizer = TOLD_APART["byte-level"]()
    tokenizer.add_tokens(["<user>", AddedToken("#tag", single_word=True, lstrip=True)])
    tokenizer.add_tokens(["<url>"], special_tokens=True)
    (window,) = encode(tokenizer, [["the", "<user>", "words", "#tag", "<url>"]], max_length=64)
    first = tokens(tokenizer, window)
    assert [first[i] for i in window.first_pieces()] == [
        "Ġthe",
        "<user>",
        "Ġwords",
        "#tag",
        "<url>",
    ]


def test_a_custom_pre_tokenizer():
    """One in Python, which can be neither saved nor copied."""

    class Dashes:
        def pre_tokenize(self, text):
            text.split(lambda _, part: part.split("-", "removed"))

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    core.pre_tokenizer = pre.PreTokenizer.custom(Dashes())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(core.model))
    tokenizer.backend_tokenizer.pre_tokenizer = core.pre_tokenizer
    (window,) = encode(tokenizer, [["a-b", "b"]], max_length=8)
    assert (window.input_ids, window.word_ids) == ([0, 1, 1], [0, 0, 1])


def test_words_that_look_special_where_special_tokens_are_split():
    tokenizer = TOLD_APART["WordPiece"]()
    tokenizer.split_special_tokens = True
    (window,) = encode(tokenizer, [["<pad>"]], max_length=64)
    assert window.input_ids == tokenizer("<pad>")["input_ids"] != [tokenizer.pad_token_id]


def test_collate(tokenizer):
    windows = encode(tokenizer, [["reds", "in", "paris"], [], ["new"]], max_length=8)
    for pad in (tokenizer, tokenizer.pad_token_id):
        batch = collate(windows, pad)
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        ids = dict(tokenizer.get_vocab())
        assert batch["input_ids"].tolist() == [
            [ids[t] for t in "[CLS] red ##s in paris [SEP]".split()],
            [ids[t] for t in "[CLS] [SEP] [PAD] [PAD] [PAD] [PAD]".split()],
            [ids[t] for t in "[CLS] new [SEP] [PAD] [PAD] [PAD]".split()],
        ]
        assert batch["attention_mask"].sum(1).tolist() == [6, 2, 3]
        assert batch["word_ids"].tolist() == [
            [-1, 0, 0, 1, 2, -1],
            [-1] * 6,
            [-1, 0, -1, -1, -1, -1],
        ]
        assert batch["token_type_ids"].tolist() == [[0] * 6] * 3
        assert "labels" not in batch


def test_collated_labels(tokenizer):
    windows = encode(tokenizer, [["reds", "in", "paris"], [], ["new"]], max_length=8)
    batch = collate(windows, tokenizer, labels=[[3, 1, -100], [], [2]])
    none = -100
    assert batch["labels"].tolist() == [
        [none, 3, none, 1, none, none],
        [none] * 6,
        [none, 2, none, none, none, none],
    ]


def test_each_word_counts_once_in_training(tokenizer):
    sentences = random_sentences(1)
    labels = [[1000 * i + j for j in range(len(words))] for i, words in enumerate(sentences)]
    windows = encode(tokenizer, sentences, max_length=12, overlap=4)
    assert len(windows) > len(sentences)
    batch = collate(windows, tokenizer, [labels[w.sentence] for w in windows])
    used = batch["labels"][batch["labels"] != -100].tolist()
    assert sorted(used) == sorted(sum(labels, []))
    for window, row in zip(windows, batch["labels"].tolist(), strict=True):
        for position, label in enumerate(row):
            if label != -100:
                assert window.word_ids[position] == label % 1000
                assert window.word_ids[position - 1] != label % 1000


def test_merge_in_any_order(tokenizer):
    sentences = random_sentences(2)
    windows = encode(tokenizer, sentences, max_length=10, overlap=3)
    random.Random(0).shuffle(windows)
    values = [[(w.sentence, word) for word in words_of(w)] for w in windows]
    merged = merge(windows, values)
    assert merged == [[(i, j) for j in range(len(words))] for i, words in enumerate(sentences)]
    assert merge([], []) == []


def test_wrong_batches(tokenizer):
    windows = encode(tokenizer, [["new"] * 9, ["red"]], max_length=8, overlap=2)
    values = [[0] * w.n_words for w in windows]
    with pytest.raises(ValueError, match="got no windows"):
        collate([], tokenizer)
    with pytest.raises(ValueError, match="got labels for 1 windows; expected 3"):
        collate(windows, tokenizer, [[0] * 9])
    with pytest.raises(ValueError, match="got 3 labels for sentence 0"):
        collate(windows, tokenizer, [[0] * 9, [0] * 3, [0]])
    with pytest.raises(ValueError, match="got values for 2 windows; expected 3"):
        merge(windows, values[:2])
    with pytest.raises(ValueError, match="got 2 values for a window of sentence 1"):
        merge(windows, [*values[:2], [0, 0]])
    with pytest.raises(ValueError, match="before word 5 of sentence 0 is missing"):
        merge(windows[1:], values[1:])
    with pytest.raises(ValueError, match="before word 0 of sentence 1 is missing"):
        merge(windows[2:], values[2:])


def test_collate_without_a_padding_token():
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    windows = encode(tokenizer, [["a"]], max_length=8)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="without a padding token"):
        collate(windows, tokenizer)
    assert collate(windows, 7)["input_ids"].tolist() == [[0, 5, 2]]


def test_a_window_cannot_be_changed():
    window = Window(0, 0, 0, (0, 0), [], [])
    with pytest.raises(AttributeError):
        window.keep = (0, 1)


def vocabulary(tokenizer, *special):
    """Of a trained tokenizer, with special ones first: ids or, of Unigram, scores; and merges."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    scores = state["vocab"] if isinstance(state["vocab"], list) else [[t] for t in state["vocab"]]
    others = [entry for entry in scores if entry[0] not in (*special, "<pad>", "<unk>")]
    if len(others[0]) == 2:
        return {"vocab": [*((token, 0.0) for token in special), *map(tuple, others)]}
    tokens = [*special, *(token for (token,) in others)]
    merges = {"merges": [tuple(m) for m in state["merges"]]} if "merges" in state else {}
    return {"vocab": {token: i for i, token in enumerate(tokens)}, **merges}


BERTS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTAS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def word_pieces():
    return trained(models.WordPiece(unk_token="<unk>"), pre.BertPreTokenizer())


def unigram(pre_tokenizer=None):
    words = pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()])
    return trained(models.Unigram(), pre_tokenizer or words)


def with_nfkc():
    """As XLM-RoBERTa's from its file, whose normalizer is one of SentencePiece's, by NFKC."""
    tokenizer = unigram()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


REAL = {
    "BERT": lambda: BertTokenizer(**vocabulary(word_pieces(), *BERTS)),
    "MPNet": lambda: MPNetTokenizer(**vocabulary(word_pieces(), *ROBERTAS, "[UNK]")),
    "RoBERTa": lambda: RobertaTokenizer(**vocabulary(bpe(pre.ByteLevel()), *ROBERTAS)),
    "ModernBERT": lambda: bpe(pre.ByteLevel(**WITHOUT)),
    "XLM-RoBERTa": lambda: XLMRobertaTokenizer(**vocabulary(unigram(), *ROBERTAS)),
    "XLM-RoBERTa, NFKC": with_nfkc,
    "CamemBERT": lambda: CamembertTokenizer(**vocabulary(unigram(), *ROBERTAS)),
    "ALBERT": lambda: AlbertTokenizer(**vocabulary(unigram(), "<pad>", "<unk>", *BERTS[2:])),
    "DeBERTa-v3": lambda: DebertaV2Tokenizer(**vocabulary(unigram(pre.Metaspace()), *BERTS)),
}


@pytest.mark.parametrize("kind", REAL)
def test_words_of_real_tokenizers(kind, tmp_path):
    """Saved and loaded as `train` loads them: pieces as in a text, and words by the marks alone."""
    REAL[kind]().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert not WordTokenizer(tokenizer).space
    # The ligature and the accent are normalized by some, and unknown to others.
    sentence = ["words", "leaves", "sure", "ﬁnd", "thére", "the", "Seen"]
    (window,) = encode(tokenizer, [sentence], max_length=64)
    assert set(window.word_ids) == {-1, *range(7)} - ({-1} if not window.word_ids[0] else set())
    text = tokenizer(" ".join(sentence))["input_ids"]
    assert window.input_ids == text
    kinds = token_kinds(tokenizer, len(tokenizer))[torch.tensor([text])]
    assert word_ids_from_kinds(kinds, torch.ones(1, len(text))).tolist() == [window.word_ids]
    if kind != "BERT" and kind != "MPNet":  # their words are cut at punctuation
        (window,) = encode(tokenizer, [["it's", "(the", "words)"]], max_length=64)
        assert window.input_ids == tokenizer("it's (the words)")["input_ids"]


@pytest.mark.parametrize("kind", ["RoBERTa", "ModernBERT"])
def test_byte_level_tokenizers_are_loaded_with_a_space_before_texts(kind, tmp_path):
    REAL[kind]().save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.tokenize("the words")[0] != "Ġthe"
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "again")
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert loaded.tokenize("the words") == ["Ġthe", "Ġwords"]
        assert loaded.tokenize(["the", "words"], is_split_into_words=True) == ["Ġthe", "Ġwords"]
    # A tagger made with the plain one gives words the same pieces.
    pieces = [encode(each, [["the", "words"]], 64)[0].input_ids for each in (plain, tokenizer)]
    assert pieces[0] == pieces[1]


def test_a_tokenizer_that_cuts_words_before_its_bytes_is_loaded_as_it_is(tmp_path):
    """There `add_prefix_space` would put a space before each part of a word."""
    JOINED["split"]().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokenize("the words") == ["the", "Ġwords"]
    (window,) = encode(tokenizer, [["it's", "words"]], max_length=64)
    assert window.input_ids == tokenizer(" it's words")["input_ids"]
