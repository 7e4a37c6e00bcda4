"""The kernels against float64: plain operations, and Triton on a GPU or under the interpreter.

`test_ops` runs this file once more under ``TRITON_INTERPRET=1``. There bf16 values are truncated
where a GPU rounds them, so exactness is asked of fp16 and fp32 only.
"""

import itertools
import math
import os

import fxcache.kernels
import pytest
import torch
from fxcache.kernels import forecast, launch, layout, reference, refresh, residual_diff
from hypothesis import given, settings
from hypothesis import strategies as st

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    # The interpreter of Triton 3.6 in `range`; numpy 2.4 makes an error of it.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
both = pytest.mark.parametrize(
    "kernels",
    [fxcache.kernels] if IS_INTERPRETED else [reference, fxcache.kernels],
    ids=lambda module: module.__name__.rpartition(".")[2],
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32, FLOAT16, BFLOAT16 = DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXACT = DTYPES[:2] if IS_INTERPRETED else DTYPES
GUARD = 64

#: (shape, order of the dimensions in memory, dimensions with a gap before and after).
LAYOUTS = {
    "contiguous": ((2, 37, 24), (0, 1, 2), ()),
    "whole tiles": ((2, 64, 64), (0, 1, 2), ()),
    "transposed": ((2, 37, 24), (0, 2, 1), ()),
    "joint sequence": ((2, 37, 24), (0, 1, 2), (1,)),
    "heads": ((2, 5, 7, 16), (0, 2, 1, 3), (3,)),
    "NCHW": ((2, 6, 9, 5), (0, 1, 2, 3), ()),
    "channels_last": ((2, 6, 9, 5), (0, 2, 3, 1), ()),
    "batch last": ((4, 33, 3), (1, 2, 0), ()),
    "every dimension strided": ((2, 3, 4, 5), (0, 1, 2, 3), (1, 2, 3)),
    "too many dimensions": ((2, 3, 2, 3, 2, 3), (0, 5, 3, 1, 4, 2), (1, 2, 3, 4, 5)),
    "two dimensions": ((3, 1001), (0, 1), ()),
    "one row": ((1, 77), (0, 1), (0,)),
    "one element": ((2, 1), (0, 1), ()),
}
#: Every layout, and every dtype; all dtypes of all layouts where that takes no time.
CASES = [
    (name, dtype)
    for place, name in enumerate(LAYOUTS)
    for number, dtype in enumerate(DTYPES)
    if not IS_INTERPRETED or number == place % 3 or name == "contiguous"
]
layouts = pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written yet holds NaN: outputs and scratch alike."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def lay(values, order, gaps):
    """`values` with their dimensions in `order` of memory, NaN in the gaps and all around."""
    sizes = [values.shape[d] + 2 * (d in gaps) for d in order]
    storage = torch.full((math.prod(sizes) + 2 * GUARD,), math.nan, dtype=values.dtype).to(DEVICE)
    view = storage[GUARD : GUARD + math.prod(sizes)].view(sizes)
    view = view.permute([order.index(d) for d in range(values.dim())])
    for d in gaps:
        view = view.narrow(d, 1, values.shape[d])
    view.copy_(values)
    return view


def draw(name, dtype=FLOAT32):
    shape, order, gaps = LAYOUTS[name]
    return lay(torch.randn(shape).to(dtype), order, gaps)


def assert_nothing_written_around(view):
    assert view._base.isnan().sum() == view._base.numel() - view.numel()


def assert_sums(sums, h_out, h_in, past):
    """Against float64: n * eps of float32, and what truncation to bf16 takes away."""
    residual = (h_out if h_in is None else h_out - h_in).double()
    change = (residual - past.double()).abs().flatten(1).sum(1)
    scale = past.double().abs().flatten(1).sum(1)
    bound = max(8, h_out[0].numel()) * torch.finfo(torch.float32).eps
    truncated = 0.0
    if IS_INTERPRETED and h_in is not None and h_out.dtype == h_in.dtype == torch.bfloat16:
        truncated = torch.finfo(torch.bfloat16).eps * residual.abs().flatten(1).sum(1)
    assert sums.dtype == torch.float32
    assert ((sums[:, 0] - change).abs() <= bound * change + truncated + 1e-30).all()
    assert ((sums[:, 1] - scale).abs() <= bound * scale + 1e-30).all()


def assert_rounded(actual, exact):
    """Against float64 in the result's dtype: one rounding; the interpreter may be 1 ulp off."""
    ulps = 1.0 if IS_INTERPRETED and actual.dtype == torch.bfloat16 else 0.5
    error = (actual.double() - exact).abs()
    float32_error = 16 * torch.finfo(torch.float32).eps * exact.abs().clamp_min(1.0)
    assert (error <= ulps * torch.finfo(actual.dtype).eps * exact.abs() + float32_error).all()


@both
@layouts
def test_residual_diff(kernels, name, dtype):
    h_out, h_in, past = (draw(name, dtype) for _ in range(3))
    for before in (h_in, None):
        assert_sums(kernels.residual_diff(h_out, before, past), h_out, before, past)
    if dtype in EXACT:
        sums = kernels.residual_diff(h_out, h_in, h_out - h_in)
        assert (sums[:, 0] == 0).all()  # of an unchanged residual, exactly
        assert (sums[:, 1] > 0).all()


@both
def test_mixed_dtypes(kernels):
    for dtypes in itertools.product(DTYPES, repeat=3):
        h_out, h_in, past = (draw("NCHW", dtype) for dtype in dtypes)
        assert_sums(kernels.residual_diff(h_out, h_in, past), h_out, h_in, past)
    for dtypes in itertools.product(DTYPES, repeat=2):
        before, residual = (draw("contiguous", dtype) for dtype in dtypes)
        for weights, factor in ((None, 1.0), (torch.tensor([0.5], device=DEVICE), 0.5)):
            result = kernels.forecast(before, [residual], weights)
            assert result.dtype == reference.forecast(before, [residual], weights).dtype
            assert_rounded(result, before.double() + factor * residual.double())
    for slot_dtype, other_dtype in itertools.product(EXACT, (FLOAT32, FLOAT16)):
        after, before = draw("contiguous", FLOAT16), draw("contiguous", other_dtype)
        slot, other = torch.zeros(2, *after.shape, dtype=slot_dtype, device=DEVICE)
        kernels.refresh(after, before, slot)
        assert torch.equal(slot, (after - before).to(slot_dtype))
        kernels.refresh_error(after, before, other, [before], torch.ones(1, device=DEVICE))
        assert torch.equal(other, slot)


@pytest.mark.parametrize(("is_wide", "dtype"), [(False, BFLOAT16), (True, FLOAT16)])
def test_operands_of_different_orders(monkeypatch, is_wide, dtype):
    """A model's transposed stream against a reference that fxcache keeps contiguous."""
    monkeypatch.setattr(layout.Layout, "is_wide", is_wide)
    values = [torch.randn(2, 70, 45).to(dtype) for _ in range(3)]
    h_out = lay(values[0], (0, 2, 1), ())
    h_in = lay(values[1], (0, 1, 2), (1,))
    past = lay(values[2], (0, 1, 2), ())
    assert_sums(residual_diff(h_out, h_in, past), h_out, h_in, past)
    slot = lay(values[2], (2, 0, 1), (1,))
    refresh(h_out, h_in, slot)
    assert_rounded(slot, (h_out - h_in).double())
    assert_nothing_written_around(slot)
    assert_rounded(forecast(h_out, [past], None), h_out.double() + past.double())


@both
@pytest.mark.parametrize("expanded", [0, 1, 2])
def test_expanded_operands(kernels, expanded):
    operands = [torch.randn(2, 37, 24).to(DEVICE) for _ in range(3)]
    operands[expanded] = torch.randn(2, 1, 24).to(DEVICE).expand(2, 37, 24)
    assert_sums(kernels.residual_diff(*operands), *operands)
    predicted = kernels.forecast(operands[0], [operands[1]], None)
    assert_rounded(predicted, (operands[0] + operands[1]).double())
    slot = lay(torch.zeros(2, 37, 24), (0, 1, 2), ())
    kernels.refresh(operands[0], operands[1], slot)
    assert torch.equal(slot, operands[0] - operands[1])


def test_an_offset_that_is_not_aligned_and_a_ring_of_different_strides():
    operands = [torch.randn(2 * 999 + 1, device=DEVICE)[1:].view(2, 999) for _ in range(3)]
    assert_sums(residual_diff(*operands), *operands)
    ring = [draw("contiguous"), draw("transposed"), draw("joint sequence")]
    weights = torch.randn(3, device=DEVICE)
    exact = sum(w.double() * r.double() for w, r in zip(weights, ring, strict=True))
    torch.testing.assert_close(forecast(None, ring, weights), exact.float())


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["contiguous", "joint sequence", "channels_last"])
def test_what_is_not_finite_stays_in_its_sample(kernels, bad, name):
    for where in range(3):
        operands = [draw(name) for _ in range(3)]
        operands[where][0].select(-1, 2)[-1] = bad
        sums = kernels.residual_diff(*operands)
        assert not sums[0, 0].isfinite()
        assert sums[0, 1].isfinite() == (where != 2)
        assert_sums(sums[1:], *(operand[1:] for operand in operands))


@pytest.mark.parametrize("name", ["flat", "strided"])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_several_programs_with_several_tiles_each(monkeypatch, batch, name):
    """Bits are the same at every call, and tickets are taken and given back."""
    monkeypatch.setattr(launch, "processors", lambda device: 1)
    tiles = 9 if batch < 9 else 2  # of which each sample has one program
    size = tiles * 1024 + 17
    order, gaps = ((0, 1, 2), ()) if name == "flat" else ((0, 2, 1), (1, 2))
    operands = [lay(torch.randn(batch, size // 11, 11), order, gaps) for _ in range(3)]
    tickets = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    first = residual_diff(*operands, tickets=tickets)
    assert_sums(first, *operands)
    for again in (tickets, None):
        assert torch.equal(residual_diff(*operands, tickets=again), first)
        assert not tickets.any()


def test_the_last_program_adds_more_partial_sums_than_it_reads_at_once(monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 1000)
    monkeypatch.setattr(layout, "FLAT_ROWS", 1)
    monkeypatch.setattr(layout, "THREADS", 1)
    size = 4200
    if IS_INTERPRETED:  # one program after the other takes long
        finish = pytest.importorskip("triton").language.constexpr(16)
        monkeypatch.setattr("fxcache.kernels.triton_kernels.FINISH", finish)
        size = 200
    h_out, past = (torch.randn(1, size, device=DEVICE) for _ in range(2))
    assert_sums(residual_diff(h_out, None, past), h_out, None, past)


@both
def test_no_elements(kernels):
    for shape in ((0, 5), (3, 0), (2, 0, 4)):
        empty = torch.empty(shape, device=DEVICE)
        sums = kernels.residual_diff(empty, empty, empty)
        assert torch.equal(sums, torch.zeros(shape[0], 2, device=DEVICE))
        assert kernels.forecast(empty, [empty], None).shape == shape
        kernels.refresh(empty, empty, empty)


@pytest.mark.skipif(DEVICE == "cpu" and not IS_INTERPRETED, reason="needs Triton's kernels")
def test_an_operator_refuses_to_read_out_of_bounds():
    """Operators check no more than that; the functions in front of them check the rest."""
    with pytest.raises(ValueError, match="one shape"):
        torch.ops.fxcache.refresh(*(torch.zeros(n, device=DEVICE) for n in (3, 4, 5)))


@both
@layouts
def test_forecast(kernels, name, dtype):
    before = draw(name, dtype)
    for size in (5, 3, 1):
        ring = [draw(name, dtype) for _ in range(size)]
        weights = torch.randn(size, device=DEVICE)
        exact = sum(w.double() * r.double() for w, r in zip(weights, ring, strict=True))
        scale = 1 + sum(r.abs().max().double() for r in ring)
        for base in (before, None):
            result = kernels.forecast(base, ring, weights)
            total = exact + (0 if base is None else base.double())
            expected = reference.forecast(base, ring, weights)
            assert result.dtype == expected.dtype
            assert result.stride() == expected.stride()
            bf16_error = torch.finfo(dtype).eps * total.abs()
            bound = bf16_error + 16 * scale * torch.finfo(torch.float32).eps
            assert ((result.double() - total).abs() <= bound).all()
    if dtype in EXACT:  # without weights a residual is added as eager does, and never returned
        assert torch.equal(kernels.forecast(before, ring, None), before + ring[0])
        alone = kernels.forecast(None, ring, None)
        assert torch.equal(alone, ring[0])
        assert alone.data_ptr() != ring[0].data_ptr()


@both
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_residual_of_weight_0_counts_for_nothing(kernels, empty):
    before, *ring = (draw("contiguous") for _ in range(4))
    weights = torch.tensor([1.0, 2.0, -0.5], device=DEVICE)
    weights[empty] = 0.0
    expected = before + sum(w * r for w, r in zip(weights, ring, strict=True))
    ring[empty].fill_(math.nan)
    torch.testing.assert_close(kernels.forecast(before, ring, weights), expected)


@both
@layouts
def test_refresh_and_its_error(kernels, name, dtype):
    """Against float64; `refresh_error` writes what `refresh` writes."""
    after, before, slot, other, *ring = (draw(name, dtype) for _ in range(7))
    weights = torch.tensor([2.0, 0.0, -1.0], device=DEVICE)
    ring[1].fill_(math.nan)  # of weight 0
    for base in (before, None):
        slot.fill_(7.0)
        kernels.refresh(after, base, slot)
        expected = after if base is None else after - base
        if dtype in EXACT or base is None:
            assert torch.equal(slot, expected)
        residual = after.double() - (0 if base is None else base.double())
        assert_rounded(slot, residual)
        assert_nothing_written_around(slot)

        sums = kernels.refresh_error(after, base, other, ring, weights)
        assert torch.equal(other, slot)
        assert_nothing_written_around(other)
        residual = expected.double()
        off = (residual - 2.0 * ring[0].double() + ring[2].double()).abs().sum()
        bound = 1e-5 + torch.finfo(dtype).eps * (dtype == BFLOAT16 and IS_INTERPRETED)
        torch.testing.assert_close(sums[0].double(), off, rtol=bound, atol=1e-6)
        torch.testing.assert_close(sums[1].double(), residual.abs().sum(), rtol=bound, atol=1e-6)
    assert torch.equal(sums, kernels.refresh_error(after, None, other, ring, weights))


@both
def test_the_error_of_a_forecast_that_is_right_is_0_and_nan_stays(kernels):
    residual, stale = torch.randn(2, 5, device=DEVICE), torch.full((2, 5), math.nan, device=DEVICE)
    slot, weights = torch.zeros(2, 5, device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)
    sums = kernels.refresh_error(residual, None, slot, [stale, residual.clone()], weights)
    assert sums[0] == 0
    torch.testing.assert_close(sums[1], residual.abs().sum())
    broken = residual.clone()
    broken[1, 2] = math.nan
    assert kernels.refresh_error(broken, None, slot, [stale, residual], weights).isnan().all()


@both
@settings(max_examples=12 if IS_INTERPRETED else 30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 8), min_size=2, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_any_strides(kernels, shape, dtypes, seed, data):
    torch.manual_seed(seed)
    operands = []
    for dtype in dtypes:
        order = data.draw(st.permutations(range(len(shape))))
        gaps = data.draw(st.sets(st.integers(0, len(shape) - 1)))
        operands.append(lay(torch.randn(shape).to(dtype), order, gaps))
    assert_sums(kernels.residual_diff(*operands), *operands)
    after, before, slot = operands
    predicted = kernels.forecast(after, [before], torch.ones(1, device=DEVICE))
    assert_rounded(predicted, after.double() + before.double())
    kernels.refresh(after, before, slot)
    assert_nothing_written_around(slot)
    if BFLOAT16 not in dtypes or not IS_INTERPRETED:
        assert torch.equal(slot, (after - before).to(slot.dtype))
