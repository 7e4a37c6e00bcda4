"""Hooks that move or cast weights: accelerate's on a whole model, diffusers' on its layers.

accelerate's hook on the model itself (``pipe.enable_model_cpu_offload()``) runs around the cached
forward, outside of what is captured. diffusers' group offloading and layerwise casting run before
and after layers, in the midst of it, by means that Dynamo cannot follow; while it captures, they
become what they amount to: operations that move or cast the layer's weights for its own use. A hit
then neither moves nor casts the weights of the span.

Neither library is imported: what they leave on modules says enough.
"""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

# --- accelerate, on the model itself ---


def is_wrapper(function: Any) -> bool:
    """Whether `function` is what accelerate writes on a module as its forward."""
    return (
        isinstance(function, functools.partial)
        and getattr(function.func, "__module__", None) == "accelerate.hooks"
    )


def is_hooked(model: nn.Module) -> bool:
    """Whether accelerate's hook sits on `model` itself, outermost."""
    own = vars(model)
    return "_hf_hook" in own and "_old_forward" in own and is_wrapper(own.get("forward"))


def around(model: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`call`, in the place of the forward of `model`; if that is hooked, amid its hook."""
    if not is_hooked(model):
        return call(*args, **kwargs)
    hook = vars(model)["_hf_hook"]
    args, kwargs = hook.pre_forward(model, *args, **kwargs)
    with torch.no_grad() if hook.no_grad else nullcontext():
        output = call(*args, **kwargs)
    return hook.post_forward(model, output)


def write_wrapper(model: nn.Module, wrapper: Any) -> None:
    """Put accelerate's `wrapper`, made for another module, on `model`."""
    own = vars(model)
    bound = functools.partial(wrapper.func, model)
    own["forward"] = functools.update_wrapper(bound, own["_old_forward"])


def take_wrapper(model: nn.Module) -> None:
    """Put back what accelerate's hook on `model` was wrapped around."""
    own = vars(model)
    if _is_of_class(model, own["_old_forward"]):
        own.pop("forward", None)
    else:
        own["forward"] = own["_old_forward"]


def replaces_weights(model: nn.Module) -> bool:
    """Whether accelerate's hook on `model` itself makes the weights anew for each call."""
    hook = vars(model).get("_hf_hook")
    if hook is None:
        return False
    return any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ())))


def own_forward(model: nn.Module) -> str | Callable[..., Any]:
    """The forward of `model` without accelerate's hook: that of its class, or, if somebody wrote
    one of their own on the instance, the name of the attribute that holds it.
    """
    name = "_old_forward" if is_hooked(model) else "forward"
    written = vars(model).get(name)
    return type(model).forward if written is None or _is_of_class(model, written) else name


def _is_of_class(model: nn.Module, function: Any) -> bool:
    """Whether `function` is the forward of the class of `model`, bound to it."""
    return bool(function == types.MethodType(type(model).forward, model))


# --- diffusers, on layers ---

_CASTING, _OFFLOADING = "layerwise_casting", "group_offloading"
#: These find out in which order layers run, to prefetch them; a captured graph has no use for it.
_IDLE = ("lazy_prefetch_group_offloading", "layer_execution_tracker")
#: These split and gather the sample between ranks, by operations that a graph can hold.
_CONTEXT_PARALLEL = ("cp_input---", "cp_output---")

#: Weights that a layer lends out, by the dict that they stand in and their name there.
_Lent = list[tuple[dict[str, Any], str, torch.Tensor]]


@dataclass(eq=False)
class _Traced:
    """What a hook amounts to while its module is captured; otherwise, the hook itself.

    Its module's weights are replaced by what ``weight.to(**move)`` gives until the forward is over.
    That happens in Dynamo's eyes only: as all are put back, it writes none of them at a call.
    """

    hook: Any
    #: A stack that all hooks of a model share. It is only ever filled while Dynamo traces.
    lent: list[_Lent]
    move: dict[str, Any] = field(default_factory=dict)
    #: The submodules whose weights are the hook's matter, all below them included.
    paths: Sequence[str] = ()
    #: Single weights besides: the path of their owner and their name.
    loose: Sequence[tuple[str, str]] = ()
    #: Names of keyword arguments that are handed on as they are.
    kept: Sequence[str] = ()

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self.hook.pre_forward(module, *args, **kwargs)
        self.lent.append(self._lend(module))
        if "device" in self.move:
            device = self.move["device"]
            given = args, {k: v for k, v in kwargs.items() if k not in self.kept}
            args, moved = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), given)
            kwargs = {**kwargs, **moved}
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self.hook.post_forward(module, output)
        for store, name, weight in reversed(self.lent.pop()):  # some were lent twice
            store[name] = weight
        return output

    def _lend(self, module: nn.Module) -> _Lent:
        owners = [owner for path in self.paths for owner in module.get_submodule(path).modules()]
        stores = [store for owner in owners for store in (owner._parameters, owner._buffers)]
        weights: list[tuple[dict[str, Any], str]] = [(s, name) for s in stores for name in s]
        for path, name in self.loose:
            owner = module.get_submodule(path)
            is_parameter = name in owner._parameters
            weights.append((owner._parameters if is_parameter else owner._buffers, name))
        lent: _Lent = []
        for store, name in weights:
            weight = store[name]
            # As Module.to does it: whole numbers keep their dtype.
            if weight is None or ("dtype" in self.move and not weight.is_floating_point()):
                continue
            lent.append((store, name, weight))
            store[name] = weight.to(**self.move)
        return lent


def make_traceable(model: nn.Module) -> int:
    """Let Dynamo follow the hooks of `model` that cast or offload layers; how many were not yet.

    They do what they did wherever nothing is captured.
    """
    found, lent = 0, list[_Lent]()
    for _, module, name, hook in _diffusers_hooks(model):
        if name.startswith(_CONTEXT_PARALLEL):
            found += _know_parameters(module, hook)
        elif not _is_traced(hook) and (traced := _traced(module, name, hook, lent)) is not None:
            hook.fn_ref.pre_forward = traced.pre_forward
            hook.fn_ref.post_forward = traced.post_forward
            found += 1
    return found


def _know_parameters(module: nn.Module, hook: Any) -> bool:
    """Tell a hook of context parallelism the names of its module's parameters, which it looks up
    at its first call, and not in a way that can be captured; whether it did not know them.
    """
    known = getattr(hook, "module_forward_metadata", None)
    if known is None or known.cached_parameter_indices is not None:
        return False
    names = inspect.signature(type(module).forward).parameters
    known.cached_parameter_indices = {name: place - 1 for place, name in enumerate(names) if place}
    return True


def make_untraceable(model: nn.Module) -> None:
    """Undo `make_traceable`."""
    for _, _, _, hook in _diffusers_hooks(model):
        if _is_traced(hook):
            hook.fn_ref.pre_forward = hook.pre_forward
            hook.fn_ref.post_forward = hook.post_forward


def hand_over(denoiser: Any, model: nn.Module, cached: Callable[..., Any], written: Any) -> None:
    """Make the hooks of diffusers that were put on `denoiser` itself hooks of `model`.

    `cached` is the forward of the denoiser, `written` what stands in its place (or None).
    """
    registry = vars(model).get("_diffusers_hook")
    if registry is None or registry._module_ref is not denoiser:
        return
    plain = model.forward

    def bound(function: Any) -> Any:
        if function is cached:
            return plain
        if not isinstance(function, functools.partial) or function.args[:1] != (denoiser,):
            return function
        return functools.update_wrapper(functools.partial(function.func, model), plain)

    registry._module_ref = model
    for reference in registry._fn_refs:
        reference.forward = bound(reference.forward)
        reference.original_forward = bound(reference.original_forward)
    for hook in registry.hooks.values():
        group = getattr(hook, "group", None)
        for leader in ("offload_leader", "onload_leader"):
            if getattr(group, leader, None) is denoiser:
                setattr(group, leader, model)
    if bound(written) is not written:
        model.forward = bound(written)


def _traced(module: nn.Module, name: str, hook: Any, lent: list[_Lent]) -> _Traced | None:
    """What `hook` on `module` amounts to, None if that is not known."""
    if name in _IDLE:
        return _Traced(hook, lent)
    if name == _CASTING:
        return _Traced(hook, lent, {"dtype": hook.compute_dtype}, [""])
    if name != _OFFLOADING or hook.group.offload_to_disk_path is not None:
        return None
    group = hook.group
    move = {"device": torch.device(group.onload_device), "non_blocking": bool(group.non_blocking)}
    named = list(module.named_modules())
    # A block of a group of several moves its own weights when its turn comes.
    whole = [path for path, inner in named if inner in group.modules]
    weights = [*group.parameters, *group.buffers]
    loose = [
        (path, key)
        for path, inner in named
        for key, weight in (*inner._parameters.items(), *inner._buffers.items())
        if any(weight is one for one in weights)
    ]
    return _Traced(hook, lent, move, whole, loose, hook.config.exclude_kwargs or ())


def _is_traced(hook: Any) -> bool:
    return isinstance(getattr(hook.fn_ref.pre_forward, "__self__", None), _Traced)


def _diffusers_hooks(model: nn.Module) -> list[tuple[str, nn.Module, str, Any]]:
    """Path, module, name and hook of every hook of diffusers in `model`."""
    return [
        (path, module, name, hook)
        for path, module in model.named_modules()
        if (registry := vars(module).get("_diffusers_hook")) is not None
        for name, hook in registry.hooks.items()
    ]


# --- what cannot be captured ---


def obstacles(model: nn.Module) -> str | None:
    """Which hooks break the graph of `model` and what to do instead, None if there are none."""
    reasons = [_accelerate_obstacle(model), _diffusers_obstacle(model)]
    return " ".join(reason for reason in reasons if reason) or None


def _accelerate_obstacle(model: nn.Module) -> str | None:
    hooked = {
        path: vars(module)["_hf_hook"]
        for path, module in model.named_modules()
        if "_hf_hook" in vars(module)
        and not (module is model and is_hooked(model) and not replaces_weights(model))
    }
    if not hooked:
        return None
    path, hook = next(iter(hooked.items()))
    kinds = " + ".join(type(part).__name__ for part in getattr(hook, "hooks", (hook,)))
    return (
        f"accelerate's hooks on {len(hooked)} modules of {type(model).__name__} (the first: "
        f"{kinds} on {path or 'the model itself'!r}) put weights there and away again amid its "
        f"forward: a graph breaks there, and no residual is known to be of the same weights. "
        f"Remove them (accelerate.hooks.remove_hook_from_module(model, recurse=True); in a "
        f"pipeline, pipe.remove_all_hooks()) and offload the model as a whole "
        f"(accelerate.cpu_offload_with_hook(model), pipe.enable_model_cpu_offload()) or by groups "
        f"(model.enable_group_offload(...), which needs as little memory with "
        f'offload_type="leaf_level"): both work.'
    )


def _diffusers_obstacle(model: nn.Module) -> str | None:
    left = [
        (path, name, hook)
        for path, _, name, hook in _diffusers_hooks(model)
        if not _is_traced(hook)
        and not (name.startswith(_CONTEXT_PARALLEL) and not _asks_for_sizes(hook))
    ]
    if not left:
        return None
    path, name, hook = left[0]
    advice = f"remove it: model._diffusers_hook.remove_hook({name!r}, recurse=True)"
    if name == _OFFLOADING:
        advice = "call enable_group_offload without offload_to_disk_path, which works"
    elif getattr(model, "is_cache_enabled", False):
        advice = "it belongs to diffusers' own cache: call model.disable_cache() first"
    elif _asks_for_sizes(hook):
        advice = (
            "it asks other ranks for their sizes: leave ulysses_anything and ring_anything out of "
            "ContextParallelConfig, and take sizes that the ranks can divide"
        )
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return (
        f"diffusers' hook {name!r} ({type(hook).__name__}) on {path or 'the model'!r}{more} runs "
        f"in the midst of the forward, and the graph may break there; {advice}."
    )


def _asks_for_sizes(hook: Any) -> bool:
    """Whether a hook of context parallelism takes what ranks cannot divide evenly."""
    config = getattr(hook, "parallel_config", None)
    return any(getattr(config, f"{kind}_anything", False) for kind in ("ulysses", "ring"))
