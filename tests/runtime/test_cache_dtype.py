"""`cache_dtype`: what residuals are kept in, and what that does to hits and not to misses.

That it changes no guarantee is in tests/test_guarantees.py.
"""

import copy
import math

import pytest
import torch
from comparing import assert_close, assert_identical, tensors
from fxcache.kernels import ops
from helpers import graphed, hits, plain, sample, seeded, solve, times
from opened import Small, opened
from policies import ALTERNATE, ALWAYS, FORECAST, MASK, TAYLOR, name_of
from torch import nn
from zoo import make

import fxcache
from fxcache import FirstBlockCache, Taylor
from fxcache.errors import OptionError
from fxcache.passes.store import largest_kept, saturated

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NARROW = [BFLOAT16, FLOAT16, E4M3, E5M2]


class Bare(Small):
    """Returns the stack's stream as it is: an error of the residual is one of the output."""

    def forward(self, x, t):
        return self.stack(self.embed(x) + self.time(t[:, None])[:, None])


def rounding(values, dtype):
    """How far values of `dtype` may lie from `values`, which are in its range."""
    info = torch.finfo(dtype)
    return (values.abs() * info.eps).clamp_min(info.smallest_normal * info.eps) / 2


@pytest.mark.parametrize(
    ("policy", "dtype"), [(ALWAYS, E4M3), (TAYLOR, BFLOAT16), (MASK, E5M2)], ids=name_of
)
def test_rings_have_the_dtype_and_probes_keep_theirs(model, dtype, policy):
    """A schedule keeps nothing but residuals."""
    denoiser = opened(model, policy, cache_dtype=dtype)
    solve(denoiser)
    assert {residual.dtype for residual in denoiser.residuals()} == {dtype}
    kept = [t for own in denoiser.buffers() for t in own.kept.values() if t.is_floating_point()]
    assert {t.dtype for t in kept} == ({FLOAT32} if policy.probe else set())
    elements = 2 * 8 * 16
    ring = policy.forecast.ring * elements * dtype.itemsize
    assert denoiser.report().cached_bytes == ring + elements * 4 * len(kept) > 0


@pytest.mark.parametrize(("dtype", "order"), [*((dtype, 2) for dtype in NARROW), (E4M3, 0)])
def test_a_hit_is_off_by_the_rounding_and_no_more(dtype, order):
    """Against float64: each residual is rounded once, and weighted as the forecast says."""
    model = seeded(Bare)
    policy = FirstBlockCache(
        threshold=math.inf, warmup_steps=3, **({"forecast": Taylor(order=order)} if order else {})
    )
    denoiser = plain(model, policy, cache_dtype=dtype)
    outputs = solve(denoiser, 4)
    assert hits(denoiser) == [False, False, False, True]
    exact = copy.deepcopy(model).double()
    heads, residuals = [], []
    exact.blocks[0].register_forward_hook(lambda *call: heads.append(call[-1]))
    for step in range(4):
        x, t = sample().double() + 0.05 * step, times(1 - step / 4).double()
        residuals.append(exact(x, t) - heads[-1])
    past = residuals[:3][::-1][: order + 1]
    weights = policy.forecast.weights(3, [2, 1, 0][: order + 1])
    expected = heads[3] + sum(w * r for w, r in zip(weights, past, strict=True))
    allowed = sum(abs(w) * rounding(r, dtype) for w, r in zip(weights, past, strict=True))
    error = (outputs[3].double() - expected).abs()
    assert (error <= 1.001 * allowed + 2e-5).all()
    assert error.max() > 0.2 * allowed.max()  # it went through the dtype


def test_a_dtype_as_wide_or_wider_loses_nothing(model):
    """Of a model in float32 nothing is rewritten: bit for bit what it is without the option."""
    with_option, without = plain(model, FORECAST, cache_dtype=FLOAT32), plain(model, FORECAST)
    assert_identical(solve(with_option, 8), solve(without, 8))
    assert with_option.report() == without.report()
    model.to(BFLOAT16)
    x, ts = sample().to(BFLOAT16), [times(1 - i / 6).to(BFLOAT16) for i in range(6)]
    runs = []
    for dtype in (None, FLOAT32):
        denoiser = opened(model, TAYLOR, cache_dtype=dtype)
        runs.append([denoiser(x + 0.05 * i, t) for i, t in enumerate(ts)])
        assert hits(denoiser)[-1]
    assert_identical(*runs)
    assert denoiser.residuals()[0].dtype == FLOAT32


@pytest.mark.parametrize(("name", "dtype"), [("uvit", E4M3), ("structured_dit", BFLOAT16)])
def test_streams_of_all_kinds(name, dtype):
    """A U shape's streams are cached as they are; the other model has two kinds of blocks."""
    model, inputs = make(name)
    denoiser = opened(model, ALTERNATE, cache_dtype=dtype)
    outputs = [denoiser(**inputs) for _ in range(2)]
    assert hits(denoiser) == [False, True]
    assert_close(*outputs, tolerance=torch.finfo(dtype).eps)
    assert not torch.equal(tensors(outputs[0])[0], tensors(outputs[1])[0])
    assert {residual.dtype for residual in denoiser.residuals()} == {dtype}


SOURCES = [torch.float64, FLOAT32, BFLOAT16, FLOAT16]
WIDER = [(a, b) for a in SOURCES for b in NARROW if torch.finfo(a).max > torch.finfo(b).max]


def saturation(computed, dtype):
    """Extreme values of dtype `computed`, a function that stores them in `dtype` as a miss does,
    and what is right.
    """
    limit, most = largest_kept(computed, dtype), torch.finfo(computed).max
    assert 0.99 * torch.finfo(dtype).max < limit <= torch.finfo(dtype).max
    given = torch.tensor(
        [1.0, limit, most, -most, math.nan, math.inf, -math.inf, 0.0, -limit / 2], dtype=computed
    )

    def store(values, slot):
        slot.copy_(saturated(values, limit, dtype))
        return slot.clone()

    infinite = math.inf if dtype.itemsize > 1 else math.nan
    right = [1.0, limit, limit, -limit, math.nan, infinite, -infinite, 0.0, -limit / 2]
    return given, store, torch.tensor(right, dtype=torch.float64).to(dtype).double()


def check(kept, right):
    torch.testing.assert_close(kept.double(), right, equal_nan=True, rtol=0, atol=0)


def test_what_is_beyond_the_range_saturates():
    for computed, dtype in WIDER:
        given, store, right = saturation(computed, dtype)
        check(store(given, torch.zeros(9, dtype=dtype)), right)
    # Within the range nothing is done.
    fitting = [(a, b) for a in SOURCES for b in NARROW if (a, b) not in WIDER]
    assert fitting == [(BFLOAT16, BFLOAT16), (FLOAT16, BFLOAT16), (FLOAT16, FLOAT16)]
    assert {largest_kept(a, b) for a, b in [*fitting, (FLOAT32, torch.float64)]} == {None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed")  # Inductor, on the CPU
def test_what_is_beyond_the_range_saturates_compiled():
    pairs = [(FLOAT32, E4M3), (FLOAT32, E5M2), (BFLOAT16, FLOAT16)]
    cases = [saturation(*pair) for pair in pairs]

    @torch.compile
    def store_all(slots):
        return [store(given, slot) for (given, store, _), slot in zip(cases, slots, strict=True)]

    kept = store_all([torch.zeros(9, dtype=dtype) for _, dtype in pairs])
    for own, (_, _, right) in zip(kept, cases, strict=True):
        check(own, right)


@pytest.mark.parametrize(
    ("own", "dtype", "scale"), [(FLOAT32, E4M3, 1e4), (BFLOAT16, FLOAT16, 1e6)]
)
def test_a_residual_beyond_the_range_is_kept_as_the_largest(own, dtype, scale):
    model = seeded(Bare)
    model.blocks[-1].proj.weight.mul_(scale)
    model.to(own)
    denoiser = opened(model, ALWAYS, cache_dtype=dtype, audit=False)
    first, second = (denoiser(sample().to(own), times(t).to(own)) for t in (1.0, 0.9))
    (kept,) = denoiser.residuals()
    limit = largest_kept(own, dtype)
    assert first.abs().max() > 2 * limit
    assert kept.double().abs().max() == limit
    assert kept.double().isfinite().all()
    assert second.isfinite().all()
    assert hits(denoiser) == [False, True]


@pytest.mark.parametrize("dtype", [FLOAT16, E4M3], ids=str)
def test_what_is_not_finite_is_not_hidden(model, dtype):
    """NaN is kept as it is, for other samples of the batch nothing changes, and it is a miss; an
    infinite residual stays one: a hit on it is no finite picture.
    """
    denoiser = opened(model, ALWAYS, cache_dtype=dtype)
    x = sample()
    x[0, 3] = math.nan
    denoiser(x, times(1.0))
    (kept,) = denoiser.residuals()
    assert kept[0, 3].float().isnan().all()
    assert kept[1].float().isfinite().all()
    assert_identical(denoiser(sample(), times(0.9)), model(sample(), times(0.9)))
    assert denoiser(sample(), times(0.8)).isfinite().all()
    assert hits(denoiser) == [False, False, True]

    model = seeded(Bare)
    model.blocks[-1].proj.bias[0] = math.inf
    denoiser = plain(model, ALWAYS, cache_dtype=dtype)
    for t in (1.0, 0.9):
        output = denoiser(sample(), times(t))
        assert not output[..., 0].isfinite().any()
        assert output[..., 1:].isfinite().all()
    assert hits(denoiser) == [False, True]


def test_with_cuda_graphs(model, device):
    """As many pieces are captured as without the option, and they compute what eager does."""
    captures = []
    expected = plain(model, FORECAST, cache_dtype=E4M3)
    for dtype in (None, E4M3):
        denoiser = graphed(model, FORECAST, cache_dtype=dtype)
        for seed in range(3):
            outputs = solve(denoiser, 8, seed)
            if dtype is E4M3:
                assert_close(outputs, solve(expected, 8, seed))
        captures.append(device.counts()[0])
    assert captures[0] == captures[1] > 0


def test_kernels_take_narrow_rings(model, monkeypatch):
    """What they make of a narrow ring: tests/kernels. Without Triton on the CPU, the operators
    fall back to plain operations.
    """
    kernels, aten = (plain(model, FORECAST, kernel=k, cache_dtype=E4M3) for k in ("triton", "aten"))
    assert_close(solve(kernels, 8), solve(aten, 8))
    seen, refresh = set(), ops.plain.refresh
    noted = lambda *given: seen.add(given[2].dtype) or refresh(*given)  # noqa: E731
    monkeypatch.setattr(ops.plain, "refresh", noted)
    solve(kernels, 8)
    assert seen == {FLOAT32, E4M3}  # of probes and of residuals


@pytest.mark.slow
def test_inductor_computes_what_eager_does(model):
    """Within a unit in the last place: a residual between two numbers may go either way."""
    compiled = opened(model, ALTERNATE, cache_dtype=E4M3, backend="inductor")
    eager = opened(model, ALTERNATE, cache_dtype=E4M3)
    assert_close(solve(compiled), solve(eager), tolerance=torch.finfo(E4M3).eps)
    for a, b in zip(compiled.residuals(), eager.residuals(), strict=True):
        assert a.dtype == b.dtype == E4M3
        assert (a.float() != b.float()).float().mean() < 0.02


def test_as_a_backend_of_torch_compile(model):
    def outputs(**options):
        options = {"policy": ALTERNATE, "backend": "eager", **options}
        return solve(torch.compile(model, backend="fxcache", options=options))

    expected = solve(plain(model, ALTERNATE, cache_dtype=E4M3))
    torch._dynamo.reset()
    assert_identical(outputs(cache_dtype=E4M3, cache_device="cpu"), expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="cache_device must be"):
        outputs(cache_device="cuda")


def test_other_dtypes_are_refused(model):
    for dtype in (torch.float64, torch.int8, torch.complex64, "bfloat16", 16, nn):
        with pytest.raises(OptionError, match=r"cache_dtype must be one of .*float8_e5m2.*got"):
            fxcache.transform(model, cache_dtype=dtype)
