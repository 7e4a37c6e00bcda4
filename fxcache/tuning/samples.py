"""What a sampler gives for a seed: uncached, for comparison, and with policies."""

import datetime
import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from fxcache.capture.runner import Runner
from fxcache.errors import ProfileError
from fxcache.policy import AdaptiveCache, Origin, Policy, StepSchedule
from fxcache.tuning.record import Counter
from fxcache.tuning.result import Point
from fxcache.tuning.sampling import Sampler, Seen, as_tensor, psnr

#: In dB: where two uncached samples with one seed are less alike, nothing can be compared.
SAME = 30.0


class Tried(NamedTuple):
    """A sample with a policy: its PSNR in dB, how much faster it was than the uncached one on this
    machine, and which evaluations were hits.
    """

    psnr: float
    speedup: float
    seen: Counter


class Samples:
    """Uncached samples by seed, and the seconds that they took.

    `runner` has a policy that never hits.
    """

    def __init__(self, sampler: Sampler, runner: Runner) -> None:
        self.sampler, self.runner, self.never = sampler, runner, runner.session.policy
        self.references: dict[int, torch.Tensor] = {}
        self.seconds: dict[int, float] = {}

    def sample(
        self, policy: Policy, seed: int, make: type[Seen]
    ) -> tuple[torch.Tensor, float, Seen]:
        """A sample, its seconds, and an observer, made by `make`."""
        self.runner.session.policy = policy
        begin = time.perf_counter()
        result, seen = self.sampler.call(self.runner, seed, make)
        sample = as_tensor(result)
        return sample, time.perf_counter() - begin, seen

    def refer(self, seed: int, make: type[Seen]) -> Seen:
        """Sample uncached; again with the same seed, check that it tells the sample."""
        sample, self.seconds[seed], seen = self.sample(self.never, seed, make)
        if not sample.isfinite().all():
            raise ProfileError(f"run must return finite numbers, got inf or NaN, seed {seed}")
        before = self.references.setdefault(seed, sample)
        if before.shape != sample.shape or not psnr(before, sample) >= SAME:
            raise ProfileError(
                f"run must return the same sample for one seed, got two with seed {seed}: make its "
                f"generators anew at each call, from the seed (or use the global ones)"
            )
        return seen

    def tried(self, policy: Policy, seed: int) -> Tried:
        """A sample with `policy` against the uncached one."""
        sample, seconds, seen = self.sample(policy, seed, Counter)
        reference = self.references[seed]
        if sample.shape != reference.shape:
            raise ProfileError(
                f"run must return samples of one shape for one seed, got {list(sample.shape)} and "
                f"{list(reference.shape)} with seed {seed}"
            )
        return Tried(psnr(sample, reference), self.seconds[seed] / seconds, seen)

    def origin(self, what: str, source: str) -> Origin:
        """That of a policy that was tried, or found, with these samples."""
        model = type(self.sampler.model).__name__
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        return Origin(f"{what} {model}", (model,), f"{source}, {date}")


def point_of(
    policy: StepSchedule | AdaptiveCache,
    forecast: str,
    mask: tuple[bool, ...],
    computed: int,
    speedup: float,
    tried: Mapping[int, Tried],
) -> Point:
    """What was measured with a policy, by seed."""
    values = [each.psnr for each in tried.values()]
    return Point(
        policy=policy,
        forecast=forecast,
        computed_steps=computed,
        num_steps=len(mask),
        speedup=speedup,
        measured_speedup=statistics.median(each.speedup for each in tried.values()),
        psnr_mean=statistics.fmean(values),
        psnr_min=min(values),
        seeds=tuple(tried),
        mask=mask,
    )
