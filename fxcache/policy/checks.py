"""Checks of policy parameters: each raises PolicyError with the name, the value and the range."""

import numbers
from typing import Any

from fxcache.errors import PolicyError


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """`value` must be a number in [low, high], not NaN."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or not _is_float(value):  # NaN is in no range
        raise PolicyError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")


def _is_float(value: Any) -> bool:
    """Whether `value` can be a float: whole numbers may be too large."""
    try:
        float(value)
    except OverflowError:
        return False
    return True


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """`value` must be an int, at least `low` and at most `high` (None: unbounded)."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise PolicyError(f"{name} must be an integer {allowed}, got {value!r}")
