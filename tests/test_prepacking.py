"""Second copies of weights: the same bits, used where there are few rows, never out of date."""

import copy
import pickle

import pytest
import torch
from random_models import random_batch, random_tagger

import tokenexit
from tokenexit import ExitPolicy
from tokenexit.layers import PREPACKED
from tokenexit.ops import extension_available, extension_error, instruction_set
from tokenexit.prepacking import prepacked

pytestmark = pytest.mark.usefixtures("poisoned")
# Elsewhere no product reads copies, so `prepack` makes none, and there is nothing to compare:
# test_a_lesser_processor_keeps_none is of that, and runs everywhere.
wide = pytest.mark.skipif(
    not (instruction_set() or "").startswith(("avx512", "amx")),
    reason=f"{extension_error() or instruction_set()}: no AVX-512",
)
POLICIES = {
    "full depth": ExitPolicy.never(),
    "exits": ExitPolicy(threshold=0.35, window=1),
    "sentence": ExitPolicy.sentence(threshold=0.5),
}
FEW = [7]  # tokens of a call


def tagger_of(family="bert", hidden=64, **kwargs):
    return random_tagger(family, dtype=torch.float32, hidden=hidden, **kwargs)


def copies(model):
    return {name: x for name, x in model.named_buffers() if name.endswith(PREPACKED)}


@torch.inference_mode()
def logits_of(model, lengths, policy=None):
    return model(**random_batch(lengths), policy=policy).logits


@wide
@pytest.mark.parametrize("lengths", [[1], FEW, [8], [9], [17], [24], [25], [48], [60],
                                     [65], [5, 17, 1, 9], [70, 3], [20, 20]])  # fmt: skip
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("family, hidden", [("bert", 64), ("mpnet", 96), ("bert", 512)])
def test_the_same_bits(family, hidden, policy, lengths):
    model = tagger_of(family, hidden, layers=3)
    plain = logits_of(model, lengths, policy)
    assert torch.equal(logits_of(tokenexit.prepack(model), lengths, policy), plain)
    assert model.loop == "cpu" and len(copies(model)) == 3 * 5


@wide
@pytest.mark.parametrize("lengths, uses", [(FEW, True), ([60], True), ([64], False), ([65], False)])
def test_copies_are_what_few_rows_read(lengths, uses):
    model = tokenexit.prepack(tagger_of())
    plain = logits_of(model, lengths)
    for each in copies(model).values():
        each.mul_(2)
    assert torch.equal(logits_of(model, lengths), plain) is not uses


CHANGES = {
    "in place": lambda model, new: model.encoder.layers[1].up.weight.detach().add_(0.1),
    "loaded": lambda model, new: model.load_state_dict(new.state_dict()),
    "assigned": lambda model, new: model.load_state_dict(new.state_dict(), assign=True),
    "replaced": lambda model, new: setattr(
        model.encoder.layers[0].down, "weight", torch.nn.Parameter(torch.ones(64, 128))
    ),
    "trained": lambda model, new: train(model, torch.optim.SGD),
    "trained by a fused step": lambda model, new: train(model, torch.optim.AdamW, fused=True),
    "read within a step": lambda model, new: train(
        model, torch.optim.AdamW, lambda: logits_of(model, FEW), fused=True
    ),
    "of a vector": lambda model, new: torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(new.parameters()), model.parameters()
    ),
}


def train(model, optimizer, meanwhile=lambda: None, **kwargs):
    loss = model.train()(**random_batch(FEW), labels=torch.zeros(1, *FEW, dtype=int)).loss
    loss.backward()
    model.eval()
    meanwhile()
    optimizer(model.parameters(), 0.1, **kwargs).step()


@wide
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_change_are_noticed(change):
    model = tokenexit.prepack(tagger_of())
    before = logits_of(model, FEW)
    change(model, tagger_of(seed=1))
    changed = logits_of(model, FEW)
    plain = tagger_of()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(changed, logits_of(plain, FEW)) and not torch.equal(changed, before)


@wide
def test_a_copy_of_the_model_has_its_own():
    model = tokenexit.prepack(tagger_of())
    before, other = logits_of(model, FEW), copy.deepcopy(model)
    assert torch.equal(logits_of(other, FEW), before) and len(copies(other)) == len(copies(model))
    with torch.no_grad():
        other.encoder.layers[0].up.weight.mul_(0.5)
    assert not torch.equal(logits_of(other, FEW), before)
    assert torch.equal(logits_of(model, FEW), before)


@wide
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("changes", [0, 1, 2])
def test_a_copy_knows_what_changed_before(again, changes):
    """Its weights count changes anew: from 0 or 1, whatever those of the model had."""
    model = tokenexit.prepack(tagger_of())
    with torch.no_grad():
        for layer in model.encoder.layers:
            for _ in range(changes):
                layer.up.weight.mul_(0.5)
            # As if it was packed after so many changes as a copy begins with.
            layer.up._prepacked_of._version = changes - 1 if changes else 0
    other, plain = again(model), tagger_of()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other, FEW), logits_of(plain, FEW))


@wide
@pytest.mark.parametrize("convert", [lambda m: m.bfloat16(), tokenexit.quantize])
def test_another_dtype_reads_no_copies(convert):
    model, plain = tokenexit.prepack(tagger_of()), convert(tagger_of())
    assert torch.equal(logits_of(convert(model), FEW), logits_of(plain, FEW))


@wide
def test_back_in_fp32_they_are_read_again():
    model = tokenexit.prepack(tagger_of()).bfloat16().float()
    plain = tagger_of().bfloat16().float()
    assert copies(model) and torch.equal(logits_of(model, FEW), logits_of(plain, FEW))


def test_what_is_saved_is_as_before(tmp_path):
    model = tagger_of()
    names = model.state_dict().keys()
    tokenexit.prepack(model).save_pretrained(tmp_path)
    loaded = tokenexit.TokenExitForTokenClassification.from_pretrained(tmp_path)
    assert model.state_dict().keys() == names == loaded.state_dict().keys()
    assert not copies(loaded)
    assert torch.equal(logits_of(loaded.eval(), FEW), logits_of(model, FEW))


def test_a_lesser_processor_keeps_none(monkeypatch):
    monkeypatch.setattr("tokenexit.prepacking.instruction_set", lambda: "avx2")
    assert not copies(tokenexit.prepack(tagger_of()))


@wide
def test_compiled_programs_read_none():
    model, rows = tokenexit.prepack(tagger_of(layers=2)).eval(), random_batch(FEW)
    plain = logits_of(tagger_of(layers=2), FEW)
    for each in copies(model).values():
        each.mul_(2)
    with torch.inference_mode():
        assert torch.equal(torch.compile(model, backend="eager")(**rows).logits, plain)


@pytest.mark.parametrize("act", [tokenexit.prepack, tokenexit.quantize])
def test_a_tagger_has_a_model(act, tiny_tokenizer):
    with pytest.raises(TypeError, match="got a Tagger; expected a TokenExitForTokenClassification"):
        act(tokenexit.Tagger(tagger_of(), tiny_tokenizer()))


def replaced(model):
    model.encoder.layers[1].up = torch.nn.Sequential(torch.nn.Linear(64, 128))
    return model


def made_in_inference_mode():
    with torch.inference_mode():
        return tagger_of()


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: tagger_of().bfloat16(),
            "got query of torch.bfloat16 on cpu; expected torch.float32 on cpu",
        ),
        (lambda: tokenexit.quantize(tagger_of()), "got an 8-bit model; expected one in fp32"),
        (lambda: tagger_of().to("meta"), "torch.float32 on meta"),
        (lambda: tagger_of(hidden=40), "query of 40 features; expected a multiple of 32"),
        (lambda: tagger_of("deberta-v2"), "got a DisentangledLayer as layer"),
        (lambda: tagger_of("modernbert"), "got a NormFirstLayer as layer"),
        (lambda: replaced(tagger_of()), "layers.1.up than it was made with: up, a Sequential"),
        (made_in_inference_mode, "made in inference mode"),
    ],
)
def test_what_it_refuses(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        tokenexit.prepack(model)
    assert not copies(model)


# Without compiled ops there is no op to refuse; with them it checks whatever the processor is.
@pytest.mark.skipif(not extension_available(), reason=str(extension_error()))
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x: x[:-1], "4 turned weights"),
        (lambda x: [x[0][:1], *x[1:]], "expected 2 rows of 2048"),
        (lambda x: [x[0].double(), *x[1:]], "dtype Double"),
        (lambda x: [x[0].transpose(1, 2), *x[1:]], "contiguous"),
    ],
)
def test_the_op_refuses_copies_that_do_not_fit(spoil, message, monkeypatch):
    monkeypatch.setattr("tokenexit.prepacking.instruction_set", lambda: "avx512")
    model = tokenexit.prepack(tagger_of(layers=1))
    monkeypatch.setattr("tokenexit.loops.cpu.prepacked", lambda found: spoil(prepacked(found)))
    with pytest.raises(RuntimeError, match=message):
        logits_of(model, FEW)


@wide
def test_copies_of_weights_whose_changes_nobody_sees_are_not_read():
    model = tokenexit.prepack(tagger_of())
    with torch.inference_mode():
        other = copy.deepcopy(model)
        before = logits_of(other, FEW)
        other.encoder.layers[1].up.weight.mul_(1.5)
    assert torch.equal(before, logits_of(model, FEW))
    with torch.no_grad():
        model.encoder.layers[1].up.weight.mul_(1.5)
    wanted = logits_of(model, FEW)
    assert torch.equal(logits_of(other, FEW), wanted) and not torch.equal(wanted, before)
