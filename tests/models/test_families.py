"""What is special in a family: shared layers, scores of distances, layers that normalise first."""

import copy
import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import transformers
from random_models import CONVOLVED, random_batch, random_classifier, random_tagger
from safetensors.torch import load_file, save_file

import tokenexit
from tokenexit import ExitPolicy, TokenExitForTokenClassification
from tokenexit.layers import ExitLayer, Relative

GROUPS = [
    {},
    {"num_hidden_groups": 2},
    {"num_hidden_groups": 2, "num_hidden_layers": 2, "inner_group_num": 2},
]
LAYER_OF = [[0, 0, 0, 0], [0, 0, 2, 2], [0, 1, 2, 3]]


def in_a_new_process(folder, batch):
    """Logits of the tagger saved there, and how many parameters it has."""
    torch.save(batch, folder / "batch.pt")
    code = f"""
import torch, tokenexit
model = tokenexit.TokenExitForTokenClassification.from_pretrained({str(folder)!r}).eval()
with torch.no_grad():
    out = model(**torch.load({str(folder / "batch.pt")!r}))
torch.save((out.logits, len(list(model.parameters()))), {str(folder / "out.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("changes, layer_of", [*zip(GROUPS, LAYER_OF, strict=True)], ids=str)
def test_shared_layers_are_one_in_memory_and_in_the_file(changes, layer_of, tmp_path):
    tagger = random_tagger("albert", dtype=torch.float32, **changes)
    different = len(set(layer_of))

    def check(model):
        layers = model.encoder.layers
        assert [next(i for i, x in enumerate(layers) if x is layer) for layer in layers] == layer_of
        per_layer = 14
        assert len(list(model.encoder.layers.parameters())) == per_layer * different

    check(tagger)
    check(copy.deepcopy(tagger))
    tagger.policy = ExitPolicy(threshold=0.5, window=0)
    tagger.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert len([name for name in stored if name.startswith("encoder.layers.")]) == 14 * different
    again = TokenExitForTokenClassification.from_pretrained(tmp_path)
    check(again)
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == stored.keys()
    batch = random_batch([5, 9])
    with torch.no_grad():
        expected = tagger(**batch).logits
    logits, parameters = in_a_new_process(tmp_path, batch)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert parameters == len(list(tagger.parameters()))


def test_a_step_of_training_moves_shared_layers_together():
    tagger = random_tagger("albert", dtype=torch.float32).train()
    batch = random_batch([9, 3])
    labels = batch["input_ids"] % 5
    labels = labels.masked_fill(batch["word_ids"] < 0, -100)
    optimizer = torch.optim.SGD(tagger.parameters(), 0.1)
    before = tagger.encoder.layers[0].up.weight.detach().clone()
    tagger(**batch, labels=labels).loss.backward()
    optimizer.step()
    moved = tagger.encoder.layers[0].up.weight
    assert not torch.equal(moved, before)
    assert all(layer.up.weight is moved for layer in tagger.encoder.layers)


@torch.no_grad()
def test_8_bit_layers_stay_shared(tmp_path):
    tagger = tokenexit.quantize(random_tagger("albert", dtype=torch.float32))
    expected = tagger(**random_batch([9, 3])).logits
    assert tagger.loop == "cpu" or not tokenexit.ops.extension_available()
    tagger.save_pretrained(tmp_path)
    again = TokenExitForTokenClassification.from_pretrained(tmp_path)
    for model in (tagger, again):
        assert len({id(layer.up) for layer in model.encoder.layers}) == 1
        assert len({layer.up.weight.data_ptr() for layer in model.encoder.layers}) == 1
    assert torch.equal(again(**random_batch([9, 3])).logits, expected)


@torch.no_grad()
def test_8_bit_layers_without_a_fast_loop(tmp_path):
    for family, settings in (
        ("deberta-v2", {"share_att_key": True}),
        ("deberta-v2", {"share_att_key": False, **CONVOLVED}),
        ("modernbert", {"mlp_bias": True}),
        ("bert", {"hidden_act": "relu"}),
    ):
        tagger = random_tagger(family, dtype=torch.float32, initializer_range=0.1, **settings)
        batch = random_batch([9, 3])
        expected = tagger(**batch).logits
        error = (tokenexit.quantize(tagger)(**batch).logits - expected).abs().mean()
        assert 0 < error < 0.05 * expected.abs().mean()
        tagger.save_pretrained(tmp_path)
        again = TokenExitForTokenClassification.from_pretrained(tmp_path)
        assert torch.equal(again(**batch).logits, tagger(**batch).logits)


@torch.no_grad()
def test_the_way_back_of_a_norm_that_is_not_read():
    unread = {"relative_attention": False, "norm_rel_ebd": "layer_norm"}
    theirs = random_classifier("deberta-v2", **unread)
    back, batch = tokenexit.to_hugging_face(tokenexit.convert(theirs)), random_batch([9, 3])
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"] != 0
    assert torch.equal(back(**given).logits[real], theirs(**given).logits[real])


@pytest.mark.parametrize("layer_of", [[0, 0, 0], [0, 2, 2, 2], [0, -1, 0, 0], ["0"] * 4], ids=str)
def test_refuses_an_order_that_cannot_be(layer_of):
    config = tokenexit.convert(random_classifier("albert")).config
    config.layer_of = layer_of
    with pytest.raises(ValueError, match=r"layer_of is .*; expected of each of 4 layers its own"):
        TokenExitForTokenClassification(config)


NEW = ["albert", "deberta-v2", "modernbert"]


@pytest.mark.parametrize("family", NEW)
@torch.no_grad()
def test_as_hugging_face_takes_types_positions_and_padding_on_the_left(family):
    more = CONVOLVED if family == "deberta-v2" else {}
    theirs = random_classifier(family, type_vocab_size=2, position_biased_input=True, **more)
    typed = ["token_type_ids"] * (family != "modernbert")
    ours = tokenexit.convert(theirs)
    batch = random_batch([9, 20, 3])
    ids, mask = (batch[name].flip(1) for name in ("input_ids", "attention_mask"))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    more = {**dict.fromkeys(typed, torch.arange(20).expand(3, -1) % 2), "position_ids": places}
    got = ours(ids, mask, **more).logits
    expected = theirs(ids, mask, **more).logits
    real = mask != 0
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)
    assert not got[~real].any()


@pytest.mark.parametrize("family", NEW)
@torch.no_grad()
def test_a_sentence_is_the_same_in_every_batch(family):
    tagger = random_tagger(family, **(CONVOLVED if family == "deberta-v2" else {}))
    lengths = [1 + 7 * i % 40 for i in range(64)]
    batch = random_batch(lengths)
    policy = ExitPolicy(threshold=0.35, window=1)
    whole = tagger(**batch, policy=policy)
    assert len(whole.exit_layers.unique()) == 5
    for rows in (slice(0, 1), slice(3, 20), slice(63, 64)):
        n = max(lengths[rows])
        part = tagger(**{k: v[rows, :n] for k, v in batch.items()}, policy=policy)
        assert torch.equal(part.exit_layers, whole.exit_layers[rows, :n])
        torch.testing.assert_close(part.logits, whole.logits[rows, :n])


@torch.no_grad()
def test_exits_of_shared_layers_equal_the_reference():
    for dtype, copied in ((torch.float32, "post_norm"), (torch.float64, "pre_norm")):
        tagger = random_tagger("albert", dtype=dtype, num_hidden_groups=2)
        batch, policy = random_batch([9, 20, 3]), ExitPolicy(threshold=0.4, window=0, copy=copied)
        got = tagger(**batch, policy=policy)
        tagger.backend = "reference"
        expected = tagger(**batch, policy=policy)
        assert torch.equal(got.exit_layers, expected.exit_layers)
        assert len(got.exit_layers.unique()) > 3
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_what_runs_them():
    assert random_tagger("albert", dtype=torch.float32).eval().loop == "cpu" or (
        not tokenexit.ops.extension_available()
    )
    tagger = random_tagger("deberta-v2", dtype=torch.float32).eval()
    assert tagger.loop.startswith("eager: ") and "disentangled attention" in tagger.loop
    tagger.backend = "cpu"
    with torch.no_grad():
        with pytest.raises(ValueError, match="needs .* without disentangled attention"):
            tagger(**random_batch([3]))
    tagger = random_tagger("modernbert", dtype=torch.float32).eval()
    assert (
        tagger.loop == "eager: a fast loop needs layers as BERT's, which normalise last, not first"
    )
    # Without relative positions it is a layer like BERT's.
    plain = {"relative_attention": False, "pos_att_type": None, "norm_rel_ebd": "none"}
    assert type(random_tagger("deberta-v2", **plain).encoder.layers[0]) is ExitLayer


@pytest.mark.parametrize("family", NEW)
def test_pipeline(family, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    theirs = random_classifier(family, vocab_size=len(tokenizer), labels=3, type_vocab_size=2)
    texts = ["john smithson lives in new york .", "paris"]
    results = [
        transformers.pipeline(
            "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first"
        )(texts, batch_size=2)
        for model in (tokenexit.convert(theirs, tokenizer=tokenizer), theirs)
    ]
    for got, expected in zip(*results, strict=True):
        assert [(x["entity_group"], x["word"]) for x in got] == [
            (x["entity_group"], x["word"]) for x in expected
        ]
        for mine, its in zip(got, expected, strict=True):
            assert mine["score"] == pytest.approx(its["score"], abs=1e-4)


@pytest.mark.parametrize(
    "family, change, message",
    [
        (
            "albert",
            {"num_hidden_groups": 9},
            "num_hidden_groups 9 .* for 4 layers; expected 1 or m",
        ),
        ("albert", {"hidden_act": "nope"}, "config.hidden_act is 'nope'; expected one of"),
        ("albert", {"num_attention_heads": 5}, "hidden_size is 32; expected a multiple of .* 5"),
        ("deberta-v2", {"conv_kernel_size": 4}, "conv_kernel_size is 4; expected 0 or an odd num"),
        ("deberta-v2", CONVOLVED | {"conv_groups": 5}, "conv_groups is 5; expected a divisor of"),
        ("deberta-v2", CONVOLVED | {"conv_act": "x"}, "config.conv_act is 'x'; expected one of"),
        ("deberta-v2", {"attention_head_size": 4}, "attention_head_size is 4; expected 8"),
        ("deberta-v2", {"position_buckets": 1}, "position_buckets is 1; expected none"),
        ("deberta-v2", {"pos_att_type": ["p2p"]}, r"pos_att_type has \['p2p'\]; expected 'c2p'"),
        ("modernbert", {"num_attention_heads": 32}, "heads are 1 wide, .*; expected an even width"),
        (
            "modernbert",
            {"layer_types": ["full_attention"]},
            "does not fit: .* .4. must be equal to .*layer_types",
        ),
        (
            "modernbert",
            {"layer_types": ["chunked_attention"] * 4},
            "configuration of .* does not fit",
        ),
        (
            "modernbert",
            {"classifier_activation": "x"},
            "classifier_activation is 'x'; expected one",
        ),
        (
            "modernbert",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},
                }
            },
            "full_attention of rope_type 'linear'; expected 'default'",
        ),
    ],
    ids=str,
)
def test_refuses_configurations_before_their_model_is_built(family, change, message, tmp_path):
    random_classifier(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        TokenExitForTokenClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", NEW)
def test_one_step_of_training_with_dropout(family):
    """Dropout of attention and of the states of distances included: every weight has a gradient."""
    name = "attention_dropout" if family == "modernbert" else "attention_probs_dropout_prob"
    more = CONVOLVED if family == "deberta-v2" else {}
    tagger = random_tagger(family, dtype=torch.float32, **{name: 0.3}, **more).train()
    batch = random_batch([9, 3])
    labels = (batch["input_ids"] % 5).masked_fill(batch["word_ids"] < 0, -100)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(tagger(**batch, labels=labels).loss)
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    without = [name for name, p in tagger.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@torch.no_grad()
def test_states_of_distances_are_dropped_in_training_alone():
    layer = random_tagger("deberta-v2", hidden_dropout_prob=0.5).encoder.layers[0]
    relative = Relative(torch.randn(9, 32).double(), torch.zeros(1, dtype=torch.int64))
    before, again, trained = (
        layer.train(mode).position_states(relative) for mode in (False, False, True)
    )
    for one, other, dropped in zip(before, again, trained, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, dropped)


@torch.no_grad()
def test_copies_of_layers_that_normalise_first_are_their_sums():
    """A token that left is never changed again, whatever `copy` says; its state is no norm's."""
    tagger, batch = random_tagger("modernbert"), random_batch([9, 20, 3])
    policy = ExitPolicy(threshold=0.4, window=0)
    one = tagger(**batch, policy=policy, output_hidden_states=True)
    other = tagger(**batch, policy=policy.replace(copy="pre_norm"), output_hidden_states=True)
    assert torch.equal(one.exit_layers, other.exit_layers) and len(one.exit_layers.unique()) >= 4
    assert torch.equal(one.logits, other.logits)
    for number, (before, after) in enumerate(pairwise(one.hidden_states)):
        gone = one.exit_layers <= number
        assert torch.equal(before[gone], after[gone])
        assert torch.equal(after, other.hidden_states[number + 1])
    last = one.hidden_states[-1]
    states = tagger.encoder.neck(last)
    for number, head in enumerate(tagger.exit_heads, 1):
        mine = one.exit_layers == number
        torch.testing.assert_close(head(states[mine]), one.logits[mine])


@torch.no_grad()
def test_local_layers_do_not_see_beyond_their_reach():
    """One local layer: another word changes what is near it, and nothing else."""
    kinds = {"layer_types": ["sliding_attention"], "local_attention": 6}
    tagger = random_tagger("modernbert", layers=1, **kinds)
    ids = random_batch([20])["input_ids"]
    other = ids.clone()
    other[0, 10] = 4 + (ids[0, 10] - 3) % 56
    changed = (tagger(ids).logits != tagger(other).logits).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [*range(7, 14)]
    part, other_part = ids[:, 6:11], other[:, 6:11]  # from end to end is one step too far
    changed = (tagger(part).logits != tagger(other_part).logits).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1, 2, 3, 4]
    half = tagger.to(torch.bfloat16)
    changed = (half(ids).logits != half(other).logits).any(-1)[0].nonzero().flatten()
    assert set(changed.tolist()) <= {*range(7, 14)} and 10 in changed


@pytest.mark.parametrize(
    "name", ["embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"]
)
def test_dropout_of_layers_that_normalise_first(name):
    """Each of Hugging Face's settings has a place, and no other has one."""
    tagger = random_tagger("modernbert", dtype=torch.float32, **{name: 0.5})
    batch = random_batch([9, 3])
    with torch.no_grad():
        expected = tagger(**batch).logits
        assert not torch.equal(tagger.train()(**batch).logits, expected)
        in_layers = name in ("attention_dropout", "mlp_dropout")
        assert [layer.drops() for layer in tagger.encoder.layers] == [in_layers] * 4
        for part in tagger.modules():
            for place in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(part, place, None), float):
                    setattr(part, place, 0.0)
        torch.testing.assert_close(tagger(**batch).logits, expected)
    assert getattr(tokenexit.to_hugging_face(tagger).config, name) == 0.5
    assert tagger.config.embedding_size is None


def test_an_encoder_that_normalises_first_gets_a_new_neck(tmp_path, caplog):
    theirs = random_classifier("modernbert")
    load = TokenExitForTokenClassification.from_pretrained
    theirs.model.save_pretrained(tmp_path / "encoder")
    tagger = load(tmp_path / "encoder", num_labels=6)
    assert tagger.untrained_heads() == [1, 2, 3, 4]
    assert torch.equal(tagger.encoder.neck.final_norm.weight, theirs.model.final_norm.weight)
    masked = transformers.ModernBertForMaskedLM(theirs.config)
    masked.save_pretrained(tmp_path / "masked")
    tagger = load(tmp_path / "masked", num_labels=6)
    assert tagger.untrained_heads() == [1, 2, 3, 4]
    assert torch.equal(tagger.encoder.neck.dense.weight, masked.head.dense.weight)
    theirs.save_pretrained(tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    del weights["head.dense.weight"]
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 weights: \['head.dense.weight'\]; expected them"
    ):
        load(tmp_path / "damaged")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"rotary_thetas": [1.0] * 3},
            r"rotary_thetas is \[1.0, 1.0, 1.0\]; expected a number abo",
        ),
        ({"rotary_thetas": None}, "rotary_thetas is None; expected a number above 0, of each of 4"),
        ({"attention_reach": [None, -1, 2, 3]}, "attention_reach is .*; expected an int of 0 or"),
        ({"mlp_dropout": 2}, "mlp_dropout is 2; expected a number from 0 to 1"),
        ({"classifier_activation": None}, "classifier_activation is None; expected one of"),
        ({"num_attention_heads": 32}, "heads are 1 wide; expected an even width"),
    ],
    ids=str,
)
def test_refuses_damaged_configurations_of_layers_that_normalise_first(change, message):
    config = tokenexit.convert(random_classifier("modernbert")).config
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        TokenExitForTokenClassification(config)


def test_kinds_of_layers_that_one_of_both_has_not():
    theirs = random_classifier("modernbert")
    model = tokenexit.convert(theirs)
    for kinds in (["full_attention"], ["full_attention", "chunked_attention"] * 2):
        theirs.config.layer_types = kinds
        with pytest.raises(ValueError, match="layer_types is .*; expected one of .* of 4 layers"):
            tokenexit.convert(theirs)
    model.config.attention_reach[1] = 7
    with pytest.raises(ValueError, match="expected one reach and one theta in each kind"):
        tokenexit.to_hugging_face(model)


@torch.no_grad()
def test_layers_that_normalise_first_saved_and_loaded(tmp_path):
    tagger = random_tagger("modernbert", dtype=torch.float32)
    tagger.policy = ExitPolicy(threshold=0.4, window=0)
    tagger.save_pretrained(tmp_path)
    batch = random_batch([9, 20])
    logits, parameters = in_a_new_process(tmp_path, batch)
    torch.testing.assert_close(logits, tagger(**batch).logits, atol=1e-5, rtol=1e-5)
    assert parameters == len(list(tagger.parameters()))
