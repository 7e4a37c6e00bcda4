"""Policies decide; they hold no state and touch no tensor."""

from fxcache.policy.base import Decision, History, Policy
from fxcache.policy.first_block_cache import FirstBlockCache
from fxcache.policy.forecast import Forecast, Reuse, Taylor
from fxcache.policy.step_schedule import StepSchedule

__all__ = [
    "Decision",
    "FirstBlockCache",
    "Forecast",
    "History",
    "Policy",
    "Reuse",
    "StepSchedule",
    "Taylor",
]
