"""How long do the ops take, compiled and in plain PyTorch? 32 sentences of 24 words, 9 labels."""

import pytest
import torch

from tokenexit import ops
from tokenexit.ops.compact_active import compact_active
from tokenexit.ops.exit_decision import exit_decision

B, N, C = 32, 24, 9
BACKENDS = ["reference", *(["auto"] if ops.extension_available() else [])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_decision(benchmark, backend):
    words = torch.arange(B * N)
    arguments = (
        torch.randn(B * N, C),
        words,
        torch.ones(B * N),
        torch.zeros_like(words),
        torch.arange(0, B * N + 1, N),
        torch.full((B,), 2),
        torch.full((B,), 0.2),
        1,
    )
    expected = exit_decision(*arguments, backend="reference")
    result = benchmark(exit_decision, *arguments, backend=backend)
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compact_active(benchmark, backend):
    tokens = torch.arange(B * N)
    cu_tokens = torch.arange(0, B * N + 1, N)
    arguments = (tokens, cu_tokens, tokens, (torch.rand(B * N) < 0.5).long())
    expected = compact_active(*arguments, backend="reference")
    result = benchmark(compact_active, *arguments, backend=backend)
    assert torch.equal(result[0], expected[0])
