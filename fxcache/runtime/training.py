"""Evaluations that go around the cache: those that train the model, or that gradients are taken of.

They are the model's own, with its own gradients.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxcache.runtime.session import Session


def trains(model: nn.Module, timestep: Any) -> bool:
    """Whether an evaluation with gradients trains the model: it says so, or its samples have
    different times, which no sampler's have.
    """
    if model.training and torch.is_grad_enabled():
        return True
    if not isinstance(timestep, torch.Tensor) or timestep.device.type != "cpu":
        return False
    return timestep.numel() > 1 and not bool((timestep == timestep.flatten()[0]).all())


def goes_around(session: Session, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an evaluation must go around the cache. Says once why."""
    if is_recomputation():
        return True
    if torch.is_grad_enabled():
        session.say_once(
            "gradients",
            "gradients are enabled: nothing is cached, and they are the model's own. Sample under "
            "torch.no_grad() or torch.inference_mode()",
        )
        return True
    if torch.is_inference_mode_enabled():
        return False
    values = (*args, *kwargs.values())
    may_be_recomputed = any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)
    if may_be_recomputed:
        session.say_once(
            "input",
            "an input requires gradients where none are recorded, as in "
            "torch.utils.checkpoint(use_reentrant=True): nothing is cached. Pass x.detach() to "
            "sample",
        )
    return may_be_recomputed


def is_recomputation() -> bool:
    """Whether a backward pass computes the model again (torch.utils.checkpoint), which must give
    what it gave before.
    """
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
