"""What a tolerance of `AdaptiveCache` gives with the user's own sampler."""

from collections.abc import Sequence
from dataclasses import replace

from fxcache.errors import ProfileError
from fxcache.policy import AdaptiveCache
from fxcache.tuning.calibrate import progress_bar
from fxcache.tuning.record import Counter
from fxcache.tuning.result import Point, TuneResult
from fxcache.tuning.samples import Samples, Tried, point_of
from fxcache.tuning.sampling import Sampler

#: Besides the tolerance that was asked for, so many times it is tried for the table.
OTHERS = (0.6, 1.5)


def try_tolerance(
    sampler: Sampler, tolerance: float, seeds: Sequence[int], progress: bool
) -> TuneResult:
    """Sample uncached and with `tolerance` (and some others), with each of `seeds`.

    Raises ProfileError where a sample is not finite, or is another one for the same seed, and where
    the denoiser is never called.
    """
    tolerances = sorted({tolerance, *(factor * tolerance for factor in OTHERS)})
    never = AdaptiveCache(tolerance=0)
    found: dict[float, dict[int, Tried]] = {limit: {} for limit in tolerances}
    with sampler.following(never) as runner:
        samples = Samples(sampler, runner)
        if not samples.refer(seeds[0], Counter).evaluations:  # which is compiled meanwhile
            raise ProfileError("run must call the denoiser, and did not")
        every = [(seed, limit) for seed in seeds for limit in (0.0, *tolerances)]
        for seed, limit in progress_bar(every, "sampling", progress):
            if limit == 0:
                samples.refer(seed, Counter)
            else:
                found[limit][seed] = samples.tried(replace(never, tolerance=limit), seed)
        skipped = runner.session.skipped_share
    points = {limit: _point(limit, found[limit], skipped) for limit in reversed(tolerances)}
    target = f"tolerance={tolerance:g}"
    origin = samples.origin("tolerance tried with", f"fxcache.tune({target}), {sampler.name}")
    policy = AdaptiveCache(tolerance=tolerance, origin=origin)
    return TuneResult(policy, target, points[tolerance], tuple(points.values()))


def _point(tolerance: float, tried: dict[int, Tried], skipped: float) -> Point:
    counters = [each.seen for each in tried.values()]
    mask, evaluations = counters[-1].mask, sum(seen.evaluations for seen in counters)
    speedup = evaluations / (evaluations - sum(seen.hits for seen in counters) * skipped)
    policy = AdaptiveCache(tolerance=tolerance)
    return point_of(policy, "Taylor(1)", mask, mask.count(False), speedup, tried)
