import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact
from tokenexit.kernels import linear as module
from tokenexit.kernels.linear import linear, linear_, query_key_value

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
NAN = float("nan")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch allocates without filling is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make(device, dtype):
    """Random numbers, the same for all dtypes but for rounding."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape, scale=1.0, shift=0.0):
        values = scale * torch.randn(*shape, generator=generator) + shift
        return values.to(device, dtype)

    return make


def number(value, device):
    return torch.tensor([value], device=device)


def check(ours, exact, *args):
    """Hold ours against `exact(*args)`, in fp64 and in the dtype of ours."""
    wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    assert_as_exact(ours, exact(*wide), exact(*args))


@pytest.mark.parametrize("rows", [1, 63, 300])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_rows_within_the_count(make, device, rows, activation):
    capacity, k, n = 300, 70, 45
    x, weight, bias = make(capacity, k), make(n, k, scale=k**-0.5), make(n)
    x[rows:] = NAN
    ours = linear(x, weight, bias, number(rows, device), activation=activation, precision="ieee")
    assert ours[rows:].isnan().all()

    def exact(x, weight, bias):
        out = F.linear(x, weight, bias)
        return F.gelu(out) if activation == "gelu" else out

    check(ours[:rows], exact, x[:rows], weight, bias)


def test_no_rows_and_all_rows(make, device):
    x, weight = make(33, 16), make(20, 16)
    assert linear(x, weight, count=number(0, device)).isnan().all()
    check(linear(x, weight, precision="ieee"), F.linear, x, weight)
    check(linear(x, weight, count=number(99, device), precision="ieee"), F.linear, x, weight)
    assert linear(x[:0], weight).shape == (0, 20)


def test_gather_scatter_and_residual(make, device):
    x, weight, bias, residual = make(50, 40), make(24, 40, scale=0.2), make(24), make(60, 24)
    gather = torch.randperm(50)[:37].to(device)
    near = torch.randperm(60)[:37].to(device)
    to = torch.randperm(70)[:37].to(device)
    count = number(29, device)
    x[gather[29:]] = NAN
    residual[near[29:]] = NAN
    gather[30:], near[30:], to[30:] = -(10**9), -(10**9), -(10**9)  # an access would crash

    def exact(x, weight, bias, residual):
        return F.linear(x, weight, bias) + residual

    args = (x[gather[:29]], weight, bias, residual[near[:29]])
    options = dict(residual=residual, residual_gather=near, precision="ieee")
    ours = linear(x, weight, bias, count, gather, **options)
    check(ours[:29], exact, *args)
    assert ours[29:].isnan().all()

    out = torch.full((70, 24), NAN, dtype=x.dtype, device=device)
    stats = torch.full((70, 1, 2), NAN, device=device)
    linear_(out, stats, x, weight, bias, count, gather, to, **options)
    assert torch.equal(out[to[:29]], ours[:29])
    torch.testing.assert_close(stats[to[:29], 0, 0], ours[:29].float().sum(1))
    untouched = torch.ones(70, dtype=torch.bool, device=device)
    untouched[to[:29]] = False
    assert out[untouched].isnan().all() and stats[untouched].isnan().all()


@pytest.mark.parametrize("rows", [5, 270])
@pytest.mark.parametrize("d", [24, 150])
def test_layer_norm_on_the_way(make, device, rows, d):
    """The feed-forward part of a layer: LayerNorm before it and on its residual."""
    wide = 2 * d
    context, h = make(rows, d), make(rows, d, scale=2, shift=5)
    output, up, down = make(d, d, scale=0.1), make(wide, d, scale=0.1), make(d, wide, scale=0.1)
    gamma, beta = make(d, shift=1), make(d)
    capacity = F.pad(context, (0, 0, 0, 7), value=NAN)
    count = number(rows, device)

    options = dict(precision="ieee")
    s, stats = linear(
        capacity, output, count=count, residual=F.pad(h, (0, 0, 0, 7), value=NAN),
        want_stats=True, **options,
    )  # fmt: skip
    norm = dict(norm_stats=stats, norm_weight=gamma, norm_bias=beta, eps=1e-5)
    middle = linear(s, up, None, count, **norm, norm_on="x", activation="gelu", **options)
    ours = linear(middle, down, None, count, residual=s, **norm, norm_on="residual", **options)
    assert ours[rows:].isnan().all()

    def exact(context, h, output, up, down, gamma, beta):
        h = F.layer_norm(F.linear(context, output) + h, [d], gamma, beta, 1e-5)
        return h + F.linear(F.gelu(F.linear(h, up)), down)

    check(ours[:rows], exact, context, h, output, up, down, gamma, beta)


@pytest.mark.parametrize("rows", [0, 1, 128, 129, 192, 193, 300])
def test_tiles_by_the_count(make, device, monkeypatch, rows):
    """Two column blocks, so that up to 192 rows are 6 tiles of 64 rows; stats fit both sizes."""
    capacity, k, n = 300, 70, 150
    x, weight, bias = make(capacity, k), make(n, k, scale=k**-0.5), make(n, shift=3)
    x[rows:] = NAN
    ours, stats = [], []
    for few in (6, 0, 999):  # by the count, never, always
        monkeypatch.setattr(module, "FEW_TILES", few)
        options = dict(want_stats=True, precision="ieee")
        out, found = linear(x, weight, bias, number(rows, device), **options)
        check(out[:rows], F.linear, x[:rows], weight, bias)
        assert out[rows:].isnan().all() and found[rows:].isnan().all()
        ours, stats = [*ours, out[:rows]], [*stats, found[:rows]]
    for out, found in zip(ours, stats, strict=True):
        torch.testing.assert_close(out, ours[0], atol=1e-3, rtol=1e-3)
        parts = out.float().split(128, 1)
        total = torch.stack([p.sum(1) for p in parts], 1)
        apart = torch.stack([(p - p.mean(1, True)).square().sum(1) for p in parts], 1)
        torch.testing.assert_close(found, torch.stack([total, apart], 2), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("few", [(999, 0), (0, 999)], ids=["few then many", "many then few"])
def test_stats_of_one_size_of_tiles_read_by_the_other(make, device, monkeypatch, few):
    d, rows = 150, 193
    x, weight, up = make(300, d), make(d, d, scale=0.1), make(70, d, scale=0.1)
    gamma, beta, count = make(d, shift=1), make(d), number(rows, device)
    monkeypatch.setattr(module, "FEW_TILES", few[0])
    s, stats = linear(x, weight, count=count, want_stats=True, precision="ieee")
    monkeypatch.setattr(module, "FEW_TILES", few[1])
    norm = dict(norm_stats=stats, norm_weight=gamma, norm_bias=beta, eps=1e-5, norm_on="x")
    ours = linear(s, up, None, count, precision="ieee", **norm)

    def exact(x, weight, up, gamma, beta):
        return F.linear(F.layer_norm(F.linear(x, weight), [d], gamma, beta, 1e-5), up)

    check(ours[:rows], exact, x[:rows], weight, up, gamma, beta)


@pytest.mark.parametrize("lengths", [[1], [63, 129, 1], [300, 40]])
def test_query_key_value(make, device, lengths):
    """Every second sentence is finished; of the others every third token is active."""
    k, n = 40, 36
    sentence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    in_use = sentence % 2 == 0
    active = (in_use & (torch.arange(len(sentence)) % 3 == 0)).nonzero()[:, 0]
    counts = torch.bincount(sentence[active], minlength=len(lengths))
    cu_active = F.pad(counts.cumsum(0), (1, 0)).to(device)
    listed = F.pad(active, (0, len(sentence) - len(active)), value=-(10**9)).to(device)
    h, wq, wkv = make(len(sentence), k), make(n, k, scale=0.2), make(2 * n, k, scale=0.2)
    bq, bkv = make(n), make(2 * n)
    in_use, active = in_use.to(device), active.to(device)
    h[~in_use] = NAN
    q, kv = query_key_value(
        h, wq, bq, wkv, bkv, listed, cu_active, sentence.to(device), precision="ieee"
    )
    check(q[: len(active)], F.linear, h[active], wq, bq)
    check(kv[in_use], F.linear, h[in_use], wkv, bkv)
    assert q[len(active) :].isnan().all()
    assert kv[~in_use].isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(activation="relu"), "got activation 'relu'"),
        (dict(norm_on="residual"), "without a residual"),
        (dict(norm_on="x"), r"got norm_stats None; expected \[R, 1, 2\]"),
    ],
    ids=str,
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        linear(torch.ones(3, 4), torch.ones(5, 4), **options)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got x \(3, 4\), out \(3, 5\) and weight \(5, 6\)"):
        linear(torch.ones(3, 4), torch.ones(5, 6))


def test_opcheck(device):
    x, weight, out = torch.ones(3, 4), torch.ones(5, 4), torch.ones(3, 5)
    args = [t.to(device) for t in (x, weight)]
    tests = ("test_schema",)  # what traces wants a compiler, not the interpreter
    torch.library.opcheck(linear_._opoverload, (out.to(device), None, *args), test_utils=tests)
