"""CUDA graphs: what is captured, replayed, read and given back, and where it goes wrong.

The device replays by running the work again. That numbers and decisions are those without graphs is
in test_ways.py.
"""

import math
import weakref

import pytest
import torch
from comparing import assert_close, assert_identical
from helpers import CountingDevice, as_written, graphed, hits, plain, sample, seeded, solve, times
from opened import Small, opened
from policies import ALTERNATE, MASK, NEVER, TAYLOR
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

import fxcache
from fxcache.capture.compile import Compilers
from fxcache.options import Options
from fxcache.runtime.device import CudaDevice, graph_device
from fxcache.runtime.graphs import MAX_QUIET_RESTARTS, GraphedRegions


@pytest.mark.slow
def test_inductor_pieces(model, monkeypatch):
    device = CountingDevice()
    monkeypatch.setattr("fxcache.capture.rewrite.graph_device", lambda _: device)
    a, b = fxcache.transform(model, ALTERNATE, mode="reduce-overhead"), plain(model, ALTERNATE)
    for seed in (0, 1):
        assert_close(solve(a, 6, seed), solve(b, 6, seed))
    assert device.captures == 3
    # Timesteps of diffusers are an expanded scalar, latents often a slice of a batch.
    for i in range(4):
        x, t = torch.randn(2, 8, 8)[..., ::2], torch.tensor([1 - i / 4]).expand(2)
        assert_close(a(x, t), b(x, t))
    assert device.captures == 6


def test_options_that_ask_for_graphs():
    for options in ({"mode": "reduce-overhead"}, {"mode": "max-autotune"},
                    {"options": {"triton.cudagraphs": True}}):  # fmt: skip
        assert Compilers(Options(**options)).graphs
    for mode in (None, "max-autotune-no-cudagraphs"):
        assert not Compilers(Options(mode=mode)).graphs
    assert graph_device(torch.device("cpu")) is None
    assert isinstance(graph_device(torch.device("cuda")), CudaDevice)


@pytest.mark.parametrize(
    ("policy", "pieces", "step"),
    [(ALTERNATE, 3, (0, 2, 1)), (TAYLOR, 5, (0, 2, 1)), (MASK, 2, (0, 1, 0))],
    ids=["reuse", "taylor", "schedule"],
)
def test_every_piece_is_captured_once(model, device, policy, pieces, step):
    """Head, hit, and a miss for each ring slot; then nothing is captured any more. A step is two
    replays and one read, or one replay if nothing is measured.
    """
    denoiser = graphed(model, policy)
    for _ in range(2):
        solve(denoiser, 8)
    assert device.counts()[0] == pieces
    for seed in range(3):
        solve(denoiser, 8, seed)
    device.reads = device.replays = 0
    with denoiser.trajectory():
        for i in range(8):
            denoiser(sample(), times(1 - i / 8))
            assert device.counts() == step
    assert policy is not MASK or hits(denoiser)[-8:] == list(MASK.mask)


@pytest.mark.parametrize("policy", [ALTERNATE, MASK])
def test_outputs_are_not_written_again_and_inputs_never(model, device, policy):
    denoiser = graphed(model, policy)
    for seed in (0, 1):
        given = [(sample(seed=seed) + i, times(1 - i / 8)) for i in range(8)]
        before = [(x.clone(), t.clone()) for x, t in given]
        outputs, copies = [], []
        for x, t in given:
            outputs.append(denoiser(x, t))
            copies.append(outputs[-1].clone())
        assert_identical(outputs, copies)
        assert_identical(given, before)
        for output in outputs:
            output.mul_(math.nan)  # they are the caller's
    assert all(out.isfinite().all() for out in solve(denoiser, 8))


@pytest.mark.parametrize("policy", [NEVER, MASK])
def test_slices_and_expanded_inputs_keep_their_strides(model, device, policy):
    strides = []

    def compiler(gm, example_inputs):
        def run(*args):
            strides.append([a.stride() for a in args if a.shape in ((2, 8, 4), (2,))])
            return gm(*args)

        return run

    a, b = fxcache.transform(model, policy, backend=compiler), plain(model, policy)
    for step in range(8):
        wide = torch.randn(2, 9, 8)
        x, t = wide[:, 1:, ::2], torch.tensor(1 - step / 8).expand(2)
        before = wide.clone()
        assert_close(a(x, t), b(x, t))
        assert torch.equal(wide, before)
    assert any((72, 8, 2) in given and (0,) in given for given in strides)
    assert not any((32, 4, 1) in given or (1,) in given for given in strides)


@pytest.mark.parametrize("dynamic", [None, True])
def test_new_shapes_capture_anew_and_old_ones_work_again(model, device, dynamic):
    a, b = (make(model, ALTERNATE, dynamic=dynamic) for make in (graphed, plain))
    for shape in ({}, {"batch": 3, "tokens": 5}, {}):
        device.counts()
        for seed in (0, 1):
            assert_close(solve(a, 6, seed, **shape), solve(b, 6, seed, **shape))
        assert device.counts()[0] == 3
    assert dynamic is None or a.report().graphs == 1


def test_a_number_that_changes_is_pointed_out(device, caplog):
    class Timed(Small):
        def forward(self, x, timestep):
            return super().forward(x, torch.full((x.shape[0],), 1.0) * timestep)

    model = seeded(Timed)
    denoiser = graphed(model, NEVER)
    for i in range(2 * MAX_QUIET_RESTARTS):
        x = sample(seed=i)
        assert_close(denoiser(x, 900 - i), model(x, 900 - i))
    assert caplog.text.count("captured anew") == 1
    assert "pass it as a tensor" in caplog.text


def test_replaced_weights_inside_of_a_subclass_are_seen(device):
    """Quantized weights are tensors around others, and have no address of their own."""

    def wrapped(value):
        return nn.Parameter(TwoTensor(value.clone(), value.clone()), requires_grad=False)

    model = seeded(Small)
    model.out.weight = wrapped(model.out.weight.data)
    denoiser = graphed(model, NEVER)
    for i in range(6):
        if i == 4:
            model.out.weight = wrapped(model.out.weight.a * 2)
        assert_close(denoiser(sample(), times(1)).a, model(sample(), times(1)).a)


@pytest.mark.parametrize("piece", ["head", "hit", "miss"])
def test_an_exception_leaves_a_clean_state(model, device, piece):
    """Each piece fails, after it wrote, when it warms up, is captured and is replayed."""
    pieces, failing = iter(["head", "hit", "miss"]), set()

    def compiler(gm, example_inputs, name=None):
        name = next(pieces)

        def run(*args):
            results = gm(*args)
            if name in failing:
                raise RuntimeError("out of memory, say")
            return results

        return run

    denoiser = fxcache.transform(model, ALTERNATE, backend=compiler, outline=False)
    failures = 0
    for i in range(24):
        failing.clear()
        if i % 3 == 2 or i == 1:
            failing.add(piece)
        x, t = sample(seed=i), times(1 - i / 24)
        before = len(hits(denoiser))
        try:
            out = denoiser(x, t)
        except RuntimeError:
            failures += 1
            assert len(hits(denoiser)) == before
            failing.clear()
            again = denoiser(x, t)
            assert hits(denoiser)[-1] is False
            assert_close(again, model(x, t))
        else:
            if not hits(denoiser)[-1]:
                assert_close(out, model(x, t))
    assert failures > 3
    assert any(hits(denoiser))


def test_out_of_memory_while_staging(model, device, monkeypatch):
    denoiser = graphed(model, NEVER)
    solve(denoiser)
    monkeypatch.setattr("fxcache.runtime.graphs._memory", lambda _: 1 / 0)
    model.embed.weight = nn.Parameter(torch.randn_like(model.embed.weight))
    with pytest.raises(ZeroDivisionError):
        denoiser(sample(), times(1))
    with pytest.raises(ZeroDivisionError):
        denoiser(sample(), times(1))
    monkeypatch.undo()
    for i in range(3):
        assert_close(denoiser(sample(seed=i), times(1)), model(sample(seed=i), times(1)))


def test_an_input_on_another_device_is_said(device, caplog, monkeypatch):
    """A scalar on the host beside a model on the GPU: played with a device that does not match."""

    class OnTheHost(Small):
        def forward(self, x, t, scale):
            return super().forward(x * scale, t)

    original = fxcache.capture.rewrite.not_graphable

    def with_another_device(inputs, device):
        return original(inputs, torch.device("cuda"))

    monkeypatch.setattr("fxcache.capture.rewrite.not_graphable", with_another_device)
    model = seeded(OnTheHost)
    denoiser = graphed(model, NEVER)
    for i in range(3):
        given = sample(seed=i), times(1), torch.tensor(2.0)
        assert_close(denoiser(*given), model(*given))
    assert "the input x is on cpu, the model on cuda" in caplog.text
    assert device.counts() == (0, 0, 0)


def held_by(denoiser):
    """Its only buffers, and what its only executor has made for them."""
    (executor,), (buffers,) = denoiser.executors(), denoiser.buffers()
    return buffers, executor.regions[buffers]


@pytest.mark.parametrize("policy", [TAYLOR, MASK])
def test_finished_requests_give_graphs_and_buffers_back(model, device, policy):
    denoiser = opened(model, policy, backend=as_written)
    held = []
    for request in range(3):
        with denoiser.slot(request), denoiser.trajectory():
            solve(denoiser, 8)
            buffers, regions = held_by(denoiser)
            assert isinstance(regions, GraphedRegions)
            assert regions.graphs
            held += [weakref.ref(buffers), weakref.ref(regions)]
            del buffers, regions
    assert [ref() for ref in held] == [None] * 6
    assert [len(executor.regions) for executor in denoiser.executors()] == [0]


def test_reset_and_new_layouts_give_graphs_back(model, device):
    denoiser = opened(model, ALTERNATE, backend=as_written)
    for free in (denoiser.reset, lambda: denoiser(sample(batch=3), times(1, 3))):
        solve(denoiser, 8)
        buffers, regions = held_by(denoiser)
        results = tree_leaves([graph[1] for graph in regions.graphs.values() if graph])
        alive = [weakref.ref(leaf) for leaf in results if isinstance(leaf, torch.Tensor)]
        alive.append(weakref.ref(buffers))
        del buffers, regions, results
        free()
        assert len(alive) > 3
        assert not any(ref() is not None for ref in alive)


def test_readings_of_two_threads_do_not_share_memory(monkeypatch):
    """Two begin before the first is asked for its numbers."""

    class Event:
        def record(self):
            pass

        synchronize = record

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    device = CudaDevice(torch.device("cuda"))
    with torch.inference_mode():
        first = device.read(torch.tensor([1.0, 0.5]))
    second = device.read(torch.tensor([2.0]))
    assert first() == [1.0, 0.5]
    assert second() == [2.0]
    for _ in range(3):
        assert device.read(torch.tensor([3.0]))() == [3.0]
    assert len(device.free) == 2
