"""What is special in a family: layers that stand several times."""

import copy
import subprocess
import sys

import pytest
import torch
from random_models import random_batch, random_classifier, random_tagger
from safetensors.torch import load_file

import tokenexit
from tokenexit import ExitPolicy, TokenExitForTokenClassification

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


@pytest.mark.parametrize("layer_of", [[0, 0, 0], [0, 2, 2, 2], [0, -1, 0, 0], ["0"] * 4], ids=str)
def test_refuses_an_order_that_cannot_be(layer_of):
    config = tokenexit.convert(random_classifier("albert")).config
    config.layer_of = layer_of
    with pytest.raises(ValueError, match=r"layer_of is .*; expected of each of 4 layers its own"):
        TokenExitForTokenClassification(config)
