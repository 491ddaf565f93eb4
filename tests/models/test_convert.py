"""convert: parity with Hugging Face, words from the tokenizer, what it refuses."""

import pytest
import torch
import transformers
from random_models import ALL_FAMILIES, FAMILIES, random_batch, random_classifier

import tokenexit
from tokenexit import ExitPolicy
from tokenexit.models.convert import token_kinds
from tokenexit.models.families import FAMILIES as FAMILY_TABLE

LENGTHS = [5, 17, 1, 9, 2, 150]


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


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_gradients_of_the_last_head_equal_hugging_face(family):
    """Each of their parameters has the gradient that ours, under its name here, has."""
    theirs = random_classifier(family).train()
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
    expected = dict(theirs.named_parameters())
    for name, parts in FAMILY_TABLE[family].names(theirs.config).items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in got:
                wanted = torch.cat([expected[f"{part}.{kind}"].grad for part in parts])
                found = got[f"{name}.{kind}"].grad
                torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "family, changes",
    [
        ("electra", {"embedding_size": 32}),
        ("electra", {"embedding_size": 16}),
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
    ids = torch.tensor([[5, 6, 7, 59], [8, 9, 1, 2]])
    got = tokenexit.convert(theirs)(ids).logits
    torch.testing.assert_close(got, theirs(ids, torch.ones_like(ids)).logits, atol=1e-4, rtol=0)


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
    with pytest.raises(ValueError, match=r"'gpt2' model; supported architectures are \['bert', 'c"):
        tokenexit.convert(gpt)
    with pytest.raises(TypeError, match="got a Linear; expected a Hugging Face"):
        tokenexit.convert(torch.nn.Linear(2, 2))


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
