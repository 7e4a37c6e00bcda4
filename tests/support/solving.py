"""What the scripts of several ranks share: a solve, and the comparison with one process."""

from collections.abc import Callable
from typing import Any

import torch
from helpers import adopt, hits, plain
from launch import everywhere, on_one
from torch import nn

from fxcache import AdaptiveCache, EasyCache, FirstBlockCache

FIRST_BLOCK = FirstBlockCache(threshold=0.4)
ADAPTIVE = AdaptiveCache(tolerance=0.5)
EASY = EasyCache(threshold=0.3, warmup_steps=2)
STEPS = 8
At = Callable[[int], dict[str, Any]]


def solve(model: nn.Module, at: At) -> list[torch.Tensor]:
    """The outputs of a trajectory, announced to a denoiser."""
    told = model.trajectory(STEPS) if hasattr(model, "trajectory") else torch.no_grad()
    with torch.no_grad(), told:
        outputs = [model(**at(step)) for step in range(STEPS)]
    return [output if isinstance(output, torch.Tensor) else output[0] for output in outputs]


def identical(denoiser: nn.Module, model: nn.Module, at: At) -> None:
    """What `denoiser`, which never hits, gives is what `model` gives, bit for bit."""
    assert all(map(torch.equal, solve(denoiser, at), solve(model, at)))


def as_alone(
    denoiser: Any,
    policy: Any,
    whole: nn.Module,
    at: At,
    own_at: At | None = None,
    part: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole,
) -> None:
    """With `policy`, `denoiser`, of a model that ranks share, decides and gives what a denoiser of
    `whole` does in one process; or, called with inputs of its own, a `part` of it.
    """

    def solved() -> Any:
        denoiser = plain(whole, policy)
        return solve(denoiser, at), hits(denoiser)

    if (at, policy) not in _known:
        _known[at, policy] = on_one(solved)
    expected, decisions = _known[at, policy]
    got = solve(adopt(denoiser, policy), own_at or at)
    assert everywhere(hits(denoiser)) == [decisions] * torch.distributed.get_world_size(), policy
    assert True in decisions, policy
    torch.testing.assert_close(got, list(map(part, expected)), atol=1e-5, rtol=1e-4)


_known: dict[Any, Any] = {}
