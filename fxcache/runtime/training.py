"""Evaluations that go around the cache: those that train the model, or that gradients are taken of.

They are the model's own, with its own gradients. What is cached is older than they are, so it is
forgotten, and those that are steps of a trajectory are counted.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from fxcache.runtime.session import Session

_WHY = {
    "gradients": "gradients are enabled: nothing is cached, and they are the model's own. Sample "
    "under torch.no_grad() or torch.inference_mode()",
    "input": "an input requires gradients where none are recorded, as in "
    "torch.utils.checkpoint(use_reentrant=True): nothing is cached. Pass x.detach() to sample",
}


def goes_around(session: Session, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an evaluation must go around the cache. Says once why."""
    if is_recomputation():
        return True
    if _may_be_recomputed(args, kwargs):
        why = "input"
    elif torch.is_grad_enabled():
        why = "gradients"
    else:
        return False
    session.say_once(why, _WHY[why])
    return True


def is_recomputation() -> bool:
    """Whether a backward pass computes the model again (torch.utils.checkpoint), which must give
    what it gave before.
    """
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


def _may_be_recomputed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a backward pass may compute the model again though no gradients are recorded."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    return any(isinstance(v, torch.Tensor) and v.requires_grad for v in (*args, *kwargs.values()))


def pass_over(session: Session, timestep: Any, *, is_training: bool) -> None:
    """Note an evaluation at the caller's `timestep` that went around the cache.

    Gradients may be wanted of some steps of a trajectory only, so it counts as a step if it looks
    like one. An evaluation that trains the model is none, and all branches forget for it.
    """
    if is_recomputation():
        return
    is_timed = session.clock is not None and not is_training
    with session.placed(timestep) if is_timed else nullcontext():
        _forget(session, timestep, is_training)


def _forget(session: Session, timestep: Any, is_training: bool) -> None:
    name, branch = session.where
    slot = session.slots.get(name)
    if slot is None:
        return
    is_away = isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu"
    is_step = (
        not is_training
        and (is_away or not _has_several_times(timestep))
        and slot.count(
            branch,
            None if is_away else session.number_of(timestep, slot),  # nothing is read back
            session.direction.rising,
        )
    )
    for key, state in slot.branches.items():
        if state.past and (key == branch or not is_step):
            state.lose("after an uncached evaluation")


def _has_several_times(timestep: Any) -> bool:
    """Whether a time input holds other times for other samples: no sampler's does."""
    if not isinstance(timestep, torch.Tensor) or timestep.numel() < 2:
        return False
    return not bool((timestep == timestep.flatten()[0]).all())
