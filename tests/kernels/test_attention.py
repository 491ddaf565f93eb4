import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact, attention_sizes
from tokenexit.kernels.attention import (
    absorbed_attention,
    exit_attention,
    exit_attention_backward,
)

from tokenexit import reference
from tokenexit.layers import NormFirstLayer

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
NAN = float("nan")
SPARE = 3  # rows beyond the last sentence
# (active, all) tokens of each sentence
SHAPES = {
    "one token": [(1, 1), (2, 3), (1, 1)],
    "full": [(63, 63), (129, 129)],
    "ragged": [(5, 17), (1, 63), (66, 129), (2, 2)],
    "one active": [(1, 129)],
    "finished sentences": [(0, 9), (3, 7), (0, 1), (0, 0)],
    "nothing active": [(0, 5), (0, 3)],
    "no keys": [(2, 0), (3, 4)],
}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch allocates without filling is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Batch:
    """Random inputs, views with gaps between their rows; what must not be read is NaN."""

    def __init__(self, shape, dtype, device, dim, reach=None, heads=2):
        generator = torch.Generator().manual_seed(0)

        def random(*size):
            return torch.randn(*size, generator=generator).to(device, dtype)

        active, lengths = (torch.tensor(n) for n in zip(*shape, strict=True))
        self.cu = [F.pad(n.cumsum(0), (1, 0)).to(device) for n in (active, lengths)]
        self.num_q, self.num_k = int(active.sum()), int(lengths.sum())
        self.longest = int(lengths.max())
        self.q = random(self.num_q + SPARE, 3, heads, dim)[:, 1]
        self.grad = random(self.num_q + SPARE, heads, dim)
        kv = random(self.num_k + SPARE, 2, heads, dim)
        used = (active > 0).repeat_interleave(lengths).to(device)
        kv[: self.num_k][~used] = NAN
        for rows, num in ((self.q, self.num_q), (self.grad, self.num_q), (kv, self.num_k)):
            rows[num:] = NAN
        self.k, self.v = kv[:, 0], kv[:, 1]
        self.scale = dim**-0.5
        self.table = self.positions = None
        if reach is not None:
            self.table = random(heads, 2 * reach + 1)
            parts = [torch.randperm(max(a, n), generator=generator)[:a].sort()[0] for a, n in shape]
            self.positions = F.pad(torch.cat(parts), (0, SPARE), value=-(10**9)).to(device)

    def ours(self, dropout_p=0.0, seed=0, max_length=None):
        """The output, and gradients of q, k, v and the bias."""
        longest = self.longest if max_length is None else max_length
        kv = (self.k, self.v, *self.cu)
        options = (self.scale, self.table, self.positions, dropout_p, seed, longest, "ieee")
        out, lse = exit_attention(self.q, *kv, *options)
        assert lse.dtype == torch.float32 and lse[self.num_q :].isnan().all()
        rows = (self.q, self.k, self.v, out, lse)
        *grads, dbias = exit_attention_backward(self.grad, *rows, *self.cu, *options)
        results = [out, *grads]
        for result, num in zip(results, (self.num_q,) * 2 + (self.num_k,) * 2, strict=True):
            assert result[num:].isnan().all()
        if self.table is None:
            assert dbias.numel() == 0
            return [self.used(r) for r in results]
        assert dbias.dtype == torch.float32
        return [self.used(r) for r in results] + [dbias.to(self.q.dtype)]

    def used(self, rows):
        return rows[: self.num_q if len(rows) == len(self.q) else self.num_k]

    def exact(self, dtype, dropout_p=0.0, seed=0):
        """The same by the reference."""
        rows = [self.used(x).to(dtype, copy=True) for x in (self.q, self.k, self.v)]
        leaves = rows + ([] if self.table is None else [self.table.to(dtype, copy=True)])
        for leaf in leaves:
            leaf.nan_to_num_().requires_grad_()
        options = (leaves[3], self.used(self.positions)) if self.table is not None else (None, None)
        out = reference.exit_attention(*rows, *self.cu, self.scale, *options, dropout_p, seed)
        grads = torch.autograd.grad(
            out, leaves, self.used(self.grad).to(dtype), materialize_grads=True
        )
        return [out.detach(), *grads]

    def check(self, **options):
        ours, truth = self.ours(**options), self.exact(torch.float64, **options)
        plain = self.exact(self.q.dtype, **options)
        rows = [self.used(x).nan_to_num() for x in (self.grad, self.q, self.k, self.v)]
        bias = (None, None) if self.table is None else (self.table, self.used(self.positions))
        scales = attention_sizes(*rows, *self.cu, self.scale, *bias, options.get("dropout_p", 0.0))
        names = ("out", *"qkv", "bias")
        for *results, name, scale in zip(ours, truth, plain, names, [None, *scales], strict=False):
            kind = "forward" if name == "out" else "backward"
            assert_as_exact(*results, kind, name, scale)


@pytest.mark.parametrize("reach", [None, 6], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients(shape, reach, dtype, device):
    Batch(shape, dtype, device, 24, reach).check()


@pytest.mark.parametrize("reach", [0, 1, 40, 130])
def test_reach_of_the_bias(reach, device):
    """Within one block of entries and over many; shorter than the sentence and longer."""
    Batch([(37, 70), (0, 2), (4, 4)], torch.float32, device, 16, reach, heads=1).check()


def test_layers_that_see_what_is_near(dtype, device):
    """Their bias leaves whole blocks of keys no weight, before the first that has some, too."""
    batch = Batch([(70, 150), (1, 90), (3, 3)], dtype, device, 24, reach=6)
    layer = NormFirstLayer(48, 2, 8, theta=1.0, reach=5)
    batch.table = layer._window(batch.q, longest=150)
    assert batch.table.shape == (2, 13) and batch.table.isfinite().all()
    batch.check()


def test_large_scores(device):
    """Rows that fill up a block must not overflow into the others' sums."""
    batch = Batch([(5, 17), (40, 50)], torch.float16, device, 16, 6)
    batch.table += 100
    batch.check()


@pytest.mark.parametrize("dim", [1, 80, 130])
def test_head_dims(dim, dtype, device):
    Batch([(18, 40), (1, 3)], dtype, device, dim, heads=1).check()


@pytest.mark.parametrize("seed", [0, 1, -5, 2**31, 2**40 + 7])
def test_dropout_draws_as_the_reference(seed, device):
    batch = Batch([(5, 17), (0, 2), (35, 40)], torch.float32, device, 16, 6)
    batch.check(dropout_p=0.3, seed=seed)


def test_dropout_keeps_none_below(device):
    batch = Batch([(20, 20)], torch.float16, device, 16)
    batch.check(dropout_p=0.9, seed=3)


def test_unknown_length(device):
    batch = Batch([(5, 17), (66, 70)], torch.float32, device, 16)
    for a, b in zip(batch.ours(), batch.ours(max_length=0), strict=True):
        assert_as_exact(a, b.double(), b)


def test_lse(device):
    batch = Batch([(5, 17), (40, 70)], torch.float32, device, 16, 6)
    options = (*batch.cu, batch.scale, batch.table, batch.positions, 0.0, 0, batch.longest, "ieee")
    _, lse = exit_attention(batch.q, batch.k, batch.v, *options)
    q, k = batch.q.double(), batch.k.double()
    for b in range(2):
        mine, seen = (slice(cu[b], cu[b + 1]) for cu in batch.cu)
        scores = torch.einsum("ahd,khd->hak", q[mine], k[seen]) * batch.scale
        scores += reference.relative_bias(batch.table, batch.positions[mine], scores.shape[-1])
        torch.testing.assert_close(lse[mine].T, scores.logsumexp(-1).float())


@pytest.mark.parametrize("reach", [None, 6], ids=["plain", "bias"])
def test_autograd(reach, device):
    batch = Batch([(5, 17), (2, 2)], torch.float16, device, 16, reach)
    rows = [batch.q, batch.k, batch.v] + ([] if reach is None else [batch.table])
    leaves = [x.detach().clone().requires_grad_() for x in rows]
    q, k, v, *table = leaves
    out, _ = exit_attention(
        q, k, v, *batch.cu, batch.scale, *table or [None], batch.positions, 0.3, 9, batch.longest,
        "ieee",
    )  # fmt: skip
    grads = torch.autograd.grad(out, leaves, batch.grad)
    for got, wanted in zip(grads, batch.ours(0.3, 9)[1:], strict=True):
        assert got.dtype == torch.float16
        got = got if got.shape == wanted.shape else batch.used(got)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("reach", [None, 6], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_absorbed(shape, reach, dtype, device):
    check_absorbed(Batch(shape, dtype, device, 24, reach))


@pytest.mark.parametrize("dim", [1, 300, 768])
def test_absorbed_hidden_sizes(dim, dtype, device):
    check_absorbed(Batch([(3, 37), (0, 4), (15, 15)], dtype, device, dim, 6, heads=3))


def check_absorbed(batch):
    h = batch.k[:, 1]
    options = (batch.table, batch.positions)
    ours = absorbed_attention(batch.q, h, *batch.cu, batch.scale, *options, batch.longest, "ieee")
    assert ours[batch.num_q :].isnan().all()

    def exact(dtype):
        q, states = batch.used(batch.q).to(dtype), batch.used(h).to(dtype)
        table = None if batch.table is None else batch.table.to(dtype)
        positions = None if table is None else batch.used(batch.positions)
        return reference.absorbed_attention(q, states, *batch.cu, batch.scale, table, positions)

    size = batch.used(h).double().nan_to_num().abs().max()
    assert_as_exact(batch.used(ours), exact(torch.float64), exact(ours.dtype), scale=size)


def test_a_bias_of_minus_infinity(device):
    """It leaves whole blocks of keys no weight, before the first that has some, too."""
    batch = Batch([(70, 150), (1, 90), (3, 3)], torch.float32, device, 24, reach=6)
    batch.table[:, 0] = batch.table[:, -1] = float("-inf")
    for got, truth in zip(batch.ours(), batch.exact(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), truth, atol=2e-5, rtol=1e-4, equal_nan=True)


def test_vectors_with_gaps(device):
    batch = Batch([(5, 17), (0, 3), (2, 2)], torch.float32, device, 16, reach=6)
    expected = batch.ours()
    batch.cu = [torch.stack([x, x + 9], 1)[:, 0] for x in batch.cu]
    batch.positions = torch.stack([batch.positions] * 2, 1)[:, 0]
    assert all(map(torch.equal, batch.ours(), expected))
    check_absorbed(batch)


def test_no_rows(device):
    q, none = torch.empty(0, 2, 16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    out, lse = exit_attention(q, q, q, none, none, 1.0)
    assert out.shape == (0, 2, 16) and lse.shape == (0, 2)
    grads = exit_attention_backward(q, q, q, q, out, lse, none, none, 1.0)
    assert [len(g) for g in grads] == [0] * 4
    assert absorbed_attention(q, q[:, 0], none, none, 1.0).shape == (0, 2, 16)


def test_schemas(device):
    tests = ("test_schema",)  # what traces wants a compiler, not the interpreter
    batch = Batch([(2, 3)], torch.float32, device, 16, 1)
    options = (*batch.cu, batch.scale, batch.table, batch.positions)
    rows = (batch.q, batch.k, batch.v)
    out = exit_attention(*rows, *options)
    calls = [
        (exit_attention, (*rows, *options)),
        (exit_attention_backward, (batch.grad, *rows, *out, *options)),
        (absorbed_attention, (batch.q, batch.k[:, 1], *options)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op._opoverload, arguments, test_utils=tests)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_bits_each_time():
    batch = Batch([(90, 512), (0, 30), (200, 200)] * 8, torch.bfloat16, "cuda", 64, 128, heads=12)
    first = batch.ours(0.1, 5)
    for _ in range(20):
        assert all(map(torch.equal, batch.ours(0.1, 5), first))


def test_more_sentences_than_a_grid_has(device):
    cu, x = (
        torch.zeros(2**16 + 1, dtype=torch.int64, device=device),
        torch.zeros(1, 1, 16, device=device),
    )
    with pytest.raises(ValueError, match="got 65536 sentences; expected at most 65535"):
        exit_attention(x, x, x, cu, cu, 1.0)
