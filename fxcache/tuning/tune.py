"""Find the schedule for a budget: which steps to compute, and how to forecast the others."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from fxcache.policy.checks import check_integer
from fxcache.tuning.calibrate import progress_bar
from fxcache.tuning.result import TuneResult, check_target
from fxcache.tuning.sampling import Run, sampler_for
from fxcache.tuning.tolerance import try_tolerance
from fxcache.tuning.trials import NEVER, Trials


def tune(
    denoiser_or_pipe: Any,
    run: Run,
    *,
    target_speedup: float | None = None,
    max_computed_steps: int | None = None,
    min_psnr: float | None = None,
    tolerance: float | None = None,
    runs: int = 1,
    verify_runs: int = 2,
    sensitivity_steps: int = 4,
    frontier: Sequence[int] | None = None,
    seed: int = 0,
    component: str | None = None,
    progress: bool = True,
) -> TuneResult:
    """Find the best schedule and forecaster for a speed or a quality, and verify it.

    A few uncached trajectories tell the error of every linear forecast under every schedule
    (`fxcache.tuning.search`); the shortest path over these errors is the schedule. Input shares
    and, where fewer than two in five steps are computed, candidates (`fxcache.tuning.trials`) are
    compared by sampling, the latter with another seed; what is found is verified with further ones.

    Args:
        denoiser_or_pipe, run, component, progress: see `fxcache.calibrate`.
        target_speedup: uncached FLOPs over cached FLOPs, in [1, 1000]. The number of computed
            steps that it leaves is a guarantee; what the clock says depends on the machine, and is
            measured.
        max_computed_steps: compute at most so many steps of a trajectory, at least 1: a guarantee.
        min_psnr: in dB, in [0, 1000], the least PSNR against the uncached sample over the tested
            seeds. It is measured on these seeds and promises nothing about others; where no hit
            allows it, all steps are computed.
        tolerance: try `AdaptiveCache` with it (and with less and more, for the table) on your own
            sampler, in [0.001, 10]: nothing is searched, `verify_runs` seeds are sampled. Exactly
            one of the four targets must be given.
        runs: how many trajectories are recorded.
        verify_runs: with how many seeds the result is verified, at least 1.
        sensitivity_steps: for how many steps it is measured by sampling how an error grows until
            the end (0: all steps count the same; more are little better).
        frontier: numbers of computed steps that are found and verified for the table, too; None for
            four between a quarter and two thirds of the steps, each sampled once, without a choice.
        seed: the first seed, at least 0; runs, the comparison and the verification take the next
            ones.

    Returns:
        The policy, ready for `transform`, and what was measured.

    Raises:
        PolicyError: for an argument outside its range, not exactly one target, or one that no
            schedule reaches.
        OptionError, ProfileError: see `fxcache.calibrate`. ProfileError, too, if `run` does not
            return the same finite sample twice for one seed.
    """
    targets = {
        "target_speedup": target_speedup,
        "max_computed_steps": max_computed_steps,
        "min_psnr": min_psnr,
        "tolerance": tolerance,
    }
    target = check_target(targets)
    for name, value, least in (
        ("runs", runs, 1),
        ("verify_runs", verify_runs, 1),
        ("sensitivity_steps", sensitivity_steps, 0),
        ("seed", seed, 0),
        *(("frontier", number, 1) for number in frontier or ()),
    ):
        check_integer(name, value, least)
    seeds = [seed + number for number in range(runs + 1 + verify_runs)]
    with ExitStack() as inside:
        sampler = inside.enter_context(sampler_for(denoiser_or_pipe, run, component))
        if tolerance is not None:
            return try_tolerance(sampler, tolerance, seeds[-verify_runs:], progress)
        trials = Trials(sampler, inside.enter_context(sampler.following(NEVER)))
        trials.record(seeds[:runs], seeds[runs:], progress)
        trials.measure_sensitivity(sensitivity_steps, progress)
        with trials.better_share():
            if min_psnr is None:
                computed = trials.budget(target_speedup, max_computed_steps)
                chosen = trials.verified(*trials.best(computed))
            else:
                chosen = trials.reaching(min_psnr)
            pick, tries = (trials.likely, 1) if frontier is None else (trials.best, None)
            points = [
                trials.verified(*pick(number), tries)
                for number in progress_bar(trials.spread(frontier), "frontier", progress)
                if number != chosen.computed_steps
            ]
            return trials.result(chosen, points, target)
