"""The inputs of a call: what is wrong is known without a wait, and told in words."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from random_models import random_batch, random_tagger

from tokenexit import ExitPolicy, TokenExitConfig
from tokenexit.models.rows import Rows, limits_of

CONFIG = TokenExitConfig(vocab_size=50, max_position_embeddings=12, num_hidden_layers=3)
KINDS = torch.zeros(50, dtype=torch.uint8)
WRONG = {
    "input_ids": (-1, 50),
    "token_type_ids": (-1, 2),
    "position_ids": (-1, 12),
    "word_ids": (-2, -(2**40)),
}


def rows_of(mask, **changes):
    """Good rows, `changes` put in at `(row, column)`."""
    each = torch.arange(mask.shape[1]).expand_as(mask)
    given = {
        "input_ids": each + 4,
        "token_type_ids": each % 2,
        "position_ids": each.clamp(max=11),
        "word_ids": each // 2,
    }
    given = {name: value.clone() for name, value in given.items()}
    for name, (row, column, value) in changes.items():
        given[name][row, column] = value
    return Rows.of(CONFIG, attention_mask=mask, **given)


@hypothesis.given(data=st.data())
def test_sound_are_those_that_nothing_is_to_be_said_of(data):
    size = st.integers(1, 16)
    b, n = data.draw(size), data.draw(size)
    cells = data.draw(st.lists(st.booleans(), min_size=b * n, max_size=b * n))
    mask = torch.tensor(cells).view(b, n)
    changes = {
        name: (
            data.draw(st.integers(0, b - 1)),
            data.draw(st.integers(0, n - 1)),
            data.draw(st.sampled_from(values)),
        )
        for name, values in WRONG.items()
        if data.draw(st.booleans())
    }
    rows = rows_of(mask, **changes)
    inside, sound = rows.clamped(limits_of(CONFIG), CONFIG.max_tokens)
    bad = [name for name, (row, column, _) in changes.items() if mask[row, column]]
    long = int(mask.sum(1).max()) > 12
    assert bool(sound) == (bool(mask.any()) and not bad and not long)
    error = rows.explain(limits_of(CONFIG), CONFIG, KINDS)
    assert (error is None) == bool(sound)
    if mask.any() and not long and bad:
        assert any(f"{name} has {changes[name][2]}; expected" in str(error) for name in bad)
    for name, (low, high) in limits_of(CONFIG).items():
        value = getattr(inside, name)
        assert low <= int(value.min()) and int(value.max()) <= high
        kept = mask.clone()
        if name in changes:
            kept[changes[name][:2]] = False
        assert torch.equal(value[kept], getattr(rows, name)[kept])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_real_tokens_are_those_whose_mask_is_not_0(dtype):
    mask = torch.tensor([[3, 1, 0], [0.5, 0, 0]]) if dtype == torch.float32 else torch.eye(2, 3)
    rows = Rows.of(CONFIG, torch.ones(2, 3).long(), mask.to(dtype))
    assert torch.equal(rows.real, mask != 0) and rows.real.dtype == torch.bool
    inside, _ = rows.clamped(limits_of(CONFIG), CONFIG.max_tokens)
    assert torch.equal(inside.attention_mask, mask != 0)
    assert Rows.of(CONFIG, torch.ones(2, 3).long(), None).real.all()


def test_exit_layers_are_read_at_words_alone():
    mask = torch.ones(2, 4, dtype=torch.bool)
    exits = torch.tensor([[2, 99, 3, 99], [1, 0, 4, 0]])
    words = torch.tensor([[0, 0, 1, 1]] * 2)
    rows = Rows.of(CONFIG, torch.ones(2, 4).long(), mask, exit_layers=exits, word_ids=words)
    error = rows.explain(limits_of(CONFIG), CONFIG, KINDS)
    assert "exit_layers has 4; expected values from 1 to 3" in str(error)


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@torch.no_grad()
def test_one_row_of_positions_is_every_sentences(backend):
    tagger = random_tagger(dtype=torch.float32)
    tagger.backend = backend
    batch, policy = random_batch([9, 5]), ExitPolicy(threshold=0.7)
    positions = torch.arange(9).flip(0)[None] + 20
    got = tagger(**batch, position_ids=positions, policy=policy)
    expected = tagger(**batch, position_ids=positions.repeat(2, 1), policy=policy)
    assert torch.equal(got.logits, expected.logits)
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 8\); expected that of inp"):
        tagger(**batch, position_ids=positions[:, :8])


@torch.no_grad()
def test_rows_wider_than_the_positions_with_shorter_sentences():
    """Padding may be as long as one likes."""
    tagger = random_tagger(dtype=torch.float32)
    batch = random_batch([9, 5])
    wide = {
        name: torch.nn.functional.pad(value, (0, 300), value=-1 if name == "word_ids" else 0)
        for name, value in batch.items()
    }
    policy = ExitPolicy(threshold=0.7)
    got, expected = tagger(**wide, policy=policy), tagger(**batch, policy=policy)
    assert torch.equal(got.logits[:, :9], expected.logits)
    assert not got.exit_layers[:, 9:].any()
