"""What do exits save in wall-clock time, at given exit rates?

Random weights; exits are imposed, so that the time does not hang on what a model learned. Both
systems get the same sentences; Hugging Face gets them sorted by length in batches of 8, so that
little is padding.
"""

import harness
import pytest
import torch
import transformers

import tokenexit
from tokenexit import ExitPolicy
from tokenexit.flops import active_tokens, speedup

SHAPES = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "BERT-base": {},
}
SENTENCES, LABELS, ROUNDS = 32, 9, 5


def batch(vocab: int):
    """Ragged sentences of 4 to 60 tokens, about 24 in the mean, as in newspaper text."""
    g = torch.Generator().manual_seed(0)
    lengths = (4 + 56 * torch.rand(SENTENCES, generator=g) ** 1.8).long()
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return torch.randint(1000, vocab, mask.shape, generator=g) * mask, mask


def exit_layers(mask: torch.Tensor, num_layers: int, rate: float) -> torch.Tensor:
    """A share `rate` of tokens leaves after a sixth of the layers, the others run to the end."""
    g = torch.Generator().manual_seed(1)
    early = torch.rand(mask.shape, generator=g) < rate
    return torch.where(early, max(1, num_layers // 6), num_layers)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_exits(shape, capsys):
    config = transformers.BertConfig(num_labels=LABELS, **SHAPES[shape])
    theirs = transformers.BertForTokenClassification(config).eval()
    ours = tokenexit.convert(theirs)
    ids, mask = batch(config.vocab_size)
    order = mask.sum(1).argsort()
    chunks = [(ids[rows], mask[rows, : int(mask[rows].sum(1).max())]) for rows in order.split(8)]
    chunks = [(i[:, : m.shape[1]], m) for i, m in chunks]

    real = mask != 0
    expected = theirs(ids, mask).logits[real]
    torch.testing.assert_close(ours(ids, mask).logits[real], expected, atol=1e-4, rtol=0)

    policy = ExitPolicy.never()
    systems = {
        "full depth": lambda: ours(ids, mask, policy=policy),
        "Hugging Face sdpa, padded": lambda: theirs(ids, mask),
        "Hugging Face sdpa, sorted, batches of 8": lambda: [theirs(*chunk) for chunk in chunks],
    }
    counted = {}
    for rate in (0.5, 0.7, 0.9, 0.95):
        exits = exit_layers(mask, config.num_hidden_layers, rate)
        name = f"exits of {rate:.0%}"
        systems[name] = lambda exits=exits: ours(ids, mask, exit_layers=exits)
        left = ours(ids, mask, exit_layers=exits).exit_layers
        active = active_tokens(left, config.num_hidden_layers)
        counted[name] = round(speedup(active, mask.sum(1), ours.config), 3)
    times = harness.alternate(systems, ROUNDS)
    facts = {"shape": shape, "sentences": SENTENCES, "tokens": int(mask.sum()), "dtype": "fp32"}
    measured = harness.rows(times, "full depth", **facts)
    for row in measured:
        row["flops_speedup"] = counted.get(row["system"], 1.0)
    harness.write("exits", measured)
    with capsys.disabled():
        print(f"\n{shape}, {SENTENCES} sentences, {int(mask.sum())} tokens")
        for row in measured:
            print(
                f"  {row['system']:42} {row['median_ms']:8.1f} ms  "
                f"{row['speedup_over_full depth']:5.2f}x  (multiply-adds {row['flops_speedup']}x)"
            )
