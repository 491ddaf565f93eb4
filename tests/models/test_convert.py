"""convert: parity with Hugging Face, words from the tokenizer, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from random_models import ALL_FAMILIES, CONVOLVED, FAMILIES, random_batch, random_classifier
from torch.nn.utils import prune
from transformers.activations import ACT2FN

import tokenexit
from tokenexit import ExitPolicy
from tokenexit.models.families import FAMILIES as FAMILY_TABLE
from tokenexit.models.families import activation_of
from tokenexit.ops.bias_gelu import GELUS
from tokenexit.text.vocabulary import token_kinds

LENGTHS = [5, 17, 1, 9, 2, 150]
ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 50.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
@torch.no_grad()
def test_never_equals_hugging_face(family, backend):
    theirs = random_classifier(family)
    ours = tokenexit.convert(theirs)
    ours.backend = backend
    batch = random_batch(LENGTHS)
    expected = theirs(batch["input_ids"], batch["attention_mask"]).logits
    got = ours(**batch)
    mask = batch["attention_mask"] != 0
    torch.testing.assert_close(got.logits[mask], expected[mask], atol=1e-4, rtol=0)
    assert (got.exit_layers[mask] == 4).all()
    assert not got.exit_layers[~mask].any() and not got.logits[~mask].any()


@torch.no_grad()
def test_token_types_and_positions_as_hugging_face_takes_them():
    theirs = random_classifier()
    ours = tokenexit.convert(theirs)
    ids = torch.arange(8).view(1, 8) + 4
    extra = {
        "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]),
        "position_ids": torch.arange(8)[None].flip(1),
    }
    torch.testing.assert_close(ours(ids, **extra).logits, theirs(ids, **extra).logits)


@pytest.mark.parametrize(
    "family, changes", [*((family, {}) for family in ALL_FAMILIES), ("deberta-v2", CONVOLVED)]
)
def test_gradients_of_the_last_head_equal_hugging_face(family, changes):
    """Each of their parameters has the gradient that ours, under its name here, has."""
    theirs = random_classifier(family, **changes).train()
    for part in theirs.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0
    theirs.config.attention_probs_dropout_prob = theirs.config.hidden_dropout_prob = 0
    for layer in theirs.modules():  # dropout of attention is a number there
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 0.0)
    ours = tokenexit.convert(theirs)
    for part in ours.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
    ours.exit_heads[-1].dropout = 0.0
    batch = random_batch([9, 3])
    mask = batch["attention_mask"] != 0
    weight = torch.randn(*mask.shape, 5, generator=torch.Generator().manual_seed(0))
    for model in (theirs, ours):
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        (logits * weight)[mask].sum().backward()
    got = dict(ours.named_parameters())
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    expected = FAMILY_TABLE[family].parted(gradients)
    for name, parts in FAMILY_TABLE[family].names(theirs.config).items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in got:
                wanted = torch.cat([expected[f"{part}.{kind}"] for part in parts])
                found = got[f"{name}.{kind}"].grad
                torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "family, changes",
    [
        ("albert", {"num_hidden_groups": 2}),
        ("albert", {"num_hidden_groups": 2, "num_hidden_layers": 3, "inner_group_num": 2}),
        ("albert", {"num_hidden_groups": 4, "hidden_act": "gelu"}),
        ("albert", {"embedding_size": 32, "type_vocab_size": 1}),
        ("deberta-v2", {"share_att_key": False}),
        ("deberta-v2", {"share_att_key": False, "pos_att_type": "c2p", "norm_rel_ebd": "none"}),
        ("deberta-v2", {"pos_att_type": "p2c", "position_buckets": -1}),
        ("deberta-v2", {"pos_att_type": None}),
        ("deberta-v2", {"relative_attention": False, "norm_rel_ebd": "none"}),
        ("deberta-v2", {"relative_attention": False, "share_att_key": False}),
        ("deberta-v2", CONVOLVED),
        ("deberta-v2", {"conv_kernel_size": 5, "relative_attention": False, "pos_att_type": None}),
        (
            "deberta-v2",
            {"relative_attention": False, "pos_att_type": None, "norm_rel_ebd": "none"},
        ),
        ("deberta-v2", {"position_biased_input": True, "type_vocab_size": 2}),
        ("deberta-v2", {"embedding_size": 16, "max_relative_positions": 20}),
        ("electra", {"embedding_size": 32}),
        ("electra", {"embedding_size": 16}),
        ("modernbert", {"norm_bias": False, "local_attention": 13}),
        ("modernbert", {"attention_bias": True, "mlp_bias": True, "classifier_bias": True}),
        ("modernbert", {"hidden_activation": "silu", "classifier_activation": "relu"}),
        ("modernbert", {"hidden_activation": "gelu_pytorch_tanh", "norm_eps": 0.1}),
        ("modernbert", {"layer_types": ["sliding_attention"] * 4, "local_attention": 2}),
        ("modernbert", {"layer_types": ["full_attention"] * 4}),
        ("modernbert", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("modernbert", {"rope_parameters": ROPE}),
        ("ernie", {"use_task_id": True, "type_vocab_size": 3}),
        ("bert", {"hidden_act": "gelu_new"}),
        ("distilbert", {"activation": "relu"}),
        ("distilbert", {"sinusoidal_pos_embds": True}),
        ("roberta", {"type_vocab_size": 1, "pad_token_id": 2}),
    ],
    ids=str,
)
def test_settings_that_change_the_computation(family, changes):
    theirs = random_classifier(family, **changes)
    ids = torch.tensor([[5, 6, 7, 59], [8, 9, 1, 2]]).repeat(1, 8)
    got = tokenexit.convert(theirs)(ids).logits
    torch.testing.assert_close(got, theirs(ids, torch.ones_like(ids)).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(name for name in ACT2FN if "gelu" in name))
def test_gelus_by_their_names(name):
    """All but those that are another function are one of the two that ops have."""
    activation, theirs = activation_of(name), ACT2FN[name]
    x = torch.linspace(-20, 20, 1001, dtype=torch.float64)
    torch.testing.assert_close(activation(x), theirs(x), atol=1e-7, rtol=1e-7)
    same = [torch.allclose(F.gelu(x, approximate=kind), theirs(x)) for kind in ("none", "tanh")]
    assert (activation in GELUS) == any(same)


@pytest.mark.parametrize("family", ["mpnet", "roberta", "xlm-roberta", "camembert"])
@torch.no_grad()
def test_positions_skip_the_padding_id_inside_a_sentence(family):
    theirs = random_classifier(family)
    ids = torch.tensor([[5, 1, 6, 7, 1, 8]])
    torch.testing.assert_close(
        tokenexit.convert(theirs)(ids).logits, theirs(ids, torch.ones_like(ids)).logits
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_real_size_parity(family):
    """The true shape of MiniLM and MPNet layers, two of them."""
    theirs = random_classifier(
        family, layers=2, labels=9, hidden=384, heads=12, initializer_range=0.05
    )
    ours = tokenexit.convert(theirs)
    batch = random_batch([64, 30])
    with torch.no_grad():
        expected = theirs(batch["input_ids"], batch["attention_mask"]).logits
        got = ours(**batch).logits
    mask = batch["attention_mask"] != 0
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-4, rtol=0)


def test_heads_and_the_original_are_their_own():
    theirs = random_classifier(labels=7)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = tokenexit.convert(theirs)
    assert len(ours.exit_heads) == 4
    for head in ours.exit_heads:
        assert isinstance(head, torch.nn.Linear)
        assert (head.in_features, head.out_features) == (32, 7)
    assert torch.equal(ours.exit_heads[-1].weight, theirs.classifier.weight)
    assert ours.policy == ExitPolicy.never()
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())


def test_keeps_labels_dtype_and_mode():
    theirs = random_classifier(id2label={0: "O", 1: "B"}, label2id={"O": 0, "B": 1}, labels=2)
    ours = tokenexit.convert(theirs.to(torch.bfloat16).train())
    assert ours.config.id2label == {0: "O", 1: "B"}
    assert ours.dtype == torch.bfloat16 and ours.training


def test_words_from_the_vocabulary(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    theirs = random_classifier(vocab_size=len(tokenizer) + 3, seed=1)
    ours = tokenexit.convert(theirs, tokenizer=tokenizer).double()
    with torch.no_grad():
        for head in ours.exit_heads:
            head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    sentences = ["the smithsons lives in xyz", "red @ paris", "?"]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    ids = [[-1 if w is None else w for w in batch.word_ids(row)] for row in range(len(sentences))]
    policy = ExitPolicy(threshold=0.35, window=0)
    with torch.no_grad():
        implicit = ours(**batch, policy=policy)
        explicit = ours(**batch, policy=policy, word_ids=torch.tensor(ids))
        no_marks = tokenexit.convert(theirs).double()
        no_marks.load_state_dict({**ours.state_dict(), "token_kinds": no_marks.token_kinds})
        each = no_marks(**batch, policy=policy)
        counted = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        each_explicit = no_marks(**batch, policy=policy, word_ids=counted)
    assert torch.equal(implicit.exit_layers, explicit.exit_layers)
    assert torch.equal(each.exit_layers, each_explicit.exit_layers)
    assert not torch.equal(each.exit_layers, explicit.exit_layers)


def test_marks_of_sentencepiece_and_byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def kinds(model, pre_tokenizer, decoder):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>"
        )
        names = fast.get_vocab()
        values = token_kinds(fast, len(names) + 1)
        return {name: int(values[index]) for name, index in names.items()}

    unigram = models.Unigram([("<unk>", 0), ("<s>", 0), ("▁ab", -1), ("c", -2)], unk_id=0)
    assert kinds(unigram, pre_tokenizers.Metaspace(), decoders.Metaspace()) == {
        "<unk>": 1, "<s>": 2, "▁ab": 0, "c": 1,
    }  # fmt: skip
    bpe = models.BPE({"<unk>": 0, "<s>": 1, "Ġ": 2, "a": 3, "Ġa": 4}, [("Ġ", "a")])
    assert kinds(bpe, pre_tokenizers.ByteLevel(), decoders.ByteLevel()) == {
        "<unk>": 1, "<s>": 2, "Ġ": 0, "a": 1, "Ġa": 0,
    }  # fmt: skip


def test_refuses_other_architectures():
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, num_labels=2
    )
    gpt = transformers.GPT2ForTokenClassification(config)
    with pytest.raises(ValueError, match=r"'gpt2' model; supported architectures are \['albert'"):
        tokenexit.convert(gpt)
    with pytest.raises(TypeError, match="got a Linear; expected a Hugging Face"):
        tokenexit.convert(torch.nn.Linear(2, 2))


def test_marks_of_other_kinds(tiny_tokenizer):
    from tokenizers import Tokenizer, models, normalizers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    def kinds(vocab, merges, *parts, added=(), **options):
        core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", **options))
        for part in parts:
            name = "normalizer" if isinstance(part, normalizers.Normalizer) else "pre_tokenizer"
            setattr(core, name, part)
        core.enable_truncation(1)  # which must not matter
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
        tokenizer.add_tokens(list(added))
        values = token_kinds(tokenizer, len(tokenizer)).tolist()
        return {name: values[index] for name, index in tokenizer.get_vocab().items()}

    vocab = {"<unk>": 0, "Ġ": 1, "a": 2, "Ġa": 3, "ab": 4, "b": 5}
    merges = [("Ġ", "a"), ("a", "b")]
    for without in (True, False):
        level = pre.ByteLevel(add_prefix_space=without)
        sequence = pre.Sequence([pre.Digits(), pre.Sequence([level])])
        found = kinds(vocab, merges, sequence, added=["@user", "Ġx"])
        assert found == {
            "<unk>": 1, "Ġ": 0, "a": 1, "Ġa": 0, "ab": 1, "b": 1, "@user": 0, "Ġx": 0,
        }  # fmt: skip
    other = {name.replace("Ġ", "_"): index for name, index in vocab.items()}
    merges = [("_", "a"), ("a", "b")]
    expected = {"<unk>": 1, "_": 0, "a": 1, "_a": 0, "ab": 1, "b": 1}
    assert kinds(other, merges, pre.Metaspace(replacement="_")) == expected
    put = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    assert kinds(other, merges, put) == expected
    # Marks of ends say nothing of where a word starts; without marks each token is one.
    ends = {"<unk>": 0, "a": 1, "b": 2, "b</w>": 3, "a</w>": 4}
    level = pre.Sequence([pre.Whitespace(), pre.ByteLevel(add_prefix_space=False)])
    assert not any(kinds(ends, [], level, end_of_word_suffix="</w>").values())
    assert not any(kinds({"<unk>": 0, "a": 1, "b": 2}, [], pre.Whitespace()).values())


def test_labels_of_foreign_configurations(caplog):
    def maps(**labels):
        model = tokenexit.convert(random_classifier(labels=None, **labels))
        assert model.num_labels == len(model.config.id2label)
        assert not caplog.text
        return model.config.id2label, model.config.label2id

    names = {0: "O", 1: "B", 2: "I"}
    expected = (names, {"O": 0, "B": 1, "I": 2})
    assert maps(id2label=names) == expected
    assert maps(id2label={str(key): value for key, value in names.items()}) == expected
    assert maps(id2label=names, label2id={"O": "0", "B": "1", "I": "2"}) == expected
    assert maps(id2label={2: "I", 0: "O", 1: "B"}) == expected
    assert list(maps(id2label={2: "I", 0: "O", 1: "B"})[1]) == ["O", "B", "I"]
    default = ({0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1})
    assert maps(num_labels=2) == default
    assert maps(id2label={0: 0, 1: 1}) == ({0: "0", 1: "1"}, {"0": 0, "1": 1})
    # As many have it whose labels were renamed.
    assert maps(id2label=names, label2id={"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}) == expected
    with pytest.raises(AssertionError):
        maps(id2label=names, label2id={"O": 2, "B": 1, "I": 0})
    assert "label2id is {'O': 2" in caplog.text


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"id2label": {0: "O", 2: "B", 3: "I"}}, r"3 labels but none for \[1\]; expected one for"),
        ({"id2label": {1: "O", 2: "B"}}, r"none for \[0\]; expected one for each of 0 to 1"),
        ({"id2label": {0: "O", 1: "B", 2: "O"}}, "'O' for both 0 and 2; expected different"),
        ({"id2label": {0: "O", 1: None}}, r"\['O', None\]; expected names"),
        ({"id2label": {0: "O", 1: "B"}, "label2id": {"O": "x", "B": 1}}, "got 'x' as the number"),
        ({"num_labels": 1}, "num_labels is 1; expected 2 or more"),
    ],
)
def test_refuses_labels_that_are_none(labels, message):
    with pytest.raises(ValueError, match=message):
        tokenexit.convert(random_classifier(labels=None, **labels))


def test_a_default_device_and_dtype_of_the_user_do_not_matter(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    theirs = random_classifier(vocab_size=len(tokenizer))
    expected = tokenexit.convert(theirs, tokenizer)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = tokenexit.convert(theirs, tokenizer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    ours, state = expected.state_dict(), got.state_dict()
    new = {f"encoder.heads.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    for name in ours.keys() - new:
        assert torch.equal(state[name], ours[name]), name
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_what_only_a_full_computation_has_is_not_kept(family, caplog):
    theirs = random_classifier(family, output_hidden_states=True)
    model = tokenexit.convert(theirs)
    assert not model.config.output_hidden_states
    assert "output_hidden_states is not kept" in caplog.text


def test_another_part_that_does_not_fit_makes_no_classifier_new(tmp_path):
    """One for another task is refused even where something else is to be made anew."""
    config = random_classifier().config
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    load = tokenexit.TokenExitForTokenClassification.from_pretrained
    with pytest.raises(ValueError, match="is of a BertForSequenceClassification; expected an enc"):
        load(tmp_path, type_vocab_size=3, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    "task", ["SequenceClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM"]
)
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_refuses_other_tasks(family, task, tmp_path):
    config = random_classifier(family).config
    name = f"{'Bert' if family == 'bert' else 'MPNet'}For{task}"
    model = getattr(transformers, name)(config)
    with pytest.raises(ValueError, match=f"got a {name} without .*; expected a token classifier"):
        tokenexit.convert(model)
    model.save_pretrained(tmp_path)
    load = tokenexit.TokenExitForTokenClassification.from_pretrained
    if hasattr(model, "classifier") and family == "bert" and task != "MultipleChoice":
        with pytest.raises(ValueError, match=f"is of a {name}; expected an encoder or a BertForT"):
            load(tmp_path)
    elif task == "MaskedLM":
        assert load(tmp_path).num_labels == 5


def test_refuses_what_it_would_drop(tmp_path):
    class Crf(transformers.BertForTokenClassification):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Attention(transformers.models.bert.modeling_bert.BertSelfAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    theirs = random_classifier()
    with pytest.raises(ValueError, match="got a Crf whose own forward is none .*CRF"):
        tokenexit.convert(Crf(theirs.config))
    attention = theirs.bert.encoder.layer[1].attention
    attention.self.__class__ = Attention
    with pytest.raises(ValueError, match=r"whose bert.encoder.layer.1.attention.self forward is"):
        tokenexit.convert(theirs)
    theirs = random_classifier()
    theirs.classifier.forward = theirs.dropout.forward
    with pytest.raises(ValueError, match="whose classifier forward is none"):
        tokenexit.convert(theirs)
    theirs = random_classifier()
    theirs.transitions = torch.nn.Linear(5, 5)
    with pytest.raises(
        ValueError, match=r"2 weights that no BertForTokenClassification has, \['tr"
    ):
        tokenexit.convert(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 weights that no BertForTokenClassification has"):
        tokenexit.TokenExitForTokenClassification.from_pretrained(tmp_path)
    theirs = random_classifier()
    theirs.classifier = torch.nn.Linear(32, 5, bias=False)
    with pytest.raises(ValueError, match="without classifier.bias, which a BertForTokenClassific"):
        tokenexit.convert(theirs)
    theirs.classifier = torch.nn.Linear(32, 7)
    with pytest.raises(
        ValueError, match=r"classifier.weight of shape \(7, 32\); .* have \(5, 32\)"
    ):
        tokenexit.convert(theirs)
    theirs = random_classifier()
    theirs.bert.encoder.layer[0].attention.self.value = torch.nn.Linear(32, 16)
    with pytest.raises(ValueError, match=r"of shape .*; by the configuration it would have"):
        tokenexit.convert(theirs)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@torch.no_grad()
def test_back_to_hugging_face(family, tmp_path):
    """What `convert` took comes back: settings, labels, weights, dtype and mode."""
    names = {0: "O", 1: "B", 2: "I"}
    label2id = {name: i for i, name in names.items()}
    theirs = random_classifier(family, labels=None, id2label=names, label2id=label2id)
    ours = tokenexit.convert(theirs)
    ours.policy = ExitPolicy(threshold=0.5)
    back = tokenexit.to_hugging_face(ours)
    assert type(back) is type(theirs) and not back.training and back.dtype == torch.float32
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    batch = random_batch([9, 5])
    batch.pop("word_ids")
    assert torch.equal(back(**batch).logits, theirs(**batch).logits)
    assert back.config.id2label == names
    # No setting that only ours has; of classifiers, not all families say so.
    assert {*back.config.to_dict()} - {*theirs.config.to_dict()} <= {"classifier_dropout"}
    back.save_pretrained(tmp_path)
    again = tokenexit.TokenExitForTokenClassification.from_pretrained(tmp_path)
    fields, wanted = again.config.to_diff_dict(), tokenexit.convert(theirs).config.to_diff_dict()
    others = {"dtype": None, "made_from": None}
    assert fields | others == wanted | others
    half = tokenexit.to_hugging_face(ours.to(torch.bfloat16).train())
    assert half.training and half.dtype == torch.bfloat16


@torch.no_grad()
def test_back_to_hugging_face_with_other_settings():
    """ERNIE's task, which is in its token types by now; narrow embeddings; shared layers."""
    plain = {"norm_rel_ebd": "none", "position_biased_input": True}
    for family, changes in (
        ("ernie", {"use_task_id": True}),
        ("electra", {"embedding_size": 16, "hidden_act": "gelu_new"}),
        ("distilbert", {"activation": "relu", "sinusoidal_pos_embds": True}),
        ("roberta", {"pad_token_id": 2, "type_vocab_size": 1}),
        ("roberta", {"bos_token_id": 5, "eos_token_id": None}),
        ("albert", {"num_hidden_groups": 2, "inner_group_num": 2, "embedding_size": 32}),
        ("albert", {"num_hidden_groups": 2, "classifier_dropout_prob": 0.3}),
        ("deberta-v2", {"share_att_key": False, "embedding_size": 16, "position_buckets": -1}),
        ("deberta-v2", {"relative_attention": False, "pos_att_type": ["c2p"], **plain}),
        ("deberta-v2", CONVOLVED),
        ("modernbert", {"rope_parameters": ROPE, "norm_bias": False, "local_attention": 13}),
        ("modernbert", {"attention_bias": True, "mlp_bias": True, "classifier_bias": True}),
        ("modernbert", {"layer_types": ["full_attention"] * 4, "classifier_activation": "relu"}),
        ("modernbert", {"layer_types": ["sliding_attention"] * 4, "hidden_activation": "silu"}),
    ):
        theirs = random_classifier(family, **changes)
        ids = torch.tensor([[5, 6, 7, 59], [8, 9, 1, 0]])
        back = tokenexit.to_hugging_face(tokenexit.convert(theirs))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            assert getattr(back.config, name) == getattr(theirs.config, name)
        got, expected = (model(ids, torch.ones_like(ids)) for model in (back, theirs))
        torch.testing.assert_close(got.logits, expected.logits)


def test_back_to_hugging_face_from_what_is_none():
    with pytest.raises(TypeError, match="got a Linear; expected a TokenExitForTokenClassific"):
        tokenexit.to_hugging_face(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got an 8-bit model; expected the fp32 one"):
        tokenexit.to_hugging_face(tokenexit.quantize(tokenexit.convert(random_classifier())))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_back_to_hugging_face_with_parts_that_are_not_plain(name):
    """Their weights have other names, and would be left as the new model was initialised."""
    ours = tokenexit.convert(random_classifier())
    prune.l1_unstructured(ours.encoder.layers[1].up, name, 0.3)
    with pytest.raises(ValueError, match=rf"without encoder.layers.1.up.{name}, .* was pruned"):
        tokenexit.to_hugging_face(ours)
    prune.remove(ours.encoder.layers[1].up, name)
    back = tokenexit.to_hugging_face(ours)
    pruned = back.bert.encoder.layer[1].intermediate.dense
    assert torch.equal(getattr(pruned, name), getattr(ours.encoder.layers[1].up, name))


def test_takes_a_subclass_that_changes_nothing():
    class Mine(transformers.BertForTokenClassification):
        def greet(self):
            return "hello"

    assert tokenexit.convert(Mine(random_classifier().config)).num_labels == 5


def test_refuses_decoders():
    with pytest.raises(ValueError, match="got a decoder"):
        tokenexit.convert(random_classifier(is_decoder=True))


def test_refuses_other_heads_and_itself():
    config = random_classifier().config
    with pytest.raises(ValueError, match="BertModel without .*; expected a token classifier"):
        tokenexit.convert(transformers.BertModel(config))
    with pytest.raises(ValueError, match="already"):
        tokenexit.convert(tokenexit.convert(random_classifier()))


def test_refuses_slow_tokenizers_and_foreign_vocabularies(tiny_tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow, which is not a fast tokenizer"):
        tokenexit.convert(random_classifier(), tokenizer=Slow())
    with pytest.raises(ValueError, match="the model's vocabulary is 20"):
        tokenexit.convert(random_classifier(vocab_size=20), tokenizer=tiny_tokenizer())
