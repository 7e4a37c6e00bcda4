"""Checks of policy parameters: each raises PolicyError with the name, the value and the range."""

import math
import numbers
from typing import Any

from fxcache.errors import PolicyError


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """`value` must be a number in [low, high], not NaN."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or not low <= value <= high:
        raise PolicyError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """`value` must be an int, at least `low` and at most `high` (None: unbounded)."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise PolicyError(f"{name} must be an integer {allowed}, got {value!r}")
