"""What is private of torch's distributed packages and used by the capture, in one place.

Checked on torch 2.13 and 2.15 (`tests/runtime/test_sharded.py`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcache.passes.graph import process_groups
from fxcache.passes.pieces import Pieces

log = logging.getLogger("fxcache")

#: Of what class weights are that several ranks hold a part of each.
SHARDED: Any = ()
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

    SHARDED = DTensor


@dataclass(frozen=True)
class Sharding:
    """What `fully_shard` put on a module: its two hooks (and their places), the module's weights
    (the path of their owner and their name), to what these, inputs and outputs are cast, and what
    is unusual in it.
    """

    module: nn.Module
    places: tuple[int, int]
    before: Any
    after: Any
    names: list[tuple[str, str]]
    weight_dtype: torch.dtype | None
    input_dtype: torch.dtype | None
    output_dtype: torch.dtype | None
    obstacle: str | None
    #: It begins to gather other modules before they run.
    prefetches: bool

    def replace(self, before: Any, after: Any) -> None:
        """Put these hooks in the place of the two."""
        self.module._forward_pre_hooks[self.places[0]] = before
        self.module._forward_hooks[self.places[1]] = after


def sharding_of(module: nn.Module) -> Sharding | None:
    """What `fully_shard` put on `module`, None if nothing."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state

    state = _get_module_fsdp_state(module)
    if state is None:
        return None
    handles: Any = (state._pre_forward_hook_handle, state._post_forward_hook_handle)
    modules = list(state._modules)
    if len(modules) > 1:  # one handle of all hooks: those before the forwards, then those after
        both = handles[0].handles
        handles = both[modules.index(module)], both[len(modules) + modules.index(module)]
    # One group in older torch, several in newer.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    parameters = [p for group in groups if group is not None for p in group.fsdp_params]
    paths = {inner: path for path, inner in module.named_modules()}
    names = []
    for info in (p._module_info for p in parameters):
        shared = zip(info.shared_modules, info.shared_param_names, strict=True)
        own = [(info.module, info.param_name), *shared]
        names += [(paths[owner], name) for owner, name in own if owner in paths]
    policy = state._mp_policy
    obstacle = None
    if any(p.offload_to_cpu for p in parameters):
        obstacle = "its weights are kept in host memory (offload_policy)"
    elif any(p.is_dtensor for p in parameters):
        obstacle = "its weights are distributed besides (tensor parallelism)"
    elif any(hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather") for p in parameters):
        obstacle = "its weights are gathered by a method of their own (fsdp_pre_all_gather)"
    return Sharding(
        module,
        (handles[0].id, handles[1].id),
        module._forward_pre_hooks[handles[0].id],
        module._forward_hooks[handles[1].id],
        names,
        policy.param_dtype,
        policy.param_dtype if policy.cast_forward_inputs else None,
        policy.output_dtype,
        obstacle,
        bool(state._states_to_forward_prefetch),
    )


def process_group(name: str) -> Any:
    """The process group that a graph's collective calls by `name`."""
    resolve: Any = torch.distributed.distributed_c10d.__dict__["_resolve_process_group"]
    return resolve(name)


def largest_groups(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the process groups whose ranks are not all in another one of them."""
    ranks = {
        name: set(torch.distributed.get_process_group_ranks(process_group(name))) for name in names
    }
    kept: list[str] = []
    for name in sorted(names, key=lambda name: -len(ranks[name])):
        if not any(ranks[name] <= ranks[other] for other in kept):
            kept.append(name)
    return tuple(kept)


def uncapturable(pieces: Pieces) -> frozenset[str]:
    """Which of the pieces have collectives that no CUDA graph can hold: all but NCCL's."""
    found = set()
    for name in ("head", "hit", "miss"):
        piece = getattr(pieces, name)
        groups = () if piece is None else process_groups(piece.module.graph)
        backends = {torch.distributed.get_backend_config(process_group(group)) for group in groups}
        if any("nccl" not in backend for backend in backends):
            found.add(name)
            log.warning("no CUDA graph of the %s: it has collectives of %s", name, max(backends))
    return frozenset(found)


def share_sharding(model: nn.Module, denoiser: nn.Module) -> None:
    """What `fully_shard` knows of `model` it knows of `denoiser`, whose methods ask for it."""
    if torch.distributed.is_available():
        from torch.distributed._composable_state import _module_state_mapping

        if model in _module_state_mapping:
            _module_state_mapping[denoiser] = _module_state_mapping[model]
