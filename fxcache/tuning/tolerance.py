"""What a tolerance of `AdaptiveCache` gives with the user's own sampler."""

import datetime
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from fxcache.errors import ProfileError
from fxcache.policy import AdaptiveCache, Origin
from fxcache.tuning.calibrate import progress_bar
from fxcache.tuning.record import Counter
from fxcache.tuning.result import Point, TuneResult, check_same_sample, check_same_shape
from fxcache.tuning.sampling import Sampler, as_tensor, psnr

#: Besides the tolerance that was asked for, so many times it is tried for the table.
OTHERS = (0.6, 1.5)


def try_tolerance(
    sampler: Sampler,
    tolerance: float,
    seeds: Sequence[int],
    progress: bool,
) -> TuneResult:
    """Sample uncached and with `tolerance` (and some others), with each of `seeds`.

    Raises ProfileError where a sample is not finite, or is another one for the same seed, and where
    the denoiser is never called.
    """
    tolerances = sorted({tolerance, *(factor * tolerance for factor in OTHERS)})
    never = AdaptiveCache(tolerance=0)
    references: dict[int, tuple[torch.Tensor, float]] = {}
    found: dict[float, list[_Tried]] = {limit: [] for limit in tolerances}
    with sampler.following(never) as runner:

        def sampled(limit: float, seed: int) -> tuple[torch.Tensor, float, Counter]:
            runner.session.policy = replace(never, tolerance=limit)
            begin = time.perf_counter()
            result, seen = sampler.call(runner, seed, Counter)
            return as_tensor(result), time.perf_counter() - begin, seen

        first, _, seen = sampled(0.0, seeds[0])  # which is compiled meanwhile
        if not seen.evaluations:
            raise ProfileError("run must call the denoiser, and did not")
        every = [(seed, limit) for seed in seeds for limit in (0.0, *tolerances)]
        for seed, limit in progress_bar(every, "sampling", progress):
            sample, seconds, seen = sampled(limit, seed)
            if limit == 0:
                if not sample.isfinite().all():
                    raise ProfileError(f"run must return finite numbers, got inf or NaN, {seed=}")
                if seed == seeds[0]:
                    check_same_sample(sample, first, seed)
                references[seed] = sample, seconds
                continue
            reference, uncached = references[seed]
            check_same_shape(sample, reference, seed)
            found[limit].append(_Tried(psnr(sample, reference), uncached / seconds, seen))
        skipped = runner.session.skipped_share
    model = type(sampler.model).__name__
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    source = f"fxcache.tune(tolerance={tolerance:g}), {sampler.name}, {date}"
    points = {limit: _point(limit, found[limit], skipped, seeds) for limit in reversed(tolerances)}
    origin = Origin(f"tolerance tried with {model}", (model,), source)
    policy = AdaptiveCache(tolerance=tolerance, origin=origin)
    target = f"tolerance={tolerance:g}"
    return TuneResult(policy, target, points[tolerance], tuple(points.values()))


class _Tried(NamedTuple):
    """A sample: its PSNR, the speedup of this machine, and which evaluations were hits."""

    psnr: float
    ratio: float
    seen: Counter


def _point(
    tolerance: float, tried: Sequence[_Tried], skipped: float, seeds: Sequence[int]
) -> Point:
    values, mask = [each.psnr for each in tried], tried[-1].seen.mask
    evaluations = sum(each.seen.evaluations for each in tried)
    hits = sum(each.seen.hits for each in tried)
    return Point(
        policy=AdaptiveCache(tolerance=tolerance),
        forecast="Taylor(1)",
        computed_steps=mask.count(False),
        num_steps=len(mask),
        speedup=evaluations / (evaluations - hits * skipped),
        measured_speedup=statistics.median(each.ratio for each in tried),
        psnr_mean=statistics.fmean(values),
        psnr_min=min(values),
        seeds=tuple(seeds),
        mask=mask,
    )
