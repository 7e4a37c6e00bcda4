"""Sample with schedules, and keep what was measured."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch

from fxcache.capture.runner import Runner
from fxcache.errors import PolicyError, ProfileError
from fxcache.policy import Forecast, Reuse, StepSchedule
from fxcache.policy.fitted import Fitted
from fxcache.policy.forecast import Within
from fxcache.tuning.calibrate import mean_gram, progress_bar, recorded
from fxcache.tuning.record import Counter, Recorder
from fxcache.tuning.result import Point, TuneResult
from fxcache.tuning.samples import SAME, Samples, point_of
from fxcache.tuning.sampling import Sampler
from fxcache.tuning.search import (
    ALIKE,
    fit_table,
    fit_weights,
    interpolated_sensitivity,
    schedule_costs,
    search,
)

log = logging.getLogger("fxcache")

#: So many past residuals a fitted forecast is made of.
RING = 3
#: So many hits in a row are considered, unless the budget needs more.
MAX_HITS = 6
#: What is tried besides an `input_share` of 1, and by how many dB it must be better: what a hit
#: sees of its input also tells a wrong cut, and follows another sampler's noise.
SHARE, GAIN = 0.1, 0.5

#: What is followed uncached; its pieces serve all schedules of its input share.
NEVER = StepSchedule(mask=[False], forecast=Fitted(table={}, ring=RING))

#: By number of computed steps, a mask.
Plan = dict[int, tuple[bool, ...]]


class Trials(Samples):
    """Samples with schedules, and keeps what was measured. `runner` follows `NEVER`."""

    def __init__(self, sampler: Sampler, runner: Runner) -> None:
        super().__init__(sampler, runner)
        #: The input share of the schedules that are tried.
        self.share = 1.0
        self.gram = torch.empty(0)
        self.sensitivity = torch.empty(0)
        self.plans: dict[tuple[object, ...], Plan] = {}

    def record(self, seeds: Sequence[int], others: Sequence[int], progress: bool) -> None:
        """Sample uncached: with `seeds` for the errors, with `others` but the first to verify."""
        self.recorded, self.compared, self.verifying = seeds[0], others[0], list(others[1:])
        recorders = []
        for seed in progress_bar([*seeds, *self.verifying], "recording", progress):
            if seed in seeds:
                recorders.append(self.refer(seed, Recorder))
            else:
                self.refer(seed, Counter)
        # The squared errors of a step's branches add up.
        self.gram = torch.stack([mean_gram(own) for own in recorded(recorders).values()]).sum(0)
        self.runner.session.expected_steps = self.steps
        reference = self.references[self.recorded]
        if all(torch.equal(reference, self.references[seed]) for seed in self.verifying):
            log.warning(
                "run returned the same sample for seeds %s: what was measured is of that one alone",
                [self.recorded, *self.verifying],
            )

    @property
    def steps(self) -> int:
        return len(self.gram)

    def measure_sensitivity(self, number: int, progress: bool) -> None:
        """How much of a single hit's error is left at the end, at `number` steps.

        The last step is one of them, and the others lie before it: samplers jump there (to no
        noise), so it tells nothing of the step before, nor that of it.
        """
        last, spread = self.steps - 1, number - 1
        width = max(0, last - 2) / max(1, spread - 1)
        places = {round(1 + i * width) for i in range(spread)}
        places |= {last} if number else set()
        values: dict[int, float] = {}
        for step in progress_bar(sorted(places), "sensitivity", progress):
            mask = tuple(at == step for at in range(self.steps))
            values[step] = self.tried(self._schedule(mask, Reuse()), self.recorded).psnr
        if not any(value >= SAME for value in values.values()):
            self.refer(self.recorded, Counter)  # again: does a seed tell the sample?
        errors = {step: 10 ** (-value / 20) for step, value in values.items()}
        self.sensitivity = interpolated_sensitivity(self.gram, errors)

    def _schedule(self, mask: Sequence[bool], forecast: Forecast) -> StepSchedule:
        within = Within(inner=forecast, ring=RING)
        return StepSchedule(mask=mask, forecast=within, input_share=self.share)

    @contextmanager
    def better_share(self) -> Iterator[None]:
        """Inside, schedules have the input share that samples better with 3 of 5 steps computed.

        What was recorded does not tell: a forecast's errors are about the same with both, but a hit
        hands on the error of its input, or does not.
        """
        name, policy = self.likely(max(1, 3 * self.steps // 5))
        least = self._point(name, policy, [self.recorded]).psnr_mean + GAIN
        runner = self.runner
        with ExitStack() as followed:
            never = replace(NEVER, input_share=SHARE)
            self.runner, self.share = followed.enter_context(self.sampler.following(never)), SHARE
            self.runner.session.expected_steps = self.steps
            if not self._point(name, policy, [self.recorded]).psnr_mean > least:
                followed.close()
                self.runner, self.share = runner, 1.0
            yield

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
        first, *others = self._candidates(computed)
        if not others:
            return first
        return max(first, *others, key=lambda pair: self.compare(*pair).psnr_mean)

    def compare(self, name: str, policy: StepSchedule) -> Point:
        """A candidate, measured with the seed that chooses."""
        if self.compared not in self.references:
            self.refer(self.compared, Counter)
        return self._point(name, policy, [self.compared])

    def likely(self, computed: int) -> tuple[str, StepSchedule]:
        """The candidate that the recorded errors prefer."""
        return next(self._candidates(computed))

    def _candidates(self, computed: int) -> Iterator[tuple[str, StepSchedule]]:
        """What may be best; the likeliest first. Of few computed steps errors are large, and may
        not add up: there, masks by the sensitivity and by its square, each with both ways to fit.
        """
        if computed >= self.steps:
            yield "all computed", StepSchedule(mask=[False] * self.steps)
            return
        is_few = 5 * computed < 2 * self.steps
        masks = [self._plan(exponent, computed)[computed] for exponent in (1, 2)[: 1 + is_few]]
        ways = {"fitted weights": ALIKE, "weights fitted one by one": 0.0}
        for name, alike in list(ways.items())[: 1 + is_few]:
            for mask in dict.fromkeys(masks):
                table = fit_table(self.gram, self.sensitivity, mask, RING, alike=alike)
                forecast = Fitted(table=table, ring=RING)
                yield name, StepSchedule(mask=mask, forecast=forecast, input_share=self.share)

    def _plan(self, exponent: int, computed: int) -> Plan:
        """The masks of the shortest paths, that with `computed` steps included."""
        hits = -(-self.steps // computed) - 1
        few = {"max_hits": hits, "most": computed} if hits > MAX_HITS else {"max_hits": MAX_HITS}
        key = exponent, *few.values()
        if key not in self.plans:
            weights = partial(fit_weights, self.gram)
            cost = schedule_costs(self.gram, self.sensitivity**exponent, weights)
            found = search(cost, steps=self.steps, ring=RING, **few)
            self.plans[key] = {number: mask for number, (_, mask) in found.items()}
        return self.plans[key]

    def verified(self, name: str, policy: StepSchedule, number: int | None = None) -> Point:
        """A candidate, measured with so many of the seeds that chose nothing; None: with all."""
        return self._point(name, policy, self.verifying[:number])

    def _point(self, name: str, policy: StepSchedule, seeds: Iterable[int]) -> Point:
        schedule = self._schedule(policy.mask, policy.forecast)
        tried = {seed: self.tried(schedule, seed) for seed in seeds}
        most = max(each.seen.most for each in tried.values())
        if most > policy.num_computed:
            raise ProfileError(
                f"a trajectory computed {most} steps where the schedule has {policy.num_computed}: "
                f"trajectories must all have {self.steps} steps"
            )
        return point_of(policy, name, tuple(policy.mask), most, self.speedup(most), tried)

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
        source = f"fxcache.tune({target}), {self.sampler.name}, {self.steps} steps"
        policy = replace(chosen.policy, origin=self.origin("schedule tuned for", source))
        points = sorted([chosen, *others], key=lambda point: point.computed_steps)
        return TuneResult(policy, target, chosen, tuple(points))
