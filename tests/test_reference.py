"""The reference against the contract written as a loop."""

import itertools

import pytest
import torch
from loop import loop_forward
from random_models import CONVOLVED, FAMILIES, HEARING, random_batch, random_tagger
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from tokenexit import ExitPolicy, reference
from tokenexit.models.embeddings import relative_buckets
from tokenexit.ops.pack_tokens import pack

POLICIES = [
    ExitPolicy(level, window, criterion, threshold, schedule, copy, neighbors)
    for level, window in (("token", 0), ("token", 2), ("sentence", 2))
    for criterion, threshold, schedule in (
        ("entropy", 0.35, "constant"),
        ("entropy", 0.25, "doubling"),
        ("max_prob", (0.2, 0.5, 0.4, 0.1), "constant"),
    )
    for copy, neighbors in itertools.product(("post_norm", "pre_norm"), ("frozen", "recompute"))
] + [
    ExitPolicy(window=0, threshold=0.35, min_active=2),
    ExitPolicy(window=1, threshold=0.1, growth=1.8),
    ExitPolicy(window=1, threshold=0.35, neighbors="recompute", min_active=4),
]


def bias_of(tagger):
    """What `loop_forward` takes of relative positions."""
    if tagger.relative_bias is not None:
        return tagger.relative_bias(relative_buckets("cpu")).T
    if tagger.relative_states is None:
        return None
    states = tagger.relative_states.norm(tagger.relative_states.embedding.weight)

    def state_of(distance):
        bucket = int(make_log_bucket_position(torch.tensor(distance), 8, 160))
        return states[min(max(bucket + 8, 0), 15)]

    return state_of


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "deberta-v2", "modernbert", *HEARING])
def test_exit_forward_is_the_contract(family, policy):
    tagger = random_tagger(family, seed=3, **(CONVOLVED if family == "deberta-v2" else {}))
    tagger.backend = "reference"
    batch = random_batch([1, 2, 7, 13], seed=5)
    with torch.no_grad():
        got = tagger(**batch, policy=policy)
        bias = bias_of(tagger)
        for row, n in enumerate(batch["attention_mask"].sum(1).tolist()):
            words = pack(torch.ones(1, n), batch["word_ids"][row : row + 1, :n]).word_of_token
            ids = batch["input_ids"][row, :n]
            offset = 0 if tagger.config.position_padding_id is None else 2
            h = tagger.embeddings(ids, torch.arange(n) + offset, torch.zeros_like(ids))
            logits, exits, margin = loop_forward(
                list(h),
                tagger.encoder.layers,
                tagger.exit_heads,
                [None if word < 0 else int(word) for word in words],
                policy,
                bias,
                tagger.encoder.neck,
                tagger.config.num_neighbor_heads,
            )
            assert margin > 1e-9
            assert got.exit_layers[row, :n].tolist() == exits
            torch.testing.assert_close(got.logits[row, :n], torch.stack(logits))
            assert not got.exit_layers[row, n:].any() and not got.logits[row, n:].any()


def test_policies_above_let_words_leave_everywhere():
    """The test before would show little if all words left at one layer."""
    seen = set()
    tagger = random_tagger(seed=3)
    for policy in POLICIES:
        with torch.no_grad():
            seen |= set(
                tagger(**random_batch([7, 13], seed=5), policy=policy).exit_layers.tolist()[1]
            )
    assert seen >= {1, 2, 3, 4}


@pytest.mark.parametrize("max_prob", [False, True])
def test_uncertainty_ends(max_prob):
    logits = torch.tensor([[0.0, 0, 0], [90, 0, 0], [0, -torch.inf, -torch.inf]])
    u = reference.uncertainty(logits, max_prob)
    torch.testing.assert_close(u, torch.tensor([1.0, 0, 0]))
    assert reference.uncertainty(torch.tensor([[torch.nan, 0]]), max_prob).isnan().all()
    assert reference.uncertainty(torch.ones(2, 1), max_prob).tolist() == [0, 0]


def test_uncertainty_is_never_negative():
    """Else a threshold of 0 would let words leave."""
    logits = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * 60
    for max_prob in (False, True):
        assert (reference.uncertainty(logits, max_prob) >= 0).all()


def test_window_max_stays_within_the_sentence():
    values = torch.tensor([5.0, 1, 2, 9, 3, 4])
    cu_words = torch.tensor([0, 3, 3, 6])
    result = reference.window_max(values, cu_words, torch.tensor([1, 7, 2**62]))
    assert result.tolist() == [5, 5, 2, 9, 9, 9]
    result = reference.window_max(values, cu_words, torch.tensor([0, 0, 0]))
    assert result.tolist() == values.tolist()
