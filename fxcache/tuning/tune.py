"""Find the schedule for a budget: which steps to compute, and how to forecast the others."""

import datetime
import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fxcache.capture.runner import Runner
from fxcache.errors import PolicyError, ProfileError
from fxcache.policy import Forecast, Hermite, Origin, Reuse, StepSchedule, Taylor
from fxcache.policy.checks import check_integer
from fxcache.policy.fitted import Fitted
from fxcache.policy.forecast import Within
from fxcache.tuning.calibrate import mean_gram, progress_bar, recorded
from fxcache.tuning.record import Counter, Recorder
from fxcache.tuning.result import (
    Point,
    TuneResult,
    check_same_sample,
    check_same_shape,
    check_target,
)
from fxcache.tuning.sampling import Run, Sampler, Seen, as_tensor, psnr, sampler_for
from fxcache.tuning.search import (
    Past,
    fit_weights,
    interpolated_sensitivity,
    schedule_costs,
    search,
    table_of,
)
from fxcache.tuning.tolerance import try_tolerance

log = logging.getLogger("fxcache")

#: So many past residuals a fitted forecast is made of.
RING = 3
#: So many hits in a row are considered, unless the budget needs more.
MAX_HITS = 6
#: The forecasters that are tried besides fitted weights. Hermite's of order 1 is a Taylor step
#: damped by 2 * scale^2: here 0.75, which is better where few steps are computed.
FORECASTS: dict[str, Forecast] = {
    "Taylor(1)": Taylor(order=1),
    "damped Taylor(1)": Hermite(order=1, scale=0.375**0.5),
}
FITTED = "fitted weights"

#: By number of computed steps, a mask.
Plan = dict[int, tuple[bool, ...]]


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
    sensitivity_steps: int = 6,
    frontier: Sequence[int] | None = None,
    seed: int = 0,
    component: str | None = None,
    progress: bool = True,
) -> TuneResult:
    """Find the best schedule and forecaster for a speed or a quality, and verify it.

    A few uncached trajectories tell the error of every linear forecast under every schedule
    (`fxcache.tuning.search`); the shortest path over these errors is the schedule. The forecasters
    are then compared by sampling, with another seed, and the winner is verified with further seeds.

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
            the end (0: all steps count the same).
        frontier: numbers of computed steps that are sampled for the table, too; None for four
            between a quarter and two thirds of the steps.
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
    if tolerance is not None:
        with sampler_for(denoiser_or_pipe, run, component) as sampler:
            return try_tolerance(sampler, tolerance, seeds[-verify_runs:], progress)
    with sampler_for(denoiser_or_pipe, run, component) as sampler, _trials(sampler) as trials:
        trials.record(seeds[:runs], seeds[runs:], progress)
        trials.measure_sensitivity(sensitivity_steps, progress)
        if min_psnr is None:
            computed = trials.budget(target_speedup, max_computed_steps)
            chosen = trials.verified(*trials.best(computed))
        else:
            chosen = trials.reaching(min_psnr)
        points = [
            trials.verified(*trials.likely(number))
            for number in progress_bar(trials.spread(frontier), "frontier", progress)
            if number != chosen.computed_steps
        ]
        return trials.result(chosen, points, target)


@contextmanager
def _trials(sampler: Sampler) -> Iterator["_Trials"]:
    never = StepSchedule(mask=[False], forecast=Fitted(table={}, ring=RING))
    with sampler.following(never) as runner:
        yield _Trials(sampler, runner, never)


class _Trials:
    """Samples with schedules, and keeps what was measured."""

    def __init__(self, sampler: Sampler, runner: Runner, never: StepSchedule) -> None:
        self.sampler, self.runner, self.never = sampler, runner, never
        self.references: dict[int, torch.Tensor] = {}
        self.seconds: dict[int, float] = {}
        self.gram = torch.empty(0)
        self.sensitivity = torch.empty(0)
        self.plans: dict[str, Plan] = {}

    def record(self, seeds: Sequence[int], others: Sequence[int], progress: bool) -> None:
        """Sample uncached: with `seeds` for the errors, with `others` for comparison."""
        self.recorded, self.compared, self.verifying = list(seeds), others[0], list(others[1:])
        recorders = []
        for seed in progress_bar([*seeds, *others], "recording", progress):
            make = Recorder if seed in seeds else Counter
            self.references[seed], self.seconds[seed], seen = self._sample(self.never, seed, make)
            if isinstance(seen, Recorder):
                recorders.append(seen)
            if not self.references[seed].isfinite().all():
                raise ProfileError(f"run must return finite numbers, got inf or NaN, seed {seed}")
        # The squared errors of a step's branches add up.
        self.gram = torch.stack([mean_gram(own) for own in recorded(recorders).values()]).sum(0)
        self.runner.session.expected_steps = self.steps
        self.sensitivity = torch.ones(self.steps, dtype=torch.float64)
        self._check_seeds()

    def _check_seeds(self) -> None:
        """Whether a seed tells the sample: raise ProfileError if not, warn if all are the same."""
        again, _, _ = self._sample(self.never, self.compared, Counter)
        reference = self.references[self.compared]
        check_same_sample(reference, again, self.compared)
        if all(torch.equal(reference, self.references[seed]) for seed in self.verifying):
            log.warning(
                "run returned the same sample for seeds %s: what was measured is of that one alone",
                [self.compared, *self.verifying],
            )

    @property
    def steps(self) -> int:
        return len(self.gram)

    def measure_sensitivity(self, number: int, progress: bool) -> None:
        """How much of a single hit's error is left at the end, at `number` steps."""
        places = {round(1 + i * (self.steps - 2) / max(1, number - 1)) for i in range(number)}
        errors: dict[int, float] = {}
        seed = self.recorded[0]
        for step in progress_bar(sorted(places), "sensitivity", progress):
            mask = tuple(at == step for at in range(self.steps))
            sample, _, _ = self._sample(self._schedule(mask, Reuse()), seed, Counter)
            errors[step] = float((sample - self.references[seed]).square().mean().sqrt())
        if errors:
            self.sensitivity = interpolated_sensitivity(self.gram, errors)

    def _sample(
        self, policy: StepSchedule, seed: int, make: type[Seen]
    ) -> tuple[torch.Tensor, float, Seen]:
        """A sample, its seconds, and an observer, made by `make`."""
        self.runner.session.policy = policy
        begin = time.perf_counter()
        result, seen = self.sampler.call(self.runner, seed, make)
        sample = as_tensor(result)
        return sample, time.perf_counter() - begin, seen

    def _schedule(self, mask: Sequence[bool], forecast: Forecast) -> StepSchedule:
        return StepSchedule(mask=mask, forecast=Within(inner=forecast, ring=RING))

    def budget(self, target_speedup: float | None, max_computed_steps: int | None) -> int:
        """The number of computed steps that a target leaves. Raises PolicyError if it is none."""
        if max_computed_steps is not None:
            return min(max_computed_steps, self.steps)
        assert target_speedup is not None
        for computed in range(self.steps, 0, -1):
            if self.speedup(computed) >= target_speedup:
                return computed
        raise PolicyError(
            f"target_speedup must be at most {self.speedup(1):.3g} with one of {self.steps} steps "
            f"computed (a hit skips {self.skipped:.0%} of the FLOPs), got {target_speedup}"
        )

    @property
    def skipped(self) -> float:
        return self.runner.session.skipped_share

    def speedup(self, computed: int) -> float:
        """Uncached FLOPs over cached FLOPs."""
        return self.steps / (computed + (self.steps - computed) * (1 - self.skipped))

    def spread(self, numbers: Iterable[int] | None) -> list[int]:
        """The numbers of computed steps of the frontier, each once; None: four of ours."""
        if numbers is None:
            numbers = [max(2, round(share * self.steps)) for share in (1 / 4, 1 / 3, 1 / 2, 2 / 3)]
        return sorted({min(number, self.steps) for number in numbers})

    def best(self, computed: int) -> tuple[str, StepSchedule]:
        """Of the candidates with `computed` steps, the one that samples best with a seed that the
        errors were not recorded with.
        """
        if computed >= self.steps:
            return "all computed", StepSchedule(mask=[False] * self.steps)
        return max(self._candidates(computed), key=lambda pair: self.compare(*pair).psnr_mean)

    def compare(self, name: str, policy: StepSchedule) -> Point:
        """A candidate, measured with the seed that chooses."""
        return self._point(name, policy, [self.compared])

    def _candidates(self, computed: int) -> Iterator[tuple[str, StepSchedule]]:
        for name, plan in self._plans_for(computed).items():
            mask = plan[computed]
            forecast = FORECASTS.get(name)
            if forecast is None:
                forecast = Fitted(table=table_of(mask, RING, self._fitted), ring=RING)
            yield name, StepSchedule(mask=mask, forecast=forecast)

    def _plans_for(self, computed: int) -> dict[str, Plan]:
        """Plans with so many computed steps."""
        hits = -(-self.steps // computed) - 1
        if hits > MAX_HITS:
            return self._searched(max_hits=hits, most=computed)
        if not self.plans:
            self.plans = self._searched(max_hits=MAX_HITS)
        return self.plans

    def _searched(self, **limits: int) -> dict[str, Plan]:
        """By forecaster and number of computed steps, the mask of the shortest path."""
        tried = {name: (forecast.weights, forecast.ring) for name, forecast in FORECASTS.items()}
        plans = {}
        for name, (weights, ring) in {**tried, FITTED: (self._fitted, RING)}.items():
            cost = schedule_costs(self.gram, self.sensitivity, weights)
            found = search(cost, steps=self.steps, ring=ring, **limits)
            plans[name] = {number: mask for number, (_, mask) in found.items()}
        return plans

    def _fitted(self, step: int, past: Past) -> list[float]:
        return fit_weights(self.gram, step, past)

    def likely(self, computed: int) -> tuple[str, StepSchedule]:
        """The candidate that the recorded errors prefer; of few computed steps, the best sample."""
        if not 2 * self.steps <= 5 * computed < 5 * self.steps:
            return self.best(computed)
        return [*self._candidates(computed)][-1]

    def verified(self, name: str, policy: StepSchedule) -> Point:
        """A candidate, measured with the seeds that chose nothing."""
        return self._point(name, policy, self.verifying)

    def _point(self, name: str, policy: StepSchedule, seeds: Iterable[int]) -> Point:
        values, ratios, most = [], [], 0
        for seed in seeds:
            tried = self._schedule(policy.mask, policy.forecast)
            sample, seconds, counter = self._sample(tried, seed, Counter)
            check_same_shape(sample, self.references[seed], seed)
            values.append(psnr(sample, self.references[seed]))
            ratios.append(self.seconds[seed] / seconds)
            most = max(most, counter.most)
        if most > policy.num_computed:
            raise ProfileError(
                f"a trajectory computed {most} steps where the schedule has {policy.num_computed}: "
                f"trajectories must all have {self.steps} steps"
            )
        return Point(
            policy=policy,
            forecast=name,
            computed_steps=most,
            num_steps=self.steps,
            speedup=self.speedup(most),
            measured_speedup=statistics.median(ratios),
            psnr_mean=statistics.fmean(values),
            psnr_min=min(values),
            seeds=tuple(seeds),
            mask=tuple(policy.mask),
        )

    def reaching(self, min_psnr: float) -> Point:
        """The verified point with the fewest computed steps whose every PSNR is `min_psnr`."""
        numbers = range(-(-self.steps // (MAX_HITS + 1)), self.steps + 1)
        low, high = 0, len(numbers) - 1
        while low < high:  # quality grows with the computed steps, about
            middle = (low + high) // 2
            enough = self.compare(*self.likely(numbers[middle])).psnr_min >= min_psnr
            low, high = (low, middle) if enough else (middle + 1, high)
        for number in numbers[low:]:
            point = self.verified(*self.best(number))
            if point.psnr_min >= min_psnr:
                return point
        raise PolicyError(
            f"min_psnr must be at most what two uncached samples with one seed have, got "
            f"{min_psnr}: with all steps computed it was {point.psnr_min:.1f} dB"
        )

    def result(self, chosen: Point, others: Sequence[Point], target: str) -> TuneResult:
        """The chosen point with its origin, and the table."""
        model = type(self.sampler.model).__name__
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        source = f"fxcache.tune({target}), {self.sampler.name}, {self.steps} steps, {date}"
        origin = Origin(f"schedule tuned for {model}", (model,), source)
        policy = StepSchedule(mask=chosen.mask, forecast=chosen.policy.forecast, origin=origin)
        points = sorted([chosen, *others], key=lambda point: point.computed_steps)
        return TuneResult(policy, target, chosen, tuple(points))
