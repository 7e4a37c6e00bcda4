"""What a state belongs to, and how its buffers are made."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxcache.errors import CaptureError
from fxcache.passes.cut import Cut
from fxcache.passes.graph import GraphInputs, value_of
from fxcache.runtime.host import host_zeros
from fxcache.runtime.state import Buffers, Signature


def signature_of(
    placeholders: list[fx.Node],
    inputs: GraphInputs,
    found: Cut,
    state: Sequence[FakeTensor],
) -> Callable[[Sequence[Any]], Signature]:
    """What a state belongs to: the span, the layouts of the inputs and of what is kept.

    Constant where all is static. Recompiled graphs of one span share a state, those of two parts of
    a broken stack never do.
    """
    places = [placeholders.index(node) for node in inputs.data]
    places_of = {placeholders.index(node): value_of(node) for node in inputs.sizes}
    span = found.head_units, found.span_units
    names = [inputs.paths[node] for node in inputs.data]
    static = _layouts(names, map(value_of, inputs.data))
    if not inputs.sizes:
        constant = Signature(static, (), (span, *map(_layout, state)))
        return lambda values: constant

    def layout(values: Sequence[Any]) -> Signature:
        given = _layouts(names, (values[place] for place in places))
        known = {
            fake.node.expr: values[place]
            for place, fake in places_of.items()
            if isinstance(fake, torch.SymInt)
        }
        # By numbers and not by formulas: other graphs of the same sizes share the state.
        shapes = (tuple(_concrete(size, known) for size in fake.shape) for fake in state)
        kept = zip(shapes, state, strict=True)
        return Signature(given, (), (span, *((str(n), f.dtype, f.device) for n, f in kept)))

    return layout


def _layouts(names: Sequence[str], values: Iterable[Any]) -> tuple[tuple[str, Hashable], ...]:
    """Of tensors with dimensions (Dynamo makes some numbers scalar tensors)."""
    given = zip(names, values, strict=True)
    return tuple((name, _layout(v)) for name, v in given if _is_tensor(v) and v.ndim > 0)


def _layout(tensor: torch.Tensor) -> Hashable:
    return str(tuple(tensor.shape)), tensor.dtype, tensor.device


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def allocator(
    placeholders: list[fx.Node],
    inputs: GraphInputs,
    kept: Mapping[str, FakeTensor],
    residuals: list[FakeTensor],
    ring: int,
    *,
    on_host: bool = False,
) -> Callable[[Sequence[Any]], Buffers]:
    """Makes buffers like the fakes, symbolic sizes taken from the inputs of a call; the rings in
    host memory with `on_host`.
    """
    places = {placeholders.index(node): value_of(node) for node in inputs.sizes}

    def allocate(values: Sequence[Any]) -> Buffers:
        sizes = {
            fake.node.expr: values[place]
            for place, fake in places.items()
            if isinstance(fake, torch.SymInt)
        }

        def make(fake: torch.Tensor, zeros: Callable[..., torch.Tensor]) -> torch.Tensor:
            shape = [_concrete(size, sizes) for size in fake.shape]
            return zeros(shape, dtype=fake.dtype, device=fake.device)

        ring_zeros = host_zeros if on_host else torch.zeros
        # Plain tensors even under inference_mode, so that later calls outside may write them.
        with torch.inference_mode(False), torch.no_grad():
            rings = tuple(tuple(make(r, ring_zeros) for _ in range(ring)) for r in residuals)
            return Buffers({key: make(fake, torch.zeros) for key, fake in kept.items()}, rings)

    return allocate


def _concrete(size: int | torch.SymInt, known: dict[Any, int]) -> int:
    if isinstance(size, int):
        return size
    number = size.node.expr.subs(known)
    if number.free_symbols:
        raise CaptureError(f"a stream of the block stack has a size that depends on data: {size}")
    return int(number)
