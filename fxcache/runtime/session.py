"""One session a denoiser: its policy, its state, what it recorded."""

import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch

from fxcache.errors import OptionError
from fxcache.policy import Decision, Policy
from fxcache.report import Record, Report
from fxcache.runtime.state import BranchState, Direction, Slot, Verdict

log = logging.getLogger("fxcache")

#: How many evaluations a report goes back.
MAX_RECORDS = 10_000


class NewTrajectory(Exception):  # noqa: N818 - a signal between executor and shortcut
    """A new trajectory begins: its first evaluation must be called with all checks."""


LastCall = tuple[Any, Slot, tuple[Any, ...], Sequence[Any]]


class Session:
    """State and bookkeeping of one denoiser. What it measures and runs is the executor's matter."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.direction = Direction()
        self.slots: dict[Hashable, Slot] = {}
        self.records: deque[Record] = deque(maxlen=MAX_RECORDS)
        self.evaluations = 0
        #: How many steps a trajectory has whose number of steps nobody announced, if it is known.
        self.expected_steps: int | None = None
        self.graphs = 0
        self.recompiles = 0
        #: The caller's time input, for graphs that do not show it: a tensor, a number or None.
        self.given_timestep: ContextVar[Any] = ContextVar("fxcache_timestep", default=None)
        #: Whether the caller skipped the checks that a trajectory begins with.
        self.trusts_trajectory: ContextVar[bool] = ContextVar("fxcache_trusts", default=False)
        #: The last evaluation of this thread: executor, slot, flat inputs and outputs.
        self.last_call: ContextVar[LastCall | None] = ContextVar("fxcache_call", default=None)
        self.keeps_calls = False
        #: Told of every evaluation: slot, state, metric (NaN: none) and outputs.
        self.observe: Callable[[Slot, BranchState, float, Sequence[Any]], None] | None = None
        #: The share of the graph's FLOPs that a hit skips, 0 to 1; known once it was rewritten.
        self.skipped_share = 0.0
        self._warned: set[str] = set()
        # A ContextVar, so that threads and coroutines that serve other requests do not mix.
        self._where: ContextVar[tuple[Hashable, Hashable]] = ContextVar(
            "fxcache_where", default=(None, None)
        )

    # --- where an evaluation belongs ---

    @property
    def where(self) -> tuple[Hashable, Hashable]:
        """The caller's slot and branch, by name."""
        return self._where.get()

    @property
    def slot(self) -> Slot:
        """The slot of the caller."""
        key = self._where.get()[0]
        slot = self.slots.get(key)
        if slot is None:
            slot = self.slots[key] = Slot(num_steps=self.expected_steps)
        return slot

    @contextmanager
    def inside(self, **where: Hashable) -> Iterator[None]:
        """Name the slot or the branch of the evaluations inside."""
        slot, branch = self._where.get()
        token = self._where.set((where.get("slot", slot), where.get("branch", branch)))
        try:
            yield
        finally:
            self._where.reset(token)

    @contextmanager
    def trajectory(self, num_steps: int | None, first_step: int = 0) -> Iterator[None]:
        """Announce a trajectory: it starts clean, and nothing of it is left afterwards."""
        if num_steps is not None and (not isinstance(num_steps, int) or num_steps < 1):
            raise OptionError(f"num_steps must be a positive integer or None, got {num_steps!r}")
        if not isinstance(first_step, int) or not 0 <= first_step < (num_steps or math.inf):
            raise OptionError(
                f"first_step must be an integer in [0, num_steps), got {first_step!r} with "
                f"num_steps={num_steps!r}"
            )
        key, slot = self._where.get()[0], self.slot
        self.begin(slot, announced=True, num_steps=num_steps, first_step=first_step)
        try:
            yield
        finally:
            self.begin(slot)
            if key is not None:  # a request is over, and its name will not come back
                self.slots.pop(key, None)

    def begin(self, slot: Slot, **announcement: Any) -> None:
        """Start a new trajectory in `slot`; of the last one, say what is worth saying."""
        self._conclude(slot)
        slot.begin(**{"num_steps": self.expected_steps, **announcement})

    def _conclude(self, slot: Slot, *, is_over: bool = True) -> None:
        """Say once if the policy never hit in any branch, or always in all (unless that is wanted:
        to observe).
        """
        if "hits" in self._warned or self.observe is not None:
            return
        watches = {
            branch: state.watch
            for branch, state in slot.branches.items()
            if (is_over or state.watch.is_judged) and state.watch.verdict(self.policy) is not None
        }
        if len({watch.verdict(self.policy) for watch in watches.values()}) == 1:
            branch, watch = next(iter(watches.items()))
            if complaint := watch.complaint(self.policy, slot.num_steps, branch):
                self.say_once("hits", complaint)

    def state(self) -> tuple[Slot, BranchState]:
        """The caller's slot and the state of the caller's branch in it."""
        slot = self.slot
        return slot, slot.branch(self._where.get()[1])

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.slots.clear()
        self.records.clear()
        self.direction = Direction()

    # --- one evaluation ---

    def decide(
        self, slot: Slot, state: BranchState, metric: float, timestep: float | None
    ) -> Decision:
        """Place the evaluation in its trajectory (or a new one) and ask the policy.

        Raises NewTrajectory if one begins and the caller trusted that it does not.
        """
        if timestep is None:
            timestep = self.number_of(self.given_timestep.get(), slot)
        if not slot.is_announced:
            self._recognise(slot, state, timestep)
        slot.advance(state, timestep, self.direction.rising)
        decision = self._verdict(slot, state, metric)
        noted = metric if self.is_measured(state) else math.nan
        state.watch.note(noted, decision, self.policy)
        return decision

    def is_measured(self, state: BranchState) -> bool:
        """Whether the metric means anything: it was compared with this trajectory's own steps."""
        probe = self.policy.probe
        return probe is not None and state.computed >= probe.needs

    def _verdict(self, slot: Slot, state: BranchState, metric: float) -> Decision:
        """What the policy says, or what it said to the first branch of this step."""
        branch, verdict = self._where.get()[1], slot.verdict
        is_led = verdict is not None and verdict.branch != branch and verdict.step == state.step
        if self.policy.decide == "first" and is_led:
            assert verdict is not None
            if not state.past:
                return Decision(False, "nothing cached")
            if self.policy.probe is not None and not math.isfinite(metric):
                return Decision(False, "not finite")
            return Decision(verdict.is_hit, None if verdict.is_hit else "the first branch computed")
        decision = self.policy.rule(metric, state.history(slot.num_steps, branch))
        slot.verdict = Verdict(branch, state.step, decision.is_hit)
        return decision

    def _recognise(self, slot: Slot, state: BranchState, timestep: float | None) -> None:
        """Begin a new trajectory if `timestep` says so; nobody announced one."""
        trusted = self.trusts_trajectory.get()
        if timestep is None:
            self.say_once(
                "timestep",
                "this model shows no time input: new trajectories are recognised by their shapes "
                "only. Announce them: with denoiser.trajectory()",
            )
        elif self.direction.turns_back(state, timestep):
            self.begin(slot)
        elif timestep == state.timestep:
            if self.where[1] is None:
                self.say_once(
                    "repeat",
                    "two evaluations at the same timestep in one branch: if they are the branches "
                    "of classifier-free guidance, name them with denoiser.branch(...)",
                )
        else:
            return
        if trusted:  # a new trajectory, or what may be one
            raise NewTrajectory

    def number_of(self, timestep: Any, slot: Slot) -> float | None:
        """A time input as one number (the largest of a batch), None if it is not known.

        A tensor on a GPU costs a read-back, so it is looked at only to recognise a trajectory that
        was not announced.
        """
        if not isinstance(timestep, torch.Tensor):
            return float(timestep) if isinstance(timestep, int | float) else None
        if not timestep.numel() or (slot.is_announced and timestep.device.type != "cpu"):
            return None
        return float(timestep.max())

    def record(
        self, slot: Slot, state: BranchState, metric: float | None, decision: Decision
    ) -> None:
        """Note what was decided."""
        key, branch = self._where.get()
        self.records.append(
            Record(
                state.step,
                branch,
                state.timestep,
                metric,
                decision.is_hit,
                decision.reason,
                slot.trajectory,
                key,
            )
        )

    def note_call(self, *call: Any) -> None:
        """Remember an evaluation (a `LastCall`) for somebody who learns how to repeat it."""
        if self.keeps_calls:
            self.last_call.set(cast(LastCall, call))

    def say_once(self, key: str, message: str) -> None:
        """Log a warning the first time that `key` comes up."""
        if key not in self._warned:
            self._warned.add(key)
            log.warning(message)

    def report(self) -> Report:
        """Everything noted since the start or the last reset."""
        for slot in self.slots.values():
            if not slot.is_announced:  # probably over; of an announced one the end will be known
                self._conclude(slot, is_over=False)
        cached = sum(slot.nbytes for slot in self.slots.values())
        return Report(tuple(self.records), cached, self.graphs, self.recompiles)
