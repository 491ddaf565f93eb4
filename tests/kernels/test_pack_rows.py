import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenexit.kernels import pack_rows as module
from tokenexit.kernels.pack_rows import pack_rows
from tokenexit.kernels.unpack import unpack_

from tokenexit import reference
from tokenexit.packing import word_ids_from_kinds

# More rows, and more cells of one, than a program looks at; of more the interpreter takes a minute.
SHAPES = [(1, 1), (3, 129), (257, 1)] + [(300, 2), (2, 513)] * torch.cuda.is_available()
KINDS = torch.tensor([0, 1, 2, 0, 1, 2, 0], dtype=torch.uint8)
ENDS = 7, 2, 9  # of ids, types and positions
CELL = st.tuples(
    st.sampled_from([0, 1, 1, 5]),
    # What is out of range now and then, at padding or not.
    st.integers(0, 6) | st.sampled_from([2, 2, -1, 7]),
    st.integers(-1, 2) | st.sampled_from([0, -2]),
    st.integers(0, 1) | st.sampled_from([0, 2]),
    st.integers(0, 8) | st.sampled_from([0, 9]),
)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch allocates without filling is the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def step_by_step(mask, ids, word_ids, types, positions, most):
    """Layout, packed lists, and whether all is sound."""
    real, lists, sound = mask != 0, [], bool((mask != 0).any())
    for values, end in zip((ids, types, positions), ENDS, strict=True):
        if values is not None:
            inside = values.clamp(0, end - 1)
            sound &= bool((inside == values)[real].all())
            lists.append(F.pad(inside[real], (0, int((~real).sum()))))
    sound &= int(real.sum(1).max()) <= most
    if word_ids is None:
        word_ids = word_ids_from_kinds(KINDS[ids.clamp(0, 6)], real)
    sound &= bool((word_ids[real] >= -1).all())
    by_token, *others = reference.pack_static(real, word_ids.clamp(-1))
    return torch.cat([by_token, torch.stack(lists)]), *others, torch.tensor(sound)


def check(device, *rows, most=1000):
    truth = step_by_step(*rows, most)
    mask, ids, *given = (x if x is None else x.to(device) for x in rows)
    given.insert(1, KINDS.to(device))
    ours = pack_rows(mask, ids, *given, *ENDS, most)
    for got, wanted in zip(ours, truth, strict=True):
        assert torch.equal(got.cpu(), wanted), (got, wanted)


@settings(
    max_examples=60 if torch.cuda.is_available() else 12,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n), min_size=1)
    ),
    there=st.tuples(*[st.booleans()] * 4),
    most=st.sampled_from([3, 1000]),
)
def test_any_rows(device, monkeypatch, rows, there, most):
    """Gaps in the mask, ids that come again, rows without tokens or words; in blocks of 4."""
    monkeypatch.setattr(module, "_CELLS", 4)
    monkeypatch.setattr(module, "_ROWS", 2)
    mask, ids, *others = torch.tensor(rows).unbind(2)
    is_bool, *given = there
    others = [x if is_there else None for x, is_there in zip(others, given, strict=True)]
    check(device, mask != 0 if is_bool else mask, ids, *others, most=most)


@pytest.mark.parametrize("shape", SHAPES)
def test_many_cells(shape, device):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, shape[1] + 1, (shape[0], 1), generator=generator)
    mask = torch.arange(shape[1]) < lengths
    word_ids = torch.randint(-1, 3, shape, generator=generator).cumsum(1) // 2
    rows = mask, torch.randint(0, 7, shape, generator=generator), word_ids.clamp(-1)
    check(device, *rows, None, None)
    check(device, *(x.T for x in rows), None, None)  # not contiguous
    check(device, *rows[:2], None, None, None)


@pytest.mark.parametrize("labels, cells", [(1, 5), (9, 150)])
def test_back_to_the_padded_batch(labels, cells, device):
    logits = torch.randn(cells + 3, labels, device=device)
    layers = torch.randint(0, 13, (cells + 3,), device=device)
    place = torch.randint(0, cells, (5, cells // 5), device=device)

    def back(logits, sizes, sound=True):
        sound = torch.tensor(sound, device=device)
        results = unpack_(logits, layers, place, torch.tensor(sizes, device=device), sound)
        assert torch.equal(results[0].nan_to_num(7), logits[place].nan_to_num(7))
        assert torch.equal(results[1], layers[place])
        return bool(sound)

    fine = [1.0] * 5
    assert back(logits, fine)
    assert not back(logits, fine, sound=False)
    for worst in (torch.inf, torch.nan):
        assert not back(logits, [*fine, worst])
    logits[place[-1, -1], -1] = torch.nan
    assert not back(logits, fine)


def test_opcheck(device):
    mask, ids = torch.ones(2, 3) > 0, torch.arange(6).view(2, 3)
    args = mask.to(device), ids.to(device), None, KINDS.to(device), None, None, *ENDS, 9
    torch.library.opcheck(pack_rows._opoverload, args, test_utils=("test_schema",))
