"""A model of ComfyUI whose sampling goes through the cache.

Two of ComfyUI's own hook points are used, on a clone of its ModelPatcher. OUTER_SAMPLE is one run
of a sampler, which is a trajectory; what a run needs is put into that run's own options, so that
nothing is left on the model. APPLY_MODEL is one evaluation: the step is told by the sampler's list
of sigmas, the branch by what ComfyUI says of the conditioning and by the number of the call within
its step. There the denoiser takes the model's place, as the innermost of what other nodes wrap
around it.
"""

import bisect
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

import fxcache
from fxcache.policy import Decision, History, Policy

log = logging.getLogger("fxcache")

#: Under this name the wrappers stand on a model.
KEY = "fxcache"
#: Where ComfyUI's own node for torch.compile says what it compiles with.
COMPILE_OPTIONS = "torch_compile_kwargs"

#: The denoisers of each loaded model, by what they are compiled with, so that another run or
#: another threshold compiles nothing again. The one that was used last is the last. None: it could
#: not capture the model. They go when the model does.
_denoisers: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


class Windowed:
    """`policy`, which hits only from step `first` on and before step `end`."""

    def __init__(self, policy: Policy, first: int, end: int) -> None:
        self.policy, self.first, self.end = policy, first, end
        self.probe, self.span = policy.probe, policy.span
        self.forecast, self.decide = policy.forecast, policy.decide
        self.control_threshold = getattr(policy, "control_threshold", None)

    def rule(self, metric: float, history: History) -> Decision:
        """The policy's decision; outside of the window, a miss."""
        decision = self.policy.rule(metric, history)
        if decision.is_hit and not self.first <= history.step < self.end:
            return Decision(False, "outside start..end", decision.score)
        return decision


@dataclass(frozen=True)
class Cache:
    """What a node puts on a model: an OUTER_SAMPLE wrapper.

    Args:
        policy: what is followed, or a function that gives it for a number of steps. None: what the
            denoiser follows already, as `fxcache.tune` has set it.
        percent: hits are allowed between these, as ComfyUI means them: of the model's range of
            noise, ``model_sampling.percent_to_sigma``.
        steps: hits are allowed from this step on and before that one (negative: from the end).
        options: further arguments of `fxcache.transform`.
        verbose: the report is logged at the end of each run.
    """

    policy: Policy | Callable[[int], Policy] | None
    percent: tuple[float, float] = (0.0, 1.0)
    steps: tuple[int, int] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    verbose: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.percent[0] < self.percent[1] <= 1:
            raise fxcache.PolicyError(
                f"the start must be below the end, both in [0, 1], got {self.percent}"
            )

    def __call__(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *more: Any,
        **named: Any,
    ) -> Any:  # fmt: skip
        guider = executor.class_obj
        given = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(given)
        try:
            with Run(self, guider.model_options, sigmas.tolist()) as run:
                # Put there now, it stands behind the wrappers of all nodes, and so inside of them.
                add_wrapper_with_key(
                    WrappersMP.APPLY_MODEL, KEY, run.apply_model, guider.model_options, True
                )
                return executor(noise, latent_image, sampler, sigmas, *more, **named)
        finally:
            guider.model_options = given

    def policy_for(
        self, sigmas: Sequence[float], sign: float, model_sampling: Any
    ) -> Policy | None:
        """The policy of a run over `sigmas`, which times `sign` rise."""
        num_steps = len(sigmas) - 1
        policy = self.policy
        if policy is not None and not isinstance(policy, Policy):
            policy = policy(num_steps)
        if policy is None or (self.percent == (0.0, 1.0) and self.steps is None):
            return policy
        if self.steps is not None:
            first, end = (step if step >= 0 else num_steps + 1 + step for step in self.steps)
        else:
            ends = (float(model_sampling.percent_to_sigma(percent)) for percent in self.percent)
            # The list may be in another precision than what it is compared with.
            first, end = (bisect.bisect_left(sigmas, sign * s - 1e-5 * abs(s)) for s in ends)
        return Windowed(policy, first, end)


class Run(ExitStack):
    """One run of a sampler over `sigmas`."""

    def __init__(
        self, cache: Cache, model_options: Mapping[str, Any], sigmas: Sequence[float]
    ) -> None:
        super().__init__()
        self.cache = cache
        compiled = model_options.get(COMPILE_OPTIONS) or {"backend": "eager"}
        self.options = {**compiled, **dict(cache.options)}
        self.num_steps = max(1, len(sigmas) - 1)
        # They fall, but where noise is put in again (unsampling) they rise.
        self.sign = -1.0 if sigmas[0] >= sigmas[-1] else 1.0
        self.sigmas = [self.sign * sigma for sigma in sigmas]
        self.step = -1
        self.calls: Counter[str] = Counter()
        self.denoisers: dict[Any, Any] = {}

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """One evaluation: ComfyUI's ``BaseModel.apply_model`` with the denoiser in its place."""
        base = executor.class_obj
        options = kwargs.get("transformer_options", args[5] if args[5:] else None)
        if options is None or "sigmas" not in options:  # it is no sampler that calls
            return executor(*args, **kwargs)
        there = base.diffusion_model
        model = getattr(there, "_orig_mod", there)  # what another node compiled; we compile it
        if model not in self.denoisers:
            self.denoisers[model] = self._begin(base, model)
        denoiser = self.denoisers[model]
        if denoiser is None:
            return executor(*args, **kwargs)
        step, branch = self._place(options)
        base.diffusion_model, inside = _put(model, denoiser, options)
        try:
            with denoiser.at(step=step, branch=branch):
                return executor(
                    *(inside if value is options else value for value in args),
                    **{k: inside if value is options else value for k, value in kwargs.items()},
                )
        except fxcache.CaptureError as error:  # a workflow must not die of an accelerator
            log.warning("this model runs uncached: %s", str(error))  # its frames hold tensors
            self.denoisers[model] = None
            known = _denoisers[base]
            known.update({key: None for key, own in known.items() if own is denoiser})
        finally:
            base.diffusion_model = there
        return executor(*args, **kwargs)

    def _begin(self, base: Any, model: Any) -> Any:
        """Begin a trajectory of the denoiser of `model`."""
        policy = self.cache.policy_for(self.sigmas, self.sign, base.model_sampling)
        if policy is None:
            denoiser = last_denoiser(base)
        else:
            denoiser = denoiser_of(base, model, policy, self.options)
            if denoiser is None:
                return None
            denoiser.reset()  # what is reported is the last run
            denoiser.policy = policy
            self.callback(_say, denoiser, self.cache.verbose)
        self.enter_context(denoiser.trajectory(num_steps=self.num_steps))
        return denoiser

    def _place(self, options: Mapping[str, Any]) -> tuple[int, str]:
        """The step, and the branch, of a call with these transformer_options.

        An evaluation between two sigmas of the list (dpm_2, sde) is of the step that it began in;
        being its second, it is a branch of its own, and so has another of the same kind at each
        step to continue.
        """
        sigma = self.sign * float(options["sigmas"].max())
        # The list may be in another precision than what the sampler makes of it.
        place = bisect.bisect_right(self.sigmas, sigma + 1e-5 * abs(sigma)) - 1
        step = min(max(place, 0), self.num_steps - 1)
        if step != self.step:
            self.step = step
            self.calls.clear()
        names = ("cond", "uncond")
        conditions = options.get("cond_or_uncond", ())
        name = "+".join(names[i] if i < 2 else f"cond{i}" for i in conditions) or "cond"
        self.calls[name] += 1
        number = self.calls[name]
        return step, name if number == 1 else f"{name} {number}"


def _put(model: Any, denoiser: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What stands in the model's place for a call, and the transformer_options that it is given.

    Most of ComfyUI's models run the wrappers of other nodes in their forward: there the denoiser is
    called by the innermost of these. It is given none of them, or it would capture them.
    """
    code = getattr(type(model).forward, "__code__", None)
    if code is None or "WrapperExecutor" not in code.co_names:
        return denoiser, {**options, "wrappers": {}, "callbacks": {}}

    def innermost(executor: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_without_wrappers(value) for value in args)
        return denoiser(*args, **{k: _without_wrappers(value) for k, value in kwargs.items()})

    wrappers = dict(options.get("wrappers", {}))
    wrappers[WrappersMP.DIFFUSION_MODEL] = {
        **wrappers.get(WrappersMP.DIFFUSION_MODEL, {}),
        KEY: [innermost],
    }
    return model, {**options, "wrappers": wrappers}


def _without_wrappers(value: Any) -> Any:
    if isinstance(value, dict) and "wrappers" in value:
        return {**value, "wrappers": {}, "callbacks": {}}
    return value


def denoiser_of(base: Any, model: Any, policy: Policy, options: Mapping[str, Any]) -> Any:
    """The denoiser of `model`, that of an earlier run if there is one; None if it had to give up.

    `options` are arguments of `fxcache.transform`.
    """
    kind = type(policy.policy if isinstance(policy, Windowed) else policy)
    key = repr((id(model), kind.__name__, sorted(options.items())))
    known = _denoisers.setdefault(base, {})
    is_known = key in known
    known[key] = known.pop(key) if is_known else fxcache.transform(model, policy, **options)
    return known[key]


def last_denoiser(base: Any) -> Any:
    """The denoiser that the model `base` sampled with last, None if it did not."""
    return next(reversed(_denoisers.get(base, {}).values()), None)


def _say(denoiser: Any, verbose: bool) -> None:
    """Log what was skipped."""
    report = denoiser.report()
    log.info("%d of %d evaluations reused what was cached", report.hits, len(report.records))
    if verbose:
        log.warning("%s", report)


def cached(patcher: Any, cache: Cache) -> Any:
    """A clone of the ModelPatcher `patcher` that samples with `cache`, in the place of another."""
    clone = patcher.clone()
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, cache)
    return clone
