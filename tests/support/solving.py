"""What the scripts of several ranks share: a solve, and the comparison with one process."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from launch import everywhere
from torch import nn

import fxcache
from fxcache import AdaptiveCache, EasyCache, FirstBlockCache

NEVER = FirstBlockCache(threshold=0.0)
POLICIES = (
    FirstBlockCache(threshold=0.4),
    AdaptiveCache(tolerance=0.5),
    EasyCache(threshold=0.3, warmup_steps=2),
)
STEPS = 8


def solve(model: nn.Module, at: Callable[[int], dict[str, Any]]) -> list[torch.Tensor]:
    """The outputs of a trajectory, announced to a denoiser."""
    told = model.trajectory(STEPS) if hasattr(model, "trajectory") else torch.no_grad()
    outputs = []
    with torch.no_grad(), told:
        for step in range(STEPS):
            output = model(**at(step))
            outputs.append(output if isinstance(output, torch.Tensor) else output[0])
    return outputs


def decided(denoiser: Any) -> list[bool]:
    return [record.is_hit for record in denoiser.report().records]


def alone(
    whole: nn.Module, policy: Any, at: Callable[[int], dict[str, Any]]
) -> tuple[list[torch.Tensor], list[bool]]:
    """What one process gives and decides. Of the same inputs, asked for once."""
    if (at, policy) not in _known:
        denoiser = fxcache.transform(whole, policy, backend="eager")
        _known[at, policy] = solve(denoiser, at), decided(denoiser)
    return _known[at, policy]


_known: dict[Any, Any] = {}


def compare(
    whole: nn.Module,
    denoiser: Any,
    plain: list[torch.Tensor],
    at: Callable[[int], dict[str, Any]],
    *,
    is_eager: bool = True,
    policies: Sequence[Any] = POLICIES[:1],
) -> None:
    """`denoiser`, of a model that ranks share and that gives `plain`, against one of `whole`: it
    gives the same if it never hits, and decides the same otherwise.
    """
    for got, expected in zip(solve(denoiser, at), plain, strict=True):
        if is_eager:
            assert torch.equal(got, expected), (got - expected).abs().max()
        else:
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for policy in policies:
        denoiser.policy = policy
        denoiser.reset()
        got, (expected, expected_decisions) = solve(denoiser, at), alone(whole, policy, at)
        first, *others = everywhere(decided(denoiser))
        assert all(other == first for other in others), (policy, first, others)
        assert first == expected_decisions, (policy, first, expected_decisions)
        assert True in first, policy
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
