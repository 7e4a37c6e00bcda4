"""The object that `transform` returns: the model, with its forward going through the cache.

A denoiser is a second instance of a subclass of the model's class that shares the model's
``__dict__``: parameters, buffers, submodules, hooks, config and training flag are the same
objects, so everything that is done to the one (``.to``, ``load_state_dict``, adapters) is done to
the other, and the model itself is not touched.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from fxcache.capture import shards, torch_distributed
from fxcache.capture.runner import Runner
from fxcache.errors import OptionError
from fxcache.options import Options
from fxcache.pipelines import hooks
from fxcache.policy import Policy, check_policy
from fxcache.report import Report
from fxcache.runtime.steps import checked_requests


class DenoiserMethods:
    """What a denoiser has besides the model's own attributes."""

    __slots__ = ()
    _fxcache_runner: list[Runner]
    _fxcache_forward: Callable[..., Any]
    _fxcache_override: Callable[..., Any] | None

    @property
    def _fxcache(self) -> Runner:
        return self._fxcache_runner[0]

    @property
    def forward(self) -> Callable[..., Any]:
        """The model's forward through the cache.

        A property, so that it precedes a forward that somebody wrote on the model (that one is
        called inside), and so that one written on the denoiser (by somebody who calls the forward
        that was there) goes around the cache instead of into the model.

        accelerate's hook is shared by the model and the denoiser, whichever of them it is put on
        or taken from: it runs around the cached forward here, and around the plain one there.
        """
        try:
            return self._fxcache_override or self._fxcache_forward
        except AttributeError:  # made by a classmethod (from_config): a plain model
            written = vars(self).get("forward")
            return cast(Callable[..., Any], written or super().forward)  # type: ignore[misc]

    @forward.setter
    def forward(self, function: Callable[..., Any]) -> None:
        own, shared = getattr(self, "_fxcache_forward", None), vars(self)
        if own is None:
            shared["forward"] = function
        elif hooks.is_wrapper(function) and "_old_forward" in shared:
            hooks.write_wrapper(self._fxcache.model, function)
        elif function is own and "_old_forward" in shared and "_hf_hook" not in shared:
            hooks.take_wrapper(self._fxcache.model)
        else:
            object.__setattr__(self, "_fxcache_override", None if function is own else function)

    @forward.deleter
    def forward(self) -> None:
        object.__setattr__(self, "_fxcache_override", None)

    @property
    def _old_forward(self) -> Callable[..., Any]:
        """What accelerate's hook is wrapped around, for accelerate to put it back."""
        if "_old_forward" not in vars(self):
            raise AttributeError("no hook of accelerate is on this denoiser")
        return cast(
            Callable[..., Any], getattr(self, "_fxcache_forward", vars(self)["_old_forward"])
        )

    @_old_forward.setter
    def _old_forward(self, function: Callable[..., Any]) -> None:
        is_denoiser = hasattr(self, "_fxcache_forward")
        vars(self)["_old_forward"] = self._fxcache.model.forward if is_denoiser else function

    @_old_forward.deleter
    def _old_forward(self) -> None:
        del vars(self)["_old_forward"]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the denoiser is compiled already, with transform's own options."""
        raise OptionError("a denoiser is compiled already; pass mode and options to transform")

    def trajectory(
        self, num_steps: int | None = None, first_step: int = 0, slot: Hashable = None
    ) -> AbstractContextManager[None]:
        """Announce one solve of the sampler, of `num_steps` steps if known.

        `first_step` is the first that this denoiser sees, if that is not step 0 (a second expert,
        image-to-image): tables, masks and fractions count from the trajectory's start. `slot` is
        the request that it is of, if that is not the caller's.

        It starts clean, and nothing of it is left afterwards. Without it, a new trajectory is
        recognised by its timestep going back, or by other shapes, dtypes or devices.
        """
        return self._fxcache.session.trajectory(num_steps, first_step, slot)

    def at(
        self,
        *,
        step: int | None = None,
        branch: Hashable = None,
        slot: Hashable = None,
        policy: Policy | None = None,
    ) -> AbstractContextManager[None]:
        """Say where the calls inside belong, as far as you know it; None leaves it open.

        `step` counts from 0; a lower one than the last starts a new trajectory. `branch` ("cond",
        "uncond", ...) has a state of its own, `slot` names the request: each has its own
        trajectory, and it is freed when its last step was seen (see `release`). `policy` decides
        inside in the place of the denoiser's own: another threshold or tolerance, a request's.

        Raises OptionError for a step that is no integer from 0 on, PolicyError for a policy whose
        span, probe, forecast or control_threshold is not that of the denoiser's.
        """
        said = {"step": step, "branch": branch, "slot": slot, "policy": policy}
        return self._fxcache.session.at(**{k: v for k, v in said.items() if v is not None})

    def batch(
        self,
        requests: Sequence[Hashable] | Mapping[Hashable, Policy | None],
        rows_per_request: int = 1,
    ) -> AbstractContextManager[None]:
        """Inside, a call evaluates these requests together, and each decides by itself.

        The rows of each request lie together, in this order: the first `rows_per_request` rows of
        the sample are the first one's (2 for a guidance pair in one batch). A request has the state
        that `at(slot=...)` gives it, so it may come and go, be called alone, and be at a timestep
        of its own; it is freed when its last step was seen, or by `release`. Its rule is asked with
        its own history, and the blocks run at most twice: once on the rows that miss, once on those
        that hit. Tensors with a size that follows the number of rows belong to rows, others to all.
        Where a step makes several calls, name their `branch`: else they are misses.

        `requests` may map each to a policy of its own (None: the denoiser's), as in `at`.

        Raises OptionError for a name twice, no names, or rows that do not divide, and PolicyError
        as `at`: what requests keep is then as before. At a call, BatchError for a model whose rows
        are not computed apart.
        """
        said = {"requests": checked_requests(requests, rows_per_request)}
        return self._fxcache.session.at(**said, rows_per_request=rows_per_request)

    def branch(self, name: Hashable) -> AbstractContextManager[None]:
        """Name the branch ("cond", "uncond", ...) of the calls inside: ``at(branch=name)``."""
        return self._fxcache.session.at(branch=name)

    def slot(self, name: Hashable) -> AbstractContextManager[None]:
        """Name the request that the calls inside belong to: ``at(slot=name)``."""
        return self._fxcache.session.at(slot=name)

    def cache_context(self, name: str, **where: Any) -> AbstractContextManager[None]:
        """The same as `branch`, under the name by which diffusers' pipelines call it.

        What they say besides (``step_index``, ``sigma``, ...) is for diffusers' own caches.
        """
        return self._fxcache.session.at(branch=name)

    def release(self, slot: Hashable) -> None:
        """Forget the request `slot` and free its memory. Of an unknown one: nothing."""
        self._fxcache.session.slots.release(slot)

    @property
    def policy(self) -> Policy:
        """The policy that is followed. One that is assigned holds from the next trajectory on; the
        model is captured anew only if its span, its probe, its number of entries or
        whether it measures its forecasts differs.
        """
        session = self._fxcache.session
        return session.next_policy or session.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        check_policy(policy)
        self._fxcache.session.follow(policy)

    def reset(self, *, records: bool = True) -> None:
        """Forget everything and free the memory; with ``records=False``, records are kept."""
        self._fxcache.reset(records=records)

    def report(self, slot: Hashable = None) -> Report:
        """What happened since the start or the last reset: to all, or to the request `slot`."""
        report = self._fxcache.session.report()
        if slot is None:
            return report
        return replace(report, records=tuple(r for r in report.records if r.slot == slot))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles: the model is copied and transformed anew, with a state of its own."""
        if not hasattr(self, "_fxcache_runner"):  # made by a classmethod: a plain model
            return super().__reduce_ex__(protocol)
        runner = self._fxcache
        # In two steps, as diffusers' registry of hooks may make the model refer to the denoiser.
        return _unmade, (type(runner.model),), (runner.model, self.policy, runner.options)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):
            _make(self, *state)
        else:
            super().__setstate__(state)  # type: ignore[misc]


@contextmanager
def other_policy(denoiser: DenoiserMethods, policy: Policy) -> Iterator[Runner]:
    """Inside, `denoiser` follows `policy`, with a state of its own; then it is as it was."""
    cell = denoiser._fxcache_runner
    before, runner = cell[0], Runner(cell[0].model, policy, cell[0].options)
    runner.session.steps.clock = before.session.steps.clock
    cell[0] = runner
    try:
        yield runner
    finally:
        cell[0] = before
        runner.reset()


def give_back(denoiser: DenoiserMethods) -> nn.Module:
    """The model of `denoiser`, with the hooks that were put on either; the memory is freed."""
    model, override = denoiser._fxcache.model, denoiser._fxcache_override
    denoiser.reset()
    hooks.make_untraceable(model)
    shards.make_untraceable(model)
    hooks.hand_over(denoiser, model, denoiser._fxcache_forward, override)
    object.__setattr__(denoiser, "_fxcache_override", None)
    return model


@functools.cache
def _denoiser_class(model_class: Any) -> Any:
    """A subclass of `model_class` that goes by its name: pipelines check and write class names."""

    class Alike(type(model_class)):  # type: ignore[misc]
        """Equal to the model's class: pipelines ask for ``type(component) in expected``, a tuple.
        But with a hash of its own: what others keep by class (FSDP makes one of each) is another's.
        """

        def __eq__(cls, other: object) -> bool:
            return cls is other or other is model_class

        __hash__ = type.__hash__

    names = {
        "__slots__": ("_fxcache_runner", "_fxcache_forward", "_fxcache_override"),
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
    }
    return Alike(model_class.__name__, (DenoiserMethods, model_class), names)


def check_model(model: Any) -> None:
    """Raise OptionError unless `model` is a module that has not been transformed or compiled."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DenoiserMethods):
        raise OptionError("the model is a denoiser already; fxcache.restore(it) gives the model")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner = type(model.module).__name__
        raise OptionError(
            f"DistributedDataParallel is around the {inner}: transform the {inner} (its module), "
            f"and put DistributedDataParallel around the denoiser where you train it"
        )
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise OptionError(
            "the model is compiled already, and fxcache compiles it itself: pass the module that "
            "was given to torch.compile (its _orig_mod), or leave model.compile() out"
        )


def make_denoiser(model: nn.Module, policy: Policy, options: Options) -> Any:
    """A denoiser around `model`. See the module's docstring."""
    denoiser = _unmade(type(model))
    _make(denoiser, model, policy, options)
    return denoiser


def _unmade(model_class: type[nn.Module]) -> Any:
    """A denoiser without a model, which `_make` gives it."""
    cls: Any = _denoiser_class(cast(Hashable, model_class))
    return object.__new__(cls)  # the class may have a `__new__` that makes a model


def _make(denoiser: Any, model: nn.Module, policy: Policy, options: Options) -> None:
    runner = Runner(model, policy, options)
    #: A cell, so that `other_policy` can put another runner here.
    current = [runner]

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return hooks.around(model, current[0], *args, **kwargs)

    if not options.disable:  # what somebody else compiles around it is cut there
        reason = "fxcache compiles the denoiser itself"
        forward = torch.compiler.disable(forward, reason=reason)
    object.__setattr__(denoiser, "__dict__", model.__dict__)
    object.__setattr__(denoiser, "_fxcache_runner", current)
    object.__setattr__(denoiser, "_fxcache_forward", forward)
    object.__setattr__(denoiser, "_fxcache_override", None)
    torch_distributed.share_sharding(model, denoiser)
    # Dynamo keeps compiled code, and with it the session, longer than the denoiser lives.
    weakref.finalize(denoiser, runner.reset)
