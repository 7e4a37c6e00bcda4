"""Ranks that must decide alike: those that compute one sample together, and those that vote."""

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed

from fxcache.errors import RanksDifferError
from fxcache.policy import Decision
from fxcache.policy.reasons import Reason


class Ranks:
    """With whom this rank decides.

    With ``FXCACHE_CHECK_RANKS=1`` in the environment, every decision is gathered and compared,
    which costs two collectives an evaluation and shows where ranks part that would hang.

    Args:
        together: the process groups whose ranks compute the graph together.
        vote: the process group whose ranks hit only if all of them do (None: nobody votes).
        device: where the vote's collective runs.
    """

    def __init__(
        self, together: Iterable[Any], vote: Any = None, device: torch.device | None = None
    ) -> None:
        self.vote, self.device = vote, device
        checks = os.environ.get("FXCACHE_CHECK_RANKS") == "1"
        self.compared = [*together, *([] if vote is None else [vote])] if checks else []

    def agreed(self, decision: Decision) -> Decision:
        """`decision`, or a miss where a rank that votes computes. One collective and read-back."""
        if self.vote is None:
            return decision
        hits = torch.tensor([float(decision.is_hit)], device=self.device)
        distributed.all_reduce(hits, distributed.ReduceOp.MIN, self.vote)
        if hits.item() == decision.is_hit:
            return decision
        return Decision(False, Reason.OTHER_RANK, decision.score)

    def compare(self, step: int, branch: Any, metric: float, decision: Decision) -> None:
        """Raise RanksDifferError, on all ranks, if one of them decided otherwise or elsewhere
        (those that vote may be at other steps and branches).
        """
        own = (step, branch, decision.is_hit, metric, decision.reason)
        for group in self.compared:
            gathered: list[Any] = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(gathered, own, group)
            alike = slice(0, 3) if self.vote is None else slice(2, 3)
            if any(other[alike] != own[alike] for other in gathered):
                ranks = distributed.get_process_group_ranks(group)
                said = (_said(rank, *one) for rank, one in zip(ranks, gathered, strict=True))
                raise RanksDifferError(
                    "the ranks of a process group decided differently: " + "; ".join(said)
                )


def _said(rank: int, step: int, branch: Any, is_hit: bool, metric: float, reason: Any) -> str:
    measured = "" if math.isnan(metric) else f", metric {metric:.6g}"
    why = "" if reason is None else f" ({reason})"
    what = "hit" if is_hit else f"miss{why}"
    return f"rank {rank} at step {step} of branch {branch!r}: {what}{measured}"
