"""Operations counted by hand."""

import torch

from tokenexit import TokenExitConfig, flops

CONFIG = TokenExitConfig(hidden_size=10, intermediate_size=30, num_hidden_layers=3, num_labels=4)


def layer(a, n):
    projections = a * 100 + 2 * n * 100 + a * 100  # queries; keys, values; output
    attention = 2 * a * n * 10
    return projections + attention + a * 2 * 10 * 30 + a * 10 * 4


def test_counts_of_layers_that_normalise_first():
    kinds = {"norm_first": True, "rotary_thetas": [1.0] * 3, "attention_reach": [None] * 3}
    config = TokenExitConfig(**{**CONFIG.to_dict(), **kinds})
    spent = flops.multiply_adds(torch.tensor([[4, 2, 0]]), torch.tensor([4]), config)
    gates_and_necks = 6 * (10 * 30 + 10 * 10)
    assert spent.tolist() == [layer(4, 4) + layer(2, 4) + gates_and_necks]


def test_counts_of_heads_that_hear():
    config = TokenExitConfig(**{**CONFIG.to_dict(), "neighbor_heads": True})
    spent = flops.multiply_adds(torch.tensor([[4, 2, 1]]), torch.tensor([4]), config)
    told = (4 + 2) * 10 * 2 * 4
    assert spent.tolist() == [layer(4, 4) + layer(2, 4) + layer(1, 4) + told]
    config = TokenExitConfig(**{**CONFIG.to_dict(), "neighbor_heads": "all"})
    more = flops.multiply_adds(torch.tensor([[4, 2, 1]]), torch.tensor([4]), config)
    assert more.tolist() == [spent.item() + 1 * 10 * 2 * 4]


def test_counts():
    exits = torch.tensor([[3, 1, 2, 3], [1, 1, 0, 0]])
    active = flops.active_tokens(exits, 3)
    assert active.tolist() == [[4, 3, 2], [2, 0, 0]]
    spent = flops.multiply_adds(active, torch.tensor([4, 2]), CONFIG)
    assert spent.tolist() == [layer(4, 4) + layer(3, 4) + layer(2, 4), layer(2, 2)]
    full = 3 * layer(4, 4) + 3 * layer(2, 2)
    assert flops.speedup(active, torch.tensor([4, 2]), CONFIG) == full / float(spent.sum())
