"""Where a pipeline's sampler is, read from its scheduler, which is not changed.

Every `set_timesteps` of a diffusers scheduler makes a new tensor of timesteps, so the tensor itself
tells one solve from the next; most schedulers also count their own calls of `step`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Reading:
    """What the scheduler says before an evaluation.

    `timesteps` are those of the whole solve, one an evaluation. `index` is the place among them of
    the evaluation to come; None: not known yet (`counts` is set, and will be known after the first
    step), or never. With `repeats`, the list is longer than the solve has steps: equal neighbours
    (Heun) are one.
    """

    timesteps: torch.Tensor
    index: int | None
    counts: bool
    repeats: bool = False


def read(pipe: Callable[[], Any]) -> Reading | None:
    """What the scheduler says that the pipeline has at that moment: users replace it.

    None before the first `set_timesteps`, and for schedulers of another kind.
    """
    scheduler = getattr(pipe(), "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1 or not len(timesteps):
        return None
    steps = getattr(scheduler, "num_inference_steps", None)
    if steps is None:
        return None  # timesteps are still those of training
    counts = hasattr(scheduler, "step_index")
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    repeats = len(timesteps) > steps
    return Reading(timesteps, None if index is None else int(index), counts, repeats)
