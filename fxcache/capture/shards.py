"""Modules that ``torch.distributed.fsdp.fully_shard`` was put on, as Dynamo should see them.

FSDP2 gathers a module's weights before its forward and frees them after it, by hooks that Dynamo
does not follow. Those of the model itself run around what is captured. Of a block, they are amid
it; while Dynamo captures without gradients, they become what they amount to: each weight is
gathered by an operation of the graph. So the gathers of the span belong to the span, a hit does
none of them, and what was gathered is freed after its last use.
"""

from typing import Any

import torch
from torch import nn

from fxcache.capture import torch_distributed
from fxcache.capture.torch_distributed import SHARDED, Sharding
from fxcache.errors import CaptureError

#: Weights that a block lends out: the dict that they stand in, their name there and themselves.
_Lent = list[tuple[dict[str, Any], str, torch.Tensor]]


class _Gathering:
    """What FSDP's two hooks on a block amount to while it is captured; else, the hooks themselves.

    What is changed is changed in Dynamo's eyes only: as all is put back, it writes nothing at a
    call.

    Args:
        own: what FSDP put on the block.
        lent: a stack that all blocks of a model share.
    """

    def __init__(self, own: Sharding, lent: list[_Lent]) -> None:
        self.own, self.lent = own, lent
        self.names = own.names

    def pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not (_captures() and self._finds_all(module)):
            return self.own.before(module, args, kwargs)
        lent: _Lent = []
        for path, name in self.names:
            store = module.get_submodule(path)._parameters
            weight = store[name]
            lent.append((store, name, weight))  # type: ignore[arg-type]
            store[name] = self._gathered(weight)
        self.lent.append(lent)
        return _cast((args, kwargs), self.own.input_dtype)

    def post_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not (_captures() and self.lent):
            return self.own.after(module, args, output)
        for store, name, weight in self.lent.pop():
            store[name] = weight
        return _cast(output, self.own.output_dtype)

    def _finds_all(self, module: nn.Module) -> bool:
        """Whether the weights are where they were (adapters move them): else the graph breaks at
        FSDP's own hook, and `make_traceable` looks again.
        """
        known = dict(module.named_modules())
        return all(path in known and name in known[path]._parameters for path, name in self.names)

    def _gathered(self, weight: Any) -> Any:
        """All of `weight` on this rank. One that is gathered already is what it is."""
        if not isinstance(weight, SHARDED):
            return weight
        dtype = self.own.weight_dtype
        return (weight if dtype is None else weight.to(dtype)).full_tensor()


def _captures() -> bool:
    """Whether Dynamo captures what the cache may skip. Gradients are reduced by FSDP alone."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """The floating tensors in `value`, cast to `dtype`."""
    if dtype is None:
        return value
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, value
    )


def make_traceable(model: nn.Module) -> int:
    """Let Dynamo follow the hooks of `fully_shard` in `model`; how many modules were not yet.

    They do what they did wherever nothing is captured.

    Raises CaptureError if a block gathers its weights in a way that is not known.
    """
    found, lent = 0, list[_Lent]()
    root = torch_distributed.sharding_of(model)
    if root is not None and root.prefetches:
        raise CaptureError(
            f"{type(model).__name__} begins to gather blocks before they run "
            f"(set_modules_to_forward_prefetch), and a hit runs none: call "
            f"model.set_modules_to_forward_prefetch([])"
        )
    for path, block in model.named_modules():
        sharded = None if block is model else torch_distributed.sharding_of(block)
        if sharded is None:
            continue
        gathering = _owner(sharded.before)
        if isinstance(gathering, _Gathering):
            found += gathering.names != sharded.names
            gathering.names = sharded.names
            continue
        if sharded.obstacle is not None:
            raise CaptureError(
                f"fully_shard on {path} of {type(model).__name__}: {sharded.obstacle}. Shard the "
                f"blocks without it, or the model as a whole (fully_shard(model) alone)"
            )
        of = _Gathering(sharded, lent)
        sharded.replace(of.pre_forward, of.post_forward)
        found += 1
    return found


def make_untraceable(model: nn.Module) -> None:
    """Undo `make_traceable`."""
    for block in model.modules():
        sharded = torch_distributed.sharding_of(block)
        gathering = None if sharded is None else _owner(sharded.before)
        if sharded is not None and isinstance(gathering, _Gathering):
            sharded.replace(gathering.own.before, gathering.own.after)


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)
