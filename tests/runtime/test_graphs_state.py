"""CUDA graphs and everything else: exceptions, modes of torch, refusals, memory, the devices."""

import gc
import threading
import weakref

import pytest
import torch
from helpers import (
    ALTERNATE,
    MASK,
    NEVER,
    TAYLOR,
    EagerDevice,
    assert_close,
    graphed,
    hits,
    plain,
    sample,
    solve,
    times,
)
from torch import nn
from torch.utils._pytree import tree_leaves
from zoo import SequentialDiT

import fxcache
from fxcache.runtime.device import CudaDevice
from fxcache.runtime.executor import StepExecutor
from fxcache.runtime.graphs import GraphedRegions

# --- branches, slots, exceptions ---


def test_branches_and_slots_do_not_mix(model, device):
    a, b = graphed(model, ALTERNATE), plain(model, ALTERNATE)
    places = [("r", "cond"), ("r", "uncond"), ("s", None)]
    got, expected = [], []
    for denoiser, outputs in ((a, got), (b, expected)):
        for repeat in range(2):
            for i in range(6):
                for seed, (slot, branch) in enumerate(places):
                    with denoiser.slot(slot), denoiser.branch(branch):
                        x = sample(seed=seed + 10 * repeat) + 0.05 * i
                        outputs.append(denoiser(x, times(1 - i / 6)))
    assert_close(got, expected)
    assert device.captures == 9


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

    options = {"outline": False}
    denoiser = fxcache.transform(model, ALTERNATE, backend=compiler, **options)
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
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            denoiser(sample(), times(1))
    monkeypatch.undo()
    for i in range(3):
        assert_close(denoiser(sample(seed=i), times(1)), model(sample(seed=i), times(1)))


def test_threads_with_slots(model, device):
    denoiser = graphed(model, ALTERNATE)
    expected = {s: solve(plain(model, ALTERNATE), 8, s) for s in range(3)}
    solve(denoiser, 8)
    got = {}

    def serve(request):
        with torch.no_grad(), denoiser.slot(request):
            got[request] = [solve(denoiser, 8, request) for _ in range(3)][-1]

    threads = [threading.Thread(target=serve, args=(s,)) for s in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request, outputs in expected.items():
        assert_close(got[request], outputs)


# --- modes of torch ---


@pytest.mark.parametrize("policy", [TAYLOR, MASK])
def test_inference_mode_and_no_grad_alternate(model, device, policy):
    a, b = graphed(model, policy), plain(model, policy)
    for seed in (0, 1):
        with a.trajectory(), b.trajectory():
            for i in range(12):
                x, t = sample(seed=i + seed), times(1 - i / 12)
                with torch.inference_mode() if i % 3 == seed else torch.no_grad():
                    if i % 2:
                        x, t = x.clone(), t.clone()  # inference tensors
                    assert_close(a(x, t), b(x, t))
    assert hits(a) == hits(b)


@pytest.mark.parametrize("policy", [TAYLOR, MASK])
def test_one_executor_in_both_modes(model, device, policy, monkeypatch):
    """Whoever filters Dynamo's guards may bring inference_mode to graphs made without it."""
    monkeypatch.setattr("fxcache.runtime.shortcut._ambient", lambda: None)
    a, b = graphed(model, policy, guards="trajectory"), plain(model, policy)
    for first in (0, 1):
        with a.trajectory(), b.trajectory():
            for i in range(12):
                x, t = sample(seed=i), times(1 - i / 12)
                with torch.inference_mode() if i % 3 == first else torch.no_grad():
                    assert_close(a(x, t), b(x, t))


@pytest.mark.parametrize("policy", [ALTERNATE, TAYLOR, NEVER])
def test_speculation_changes_nothing(model, device, policy):
    a, b = graphed(model, policy), plain(model, policy)
    for seed in (0, 1):
        # Heun: the guess is made for the next step, and this one is the same again.
        for i, t in enumerate((1.0, 0.9, 0.9, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4)):
            x = sample(seed=seed) + 0.05 * i
            assert_close(a(x, times(t)), b(x, times(t)))
    assert a.report().records == b.report().records


# --- refusals ---


class OnTheHost(SequentialDiT):
    def forward(self, x, t, scale):
        return super().forward(x * scale, t)


def test_an_input_on_another_device_is_said(device, caplog, monkeypatch):
    """A scalar on the host beside a model on the GPU: played with a device that does not match."""
    original = fxcache.capture.backend.not_graphable

    def with_another_device(inputs, device):
        return original(inputs, torch.device("cuda"))

    monkeypatch.setattr("fxcache.capture.backend.not_graphable", with_another_device)
    model = OnTheHost().eval()
    denoiser = graphed(model, NEVER)
    for i in range(3):
        given = sample(seed=i), times(1), torch.tensor(2.0)
        assert_close(denoiser(*given), model(*given))
    assert "the input x is on cpu, the model on cuda" in caplog.text
    assert device.counts() == (0, 0, 0)


# --- with the shortcut ---


@pytest.mark.parametrize("policy", [ALTERNATE, TAYLOR, MASK])
def test_together_with_the_shortcut(model, device, policy):
    a, b = graphed(model, policy, guards="trajectory"), plain(model, policy)
    for seed in range(4):
        with a.trajectory(), b.trajectory():
            assert_close(solve(a, 8, seed), solve(b, 8, seed))
        if seed == 2:
            model.out.weight = nn.Parameter(torch.randn_like(model.out.weight))
    assert a.report().records == b.report().records


# --- memory ---


def session(denoiser):
    return denoiser._fxcache.session


def regions_of(denoiser):
    """What the denoiser's only executor has made."""
    executors = [thing for thing in gc.get_objects() if type(thing) is StepExecutor]
    (executor,) = (e for e in executors if e.session is session(denoiser))
    return executor.regions


@pytest.mark.parametrize("policy", [TAYLOR, MASK])
def test_finished_requests_give_graphs_and_buffers_back(model, device, policy):
    denoiser = graphed(model, policy)
    buffers, regions = [], []
    for request in range(3):
        with denoiser.slot(request), denoiser.trajectory():
            solve(denoiser, 8)
            (state,) = session(denoiser).slot.branches.values()
            buffers.append(weakref.ref(state.buffers))
            regions.append(weakref.ref(regions_of(denoiser)[state.buffers]))
            assert isinstance(regions[-1](), GraphedRegions)
            assert regions[-1]().graphs
            del state
    assert [ref() for ref in buffers] == [None] * 3
    assert [ref() for ref in regions] == [None] * 3
    assert len(regions_of(denoiser)) == 0


def test_reset_and_new_layouts_give_graphs_back(model, device):
    denoiser = graphed(model, ALTERNATE)
    for free in (denoiser.reset, lambda: denoiser(sample(batch=3), times(1, 3))):
        solve(denoiser, 8)
        (state,) = session(denoiser).slot.branches.values()
        graphs = regions_of(denoiser)[state.buffers].graphs.values()
        results = tree_leaves([graph[1] for graph in graphs if graph])
        alive = [weakref.ref(leaf) for leaf in results if isinstance(leaf, torch.Tensor)]
        alive.append(weakref.ref(state.buffers))
        del state, graphs, results
        free()
        assert len(alive) > 3
        assert not any(ref() is not None for ref in alive)


# --- the device ---


def test_eager_device_replays_into_the_captured_results():
    given, ran = torch.ones(3), []

    def work():
        ran.append(1)
        return [given * 2, None], (given.sum(),)

    replay, results = EagerDevice().capture(work)
    (double, nothing), (total,) = results
    given.fill_(5)
    replay()
    assert nothing is None
    assert torch.equal(double, torch.full((3,), 10.0))
    assert total == 15
    reading = EagerDevice().read(total)
    total.zero_()
    assert reading() == 15
    assert len(ran) == 2


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
