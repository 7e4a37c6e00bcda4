"""What Triton and the compiler make of the kernels for an H100 or H200; that needs no GPU."""

import contextlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from fxcache.kernels import launch, ops
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}
BFLOAT16 = torch.bfloat16
KERNELS = ["residual_diff", "forecast", "reuse", "refresh", "refresh_error"]
REGISTERS, PROCESSORS, THREADS = 65536, 132, 128
SHAPES = {"even": (1, 4096, 3072), "odd": (1, 1025, 3), "batch": (2, 4096, 3072)}


@pytest.fixture
def launched(monkeypatch):
    """What a launcher would launch: (kernel, grid, arguments by name)."""
    found = []

    def record(kernel):
        class Launcher:
            def __getitem__(self, grid):
                def launch_it(*args, **kwargs):
                    named = dict(zip(kernel.arg_names, args, strict=False))
                    found.append((kernel, grid, named | kwargs))

                return launch_it

        return Launcher()

    monkeypatch.setattr(launch, "wrap_triton", record)
    monkeypatch.setattr(launch, "processors", lambda device: PROCESSORS)
    return found


def tensor(shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def run(name, shape, dtype, arrange=lambda t: t):
    """Call the launcher `name` with tensors that have no memory."""
    operands = [arrange(tensor(shape, dtype)) for _ in range(6)]
    if name == "residual_diff":
        launch.launch_residual_diff(*operands[:3], tickets=None)
    elif name == "forecast":
        launch.launch_forecast(operands[0], operands[1:4], tensor((3,), torch.float32))
    elif name == "reuse":
        launch.launch_forecast(operands[0], operands[1:2], None)
    elif name == "refresh_error":
        launch.launch_refresh_error(*operands[:3], operands[3:5], tensor((2,), torch.float32))
    else:
        launch.launch_refresh(*operands[:3])


def compile_for_hopper(kernel, arguments):
    """Compile as the first launch would: aligned pointers, integers specialised."""
    signature, constants, hints = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        is_fixed = value is None or name.isupper() or (isinstance(value, int) and value == 1)
        if is_fixed:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


def accesses(compiled, kind):
    """Widths in bits of the global loads or stores in the PTX, with how often each occurs."""
    widths = {}
    for vector, bits in re.findall(
        rf"{kind}\.global\S*?(?:\.v(\d))?\.[bufs](\d+)", compiled.asm["ptx"]
    ):
        width = int(vector or 1) * int(bits)
        widths[width] = widths.get(width, 0) + 1
    return widths


def resources(compiled, tmp_path):
    """Registers, stack and local memory a thread, as ptxas assigned them."""
    tool = TOOLS / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton ships no cuobjdump")
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [tool, "-res-usage", tmp_path / "kernel.cubin"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"\b{key}:(\d+)", shown)[1]) for key in ("REG", "STACK", "LOCAL")}


def assert_no_local_memory(compiled, tmp_path):
    assert not re.search(r"\.local\b", compiled.asm["ptx"])
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    return used


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("even", BFLOAT16), ("even", torch.float32), ("odd", BFLOAT16), ("batch", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("name", KERNELS)
def test_flat_walks_load_sixteen_bytes(launched, tmp_path, name, shape, dtype):
    run(name, SHAPES[shape], dtype)
    ((kernel, _, arguments),) = launched
    assert arguments["FLAT"]
    compiled = compile_for_hopper(kernel, arguments)
    reads = {"residual_diff": 3, "forecast": 4, "reuse": 2, "refresh": 2, "refresh_error": 4}
    operands = reads[name]
    # Two loads of each operand in flight, even where the size is a multiple of nothing.
    assert accesses(compiled, "ld").get(128, 0) >= 2 * operands
    if name != "residual_diff":
        assert accesses(compiled, "st").get(128, 0) >= 2
    if shape == "even":
        assert dtype.itemsize * 8 not in accesses(compiled, "ld").keys() - {32}
    used = assert_no_local_memory(compiled, tmp_path)
    if name == "residual_diff":  # the whole grid is resident at once
        assert used["REG"] * THREADS * launch.RESIDENT <= REGISTERS


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["residual_diff", "forecast", "refresh", "refresh_error"])
def test_strided_rows_load_sixteen_bytes(launched, tmp_path, name, dtype):
    """Rows that lie apart: heads of a joint projection."""
    run(name, (2, 4096, 24, 256), dtype, arrange=lambda t: t[..., :128])
    ((kernel, _, arguments),) = launched
    assert not arguments["FLAT"]
    compiled = compile_for_hopper(kernel, arguments)
    assert 128 in accesses(compiled, "ld")
    assert_no_local_memory(compiled, tmp_path)


@pytest.mark.parametrize("name", ["residual_diff", "forecast", "refresh", "refresh_error"])
def test_other_strided_walks_compile(launched, tmp_path, name):
    mixed = iter([(0, 2, 1), (0, 1, 2), (0, 2, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2)])

    def arrange(t):
        order = next(mixed)
        return t if order == (0, 1, 2) else torch.empty_like(t.mT.contiguous()).mT

    run(name, (2, 4099, 3077), torch.bfloat16, arrange)
    ((kernel, _, arguments),) = launched
    assert not arguments["FLAT"]
    for is_wide in (False, True):
        compiled = compile_for_hopper(kernel, arguments | {"WIDE": is_wide})
        assert_no_local_memory(compiled, tmp_path)


@pytest.mark.parametrize("shape", [(3, 1), (1, 1), (1, 17)], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_sizes_that_are_specialised_compile(launched, name, shape):
    """Triton turns an argument of 1 into a constant, which has no methods."""
    run(name, shape, torch.float16)
    ((kernel, _, arguments),) = launched
    assert arguments["middle"] == 1
    compile_for_hopper(kernel, arguments)


def test_absent_and_mixed_operands(launched):
    """Sixteen bytes a load whatever is absent, and in whichever dtypes."""
    half, single = (tensor(SHAPES["even"], dtype) for dtype in (torch.bfloat16, torch.float32))
    launch.launch_residual_diff(half, None, single, tickets=None)
    launch.launch_forecast(None, [half, half], tensor((2,), torch.float32))
    launch.launch_forecast(half, [single], None)
    launch.launch_refresh(half, single, half)
    launch.launch_refresh(single, None, half)
    for kernel, _, arguments in launched:
        assert accesses(compile_for_hopper(kernel, arguments), "ld").keys() <= {128, 32}


def test_the_last_program_waits_for_the_others(launched):
    """The ticket is taken with acquire and release, once; what it protects is read after it."""
    run("residual_diff", SHAPES["even"], torch.bfloat16)
    ((kernel, _, arguments),) = launched
    ptx = compile_for_hopper(kernel, arguments).asm["ptx"]
    assert len(re.findall(r"atom\.", ptx)) == 1
    (before, after) = re.split(r"atom\.global\.gpu\.acq_rel\.add\.u32", ptx)
    assert "ld.global.cg" in after
    assert "ld.global.cg" not in before
    assert re.search(r"bar\.sync", before[before.rindex("st.global") :])


@pytest.mark.parametrize(
    ("shape", "programs"),
    [
        ((1, 4096, 3072), launch.RESIDENT * PROCESSORS),
        ((1, 75600, 5120), launch.RESIDENT * PROCESSORS),
        ((2, 4096, 3072), launch.RESIDENT * PROCESSORS),
        ((1, 77, 64), 3),
        ((5000, 64), 5000),
    ],
    ids=str,
)
def test_a_measurement_is_one_wave(launched, shape, programs):
    run("residual_diff", shape, torch.bfloat16)
    ((_, grid, arguments),) = launched
    assert grid == (programs,)
    assert arguments["partial"].shape == (shape[0], programs // shape[0], 2)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU to trace for."""

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(launch, "processors", lambda device: PROCESSORS)
    monkeypatch.setattr(ops, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(driver, "_active", Driver())


@pytest.mark.usefixtures("hopper")
def test_the_compiler_knows_what_the_kernels_write():
    """Traced down to the kernels; what one writes is copied, what it reads is not."""

    def step(h_out, h_in, slot, weights, tickets):
        sums = ops.residual_diff(h_out, h_in, slot, tickets)
        predicted = ops.forecast(h_in, [slot, slot], weights)
        ops.refresh(h_out, None, slot)
        return sums, predicted

    with FakeTensorMode():
        h_out, h_in, slot = (torch.empty(2, 64, 192, device="cuda").bfloat16() for _ in range(3))
        weights = torch.empty(2, device="cuda")
        tickets = torch.empty(2, dtype=torch.int32, device="cuda")
    functional = dispatch_functionalize(step)
    graph = make_fx(functional, tracing_mode="fake")(h_out, h_in, slot, weights, tickets).graph
    wrapped = torch.ops.higher_order.triton_kernel_wrapper_functional
    written = [node.kwargs["tensors_to_clone"] for node in graph.find_nodes(
        op="call_function", target=wrapped)]  # fmt: skip
    assert written == [["partial", "sums", "tickets"], ["out"], ["slot"]]
    assert not [node for node in graph.nodes if "fxcache" in str(node.target)]
