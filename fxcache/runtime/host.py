"""Keep residuals in host memory: fetched for a hit, put back after a miss.

A hit costs one transfer of every residual that it uses, a miss one of every residual that it
stores. What the next measurement is compared with stays on the device: every evaluation reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxcache.runtime.regions import Direct, Missed, Values, Wiring
from fxcache.runtime.state import Buffers

Ring = tuple[torch.Tensor, ...]


def is_away(cache_device: torch.device | None, device: torch.device) -> bool:
    """Whether residuals that are computed on `device` are kept elsewhere."""
    return cache_device is not None and cache_device.type != device.type


def host_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros in host memory, for what is computed on `device`: pinned for a GPU, whose copies then
    need not be waited for.
    """
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")


@dataclass(frozen=True)
class HostedRegions:
    """The compiled pieces on `device`, with rings that lie in host memory."""

    wiring: Wiring
    device: torch.device

    def begin(self, inputs: Values, buffers: Buffers) -> "_Hosted":
        """Run the head."""
        crossing, measured = self.wiring.head(inputs, buffers)
        return _Hosted(self.wiring, buffers, (*inputs, *crossing), measured, self.device)


@dataclass(eq=False)
class _Hosted(Direct):
    """An evaluation by direct calls on copies of the rings. See `Evaluation`."""

    device: torch.device

    def hit(self, weights: Sequence[float]) -> Sequence[Any]:
        # A residual without a weight counts for nothing: another's copy may stand in its place.
        used = [slot for slot, weight in enumerate(weights) if weight != 0] or [0]
        rings = tuple(self._fetched(ring, used) for ring in self.buffers.rings)
        return self._with(rings).hit(weights)

    def miss(self, slot: int, weights: Sequence[float] = ()) -> Missed:
        others = [at for at in range(self.wiring.ring) if at != slot] if self.wiring.others else []
        used = [at for at, w in zip(others, weights, strict=False) if w != 0]
        rings = []
        for ring in self.buffers.rings:
            own = self._empty_like(ring[slot])
            near = self._fetched(ring, used) if used else (own,) * len(ring)
            rings.append(tuple(own if at == slot else each for at, each in enumerate(near)))
        result = self._with(tuple(rings)).miss(slot, weights)
        for ring, near in zip(self.buffers.rings, rings, strict=True):
            ring[slot].copy_(near[slot], non_blocking=True)
        return result

    def _with(self, rings: tuple[Ring, ...]) -> Direct:
        return Direct(self.wiring, replace(self.buffers, rings=rings), self.values, self.measured)

    def _fetched(self, ring: Ring, used: Sequence[int]) -> Ring:
        """`ring` on the device, as far as it is `used`."""
        near = {slot: self._empty_like(ring[slot]) for slot in used}
        for slot, copy in near.items():
            copy.copy_(ring[slot], non_blocking=True)
        return tuple(near.get(slot, near[used[0]]) for slot in range(len(ring)))

    def _empty_like(self, residual: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(residual, device=self.device)
