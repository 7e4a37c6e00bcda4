"""The kernels: reference and operators on the CPU, and the Triton tests under the interpreter."""

import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import fxcache.kernels
import pytest
import torch
from fxcache.kernels import forecast, ops, reference, refresh, refresh_error, residual_diff
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.library import opcheck

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
both = pytest.mark.parametrize("kernels", [reference, fxcache.kernels], ids=["reference", "ops"])


def oracle(h_out, h_in, past):
    """float64 sums of the residual as it is stored: rounded to its dtype."""
    residual = (h_out if h_in is None else h_out - h_in).double()
    change = (residual - past.double()).abs().flatten(1).sum(1)
    return torch.stack([change, past.double().abs().flatten(1).sum(1)], 1)


def assert_sums(sums, expected, terms):
    """A float32 sum of n terms is off by at most n * eps, relative."""
    bound = max(terms, 8) * torch.finfo(torch.float32).eps
    assert ((sums - expected).abs() <= bound * expected.abs() + 1e-30).all()


@both
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    bare=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_residual_diff(kernels, shape, dtypes, bare, seed):
    torch.manual_seed(seed)
    h_out, h_in, past = (torch.randn(shape).to(dtype) for dtype in dtypes)
    h_in = None if bare else h_in
    sums = kernels.residual_diff(h_out, h_in, past)
    assert sums.dtype == torch.float32
    assert sums.shape == (shape[0], 2)
    assert_sums(sums, oracle(h_out, h_in, past), math.prod(shape))


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unchanged_residual_measures_exactly_zero(kernels, dtype):
    h_out, h_in = torch.randn(2, 5, 7).to(dtype), torch.randn(2, 5, 7).to(dtype)
    assert (kernels.residual_diff(h_out, h_in, h_out - h_in)[:, 0] == 0).all()


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_sample(kernels, bad, where):
    operands = [torch.randn(2, 5, 7) for _ in range(3)]
    operands[where][0, 3, 2] = bad
    sums = kernels.residual_diff(*operands)
    assert not sums[0].isfinite().all()
    assert sums[1].isfinite().all()


@both
def test_strided_tensors(kernels):
    h_out, h_in, past = (torch.randn(2, 7, 5).transpose(1, 2) for _ in range(3))
    sums = kernels.residual_diff(h_out, h_in, past)
    assert_sums(sums, oracle(h_out, h_in, past), 35)


@both
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_no_elements(kernels, shape):
    empty = torch.empty(shape)
    assert torch.equal(kernels.residual_diff(empty, empty, empty), torch.zeros(shape[0], 2))


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ring", [1, 2, 5])
def test_forecast(kernels, dtype, ring):
    before = torch.randn(2, 5, 7).to(dtype)
    past = [torch.randn(2, 5, 7).to(dtype) for _ in range(ring)]
    weights = torch.randn(ring)
    for base in (before, None):
        result = kernels.forecast(base, past, weights)
        exact = sum(w.double() * r.double() for w, r in zip(weights, past, strict=True))
        exact = exact + (0 if base is None else base.double())
        assert result.dtype == dtype
        torch.testing.assert_close(result, exact.to(dtype))


@both
def test_a_residual_of_weight_0_counts_for_nothing(kernels):
    before, residual, stale = torch.randn(3, 2, 5).unbind(0)
    stale = torch.full_like(stale, math.nan)
    predicted = kernels.forecast(before, [stale, residual], torch.tensor([0.0, 1.0]))
    assert torch.equal(predicted, before + residual)


@both
def test_reuse_adds_the_residual_as_it_is_and_gives_no_view(kernels):
    before, residual = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(kernels.forecast(before, [residual], None), before + residual)
    alone = kernels.forecast(None, [residual], None)
    assert torch.equal(alone, residual)
    assert alone.data_ptr() != residual.data_ptr()


@both
@pytest.mark.parametrize("slot_dtype", DTYPES)
def test_refresh(kernels, slot_dtype):
    after, before = torch.randn(2, 5, 7).half(), torch.randn(2, 5, 7).half()
    slot = torch.full((2, 5, 7), math.nan, dtype=slot_dtype)
    kernels.refresh(after, before, slot)
    assert torch.equal(slot, (after - before).to(slot_dtype))
    kernels.refresh(after, None, slot)
    assert torch.equal(slot, after.to(slot_dtype))


@both
@pytest.mark.parametrize("slot_dtype", DTYPES)
@pytest.mark.parametrize("number", [1, 3])
def test_refresh_error(kernels, number, slot_dtype):
    after, before, *ring = torch.randn(2 + number, 2, 5, 7).half().unbind(0)
    weights = torch.randn(number)
    slot = torch.full((2, 5, 7), math.nan, dtype=slot_dtype)
    for base in (before, None):
        sums = kernels.refresh_error(after, base, slot, ring, weights)
        residual = after if base is None else after - base
        assert torch.equal(slot, residual.to(slot_dtype))
        predicted = sum(w.double() * r.double() for w, r in zip(weights, ring, strict=True))
        off = (residual.double() - predicted).abs().sum()
        exact = torch.stack([off, residual.double().abs().sum()])
        torch.testing.assert_close(sums, exact.float(), rtol=1e-5, atol=0)


@both
def test_the_error_of_a_forecast_that_is_right_is_0_and_nan_stays(kernels):
    residual, stale = torch.randn(2, 5), torch.full((2, 5), math.nan)
    slot, weights = torch.zeros(2, 5), torch.tensor([0.0, 1.0])
    sums = kernels.refresh_error(residual, None, slot, [stale, residual.clone()], weights)
    assert sums.tolist() == [0.0, float(residual.abs().sum())]
    broken = residual.clone()
    broken[1, 2] = math.nan
    assert kernels.refresh_error(broken, None, slot, [stale, residual], weights).isnan().all()


@pytest.mark.parametrize("kernels", [reference, ops], ids=["reference", "ops"])
def test_graphs_are_written_from_proxies(kernels):
    """As the passes do, with either; one node a kernel with the operators."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    a, b, slot = (fx.Proxy(graph.placeholder(name), tracer) for name in ("a", "b", "slot"))
    sums = kernels.residual_diff(a, b, slot)
    predicted = kernels.forecast(None, [b], None)
    kernels.refresh(a, b, slot)
    graph.output((sums.node, predicted.node))
    graph.eliminate_dead_code()
    a, b, slot = (torch.randn(2, 5) for _ in range(3))
    expected = reference.residual_diff(a, b, slot), b
    actual = fx.GraphModule({}, graph)(a, b, slot)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    if kernels is ops:
        assert torch.equal(slot, a - b)
        assert (
            len(graph.find_nodes(op="call_function", target=torch.ops.fxcache.refresh.default)) == 1
        )


# --- what is refused

X, Y = torch.zeros(2, 5), torch.zeros(2, 6)
W = torch.zeros(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: residual_diff(X, Y, X), ValueError, r"h_in must have the shape of h_out, \[2, 5]"),
        (lambda: residual_diff(X, None, Y), ValueError, r"reference .* got \[2, 6]"),
        (lambda: residual_diff(X.int(), X, X), TypeError, "h_out must be .*floating.*torch.int32"),
        (lambda: residual_diff(X, 3, X), TypeError, "h_in must be a tensor, got int"),
        (lambda: residual_diff(W, W, W), ValueError, r"two or more dimensions, got \[1]"),
        (lambda: residual_diff(X, X, X.to("meta")), ValueError, "device of h_out, cpu, got meta"),
        (lambda: residual_diff(X, X, X, tickets=W), ValueError, r"tickets .*int32 \[2].*float32"),
        (lambda: forecast(X, [], None), ValueError, "ring must hold 1 to 5 residuals, got 0"),
        (lambda: forecast(X, [X] * 6, W), ValueError, "got 6"),
        (lambda: forecast(X, [X, X], None), ValueError, "a ring of 2 residuals needs weights"),
        (lambda: forecast(X, [X, X], W), ValueError, r"weights .*float32 \[2].* \[1]"),
        (lambda: forecast(X, [X], W.double()), ValueError, "weights .*got torch.float64"),
        (lambda: forecast(X, [X, Y], torch.zeros(2)), ValueError, r"ring\[1] must have the shape"),
        (lambda: forecast(X, ["x"], None), TypeError, r"ring\[0] must be a tensor, got str"),
        (lambda: refresh(X, Y, X), ValueError, "before must have the shape of after"),
        (lambda: refresh(X, None, X.long()), TypeError, "slot must be of a floating dtype"),
        (lambda: refresh(X, X, W.expand(2, 5)), ValueError, "slot must not be expanded"),
        (lambda: refresh_error(X, None, X, [], W), ValueError, "ring must hold 1 to 5 .* got 0"),
        (lambda: refresh_error(X, None, X, [Y], W), ValueError, r"ring\[0] must have the shape"),
        (
            lambda: refresh_error(X, None, X, [X], X),
            ValueError,
            r"weights .*float32 \[1].* \[2, 5]",
        ),
    ],
)
def test_errors_say_what_was_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- the operators under the compiler


def operand(dtype=torch.float32):
    return torch.randn(2, 5, 7, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arrange", [lambda t: t, lambda t: t.mT, lambda t: t[:, 1:4, ::2]])
def test_opcheck(arrange, dtype):
    h_out, h_in, past = (arrange(operand(dtype)) for _ in range(3))
    tickets, weights = torch.zeros(2, dtype=torch.int32), torch.randn(2)
    ops = torch.ops.fxcache
    for arguments in ((h_out, h_in, past), (h_out, None, past), (h_out, h_in, past, tickets)):
        opcheck(ops.residual_diff.default, arguments)
    for before, (ring, w) in itertools.product(
        (h_in, None), (([past, h_out], weights), ([past], None))
    ):
        opcheck(ops.forecast.default, (before, ring, w))
    for before in (h_in, None):
        opcheck(ops.refresh.default, (h_out, before, past))
        opcheck(ops.refresh_error.default, (h_out, before, past, [h_in + 1, h_in], weights))


def test_what_operators_say_they_write():
    ops = torch.ops.fxcache
    assert {
        name: [a.name for a in getattr(ops, name).default._schema.arguments if a.is_write]
        for name in ("residual_diff", "forecast", "refresh", "refresh_error")
    } == {
        "residual_diff": ["tickets"],
        "forecast": [],
        "refresh": ["slot"],
        "refresh_error": ["slot"],
    }


def step(h_out, h_in, slot, weights, tickets):
    """The kernels between operations of a model; the slot is read before it is written."""
    h_out = torch.nn.functional.gelu(h_out)
    sums = residual_diff(h_out, h_in, slot, tickets=tickets)
    predicted = forecast(h_in, [slot, slot * 2], weights) + 1
    error = refresh_error(h_out, h_in, slot, [sums.sum() + h_in, h_in], weights)
    refresh(slot * 2, h_in, slot)
    return sums, predicted, error, slot * 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_dynamic_shapes(backend):
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 8, 33):
            h_out, h_in, past = (torch.randn(2, rows, 7) for _ in range(3))
            ours, theirs = past.clone(), past.clone()
            scratch = torch.randn(2), torch.zeros(2, dtype=torch.int32)
            expected = step(h_out, h_in, theirs, *scratch)
            torch.testing.assert_close(compiled(h_out, h_in, ours, *scratch), expected)
            torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not ops.HAS_TRITON, reason="without Triton there is nothing to see through")
def test_inductor_sees_through_the_operators():
    """On the CPU they come apart into plain operations, which fuse with the model's."""
    seen = []

    def backend(gm, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def keep(gm, inputs):
            seen.extend(str(node.target) for node in gm.graph.nodes)
            return gm.forward

        return aot_autograd(fw_compiler=keep)(gm, inputs)

    weights, tickets = torch.randn(2), torch.zeros(2, dtype=torch.int32)
    torch.compile(step, backend=backend)(operand(), operand(), operand(), weights, tickets)
    assert "aten.abs.default" in seen
    assert not [name for name in seen if "fxcache" in name]


def run_python(code, **environment):
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def test_kernels_work_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from fxcache import kernels
x, slot = torch.randn(2, 5), torch.zeros(2, 5)
compiled = torch.compile(lambda x: kernels.forecast(x, [x], None) * 2, fullgraph=True)
assert torch.equal(compiled(x), x * 4)
kernels.refresh(x, None, slot)
print(kernels.residual_diff(slot, None, x)[:, 0].tolist())
"""
    out, err = run_python(code)
    assert out == "[0.0, 0.0]\n"
    assert "riton" not in err


@needs_triton
def test_importing_the_kernels_compiles_and_registers_nothing():
    code = """
import sys, torch, fxcache.kernels
assert "fxcache.kernels.triton_kernels" not in sys.modules
assert not hasattr(torch.ops.fxcache, "refresh")
"""
    run_python(code)


@needs_triton
def test_compiler_caches_know_the_source_of_the_kernels():
    code = """
from torch._library.triton import get_triton_kernels_for_op
from fxcache.kernels import ops
for name in ("residual_diff", "forecast", "refresh", "refresh_error"):
    (kernel,) = get_triton_kernels_for_op(f"fxcache::{name}")
    assert kernel.fn.__name__ == f"{name.removesuffix('_error')}_kernel"
"""
    run_python(code, TRITON_INTERPRET="0")


@needs_triton
@pytest.mark.slow
def test_the_triton_kernels_under_the_interpreter():
    """The interpreter is chosen when Triton is imported, hence a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu",
               HERE / "test_triton.py"]  # fmt: skip
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 200
    assert "skipped" not in summary
