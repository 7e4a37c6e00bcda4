"""Policies decide; they hold no state and touch no tensor."""

from fxcache.policy.adaptive_cache import AdaptiveCache
from fxcache.policy.base import Decision, History, Origin, Policy, Span, check_policy
from fxcache.policy.easy_cache import EasyCache
from fxcache.policy.first_block_cache import FirstBlockCache
from fxcache.policy.forecast import (
    AdamsBashforth,
    Chebyshev,
    Forecast,
    Hermite,
    Reuse,
    Taylor,
)
from fxcache.policy.mag_cache import MagCache
from fxcache.policy.probe import ProbeKind
from fxcache.policy.sea_cache import SeaCache
from fxcache.policy.step_schedule import StepSchedule
from fxcache.policy.tea_cache import TeaCache

__all__ = [
    "AdamsBashforth",
    "AdaptiveCache",
    "Chebyshev",
    "Decision",
    "EasyCache",
    "FirstBlockCache",
    "Forecast",
    "Hermite",
    "History",
    "MagCache",
    "Origin",
    "Policy",
    "ProbeKind",
    "Reuse",
    "SeaCache",
    "Span",
    "StepSchedule",
    "Taylor",
    "TeaCache",
    "check_policy",
]
