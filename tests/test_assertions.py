"""The rule that results are held by finds what it should."""

import pytest
import torch
from assertions import ATOL, FACTOR, assert_as_exact


@pytest.fixture
def results():
    """Truth, and it rounded to fp32, of which no element is much smaller than the largest."""
    truth = torch.linspace(1, 3, 600, dtype=torch.float64).view(20, 30)
    return truth, truth.float()


def test_rounding_passes(results):
    truth, plain = results
    assert_as_exact(plain, truth, plain)
    assert_as_exact(plain + 2e-6, truth, plain, scale=3)
    assert_as_exact(plain[:0], truth[:0], plain[:0])


@pytest.mark.parametrize("error", [1e-5, -1e-5, 1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 299, 599])
def test_an_error_in_one_element_is_found(results, at, error):
    truth, plain = results
    ours = plain.clone()
    ours.view(-1)[at] += error
    with pytest.raises(AssertionError, match=rf"name: 1 of 600 elements; the worst, number {at},"):
        assert_as_exact(ours, truth, plain, name="name")


def test_an_element_is_excused_by_its_own_plain_result_only(results):
    """Plain PyTorch far off in one place says nothing about another."""
    truth, plain = results
    plain, ours = plain.clone(), plain.clone()
    plain[3, 4] += 0.5
    ours[3, 4] -= 0.5 * FACTOR["forward"] * 0.99
    assert_as_exact(ours, truth, plain)
    ours[3, 5] += 1e-3
    with pytest.raises(AssertionError, match="1 of 600 elements; the worst, number 95"):
        assert_as_exact(ours, truth, plain)
    assert_as_exact(plain, truth, plain)


@pytest.mark.parametrize("dtype", ATOL, ids=str)
def test_a_sum_of_nothing_is_judged_by_its_terms(dtype):
    """Terms that cancel leave rounding of their size, which the true sum, 0, does not tell."""
    zero = torch.zeros(5, dtype=torch.float64)
    plain = zero.to(dtype)
    ours = plain + 100 * ATOL[dtype] / 2
    with pytest.raises(AssertionError, match="5 of 5"):
        assert_as_exact(ours, zero, plain)
    assert_as_exact(ours, zero, plain, scale=100)
    sizes = torch.tensor([100.0, 100.0, 1.0, 100.0, 100.0])
    with pytest.raises(AssertionError, match="1 of 5 elements; the worst, number 2"):
        assert_as_exact(ours, zero, plain, scale=sizes)


def test_shapes_have_to_be_equal(results):
    truth, plain = results
    with pytest.raises(AssertionError, match=r"\[30\]"):
        assert_as_exact(plain[0], truth, plain)


def test_kinds(results):
    truth, plain = results
    ours, plain = plain + 2.5, plain + 1
    assert_as_exact(ours, truth, plain, "backward")
    with pytest.raises(AssertionError):
        assert_as_exact(ours, truth, plain, "forward")
