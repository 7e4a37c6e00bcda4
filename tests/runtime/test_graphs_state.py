"""CUDA graphs and everything else: exceptions, modes of torch, refusals, memory, the devices."""

import weakref

import pytest
import torch
from helpers import (
    ALTERNATE,
    MASK,
    NEVER,
    TAYLOR,
    as_written,
    assert_close,
    graphed,
    hits,
    plain,
    sample,
    seeded,
    solve,
    times,
)
from opened import Small, opened, served_by_threads
from torch import nn
from torch.utils._pytree import tree_leaves

import fxcache
from fxcache.runtime.device import CudaDevice
from fxcache.runtime.graphs import GraphedRegions


@pytest.fixture
def model():
    return seeded(Small)


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
    a, b = graphed(model, ALTERNATE), plain(model, ALTERNATE)
    solve(a, 8)
    for seed, outputs in served_by_threads(a, range(3)).items():
        b.reset()
        assert_close(outputs, solve(b, 8, seed))


# --- modes of torch ---


def test_inference_mode_and_no_grad_alternate(model, device):
    """Of what measures nothing: of a head, below."""
    a, b = graphed(model, MASK), plain(model, MASK)
    for seed in (0, 1):
        with a.trajectory(), b.trajectory():
            for i in range(12):
                x, t = sample(seed=i + seed), times(1 - i / 12)
                with torch.inference_mode() if i % 3 == seed else torch.no_grad():
                    if i % 2:
                        x, t = x.clone(), t.clone()  # inference tensors
                    assert_close(a(x, t), b(x, t))
    assert hits(a) == hits(b)


def test_one_executor_in_both_modes(model, device, monkeypatch):
    """Whoever filters Dynamo's guards may bring inference_mode to graphs made without it."""
    monkeypatch.setattr("fxcache.runtime.shortcut._ambient", lambda: None)
    a, b = graphed(model, TAYLOR, guards="trajectory"), plain(model, TAYLOR)
    for first in (0, 1):
        with a.trajectory(), b.trajectory():
            for i in range(12):
                x, t = sample(seed=i), times(1 - i / 12)
                with torch.inference_mode() if i % 3 == first else torch.no_grad():
                    assert_close(a(x, t), b(x, t))


@pytest.mark.parametrize("policy", [ALTERNATE, TAYLOR])
def test_speculation_changes_nothing(model, device, policy):
    a, b = graphed(model, policy), plain(model, policy)
    for seed in (0, 1):
        # Heun: the guess is made for the next step, and this one is the same again.
        for i, t in enumerate((1.0, 0.9, 0.9, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4)):
            x = sample(seed=seed) + 0.05 * i
            assert_close(a(x, times(t)), b(x, times(t)))
    assert a.report().records == b.report().records


# --- refusals ---


class OnTheHost(Small):
    def forward(self, x, t, scale):
        return super().forward(x * scale, t)


def test_an_input_on_another_device_is_said(device, caplog, monkeypatch):
    """A scalar on the host beside a model on the GPU: played with a device that does not match."""
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


# --- with the shortcut ---


@pytest.mark.parametrize("policy", [TAYLOR, MASK])
def test_together_with_the_shortcut(model, device, policy):
    a, b = graphed(model, policy, guards="trajectory"), plain(model, policy)
    for seed in range(4):
        with a.trajectory(), b.trajectory():
            assert_close(solve(a, 8, seed), solve(b, 8, seed))
        if seed == 2:
            model.out.weight = nn.Parameter(torch.randn_like(model.out.weight))
    assert a.report().records == b.report().records


# --- memory ---


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


# --- the device ---


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
