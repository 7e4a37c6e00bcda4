"""What only a GPU can tell: replayed graphs, kernels and reads, against the plain model.

pytest -m gpu
"""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, hits
from torch import nn
from zoo import SequentialDiT

import fxcache
from fxcache import (
    Chebyshev,
    EasyCache,
    FirstBlockCache,
    MagCache,
    SeaCache,
    StepSchedule,
    Taylor,
    TeaCache,
)
from fxcache.runtime.device import CudaDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

POLICY = FirstBlockCache(threshold=math.inf, max_consecutive_hits=2, forecast=Taylor(order=1))
MASK = [False, True, True, False, True, True, False, True]
POLICIES = [
    POLICY,
    StepSchedule(mask=MASK, forecast=Taylor(order=1)),
    MagCache(ratios=[1.0] * 8, threshold=1, retention_ratio=0.2, forecast=Chebyshev(order=1)),
    EasyCache(threshold=math.inf, warmup_steps=2, max_consecutive_hits=2),
    TeaCache(coefficients=[0, 0, 0, 1, 0], threshold=math.inf, max_consecutive_hits=2),
    SeaCache(threshold=math.inf),
]


def inputs(step, tokens=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 4, generator=generator) + 0.1 * step
    return {"x": x.cuda(), "t": torch.full((2,), 1 - 0.1 * step, device="cuda")}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SequentialDiT(depth=6, width=64).cuda().eval()


def run(denoiser, steps=8, tokens=64):
    with denoiser.trajectory(steps):
        return [denoiser(**inputs(step, tokens)) for step in range(steps)]


@pytest.mark.parametrize("kernel", ["aten", "triton"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("options", [{}, {"guards": "trajectory"}])
def test_replayed_graphs_compute_what_eager_does(model, policy, kernel, options):
    eager = fxcache.transform(model, policy, backend="eager", kernel="aten")
    graphed = fxcache.transform(model, policy, mode="reduce-overhead", kernel=kernel, **options)
    expected = run(eager)
    for _ in range(3):
        for got, right in zip(run(graphed), expected, strict=True):
            assert_close(got, right, tolerance=1e-3)
    assert hits(graphed) == 3 * hits(eager)


def test_later_calls_do_not_overwrite_earlier_outputs(model):
    denoiser = fxcache.transform(model, POLICY, mode="reduce-overhead")
    run(denoiser)
    kept = run(denoiser)
    copies = [out.clone() for out in kept]
    run(denoiser)
    torch.cuda.synchronize()
    assert all(map(torch.equal, kept, copies))


def test_replaced_weights_are_noticed(model):
    never = FirstBlockCache(threshold=0.0)
    denoiser = fxcache.transform(model, never, mode="reduce-overhead")
    run(denoiser)
    model.blocks[3].mlp[0].weight = nn.Parameter(torch.randn_like(model.blocks[3].mlp[0].weight))
    assert_close(run(denoiser)[3], model(**inputs(3)), tolerance=1e-3)
    model.blocks[2].proj.weight.data = torch.randn_like(model.blocks[2].proj.weight)
    assert_close(run(denoiser)[3], model(**inputs(3)), tolerance=1e-3)
    model.to("cpu").to("cuda")
    assert_close(run(denoiser)[3], model(**inputs(3)), tolerance=1e-3)


def test_other_shapes_are_captured_anew(model):
    denoiser = fxcache.transform(model, POLICY, mode="reduce-overhead")
    eager = fxcache.transform(model, POLICY, backend="eager", kernel="aten")
    for tokens in (64, 48, 64):
        for got, right in zip(run(denoiser, 8, tokens), run(eager, 8, tokens), strict=True):
            assert_close(got, right, tolerance=1e-3)


def test_a_schedule_never_waits_for_the_gpu(model):
    denoiser = fxcache.transform(model, StepSchedule(mask=MASK), mode="reduce-overhead")
    run(denoiser)
    run(denoiser)
    given = [inputs(step) for step in range(8)]
    with denoiser.trajectory(8):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(8):
                denoiser(**given[step])
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_one_read_a_step(model, monkeypatch):
    reads = []
    original = CudaDevice.read
    monkeypatch.setattr(CudaDevice, "read", lambda self, x: reads.append(1) or original(self, x))
    denoiser = fxcache.transform(model, POLICY, mode="reduce-overhead")
    run(denoiser)
    assert len(reads) == 8


def test_nan_is_a_miss(model):
    denoiser = fxcache.transform(model, POLICY, mode="reduce-overhead")
    run(denoiser)
    with denoiser.trajectory():
        denoiser(**inputs(0))
        denoiser(**{**inputs(1), "x": inputs(1)["x"] * math.nan})
        denoiser(**inputs(2))
    assert hits(denoiser)[-3:] == [False, False, False]


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_steps_are_read_from_the_scheduler(model, scheduler):
    """Without a read-back: a policy that measures nothing knows its steps (Heun's come twice)."""
    diffusers = pytest.importorskip("diffusers")
    mask = [False, True, False, True, False]
    pipe = SimpleNamespace(scheduler=getattr(diffusers, scheduler)(), transformer=model)
    with fxcache.apply(pipe, StepSchedule(mask=mask), mode="reduce-overhead") as handle:
        for _ in range(3):
            pipe.scheduler.set_timesteps(5, device="cuda")
            pipe.scheduler.set_begin_index(0)
            x = torch.randn(1, 64, 4, device="cuda")
            for t in pipe.scheduler.timesteps:
                output = pipe.transformer(x, t.expand(1) / 1000)
                x = pipe.scheduler.step(output, t, x, return_dict=False)[0]
        records = handle.report().records
    number = len(records) // 3
    assert [r.is_hit for r in records] == [mask[r.step] for r in records]
    assert [r.step for r in records[:number]] == [r.step for r in records[number : 2 * number]]
    assert {r.step for r in records} == set(range(5))
    assert {r.branch for r in records} == {None}
