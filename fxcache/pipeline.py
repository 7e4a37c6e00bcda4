"""`apply`: a whole pipeline of diffusers, this instance only.

Each denoiser of the pipeline is replaced by a transformed one that reads the pipeline's scheduler:
where a solve begins, how many steps it has and which step it is at. Nothing else is touched, so
that everything that is done with pipelines goes on working.
"""

import json
import logging
from collections.abc import Mapping
from importlib import resources
from types import TracebackType
from typing import Any

from torch import nn

from fxcache.api import restore, transform
from fxcache.denoiser import DenoiserMethods
from fxcache.errors import OptionError, PolicyError
from fxcache.integrations.scheduler import SchedulerClock
from fxcache.policy import Policy, check_policy
from fxcache.policy.presets import preset, presets
from fxcache.report import Report
from fxcache.runtime.session import Session

log = logging.getLogger("fxcache")

#: Where pipelines keep their denoisers.
COMPONENTS = ("transformer", "transformer_2", "unet")
#: Of several methods that were published for a model, "auto" takes the first of these.
_PREFERRED = ("magcache", "teacache", "easycache", "seacache", "firstblockcache")


class Applied:
    """What `apply` returns. A context manager: the pipeline is itself again at the end."""

    def __init__(self, pipe: Any, denoisers: dict[str, nn.Module]) -> None:
        #: The denoisers by the name of their component: "transformer", ...
        self.denoisers = denoisers
        self._pipe = pipe

    def __enter__(self) -> "Applied":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def policy(self) -> Policy | dict[str, Policy]:
        """The policy that is followed; by component where they follow different ones."""
        policies = {name: _session(denoiser).policy for name, denoiser in self.denoisers.items()}
        first, *others = policies.values()
        return first if all(other == first for other in others) else policies

    def report(self) -> Report:
        """What happened since the start or the last reset, in all denoisers.

        Each record says of which component it is.
        """
        return Report.merged({name: d.report() for name, d in self._methods()})

    def reset(self) -> None:
        """Forget everything, records included, and free the memory."""
        for _, denoiser in self._methods():
            denoiser.reset()

    def _methods(self) -> list[tuple[str, Any]]:
        return list(self.denoisers.items())

    def remove(self) -> None:
        """Give the pipeline its own models back and free the memory. Once removed, does nothing.

        A component that was replaced meanwhile is left alone, and the log says so.
        """
        for name, denoiser in self.denoisers.items():
            model = restore(denoiser)
            if getattr(self._pipe, name, None) is denoiser:
                object.__setattr__(self._pipe, name, model)
            elif getattr(self._pipe, name, None) is not model:
                log.warning("%s of the pipeline was replaced after apply, and is left", name)


def apply(
    pipe: Any, policy: Policy | str | Mapping[str, Any] | None = None, **transform_options: Any
) -> Applied:
    """Make a pipeline of diffusers skip its denoisers' block stacks where `policy` allows it.

    Only this instance is changed: its ``transformer``, ``transformer_2`` and ``unet`` (those it
    has) are replaced by denoisers that share their weights. Steps, their number and the start of
    each trajectory are read from the pipeline's scheduler, also where that begins amid its
    timesteps (``strength``, ``denoising_start``), with ``timesteps`` or ``sigmas`` of your own, and
    with schedulers that evaluate twice a step: repeated timesteps are one step. Branches are named
    by the pipeline (``cache_context``); a further call at the same step without a name of its own
    gets a branch of its own ("call 2").

    Args:
        pipe: the pipeline; its scheduler may be replaced at any time.
        policy: None means ``FirstBlockCache()``. The name of a method ("magcache", "teacache", ...)
            means what was published for this model, "auto" the best-known method that was. A
            mapping has one of these for each component: ``{"transformer": ..., ...}``.
        transform_options: as in `fxcache.transform`: ``backend``, ``mode``, ``fullgraph``, ...

    Returns:
        A handle with ``report()``, ``reset()``, ``remove()`` and ``denoisers``. Used as a context
        manager, it removes itself.

    Raises:
        OptionError: for something that is no pipeline, has no denoiser, or has been applied to.
        PolicyError: if nothing of that name was published for the model.
    """
    models = denoisers_of(pipe)
    policies = _policies(pipe, models, policy)
    denoisers = {
        name: transform(model, policies[name], **transform_options)
        for name, model in models.items()
    }
    clock = SchedulerClock(pipe)
    for name, denoiser in denoisers.items():
        put(pipe, name, denoiser, clock)
    return Applied(pipe, denoisers)


def put(pipe: Any, name: str, denoiser: nn.Module, clock: SchedulerClock) -> None:
    """Make `denoiser` the component `name` of `pipe`, whose scheduler `clock` reads.

    Not by the pipeline's own attribute access, which would rewrite its config.
    """
    _session(denoiser).steps.clock = clock
    object.__setattr__(pipe, name, denoiser)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of `pipe` that `apply` replaces, by component.

    Raises OptionError if there are none, or if they are denoisers already.
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
    for name, model in models.items():
        if isinstance(model, DenoiserMethods):
            raise OptionError(
                f"{name} of this {own} is a denoiser already: call remove() of the handle that "
                f"fxcache.apply returned (or pipe.{name} = fxcache.restore(pipe.{name})) first"
            )
    return models


def _policies(pipe: Any, models: Mapping[str, nn.Module], policy: Any) -> dict[str, Policy | None]:
    """The policy of each component."""
    if not isinstance(policy, Mapping):
        return dict.fromkeys(models, _policy(pipe, models, policy))
    if set(policy) != set(models):
        raise PolicyError(
            f"policy must have one entry for each denoiser, {sorted(models)}, got {sorted(policy)}"
        )
    return {name: _policy(pipe, models, policy[name]) for name in models}


def _policy(pipe: Any, models: Mapping[str, nn.Module], policy: Any) -> Policy | None:
    if isinstance(policy, str):
        return published(pipe, models, policy)
    if policy is not None:
        check_policy(policy)
    return policy  # type: ignore[no-any-return]


def published(pipe: Any, models: Mapping[str, nn.Module], method: str) -> Policy:
    """The policy that was published for the model of `pipe`; `method` may be "auto".

    Raises PolicyError if there is none.
    """
    model = _preset_name(pipe, models)
    own = type(pipe).__name__
    if model is None:
        raise PolicyError(
            f"no settings were published for the model of this {own}, so there is no "
            f"{method!r} for it. Pass a policy (FirstBlockCache(threshold=...)), or the preset of "
            f"another model: fxcache.preset(model, method); fxcache.presets() lists them"
        )
    if method != "auto":
        return preset(model, method)
    methods = presets()[model]
    found = next(name for name in _PREFERRED if name in methods)
    log.info("auto: %s, published for %s", found, model)
    return preset(model, found)


def _preset_name(pipe: Any, models: Mapping[str, nn.Module]) -> str | None:
    """Under which name settings for the model of `pipe` were published, None if there are none.

    By the name that it was loaded under, else by its classes and its config.
    """
    classes = {type(model).__name__ for model in models.values()}
    configs = [getattr(part, "config", {}) for part in (pipe, *models.values())]
    for config in configs:
        name = _by_name(str(dict(config).get("_name_or_path") or ""), classes)
        if name is not None:
            return name
    settings = {key: value for config in configs for key, value in dict(config).items()}
    text = resources.files("fxcache.integrations").joinpath("pipelines.json").read_text("utf-8")
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


def _by_name(name: str, classes: set[str]) -> str | None:
    """The preset of a model of that name (a hub's id, or a directory) and one of these classes."""
    if not name:
        return None
    for method in _PREFERRED:
        try:
            origin = preset(name, method).origin  # type: ignore[attr-defined]
        except PolicyError:
            continue
        if classes & set(origin.model_classes):
            return str(origin.preset.rsplit(", ", 1)[0])
    return None


def _session(denoiser: Any) -> Session:
    session: Session = denoiser._fxcache.session
    return session
