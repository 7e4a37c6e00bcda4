"""One session a denoiser: its policy, its state, what it recorded."""

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import torch

from fxcache.errors import OptionError
from fxcache.policy import Decision, Policy
from fxcache.policy.fitted import Fitted
from fxcache.report import Record, Report
from fxcache.runtime.advice import Advice
from fxcache.runtime.clock import Clock, Place, Timeline
from fxcache.runtime.noise import Exam
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
        #: What knows where the sampler is (a pipeline's scheduler).
        self.clock: Clock | None = None
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
        #: What the audits gave, one a capture.
        self.audits: list[float] = []
        #: Compares forecasts during the first trajectory, then says what it found (None: nothing).
        self.advice: Advice | None = self._new_advice()
        self.advised: str | None = None
        #: The step of the evaluation, if the clock says it.
        self._step: ContextVar[int | None] = ContextVar("fxcache_step", default=None)
        self._warned: set[str] = set()
        self._is_examined = self.policy.probe is None
        # A ContextVar, so that threads and coroutines that serve other requests do not mix.
        self._where: ContextVar[tuple[Hashable, Hashable]] = ContextVar(
            "fxcache_where", default=(None, None)
        )

    @property
    def may_hit(self) -> bool:
        """Whether the policy could ever hit, as far as its threshold says."""
        return getattr(self.policy, "threshold", math.inf) != 0 and not self.observe

    def _new_advice(self) -> Advice | None:
        """None for what was fitted to its steps already, and for what never forecasts."""
        forecast = self.policy.forecast
        return None if isinstance(forecast, Fitted) or not self.may_hit else Advice(forecast)

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
    def placed(self, timestep: Any) -> Iterator[None]:
        """Inside, the evaluation at `timestep` (the caller's time input) is where the clock says:
        in a new trajectory if one begins, at its step, and in a branch of its own if the step had
        one of that name.
        """
        (name, branch), slot = self._where.get(), self.slot
        place = self._place(slot, branch, timestep)
        if place is None:
            yield
            return
        where, step = self._where.set((name, place.branch)), self._step.set(place.step)
        try:
            yield
        finally:
            self._where.reset(where)
            self._step.reset(step)
        if slot.timeline is not None:
            slot.timeline.called(branch)

    def _place(self, slot: Slot, branch: Hashable, timestep: Any) -> Place | None:
        reading = None if self.clock is None or slot.is_announced else self.clock.read()
        if reading is None:
            return None
        timeline = slot.timeline
        if timeline is None or not timeline.goes_on(reading):
            timeline = Timeline(reading, timestep)
            steps = {"num_steps": timeline.num_steps, "first_step": timeline.first_step}
            self.begin(slot, **steps)
            slot.timeline = timeline
        was_stopped = timeline.has_stopped
        place = timeline.place(reading, branch, timestep)
        if timeline.has_stopped and not was_stopped:
            self.say_once(
                "clock",
                "the pipeline's scheduler does not move with the denoiser's calls: it is another "
                "sampler that calls it. Trajectories are recognised by their timesteps",
            )
            self.begin(slot)
        return place

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
        if self.advice is not None and self.records:  # the first trajectory is over
            self.advised, self.advice = self.advice.finding(), None
            if self.advised is not None:
                log.info(self.advised)
        slot.begin(**{"num_steps": self.expected_steps, **announcement})

    def _conclude(self, slot: Slot, *, is_over: bool = True) -> None:
        """Say once if the policy never hit in any branch, or always in all (unless that is wanted:
        to observe).
        """
        if self.observe is not None or ("hits" in self._warned and slot.exam is None):
            return
        watches = {
            branch: state.watch
            for branch, state in slot.branches.items()
            if (is_over or state.watch.is_judged) and state.watch.verdict(self.policy) is not None
        }
        verdicts = {branch: watch.verdict(self.policy) for branch, watch in watches.items()}
        kinds = set(verdicts.values())
        if len(kinds) == 1 or kinds == {"never", "control"}:
            branch = min(verdicts, key=lambda branch: verdicts[branch] != "control")
            if "hits" not in self._warned and (
                complaint := watches[branch].complaint(self.policy, slot.num_steps, branch)
            ):
                self.say_once("hits", complaint)
            finding = None if slot.exam is None else slot.exam.finding()
            if finding is not None and kinds == {"never"}:
                self.say_once("noise", f"{type(self.policy).__name__} does not hit: {finding}")

    def state(self) -> tuple[Slot, BranchState]:
        """The caller's slot and the state of the caller's branch in it."""
        slot = self.slot
        return slot, slot.branch(self._where.get()[1])

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.slots.clear()
        self.records.clear()
        self.direction = Direction()
        self.advice, self.advised = self._new_advice(), None

    # --- one evaluation ---

    def decide(
        self,
        slot: Slot,
        state: BranchState,
        metric: float,
        timestep: float | None,
        change: Callable[[], float | None] | None = None,
    ) -> Decision:
        """Place the evaluation in its trajectory (or a new one) and ask the policy.

        `change` gives the change of the conditioning if that forbids a hit. It is asked only where
        all else allows one.

        Raises NewTrajectory if one begins and the caller trusted that it does not.
        """
        if timestep is None:
            timestep = self.number_of(self.given_timestep.get(), slot)
        step = self._clocked(slot, timestep)
        if step is not None:
            state.step, state.timestep = step, timestep
        else:
            if not slot.is_known:
                self._recognise(slot, state, timestep)
            slot.advance(state, timestep, self.direction.rising)
        decision = self._verdict(slot, state, metric, change)
        noted = metric if self.is_measured(state) else math.nan
        state.watch.note(noted, decision, self.policy)
        return decision

    def _clocked(self, slot: Slot, timestep: float | None) -> int | None:
        """The step that the clock says, None if there is no clock, or it is another sampler's."""
        step, timeline = self._step.get(), slot.timeline
        if step is None or timeline is None or timestep is None or timeline.agrees(timestep):
            return step
        timeline.has_stopped = True
        self.begin(slot)
        if self.trusts_trajectory.get():
            raise NewTrajectory
        return None

    def is_measured(self, state: BranchState) -> bool:
        """Whether the metric means anything: it was compared with this trajectory's own steps."""
        probe = self.policy.probe
        return probe is not None and state.computed >= probe.needs

    def _verdict(
        self,
        slot: Slot,
        state: BranchState,
        metric: float,
        change: Callable[[], float | None] | None,
    ) -> Decision:
        """What the policy says, or what it said to the first branch of this step; a hit only if the
        conditioning allows it.
        """
        branch, first = self._where.get()[1], slot.verdict
        is_led = first is not None and first.branch != branch and first.step == state.step
        if self.policy.decide == "first" and first is not None and is_led:
            return self._unless_changed(self._led(first, state, metric), state, change)
        decision = self.policy.rule(metric, state.history(slot.num_steps, branch))
        if decision.reason == "nothing cached" and state.lost is not None:
            decision = replace(decision, reason=state.lost)
        decision = self._unless_changed(decision, state, change)
        slot.verdict = Verdict(branch, state.step, decision.is_hit)
        return decision

    def _led(self, first: Verdict, state: BranchState, metric: float) -> Decision:
        """What the first branch of this step said, if this one can follow."""
        if not state.past:
            return Decision(False, state.lost or "nothing cached")
        if self.policy.probe is not None and not math.isfinite(metric):
            return Decision(False, "not finite")
        return Decision(first.is_hit, None if first.is_hit else "the first branch computed")

    def _unless_changed(
        self,
        decision: Decision,
        state: BranchState,
        change: Callable[[], float | None] | None,
    ) -> Decision:
        """`decision`, or a miss where the conditioning changed too much since the last miss."""
        if not decision.is_hit or change is None or (by := change()) is None:
            return decision
        state.watch.forbidden(by)
        return Decision(False, "control changed", decision.score)

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
        if not timestep.numel() or (slot.is_known and timestep.device.type != "cpu"):
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

    def examine(
        self, slot: Slot, state: BranchState, sample: torch.Tensor, outputs: Sequence[Any]
    ) -> None:
        """Find out, once, whether it is the sampler's noise that keeps the policy from hitting."""
        branch = self._where.get()[1]
        if slot.exam is not None:
            if not slot.exam.is_over:
                slot.exam.look(branch, state.step, sample, outputs)
                self._is_examined = slot.exam.is_over
        elif state.watch.is_stuck and not (self._is_examined or self.observe):
            slot.exam = Exam(branch, state.step)

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
        cached = sum((slot.bytes_by_device for slot in self.slots.values()), Counter[str]())
        return Report(
            tuple(self.records),
            cached.total(),
            self.graphs,
            self.recompiles,
            dict(cached),
            max(self.audits, default=None),
            self.advised if self.advice is None else self.advice.finding(),
        )
