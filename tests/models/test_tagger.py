"""Tagger: order, batches, long sentences, words that the tokenizer drops."""

import pytest
import torch
from random_models import random_classifier

import tokenexit
from tokenexit import ExitPolicy, Tagger, TokenExitForTokenClassification
from tokenexit.int8 import is_quantized
from tokenexit.models import tagger as module
from tokenexit.ops import extension_available

WORDS = ["john", "smith", "lives", "in", "new", "york", "paris", "the", "red", "xyzzy", "smiths"]


@pytest.fixture(scope="module")
def tagger(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = tokenexit.convert(
        random_classifier(vocab_size=len(tokenizer), max_position_embeddings=40), tokenizer
    ).double()
    with torch.no_grad():
        for head in model.exit_heads:
            head.weight.normal_(0, 0.5)
    model.policy = ExitPolicy(threshold=0.4, window=1)
    return Tagger(model, tokenizer, batch_size=4)


def sentences(count, longest=15, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest, (count,), generator=g).tolist()
    return [[WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=g)] for n in lengths]


def test_order_and_batches_do_not_matter(tagger):
    many = sentences(23)
    together = tagger.tag(many)
    assert [t.words for t in together] == many
    for words, tagged in zip(many, together, strict=True):
        (alone,) = tagger.tag([words])
        assert alone == tagged
        assert len(tagged.labels) == len(tagged.exit_layers) == len(words)
    assert {layer for t in together for layer in t.exit_layers} >= {1, 2, 4}
    assert list(tagger.stream(iter(many), buffer=5)) == together


def test_batches_are_of_equal_lengths_and_so_little_is_padding(tagger):
    windows = tagger.windows(sentences(23))
    lengths = [len(w.input_ids) for w in windows]
    seen = []
    for indices, output, _ in tagger.run(windows):
        assert output.logits.shape[1] == max(lengths[i] for i in indices)
        seen += indices
    assert sorted(seen) == list(range(23)) and lengths != sorted(lengths)
    assert [lengths[i] for i in seen] == sorted(lengths)


def test_nothing_and_empty_sentences(tagger):
    assert tagger.tag([]) == []
    assert [t.labels for t in tagger.tag([[], ["paris"], []])][::2] == [[], []]


def test_empty_sentences_without_special_tokens(tagger, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    bare = Tagger(tagger.model, tokenizer)
    for given in ([[]], [""], [[], []]):
        assert [t.labels for t in bare.tag(given)] == [[]] * len(given)
    assert bare.tag([[], ["paris"]])[1] == bare.tag([["paris"]])[0]


def test_long_sentences_keep_every_word(tagger):
    long = [WORDS[i % len(WORDS)] for i in range(300)]
    tagged = tagger.tag([["red"], long, ["paris"]])
    assert [len(t.labels) for t in tagged] == [1, 300, 1]
    assert set(tagged[1].labels) <= set(tagger.model.config.label2id)
    assert min(tagged[1].exit_layers) >= 1


def test_words_that_the_tokenizer_drops_get_a_label(tagger):
    words = ["john", "\u200b", "", "lives", "\ufe0f"]
    (tagged,) = tagger.tag([words])
    assert tagged.words == words and len(tagged.labels) == 5


def test_stream_reads_no_more_than_its_buffer(tagger):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield ["paris"]

    stream = tagger.stream(endless(), buffer=8)
    for _ in range(9):
        next(stream)
    assert len(taken) == 16


def test_messages_name_the_sentence_of_the_stream(tagger, caplog):
    long = ["a-" * 400]
    list(tagger.stream([["john"], ["john"], ["john"], ["john"], long], buffer=2))
    assert "sentence 4, word 0" in caplog.text
    with pytest.raises(TypeError, match="sentence 4 is .*expected a list of words"):
        list(tagger.stream([["a"], ["b"], ["c"], ["d"], [1]], buffer=2))


def test_labels_are_those_of_the_model(tagger):
    words = ["john", "smiths", "lives", "new", "paris", "xyzzy", "red"]
    encoded = tagger.tokenizer([words], is_split_into_words=True, return_tensors="pt")
    ids = [-1 if w is None else w for w in encoded.word_ids(0)]
    policy = ExitPolicy(threshold=0.5, window=0)
    output = tagger.model(**encoded, word_ids=torch.tensor([ids]), policy=policy)
    firsts = [ids.index(w) for w in range(len(words))]
    (tagged,) = tagger.tag([words], policy)
    names = tagger.model.config.id2label
    assert tagged.labels == [names[int(output.logits[0, i].argmax())] for i in firsts]
    assert tagged.exit_layers == output.exit_layers[0, firsts].tolist()
    assert len(set(tagged.labels)) == len(set(tagged.exit_layers)) == 3
    assert tagger.tag([words], ExitPolicy.never())[0].exit_layers == [4] * len(words)


@pytest.mark.parametrize("family, expected", [("bert", 20), ("mpnet", 18)])
def test_windows_are_what_model_and_tokenizer_take(family, expected, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 20}
    model = tokenexit.convert(random_classifier(family, **size), tokenizer)
    for limit, longest in ((10**30, expected), (11, 11)):
        tokenizer.model_max_length = limit
        windows = Tagger(model, tokenizer).windows([["red"] * 50])
        assert max(len(w.input_ids) for w in windows) == longest


def test_save_and_load(tagger, tmp_path):
    tagger.save_pretrained(tmp_path / "out")
    again = Tagger.from_pretrained(tmp_path / "out", batch_size=2)
    assert again.model.policy == tagger.model.policy
    again.model.double()
    many = sentences(5)
    assert again.tag(many) == tagger.tag(many)


@pytest.mark.parametrize("int8", [False, True])
def test_where_and_which_are_handed_on(tagger, tmp_path, monkeypatch, int8):
    """revision and token to whatever asks the hub, device to the model; nothing if not given."""
    tagger.save_pretrained(tmp_path)
    seen, moved = [], []

    def recorded(load):
        def loading(name, *args, **kwargs):
            seen.append({key: kwargs.pop(key) for key in ("revision", "token") if key in kwargs})
            return load(name, *args, **kwargs)

        return loading

    cls = TokenExitForTokenClassification
    monkeypatch.setattr(cls, "from_pretrained", recorded(cls.from_pretrained))
    monkeypatch.setattr(module, "load_tokenizer", recorded(module.load_tokenizer))
    monkeypatch.setattr(cls, "to", lambda self, *args: moved.append(args))
    Tagger.from_pretrained(tmp_path, int8=int8)
    assert seen == [{}, {}] and moved == []
    hub = {"revision": "v2", "token": "hf_x"}
    Tagger.from_pretrained(tmp_path, int8=int8, device="cuda:1", **hub)
    assert seen[2:] == [hub, hub] and moved == [("cuda:1",)]
    Tagger.from_pretrained(tmp_path, token=False)
    assert seen[4:] == [{"token": False}] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_saved_and_loaded_in_another_dtype(dtype, tagger, tmp_path):
    tagger.save_pretrained(tmp_path / "wide")
    of = Tagger.from_pretrained(tmp_path / "wide", dtype=dtype)
    of.save_pretrained(tmp_path / "narrow")
    again = Tagger.from_pretrained(tmp_path / "narrow")  # as it was saved
    parts = {name: tmp_path / name / "model.safetensors" for name in ("wide", "narrow")}
    wide, narrow = (path.stat().st_size for path in parts.values())
    assert narrow < 1.1 * wide * dtype.itemsize / 8
    many = sentences(5)
    for other in (of, again):
        assert {p.dtype for p in other.model.parameters()} == {dtype}
        if extension_available():
            assert (other.model.loop == "cpu") == (dtype != torch.float16)
    assert again.tag(many) == of.tag(many)


def test_saved_and_loaded_in_8_bits(tagger, tmp_path):
    tagger.save_pretrained(tmp_path / "exact")
    rounded = Tagger.from_pretrained(tmp_path / "exact", int8=True)
    rounded.save_pretrained(tmp_path / "rounded")
    many = sentences(5)
    for int8 in (False, True):
        again = Tagger.from_pretrained(tmp_path / "rounded", int8=int8, dtype=torch.float32)
        assert is_quantized(again.model) and again.tag(many) == rounded.tag(many)
        with pytest.raises(ValueError, match=r"got dtype torch.bfloat16 for 8-bit weights"):
            Tagger.from_pretrained(tmp_path / "rounded", int8=int8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"got dtype torch.float16 for 8-bit weights"):
        Tagger.from_pretrained(tmp_path / "exact", int8=True, dtype=torch.float16)
    half = Tagger.from_pretrained(tmp_path / "exact", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert is_quantized(Tagger.from_pretrained(tmp_path / "half", int8=True).model)


def test_loaded_with_8_bit_weights(tmp_path, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    model = tokenexit.convert(random_classifier(vocab_size=len(tokenizer)), tokenizer)
    Tagger(model, tokenizer).save_pretrained(tmp_path)
    assert [
        is_quantized(Tagger.from_pretrained(tmp_path, **kind).model)
        for kind in ({}, {"int8": True})
    ] == [False, True]


@pytest.mark.parametrize("buffer", [0, -1])
def test_a_buffer_of_nothing(tagger, buffer):
    with pytest.raises(ValueError, match=f"buffer is {buffer}; expected 1 or more"):
        tagger.stream([["ada"]], buffer=buffer)


def test_what_was_saved_last_is_loaded(tmp_path, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    # Saved to a folder within the folder, which a second save has to replace.
    tokenizer.chat_template = {"default": "{{ messages }}", "other": "{{ messages }}"}
    model = tokenexit.convert(random_classifier(vocab_size=len(tokenizer)), tokenizer)
    for value, size in ((0.1, "50GB"), (0.2, "50KB"), (0.3, "20KB"), (0.4, "50GB")):
        model.embeddings.word.weight.data.fill_(value)
        model.save_pretrained(tmp_path, max_shard_size=size)
        tokenizer.save_pretrained(tmp_path)
        again = Tagger.from_pretrained(tmp_path).model
        assert (again.embeddings.word.weight == model.embeddings.word.weight).all()
    Tagger(model, tokenizer).save_pretrained(tmp_path)
    Tagger(model, tokenizer).save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "other.jinja").is_file()
    assert [f.name for f in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_model_in_training_is_run_in_evaluation_mode(tagger):
    many = sentences(6)
    expected = tagger.tag(many)
    tagger.model.train()
    try:
        assert tagger.tag(many) == expected
        assert tagger.model.training
    finally:
        tagger.model.eval()


def test_another_length_of_the_tokenizer_does_not_matter(tagger, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    mine, long = Tagger(tagger.model, tokenizer), [["john", "paris"] * 30]
    before = mine.windows(long)
    tokenizer.model_max_length = 9
    assert mine.windows(long) == before != Tagger(tagger.model, tokenizer).windows(long)


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_what_others_do_with_the_tokenizer_does_not_matter(tagger, tiny_tokenizer, setting):
    """Another thread's call comes between the setting of ours and its use."""
    shared = tiny_tokenizer()

    def another_call(**kwargs):
        if setting == "truncation":
            shared.backend_tokenizer.enable_truncation(3)
        else:
            shared.backend_tokenizer.enable_padding(length=30)

    shared.set_truncation_and_padding = another_call
    another_call()
    many = sentences(6)
    assert Tagger(tagger.model, shared, batch_size=4).tag(many) == tagger.tag(many)


def test_settings_of_the_tokenizer_stay_and_are_saved(tagger, tiny_tokenizer, tmp_path):
    shared = tiny_tokenizer()
    shared.backend_tokenizer.enable_truncation(7)
    shared.backend_tokenizer.enable_padding(length=9)
    ours = Tagger(tagger.model, shared)
    ours.tag(sentences(3))
    ours.save_pretrained(tmp_path / "out")
    for tokenizer in (shared, Tagger.from_pretrained(tmp_path / "out").tokenizer):
        assert tokenizer.backend_tokenizer.truncation["max_length"] == 7
        assert tokenizer.backend_tokenizer.padding["length"] == 9


def test_a_default_device_of_the_user_does_not_matter(tagger):
    many = sentences(6)
    expected = tagger.tag(many)
    with torch.device("meta"):
        assert tagger.tag(many) == expected


def test_a_configuration_that_asks_for_tuples(tagger):
    many = sentences(6)
    expected = tagger.tag(many)
    tagger.model.config.return_dict = False
    try:
        assert tagger.tag(many) == expected
    finally:
        tagger.model.config.return_dict = True


def test_a_model_with_something_around_it(tagger):
    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = tagger.model

        def forward(self, *args, **kwargs):
            return self.base_model(*args, **kwargs)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(tagger.model, name)

    many = sentences(6)
    assert Tagger(Adapted(), tagger.tokenizer).tag(many) == tagger.tag(many)


@pytest.mark.parametrize("other", [random_classifier(), torch.nn.Linear(2, 2), "a name"])
def test_refuses_other_models(tagger, other):
    expected = rf"got a {type(other).__name__}; expected a TokenExit.*tokenexit.convert makes one"
    with pytest.raises(TypeError, match=expected):
        Tagger(other, tagger.tokenizer)


@pytest.mark.parametrize("names", [["O", "B-X"], ["O", *(f"B-{i}" for i in range(9))]])
def test_refuses_other_labels_than_the_heads_have(names, tagger, tmp_path, monkeypatch):
    monkeypatch.setattr(tagger.model.config, "id2label", dict(enumerate(names)))
    expected = rf"exit head 1 has \d outputs; expected {len(names)}, by config.id2label of"
    with pytest.raises(ValueError, match=expected):
        tagger.tag([["a"]])
    with pytest.raises(ValueError, match=expected):
        tagger.save_pretrained(tmp_path / "tagger")
    assert not (tmp_path / "tagger").exists()


def test_refuses(tagger):
    with pytest.raises(ValueError, match="batch_size is 0"):
        Tagger(tagger.model, tagger.tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="overlap is -1; expected 0 or more"):
        Tagger(tagger.model, tagger.tokenizer, overlap=-1)
    with pytest.raises(TypeError, match="batch_size is 2.5; expected an int"):
        Tagger(tagger.model, tagger.tokenizer, batch_size=2.5)
    with pytest.raises(TypeError, match="sentence 1 is 5"):
        tagger.tag([["a"], 5])
