"""Record a sampler's own trajectories and make tables of them."""

import datetime
import importlib.metadata
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fxcache.errors import OptionError, PolicyError, ProfileError
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
from fxcache.profile import Profile, model_metadata
from fxcache.recording import Recorder, Trajectory
from fxcache.sampling import Run, Sampler, sampler_for
from fxcache.search import squared_error

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
#: What records for each method: a policy with its probe that never hits.
_RECORDING: dict[type, Policy] = {
    MagCache: StepSchedule(mask=[False]),
    StepSchedule: StepSchedule(mask=[False]),
    TeaCache: TeaCache(coefficients=[0, 0, 0, 0, 0], threshold=0, final_steps=0),
    FirstBlockCache: FirstBlockCache(threshold=0),
    EasyCache: EasyCache(threshold=0, final_steps=0),
    SeaCache: SeaCache(threshold=0, final_steps=0),
}


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
        run: samples once and returns what was sampled: ``run()``, ``run(seed)``,
            ``run(denoiser_or_pipe)`` or ``run(denoiser_or_pipe, seed)``. The global generators are
            seeded before each call. All trajectories must have the same number of steps.
        policy: what to calibrate for. `MagCache`: magnitude ratios. `TeaCache`: pairs for its
            polynomial too (pass an instance for another `signal`). Others: what their probe
            measures, beside the ratios.
        runs: how many times to sample, if `seeds` does not say it.
        seeds: one a run; 0, 1, ... if None.
        component: which denoiser of a pipeline that has several.
        progress: show a progress bar.

    Returns:
        Ratios by branch and step, pairs, and each forecaster's error at each step, means over the
        runs; ``profile.policy()`` is ready to use.

    Raises:
        PolicyError: for a `policy` that cannot be calibrated.
        OptionError: for a `run` or a target that does not fit.
        ProfileError: if `run` raises, or its trajectories differ in length.
    """
    kind = policy if isinstance(policy, type) else type(policy)
    recording = _recording_policy(policy, kind)
    chosen = tuple(range(runs) if seeds is None else seeds)
    if not chosen:
        raise OptionError(f"runs must be at least 1, got runs={runs!r}, seeds={seeds!r}")
    with sampler_for(denoiser_or_pipe, run, component) as sampler:
        recorder, _ = record(sampler, recording, progress_bar(chosen, "calibrating", progress))
        return _profile(kind.__name__, recorder, sampler, len(chosen))


def _recording_policy(policy: Any, kind: type) -> Policy:
    if kind not in _RECORDING:
        known = ", ".join(sorted(known.__name__ for known in _RECORDING))
        raise PolicyError(f"policy must be one of {known}, got {policy!r}")
    if isinstance(policy, TeaCache):
        return TeaCache(
            coefficients=[0, 0, 0, 0, 0], threshold=0, final_steps=0, signal=policy.signal
        )
    return _RECORDING[kind]


def record(
    sampler: Sampler, policy: Policy, seeds: Iterable[int]
) -> tuple[Recorder, dict[int, torch.Tensor]]:
    """Sample with `policy`, which never hits, once a seed: what was recorded, and the samples."""
    recorder, samples = Recorder(), {}
    with sampler.following(policy) as runner:
        runner.session.observe = recorder
        for seed in seeds:
            samples[seed] = sampler.sample(seed)
    check_recorded(recorder)
    return recorder, samples


def check_recorded(recorder: Recorder) -> None:
    """Raise ProfileError unless there are trajectories, all of one length."""
    lengths = sorted({len(found) for found in recorder.trajectories.values()})
    if not lengths:
        raise ProfileError(
            "run did not call the denoiser under torch.no_grad(): nothing was recorded. It must "
            "call the very object that was given, or the one that it is handed"
        )
    if lengths[0] < 2:
        raise ProfileError(f"a trajectory must have at least 2 steps, got {lengths}")
    by_branch = {
        branch: sorted({len(found) for found in own})
        for branch, own in recorder.by_branch().items()
    }
    if any(len(own) > 1 for own in by_branch.values()) or len(lengths) > 1:
        raise ProfileError(
            f"all trajectories must have one number of steps, got {by_branch} by branch: announce "
            f"them with denoiser.trajectory(), and sample with one number of steps"
        )


def progress_bar(items: Iterable[int], title: str, shown: bool) -> Iterable[int]:
    """`items` with a progress bar, if one is wanted and tqdm is installed."""
    if not shown:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[int] = tqdm(items, desc=title, unit="run")
    return bar


def _profile(method: str, recorder: Recorder, sampler: Sampler, runs: int) -> Profile:
    branches = recorder.by_branch()
    every = [found for own in branches.values() for found in own]
    metadata = {
        "method": method,
        **model_metadata(sampler.model),
        "steps": str(len(every[0])),
        "runs": str(runs),
        "sampler": sampler.name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": ", ".join(_versions()),
    }
    return Profile(
        {
            _name(branch): _mean([found.ratios() for found in own])
            for branch, own in branches.items()
        },
        torch.tensor([pair for found in every for pair in _pairs(found)]).double().reshape(-1, 2),
        _errors(mean_gram(every)),
        metadata,
    )


def _name(branch: Any) -> str:
    return "cond" if branch is None else str(branch)


def _mean(rows: list[list[float]]) -> tuple[float, ...]:
    return tuple(torch.tensor(rows, dtype=torch.float64).mean(0).tolist())


def _pairs(found: Trajectory) -> Iterator[tuple[float, float]]:
    for metric, change in zip(found.metrics, found.changes, strict=True):
        if math.isfinite(metric) and math.isfinite(change):
            yield metric, change


def mean_gram(trajectories: Iterable[Trajectory]) -> torch.Tensor:
    """The mean of the trajectories' Gram matrices, float64 [T, T]."""
    return torch.stack([found.gram() for found in trajectories]).mean(0)


def _errors(gram: torch.Tensor) -> dict[str, tuple[float, ...]]:
    """Each forecaster's relative error at each step, from the steps right before it."""
    errors = {}
    for name, forecast in FORECASTS.items():
        own = []
        for step in range(len(gram)):
            past = tuple(range(step - 1, max(-1, step - 1 - forecast.ring), -1))
            if len(past) < forecast.ring:
                own.append(math.nan)
                continue
            error = squared_error(gram, step, past, forecast.weights(step, past))
            own.append((error / float(gram[step, step])) ** 0.5)
        errors[name] = tuple(own)
    return errors


def _versions() -> Iterator[str]:
    for name in ("fxcache", "torch", "diffusers"):
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
