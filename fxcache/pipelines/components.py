"""The denoisers of a diffusers pipeline, and the policies that were published for them."""

import functools
import json
import logging
import weakref
from collections.abc import Mapping
from importlib import resources
from typing import Any

import torch
from torch import nn

from fxcache.errors import OptionError, PolicyError
from fxcache.pipelines.scheduler import read
from fxcache.policy import Policy
from fxcache.policy.presets import canonical_name, classes_of, preset

log = logging.getLogger("fxcache")

#: Where pipelines keep their denoisers.
COMPONENTS = ("transformer", "transformer_2", "unet")


def put(pipe: Any, name: str, denoiser: Any) -> None:
    """Make `denoiser`, which reads its steps from the scheduler, the component `name` of `pipe`.

    Not by the pipeline's own attribute access, which would rewrite its config.
    """
    try:  # compiled code outlives the denoiser, and must not keep the pipeline
        clock = functools.partial(read, weakref.ref(pipe))
    except TypeError:  # something like a pipeline that allows no such reference
        clock = functools.partial(read, lambda: pipe)
    denoiser._fxcache.session.steps.clock = clock
    object.__setattr__(pipe, name, denoiser)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of `pipe` that `apply` replaces, by component.

    Raises OptionError if there are none.
    """
    own = type(pipe).__name__
    if isinstance(pipe, nn.Module):
        raise OptionError(f"{own} is a model, not a pipeline: use fxcache.transform(model, policy)")
    if isinstance(pipe, type) or not hasattr(pipe, "scheduler"):
        raise OptionError(
            f"pipe must be a pipeline of diffusers, got {pipe!r:.200}: it has no scheduler. For a "
            f"loop of your own, use fxcache.transform(model, policy)"
        )
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    models = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    if not models:
        parts = sorted(getattr(pipe, "components", {}))
        raise OptionError(
            f"{own} has no denoiser: one of {', '.join(COMPONENTS)} must be a model, and it has "
            f"{parts or 'none of them'}"
        )
    return models


def policies_for(
    pipe: Any, models: Mapping[str, nn.Module], policy: Any
) -> dict[str, Policy | None]:
    """The policy of each component."""
    given = policy if isinstance(policy, Mapping) else dict.fromkeys(models, policy)
    if set(given) != set(models):
        raise PolicyError(
            f"policy must have one entry for each denoiser, {sorted(models)}, got {sorted(given)}"
        )
    return {name: _policy(pipe, models, given[name]) for name in models}


def _policy(pipe: Any, models: Mapping[str, nn.Module], policy: Any) -> Policy | None:
    """The policy that is meant: "auto" is the default, another name what was published so."""
    if not isinstance(policy, str):
        return policy  # type: ignore[no-any-return]
    if policy == "auto":
        return None
    try:
        model = _preset_name(pipe, models)
        if model is None:
            raise PolicyError(
                f"no settings were published for the model of this {type(pipe).__name__}, so there "
                f"is no {policy!r} for it. Pass a policy (FirstBlockCache(threshold=...)), or the "
                f"preset of another model: fxcache.preset(model, method); fxcache.presets() lists "
                f"them"
            )
        return preset(model, policy)
    except PolicyError as error:
        raise PolicyError(f'{error}. "auto" needs no settings: AdaptiveCache()') from None


def _preset_name(pipe: Any, models: Mapping[str, nn.Module]) -> str | None:
    """Under which name settings for the model of `pipe` were published, None if there are none.

    By the name that it was loaded under, else by its classes and its config.
    """
    classes = {class_name(model) for model in models.values()}
    configs = [getattr(part, "config", {}) for part in (pipe, *models.values())]
    for config in configs:
        try:
            name = canonical_name(str(dict(config).get("_name_or_path")))
        except PolicyError:
            continue
        if not classes.isdisjoint(classes_of(name)):
            return name
    settings = {key: value for config in configs for key, value in dict(config).items()}
    text = resources.files("fxcache.pipelines").joinpath("pipelines.json").read_text("utf-8")
    for rule in json.loads(text):
        if type(pipe).__name__ not in rule["pipelines"] or rule.get("denoisers", 1) != len(models):
            continue
        if all(settings.get(key) == value for key, value in rule.get("config", {}).items()):
            name = rule["preset"]
            if rule.get("is_guess"):
                log.warning(
                    "which variant this %s is cannot be told: its settings are those of %s. Others "
                    "are listed by fxcache.presets()",
                    type(pipe).__name__,
                    name,
                )
            return str(name)
    return None


def class_name(model: nn.Module) -> str:
    """The name of the model's class, also of one that ``fully_shard`` made a class of its own."""
    classes = type(model).__mro__
    if not torch.distributed.is_available():
        return classes[0].__name__
    from torch.distributed.fsdp import FSDPModule

    return next(cls.__name__ for cls in classes if not issubclass(cls, FSDPModule))
