import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_exact
from tokenexit.kernels.embed import embed

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def exact(ids, positions, types, word, position, token_type, weight, bias, eps):
    total = word[ids]
    for table, index in ((position, positions), (token_type, types)):
        if table is not None:
            total = total + table[torch.zeros_like(ids) if index is None else index]
    return F.layer_norm(total, weight.shape, weight, bias, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has", ["all", "types 0", "no types", "words alone"])
@pytest.mark.parametrize(("rows", "d"), [(1, 24), (63, 384), (129, 1025)])
def test_embeddings(rows, d, has, dtype, device, poisoned):
    torch.manual_seed(0)
    ids, positions, types = (torch.randint(0, n, (rows,)).to(device) for n in (50, 40, 2))
    tables = [torch.randn(n, d).to(device, dtype) for n in (50, 40, 2)]
    types = types if has == "all" else None
    tables[2] = None if has in ("no types", "words alone") else tables[2]
    tables[1] = None if has == "words alone" else tables[1]
    norm = [torch.randn(d).to(device, dtype) for _ in range(2)]
    args = ids, positions, types, *tables, *norm
    plain = exact(*args, 1e-5)
    truth = exact(
        *(x.double() if x is not None and x.is_floating_point() else x for x in args), 1e-5
    )
    assert_as_exact(embed(*args, 1e-5), truth, plain)
    count = rows // 2
    got = embed(*args, 1e-5, torch.tensor([count], device=device))
    assert torch.equal(got[:count], embed(*args, 1e-5)[:count]) and got[count:].isnan().all()


def test_no_rows(device):
    ids, table = torch.empty(0, device=device).long(), torch.ones(3, 4, device=device)
    assert embed(ids, ids, None, table, None, None, table[0], table[0]).shape == (0, 4)
