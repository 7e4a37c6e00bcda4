"""Which forecast fits this sampler? Seen for nothing, at the misses of a session's first trajectory.

On a miss the fresh residual is there, and so are the two before it: what reuse would have given, and
what linear extrapolation would have, are two sums each. Where the policy's own forecast is the worse
of the two by more than a fifth, the report and the log say so.
"""

from dataclasses import dataclass, field

import torch

from fxcache.policy.forecast import Forecast, Reuse, Taylor
from fxcache.runtime.state import Buffers

#: So much worse than the other must the policy's own forecast be.
WORSE = 1.2

Residuals = list[torch.Tensor]


@dataclass
class Advice:
    """What was seen of one session's first trajectory.

    `past` holds, by branch, the last two computed steps with copies of their residuals; `sums` are
    those of |fresh - forecast| for reuse, linear extrapolation, and of |fresh|, on the device.
    """

    past: dict[object, list[tuple[int, Residuals]]] = field(default_factory=dict)
    sums: torch.Tensor | None = None

    def note(self, branch: object, step: int, buffers: Buffers, entry: int) -> None:
        """A miss of `branch` at `step` stored its residuals in ring entry `entry`."""
        fresh = [ring[entry].clone() for ring in buffers.rings]
        past = self.past.get(branch, [])
        if len(past) == 2 and past[0][0] != past[1][0] != step:
            (n1, newest), (n2, older) = past
            pace = (step - n1) / (n1 - n2)
            zero = torch.zeros((), device=fresh[0].device)
            reuse = sum((_sum(r - a) for r, a in zip(fresh, newest, strict=True)), zero)
            linear = sum(
                (
                    _sum(r - a - pace * (a - b))
                    for r, a, b in zip(fresh, newest, older, strict=True)
                ),
                zero,
            )
            found = torch.stack([reuse, linear, sum(map(_sum, fresh), zero)])
            self.sums = found if self.sums is None else self.sums + found
        self.past[branch] = [(step, fresh), *past[: 1 if not past or past[0][0] != step else 0]]

    def finding(self, forecast: Forecast) -> str | None:
        """What to tell the user, None if there is nothing to say. One read-back."""
        self.past.clear()
        if self.sums is None:
            return None
        reuse, linear, size = self.sums.tolist()
        errors = {"reuse": reuse / size, "linear extrapolation": linear / size} if size else {}
        own = "reuse" if isinstance(forecast, Reuse) else "linear extrapolation"
        if not errors or not isinstance(forecast, Reuse | Taylor):
            return None
        better = min(errors, key=errors.__getitem__)
        if not errors[own] > WORSE * errors[better]:
            return None
        advice = "Taylor(order=1)" if better != "reuse" else "Reuse()"
        return (
            f"at the computed steps {own}, which the policy forecasts by, was off by "
            f"{errors[own]:.1%} of the residual, {better} by {errors[better]:.1%}: "
            f"forecast={advice} fits this sampler better"
        )


def _sum(difference: torch.Tensor) -> torch.Tensor:
    return difference.abs().float().sum()
