"""The Triton kernels: on a GPU, or on CPU tensors under ``TRITON_INTERPRET=1``.

`test_kernels` runs this file under the interpreter. There bf16 values are truncated where a GPU
rounds them, so exactness is asked of fp16 and fp32 only.
"""

import itertools
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from fxcache.kernels import (
    forecast,
    launch,
    layout,
    reference,
    refresh,
    refresh_error,
    residual_diff,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    # The interpreter of Triton 3.6 in `range`; numpy 2.4 makes an error of it.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
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


def draw(name, dtype=torch.float32):
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


# --- residual_diff


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_residual_diff(name, dtype):
    h_out, h_in, past = (draw(name, dtype) for _ in range(3))
    for before in (h_in, None):
        sums = residual_diff(h_out, before, past)
        assert_sums(sums, h_out, before, past)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=str)
def test_residual_diff_of_mixed_dtypes(dtypes):
    h_out, h_in, past = (draw("contiguous", dtype) for dtype in dtypes)
    assert_sums(residual_diff(h_out, h_in, past), h_out, h_in, past)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_wide", [False, True])
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


@pytest.mark.parametrize("expanded", [0, 1, 2])
def test_expanded_operands(expanded):
    operands = [torch.randn(2, 37, 24).to(DEVICE) for _ in range(3)]
    shape = [1 if d == 1 else 2 if d == 0 else 24 for d in range(3)]
    operands[expanded] = torch.randn(shape).to(DEVICE).expand(2, 37, 24)
    assert_sums(residual_diff(*operands), *operands)
    assert_rounded(forecast(operands[0], [operands[1]], None), (operands[0] + operands[1]).double())
    slot = lay(torch.zeros(2, 37, 24), (0, 1, 2), ())
    refresh(operands[0], operands[1], slot)
    assert torch.equal(slot, operands[0] - operands[1])


def test_an_offset_that_is_not_aligned():
    h_out, h_in, past = (torch.randn(2 * 999 + 1, device=DEVICE)[1:].view(2, 999) for _ in range(3))
    assert_sums(residual_diff(h_out, h_in, past), h_out, h_in, past)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", ["contiguous", "transposed", "channels_last"])
def test_an_unchanged_residual_measures_exactly_zero(name, dtype):
    h_out, h_in = draw(name, dtype), draw(name, dtype)
    sums = residual_diff(h_out, h_in, h_out - h_in)
    assert (sums[:, 0] == 0).all()
    assert (sums[:, 1] > 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["contiguous", "joint sequence", "channels_last"])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_sample(bad, name, where):
    operands = [draw(name) for _ in range(3)]
    operands[where][0].select(-1, 2)[-1] = bad
    sums = residual_diff(*operands)
    assert not sums[0, 0].isfinite()
    assert sums[0, 1].isfinite() == (where != 2)
    assert_sums(sums[1:], *(operand[1:] for operand in operands))


@pytest.fixture
def few_processors(monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 1)


@pytest.mark.usefixtures("few_processors")
@pytest.mark.parametrize("name", ["flat", "strided"])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_several_programs_with_several_tiles_each(batch, name):
    """Bits are the same at every call, and tickets are taken and given back."""
    size = 13 * 1024 + 17
    order, gaps = ((0, 1, 2), ()) if name == "flat" else ((0, 2, 1), (1, 2))
    operands = [lay(torch.randn(batch, size // 11, 11), order, gaps) for _ in range(3)]
    tickets = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    first = residual_diff(*operands, tickets=tickets)
    assert_sums(first, *operands)
    for again in (tickets, tickets, None):
        assert torch.equal(residual_diff(*operands, tickets=again), first)
        assert not tickets.any()


def test_the_last_program_adds_more_partial_sums_than_it_reads_at_once(monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 1000)
    monkeypatch.setattr(layout, "FLAT_ROWS", 1)
    monkeypatch.setattr(layout, "THREADS", 1)
    h_out, past = (torch.randn(1, 4200, device=DEVICE) for _ in range(2))
    assert_sums(residual_diff(h_out, None, past), h_out, None, past)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_no_elements(shape):
    empty = torch.empty(shape, device=DEVICE)
    sums = residual_diff(empty, empty, empty)
    assert sums.shape == (shape[0], 2)
    assert (sums == 0).all()
    assert forecast(empty, [empty], None).shape == shape
    refresh(empty, empty, empty)


# --- forecast and refresh


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_forecast(name, dtype):
    before = draw(name, dtype)
    for size in (1, 3, 5):
        ring = [draw(name, dtype) for _ in range(size)]
        weights = torch.randn(size, device=DEVICE)
        exact = sum(w.double() * r.double() for w, r in zip(weights, ring, strict=True))
        scale = 1 + sum(r.abs().max().double() for r in ring)
        for base in (before, None):
            result = forecast(base, ring, weights)
            total = exact + (0 if base is None else base.double())
            expected = reference.forecast(base, ring, weights)
            assert result.dtype == expected.dtype
            assert result.stride() == expected.stride()
            bf16_error = torch.finfo(dtype).eps * total.abs()
            bound = bf16_error + 16 * scale * torch.finfo(torch.float32).eps
            assert ((result.double() - total).abs() <= bound).all()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_reuse_adds_exactly_what_eager_adds(name, dtype):
    before, residual = draw(name, dtype), draw(name, dtype)
    assert torch.equal(forecast(before, [residual], None), before + residual)
    alone = forecast(None, [residual], None)
    assert torch.equal(alone, residual)
    assert alone.data_ptr() != residual.data_ptr()


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_residual_of_weight_0_counts_for_nothing(empty):
    before, *ring = (draw("contiguous") for _ in range(4))
    weights = torch.tensor([1.0, 2.0, -0.5], device=DEVICE)
    weights[empty] = 0.0
    expected = before + sum(w * r for w, r in zip(weights, ring, strict=True))
    ring[empty].fill_(math.nan)
    torch.testing.assert_close(forecast(before, ring, weights), expected)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=str)
def test_the_dtype_of_a_forecast(dtypes):
    before, residual = (draw("contiguous", dtype) for dtype in dtypes)
    weights = torch.tensor([0.5], device=DEVICE)
    for given_weights in (None, weights):
        result = forecast(before, [residual], given_weights)
        assert result.dtype == reference.forecast(before, [residual], given_weights).dtype
        factor = 1.0 if given_weights is None else 0.5
        assert_rounded(result, before.double() + factor * residual.double())


def test_a_ring_of_different_strides():
    ring = [draw("contiguous"), draw("transposed"), draw("joint sequence")]
    weights = torch.randn(3, device=DEVICE)
    exact = sum(w.double() * r.double() for w, r in zip(weights, ring, strict=True))
    torch.testing.assert_close(forecast(None, ring, weights), exact.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_refresh(name, dtype):
    after, before = draw(name, dtype), draw(name, dtype)
    for kept in (before, None):
        slot = draw(name, dtype)
        slot.fill_(7.0)
        refresh(after, kept, slot)
        expected = after if kept is None else after - kept
        if dtype in EXACT or kept is None:
            assert torch.equal(slot, expected)
        assert_rounded(slot, (after.double() - (0 if kept is None else kept.double())))
        assert_nothing_written_around(slot)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_refresh_error(name, dtype):
    """Against float64; what is written is what `refresh` writes."""
    after, before, slot, plain, *ring = (draw(name, dtype) for _ in range(7))
    weights = torch.tensor([2.0, 0.0, -1.0], device=DEVICE)
    ring[1].fill_(math.nan)  # of weight 0
    for base in (before, None):
        sums = refresh_error(after, base, slot, ring, weights)
        refresh(after, base, plain)
        assert torch.equal(slot, plain)
        assert_nothing_written_around(slot)
        residual = (after if base is None else after - base).double()
        off = (residual - 2.0 * ring[0].double() + ring[2].double()).abs().sum()
        truncated = torch.finfo(dtype).eps * (dtype == BFLOAT16 and IS_INTERPRETED)
        bound = 1e-5 + truncated
        torch.testing.assert_close(sums[0].double(), off, rtol=bound, atol=1e-6)
        torch.testing.assert_close(sums[1].double(), residual.abs().sum(), rtol=bound, atol=1e-6)
    assert torch.equal(sums, refresh_error(after, None, slot, ring, weights))


@pytest.mark.parametrize("slot_dtype", EXACT, ids=str)
def test_a_slot_of_another_dtype(slot_dtype):
    after, before = draw("contiguous", FLOAT16), draw("contiguous", FLOAT32)
    slot = torch.zeros(after.shape, dtype=slot_dtype, device=DEVICE)
    refresh(after, before, slot)
    assert torch.equal(slot, (after - before).to(slot_dtype))


# --- all of them


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 8), min_size=2, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_any_strides(shape, dtypes, seed, data):
    torch.manual_seed(seed)
    operands = []
    for dtype in dtypes:
        order = data.draw(st.permutations(range(len(shape))))
        gaps = data.draw(st.sets(st.integers(0, len(shape) - 1)))
        operands.append(lay(torch.randn(shape).to(dtype), order, gaps))
    assert_sums(residual_diff(*operands), *operands)
    after, before, slot = operands
    predicted = forecast(after, [before], torch.ones(1, device=DEVICE))
    assert_rounded(predicted, after.double() + before.double())
    difference = after - before
    refresh(after, before, slot)
    assert_nothing_written_around(slot)
    if BFLOAT16 not in dtypes or not IS_INTERPRETED:
        assert torch.equal(slot, difference.to(slot.dtype))


def test_opcheck():
    ops = torch.ops.fxcache
    h_out, h_in, past = (draw("joint sequence") for _ in range(3))
    tickets = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for arguments in ((h_out, h_in, past), (h_out, None, past, tickets)):
        opcheck(ops.residual_diff.default, arguments)
    for arguments in ((h_out, [past, h_in], torch.randn(2, device=DEVICE)), (None, [past], None)):
        opcheck(ops.forecast.default, arguments)
    for arguments in ((h_out, h_in, past), (h_out, None, past)):
        opcheck(ops.refresh.default, arguments)
        weights = torch.randn(1, device=DEVICE)
        opcheck(ops.refresh_error.default, (*arguments, [h_in + 1], weights))


def test_an_operator_refuses_to_read_out_of_bounds():
    """Operators check no more than that; the functions in front of them check the rest."""
    with pytest.raises(ValueError, match="one shape"):
        torch.ops.fxcache.refresh(*(torch.zeros(n, device=DEVICE) for n in (3, 4, 5)))


# --- on a GPU only


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu" or IS_INTERPRETED, reason="needs a CUDA device")
class TestOnGPU:
    def test_offsets_beyond_31_bits(self):
        size = 2**31 + 2**20 + 5
        if torch.cuda.mem_get_info()[0] < 8 * size:
            pytest.skip("needs 18 GB")
        probe = torch.zeros(1, size, dtype=torch.bfloat16, device=DEVICE)
        probe[0, -3:] = 1.0
        past = torch.zeros(1, 1, dtype=torch.bfloat16, device=DEVICE).expand(1, size)
        assert residual_diff(probe, None, past).tolist() == [[3.0, 0.0]]
        assert residual_diff(probe, None, probe).tolist() == [[0.0, 3.0]]
        slot = torch.empty_like(probe)
        refresh(probe, None, slot)
        assert torch.equal(slot[0, -9:], probe[0, -9:])
        assert torch.equal(forecast(None, [slot], None)[0, -9:], probe[0, -9:])

    def test_the_same_bits_at_every_call(self):
        operands = [torch.randn(2, 4096, 3072, device=DEVICE).bfloat16() for _ in range(3)]
        tickets = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        first = residual_diff(*operands, tickets=tickets)
        for _ in range(50):
            assert torch.equal(residual_diff(*operands, tickets=tickets), first)
        assert not tickets.any()

    def test_compiled(self):
        def step(h_out, h_in, slot, weights):
            joint = torch.cat([h_out, h_in], dim=1) * 2
            stream = joint[:, : h_out.shape[1]]
            sums = residual_diff(stream, h_in, slot)
            predicted = forecast(stream, [slot, slot], weights)
            refresh(stream, h_in, slot)
            return sums, predicted

        weights = torch.randn(2, device=DEVICE)
        for rows in (64, 129, 1024):
            h_out, h_in, past = (torch.randn(2, rows, 192, device=DEVICE) for _ in range(3))
            ours, theirs = past.clone(), past.clone()
            expected = step(h_out, h_in, theirs, weights)
            actual = torch.compile(step, fullgraph=True)(h_out, h_in, ours, weights)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(ours, theirs)

    def test_in_a_cuda_graph(self):
        operands = [torch.randn(2, 512, 64, device=DEVICE) for _ in range(3)]
        tickets = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        expected = residual_diff(*operands, tickets=tickets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sums = residual_diff(*operands, tickets=tickets)
        for _ in range(3):
            graph.replay()
            assert torch.equal(sums, expected)
