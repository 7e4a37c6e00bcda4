"""``torch.ops.fxcache.{residual_diff, forecast, ...}``: the kernels as the compiler sees them.

Inductor sees through these operators: on a GPU down to the Triton kernels, elsewhere down to plain
tensor operations, which it fuses. That choice is made inside the operators (a CPU kernel registered
beside them would hide it from Inductor). Importing this module registers them.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from . import reference as plain

HAS_TRITON = importlib.util.find_spec("triton") is not None
#: Under the interpreter (a debugging aid of Triton) the kernels run on CPU tensors as well.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

if HAS_TRITON:  # triton_op imports it in any case, and finds by these names what keys its caches
    from .launch import (
        launch_forecast,
        launch_refresh,
        launch_refresh_error,
        launch_residual_diff,
    )


def _register(name: str, mutates_args: Iterable[str]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as ``fxcache::name``."""

    def register(function: Callable[..., Any]) -> Any:
        if HAS_TRITON:
            return torch.library.triton_op(name, function, mutates_args=mutates_args)
        # Nothing to see through, and triton_op would log that it found no Triton.
        op = torch.library.custom_op(name, function, mutates_args=mutates_args)
        op.register_fake(function)
        return op

    return register


def _takes(*tensors: torch.Tensor | None) -> bool:
    """Whether the Triton kernels take these tensors."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not HAS_TRITON or any(tensor.dtype not in DTYPES for tensor in present):
        return False
    if present[0].device.type == "cuda":
        return True
    # The interpreter reads memory: it has nothing to say about fake tensors.
    own = (torch.Tensor, torch.nn.Parameter)
    return INTERPRETED and all(type(t) in own and t.device.type == "cpu" for t in present)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@_register("fxcache::residual_diff", mutates_args={"tickets"})
def residual_diff(
    h_out: torch.Tensor,
    h_in: torch.Tensor | None,
    reference: torch.Tensor,
    tickets: torch.Tensor | None = None,
) -> torch.Tensor:
    if not _takes(h_out, h_in, reference):
        return plain.residual_diff(h_out, h_in, reference)
    with _on(h_out.device):
        return launch_residual_diff(h_out, h_in, reference, tickets)


@_register("fxcache::forecast", mutates_args=())
def forecast(
    before: torch.Tensor | None, ring: Sequence[torch.Tensor], weights: torch.Tensor | None
) -> torch.Tensor:
    if not _takes(before, *ring):
        return plain.forecast(before, ring, weights)
    with _on(ring[0].device):
        return launch_forecast(before, ring, weights)


@_register("fxcache::refresh", mutates_args={"slot"})
def refresh(after: torch.Tensor, before: torch.Tensor | None, slot: torch.Tensor) -> None:
    if not _takes(after, before, slot):
        return plain.refresh(after, before, slot)
    with _on(slot.device):
        return launch_refresh(after, before, slot)


@_register("fxcache::refresh_error", mutates_args={"slot"})
def refresh_error(
    after: torch.Tensor,
    before: torch.Tensor | None,
    slot: torch.Tensor,
    ring: Sequence[torch.Tensor],
    weights: torch.Tensor,
) -> torch.Tensor:
    if not _takes(after, before, slot, *ring):
        return plain.refresh_error(after, before, slot, ring, weights)
    with _on(slot.device):
        return launch_refresh_error(after, before, slot, ring, weights)
