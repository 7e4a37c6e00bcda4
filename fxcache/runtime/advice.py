"""Would another forecast have been nearer? Measured at the misses of the first trajectory.

Every computed residual there is compared with what reuse and what linear extrapolation would have
made of the two before it. On trained models reuse is often the worse by far: the audit says that a
residual is the right thing to keep, this says how to use it.
"""

import math
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch

from fxcache.policy.forecast import Forecast, Reuse, Taylor
from fxcache.runtime.audit import squares
from fxcache.runtime.state import BranchState, Buffers

#: By how much the policy's own forecast must be the worse one.
WORSE = 1.2

#: A computed step and copies of its residuals, one a stream.
Computed = tuple[int, list[torch.Tensor]]


class Advice:
    """Compares `own`, a policy's forecast, with `Reuse` and with linear extrapolation.

    Costs copies of two residuals at each miss, one of which is kept where the ring holds one only,
    and no read-back before somebody asks. Where a GPU's residuals lie in host memory, nothing.
    """

    def __init__(self, own: Forecast) -> None:
        self.own = own
        #: Sums over misses, of each one's norm: off by the own forecast, by the others, and itself.
        self.sums: torch.Tensor | None = None
        self._last: WeakKeyDictionary[Buffers, Computed] = WeakKeyDictionary()
        self._others: dict[str, Forecast] = {"Reuse()": Reuse(), "Taylor(order=1)": Taylor(order=1)}

    @torch.no_grad()
    def before_miss(self, state: BranchState) -> list[Computed]:
        """The last two computed residuals, newest first, before a miss writes over one."""
        buffers = state.allocated
        older = self._last.pop(buffers, None)
        is_moving = buffers.rings[0][0].is_pinned()  # a transfer to the host may still write it
        if not state.past or is_moving or buffers.device.type == "meta":
            return []
        last = [(step, [ring[at].clone() for ring in buffers.rings]) for step, at in state.past[:2]]
        if len(buffers.rings[0]) == 1:  # the one before it was written over
            self._last[buffers] = last[0]
            last += [] if older is None else [older]
        steps = [state.step, *(step for step, _ in last)]
        falls = all(later > step for later, step in pairwise(steps))
        return last if len(last) == 2 and falls else []

    @torch.no_grad()
    def after_miss(self, state: BranchState, computed: list[Computed]) -> None:
        """Compare what `before_miss` found with what the miss has written."""
        if not computed:
            return
        (first, new), (second, old) = computed
        fresh = [ring[state.past[0][1]] for ring in state.allocated.rings]
        norms = []
        for forecast in (self.own, *self._others.values()):
            past = [first, second][: forecast.ring]
            weights = [*forecast.weights(state.step, past), 0.0][:2]
            off = [
                _wide(f) - weights[0] * _wide(a) - weights[1] * _wide(b)
                for f, a, b in zip(fresh, new, old, strict=True)
            ]
            norms.append(squares(off).sqrt())
        sums = torch.stack([*norms, squares(fresh).sqrt()])
        self.sums = sums if self.sums is None else self.sums + sums

    def finding(self) -> str | None:
        """What the sums say, None if the own forecast is good. One read-back."""
        if self.sums is None:
            return None
        own, *others, size = self.sums.tolist()
        name, best = min(zip(self._others, others, strict=True), key=lambda each: each[1])
        if not math.isfinite(own + size) or own <= WORSE * best:
            return None
        return (
            f"forecast={name} would have been off by {best / size:.1%} of the residual at the "
            f"computed steps of the first trajectory, {self.own!r} by {own / size:.1%}"
        )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_complex() else tensor.float()
