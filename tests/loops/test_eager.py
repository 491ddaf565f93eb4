"""The encoder against the reference, and the guarantees that do not depend on a backend."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from random_models import CONVOLVED, FAMILIES, HEARING, random_batch, random_tagger
from test_reference import POLICIES

from tokenexit import ExitPolicy
from tokenexit.ops import extension_available, extension_error
from tokenexit.reference import uncertainty
from tokenexit.schedule import Schedule

LENGTHS = [5, 17, 1, 9, 2, 33]


def both(tagger, batch, **kwargs):
    """Results of the encoder and of the reference."""
    results = []
    for backend in ("auto", "reference"):
        tagger.backend = backend
        results.append(tagger(**batch, **kwargs))
    return results


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "deberta-v2", "modernbert", *HEARING])
@torch.no_grad()
def test_equals_the_reference(family, policy):
    tagger = random_tagger(family, **(CONVOLVED if family == "deberta-v2" else {}))
    ours, truth = both(tagger, random_batch(LENGTHS), policy=policy)
    assert torch.equal(ours.exit_layers, truth.exit_layers)
    torch.testing.assert_close(ours.logits, truth.logits)


@pytest.mark.parametrize("policy", POLICIES[::3] + POLICIES[-2:], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_compiled_layers_equal_the_reference(family, policy):
    """In fp32 without gradients, where whole layers are compiled."""
    ours, truth = both(
        random_tagger(family, dtype=torch.float32), random_batch(LENGTHS), policy=policy
    )
    assert torch.equal(ours.exit_layers, truth.exit_layers)
    torch.testing.assert_close(ours.logits, truth.logits, atol=1e-4, rtol=1e-4)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=24),
    policies=st.sampled_from(POLICIES),
    seed=st.integers(0, 10**6),
)
@torch.no_grad()
def test_equals_the_reference_on_any_batch(lengths, policies, seed):
    ours, truth = both(random_tagger(), random_batch(lengths, seed), policy=policies)
    assert torch.equal(ours.exit_layers, truth.exit_layers)
    torch.testing.assert_close(ours.logits, truth.logits)


@pytest.mark.parametrize("family", [*FAMILIES, *HEARING])
@torch.no_grad()
def test_a_sentence_does_not_depend_on_its_batch(family):
    tagger = random_tagger(family)
    policy = ExitPolicy(threshold=0.35, window=1)
    batch = random_batch(LENGTHS)
    whole = tagger(**batch, policy=policy)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    shuffled = tagger(**{name: value[order] for name, value in batch.items()}, policy=policy)
    assert torch.equal(shuffled.exit_layers, whole.exit_layers[order])
    torch.testing.assert_close(shuffled.logits, whole.logits[order])
    for row, n in enumerate(LENGTHS):
        # alone, and with padding on the left
        alone = {name: value[row : row + 1, :n] for name, value in batch.items()}
        left = {
            name: torch.nn.functional.pad(value, (4, 0), value=-1 if name == "word_ids" else 0)
            for name, value in alone.items()
        }
        for result, start in (
            (tagger(**alone, policy=policy), 0),
            (tagger(**left, policy=policy), 4),
        ):
            assert torch.equal(result.exit_layers[0, start:], whole.exit_layers[row, :n])
            torch.testing.assert_close(result.logits[0, start:], whole.logits[row, :n])


@pytest.mark.parametrize(
    "dtype, margin", [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.05)]
)
@torch.no_grad()
def test_decisions_agree_beyond_the_rounding_margin(dtype, margin):
    """What fp64 decides by more than the margin, at a sentence's first exit, any dtype decides."""
    exact = random_tagger()
    rough = random_tagger().to(dtype)
    batch = random_batch([12] * 100, seed=1)
    limits = [0.2, 0.44, 0.6]  # one decision a sentence and layer: easy to line up
    policy = ExitPolicy.sentence([*limits, 0.0])
    full = exact(**batch, policy=ExitPolicy.never(), output_layer_logits=True)
    u = uncertainty(full.layer_logits[:3])  # [3, B, N]
    is_word = batch["word_ids"] >= 0
    is_first = is_word & (batch["word_ids"] != batch["word_ids"].roll(1, 1))
    largest = u.masked_fill(~is_first, 0).amax(2)  # [3, B]
    clear = ((largest - torch.tensor(limits)[:, None]).abs() > margin).all(0)
    assert clear.sum() >= 10
    expected = exact(**batch, policy=policy).exit_layers[clear]
    assert len(expected.unique()) >= 3
    assert torch.equal(rough(**batch, policy=policy).exit_layers[clear], expected)


@pytest.mark.parametrize("policy", POLICIES[::5], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *HEARING])
def test_gradients_equal_the_reference(family, policy):
    batch = random_batch([5, 9, 1, 14])
    labels = batch["word_ids"].clamp(min=-1) % 5
    labels[batch["word_ids"] < 0] = -100
    gradients = []
    for backend in ("auto", "reference"):
        tagger = random_tagger(
            family, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        ).train()
        for head in tagger.exit_heads:
            head.dropout = 0.0
        tagger.backend = backend
        loss = tagger(**batch, labels=labels, policy=policy).loss
        loss.backward()
        gradients.append({n: p.grad for n, p in tagger.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_given_exits_are_obeyed():
    tagger = random_tagger()
    batch = random_batch([6, 9], seed=2)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(1, 5, batch["input_ids"].shape, generator=generator)
    results = both(tagger, batch, exit_layers=wanted)
    assert torch.equal(results[0].exit_layers, results[1].exit_layers)
    word_ids = batch["word_ids"]
    for row in range(2):
        n = int(batch["attention_mask"][row].sum())
        for i in range(n):
            first = word_ids[row].tolist().index(word_ids[row, i])
            if word_ids[row, i] >= 0:
                assert results[0].exit_layers[row, i] == wanted[row, first]
        special = results[0].exit_layers[row, :n][word_ids[row, :n] < 0]
        assert (special == results[0].exit_layers[row].max()).all()


@torch.no_grad()
def test_a_policy_for_each_sentence():
    tagger = random_tagger()
    batch = random_batch([9, 9, 9])
    policies = [ExitPolicy.never(), ExitPolicy(threshold=0.4, window=0), ExitPolicy.sentence(0.7)]
    together = tagger(**batch, policy=policies)
    for row, policy in enumerate(policies):
        alone = tagger(**batch, policy=policy)
        assert torch.equal(together.exit_layers[row], alone.exit_layers[row])
        torch.testing.assert_close(together.logits[row], alone.logits[row])


@torch.no_grad()
def test_inference_leaves_its_input_and_earlier_logits_alone():
    tagger = random_tagger()
    batch = random_batch(LENGTHS)
    policy = ExitPolicy(threshold=0.4, window=0)
    h = torch.randn(int(batch["attention_mask"].sum()), 32, dtype=torch.float64)
    from tokenexit.ops.pack_tokens import pack

    packed = pack(batch["attention_mask"], batch["word_ids"])
    before = h.clone()
    schedule = Schedule.of(policy, 4, len(LENGTHS), h)
    trace = tagger.encoder(h, packed, schedule)
    assert torch.equal(h, before)
    with torch.enable_grad():
        kept = tagger.encoder(h, packed, schedule)
    for (active, logits), (wanted_active, wanted) in zip(trace, kept, strict=True):
        assert torch.equal(active, wanted_active)
        assert torch.equal(logits, wanted)


@pytest.mark.skipif(not extension_available(), reason=str(extension_error()))
@pytest.mark.parametrize(
    "family, changes",
    [*((name, {}) for name in FAMILIES), ("albert", {}), ("electra", {"embedding_size": 144})],
    ids=str,
)
@torch.inference_mode()
def test_compiled_results_are_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    family, changes
):
    tagger = random_tagger(family, dtype=torch.float32, **changes)
    policy = ExitPolicy(threshold=0.35, window=1)
    batch = random_batch(LENGTHS)
    whole = tagger(**batch, policy=policy)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    shuffled = tagger(**{name: value[order] for name, value in batch.items()}, policy=policy)
    assert torch.equal(shuffled.logits, whole.logits[order])
    for row, n in enumerate(LENGTHS):
        alone = tagger(**{k: v[row : row + 1, :n] for k, v in batch.items()}, policy=policy)
        assert torch.equal(alone.logits[0], whole.logits[row, :n])
    before = torch.get_num_threads()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(tagger(**batch, policy=policy).logits, whole.logits)
    finally:
        torch.set_num_threads(before)
