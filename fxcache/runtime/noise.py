"""Does the sampler add fresh noise at each step?

The next input of an ODE solver (Euler, Heun, DPM++ 2M, UniPC, ...) is a linear combination of what
was there before: the inputs and the outputs of the last evaluations. What the best such combination
leaves of an input is what ancestral and SDE samplers added: fresh noise. It is looked for only
where a policy does not hit, and then in one sample of a batch, in a part of its elements.
"""

import math
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

import torch

#: So many elements of a sample are enough.
SAMPLED = 2**16
#: The share of an input's energy above which it is noise that the evaluations before it do not
#: explain, by how many of them are asked: multistep solvers use as many outputs, and what the
#: oldest would have explained is a percent or two. (Of one evaluation alone it may be a third.)
FRESH = {2: 0.05, 3: 0.01}
WINDOW = max(FRESH)
#: Without noise are so many explained inputs in a row: a sampler of two evaluations a step may add
#: it at every second.
IN_A_ROW = 2
#: Directions with less of the energy than this are rounding errors.
_PRECISION = 1e-6
#: Branches of guidance that one batch may hold.
_MOST_BRANCHES = 4


class Exam:
    """Looks at a few evaluations of a trajectory, from the first branch of a step on.

    Args:
        branch, step: of the evaluation that gave rise to it; those after it are looked at.
    """

    def __init__(self, branch: Hashable, step: int) -> None:
        self._after = branch, step
        self._branch: Hashable = None
        #: Of each evaluation of the branch: its input, its outputs, and those of other branches.
        self._seen: deque[list[torch.Tensor]] = deque(maxlen=WINDOW)
        self._chosen: torch.Tensor | None = None
        self._explained = 0
        self.is_over = False
        #: How much of the input of which step was fresh noise (None: nothing, or too little seen).
        self.share: float | None = None
        self.step = step

    def look(self, branch: Hashable, step: int, x: torch.Tensor, outputs: Sequence[Any]) -> None:
        """Look at an evaluation of `branch` at `step`: its noisy input and its outputs."""
        if not self._seen:
            if branch != self._after[0] and step <= self._after[1]:
                return  # another branch of the step before
            self._branch = branch
        output = next((out for out in outputs if _is_like(out, x)), None)
        if output is None:
            self.is_over = True
            return
        with torch.no_grad():
            if branch == self._branch:
                now = self._elements(x[:1], x, output)
                if self._seen:
                    self._judge(now[0], step)
                self._seen.append(now)
            self._seen[-1] += self._elements(output[_partners(len(output))], x, output)
        if self.is_over:
            self._seen.clear()

    def _elements(
        self, rows: torch.Tensor, x: torch.Tensor, output: torch.Tensor
    ) -> list[torch.Tensor]:
        """Copies of elements of each of `rows`: of the part that input and output have in common
        (inputs may have more channels, for an image that they start from, and outputs for a
        learned variance).
        """
        for axis in range(1, x.ndim):
            rows = rows.narrow(axis, 0, min(x.shape[axis], output.shape[axis]))
        flat = rows.flatten(1)
        if flat.shape[1] > SAMPLED:
            if self._chosen is None:
                generator = torch.Generator().manual_seed(0)
                chosen = torch.randint(flat.shape[1], (SAMPLED,), generator=generator)
                self._chosen = chosen.to(flat.device)
            flat = flat[:, self._chosen]
        return list(flat.to(torch.float32, copy=True))

    def _judge(self, now: torch.Tensor, step: int) -> None:
        before = [row for seen in self._seen for row in seen]
        if any(row.shape != now.shape for row in before):
            self.is_over = True
            return
        share = unexplained(now, before, self._seen[-1][0])
        if share is None:
            self.is_over = True
        elif share > FRESH.get(len(self._seen), math.inf):
            self.share, self.step, self.is_over = share, step, True
        else:
            self._explained = self._explained + 1 if share <= FRESH[WINDOW] else 0
            self.is_over = self._explained == IN_A_ROW

    def finding(self) -> str | None:
        """What to tell the user, None if there is no noise, or nothing is known."""
        if self.share is None:
            return None
        return (
            f"the sampler seems to add fresh noise at each step (of the energy of the model's "
            f"input at step {self.step}, {self.share:.0%} does not follow from what was there "
            f"before), so successive inputs differ by that, whatever the threshold. Use a "
            f"deterministic sampler (eta=0; not an ancestral one or an SDE), or a policy that "
            f"measures nothing (MagCache, StepSchedule)"
        )


def _is_like(output: Any, x: torch.Tensor) -> bool:
    """Whether `output` could be the prediction for the noisy input `x`."""
    return (
        isinstance(output, torch.Tensor)
        and output.is_floating_point()
        and output.device == x.device
        and output.ndim == x.ndim
        and len(output) == len(x)
    )


def _partners(batch: int) -> list[int]:
    """Where the branches of the first sample may stand in a batch of several branches: one behind
    another, or all of a branch and then all of the next.
    """
    counts = [count for count in range(1, _MOST_BRANCHES + 1) if batch % count == 0]
    apart = {batch // count * place for count in counts for place in range(count)}
    return sorted(apart | set(range(min(batch, _MOST_BRANCHES))))


def unexplained(
    now: torch.Tensor, before: Sequence[torch.Tensor], last: torch.Tensor
) -> float | None:
    """The share of the energy of `now` that no linear combination of `before` explains.

    All are float32 vectors; elements in which `now` is still what it was in `last` do not count
    (tokens of a reference image). None if too few are left to say, or not all is finite. One
    read-back.
    """
    moved = now != last
    rows = torch.stack([now, *before]) * moved
    gram = torch.stack([(rows * row).sum(1) for row in rows])  # no product that may be TF32
    *products, number = torch.cat([gram.flatten(), moved.sum()[None]]).tolist()
    if number < 4 * len(rows) or not all(map(math.isfinite, products)):
        return None
    gram = torch.tensor(products, dtype=torch.float64).reshape(len(rows), -1)
    scale = gram.diagonal().sqrt()
    gram = (gram / torch.outer(scale, scale)).nan_to_num(0.0)
    values, vectors = torch.linalg.eigh(gram[1:, 1:])
    along = vectors.T @ gram[1:, 0]
    kept = values > _PRECISION * values.max()
    return float(1 - (along[kept] ** 2 / values[kept]).sum())
