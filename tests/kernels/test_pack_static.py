import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenexit.kernels import pack_static as module
from tokenexit.kernels.pack_static import pack_static

from tokenexit import reference

# More rows, and more cells of one, than a program looks at; of more the interpreter takes a minute.
SHAPES = [(1, 1), (3, 129), (257, 1)] + [(300, 2), (2, 513)] * torch.cuda.is_available()
CELL = st.tuples(st.booleans(), st.integers(-1, 2))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch allocates without filling is the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(mask, word_ids):
    ours, truth = pack_static(mask, word_ids), reference.pack_static(mask, word_ids)
    mask, total = mask.cpu(), int(truth[1][1, -1])
    *ours, place = (t.cpu() for t in ours)
    *truth, where = (t.cpu() for t in truth)
    for got, wanted in zip(ours, truth, strict=True):
        assert torch.equal(got, wanted), (got, wanted)
    assert (ours[2][total:] == 0).all()
    assert torch.equal(place, where)


@settings(
    max_examples=40 if torch.cuda.is_available() else 12,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rows=st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n))))
def test_any_rows(device, monkeypatch, rows):
    """Gaps in the mask, ids that come again, rows without tokens or words; in blocks of 4."""
    monkeypatch.setattr(module, "_CELLS", 4)
    monkeypatch.setattr(module, "_ROWS", 2)
    cells = torch.tensor(rows, dtype=torch.int64).view(len(rows), len(rows[0]) if rows else 1, 2)
    check((cells[..., 0] != 0).to(device), cells[..., 1].to(device))


@pytest.mark.parametrize("shape", SHAPES)
def test_many_cells(shape, device):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, shape[1] + 1, (shape[0], 1), generator=generator)
    mask = torch.arange(shape[1]) < lengths
    word_ids = torch.randint(-1, 3, shape, generator=generator).cumsum(1) // 2
    check(mask.to(device), word_ids.to(device))
    check(mask.to(device).T, word_ids.to(device).T)  # not contiguous


def test_opcheck(device):
    mask, word_ids = torch.ones(2, 3) > 0, torch.arange(6).view(2, 3)
    args = mask.to(device), word_ids.to(device)
    torch.library.opcheck(pack_static._opoverload, args, test_utils=("test_schema",))
