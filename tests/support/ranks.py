"""What `test_ranks.py` runs on every rank."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from helpers import CountingDevice, as_written
from launch import LIMIT, everywhere
from torch import nn

import fxcache
from fxcache import (
    AdaptiveCache,
    EasyCache,
    FirstBlockCache,
    RanksDifferError,
    SeaCache,
    StepSchedule,
    TeaCache,
)
from fxcache.capture.compile import Compilers


class Parallel(nn.Module):
    """Each rank has tokens of its own; a block adds what the mean of all of them makes."""

    def __init__(self, against: float) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.against = against

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        h = self.embed(x) * (1 + t[:, None, None])
        if context is not None:
            h = h + 0.01 * context.mean()
        for block in self.blocks:
            mean = collectives.all_reduce(h.mean(1, keepdim=True), "avg", dist.group.WORLD)
            h = h + 0.1 * torch.tanh(block(h + mean)) - self.against * torch.tanh(h / 10)
        return self.out(h)


def audit() -> None:
    """On one rank a hit follows, on the other it does not: both must say the same."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Parallel(against=20.0 * rank).eval()
    denoiser = fxcache.transform(model, FirstBlockCache(threshold=float("inf")), backend="eager")
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        for step in range(3):
            denoiser(x + 0.1 * step, torch.full((2,), 1.0 - 0.1 * step))
    report = denoiser.report()
    everybody = [None, None]
    dist.all_gather_object(everybody, (report.audit, report.hits))
    assert everybody[0] == everybody[1], everybody
    assert report.audit > 0.5
    policy = FirstBlockCache()
    alone = fxcache.explain(Alone(model), x, torch.ones(2), policy=policy).audit
    dist.all_gather_object(everybody, alone)
    assert everybody[0] < 1.05 <= everybody[1], everybody


def errors() -> None:
    """The forecast is good on one rank and bad on the other: both must decide the same."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Parallel(against=0.0).eval()
    pace = torch.Generator().manual_seed(3)
    rough = [float(torch.randn((), generator=pace)) for _ in range(16)]
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(rank))

    def decisions(model: nn.Module) -> list[bool]:
        policy = AdaptiveCache(tolerance=0.1, slope=0.0)
        denoiser = fxcache.transform(model, policy, backend="eager", audit=False)
        with torch.no_grad(), denoiser.trajectory(num_steps=16):
            for step in range(16):
                moved = x * (1 + 0.02 * step + 0.2 * rank * rough[step])
                denoiser(moved, torch.full((2,), 1.0 - 0.02 * step))
        return [record.is_hit for record in denoiser.report().records]

    alone, together = [None, None], [None, None]
    dist.all_gather_object(alone, decisions(Alone(model)))
    assert alone[0] != alone[1], alone
    dist.all_gather_object(together, decisions(model))
    assert together[0] == together[1], together
    assert any(together[0]), together


MEASURING = {
    "first block": FirstBlockCache(threshold=0.13),
    "first block, control": FirstBlockCache(threshold=float("inf"), control_threshold=0.25),
    "easy": EasyCache(threshold=0.2, warmup_steps=3),
    "tea": TeaCache(coefficients=(0.0, 0.0, 0.0, 1.0, 0.0), threshold=0.2),
    "sea": SeaCache(threshold=0.2),
}


def metrics() -> None:
    """Each rank moves in turn: alone they decide differently, together they must not."""
    rank = dist.get_rank()
    alone_here = [dist.new_group([each]) for each in range(2)][rank]
    torch.manual_seed(0)
    model = Parallel(against=0.0).eval()
    x = torch.randn(2, 8 - 3 * rank, 4, generator=torch.Generator().manual_seed(rank))

    def decisions(model: nn.Module, policy: Any, **options: Any) -> list[bool]:
        denoiser = fxcache.transform(model, policy, backend="eager", audit=False, **options)
        context, scale = torch.ones(2, 3), 1.0
        with torch.no_grad(), denoiser.trajectory(num_steps=16):
            for step in range(16):
                scale *= 1.02 + 0.3 * (step // 3 % 2 == rank)
                denoiser(x * scale, torch.full((2,), 1.0 - 0.02 * step), context * scale)
        return [record.is_hit for record in denoiser.report().records]

    for name, policy in MEASURING.items():
        alone, together, voted = [None, None], [None, None], [None, None]
        dist.all_gather_object(alone, decisions(Alone(model), policy))
        assert alone[0] != alone[1], (name, alone)
        dist.all_gather_object(together, decisions(model, policy))
        assert together[0] == together[1], (name, together)
        assert any(together[0]), (name, together)
        if name != "first block":  # whatever was measured, a vote is one
            continue
        dist.all_gather_object(voted, decisions(Alone(model), policy, sync=dist.group.WORLD))
        assert voted[0] == voted[1], (name, voted)
        # A vote of others leaves those together whose collectives are in the graph.
        dist.all_gather_object(voted, decisions(model, policy, sync=alone_here))
        assert voted[0] == together[0] == voted[1], (name, voted)


def compiled() -> None:
    """The collective of a measurement is compiled into the head (that of an error is not)."""
    torch.manual_seed(0)
    model, rank = Parallel(against=0.0).eval(), dist.get_rank()
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(rank))
    outputs = []
    for backend in ("eager", "inductor"):
        policy = FirstBlockCache(threshold=0.13)
        denoiser = fxcache.transform(model, policy, backend=backend, audit=False)
        with torch.no_grad(), denoiser.trajectory(num_steps=10):
            times = [torch.full((2,), 1.0 - 0.02 * step) for step in range(10)]
            outputs.append([denoiser(x * (1 + 0.03 * i), t) for i, t in enumerate(times)])
        outputs[-1].append(torch.tensor([r.is_hit for r in denoiser.report().records]))
    assert outputs[0][-1].any()
    torch.testing.assert_close(outputs[0], outputs[1])


def nan() -> None:
    """A rank that measures NaN makes a miss of all."""
    torch.manual_seed(0)
    model, rank = Parallel(against=0.0).eval(), dist.get_rank()
    policy = FirstBlockCache(threshold=float("inf"))
    denoiser = fxcache.transform(model, policy, backend="eager", audit=False)
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad(), denoiser.trajectory(num_steps=6):
        for step in range(6):
            given = x * float("nan") if (step, rank) == (3, 1) else x + 0.01 * step
            denoiser(given, torch.full((2,), 1.0 - 0.02 * step))
    assert [r.is_hit for r in denoiser.report().records] == [False, True, True, False, False, True]


def uncoupled() -> None:
    """Without collectives in the model nobody waits: the ranks take different numbers of steps."""
    torch.manual_seed(0)
    model = Alone(Parallel(against=0.0).eval())
    denoiser = fxcache.transform(model, FirstBlockCache(), backend="eager")
    with torch.no_grad():
        for step in range(3 + 4 * dist.get_rank()):
            denoiser(torch.ones(2, 8, 4) * step, torch.full((2,), 1.0 - 0.1 * step))


class Alone(nn.Module):
    """The same without collectives: what each rank would say by itself."""

    def __init__(self, model: Parallel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        h = self.model.embed(x) * (1 + t[:, None, None])
        if context is not None:
            h = h + 0.01 * context.mean()
        for block in self.model.blocks:
            mean = h.mean(1, keepdim=True)
            h = h + 0.1 * torch.tanh(block(h + mean)) - self.model.against * torch.tanh(h / 10)
        return self.model.out(h)


def checked() -> None:
    """With ``FXCACHE_CHECK_RANKS=1``, ranks that part (here: told not to share) raise, all of them,
    and say who did what where.
    """
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Parallel(against=0.0).eval()
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(rank))
    policy = FirstBlockCache(threshold=0.2)
    for sync in ("auto", None):
        denoiser = fxcache.transform(model, policy, backend="eager", audit=False, sync=sync)

        def step(step: int, denoiser: Any = denoiser) -> None:
            moved = x * (1 + (step == 2 and rank))
            with denoiser.branch("cond"):
                denoiser(moved, torch.full((2,), 1.0 - 0.02 * step))

        with torch.no_grad(), denoiser.trajectory(num_steps=4):
            step(0), step(1)
            if sync == "auto":
                step(2)
                continue
            with pytest.raises(RanksDifferError) as raised:
                step(2)
            message = str(raised.value)
            assert "rank 0 at step 2 of branch 'cond': hit, metric 0" in message, message
            assert "rank 1 at step 2 of branch 'cond': miss (above threshold)" in message
    # Without a probe, a rank may forget after it decided: its weights were changed.
    schedule = StepSchedule(mask=(False, True, True))
    denoiser = fxcache.transform(model, schedule, backend="eager", audit=False)
    with torch.no_grad(), denoiser.trajectory(num_steps=3):
        denoiser(x, torch.full((2,), 1.0))
        if rank:
            model.blocks[1].weight.mul_(1.0)
        with pytest.raises(RanksDifferError, match="weights changed"):
            denoiser(x, torch.full((2,), 0.9))


def half_way() -> None:
    """A rank that raises amid a step and goes: the other one gets an error soon, not a hang, and
    nothing half written is left.
    """
    torch.manual_seed(0)
    model, rank = Parallel(against=0.0).eval(), dist.get_rank()
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(rank))
    policy = FirstBlockCache(threshold=0.0)
    denoiser = fxcache.transform(model, policy, backend="eager", audit=False)
    with torch.no_grad():
        denoiser(x, torch.full((2,), 1.0))
        dist.barrier()
        began = time.monotonic()
        if rank == 1:  # its tokens do not fit
            with pytest.raises(RuntimeError):
                denoiser(x[..., :3], torch.full((2,), 0.9))
            os._exit(0)
        with pytest.raises(RuntimeError, match=r"(?i)connection|peer|socket"):
            denoiser(x, torch.full((2,), 0.9))
    assert time.monotonic() - began < LIMIT
    assert denoiser.report().misses == 1
    os._exit(0)


def uncaptured() -> None:
    """No CUDA graph holds gloo's collectives: those pieces run as they are, and others do not."""
    torch.manual_seed(0)
    model, rank = Parallel(against=0.0).eval(), dist.get_rank()
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(rank))
    schedule = StepSchedule(mask=(False, False, False, True, True, True))
    times = [torch.full((2,), 1.0 - 0.02 * step) for step in range(6)]

    def solved(backend: Any) -> Any:
        denoiser = fxcache.transform(model, schedule, backend=backend, audit=False)
        with torch.no_grad(), denoiser.trajectory(num_steps=6):
            outputs = [denoiser(x * (1 + 0.03 * i), t) for i, t in enumerate(times)]
        return outputs, denoiser.report().hits

    class WithGraphs(Compilers):
        def __init__(self, options: Any) -> None:
            super().__init__(options)
            self.graphs = True

    device = CountingDevice()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxcache.capture.rewrite.graph_device", lambda _: device)
        patch.setattr("fxcache.capture.runner.Compilers", WithGraphs)
        outputs, hits = solved(as_written)
    counted = device.counts()
    assert counted[0] == 1, counted  # the hit
    torch.testing.assert_close(outputs, solved("eager")[0])
    assert everywhere(hits) == [3, 3]
