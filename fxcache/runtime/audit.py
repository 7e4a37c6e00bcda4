"""Does what is cached follow the input? Tried once a capture, before anything is reused.

After the first computed step the model is evaluated once more, on a sample moved by noise of a
tenth of its standard deviation, and a hit there reuses the residual of the first::

    q = |hit - full| / |first - full|

A right cut follows the sample: q is well below 1 (0.2 to 0.5 at the first step of trained models).
A tensor that is no residual and is cached as one gives 1 and more: returning the old output would
have been as good. A hit that gives the old output bit for bit fails, too. The static rules cannot
tell the two apart; only data can.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxcache.passes.measure import shared
from fxcache.runtime.regions import Evaluation, Values
from fxcache.runtime.state import Buffers

log = logging.getLogger("fxcache")

#: From here on nothing is reused.
LIMIT = 1.05
#: By how much of its standard deviation the sample is moved.
MOVE = 0.1


@dataclass(eq=False, repr=False)
class Audit:
    """The audit of one captured graph.

    Args:
        begin: begins an evaluation by the compiled pieces.
        samples: places of the noisy inputs among the graph's inputs.
        outputs: places of what the caller gets among its outputs.
        what: says what was cut.
        device: where it computes.
        draws: whether the graph draws random numbers: the generators are then put back.
        groups: process groups whose ranks compute it together, and so share the sums.
        q: None if it was not done yet, or could not tell (nothing finite to compare).
        is_frozen: a hit gave the old output, though the sample had moved.
    """

    begin: Callable[[Values, Buffers], Evaluation]
    samples: Sequence[int]
    outputs: Sequence[int]
    what: str
    device: torch.device
    draws: bool
    groups: Sequence[str] = ()
    q: float | None = None
    is_frozen: bool = False

    @property
    def failed(self) -> bool:
        return self.is_frozen or (self.q is not None and self.q >= LIMIT)

    def run(self, inputs: Values, outputs: Sequence[Any], buffers: Buffers, entry: int) -> None:
        """Try the residual in ring entry `entry` of `buffers`, which were filled by the evaluation
        of `inputs` that gave `outputs`. Writes into none of them. One read-back.
        """
        if self.device.type == "meta" or any(is_fixed(inputs[p]) for p in self.samples):
            return  # nothing to compare, or no way to move it
        gpus = [self.device.index or 0] if self.device.type == "cuda" else []
        # Random numbers are drawn here that the model's own evaluations do not miss.
        with torch.no_grad(), torch.random.fork_rng(gpus, enabled=self.draws):
            given, own = list(inputs), _copied(buffers, self.device)
            for place in self.samples:
                given[place] = moved(inputs[place])
            weights = [float(at == entry) for at in range(len(buffers.rings[0]))]
            trial = self.begin(tuple(given), own)
            hit, (full, _) = trial.hit(weights), trial.miss(entry)  # which overwrites the entry
            pairs = (hit, full), (outputs, full), (hit, outputs)
            sums = torch.stack([self._distance(a, b) for a, b in pairs])
            error, scale, change = shared(sums, self.groups).sqrt().tolist()
        if not math.isfinite(error) or not math.isfinite(scale):
            return
        self.q = error / scale if scale > 0 else (0.0 if error == 0 else math.inf)
        self.is_frozen = change == 0 < scale
        log.info("audit: q = %.2f", self.q)
        if self.failed:
            still = ", and did not move at all" if self.is_frozen else ""
            log.warning(
                "nothing is reused: on a slightly moved sample a hit is off by %.2f times what the "
                "output moved%s (below 1 it would follow the sample). What was cut: %s. "
                "audit=False reuses it all the same",
                self.q,
                still,
                self.what,
            )

    def _distance(self, a: Sequence[Any], b: Sequence[Any]) -> torch.Tensor:
        """The sum of the squares of a difference, over all outputs."""
        return squares([a[i] - b[i] for i in self.outputs])


def moved(sample: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """`sample` with noise of a tenth of its standard deviation (of its size, if it is constant)."""
    generator = torch.Generator(sample.device).manual_seed(seed)
    noise = torch.empty_like(sample, dtype=torch.float32)
    noise = noise.normal_(generator=generator)
    values = torch.view_as_real(sample) if sample.is_complex() else sample
    spread = values.float().std() if values.numel() > 1 else values.float().abs().sum()
    size = values.float().square().mean().sqrt()
    scale = torch.where(spread > 1e-6 * size, spread, torch.where(size > 0, size, 1.0))
    result = torch.empty_strided(  # the compiled pieces assume the strides
        sample.shape, sample.stride(), dtype=sample.dtype, device=sample.device
    )
    return result.copy_(sample + (MOVE * scale * noise))


def is_fixed(sample: torch.Tensor) -> bool:
    """Whether `sample` holds whole numbers, or elements that share memory (expanded dimensions)."""
    pairs = zip(sample.shape, sample.stride(), strict=True)
    is_continuous = sample.is_floating_point() or sample.is_complex()
    return not is_continuous or any(size > 1 and stride == 0 for size, stride in pairs)


def _copied(buffers: Buffers, device: torch.device) -> Buffers:
    """Buffers that a trial may write into. Another's conditions are not looked at."""
    kept = {key: tensor.clone() for key, tensor in buffers.kept.items()}
    rings = tuple(
        tuple(residual.to(device, copy=True) for residual in ring) for ring in buffers.rings
    )
    return replace(buffers, kept=kept, rings=rings)


def squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares of all elements, in float32, where the first tensor is."""
    sums = [tensor.abs().float().square().sum() for tensor in tensors]
    return torch.stack([each.to(sums[0].device) for each in sums]).sum()
