"""Record a sampler's own trajectories and make tables of them."""

import datetime
import importlib.metadata
import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fxcache.errors import PolicyError, ProfileError
from fxcache.policy import (
    AdamsBashforth,
    Chebyshev,
    EasyCache,
    FirstBlockCache,
    Forecast,
    Hermite,
    MagCache,
    Policy,
    Reuse,
    SeaCache,
    StepSchedule,
    Taylor,
    TeaCache,
)
from fxcache.policy.checks import check_integer
from fxcache.tuning.profile import Profile, model_metadata
from fxcache.tuning.record import Recorder, Trajectory
from fxcache.tuning.sampling import Run, Sampler, sampler_for
from fxcache.tuning.search import squared_error

Item = TypeVar("Item")

#: The forecasters whose errors are noted, by name.
FORECASTS: dict[str, Forecast] = {
    "Reuse": Reuse(),
    "Taylor(1)": Taylor(order=1),
    "Taylor(2)": Taylor(order=2),
    "Hermite(1)": Hermite(order=1),
    "Hermite(2)": Hermite(order=2),
    "AdamsBashforth(2)": AdamsBashforth(order=2),
    "Chebyshev(2)": Chebyshev(order=2),
}
#: What records for each method: a policy with its probe.
_RECORDING: dict[type, Any] = {
    MagCache: StepSchedule(mask=[False]),
    StepSchedule: StepSchedule(mask=[False]),
    TeaCache: TeaCache(coefficients=[0, 0, 0, 0, 0]),
    FirstBlockCache: FirstBlockCache(),
    EasyCache: EasyCache(),
    SeaCache: SeaCache(),
}
#: With these fields a policy never hits, and needs no number of steps.
_NEVER: dict[str, Any] = {
    "mask": [False],
    "threshold": 0,
    "start": 0,
    "end": 1,
    "final_steps": 0,
    "forecast": Reuse(),
    "origin": None,
    "control_threshold": None,
}

Branches = dict[Hashable, list[Trajectory]]


def calibrate(
    denoiser_or_pipe: Any,
    run: Run,
    policy: type | Policy = MagCache,
    *,
    runs: int = 2,
    seeds: Iterable[int] | None = None,
    component: str | None = None,
    progress: bool = True,
) -> Profile:
    """Record a few of the user's own sampling runs, uncached, and make a `Profile` of them.

    Args:
        denoiser_or_pipe: a denoiser (from `transform`), a model, or a diffusers pipeline. It is as
            it was afterwards.
        run: samples once (and, for `tune`, returns what was sampled): ``run()``, ``run(seed)``,
            ``run(denoiser_or_pipe)`` or ``run(denoiser_or_pipe, seed)``. Other arguments must have
            defaults. torch's global generators are seeded before each call. All trajectories must
            have the same number of steps, and every branch be called at each.
        policy: what to calibrate for, a class or an instance (whose span and probe are recorded).
            `MagCache`: magnitude ratios. `TeaCache`: pairs for its polynomial too. Others: what
            their probe measures, beside the ratios.
        runs: how many times to sample, at least 1, if `seeds` does not say it.
        seeds: one a run; 0, 1, ... if None.
        component: which denoiser of a pipeline that has several.
        progress: show a progress bar.

    Returns:
        Ratios by branch and step, pairs, and each forecaster's error at each step, means over the
        runs. Of `MagCache` and `TeaCache`, ``profile.policy()`` is ready to use.

    Raises:
        PolicyError: for a `policy` that cannot be calibrated, or bad `runs` or `seeds`.
        OptionError: for a `run` or a target that does not fit.
        ProfileError: if `run` raises, its trajectories differ in length, or its residuals are not
            finite or zero.
    """
    kind = policy if isinstance(policy, type) else type(policy)
    recording = _recording_policy(policy, kind)
    check_integer("runs", runs, 1)
    chosen = tuple(range(runs) if seeds is None else seeds)
    for seed in chosen:
        check_integer("seeds", seed, 0)
    if not chosen:
        raise PolicyError("seeds must hold one seed at least, got none")
    with sampler_for(denoiser_or_pipe, run, component) as sampler:
        shown = progress_bar(chosen, "calibrating", progress)
        with sampler.following(recording) as runner:
            recorders = [sampler.call(runner, seed, Recorder)[1] for seed in shown]
        return _profile(recording, kind.__name__, recorded(recorders), sampler, len(chosen))


def _recording_policy(policy: Any, kind: type) -> Policy:
    if kind not in _RECORDING:
        known = ", ".join(sorted(known.__name__ for known in _RECORDING))
        raise PolicyError(f"policy must be one of {known}, got {policy!r}")
    chosen = _RECORDING[kind]
    if isinstance(policy, type(chosen)):
        chosen = policy
    never = {name: value for name, value in _NEVER.items() if hasattr(chosen, name)}
    recording: Policy = replace(chosen, **never)
    return recording


def recorded(recorders: Iterable[Recorder]) -> Branches:
    """The trajectories by branch. Raises ProfileError unless there are any, they are all of one
    length, from step 0 on, and finite.
    """
    branches: Branches = {}
    for recorder in recorders:
        for (_, _, branch), found in recorder.trajectories.items():
            branches.setdefault(branch, []).append(found)
    if not branches:
        raise ProfileError(
            "run did not call the denoiser under torch.no_grad(): nothing was recorded. It must "
            "call the very object that was given, or the one that it is handed"
        )
    every = [found for own in branches.values() for found in own]
    steps = list(range(max(map(len, every))))
    if len(steps) < 2 or any(found.steps != steps for found in every):
        seen = {
            name: sorted({f"{len(f)} of steps {f.steps[0]} to {f.steps[-1]}" for f in own})
            for name, own in branches.items()
        }
        raise ProfileError(
            f"every trajectory must have the same steps, at least 2, in every branch; got {seen}. "
            f"Announce trajectories with denoiser.trajectory(), and sample with one number of "
            f"steps, from the first on, and with guidance at all of them or at none"
        )
    if not all(residual.isfinite().all() for found in every for residual in found.residuals):
        raise ProfileError("the model's residuals must be finite numbers, got inf or NaN")
    return branches


def progress_bar(items: Iterable[Item], title: str, shown: bool) -> Iterable[Item]:
    """`items` with a progress bar, if one is wanted and tqdm is installed."""
    if not shown:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(items, desc=title, unit="run")
    return bar


def _profile(
    recording: Policy, method: str, branches: Branches, sampler: Sampler, runs: int
) -> Profile:
    every = [found for own in branches.values() for found in own]
    named = {"cond" if name is None else str(name): own for name, own in branches.items()}
    if len(named) < len(branches):
        raise ProfileError(f"branches must have names that differ as text, got {[*branches]}")
    signal = {"signal": recording.signal} if isinstance(recording, TeaCache) else {}
    metadata = {
        "method": method,
        **signal,
        **model_metadata(sampler.model),
        "steps": str(len(every[0])),
        "runs": str(runs),
        "sampler": sampler.name,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": ", ".join(_versions()),
    }
    rows = {name: [found.ratios() for found in own] for name, own in named.items()}
    ratios = {
        name: tuple(torch.tensor(own, dtype=torch.float64).mean(0).tolist())
        for name, own in rows.items()
    }
    pairs = [
        pair
        for found in every
        for pair in zip(found.metrics, found.changes, strict=True)
        if all(map(math.isfinite, pair))
    ]
    gram = mean_gram(every)
    errors = {
        name: tuple(_error(gram, step, forecast) for step in range(len(gram)))
        for name, forecast in FORECASTS.items()
    }
    return Profile(ratios, torch.tensor(pairs).double().reshape(-1, 2), errors, metadata)


def mean_gram(trajectories: Iterable[Trajectory]) -> torch.Tensor:
    """The mean of the trajectories' Gram matrices, float64 [T, T]."""
    return torch.stack([found.gram() for found in trajectories]).mean(0)


def _error(gram: torch.Tensor, step: int, forecast: Forecast) -> float:
    """The forecaster's relative error at a step, from the steps right before it; NaN: too few."""
    past, size = tuple(range(step - 1, -1, -1))[: forecast.ring], float(gram[step, step])
    if len(past) < forecast.ring or not size:
        return math.nan
    error = squared_error(gram, step, past, forecast.weights(step, past))
    return float((error / size) ** 0.5)


def _versions() -> Iterator[str]:
    for name in ("fxcache", "torch", "diffusers"):
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
