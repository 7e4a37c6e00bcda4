"""Schedules as files: JSON with the mask, the forecaster and where they come from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from fxcache.errors import PolicyError, ProfileError
from fxcache.policy.base import Origin
from fxcache.policy.files import write_whole
from fxcache.policy.fitted import Fitted
from fxcache.policy.forecast import (
    AdamsBashforth,
    Chebyshev,
    Forecast,
    Hermite,
    Reuse,
    Taylor,
)
from fxcache.policy.step_schedule import StepSchedule

FORMAT = "fxcache-schedule-1"
_FORECASTS: dict[str, Any] = {
    cls.__name__: cls for cls in (AdamsBashforth, Chebyshev, Hermite, Reuse, Taylor)
}


def save_schedule(policy: StepSchedule, path: str | Path) -> Path:
    """Write `policy` to `path`; the file is there as a whole or not at all.

    Raises PolicyError for a forecaster that is not fxcache's own.
    """
    content = {
        "format": FORMAT,
        "mask": [int(hit) for hit in policy.mask],
        "forecast": _encoded(policy.forecast),
        "input_share": policy.input_share,
        "origin": dataclasses.asdict(policy.origin) if policy.origin is not None else None,
    }
    write_whole(Path(path), (json.dumps(content, indent=1) + "\n").encode())
    return Path(path)


def load_schedule(path: str | Path) -> StepSchedule:
    """The schedule that `save_schedule` wrote to `path`.

    Raises ProfileError for a file that is missing, damaged or foreign.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT:
            raise ProfileError(f"{path}: format must be {FORMAT!r}, got {content['format']!r}")
        origin = content["origin"]
        if origin is not None:
            origin = Origin(**{**origin, "model_classes": tuple(origin["model_classes"])})
        forecast = _decoded(content["forecast"])
        share = content.get("input_share", 1.0)
        return StepSchedule(
            mask=content["mask"], forecast=forecast, input_share=share, origin=origin
        )
    except (OSError, ValueError, KeyError, TypeError, PolicyError) as error:
        raise ProfileError(f"{path} cannot be read as a schedule: {error!r}") from error


def _encoded(forecast: Forecast) -> dict[str, Any]:
    if isinstance(forecast, Fitted):
        table = [[step, list(past), list(w)] for (step, past), w in forecast.table.items()]
        fallback = _encoded(forecast.fallback)
        return {"name": "Fitted", "ring": forecast.ring, "table": table, "fallback": fallback}
    if type(forecast).__name__ not in _FORECASTS:
        raise PolicyError(
            f"forecast must be one of {', '.join(_FORECASTS)} or Fitted, got {forecast!r}"
        )
    return {"name": type(forecast).__name__, **dataclasses.asdict(forecast)}  # type: ignore[call-overload]


def _decoded(content: dict[str, Any]) -> Forecast:
    settings = dict(content)
    name = settings.pop("name")
    if name != "Fitted":
        forecast: Forecast = _FORECASTS[name](**settings)
        return forecast
    table = {(step, tuple(past)): tuple(weights) for step, past, weights in settings["table"]}
    fallback = _decoded(settings["fallback"])
    return Fitted(table=table, ring=settings["ring"], fallback=fallback)
