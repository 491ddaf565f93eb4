"""8-bit weights: against the same arithmetic in PyTorch, and what may not change by them."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from random_models import random_batch, random_tagger
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForTokenClassification

import tokenexit
from tokenexit import ExitPolicy
from tokenexit.int8 import Int8Linear
from tokenexit.layers import ExitLayer
from tokenexit.ops import (
    ATTEND_IN_BF16,
    extension_available,
    extension_error,
    instruction_set,
)
from tokenexit.ops.pack_tokens import pack
from tokenexit.packing import Active

pytestmark = pytest.mark.usefixtures("poisoned")
compiled = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))
PROJECTED, ABSORBED = [0.0, 0.0, 1e30, 1e30], [1e30, 1e30, 0.0, 0.0]


class Emulated(nn.Module):
    """Int8Linear with activations rounded to bytes, row by row, in exact integers."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.out_features = linear.out_features

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True).double() / 127
        sums = (x / scale).round() @ self.linear.weight.double().T
        return (sums * scale * self.linear.scale + self.linear.bias).to(x.dtype)


def attention_in_bf16(q, k, v, cu_q, cu_k, scale, *_, **__):
    """As `exit_attention`, without a bias, of operands rounded as with AMX."""

    def rounded(x):
        return x.bfloat16().to(x.dtype)

    out = torch.empty_like(q)
    for mine, theirs in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        queries, keys = slice(*mine), slice(*theirs)
        scores = torch.einsum("ahd,nhd->han", rounded(q[queries] * scale), rounded(k[keys]))
        weights = rounded(scores.softmax(-1))
        out[queries] = torch.einsum("han,nhd->ahd", weights, rounded(v[keys]))
    return out


def int8_layer(d=64, heads=4, inner=96):
    torch.manual_seed(0)
    layer = ExitLayer(d, heads, inner).eval()
    for name, part in layer.named_children():
        if isinstance(part, nn.Linear):
            part.bias.data.normal_()
            setattr(layer, name, Int8Linear(part))
    return layer


def batch(lengths, counts, d=64):
    g = torch.Generator().manual_seed(1)
    n = max(lengths)
    mask = (torch.arange(n) < torch.tensor(lengths)[:, None]).long()
    packed = pack(mask, torch.arange(n).expand_as(mask))
    chosen = [
        start + torch.randperm(length, generator=g)[:count].sort()[0]
        for start, length, count in zip(packed.cu_tokens.tolist(), lengths, counts, strict=False)
    ]
    cu = torch.tensor([0, *counts]).cumsum(0)
    h = 3 * torch.randn(sum(lengths), d, generator=g)
    return h, Active(packed, torch.cat(chosen), cu)


def test_weights_are_rounded_row_by_row():
    linear = nn.Linear(8, 3)
    linear.weight.data[1] *= 1000
    linear.weight.data[2] = 0
    rounded = Int8Linear(linear)
    tops = [127 if instruction_set() not in ("avx2", "avx512") else 63] * 2 + [0]
    assert rounded.weight.dtype == torch.int8 and rounded.weight.abs().amax(1).tolist() == tops
    assert (rounded.scale > 0).all()  # of a row of zeros too: 0 / 0 as an integer is any
    error = (rounded.weight * rounded.scale[:, None] - linear.weight).abs()
    assert (error <= 0.5001 * rounded.scale[:, None]).all()
    x = torch.randn(5, 8)
    expected = x @ (rounded.weight * rounded.scale[:, None]).T + linear.bias
    torch.testing.assert_close(rounded(x), expected)


@compiled
@pytest.mark.parametrize("counts", [(7, 1, 20), (7, 0, 3), (1, 0, 0)], ids=str)
@torch.inference_mode()
def test_a_layer_is_the_same_arithmetic(counts, monkeypatch):
    h, active = batch((7, 5, 20), counts)
    layer = int8_layer()
    monkeypatch.setattr("tokenexit.layers.costs", lambda *_: PROJECTED)
    got = layer(h, active)
    emulated = copy.deepcopy(layer)
    for name, part in layer.named_children():
        if isinstance(part, Int8Linear):
            setattr(emulated, name, Emulated(part))
    monkeypatch.setattr(ExitLayer, "reads", lambda *_: "")
    if instruction_set() in ATTEND_IN_BF16:
        monkeypatch.setattr("tokenexit.layers.exit_attention", attention_in_bf16)
    expected = emulated(h, active)
    # A sum that falls between two bytes may be rounded to either: a step of 1/127 here and there.
    difference = (got - expected).abs()
    assert difference.max() < 0.1 and difference.mean() < 2e-3


@compiled
@pytest.mark.parametrize("d, most", [(64, 5e-3), (28, 3.2e-3)])
@torch.inference_mode()
def test_both_ways_of_attention_agree_but_for_rounding(d, most, monkeypatch):
    h, active = batch((9, 30, 4), (3, 2, 1), d)
    layer = int8_layer(d)
    results = []
    for way in (PROJECTED, ABSORBED):
        monkeypatch.setattr("tokenexit.layers.costs", lambda *_, way=way: way)
        results.append(layer(h, active))
    difference = (results[0] - results[1]).abs()
    assert 0 < difference.max() < 0.2 and difference.mean() < most


@compiled
@pytest.mark.parametrize("way", [PROJECTED, ABSORBED], ids=["projected", "absorbed"])
@pytest.mark.parametrize("d", [64, 96, 40])
@torch.inference_mode()
def test_the_same_bits_among_any_number_of_rows(d, way, monkeypatch):
    monkeypatch.setattr("tokenexit.layers.costs", lambda *_: way)
    layer = int8_layer(d)
    counts, length = range(1, 15), 16
    h, active = batch([length] * len(counts), counts, d)
    whole = layer(h, active)
    for b, count in enumerate(counts):
        rows = slice(*active.cu_tokens[b : b + 2])
        packed = pack(torch.ones(1, length), torch.arange(length)[None])
        alone = Active(packed, active.tokens[rows] - length * b, torch.tensor([0, count]))
        assert torch.equal(layer(h[length * b : length * (b + 1)], alone), whole[rows])


@compiled
@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others():
    tagger = tokenexit.quantize(random_tagger(dtype=torch.float32))
    lengths = [5, 17, 1, 9]
    rows = random_batch(lengths)
    policy = ExitPolicy(threshold=0.35, window=1)
    whole = tagger(**rows, policy=policy)
    assert len(whole.exit_layers.unique()) > 2
    for row, n in enumerate(lengths):
        alone = tagger(**{k: v[row : row + 1, :n] for k, v in rows.items()}, policy=policy)
        assert torch.equal(alone.logits[0], whole.logits[row, :n])
        assert torch.equal(alone.exit_layers[0], whole.exit_layers[row, :n])


@torch.inference_mode()
def test_logits_stay_close():
    tagger = random_tagger(dtype=torch.float32, hidden=64)
    rows = random_batch([12, 30])
    exact = tagger(**rows).logits
    rounded = tokenexit.quantize(copy.deepcopy(tagger))
    real = rows["attention_mask"] != 0
    error = (rounded(**rows).logits - exact)[real].abs().mean() / exact[real].std()
    assert 1e-4 < error < 0.3


@compiled
@pytest.mark.parametrize("way", [PROJECTED, ABSORBED], ids=["projected", "absorbed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.inference_mode()
def test_one_nan_of_a_row_is_enough(way, value, monkeypatch):
    monkeypatch.setattr("tokenexit.layers.costs", lambda *_: way)
    layer = int8_layer()
    for feature in (0, 1, 2, 3, 37, 63):
        h, active = batch((7, 5, 20), (7, 1, 20))
        h[active.tokens[-2], feature] = value
        bad = layer(h, active).isnan().any(1)
        assert bad.tolist() == [False] * 8 + [True] * 20


@torch.inference_mode()
def test_nan_is_not_rounded_away():
    tagger = tokenexit.quantize(random_tagger(dtype=torch.float32))
    tagger.embeddings.word.scale[7] = float("nan")
    with pytest.raises(ValueError, match="NaN logits at layer 1"):
        tagger(torch.tensor([[3, 7, 4]]))


def test_refuses():
    with pytest.raises(ValueError, match="got 6 inputs; expected a multiple of 4"):
        Int8Linear(nn.Linear(6, 4))
    linear = nn.Linear(4, 4)
    linear.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        Int8Linear(linear)
    with pytest.raises(ValueError, match="expected fp32 on the CPU"):
        tokenexit.quantize(random_tagger(dtype=torch.float64))
    tagger = tokenexit.quantize(random_tagger(dtype=torch.float32))
    with pytest.raises(ValueError, match="8-bit already"):
        tokenexit.quantize(tagger)


def test_an_8_bit_model_does_not_drop():
    tagger = random_tagger(dtype=torch.float32).train()
    assert tokenexit.quantize(tagger) is tagger
    assert not any(part.training for part in tagger.modules())


@torch.inference_mode()
def test_saved_and_loaded_it_has_the_same_bits(tmp_path):
    tagger = random_tagger(dtype=torch.float32, hidden=64)
    tagger.policy = ExitPolicy(threshold=0.4, window=1)
    tagger.save_pretrained(tmp_path / "exact")
    tokenexit.quantize(tagger).save_pretrained(tmp_path / "rounded")
    assert json.loads((tmp_path / "rounded/config.json").read_text())["int8"] is True

    again = tokenexit.TokenExitForTokenClassification.from_pretrained(tmp_path / "rounded")
    by_auto = AutoModelForTokenClassification.from_pretrained(tmp_path / "rounded", dtype="float32")
    expected, rows = tagger.state_dict(), random_batch([5, 17, 1, 9])
    for other in (again, by_auto, copy.deepcopy(again)):
        assert not any(part.training for part in other.modules()) and other.loop == tagger.loop
        assert other.state_dict().keys() == expected.keys()
        for name, value in other.state_dict().items():
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
        assert torch.equal(other(**rows).logits, tagger(**rows).logits)
        assert torch.equal(other(**rows).exit_layers, tagger(**rows).exit_layers)

    def size(folder):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        of_layers = {n: x for n, x in tensors.items() if n.startswith("encoder.layers")}
        assert len(of_layers) == (4 * 24 if folder == "rounded" else 4 * 14)
        return sum(x.nbytes for x in of_layers.values())

    assert size("rounded") < 0.32 * size("exact")  # of wide layers, a fourth


def test_loading_8_bits_asks_for_no_other_dtype(tmp_path):
    load = tokenexit.TokenExitForTokenClassification.from_pretrained
    tokenexit.quantize(random_tagger(dtype=torch.float32)).save_pretrained(tmp_path)
    for dtype in (torch.float16, "bfloat16"):
        with pytest.raises(ValueError, match="for 8-bit weights; expected None"):
            load(tmp_path, dtype=dtype)
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32
    # As a version reads it that knows of no 8 bits.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "int8": False}))
    with pytest.raises(ValueError, match="has 41 unknown weights"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "int8": "yes"}))
    with pytest.raises(ValueError, match="config.int8 is 'yes'; expected true or false"):
        load(tmp_path)


@torch.inference_mode()
def test_the_configuration_says_what_the_layers_are(tmp_path):
    """A model of a configuration that says 8 bits has them; one that was rounded says so."""
    tagger = random_tagger(dtype=torch.float32)
    tagger.config.int8 = True  # by mistake
    tagger.save_pretrained(tmp_path)
    assert not tokenexit.TokenExitForTokenClassification.from_pretrained(tmp_path).config.int8
    tokenexit.quantize(tagger)
    made = tokenexit.TokenExitForTokenClassification(tagger.config)
    made.load_state_dict(tagger.state_dict())
    rows = random_batch([5, 9])
    assert torch.equal(made(**rows).logits, tagger(**rows).logits)


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
@torch.inference_mode()
def test_the_table_of_words_is_rounded_row_by_row(family, tmp_path):
    tagger, batch = random_tagger(family, dtype=torch.float32), random_batch([5, 17, 1])
    whole = copy.deepcopy(tagger)
    tokenexit.quantize(tagger), tokenexit.quantize(whole, embeddings=False)
    table, words = tagger.embeddings.word, whole.embeddings.word.weight
    assert table.weight.dtype == torch.int8 and table.weight.abs().amax() == 127
    assert (
        (table.weight * table.scale[:, None] - words).abs() <= 0.5001 * table.scale[:, None]
    ).all()
    whole.embeddings.word.weight.copy_(table.weight * table.scale[:, None])
    ours, theirs = tagger(**batch), whole(**batch)
    assert torch.equal(ours.logits, theirs.logits)
    table.register_forward_hook(lambda *_: None)  # called as a module
    assert torch.equal(tagger(**batch).logits, ours.logits)
    for number, model in enumerate((tagger, whole)):
        model.save_pretrained(tmp_path / str(number))
        again = type(model).from_pretrained(tmp_path / str(number))
        assert type(again.embeddings.word) is type(model.embeddings.word)
        assert torch.equal(again(**batch).logits, ours.logits)
    with pytest.raises(IndexError):
        table(torch.tensor([60]))


def test_a_table_that_was_changed_is_not_rounded():
    for change in (
        lambda word: word.register_forward_hook(lambda *_: None),
        lambda word: setattr(word, "max_norm", 1.0),
    ):
        tagger = random_tagger(dtype=torch.float32)
        change(tagger.embeddings.word)
        with pytest.raises(ValueError, match="another table of words"):
            tokenexit.quantize(tagger)
        assert not tagger.config.int8 and not tokenexit.int8.is_quantized(tagger)
        assert tokenexit.quantize(tagger, embeddings=False).config.int8


@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16)])
def test_no_other_dtype_for_8_bit_weights(move):
    model = tokenexit.quantize(random_tagger(dtype=torch.float32))
    before = {name: x.dtype for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match="for 8-bit weights; expected float32, as all else is"):
        move(model)
    assert {name: x.dtype for name, x in model.float().state_dict().items()} == before
