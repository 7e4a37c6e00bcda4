"""Who takes part in `benchmark_frontier.py`: fxcache's policies, its peers, and fewer steps.

This file is imported by that script; run that one.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from frontier_cache_dit import CACHE_DIT
from frontier_diffusers import DIFFUSERS
from frontier_measure import BlockCounter, Sampler, Settings, Task
from frontier_policies import OURS, ours

FEWER_STEPS = "fewer steps"


def fewer_steps(task: Task) -> Settings:
    """The sampler without a cache; from 8 of 30 steps to 24, and as much of other numbers."""

    def make(count: int) -> Sampler:
        model = task.load()
        counter = BlockCounter(model, task.steps)

        def run(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, float]:
            return task.sample(model, labels, seed, steps=count), counter.take()

        return run

    for count in range(round(task.steps * 8 / 30), round(task.steps * 24 / 30) + 1):
        yield f"{count} steps", functools.partial(make, count)


def contestants() -> Iterator[tuple[str, str, Callable[[Task], Settings]]]:
    """Method, kind ("baseline", "peer" or "ours") and settings of each."""
    yield FEWER_STEPS, "baseline", fewer_steps
    for name, make in (DIFFUSERS | CACHE_DIT).items():
        yield name, "peer", make
    for name, policies in OURS.items():
        yield name, "ours", functools.partial(ours, policies)
