"""fxcache's entries in `benchmark_frontier.py`: every policy, with every forecaster.

To add a policy or a forecaster, add a line to `OURS`; run that script.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from frontier_measure import CALIBRATION_SEED, Sampler, Settings, Task, grid, regular_masks

import fxcache
from fxcache.policy import Forecast, Policy

#: A setting's name and a policy.
Policies = Iterable[tuple[str, Policy]]

FORECASTS: dict[str, Forecast] = {
    "Reuse": fxcache.Reuse(),
    "Taylor(1)": fxcache.Taylor(order=1),
    "Taylor(2)": fxcache.Taylor(order=2),
    "Hermite(1)": fxcache.Hermite(order=1),
    "AdamsBashforth(2)": fxcache.AdamsBashforth(order=2),
    "Chebyshev(1)": fxcache.Chebyshev(order=1),
}


def with_forecasts(make: Callable[..., Policy], **choices: Any) -> Policies:
    """`make` with all combinations of the choices, with each forecaster."""
    for setting in grid(**choices):
        for name, forecast in FORECASTS.items():
            shown = ", ".join([name, *(f"{key}={value}" for key, value in setting.items())])
            yield shown, make(**setting, forecast=forecast)


def first_block_cache(task: Task) -> Policies:
    limits = {"max_consecutive_hits": (1, 2, 4), "warmup_steps": (6,)}
    return with_forecasts(fxcache.FirstBlockCache, threshold=(0.12, 0.2, 0.5), **limits)


def adaptive_cache(task: Task) -> Policies:
    for tolerance in (0.03, 0.05, 0.08, 0.1, 0.12, 0.16, 0.25):
        yield f"tolerance={tolerance}", fxcache.AdaptiveCache(tolerance=tolerance)


def easy_cache(task: Task) -> Policies:
    return with_forecasts(fxcache.EasyCache, threshold=(0.05, 0.1, 0.2, 0.4), warmup_steps=(6,))


def sea_cache(task: Task) -> Policies:
    thresholds = (0.1, 0.15, 0.3, 0.6, 1.0)
    return with_forecasts(fxcache.SeaCache, threshold=thresholds, max_consecutive_hits=(2, 4))


def tea_cache(task: Task) -> Policies:
    profile = fxcache.calibrate(
        task.load(), task.calibration_run, fxcache.TeaCache, runs=1, progress=False
    )
    make = functools.partial(fxcache.TeaCache, coefficients=profile.coefficients(), warmup_steps=6)
    return with_forecasts(make, threshold=(0.08, 0.15, 0.25, 0.5))


def mag_cache(task: Task) -> Policies:
    profile = fxcache.calibrate(
        task.load(), task.calibration_run, fxcache.MagCache, runs=1, progress=False
    )
    make = functools.partial(fxcache.MagCache, ratios=next(iter(profile.ratios.values())))
    return with_forecasts(make, threshold=(0.1, 1.0), max_consecutive_hits=(1, 2, 4))


def step_schedule(task: Task) -> Policies:
    for (mask_name, mask), (name, forecast) in itertools.product(
        regular_masks(task.steps).items(), FORECASTS.items()
    ):
        if mask_name.startswith(("warm-up 4", "warm-up 6")):
            yield f"{name}, {mask_name}", fxcache.StepSchedule(mask=mask, forecast=forecast)


def tuned(task: Task) -> Policies:
    """What `fxcache.tune` finds for some budgets, on seeds that nobody else sees."""

    def run(denoiser: Any, seed: int) -> torch.Tensor:
        chunks = task.chunks((CALIBRATION_SEED + 1 + seed,), 8)
        return torch.cat([task.sample(denoiser, c, s) for c, s in chunks])

    budgets = sorted({max(2, round(task.steps * number / 30)) for number in TUNED})
    result = fxcache.tune(
        task.load(),
        run,
        max_computed_steps=budgets[0],
        runs=2,
        verify_runs=1,
        frontier=budgets,
        progress=False,
    )
    for point in result.frontier:
        yield f"{point.computed_steps} computed, {point.forecast}", point.policy


#: Numbers of computed steps of 30 that are tuned for.
TUNED = (7, 8, 10, 12, 13, 15, 17, 19, 20, 23)

#: Method and its policies, which are made when their turn comes. `task` knows the steps and samples
#: for a calibration on seeds of its own.
OURS: dict[str, Callable[[Task], Policies]] = {
    "fxcache tune": tuned,
    "fxcache AdaptiveCache": adaptive_cache,
    "fxcache StepSchedule": step_schedule,
    "fxcache FirstBlockCache": first_block_cache,
    "fxcache MagCache": mag_cache,
    "fxcache EasyCache": easy_cache,
    "fxcache TeaCache": tea_cache,
    "fxcache SeaCache": sea_cache,
}


def fxcache_policy(policy: Policy, task: Task) -> Sampler:
    """The denoiser with a policy; the share of computed blocks by fxcache's own report."""
    model = task.load()
    blocks = len(model.transformer_blocks)
    skipped = (blocks - policy.span.head_blocks - policy.span.tail_blocks) / blocks
    denoiser = fxcache.transform(model, policy, backend="eager", audit=False)

    def run(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, float]:
        denoiser.reset()
        pictures = task.sample(denoiser, labels, seed)
        return pictures, 1 - skipped * denoiser.report().hit_rate

    return run


def ours(make: Callable[[Task], Policies], task: Task) -> Settings:
    for name, policy in make(task):
        yield name, functools.partial(fxcache_policy, policy, task)
