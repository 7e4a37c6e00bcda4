"""Checks of policy parameters: each raises PolicyError with the name, the value and the range."""

import math
import numbers
from typing import Any

from fxcache.errors import PolicyError


def check_number(name: str, value: Any, interval: str) -> None:
    """`value` must be a number in `interval`, like "[0, inf]" or, without the 0, "(0, 1]"."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    low, high = map(float, interval[1:-1].split(","))
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:  # a whole number may be too large
        number = math.nan  # which is in no interval
    is_left_out = (number == low and interval[0] == "(") or (number == high and interval[-1] == ")")
    if not low <= number <= high or is_left_out:
        raise PolicyError(f"{name} must be a number in {interval}, got {value!r}")


def checked_numbers(name: str, values: Any, interval: str) -> tuple[float, ...]:
    """`values` as floats; each must be a number in `interval`."""
    try:
        given: Any = [None] if isinstance(values, str) else values
        found = tuple(float(value) for value in given)
    except (TypeError, ValueError, OverflowError) as error:
        raise PolicyError(f"{name} must be numbers, got {values!r}") from error
    for place, value in enumerate(found):
        check_number(f"{name}[{place}]", value, interval)
    return found


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """`value` must be an int, at least `low` and at most `high` (None: unbounded)."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise PolicyError(f"{name} must be an integer {allowed}, got {value!r}")
