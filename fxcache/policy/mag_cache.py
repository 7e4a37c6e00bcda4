"""MagCache: skip while a table says that the residual's magnitude hardly changed."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from fxcache.errors import PolicyError
from fxcache.policy.base import Decision, History
from fxcache.policy.checks import check_integer, check_number, checked_numbers
from fxcache.policy.named import NamedPolicy, compared
from fxcache.policy.reasons import Reason

Table = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class MagCache(NamedPolicy):
    """Reuse the stack's residual while calibrated magnitude ratios promise a small error.

    Nothing is measured: the ratio gamma_t of step t, mean over tokens of ``|r_t| / |r_(t-1)|``, was
    calibrated once for the model. After a computed step s the error is
    ``E = sum over i = s+1..t of |1 - gamma_(s+1) * ... * gamma_i|``. Source: MagCache (arXiv
    2506.09045); limits as in diffusers' hook.

    Args:
        ratios: one a step, or by branch: ``{"cond": [...], "uncond": [...]}`` (a branch that is
            not in it takes "cond", or else the first). Index 0 is the first step's, 1.0 by
            convention. For another number of steps than the table's, announce
            ``denoiser.trajectory(num_steps=...)``: it is resampled (nearest step, branch by
            branch). Steps beyond it are computed. As with `StepSchedule`, on a GPU every evaluation
            of a branch counts as a step inside an announced trajectory.
        threshold: a hit needs an error below this, in [0, inf]. 0 never hits.
        retention_ratio: this fraction of the steps, rounded, is computed at the start. In [0, 1].
        max_consecutive_hits: at most so many hits in a row (the paper's K).
        forecast, decide, control_threshold, origin: see `NamedPolicy`.

    Raises:
        PolicyError: for a value outside its range, or tables that differ in length.
    """

    ratios: Sequence[float] | Mapping[str, Sequence[float]] = field(hash=False)
    threshold: float = 0.06
    retention_ratio: float = 0.2
    max_consecutive_hits: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ratios", _checked_tables(self.ratios))
        check_number("threshold", self.threshold, "[0, inf]")
        check_number("retention_ratio", self.retention_ratio, "[0, 1]")
        check_integer("max_consecutive_hits", self.max_consecutive_hits, 0)

    def table(self, num_steps: int | None, branch: Hashable = None) -> Table:
        """The ratios of `branch` for `num_steps` steps (None: as many as the table has)."""
        ratios: Any = self.ratios
        if isinstance(ratios, Mapping):
            default = ratios.get("cond", next(iter(ratios.values())))
            ratios = ratios.get(branch, ratios.get(str(branch), default))
        return ratios if num_steps is None else resampled(ratios, num_steps)

    def rule(self, metric: float, history: History) -> Decision:
        """Hit if the error that the table predicts and every limit allow it."""
        if not history.past:
            return Decision(False, Reason.NOTHING_CACHED)
        table = self.table(history.num_steps, history.branch)
        if history.step >= len(table):
            return Decision(False, Reason.BEYOND_TABLE)
        if history.step < int(self.retention_ratio * len(table) + 0.5):
            return Decision(False, Reason.WARM_UP)
        if history.hits_in_a_row >= self.max_consecutive_hits:
            return Decision(False, Reason.MAX_CONSECUTIVE_HITS)
        ratio, error = 1.0, 0.0  # what reusing the newest residual has gathered up to this step
        for gamma in table[history.past[0] + 1 : history.step + 1]:
            ratio *= gamma
            error += abs(1 - ratio)
        return compared(error, error, self.threshold)


@lru_cache(maxsize=256)
def resampled(table: Table, num_steps: int) -> Table:
    """`table` at `num_steps` steps: of each the nearest step's value, the ends kept.

    Source: MagCache's scripts (``round(arange(T) * (S - 1) / (T - 1))``, halves to even).
    """
    if num_steps == 1:
        return table[-1:]
    scale = (len(table) - 1) / (num_steps - 1)
    return tuple(table[round(step * scale)] for step in range(num_steps))


def _checked_tables(ratios: Any) -> Any:
    """`ratios` as tuples (by branch in a copy of the mapping), each of positive numbers."""
    if not isinstance(ratios, Mapping):
        return _checked_table("ratios", ratios)
    if not ratios:
        raise PolicyError("ratios must hold a table for one branch at least, got an empty mapping")
    tables = {name: _checked_table(f"ratios[{name!r}]", own) for name, own in ratios.items()}
    lengths = {name: len(table) for name, table in tables.items()}
    if len(set(lengths.values())) > 1:
        raise PolicyError(f"ratios must have one length in all branches, got {lengths}")
    return tables


def _checked_table(name: str, ratios: Any) -> Table:
    table = checked_numbers(name, ratios, "(0, inf)")
    if len(table) < 2:
        raise PolicyError(f"{name} must hold one ratio a step, at least 2, got {len(table)}")
    return table
