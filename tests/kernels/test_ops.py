"""The kernels as operators: what is refused, what a compiler sees of them, Triton or none.

What they compute: `test_kernels`, which runs here once more, under Triton's interpreter.
"""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fxcache.kernels import forecast, ops, reference, refresh, refresh_error, residual_diff
from torch import fx
from torch.library import opcheck

HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


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


@pytest.mark.parametrize(
    ("dtype", "arrange"),
    [(torch.bfloat16, lambda t: t.mT), (torch.float32, lambda t: t[:, 1:4, ::2])],
    ids=["transposed", "strided"],
)
def test_opcheck(dtype, arrange):
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


def run_python(code, *arguments, **environment):
    flags = ["-W", "error", "-W", "ignore::DeprecationWarning", "-c", code]
    command = [sys.executable, *(arguments or flags)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout, done.stderr


def test_kernels_work_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from fxcache import kernels
x, slot = torch.randn(2, 5), torch.zeros(2, 5)
@torch.compile(backend="aot_eager", fullgraph=True)
def compiled(x):
    return kernels.forecast(x, [x], None) * 2
assert torch.equal(compiled(x), x * 4)
kernels.refresh(x, None, slot)
print(kernels.residual_diff(slot, None, x)[:, 0].tolist())
"""
    out, err = run_python(code)
    assert out == "[0.0, 0.0]\n"
    assert "riton" not in re.sub(r".*flop_counter.*|.*flop counting.*", "", err)  # torch's own word


@needs_triton
def test_importing_registers_nothing_and_compiler_caches_know_the_source_of_the_kernels():
    code = """
import sys, torch, fxcache.kernels
assert "fxcache.kernels.triton_kernels" not in sys.modules
assert not hasattr(torch.ops.fxcache, "refresh")
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
    arguments = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", HERE / "test_kernels.py"]
    out, _ = run_python("", *arguments, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    summary = out.strip().splitlines()[-1]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 60
    assert "skipped" not in summary


# --- on a GPU only


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    def test_offsets_beyond_31_bits(self):
        size = 2**31 + 2**20 + 5
        if torch.cuda.mem_get_info()[0] < 8 * size:
            pytest.skip("needs 18 GB")
        probe = torch.zeros(1, size, dtype=torch.bfloat16, device="cuda")
        probe[0, -3:] = 1.0
        past = torch.zeros(1, 1, dtype=torch.bfloat16, device="cuda").expand(1, size)
        assert residual_diff(probe, None, past).tolist() == [[3.0, 0.0]]
        assert residual_diff(probe, None, probe).tolist() == [[0.0, 3.0]]
        slot = torch.empty_like(probe)
        refresh(probe, None, slot)
        assert torch.equal(slot[0, -9:], probe[0, -9:])
        assert torch.equal(forecast(None, [slot], None)[0, -9:], probe[0, -9:])

    def test_the_same_bits_at_every_call(self):
        operands = [torch.randn(2, 4096, 3072, device="cuda").bfloat16() for _ in range(3)]
        tickets = torch.zeros(2, dtype=torch.int32, device="cuda")
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

        weights = torch.randn(2, device="cuda")
        for rows in (64, 129, 1024):
            h_out, h_in, past = (torch.randn(2, rows, 192, device="cuda") for _ in range(3))
            ours, theirs = past.clone(), past.clone()
            expected = step(h_out, h_in, theirs, weights)
            actual = torch.compile(step, fullgraph=True)(h_out, h_in, ours, weights)
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(ours, theirs)

    def test_in_a_cuda_graph(self):
        operands = [torch.randn(2, 512, 64, device="cuda") for _ in range(3)]
        tickets = torch.zeros(2, dtype=torch.int32, device="cuda")
        expected = residual_diff(*operands, tickets=tickets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sums = residual_diff(*operands, tickets=tickets)
        for _ in range(3):
            graph.replay()
            assert torch.equal(sums, expected)
