"""The measuring kernels against float64 oracles."""

import math

import pytest
import torch
from fxcache.kernels import forecast, residual_diff
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def oracle(h_out, h_in, reference):
    """float64 sums of the residual as it is stored: rounded to its dtype."""
    residual = (h_out if h_in is None else h_out - h_in).double()
    change = (residual - reference.double()).abs().flatten(1).sum(1)
    return torch.stack([change, reference.double().abs().flatten(1).sum(1)], 1)


def assert_sums(sums, expected, terms):
    """A float32 sum of n terms is off by at most n * eps, relative."""
    bound = max(terms, 8) * torch.finfo(torch.float32).eps
    assert ((sums - expected).abs() <= bound * expected.abs() + 1e-30).all()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    dtype=st.sampled_from(DTYPES),
    bare=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_residual_diff(shape, dtype, bare, seed):
    torch.manual_seed(seed)
    h_out, h_in, reference = (torch.randn(shape).to(dtype) for _ in range(3))
    h_in = None if bare else h_in
    sums = residual_diff(h_out, h_in, reference)
    assert sums.dtype == torch.float32
    assert sums.shape == (shape[0], 2)
    assert_sums(sums, oracle(h_out, h_in, reference), math.prod(shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unchanged_residual_measures_exactly_zero(dtype):
    h_out, h_in = torch.randn(2, 5, 7).to(dtype), torch.randn(2, 5, 7).to(dtype)
    assert (residual_diff(h_out, h_in, h_out - h_in)[:, 0] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_sample(bad, where):
    operands = [torch.randn(2, 5, 7) for _ in range(3)]
    operands[where][0, 3, 2] = bad
    sums = residual_diff(*operands)
    assert not sums[0].isfinite().all()
    assert sums[1].isfinite().all()


def test_strided_tensors():
    h_out, h_in, reference = (torch.randn(2, 7, 5).transpose(1, 2) for _ in range(3))
    sums = residual_diff(h_out, h_in, reference)
    assert_sums(sums, oracle(h_out, h_in, reference), 35)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ring", [1, 2, 5])
def test_forecast(dtype, ring):
    before = torch.randn(2, 5, 7).to(dtype)
    past = [torch.randn(2, 5, 7).to(dtype) for _ in range(ring)]
    weights = torch.randn(ring)
    for base in (before, None):
        result = forecast(base, past, weights)
        exact = sum(w.double() * r.double() for w, r in zip(weights, past, strict=True))
        exact = exact + (0 if base is None else base.double())
        assert result.dtype == dtype
        torch.testing.assert_close(result, exact.to(dtype))


def test_reuse_adds_the_residual_as_it_is_and_gives_no_view():
    before, residual = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(forecast(before, [residual], None), before + residual)
    alone = forecast(None, [residual], None)
    assert torch.equal(alone, residual)
    assert alone.data_ptr() != residual.data_ptr()
