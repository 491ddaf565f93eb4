from functools import partial

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact
from tokenexit.kernels import linear as module
from tokenexit.kernels.linear import descriptor, is_wide, linear, linear_, query_key_value

from tokenexit import reference

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


def check(ours, exact, *args, **allowed):
    """Hold ours against `exact(*args)`, in fp64 and in the dtype of ours."""
    wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    assert_as_exact(ours, exact(*wide), exact(*args), **allowed)


@pytest.mark.parametrize("rows", [1, 63, 300])
@pytest.mark.parametrize("k, n", [(70, 64), (72, 45)])  # one is cut by tiles; 72 by TMA in 16 bits
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
def test_rows_within_the_count(make, device, rows, k, n, activation):
    capacity = 300
    x, weight, bias = make(capacity, k), make(n, k, scale=k**-0.5), make(n)
    x[rows:] = NAN
    ours = linear(x, weight, bias, number(rows, device), activation=activation, precision="ieee")
    assert ours[rows:].isnan().all()
    exact = partial(reference.linear, activation=activation)
    check(ours[:rows], exact, x[:rows], weight, bias)


def test_no_rows_and_all_rows(make, device):
    x, weight = make(33, 16), make(20, 16)
    assert linear(x, weight, count=number(0, device)).isnan().all()
    check(linear(x, weight, precision="ieee"), F.linear, x, weight)
    check(linear(x, weight, count=number(99, device), precision="ieee"), F.linear, x, weight)
    assert linear(x[:0], weight).shape == (0, 20)


def test_residual_and_stats(make, device):
    x, weight, bias, residual = make(50, 40), make(24, 40, scale=0.2), make(24), make(60, 24)
    near, count = torch.randperm(60)[:50].to(device), number(29, device)
    x[29:], residual[near[29:]] = NAN, NAN
    near[30:] = -(10**9)  # an access would crash
    options = dict(residual=residual, residual_gather=near, want_stats=True, precision="ieee")
    ours, stats = linear(x, weight, bias, count, **options)
    check(ours[:29], reference.linear, x[:29], weight, bias, residual, near[:29])
    torch.testing.assert_close(stats[:29], stats_of(ours[:29], stats), **of_rounded(ours))
    assert ours[29:].isnan().all() and stats[29:].isnan().all()


def folded_of(up, bias, gamma, beta):
    up, bias, gamma, beta = (t.float() for t in (up, bias, gamma, beta))
    return torch.stack([up @ gamma, up @ beta + bias])


@pytest.mark.parametrize(
    "rows, d, gamma_scale", [(5, 24, 0), (5, 150, 1), (270, 24, 1), (90, 150, 0)]
)
def test_layer_norm_on_the_way(make, device, rows, d, gamma_scale):
    """The feed-forward part of a layer: LayerNorm before it and on its residual."""
    wide = 2 * d
    context, h = make(rows, d), make(rows, d, scale=2, shift=5)
    output, up, down = make(d, d, scale=0.1), make(wide, d, scale=0.1), make(d, wide, scale=0.1)
    gamma, beta, bias = make(d, shift=1) * gamma_scale, make(d), make(wide)
    capacity = F.pad(context, (0, 0, 0, 7), value=NAN)
    count = number(rows, device)

    options = dict(norm_weight=gamma, norm_bias=beta, eps=1e-5, precision="ieee")
    y, stats = linear(
        capacity, output, count=count, residual=F.pad(h, (0, 0, 0, 7), value=NAN),
        want_stats=True, norm_on="out", **options,
    )  # fmt: skip
    options["norm_stats"] = stats
    folded = folded_of(up, bias, gamma, beta)
    middle = linear(y, up, count=count, norm_on="x", folded=folded, activation="gelu", **options)
    ours = linear(middle, down, None, count, residual=y, norm_on="residual", **options)
    assert ours[rows:].isnan().all()

    def exact(context, h, output, up, bias, down, gamma, beta):
        h = F.layer_norm(F.linear(context, output) + h, [d], gamma, beta, 1e-5)
        return h + F.linear(F.gelu(F.linear(h, up, bias)), down)

    check(ours[:rows], exact, context, h, output, up, bias, down, gamma, beta)


@pytest.mark.parametrize("shift", [0, 5])
def test_rows_off_zero_are_normalized_as_exactly(make, device, shift):
    """But for what their mean adds to what is summed: it goes after the product, not before."""
    d, rows = 150, 40
    h, eye, up = make(rows, d, shift=shift), torch.eye(d, device=device), make(90, d, scale=0.1)
    gamma, beta, bias = make(d, shift=1), make(d), make(90)
    options = dict(norm_weight=gamma, norm_bias=beta, eps=1e-5, precision="ieee")
    y, stats = linear(h, eye.to(h.dtype), want_stats=True, norm_on="out", **options)
    options |= dict(norm_stats=stats, norm_on="x", folded=folded_of(up, bias, gamma, beta))

    def exact(h, up, bias, gamma, beta):
        named = dict(norm_on="x", norm_weight=gamma, norm_bias=beta, eps=1e-5)
        return reference.linear(h, up, bias, **named)

    size = (1 + shift) * exact(h, up, bias, gamma, beta).abs().max().double()
    check(linear(y, up, **options), exact, h, up, bias, gamma, beta, scale=size)


def stats_of(x, like=None):
    """Sum and squared deviations of each block of columns; of as many blocks as others have."""
    parts = x.float().split(64 if like is None else module.stats_block(like, x.shape[1]), 1)
    apart = [(p - p.mean(1, True)).square().sum(1) for p in parts]
    return torch.stack([torch.stack([p.sum(1) for p in parts], 1), torch.stack(apart, 1)], 2)


def of_rounded(x):
    """Tolerances for stats, which are of sums before these are rounded."""
    times = 8 if x.dtype == torch.bfloat16 else 1  # as coarse as fp16
    return dict(rtol=1e-3 * times, atol=1e-3 if x.dtype == torch.float32 else 3e-2 * times)


@pytest.mark.parametrize("rows", [0, 1, 128, 300])
def test_few_programs_take_all_tiles(make, device, monkeypatch, rows):
    """In turn, with tiles of two blocks of columns."""
    capacity, k, n = 300, 136, 300
    x, weight, bias = make(capacity, k), make(n, k, scale=k**-0.5), make(n, shift=3)
    residual = make(capacity, n)
    x[rows:], residual[rows:] = NAN, NAN
    monkeypatch.setattr(module, "multiprocessors", lambda x: 2)
    options = dict(residual=residual, activation="gelu", want_stats=True, precision="ieee")
    out, stats = linear(x, weight, bias, number(rows, device), **options)

    def exact(x, weight, bias, residual):
        return reference.linear(x, weight, bias, residual=residual, activation="gelu")

    check(out[:rows], exact, x[:rows], weight, bias, residual[:rows])
    torch.testing.assert_close(stats[:rows], stats_of(out[:rows], stats), **of_rounded(out))
    assert out[rows:].isnan().all() and stats[rows:].isnan().all()


def test_layer_norms_of_long_rows(make, device):
    """As `up` and `down` have them, both with a long K."""
    k, n, rows, capacity = 904, 136, 70, 300
    wide, narrow = make(capacity, k, shift=1), make(capacity, n, shift=1)
    up, down, count = make(n, k, scale=0.1), make(n, k, scale=0.1), number(rows, device)
    gamma, beta, bias = make(k, shift=1), make(k), make(n)

    def norm(x, d, on):
        named = dict(norm_stats=stats_of(x), norm_weight=gamma[:d], norm_bias=beta[:d], eps=1e-5)
        return named | dict(norm_on=on, precision="ieee")

    options = norm(wide, k, "x") | dict(folded=folded_of(up, bias, gamma, beta))
    ours = linear(wide * gamma, up, count=count, activation="gelu", **options)

    def first(x, up, bias, gamma, beta):
        return F.gelu(F.linear(F.layer_norm(x, [k], gamma, beta, 1e-5), up, bias))

    check(ours[:rows], first, wide[:rows], up, bias, gamma, beta)
    near = narrow * gamma[:n]
    ours = linear(wide, down, None, count, residual=near, **norm(narrow, n, "residual"))

    def second(x, narrow, down, gamma, beta):
        named = dict(norm_on="residual", norm_weight=gamma, norm_bias=beta, eps=1e-5)
        return reference.linear(x, down, residual=narrow, **named)

    check(ours[:rows], second, wide[:rows], narrow[:rows], down, gamma[:n], beta[:n])


@pytest.mark.parametrize("lengths", [[1], [63, 129, 1], [300, 40]])
def test_query_key_value(make, device, lengths):
    """Every second sentence is finished; of the others every third token is active."""
    k, n = 40, 36
    sentence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    in_use = sentence % 2 == 0
    active = (in_use & (torch.arange(len(sentence)) % 3 == 0)).nonzero()[:, 0]
    seen, lists = in_use.nonzero()[:, 0], []
    for rows in (active, seen):
        counts = torch.bincount(sentence[rows], minlength=len(lengths))
        listed = F.pad(rows, (0, len(sentence) - len(rows)), value=-(10**9))
        lists += [listed.to(device), F.pad(counts.cumsum(0), (1, 0)).to(device)]
    h, wq, wkv = make(len(sentence), k), make(n, k, scale=0.2), make(2 * n, k, scale=0.2)
    bq, bkv, up, bias = make(n), make(2 * n), make(50, k, scale=0.2), make(50)
    gamma, beta = make(k, shift=1), make(k)
    active, seen = active.to(device), seen.to(device)
    h[~in_use] = NAN
    rest = *lists, gamma, beta, up, bias
    args = h, wq, bq, wkv, bkv, *rest
    q, kv, folded = query_key_value(*args, precision="ieee")
    torch.testing.assert_close(folded, folded_of(up, bias, gamma, beta), atol=1e-5, rtol=1e-5)
    for i, ours in enumerate((q[: len(active)], kv[: len(seen)])):
        check(ours, lambda *args, i=i: reference.query_key_value(*args)[i], *args)
    truth = reference.query_key_value(*(a.double() if a.is_floating_point() else a for a in args))
    torch.testing.assert_close(folded.double(), truth[2], atol=1e-5, rtol=1e-5)
    assert q[len(active) :].isnan().all() and kv[len(seen) :].isnan().all()


def test_copies_by_tiles_want_rows_on_16_bytes(device):
    flat = torch.zeros(40 * 72 + 8, dtype=torch.float16, device=device)
    for start, width, fits in ((0, 72, True), (8, 72, True), (1, 72, False), (0, 70, False)):
        rows = flat[start : start + 40 * width].view(40, width)
        assert (descriptor(rows, 16, 16) is not None) == (fits and is_wide(flat))
        assert descriptor(rows.float(), 16, 16) is None
    assert descriptor(flat[:0].view(0, 72), 16, 16) is None


def test_all_rows_are_those_listed(make, device):
    """Without lists, all tokens in their order, as if they were listed."""
    h, wq, wkv = make(300, 40), make(40, 40, scale=0.2), make(80, 40, scale=0.2)
    bq, bkv, up, bias = make(40), make(80), make(48, 40, scale=0.2), make(48)
    every, cu = torch.arange(300, device=device), torch.tensor([0, 200, 290], device=device)
    h[290:] = NAN
    norm = make(40, shift=1), make(40), up, bias
    listed, unlisted = (
        query_key_value(h, wq, bq, wkv, bkv, rows, cu, rows, cu, *norm, precision="ieee")
        for rows in (every, None)
    )
    for a, b in zip(listed, unlisted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert unlisted[0][290:].isnan().all() and not unlisted[0][:290].isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(activation="relu"), "got activation 'relu'"),
        (dict(norm_on="residual"), "without a residual"),
        (dict(norm_on="out"), "got norm_on 'out' without norm_weight and norm_bias"),
        (dict(norm_on="x"), "expected it with folded, without bias and residual"),
        (
            dict(norm_on="x", folded=torch.ones(2, 5)),
            r"got norm_stats None; expected those of its rows, \[R, blocks, 2\]",
        ),
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [100, 819, 1500])
def test_same_bits_each_time(rows):
    torch.manual_seed(0)
    x = torch.randn(8192, 3072, device="cuda", dtype=torch.float16)
    weight = torch.randn(768, 3072, device="cuda", dtype=torch.float16)
    options = dict(count=number(rows, "cuda"), want_stats=True)
    first = [value[:rows] for value in linear(x, weight, **options)]
    for _ in range(100):
        ours = linear(x, weight, **options)
        assert all(torch.equal(a, b[:rows]) for a, b in zip(first, ours, strict=True))
