"""Policies from the words of the nodes, and what was published for a model that ComfyUI loaded."""

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import fxcache
from fxcache.policy import Forecast, Policy

#: What the node's `policy` may be.
METHODS = ("adaptive", "first block", "easycache", "magcache", "teacache")
FORECASTS: dict[str, Forecast | None] = {
    "auto": None,
    "reuse": fxcache.Reuse(),
    "taylor 1": fxcache.Taylor(order=1),
    "taylor 2": fxcache.Taylor(order=2),
    "hermite 1": fxcache.Hermite(order=1),
    "adams-bashforth 2": fxcache.AdamsBashforth(order=2),
}
#: The degree that AdaptiveCache needs for a forecast.
_ORDERS = {"auto": 1, "reuse": 0, "taylor 1": 1, "taylor 2": 2}


def policy_for(
    name: str,
    tolerance: float,
    *,
    max_consecutive_hits: int = 0,
    forecast: str = "auto",
    model_config: Any = None,
) -> Policy:
    """The policy that the nodes mean.

    Args:
        name: one of `METHODS`.
        tolerance: AdaptiveCache's tolerance; the threshold of the others.
        max_consecutive_hits: 0: the policy's own.
        forecast: one of `FORECASTS`; "auto" is the policy's own.
        model_config: ComfyUI's description of the loaded model, for what was published for it.

    Raises:
        PolicyError: for a word that is none of these, a value outside its range, and MagCache or
            TeaCache on a model for which nothing was published.
    """
    for what, value, known in (("policy", name, METHODS), ("forecast", forecast, FORECASTS)):
        if value not in known:
            raise fxcache.PolicyError(f"{what} must be one of {', '.join(known)}, got {value!r}")
    more: dict[str, Any] = {}
    if max_consecutive_hits:
        more["max_consecutive_hits"] = max_consecutive_hits
    if name == "adaptive":
        if forecast not in _ORDERS:
            raise fxcache.PolicyError(
                f"forecast must be one of {', '.join(_ORDERS)} with adaptive, got {forecast!r}"
            )
        return fxcache.AdaptiveCache(tolerance=tolerance, order=_ORDERS[forecast], **more)
    if (chosen := FORECASTS[forecast]) is not None:
        more["forecast"] = chosen
    if name == "first block":
        return fxcache.FirstBlockCache(threshold=tolerance, **more)
    if name == "easycache":
        return fxcache.EasyCache(threshold=tolerance, **more)
    return published(model_config, name, threshold=tolerance, **more)


def published(model_config: Any, method: str, **changes: Any) -> Policy:
    """What was published for a model as "magcache" or "teacache", with `changes`.

    Raises PolicyError where there is nothing.
    """
    for model in preset_names(model_config):
        if method in fxcache.presets()[model]:
            return fxcache.preset(model, method, **changes)
    raise fxcache.PolicyError(
        f"no {method} settings were published for {type(model_config).__name__}: take the policy "
        f'"adaptive", which needs none, or measure some with the node "fxcache Calibrate"'
    )


def preset_names(model_config: Any) -> tuple[str, ...]:
    """The names, in fxcache's presets, of what ComfyUI detected a model to be."""
    config: Mapping[str, Any] = getattr(model_config, "unet_config", {})
    for class_name, conditions, names in _table():
        if class_name == type(model_config).__name__ and conditions.items() <= config.items():
            return tuple(names)
    return ()


@functools.cache
def _table() -> list[Any]:
    text = resources.files("fxcache.comfyui").joinpath("presets.json").read_text("utf-8")
    table: list[Any] = json.loads(text)
    return table


def schedule_for(text: str, num_steps: int) -> fxcache.StepSchedule:
    """The schedule that the node's text means, for `num_steps` steps.

    "every 2" computes every second step; "0 1 2 5 8" computes these; a path names a file of
    `fxcache.save_schedule`.

    Raises:
        PolicyError: for a text that is none of these, or steps that there are not.
        ProfileError: for a file that is missing or damaged.
    """
    words = text.replace(",", " ").split()
    if len(words) == 2 and words[0] == "every" and words[1].isdigit():
        return fxcache.StepSchedule.every(int(words[1]), num_steps=num_steps, forecast=_TAYLOR)
    if words and all(word.isdigit() for word in words):
        steps = set(map(int, words))
        if max(steps) >= num_steps:
            raise fxcache.PolicyError(
                f"the schedule computes step {max(steps)}, but the last of {num_steps} steps is "
                f"{num_steps - 1}"
            )
        mask = [step not in steps for step in range(num_steps)]
        return fxcache.StepSchedule(mask=mask, forecast=_TAYLOR)
    if text.strip().endswith(".json"):
        return fxcache.load_schedule(text.strip())
    raise fxcache.PolicyError(
        f'schedule must be "every N", the steps that are computed ("0 1 2 5 8") or the path of a '
        f".json file, got {text!r}"
    )


_TAYLOR = fxcache.Taylor(order=1)
