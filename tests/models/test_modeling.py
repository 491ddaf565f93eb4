"""The model: loss, saving and loading, the pipeline, bad input."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from random_models import ALL_FAMILIES, random_batch, random_classifier, random_tagger

import tokenexit
from tokenexit import ExitPolicy, TokenExitForTokenClassification
from tokenexit.packing import STARTS_WORD

POLICY = ExitPolicy(threshold=[0.1, 0.3, 0.3, 0.0], window=0, copy="pre_norm")


def with_labels(lengths=(5, 9, 3), seed=0):
    batch = random_batch(lengths, seed)
    labels = torch.randint(0, 5, batch["input_ids"].shape, generator=torch.Generator())
    return {**batch, "labels": labels.masked_fill(batch["word_ids"] < 0, -100)}


def without_dropout(tagger):
    for module in tagger.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    for head in tagger.exit_heads:
        head.dropout = 0.0
    return tagger


def test_loss_in_evaluation_is_hugging_faces():
    theirs = random_classifier()
    batch = with_labels()
    tagger, count = tokenexit.convert(theirs), int((batch["labels"] != -100).sum())
    ours = tagger(**batch).loss
    torch.testing.assert_close(tagger(**batch, num_items_in_batch=2 * count).loss, ours / 2)
    batch.pop("word_ids")
    torch.testing.assert_close(ours, theirs(**batch).loss, atol=1e-4, rtol=0)


def test_training_loss_is_the_joint_loss():
    tagger = without_dropout(random_tagger()).train()
    batch = with_labels()
    output = tagger(**batch, output_layer_logits=True)
    losses = [
        F.cross_entropy(logits.flatten(0, 1).nan_to_num(), batch["labels"].flatten())
        for logits in output.layer_logits
    ]
    expected = sum(number * loss for number, loss in enumerate(losses, 1)) / (1 + 2 + 3 + 4)
    torch.testing.assert_close(output.loss, expected)


def test_a_token_counts_up_to_its_exit_and_flooding_keeps_its_distance():
    tagger = without_dropout(random_tagger()).train()
    batch = with_labels([7, 13, 9, 20, 33], seed=5)
    floor = torch.rand(*batch["labels"].shape, 4, dtype=torch.float64)
    output = tagger(**batch, policy=POLICY, output_layer_logits=True)
    flooded = tagger(**batch, policy=POLICY, loss_floor=floor)
    total = flooded_total = 0.0
    counted = 0
    for row, i in (batch["labels"] != -100).nonzero().tolist():
        counted += 1
        for layer in range(int(output.exit_layers[row, i])):
            p = output.layer_logits[layer, row, i].log_softmax(-1)
            loss = -p[batch["labels"][row, i]]
            total = total + (layer + 1) * loss
            flooded_total = flooded_total + (layer + 1) * (loss - floor[row, i, layer]).abs()
    assert len(output.exit_layers.unique()) > 3
    torch.testing.assert_close(output.loss, total / 10 / counted)
    torch.testing.assert_close(flooded.loss, flooded_total / 10 / counted)
    halved = tagger(**batch, policy=POLICY, num_items_in_batch=2 * counted).loss
    torch.testing.assert_close(halved, output.loss / 2)
    for wrong in (1, 3):  # the first would fit by broadcasting
        with pytest.raises(ValueError, match="loss_floor has shape .*expected .* 4"):
            tagger(**batch, policy=POLICY, loss_floor=floor[..., :wrong])
    for other in (floor.flatten(0, 1), floor.transpose(0, 1), floor[:, :1].expand_as(floor)[1:]):
        with pytest.raises(ValueError, match="loss_floor has shape .*expected .* 4"):
            tagger(**batch, policy=POLICY, loss_floor=other)


def test_layer_logits_are_nan_where_nothing_was_computed():
    tagger = random_tagger()
    output = tagger(**random_batch([9, 4]), policy=POLICY, output_layer_logits=True)
    computed = ~output.layer_logits.isnan().any(-1)
    assert torch.equal(computed.sum(0), output.exit_layers)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_saved_and_loaded(family, tmp_path):
    tagger = random_tagger(family, dtype=torch.float32)
    tagger.policy = POLICY
    tagger.save_pretrained(tmp_path / "tagger")
    assert {f.name for f in (tmp_path / "tagger").iterdir()} == {"config.json", "model.safetensors"}
    assert [f.name for f in tmp_path.iterdir()] == ["tagger"]
    batch = random_batch([5, 9])
    for loader in (TokenExitForTokenClassification, transformers.AutoModelForTokenClassification):
        again = loader.from_pretrained(tmp_path / "tagger")
        assert isinstance(again, TokenExitForTokenClassification)
        assert again.policy == POLICY
        with torch.no_grad():
            got, expected = again(**batch), tagger(**batch)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.exit_layers, expected.exit_layers)


def test_from_pretrained_takes_hugging_face_models(tmp_path, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    theirs = random_classifier(vocab_size=len(tokenizer), labels=3)
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = TokenExitForTokenClassification.from_pretrained(tmp_path)
    ids = tokenizer(["john lives in paris"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(ours(**ids).logits, theirs(**ids).logits, atol=1e-4, rtol=0)
    assert ours.token_kinds.unique().tolist() == [0, 1, 2]
    theirs.bert.save_pretrained(tmp_path)  # an encoder without a classifier
    assert TokenExitForTokenClassification.from_pretrained(tmp_path, num_labels=6).num_labels == 6
    theirs.bert.config.num_labels = 1  # of a model for a score, in which a tagger is not interested
    theirs.bert.save_pretrained(tmp_path)
    assert TokenExitForTokenClassification.from_pretrained(tmp_path, num_labels=6).num_labels == 6


def test_policy_is_checked_and_saved_when_assigned():
    tagger = random_tagger()
    with pytest.raises(TypeError, match="policy is a float; expected an ExitPolicy"):
        tagger.policy = 0.3
    with pytest.raises(ValueError, match="2 values; expected one per layer, 4"):
        tagger.policy = ExitPolicy(threshold=[0.1, 0.2])
    assert tagger.policy == ExitPolicy.never()
    tagger.policy = POLICY
    assert tagger.config.exit_policy == POLICY.to_dict()
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of"):
        tagger.backend = "cuda"


def damage(folder, how):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "garbage":
        weights.write_bytes(b"\xff" * 5000)
    elif how == "missing weights":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        tensors.pop("encoder.heads.1.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "no weights":
        weights.unlink()
    elif how == "bad config":
        config.write_text(config.read_text()[:-20])
    else:
        values = json.loads(config.read_text())
        values.update(how)
        config.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "how, error, message",
    [
        ("truncated", ValueError, "is damaged"),
        ("garbage", ValueError, "is damaged"),
        ("missing weights", ValueError, r"lacks 1 weights: \['encoder.heads.1.weight'\]"),
        ("no weights", OSError, "model.safetensors"),
        ("bad config", OSError, "config.json"),
        ({"num_hidden_layers": 3}, ValueError, "unknown weights"),
        ({"hidden_size": 64}, ValueError, "expects"),
        (
            {"num_attention_heads": 0},
            ValueError,
            "num_attention_heads is 0; expected an int of 1 or more",
        ),
        ({"num_hidden_layers": 100_000}, ValueError, "100000 layers .* expected at most 1000"),
        (
            {"hidden_size": 100_000},
            ValueError,
            "parameters, .*'hidden_size': 100000.*; expected at most",
        ),
        ({"intermediate_size": 100_000}, ValueError, "expects"),
        ({"vocab_size": 0}, ValueError, "vocab_size is 0; expected an int of 1 or more"),
        (
            {"max_position_embeddings": "many"},
            ValueError,
            "max_position_embeddings is 'many'; expected an int",
        ),
        (
            {"type_vocab_size": -1},
            ValueError,
            "type_vocab_size is -1; expected an int of 0 or more",
        ),
        (
            {"position_padding_id": 500},
            ValueError,
            "max_position_embeddings is 160; expected more than posit",
        ),
        (
            {"hidden_dropout_prob": 3},
            ValueError,
            "hidden_dropout_prob is 3; expected a number from 0 to 1",
        ),
        ({"hidden_act": ["gelu"]}, ValueError, "hidden_act is"),
        ({"id2label": {"0": "O", "2": "B", "4": "I"}}, ValueError, r"none for \[1\]"),
        ({"id2label": {"0": "O"}}, ValueError, "num_labels is 1; expected 2 or more"),
        ({"hidden_act": "nope"}, ValueError, "hidden_act is 'nope'"),
        ({"exit_policy": "never"}, TypeError, "expected a dict"),
        ({"model_type": "gpt2"}, ValueError, "'gpt2' model; supported architectures are"),
        ({"model_type": "of the future"}, ValueError, "of the future"),
        ({"exit_policy": {"patience": 3}}, ValueError, "unknown fields"),
        ({"exit_policy": {"threshold": 7}}, ValueError, "7"),
        ({"embedding_size": 10**9}, ValueError, r"parameters, .*; expected at most"),
        ({"embedding_size": "x"}, ValueError, "embedding_size is 'x'; expected an int of 1"),
        ({"id2label": ["O", "B"]}, ValueError, "configuration of .* does not fit: .*'items'"),
        ({"layer_norm_eps": None}, ValueError, "layer_norm_eps is None; expected a number of 0"),
        ({"conv_kernel_size": "x"}, ValueError, "conv_kernel_size is 'x'; expected an int of 0"),
        (
            {"relative_attention_buckets": -1},
            ValueError,
            "relative_attention_buckets is -1; expected an int of 0",
        ),
        ({"position_padding_id": 2.5}, ValueError, "position_padding_id is 2.5; expected an int"),
        ({"layer_of": 3}, ValueError, "layer_of is 3; expected a list, or None"),
        ({"pos_att_type": 1}, ValueError, "pos_att_type is 1; expected a list, or None"),
    ],
    ids=str,
)
def test_refuses_damaged_and_foreign_checkpoints(tmp_path, how, error, message):
    random_tagger(dtype=torch.float32).save_pretrained(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(error, match=message):
        TokenExitForTokenClassification.from_pretrained(tmp_path)


def test_refuses_incomplete_hugging_face_checkpoints(tmp_path):
    from safetensors.torch import load_file, save_file

    random_classifier().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    part = {name: value for name, value in weights.items() if "layer.1." not in name}
    save_file(part, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 16 weights: \['bert.encoder.layer.1.attent"):
        TokenExitForTokenClassification.from_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier.\w+ of shape .*expects"):
        TokenExitForTokenClassification.from_pretrained(tmp_path, num_labels=9)


def test_without_a_tokenizer_each_token_is_a_word(tmp_path, caplog):
    random_classifier().save_pretrained(tmp_path)
    tagger = TokenExitForTokenClassification.from_pretrained(tmp_path)
    assert not tagger.token_kinds.any()
    assert "no words are marked" in caplog.text


def test_stands_where_a_hugging_face_model_stood(tmp_path):
    """transformers' own Trainer, its usual compute_metrics, and a grown vocabulary."""
    from transformers import Trainer, TrainingArguments

    tagger = tokenexit.convert(random_classifier())
    rows = [{name: value[0] for name, value in with_labels([9], seed).items()} for seed in range(8)]
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to="none", max_steps=3, disable_tqdm=True
    )

    def accuracy(prediction):
        logits, labels = prediction
        known = labels != -100
        return {"accuracy": float((logits.argmax(-1) == labels)[known].mean())}

    trainer = Trainer(
        tagger, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy
    )
    before = tagger.exit_heads[0].weight.clone()
    trainer.train()
    assert not torch.equal(tagger.exit_heads[0].weight, before)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1

    tagger.resize_token_embeddings(70)
    assert tagger(torch.tensor([[65, 69]])).logits.isfinite().all()
    assert len(tagger.token_kinds) == 70 and set(tagger.token_kinds[60:].tolist()) == {STARTS_WORD}
    tagger.save_pretrained(tmp_path / "grown")
    again = TokenExitForTokenClassification.from_pretrained(tmp_path / "grown")
    assert len(again.token_kinds) == 70


def test_heads_may_be_replaced():
    tagger = random_tagger()
    tagger.exit_heads = [torch.nn.Linear(32, 5).double() for _ in range(4)]
    assert tagger.encoder.heads is tagger.exit_heads
    assert not any(name.startswith("exit_heads") for name in tagger.state_dict())
    with pytest.raises(ValueError, match="got exit heads of shapes"):
        tagger.exit_heads = [torch.nn.Linear(32, 5)] * 3


def test_a_save_that_is_pushed_has_its_folders_name(tmp_path, monkeypatch):
    """Not that of the folder aside that it is written to."""
    asked, tagger = [], random_tagger()
    record = lambda self, folder, **more: asked.append(more["repo_id"])  # noqa: E731
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", record)
    tagger.save_pretrained(tmp_path / "mine", push_to_hub=True)
    tagger.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/other")
    assert asked == ["mine", "me/other"]


def test_saving_fails_whole(tmp_path, monkeypatch):
    tagger = random_tagger(dtype=torch.float32)
    tagger.save_pretrained(tmp_path / "tagger")
    before = {f.name: f.read_bytes() for f in (tmp_path / "tagger").iterdir()}

    def fail(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        tagger.save_pretrained(tmp_path / "tagger")
    assert {f.name: f.read_bytes() for f in (tmp_path / "tagger").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["tagger"]
    with pytest.raises(OSError, match="No space left"):
        tagger.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "link").symlink_to(tmp_path / "tagger")
    monkeypatch.undo()
    tagger.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        tagger.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_pipeline(tiny_tokenizer, strategy, caplog):
    tokenizer = tiny_tokenizer()
    labels = {0: "O", 1: "B-PER", 2: "I-PER"}
    theirs = random_classifier(
        vocab_size=len(tokenizer),
        labels=3,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
    )
    ours = tokenexit.convert(theirs, tokenizer=tokenizer)
    texts = ["john smithson lives in new york .", "paris", "xyz red smiths"]
    results = []
    for model in (ours, theirs):
        pipe = transformers.pipeline(
            "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=strategy
        )
        results.append(pipe(texts, batch_size=2))
    assert "not supported" not in caplog.text
    for text, got, expected in zip(texts, *results, strict=True):
        assert len(got) == len(expected)
        for mine, its in zip(got, expected, strict=True):
            assert mine["score"] == pytest.approx(its["score"], abs=1e-4)
            assert {k: v for k, v in mine.items() if k != "score"} == {
                k: v for k, v in its.items() if k != "score"
            }
            assert text[mine["start"] : mine["end"]].strip()


def test_tuple_output():
    tagger = random_tagger()
    batch = random_batch([5])
    logits, layers = tagger(**batch, return_dict=False)
    assert torch.equal(logits, tagger(**batch).logits) and layers.dtype == torch.int64


def test_models_of_one_configuration_have_policies_of_their_own():
    config = random_tagger().config
    one, other = (TokenExitForTokenClassification(config) for _ in range(2))
    before = other.policy
    one.policy = ExitPolicy(threshold=0.9)
    assert other.policy == before != one.policy


def test_return_dict_of_the_configuration():
    tagger = random_tagger()
    batch = random_batch([5])
    expected = tagger(**batch).logits
    tagger.config.return_dict = False
    assert type(got := tagger(**batch)) is tuple and torch.equal(got[0], expected)
    assert torch.equal(tagger(**batch, return_dict=True).logits, expected)


def test_integers_of_any_width():
    tagger = random_tagger()
    batch = random_batch([5, 9])
    expected = tagger(**batch, policy=POLICY)
    for dtype in (torch.int32, torch.int16, torch.int8):
        got = tagger(**{name: v.to(dtype) for name, v in batch.items()}, policy=POLICY)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.exit_layers, expected.exit_layers)
    ids = batch["input_ids"].to(torch.uint8)
    assert torch.equal(tagger(**{**batch, "input_ids": ids}, policy=POLICY).logits, expected.logits)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
@torch.no_grad()
def test_embeddings_in_place_of_ids(family, backend):
    theirs = random_classifier(family)
    tagger = tokenexit.convert(theirs)
    tagger.backend = backend
    batch = random_batch([9, 5])
    ids, words = batch.pop("input_ids"), batch.pop("word_ids")
    batch["inputs_embeds"] = embeds = tagger.get_input_embeddings()(ids)
    mask = batch["attention_mask"] != 0
    torch.testing.assert_close(
        tagger(**batch).logits[mask], theirs(**batch).logits[mask], atol=1e-4, rtol=0
    )
    policy = ExitPolicy(threshold=0.9, window=0)
    by_ids = tagger(ids, batch["attention_mask"], word_ids=words, policy=policy)
    got = tagger(**batch, word_ids=words, policy=policy)
    assert torch.equal(got.logits, by_ids.logits)
    assert torch.equal(got.exit_layers, by_ids.exit_layers)
    double = tagger(**{**batch, "inputs_embeds": embeds.double()}, word_ids=words, policy=policy)
    assert torch.equal(double.logits, by_ids.logits) and double.logits.dtype == tagger.dtype
    each = tagger(**batch, policy=policy)
    tagger.token_kinds.fill_(2)  # which says nothing of embeddings
    assert torch.equal(tagger(**batch, policy=policy).exit_layers, each.exit_layers)
    for wrong, error in ((embeds[..., :8], ValueError), (ids, TypeError), ([[1.0]], TypeError)):
        with pytest.raises(error, match="inputs_embeds .* expected"):
            tagger(inputs_embeds=wrong)


def test_gradients_reach_embeddings():
    tagger = random_tagger().train()
    batch = with_labels()
    embeds = tagger.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    tagger(**batch, inputs_embeds=embeds).loss.backward()
    real = batch["attention_mask"] != 0
    assert embeds.grad[real].any(-1).all() and not embeds.grad[~real].any()


class Kept(torch.nn.Module):
    """Wraps a module as PEFT's `modules_to_save` does: calls and attributes go to a copy."""

    def __init__(self, module):
        super().__init__()
        self.copy = module

    def forward(self, *args):
        return self.copy(*args)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("copy"), name)


@torch.no_grad()
def test_called_and_changed_as_peft_does():
    """Its arguments, and heads that are wrapped: the plain path, the same results."""
    tagger = random_tagger(dtype=torch.float32)
    batch = random_batch([5, 9, 3])
    expected = tagger(**batch, policy=POLICY)
    for number in range(4):
        tagger.encoder.heads[number] = Kept(tagger.encoder.heads[number])
    nothing = ("inputs_embeds", "output_attentions", "output_hidden_states", "labels")
    got = tagger(**batch, **dict.fromkeys(nothing), policy=POLICY, return_dict=True)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=0)
    assert torch.equal(got.exit_layers, expected.exit_layers)


@pytest.mark.parametrize("task", [None, "TOKEN_CLS"])
def test_peft(task, tmp_path):
    """The adapter of its task type for taggers, trained, saved and merged, with the exit heads."""
    peft = pytest.importorskip("peft")
    heads = [f"heads.{number}" for number in range(4)]
    options = {"target_modules": ["query", "key_value", "up"], "modules_to_save": heads}
    model = peft.get_peft_model(
        random_tagger(dtype=torch.float32), peft.LoraConfig(task_type=task, **options)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    batch = with_labels()
    model.train()(**batch).loss.backward()
    optimizer.step()
    model.eval()
    before = random_tagger(dtype=torch.float32)
    for head, its_head in zip(model.exit_heads, before.exit_heads, strict=True):
        assert not torch.equal(head.weight, its_head.weight)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(before, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected, got = (m(**batch, policy=POLICY) for m in (model, again))
        assert torch.equal(got.logits, expected.logits)
        merged = again.merge_and_unload()
        assert isinstance(merged, TokenExitForTokenClassification)
        got = merged(**batch, policy=POLICY)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-3, rtol=0)
    assert torch.equal(got.exit_layers, expected.exit_layers)


def bad(change):
    """A good batch with one thing wrong."""
    batch = with_labels()
    batch["position_ids"] = torch.arange(9).repeat(3, 1)
    change(batch)
    return batch


def put(name, value):
    return lambda batch: batch.__setitem__(name, value)


def poke(name, value):
    return lambda batch: batch[name].__setitem__((0, 1), value)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            put("input_ids", torch.zeros(0, 9, dtype=torch.int64)),
            ValueError,
            r"shape \(0, 9\); expected",
        ),
        (
            put("input_ids", torch.zeros(3, 0, dtype=torch.int64)),
            ValueError,
            r"shape \(3, 0\); expected",
        ),
        (
            put("input_ids", torch.zeros(9, dtype=torch.int64)),
            ValueError,
            r"shape \(9,\); expected \[B, N\]",
        ),
        (put("attention_mask", torch.zeros(3, 9)), ValueError, "0 everywhere"),
        (put("attention_mask", torch.ones(3, 8)), ValueError, r"attention_mask has shape \(3, 8\)"),
        (put("word_ids", torch.ones(1, 9).long()), ValueError, r"word_ids has shape \(1, 9\)"),
        (poke("input_ids", 60), ValueError, "input_ids has 60; expected values from 0 to 59"),
        (poke("input_ids", -3), ValueError, "input_ids has -3"),
        (poke("labels", 5), ValueError, "labels has 5; expected values from 0 to 4"),
        (lambda batch: batch["labels"].__setitem__((2, 8), 1), ValueError, "a label at padding"),
        (put("policy", 0.3), TypeError, "expected an ExitPolicy"),
        (put("policy", [ExitPolicy()]), ValueError, "got 1 policies for 3 sentences"),
        (put("exit_layers", torch.zeros(3, 9, dtype=torch.int64)), ValueError, "exit_layers has 0"),
        (
            put("input_ids", torch.zeros(3, 9)),
            TypeError,
            "input_ids is of torch.float32; expected integers",
        ),
        (put("word_ids", [[0] * 9] * 3), TypeError, "word_ids is a list; expected a tensor"),
        (
            put("token_type_ids", torch.full((3, 9), 2)),
            ValueError,
            "token_type_ids has 2; expected .* 0 to 1",
        ),
        (put("position_ids", torch.full((3, 9), 160)), ValueError, "position_ids has 160"),
        (poke("word_ids", -2), ValueError, "word_ids has -2; expected values from -1"),
        (poke("position_ids", -1), ValueError, "position_ids has -1; expected values from 0"),
        (poke("labels", -1), ValueError, "labels has -1; expected values from 0 to 4"),
        (put("input_ids", torch.ones(3, 9, dtype=torch.bool)), TypeError, "is of torch.bool"),
        (put("input_ids", None), ValueError, "neither input_ids nor inputs_embeds"),
        (put("inputs_embeds", torch.zeros(3, 9, 32)), ValueError, "both input_ids and inputs_e"),
        (put("output_attentions", True), ValueError, "output_attentions is True; expected None"),
        (put("head_mask", torch.ones(4)), ValueError, "head_mask is a Tensor; expected None or F"),
        (put("polcy", None), TypeError, "unexpected keyword argument 'polcy'"),
    ],
)
def test_refuses_bad_batches(change, error, message):
    with pytest.raises(error, match=message):
        random_tagger()(**bad(change))


def test_refuses_sentences_beyond_its_positions():
    ids = torch.ones(2, 200, dtype=torch.int64)
    with pytest.raises(ValueError, match="200 tokens; expected at most 160.*windows"):
        random_tagger()(ids)
    with pytest.raises(ValueError, match="200 tokens; expected at most 158"):
        random_tagger("mpnet")(ids)


def test_a_row_of_padding_has_no_result_and_does_no_harm():
    tagger = random_tagger()
    batch = random_batch([5, 9])
    alone = tagger(**batch, policy=POLICY)
    padded = {name: F.pad(v, (0, 0, 1, 1)) for name, v in batch.items()}
    result = tagger(**padded, policy=POLICY)
    assert torch.equal(result.exit_layers[1:3], alone.exit_layers)
    assert not result.exit_layers[[0, 3]].any() and not result.logits[[0, 3]].any()


def test_sentences_of_special_tokens_only():
    tagger = random_tagger()
    ids = torch.tensor([[5, 6], [7, 8]])
    words = torch.tensor([[-1, -1], [-1, 0]])
    for policy in (ExitPolicy.never(), ExitPolicy(threshold=1.0), ExitPolicy.sentence(0.5)):
        result = tagger(ids, word_ids=words, policy=policy)
        assert (result.exit_layers > 0).all() and result.logits.isfinite().all()
    assert (tagger(ids, word_ids=words, policy=ExitPolicy.never()).exit_layers == 4).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nan_is_reported_with_its_cause(backend):
    tagger = random_tagger()
    tagger.backend = backend
    tagger.encoder.layers[1].up.weight.data[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"NaN logits.*NaN in the weights \['encoder.layers.1.up.weig"
    ):
        tagger(**random_batch([5, 9]))
    tagger = random_tagger()
    tagger.backend = backend
    tagger.exit_heads[0].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaN logits at layer 1"):
        tagger(**random_batch([5, 9]), policy=ExitPolicy(threshold=0.99))
    tagger = random_tagger(dtype=torch.float16)
    tagger.backend = backend
    tagger.encoder.layers[1].up.weight.data.fill_(60000)
    with pytest.raises(ValueError, match="no weight is NaN"):
        tagger(**random_batch([5, 9]))


def test_reference_has_no_dropout():
    tagger = random_tagger().train()
    tagger.backend = "reference"
    with pytest.raises(ValueError, match="'reference', whose loop needs no dropout in layers"):
        tagger(**random_batch([5]))


@pytest.mark.parametrize("policy", [ExitPolicy.never(), POLICY, POLICY.replace(copy="post_norm")])
def test_hidden_states(policy):
    """Those of all layers; each head, on its own layer's, gives what tokens were computed to."""
    tagger, batch = random_tagger(), random_batch([9, 5, 14])
    real = batch["attention_mask"] != 0
    out = tagger(**batch, policy=policy, output_hidden_states=True, output_layer_logits=True)
    plain = tagger(**batch, policy=policy)
    assert torch.equal(out.logits, plain.logits) and plain.hidden_states is None
    assert len(out.hidden_states) == 5
    for number, (h, head) in enumerate(zip(out.hidden_states[1:], tagger.exit_heads, strict=True)):
        computed = real & (out.exit_layers > number)
        torch.testing.assert_close(head(h[computed]), out.layer_logits[number][computed])
        assert not h[~real].any()
        if policy.copy == "post_norm":
            gone = out.exit_layers <= number
            assert torch.equal(h[gone], out.hidden_states[number][gone])
    with torch.no_grad():
        again = tagger(**batch, policy=policy, output_hidden_states=True)
    for one, other in zip(out.hidden_states, again.hidden_states, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_hidden_states_of_layers_that_no_token_reached():
    """They are those with which the last ones left."""
    tagger, batch = random_tagger(), random_batch([9, 5])
    exits = torch.full_like(batch["input_ids"], 2)
    states = tagger(**batch, exit_layers=exits, output_hidden_states=True).hidden_states
    assert len(states) == 5 and not torch.equal(states[1], states[2])
    assert torch.equal(states[3], states[2]) and torch.equal(states[4], states[2])


def test_hidden_states_are_hugging_faces_at_full_depth():
    theirs, batch = random_classifier(), random_batch([9, 9])
    words = batch.pop("word_ids")
    with torch.no_grad():
        expected = theirs(**batch, output_hidden_states=True).hidden_states
        got = tokenexit.convert(theirs)(**batch, word_ids=words, output_hidden_states=True)
    assert len(got.hidden_states) == len(expected)
    for one, other in zip(got.hidden_states, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", [ExitPolicy.never(), POLICY], ids=str)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_activation_checkpointing(family, policy, reentrant):
    """Layers are computed twice, with the same dropout, for the same gradients."""
    results = []
    for checkpointing in (False, True):
        tagger, calls = random_tagger(family).train(), []
        if checkpointing:
            tagger.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tagger.encoder.layers[0].register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        torch.manual_seed(0)
        loss = tagger(**with_labels(), policy=policy).loss
        loss.backward()
        assert len(calls) == 1 + checkpointing
        results.append([loss, *(p.grad for p in tagger.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_policy_at_loading(tmp_path):
    tagger = random_tagger(dtype=torch.float32)
    tagger.save_pretrained(tmp_path)
    load = TokenExitForTokenClassification.from_pretrained
    assert load(tmp_path, policy=POLICY).policy == POLICY
    assert load(tmp_path).policy == ExitPolicy.never()
    with pytest.raises(TypeError, match="policy is a float"):
        load(tmp_path, policy=0.3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"is_decoder": True}, r"got a decoder \(config.is_decoder\); expected an encoder"),
        ({"add_cross_attention": True}, r"got a decoder \(config.add_cross_attention\)"),
        ({"position_embedding_type": "relative_key"}, "is 'relative_key'; expected 'absolute'"),
        ({"hidden_act": "nope"}, "config.hidden_act is 'nope'; expected one of"),
        ({"vocab_size": 0}, "config.vocab_size is 0; expected an int of 1 or more"),
    ],
    ids=str,
)
def test_refuses_configurations_of_hugging_faces_that_do_not_fit(changes, message, tmp_path):
    random_classifier().save_pretrained(tmp_path)
    damage(tmp_path, changes)
    with pytest.raises(ValueError, match=message):
        TokenExitForTokenClassification.from_pretrained(tmp_path)


def test_the_activation_of_a_family_has_its_name(tmp_path):
    random_classifier("distilbert").save_pretrained(tmp_path)
    damage(tmp_path, {"activation": "nope"})
    with pytest.raises(ValueError, match="config.activation is 'nope'"):
        TokenExitForTokenClassification.from_pretrained(tmp_path)


def test_what_follows_the_mask_goes_by_name():
    """Hugging Face's families do not agree on what comes third."""
    batch = random_batch([4])
    with pytest.raises(TypeError, match="positional"):
        random_tagger()(batch["input_ids"], batch["attention_mask"], batch["word_ids"])


def fewer_layers(model):
    model.encoder.layers = model.encoder.layers[:2]


def fewer_heads(model):
    model.encoder.heads = model.encoder.heads[:2]


def one_layer_more(model):
    model.encoder.layers.append(model.encoder.layers[0])


@pytest.mark.parametrize("change", [fewer_layers, fewer_heads, one_layer_more])
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("training", [False, True])
def test_other_layers_than_configured_are_refused(change, backend, training, tmp_path):
    """By all loops: one that went on would answer with another classifier."""
    model = random_tagger(dtype=torch.float32).train(training)
    change(model)
    model.backend, expected = (
        backend,
        r"got \d layers and \d exit heads; expected 4 of each, by config",
    )
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=expected):
            model(**random_batch([5, 3]))
    with pytest.raises(ValueError, match=expected):
        model.save_pretrained(tmp_path / "tagger")
    assert not (tmp_path / "tagger").exists()


def test_fewer_layers_as_configured():
    model = random_tagger(dtype=torch.float32).eval()
    fewer_layers(model)
    fewer_heads(model)
    model.config.num_hidden_layers = 2
    assert model(**random_batch([5, 3])).exit_layers.max() == 2
