"""What a tolerance of `AdaptiveCache` gives with the user's own sampler."""

import datetime
import statistics
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from fxcache.errors import ProfileError
from fxcache.policy import AdaptiveCache, Origin
from fxcache.report import Record
from fxcache.tuning.calibrate import progress_bar
from fxcache.tuning.record import Counter
from fxcache.tuning.result import Point, TuneResult, check_same_shape
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

    Raises ProfileError where a sample is not finite or of another shape.
    """
    tolerances = sorted({tolerance, *(factor * tolerance for factor in OTHERS)})
    never = AdaptiveCache(tolerance=0)
    references: dict[int, tuple[torch.Tensor, float]] = {}
    found: dict[float, list[tuple[float, float, Sequence[Record]]]] = {t: [] for t in tolerances}
    with sampler.following(never) as runner:

        def sampled(policy: AdaptiveCache, seed: int) -> tuple[torch.Tensor, float]:
            runner.session.policy = policy
            begin = time.perf_counter()
            result, _ = sampler.call(runner, seed, Counter)
            return as_tensor(result), time.perf_counter() - begin

        every = [(seed, limit) for seed in seeds for limit in (0.0, *tolerances)]
        for seed, limit in progress_bar(every, "sampling", progress):
            sample, seconds = sampled(replace(never, tolerance=limit), seed)
            if limit == 0:
                if not sample.isfinite().all():
                    raise ProfileError(f"run must return finite numbers, got inf or NaN, {seed=}")
                references[seed] = sample, seconds
                continue
            reference, uncached = references[seed]
            check_same_shape(sample, reference, seed)
            records = runner.session.report().records
            found[limit].append((psnr(sample, reference), uncached / seconds, records))
        skipped = runner.session.skipped_share
    model = type(sampler.model).__name__
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    source = f"fxcache.tune(tolerance={tolerance:g}), {sampler.name}, {date}"
    points = {t: _point(t, found[t], skipped, seeds) for t in reversed(tolerances)}
    origin = Origin(f"tolerance tried with {model}", (model,), source)
    policy = AdaptiveCache(tolerance=tolerance, origin=origin)
    target = f"tolerance={tolerance:g}"
    return TuneResult(policy, target, points[tolerance], tuple(points.values()))


def _point(
    tolerance: float,
    tried: Sequence[tuple[float, float, Sequence[Record]]],
    skipped: float,
    seeds: Sequence[int],
) -> Point:
    values = [value for value, _, _ in tried]
    every = [record for _, _, records in tried for record in records]
    hits = sum(record.is_hit for record in every)
    _, _, last = tried[-1]
    branches: dict[Hashable, dict[int, bool]] = {}
    for record in last:
        branch = branches.setdefault((record.slot, record.trajectory, record.branch), {})
        branch[record.step] = branch.get(record.step, True) and record.is_hit
    masks = [tuple(branch.values()) for branch in branches.values()]
    mask = max(masks, key=lambda each: len(each) - sum(each), default=())
    return Point(
        policy=AdaptiveCache(tolerance=tolerance),
        forecast="Taylor(1)",
        computed_steps=len(mask) - sum(mask),
        num_steps=len(mask),
        speedup=len(every) / (len(every) - hits * skipped) if every else 1.0,
        measured_speedup=statistics.median(ratio for _, ratio, _ in tried),
        psnr_mean=statistics.fmean(values),
        psnr_min=min(values),
        seeds=tuple(seeds),
        mask=mask,
    )
