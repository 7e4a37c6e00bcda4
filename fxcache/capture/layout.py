"""What a state belongs to, and how its buffers are made."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from fxcache.errors import CaptureError
from fxcache.passes.cut import Cut
from fxcache.passes.graph import GraphInputs, value_of
from fxcache.runtime.host import host_zeros
from fxcache.runtime.state import Buffers, Signature

Values = Sequence[Any]


def signature_of(
    placeholders: list[fx.Node], inputs: GraphInputs, found: Cut, state: Sequence[FakeTensor]
) -> Callable[[Values], Signature]:
    """What a state belongs to: the span, the layouts of the inputs and of what is kept.

    Constant where all is static. Recompiled graphs of one span share a state, those of two parts of
    a broken stack never do: sizes are known by numbers, not by formulas.
    """
    places, sizes_in = [placeholders.index(node) for node in inputs.data], sizes_of(inputs)
    names, span = [inputs.paths[node] for node in inputs.data], (found.head_units, found.span_units)

    @lru_cache(maxsize=64)
    def kept(*numbers: int) -> tuple[Hashable, ...]:
        sizes = dict(zip(sizes_in.values(), numbers, strict=True))
        return tuple((str(_shape(fake, sizes)), fake.dtype, fake.device) for fake in state)

    def signature(data: Iterable[Any], *numbers: int) -> Signature:
        """Of the tensors with dimensions (Dynamo makes some numbers scalar tensors)."""
        given = (
            (name, (str(tuple(value.shape)), value.dtype, value.device))
            for name, value in zip(names, data, strict=True)
            if isinstance(value, torch.Tensor) and value.ndim > 0
        )
        return Signature(tuple(sorted(given, key=itemgetter(0))), (span, *kept(*numbers)))

    if not inputs.sizes:
        constant = signature(map(value_of, inputs.data))
        return lambda values: constant
    return lambda values: signature(
        (values[place] for place in places), *(values[place] for place in sizes_in)
    )


def allocator(
    placeholders: list[fx.Node],
    inputs: GraphInputs,
    kept: Mapping[str, FakeTensor],
    residuals: list[FakeTensor],
    ring: int,
    *,
    on_host: bool = False,
) -> Callable[[Values], Buffers]:
    """Makes buffers like the fakes, symbolic sizes taken from the inputs of a call; the rings in
    host memory with `on_host`.
    """
    sizes_in = sizes_of(inputs)

    def allocate(values: Values) -> Buffers:
        sizes = {symbol: values[place] for place, symbol in sizes_in.items()}

        def make(fake: torch.Tensor, zeros: Callable[..., torch.Tensor]) -> torch.Tensor:
            return zeros(_shape(fake, sizes), dtype=fake.dtype, device=fake.device)

        ring_zeros = host_zeros if on_host else torch.zeros
        # Plain tensors even under inference_mode, so that later calls outside may write them.
        with torch.inference_mode(False), torch.no_grad():
            rings = tuple(tuple(make(r, ring_zeros) for _ in range(ring)) for r in residuals)
            return Buffers({key: make(fake, torch.zeros) for key, fake in kept.items()}, rings)

    return allocate


def sizes_of(inputs: GraphInputs) -> dict[int, Any]:
    """The symbols among the inputs, by their places."""
    placeholders = list(inputs.sizes[0].graph.find_nodes(op="placeholder")) if inputs.sizes else []
    values = {placeholders.index(node): value_of(node) for node in inputs.sizes}
    return {at: fake.node.expr for at, fake in values.items() if isinstance(fake, torch.SymInt)}


def _shape(fake: torch.Tensor, sizes: Mapping[Any, int]) -> tuple[int, ...]:
    return tuple(_concrete(size, sizes) for size in fake.shape)


def _concrete(size: int | torch.SymInt, known: Mapping[Any, int]) -> int:
    if isinstance(size, int):
        return size
    number = size.node.expr.subs(known)
    if number.free_symbols:
        raise CaptureError(f"a stream of the block stack has a size that depends on data: {size}")
    return int(number)
