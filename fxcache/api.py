"""The public functions: they validate and dispatch, nothing else."""

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxcache.capture.exported import Exported, export_model
from fxcache.capture.exporting import bound
from fxcache.denoiser import DenoiserMethods, check_model, give_back, make_denoiser
from fxcache.errors import FxCacheError, OptionError
from fxcache.explain import Explanation, explain_model
from fxcache.options import Options
from fxcache.pipelines.components import class_name, denoisers_of, policies_for, put
from fxcache.policy import AdaptiveCache, Policy, check_policy
from fxcache.report import Report

log = logging.getLogger("fxcache")


def transform(
    model: nn.Module,
    policy: Policy | None = None,
    *,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool | None = None,
    options: dict[str, Any] | None = None,
    disable: bool = False,
    fallback: bool = False,
    kernel: str = "auto",
    outline: bool = True,
    guards: str = "always",
    cache_dtype: torch.dtype | None = None,
    cache_device: torch.device | str | None = None,
    audit: bool = True,
    sync: Any = "auto",
) -> nn.Module:
    """Make a denoiser that skips its block stack where `policy` allows it.

    Args:
        model: any denoiser that torch.compile can capture. It is not changed, and its parameters
            are shared.
        policy: when to skip; None means ``AdaptiveCache()``.
        backend: what compiles the pieces: "inductor", "eager" (none), or any name or callable that
            torch.compile takes.
        mode, dynamic, options, disable: as in torch.compile.
        fullgraph: True insists on one graph. None (or False): one graph; else one with more
            captured (``.tolist()``, warnings); else pieces, one of which holds the stack.
        fallback: run a model that cannot be rewritten uncached, with one warning, instead of
            raising.
        kernel: who measures: "aten" (plain operations, which the compiler fuses with what is around
            them), "triton" (the kernels of `fxcache.kernels`) or "auto": "triton" on a GPU where
            nothing is compiled, else "aten".
        outline: compile equal blocks once, so that compile time hardly grows with depth. False
            compiles each piece as a whole: much longer for deep models, but a call then saves what
            it costs to call the blocks one by one (some microseconds each).
        guards: "always" checks at each call what torch.compile checks: that weights, modules and
            attributes of the model are those that were compiled; and that what is cached is of the
            weights as they are now: an optimizer's step, a loaded state or an adapter between two
            evaluations makes the next a miss, "weights changed". After the first evaluation of a
            trajectory this is done once the device is busy, and if it fails, what was queued is
            dropped. (Unseen amid a trajectory: writes through ``.data`` that are no optimizer's,
            and weights put into ``module._parameters`` by hand; call ``reset()``.) "trajectory"
            checks it at the first evaluation of a branch in a trajectory, and of the others only
            the arguments. A call then costs some microseconds instead of some for each weight. At
            your risk: do not replace weights or modules, load or switch adapters, or change
            attributes of the model amid a trajectory (weights may be written in place, but what is
            cached stays that of the old ones), do not rely on what ``forward`` does besides
            computing (counters), and announce trajectories: of an aborted one that is followed by
            another from a lower timestep, nobody can tell.
        cache_dtype: what residuals are kept in: torch.float32, bfloat16, float16, float8_e4m3fn or
            float8_e5m2; None: as they are computed. Misses stay exact. A hit is off by what
            rounding took from the residual, in the last four at most 2^-8, 2^-11, 2^-4 and 2^-3 of
            each element (times the weights of a forecast, which grow with its order). Elements
            beyond the dtype's range are kept as its largest number; in float8_e4m3fn those below
            2^-10 become 0. What the next probe is compared with stays as it is.
        cache_device: "cpu" keeps residuals in host memory (pinned, for a GPU); None where they are
            computed. Every hit then waits for a transfer to the device, of one residual a stream
            for reuse and of up to n + 1 for a forecast of order n, and every miss ends with one
            from it. ``report().cached_by_device`` says how many bytes are kept where. What the next
            probe is compared with stays on the device. Not with CUDA graphs (mode "reduce-overhead"
            or "max-autotune").
        audit: once a capture, after the first computed step, evaluate the model once more on a
            slightly moved sample, and a hit there: where that does not follow the sample, nothing
            is reused, and a warning says so. It costs an evaluation and a hit. False leaves it out.
        sync: which ranks decide alike. "auto": those whose collectives are in the captured graph
            (context and tensor parallelism); they add up the sums that are measured, one small
            collective a measured step, and data-parallel ranks are left alone. A
            ``torch.distributed.ProcessGroup``: its ranks vote, and a hit is one only where all of
            them hit (ranks with samples of their own that share collectives, as FSDP's or those of
            two branches of guidance), for one collective and one read-back an evaluation. None:
            every rank by itself.

    Returns:
        A module of the model's own class with the same call signature, outputs, parameter names
        and config, and with ``trajectory``, ``branch``, ``slot``, ``report`` and ``reset``.

    Raises:
        OptionError: for an unknown backend, mode, kernel, cache dtype or device, for mode with
            options, or a cache device with CUDA graphs.
        PolicyError: for something that is no policy. At the first call: for one that does not fit
            the model's stack.
        StackNotFoundError, CaptureError: at the first call, if the model cannot be rewritten.

    Warns if `policy` is a preset or a calibration for another class of model.
    """
    given = dict(locals())
    del given["model"], given["policy"]
    check_model(model)
    if policy is None:
        policy = AdaptiveCache()
    check_policy(policy)
    origin, own = getattr(policy, "origin", None), class_name(model)
    if origin is not None and origin.model_classes and own not in origin.model_classes:
        warnings.warn(
            f"{type(policy).__name__} of {origin.preset!r} was made for "
            f"{' or '.join(origin.model_classes)}, and the model is a {own}",
            stacklevel=2,
        )
    denoiser: nn.Module = make_denoiser(model, policy, Options(**given))
    return denoiser


def restore(denoiser: nn.Module) -> nn.Module:
    """The model that `denoiser` was made of; the denoiser's memory is freed.

    Raises FxCacheError if `denoiser` was not made by `transform`.
    """
    if not isinstance(denoiser, DenoiserMethods):
        raise FxCacheError(f"{type(denoiser).__name__} was not made by fxcache.transform")
    return give_back(denoiser)


def explain(
    model: nn.Module, *args: Any, policy: Policy | None = None, **kwargs: Any
) -> Explanation:
    """What the pass finds in `model` and would do, for a call with these arguments.

    Runs the model once, uncached and without gradients. ``print(explain(...))`` is a summary: the
    stack, the span, the streams and their shapes, the share of FLOPs that a hit skips, and why a
    graph was refused. `policy` (default ``AdaptiveCache()``) says which blocks are the span.

    Raises PolicyError if `policy` leaves no span.
    """
    inner = model._fxcache.model if isinstance(model, DenoiserMethods) else model
    check_model(inner)
    denoiser = make_denoiser(inner, policy or AdaptiveCache(), Options(backend="eager"))
    return explain_model(denoiser, args, kwargs)


def export(
    model: nn.Module,
    policy: Policy | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Mapping[str, Any] | None = None,
    form: str = "cond",
) -> Exported:
    """Make a program of `model` that skips its block stack where `policy` allows it.

    ::

        exported = fxcache.export(model, AdaptiveCache(), kwargs=example)
        state = exported.initial_state(num_steps=30)
        for inputs in ...:
            output, state = exported.step(inputs, state)
        exported.package("model.pt2")  # AOTInductor; fxcache.load_exported reads it

    State is explicit: one for each branch of guidance, from `initial_state` for each trajectory.
    Each step counts one, so a sampler that evaluates twice a step has two. What a denoiser finds
    out as it runs (the audit, changed weights) a program does not: try the denoiser first.

    Args:
        model: the denoiser. It is not changed, and its parameters are shared.
        policy: None means ``AdaptiveCache()``.
        args, kwargs: an example call; `exported.step` takes the same arguments by name.
        dynamic_shapes: which sizes may be others, by argument, as for ``torch.export.export``.
        form: "cond": one program with the decision inside (``torch.cond``), for
            `FirstBlockCache`, `EasyCache`, `AdaptiveCache` and `StepSchedule` with `Reuse` or
            `Taylor`; threshold and tolerance are a part of the state. "pieces": head, hit and miss
            as three programs, and any policy between them, on the host.

    Raises:
        OptionError: for another form, or a denoiser in the place of its model.
        PolicyError: for a policy without a rule in tensor arithmetic ("cond").
        CaptureError, StackNotFoundError: if torch.export cannot capture the model, or nothing in it
            can be skipped.
    """
    if form not in ("cond", "pieces"):
        raise OptionError(f'form must be "cond" or "pieces", got {form!r}')
    check_model(model)
    policy = AdaptiveCache() if policy is None else policy
    check_policy(policy)
    return export_model(model, policy, bound(model, args, kwargs or {}), dynamic_shapes, form)


class Applied:
    """What `apply` returns. A context manager: the pipeline is itself again at the end."""

    def __init__(self, pipe: Any, denoisers: dict[str, Any]) -> None:
        #: The denoisers by the name of their component: "transformer", ...
        self.denoisers = denoisers
        self._pipe = pipe

    def __enter__(self) -> "Applied":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def policy(self) -> Policy | dict[str, Policy]:
        """The policy that is followed; by component where they follow different ones."""
        policies = {name: denoiser.policy for name, denoiser in self.denoisers.items()}
        first, *others = policies.values()
        return first if all(other == first for other in others) else policies

    def report(self) -> Report:
        """What happened since the start or the last reset, in all denoisers.

        Each record says of which component it is.
        """
        return Report.merged({name: d.report() for name, d in self.denoisers.items()})

    def reset(self) -> None:
        """Forget everything, records included, and free the memory."""
        for denoiser in self.denoisers.values():
            denoiser.reset()

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
        policy: None and "auto" mean ``AdaptiveCache()``. The name of a method ("magcache",
            "teacache", ...) means what was published for this model. A
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
    for name, model in models.items():
        if isinstance(model, DenoiserMethods):
            raise OptionError(
                f"{name} of this {type(pipe).__name__} is a denoiser already: call remove() of the "
                f"handle that fxcache.apply returned (or pipe.{name} = "
                f"fxcache.restore(pipe.{name})) first"
            )
    policies = policies_for(pipe, models, policy)
    denoisers = {
        name: transform(model, policies[name], **transform_options)
        for name, model in models.items()
    }
    for name, denoiser in denoisers.items():
        put(pipe, name, denoiser)
    return Applied(pipe, denoisers)
