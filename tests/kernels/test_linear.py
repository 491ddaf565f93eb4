from functools import partial

import gpu_model
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from assertions import assert_as_exact
from tokenexit.kernels import linear as module
from tokenexit.kernels.linear import linear, linear_, query_key_value, scratch

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


def check(ours, exact, *args):
    """Hold ours against `exact(*args)`, in fp64 and in the dtype of ours."""
    wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    assert_as_exact(ours, exact(*wide), exact(*args))


@pytest.mark.parametrize("rows", [1, 63, 300])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
def test_rows_within_the_count(make, device, rows, activation):
    capacity, k, n = 300, 70, 45
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


def test_gather_scatter_and_residual(make, device):
    x, weight, bias, residual = make(50, 40), make(24, 40, scale=0.2), make(24), make(60, 24)
    gather = torch.randperm(50)[:37].to(device)
    near = torch.randperm(60)[:37].to(device)
    to = torch.randperm(70)[:37].to(device)
    count = number(29, device)
    x[gather[29:]] = NAN
    residual[near[29:]] = NAN
    gather[30:], near[30:], to[30:] = -(10**9), -(10**9), -(10**9)  # an access would crash

    args = (x, weight, bias, gather[:29], residual, near[:29])
    options = dict(residual=residual, residual_gather=near, precision="ieee")
    ours = linear(x, weight, bias, count, gather, **options)
    check(ours[:29], reference.linear, *args)
    assert ours[29:].isnan().all()

    out = torch.full((70, 24), NAN, dtype=x.dtype, device=device)
    stats = torch.full((70, 1, 2), NAN, device=device)
    linear_(out, stats, *scratch(x[:37]), x, weight, bias, count, gather, to, **options)
    assert torch.equal(out[to[:29]], ours[:29])
    torch.testing.assert_close(stats[to[:29]], stats_of(ours[:29]), **of_rounded(ours))
    untouched = torch.ones(70, dtype=torch.bool, device=device)
    untouched[to[:29]] = False
    assert out[untouched].isnan().all() and stats[untouched].isnan().all()


def folded_of(up, bias, gamma, beta):
    up, bias, gamma, beta = (t.float() for t in (up, bias, gamma, beta))
    return torch.stack([up @ gamma, up @ beta + bias])


@pytest.mark.parametrize("rows", [5, 270])
@pytest.mark.parametrize("d", [24, 150])
@pytest.mark.parametrize("gamma_scale", [1, 0])
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
    """Their mean, in deviations, is taken away after the product, not before."""
    d, rows = 150, 40
    h, eye, up = make(rows, d, shift=shift), torch.eye(d, device=device), make(90, d, scale=0.1)
    gamma, beta, bias = make(d, shift=1), make(d), make(90)
    options = dict(norm_weight=gamma, norm_bias=beta, eps=1e-5, precision="ieee")
    y, stats = linear(h, eye.to(h.dtype), want_stats=True, norm_on="out", **options)
    options |= dict(norm_stats=stats, norm_on="x", folded=folded_of(up, bias, gamma, beta))

    def exact(h, up, bias, gamma, beta):
        named = dict(norm_on="x", norm_weight=gamma, norm_bias=beta, eps=1e-5)
        return reference.linear(h, up, bias, **named)

    check(linear(y, up, **options), exact, h, up, bias, gamma, beta)


def stats_of(x):
    """Sum and squared deviations of each block of 128 columns."""
    parts = x.float().split(128, 1)
    apart = [(p - p.mean(1, True)).square().sum(1) for p in parts]
    return torch.stack([torch.stack([p.sum(1) for p in parts], 1), torch.stack(apart, 1)], 2)


def of_rounded(x):
    """Tolerances for stats, which are of sums before these are rounded."""
    times = 8 if x.dtype == torch.bfloat16 else 1  # as coarse as fp16
    return dict(rtol=1e-3 * times, atol=1e-3 if x.dtype == torch.float32 else 3e-2 * times)


@pytest.fixture
def split_into(monkeypatch, device):
    """Makes products split K into so many parts, or as few programs as told share all tiles."""

    def split_into(splits, slots):
        monkeypatch.setattr(module, "multiprocessors", lambda x: slots)
        monkeypatch.setattr(module, "residents", lambda *_: (1, {}))
        monkeypatch.setattr(module, "MOST_SPLITS", splits)

    return split_into


@triton.jit
def _splits_kernel(out_ptr, tiles, steps, slots, MOST: tl.constexpr):
    tl.store(out_ptr, module._splits(tiles, steps, slots, MOST))


@pytest.mark.parametrize(
    ("tiles", "steps", "splits"),
    [
        (0, 12, 1),
        (6, 48, 6),
        (42, 48, 3),
        (42, 12, 3),
        (72, 48, 3),
        (132, 48, 1),
        (192, 48, 1),
        (768, 12, 1),
    ],
)
def test_splits(device, tiles, steps, splits):
    """With 132 slots; 72 tiles in thirds are two rounds of 16 steps, in place of one of 48."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    _splits_kernel[(1,)](out, tiles, steps, 132, 8)
    assert out.item() == gpu_model.splits(tiles, steps, 132, 8) == splits


@pytest.mark.parametrize(
    ("rows", "activation"), [(0, "none"), (1, "gelu"), (128, "none"), (129, "gelu"), (300, "none")]
)
def test_parts_of_a_product(make, device, split_into, rows, activation):
    """Ragged in all sizes; with two column blocks, and more parts than K has steps for at times."""
    capacity, k, n = 300, 800, 150
    x, weight, bias = make(capacity, k), make(n, k, scale=k**-0.5), make(n, shift=3)
    residual = make(capacity, n)
    x[rows:], residual[rows:] = NAN, NAN

    def exact(x, weight, bias, residual):
        return reference.linear(x, weight, bias, residual=residual, activation=activation)

    ours, stats = [], []
    for splits, slots in ((1, 1), (2, 99), (8, 20)):
        split_into(splits, slots)
        split = scratch(x)
        split[0].fill_(NAN)
        for _ in range(1 + (splits == 8)):  # the same scratch serves again
            out, found = linear(
                x, weight, bias, number(rows, device), residual=residual, activation=activation,
                want_stats=True, split=split, precision="ieee",
            )  # fmt: skip
            check(out[:rows], exact, x[:rows], weight, bias, residual[:rows])
            assert out[rows:].isnan().all() and found[rows:].isnan().all()
            assert not split[1].any()
        used = split[0].isfinite().any(1).sum().item()
        assert bool(used) == (rows > 0 and splits > 1)
        ours, stats = [*ours, out[:rows]], [*stats, found[:rows]]
    for out, found in zip(ours, stats, strict=True):
        torch.testing.assert_close(out, ours[0], atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(found, stats_of(out), **of_rounded(out))


def test_parts_with_layer_norms(make, device, split_into):
    """As `up` and `down` have them, both with a long K."""
    k, n, rows, capacity = 900, 140, 70, 300
    wide, narrow = make(capacity, k, shift=1), make(capacity, n, shift=1)
    up, down, count = make(n, k, scale=0.1), make(n, k, scale=0.1), number(rows, device)
    gamma, beta, bias = make(k, shift=1), make(k), make(n)
    split_into(8, 99)

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


def test_residents(monkeypatch):
    """Two large programs on Hopper's multiprocessors, and scratch for as many."""
    x = torch.ones(300, 8, dtype=torch.float16)
    small, large = module.tiles_of(9, 2), module.tiles_of(300, 2)
    assert module.residents(x, large) == (1, {}) and module.residents(x, small) == (4, {})
    assert len(scratch(x)[0]) == 2 * module.multiprocessors(x)
    monkeypatch.setattr(module, "on_hopper", lambda x: True)
    assert module.residents(x, large, "x") == (2, {"maxnreg": 128})
    assert module.residents(x, large, "residual") == (1, {})
    assert module.residents(x, small) == (4, {})
    assert len(scratch(x)[0]) == len(scratch(x)[1]) == 4 * module.multiprocessors(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(activation="relu"), "got activation 'relu'"),
        (dict(norm_on="residual"), "without a residual"),
        (dict(norm_on="out"), "got norm_on 'out' without norm_weight and norm_bias"),
        (dict(norm_on="x"), "expected it with folded, without bias and residual"),
        (
            dict(norm_on="x", folded=torch.ones(2, 5)),
            r"got norm_stats None; expected \[R, 1, 2\]",
        ),
        (
            dict(split=(torch.ones(4, 1024), torch.zeros(4).int())),
            r"got parts \(4, 1024\) and arrived \(4,\); expected at least \(\d+, 1024\) and \(\d",
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
    torch.library.opcheck(
        linear_._opoverload, (out.to(device), None, *scratch(args[0]), *args), test_utils=tests
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [100, 819, 1500])
def test_same_bits_each_time(rows):
    """Parts arrive in another order each time, and are added up in theirs."""
    torch.manual_seed(0)
    x = torch.randn(8192, 3072, device="cuda", dtype=torch.float16)
    weight, split = torch.randn(768, 3072, device="cuda", dtype=torch.float16), scratch(x)
    options = dict(count=number(rows, "cuda"), want_stats=True, split=split)
    first = [value[:rows] for value in linear(x, weight, **options)]
    for _ in range(100):
        ours = linear(x, weight, **options)
        assert all(torch.equal(a, b[:rows]) for a, b in zip(first, ours, strict=True))
    assert not split[1].any()
