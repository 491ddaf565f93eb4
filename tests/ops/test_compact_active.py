import ctypes
import random
from pathlib import Path

import pytest
import torch
from cpp import built, needs_compiler

from tokenexit.ops import compiled_devices, extension_available, extension_error
from tokenexit.ops.compact_active import compact_active

compiled = pytest.mark.skipif(not extension_available(), reason=str(extension_error()))
BACKENDS = [
    pytest.param("auto", "cpu", id="auto"),
    pytest.param("reference", "cpu", id="reference"),
    pytest.param(
        "auto",
        "cuda",
        id="cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not torch.cuda.is_available() or "cuda" not in compiled_devices("compact_active"),
                reason="needs a GPU and the op compiled for it",
            ),
        ],
    ),
]
LENGTHS = [[1], [63], [129], [1, 1, 1], [5, 0, 129, 1, 63, 2], [0, 0], [2] * 1100]


def make_args(lengths, exit_rate, seed=0, specials=2, unlisted=0):
    """Sentences of so many words, of one to three pieces each, between special tokens.

    A first draw of exits has been compacted away, by a loop; `exit_layer` is the second one.
    """
    rng = random.Random(seed)
    word_of_token, cu_tokens, num_words = [], [0], 0
    for length in lengths:
        word_of_token += [-1] * (specials > 0)
        for _ in range(length):
            word_of_token += [num_words] * rng.randint(1, 3)
            num_words += 1
        word_of_token += [-1] * (specials > 1)
        cu_tokens.append(len(word_of_token))
    first = [int(rng.random() < exit_rate / 2) for _ in range(num_words)]
    every = list(range(len(word_of_token)))
    active, cu_active = compact_by_loop(every, cu_tokens, word_of_token, first)
    exit_layer = [layer or 2 * int(rng.random() < exit_rate) for layer in first]
    active = active[: cu_active[-1]] + [-7] * unlisted  # what is not listed must not be read
    return tuple(
        torch.tensor(values, dtype=torch.int64)
        for values in (active, cu_active, word_of_token, exit_layer)
    )


def compact_by_loop(active, cu_active, word_of_token, exit_layer):
    """What the op does, a token at a time, in lists."""
    kept, cu_kept = [], [0]
    for first, last in zip(cu_active[:-1], cu_active[1:], strict=True):
        words = [word_of_token[t] for t in active[first:last]]
        open_ = any(w >= 0 and exit_layer[w] == 0 for w in words)
        for t in active[first:last]:
            w = word_of_token[t]
            if (w < 0 and open_) or (w >= 0 and exit_layer[w] == 0):
                kept.append(t)
        cu_kept.append(len(kept))
    return kept + [0] * (len(active) - len(kept)), cu_kept


def seen_by_loop(cu_kept, cu_tokens, num_tokens):
    seen, cu_seen = [], [0]
    for b, (first, last) in enumerate(zip(cu_tokens[:-1], cu_tokens[1:], strict=True)):
        seen += range(first, last) if cu_kept[b + 1] > cu_kept[b] else ()
        cu_seen.append(len(seen))
    return seen + [0] * (num_tokens - len(seen)), cu_seen


def offsets_of_sentences(args):
    """Each sentence ends after its last token in the list; what follows belongs to the last one."""
    active, cu_active, word_of_token, _ = (a.tolist() for a in args)
    ends = [max(active[:last], default=-1) + 1 for last in cu_active]
    return torch.tensor([*ends[:-1], len(word_of_token)] if len(ends) > 1 else [0])


def assert_compacts_right(args, backend, device):
    expected = compact_by_loop(*(a.tolist() for a in args))
    cu_tokens = offsets_of_sentences(args)
    seen = seen_by_loop(expected[1], cu_tokens.tolist(), len(args[2]))
    args, cu_tokens = [a.to(device) for a in args], cu_tokens.to(device)
    scratch = torch.zeros(len(cu_tokens) // 8 + 3, dtype=torch.int64, device=device)
    for _ in range(2):  # with the same scratch
        ours = compact_active(*args, cu_tokens, scratch, backend=backend)
        assert [o.tolist() for o in ours] == [*expected, *seen]
        assert all(o.dtype == torch.int64 and o.device.type == device for o in ours)
        assert not scratch.any()
    for same, one in zip(compact_active(*args, backend=backend), ours[:2], strict=True):
        assert torch.equal(same, one)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("exit_rate", [0, 0.5, 0.9, 1], ids="exit_rate={}".format)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda v: str(v)[:20])
def test_matches_a_loop(lengths, exit_rate, backend, device):
    assert_compacts_right(make_args(lengths, exit_rate), backend, device)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("specials", [0, 1, 2])
@pytest.mark.parametrize("unlisted", [0, 13])
def test_special_tokens_and_unlisted_entries(unlisted, specials, backend, device):
    for seed in range(20):
        args = make_args([7, 0, 33, 1], 0.6, seed, specials, unlisted)
        assert_compacts_right(args, backend, device)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_one_active_word_keeps_its_pieces_and_the_special_tokens(backend, device):
    word_of_token = torch.tensor([-1, 0, 0, 1, 2, -1, -1, 3, 4, -1], device=device)
    exit_layer = torch.tensor([0, 1, 1, 1, 1], device=device)
    active = torch.arange(10, device=device)
    cu_active = torch.tensor([0, 6, 10], device=device)
    kept, cu_kept = compact_active(active, cu_active, word_of_token, exit_layer, backend=backend)
    assert kept.tolist() == [0, 1, 2, 5, 0, 0, 0, 0, 0, 0]
    assert cu_kept.tolist() == [0, 4, 4]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_no_sentences(backend, device):
    empty = torch.empty(0, dtype=torch.int64)
    args = (empty, torch.zeros(1, dtype=torch.int64), empty, empty)
    assert_compacts_right(args, backend, device)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_arguments_stay_as_they_are(backend, device):
    args = [a.to(device) for a in make_args([9, 4], 0.0)]
    before = [a.clone() for a in args]
    for result in compact_active(*args, backend=backend):
        result.fill_(-5)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@compiled
def test_strided_arguments():
    args = make_args([9, 4], 0.5)
    strided = [torch.stack([a, a], -1)[..., 0] for a in args]
    for ours, expected in zip(compact_active(*strided), compact_active(*args), strict=True):
        assert torch.equal(ours, expected)


@compiled
def test_same_result_on_any_number_of_threads():
    args = make_args([63] * 200, 0.5)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(compact_active(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@compiled
def test_opcheck():
    args = make_args([5, 0, 9], 0.5, unlisted=3)
    torch.library.opcheck(torch.ops.tokenexit.compact_active.default, args)
    args = *args, offsets_of_sentences(args), torch.zeros(9).long()
    torch.library.opcheck(torch.ops.tokenexit.compact_active.default, args)


@compiled
def test_traced_without_graph_breaks():
    args = make_args([5, 0, 9], 0.5)
    traced = torch.compile(compact_active, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(traced(*args), compact_active(*args), strict=True):
        assert torch.equal(ours, expected)


def changed(index, value):
    args = list(make_args([5, 9], 0.5))
    args[index] = value
    return args


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (changed(0, torch.zeros(3)), TypeError, "active of torch.float32; expected torch.int64"),
        (changed(0, torch.zeros(3, 1).long()), ValueError, r"active \[3, 1\]; expected \[3\]"),
        (changed(1, torch.zeros(0).long()), ValueError, "empty cu_active"),
        (changed(1, torch.zeros(3).int()), TypeError, "cu_active of torch.int32"),
        (changed(2, torch.zeros(3).int()), TypeError, "word_of_token of torch.int32"),
        (changed(3, torch.zeros(3, device="meta").long()), ValueError, "on meta; expected cpu"),
        (
            [*make_args([5, 9], 0.5), torch.zeros(2).long()],
            ValueError,
            r"cu_tokens \[2\]; expected",
        ),
        ([*make_args([5], 0.5), None, torch.zeros(2)], TypeError, "scratch of torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(args, error, message):
    with pytest.raises(error, match=message):
        compact_active(*args)


def test_unknown_backend():
    with pytest.raises(ValueError, match="got backend 'triton'; expected"):
        compact_active(*make_args([5], 0.5), backend="triton")


@compiled
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (changed(0, torch.full((99,), 99)), "got token 99 of"),
        (changed(0, torch.full((99,), -1)), "got token -1 of"),
        (changed(1, torch.tensor([0, 2, 99])), "cu_active ends at 99; expected at most"),
        (changed(1, torch.tensor([0, 99, 2])), "cu_active falls from 99 to 2 at sentence 1"),
        (changed(1, torch.tensor([1, 2, 2])), "cu_active starts at 1; expected 0"),
        (changed(3, torch.zeros(2).long()), "got word 2 of 2"),
        ([*make_args([5, 9], 0.5), torch.tensor([0, 9, 99])], "cu_tokens ends at 99; expected at"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_out_of_range(args, message):
    with pytest.raises(RuntimeError, match=message):
        compact_active(*args)


LOOK_BACK = """
#include "active.h"
using namespace tokenexit;

// The sum before `tile`, as a warp of the GPU takes it, 32 tiles at a time; told: which are summed.
extern "C" int64_t sum_before(const int64_t* counts, const bool* told, int64_t tile) {
  int64_t sum = 0;
  uint32_t summed = 0;
  for (int64_t nearest = tile - 1; nearest >= 0 && summed == 0; nearest -= 32) {
    uint64_t states[32];
    for (int lane = 0; lane < 32; ++lane) {
      states[lane] = kSummed;
      if (nearest >= lane) {
        int64_t up_to = 0;
        for (int64_t t = 0; t <= nearest - lane; ++t) up_to += counts[t];
        const bool all = told[nearest - lane];
        states[lane] = all ? kSummed | up_to : kCounted | counts[nearest - lane];
      }
      summed |= uint32_t(is_summed(states[lane])) << lane;
    }
    for (int lane = 0; lane < 32; ++lane) sum += looked_back(states[lane], lane, summed);
  }
  return sum;
}
extern "C" int64_t of_both(int64_t kept, int64_t seen, bool second) {
  return second ? seen_of(both(kept, seen)) : kept_of(both(kept, seen));
}
extern "C" int64_t kept(int64_t of_words, int64_t specials) { return num_kept(of_words, specials); }
"""


@needs_compiler
def test_arithmetic_shared_with_the_gpu(tmp_path):
    """Look-backs over tiles that are told of as their counts or as sums, whichever came first."""
    (tmp_path / "look_back.cpp").write_text(LOOK_BACK)
    flags = "-std=c++17", "-Wall", "-Werror"
    shared = built([tmp_path / "look_back.cpp"], tmp_path / "look_back.so", *flags)
    shared.sum_before.restype = shared.kept.restype = shared.of_both.restype = ctypes.c_int64
    for pair in ((0, 0), (5, 7), (2**31 - 1, 0), (0, 2**31 - 1), (2**31 - 1, 2**31 - 1)):
        numbers = [ctypes.c_int64(n) for n in pair]
        assert tuple(shared.of_both(*numbers, second) for second in (False, True)) == pair
    for words, specials in ((0, 2), (1, 2), (5, 0)):
        expected = words + specials if words else 0
        assert shared.kept(ctypes.c_int64(words), ctypes.c_int64(specials)) == expected

    rng = random.Random(0)
    for size in (1, 2, 31, 32, 33, 64, 65, 200):
        for rate in (0, 0.02, 0.5, 1):
            counts = [rng.choice((0, rng.randrange(2**40))) for _ in range(size)]
            told = [
                t == 0 or rng.random() < rate for t in range(size)
            ]  # the first is a sum at once
            arrays = (ctypes.c_int64 * size)(*counts), (ctypes.c_bool * size)(*told)
            for tile in {0, size // 2, size - 1}:
                assert shared.sum_before(*arrays, ctypes.c_int64(tile)) == sum(counts[:tile])


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The CUDA kernel on a CPU: blocks are processes, and threads threads."""
    here = Path(__file__).parent / "simt"
    library = tmp_path_factory.mktemp("simt") / "compact_active.so"
    flags = f"-I{here}", "-std=c++20", "-O1", "-pthread"
    return built([here / "compact_active.cpp"], library, *flags).run


@needs_compiler
@pytest.mark.parametrize("exit_rate", [0, 0.6, 1], ids="exit_rate={}".format)
@pytest.mark.parametrize("lengths", [[], [40], [0, 5, 1, 30] * 6, [2] * 80], ids=lambda v: len(v))
def test_the_cuda_kernel_on_a_cpu(lengths, exit_rate, simulated):
    """As many blocks as there, at the same time; a second launch with what the first one left."""
    args = make_args(lengths, exit_rate, unlisted=3)
    cu_tokens = offsets_of_sentences(args)
    expected = compact_by_loop(*(a.tolist() for a in args))
    wanted = [*expected, *seen_by_loop(expected[1], cu_tokens.tolist(), len(args[2]))]
    outputs = [torch.full((len(values),), -5) for values in wanted]
    states = torch.full((-(-len(lengths) // 8) + 2 + (not lengths),), -5)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*args, cu_tokens, *outputs, states)]
    sizes = [ctypes.c_int64(n) for n in (len(args[0]), len(args[2]), len(lengths), 2)]
    assert simulated(*pointers, *sizes)
    assert [o.tolist() for o in outputs] == wanted
    assert not states.any()
