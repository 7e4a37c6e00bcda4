"""Ranks that share collectives: what `test_sharded.py` runs on every rank."""

import math
import os
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from helpers import NEVER, CountingDevice, adopt, as_written, hits, plain
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
    """Each rank has tokens of its own; a block adds what the mean of all of them makes, or (without
    collectives, if it `is_alone`) the mean of these.
    """

    is_alone = False

    def __init__(self, against: float = 0.0) -> None:
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
            mean = h.mean(1, keepdim=True)
            if not self.is_alone:
                mean = collectives.all_reduce(mean, "avg", dist.group.WORLD)
            h = h + 0.1 * torch.tanh(block(h + mean)) - self.against * torch.tanh(h / 10)
        return self.out(h)


def net(against: float = 0.0) -> tuple[Parallel, Parallel]:
    """A model, and the same without collectives: what each rank would say by itself."""
    torch.manual_seed(0)
    model = Parallel(against).eval()
    alone = deepcopy(model)
    alone.is_alone = True
    return model, alone


def tokens(number: int = 8) -> torch.Tensor:
    """Those of this rank."""
    return torch.randn(2, number, 4, generator=torch.Generator().manual_seed(dist.get_rank()))


def times(step: int) -> torch.Tensor:
    return torch.full((2,), 1.0 - 0.02 * step)


def solve(denoiser: Any, samples: Sequence[torch.Tensor], *contexts: Any) -> list[torch.Tensor]:
    """The outputs of a trajectory."""
    with torch.no_grad(), denoiser.trajectory(num_steps=len(samples)):
        given = zip(samples, map(times, range(len(samples))), *contexts, strict=True)
        return [denoiser(*each) for each in given]


def audit() -> None:
    """On one rank a hit follows, on the other it does not: both must say the same."""
    x, (model, alone) = tokens(), net(against=20.0 * dist.get_rank())
    denoiser = plain(model)
    with torch.no_grad():
        for step in range(3):
            denoiser(x + 0.1 * step, times(5 * step))
    report = denoiser.report()
    first, second = everywhere((report.audit, report.hits))
    assert first == second
    assert report.audit > 0.5
    good, bad = everywhere(fxcache.explain(alone, x, torch.ones(2), policy=FirstBlockCache()).audit)
    assert good < 1.05 <= bad, (good, bad)


MEASURING = (
    FirstBlockCache(threshold=0.13),
    FirstBlockCache(threshold=math.inf, control_threshold=0.25),
    AdaptiveCache(tolerance=0.1, slope=0.0),
    EasyCache(threshold=0.2, warmup_steps=3),
    TeaCache(coefficients=(0.0, 0.0, 0.0, 1.0, 0.0), threshold=0.2),
    SeaCache(threshold=0.2),
)


def metrics() -> None:
    """Each rank moves in turn, and is forecast well or badly: alone they decide differently,
    together they must not.
    """
    rank, (model, alone) = dist.get_rank(), net()
    own = [dist.new_group([each]) for each in range(2)][rank]
    scales = torch.tensor([1.02 + 0.3 * (step // 3 % 2 == rank) for step in range(16)]).cumprod(0)
    given = (
        [scale * tokens(8 - 3 * rank) for scale in scales],
        [s * torch.ones(2, 3) for s in scales],
    )

    def decisions(denoiser: Any, policy: Any) -> list[list[bool]]:
        solve(adopt(denoiser, policy), *given)
        return everywhere(hits(denoiser))

    apart, together = plain(alone, audit=False), plain(model, audit=False)
    for policy in MEASURING:
        first, second = decisions(apart, policy)
        assert first != second, (policy, first)
        first, second = decisions(together, policy)
        assert first == second, (policy, first, second)
        assert any(first), policy
    # Whatever is measured, a vote is one. A vote of others leaves those together whose collectives
    # are in the graph.
    first, second = decisions(plain(alone, audit=False, sync=dist.group.WORLD), MEASURING[0])
    assert first == second, (first, second)
    others = decisions(plain(model, audit=False, sync=own), MEASURING[0])
    assert others == decisions(together, MEASURING[0]), others


def nan() -> None:
    """A rank that measures NaN makes a miss of all."""
    denoiser, samples = plain(net()[0], audit=False), [tokens() + 0.01 * step for step in range(6)]
    if dist.get_rank():
        samples[3] *= math.nan
    solve(denoiser, samples)
    assert hits(denoiser) == [False, True, True, False, False, True]


def uncoupled() -> None:
    """Without collectives in the model nobody waits: the ranks take different numbers of steps."""
    solve(plain(net()[1]), [torch.ones(2, 8, 4) * step for step in range(3 + 4 * dist.get_rank())])


def compiled() -> None:
    """The collective of a measurement is compiled into the head (that of an error is not)."""
    outputs, samples = [], [tokens() * (1 + 0.03 * step) for step in range(10)]
    for backend in ("eager", "inductor"):
        denoiser = fxcache.transform(net()[0], MEASURING[0], backend=backend, audit=False)
        outputs.append([*solve(denoiser, samples), torch.tensor(hits(denoiser))])
    assert outputs[0][-1].any()
    torch.testing.assert_close(*outputs)


def uncaptured() -> None:
    """No CUDA graph holds gloo's collectives: those pieces run as they are, and others do not."""
    model, samples = net()[0], [tokens() * (1 + 0.03 * step) for step in range(6)]
    schedule = StepSchedule(mask=(False, False, False, True, True, True))

    class WithGraphs(Compilers):
        def __init__(self, options: Any) -> None:
            super().__init__(options)
            self.graphs = True

    device = CountingDevice()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxcache.capture.rewrite.graph_device", lambda _: device)
        patch.setattr("fxcache.capture.runner.Compilers", WithGraphs)
        denoiser = fxcache.transform(model, schedule, backend=as_written, audit=False)
        outputs = solve(denoiser, samples)
    counted = device.counts()
    assert counted[0] == 1, counted  # the hit
    torch.testing.assert_close(outputs, solve(plain(model, schedule, audit=False), samples))
    assert everywhere(denoiser.report().hits) == [3, 3]


@mock.patch.dict(os.environ, FXCACHE_CHECK_RANKS="1")
def checked() -> None:
    """With this in the environment, ranks that part (here: told not to share) raise, all of them,
    and say who did what where.
    """
    rank, model, x = dist.get_rank(), net()[0], tokens()
    for sync in ("auto", None):
        denoiser = plain(model, FirstBlockCache(threshold=0.2), audit=False, sync=sync)
        with torch.no_grad(), denoiser.trajectory(num_steps=4), denoiser.branch("cond"):
            for step in range(2 if sync is None else 3):
                denoiser(x * (1 + (step == 2 and rank)), times(step))
            if sync is None:
                with pytest.raises(RanksDifferError) as raised:
                    denoiser(x * (1 + rank), times(2))
                message = str(raised.value)
                assert "rank 0 at step 2 of branch 'cond': hit, metric 0" in message, message
                assert "rank 1 at step 2 of branch 'cond': miss (above threshold)" in message
    # Without a probe, a rank may forget after it decided: its weights were changed.
    denoiser = plain(model, StepSchedule(mask=(False, True, True)), audit=False)
    with torch.no_grad(), denoiser.trajectory(num_steps=3):
        denoiser(x, times(0))
        if rank:
            model.blocks[1].weight.mul_(1.0)
        with pytest.raises(RanksDifferError, match="weights changed"):
            denoiser(x, times(5))


def half_way() -> None:
    """A rank that raises amid a step and goes: the other one gets an error soon, not a hang, and
    nothing half written is left.
    """
    denoiser, x = plain(net()[0], NEVER, audit=False), tokens()
    with torch.no_grad():
        denoiser(x, times(0))
        dist.barrier()
        began = time.monotonic()
        if dist.get_rank() == 1:  # its tokens do not fit
            with pytest.raises(RuntimeError):
                denoiser(x[..., :3], times(5))
            os._exit(0)
        with pytest.raises(RuntimeError, match=r"(?i)connection|peer|socket"):
            denoiser(x, times(5))
    assert time.monotonic() - began < LIMIT
    assert denoiser.report().misses == 1
    os._exit(0)
