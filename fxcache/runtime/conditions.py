"""The conditioning of a denoiser: control residuals, text, adapter features; has it changed?

They are inputs of the captured graph that a hit does not look at. A policy with a
`control_threshold` has them compared with what they were at the last computed step: outside of the
compiled pieces, by whoever is about to hit, all of them with one read-back.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcache.passes.facts import Facts
from fxcache.passes.graph import TIMESTEP_NAMES, is_numeric, tensor_of
from fxcache.passes.measure import shared
from fxcache.policy.base import as_float32
from fxcache.runtime.state import Buffers

#: Of a tensor, of no tensor, and of what it is compared with: [B, 2] sums (see `fxcache.kernels`).
Measure = Callable[[torch.Tensor, None, torch.Tensor], torch.Tensor]


def conditioning(facts: Facts) -> list[fx.Node]:
    """The caller's floating-point tensors beside the noisy sample and the time."""
    inputs = facts.inputs
    return [
        node
        for node, name in inputs.data.items()
        if is_numeric(node)
        and tensor_of(node).ndim > 0
        and not (node in facts.samples or node is inputs.timestep)
        and not (name in TIMESTEP_NAMES or "timestep" in name or "sigma" in name)
    ]


@dataclass(frozen=True, eq=False)
class Conditions:
    """Compares a graph's conditioning inputs with those of the last computed step.

    Args:
        threshold: the policy's `control_threshold`, in float32.
        places: where they stand among the graph's inputs, by name. Recompiled graphs share a
            state, so names are what is compared.
        measure: sums of differences, as `fxcache.kernels.residual_diff`.
        device: where the model computes.
        groups: process groups whose ranks share the sums, there.
    """

    threshold: float
    places: Mapping[str, int]
    measure: Measure
    device: torch.device
    groups: Sequence[str] = ()

    def forbidding(self, inputs: Sequence[Any], buffers: Buffers) -> float | None:
        """The change that forbids a hit, None if it is below the threshold."""
        change = self.change(inputs, buffers)
        return None if as_float32(change) < self.threshold else change  # of NaN: NaN

    def change(self, inputs: Sequence[Any], buffers: Buffers) -> float:
        """The largest residual diff of an input since the last computed step; inf if there were
        others. One read-back.
        """
        kept = buffers.conditions
        if kept.keys() != self.places.keys():
            return math.inf
        if not kept:
            return 0.0
        with torch.no_grad():
            changes = [self._change(inputs[at], kept[name]) for name, at in self.places.items()]
            return float(torch.stack([change.to(self.device) for change in changes]).amax())

    def _change(self, now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
        if now.ndim < 2:
            now, then = now.reshape(1, -1), then.reshape(1, -1)
        sums = self.measure(now, None, then).sum(0)
        total, scale = shared(sums.to(self.device), self.groups).unbind(0)
        # 0 / 0 is no difference, NaN / NaN is; what was all zero and no longer is changed by inf.
        return torch.where(total == 0, total, total / scale)

    def keep(self, inputs: Sequence[Any], buffers: Buffers) -> None:
        """Copy them: the step is about to be computed."""
        # Plain tensors even under inference_mode, so that later calls outside may write them.
        with torch.inference_mode(False), torch.no_grad():
            for name, at in self.places.items():
                if name in buffers.conditions:
                    buffers.conditions[name].copy_(inputs[at])
                else:
                    buffers.conditions[name] = inputs[at].detach().clone()
