"""Policies that several tests follow."""

import math
from dataclasses import replace

import fxcache

NEVER = fxcache.FirstBlockCache(threshold=0.0)
ALWAYS = fxcache.FirstBlockCache(threshold=math.inf)
ALTERNATE = fxcache.FirstBlockCache(threshold=math.inf, max_consecutive_hits=1)
TAYLOR = replace(ALWAYS, warmup_steps=3, forecast=fxcache.Taylor(order=2))
FORECAST = replace(TAYLOR, max_consecutive_hits=2)
MASK = fxcache.StepSchedule(mask=[False, True, True, False, True, True, False, True])

POLY = (40.0, -7.0, 3.0, 1.5, 0.01)
EASY = fxcache.EasyCache(threshold=0.3, warmup_steps=0, final_steps=0)
TEA = fxcache.TeaCache(coefficients=POLY, threshold=0.3, final_steps=0)
SEA = fxcache.SeaCache(threshold=0.3, final_steps=0)
MAG = fxcache.MagCache(ratios=[1.0, *[1.05] * 11], threshold=0.11, retention_ratio=0.0)
FIRST = fxcache.FirstBlockCache(threshold=0.2)
ADAPTIVE = fxcache.AdaptiveCache(tolerance=0.5, slope=0.0, final_steps=0)
MEASURING = [EASY, TEA, SEA, FIRST]
SCHEDULE = fxcache.StepSchedule(mask=MASK.mask, forecast=fxcache.Taylor(order=2))
#: One of each, and with and without a forecast.
EVERY = [ALTERNATE, FORECAST, MASK, SCHEDULE, EASY, TEA, SEA, MAG, ADAPTIVE]


def name_of(value):
    return type(value).__name__ if not isinstance(value, str | float | type) else None
