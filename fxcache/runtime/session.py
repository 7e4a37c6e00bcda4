"""One session a denoiser: its policy, its slots, what it recorded."""

import itertools
import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from fxcache.policy import Decision, Policy
from fxcache.policy.base import pieces_of
from fxcache.policy.fitted import Fitted
from fxcache.policy.forecast import Corrected, Within, checked
from fxcache.policy.reasons import Reason
from fxcache.policy.verdict import verdict
from fxcache.report import Record, Report
from fxcache.runtime.advice import Advice
from fxcache.runtime.forecast_error import Error
from fxcache.runtime.state import BranchState, Slot, Slots, Verdict
from fxcache.runtime.steps import REPEATED, Call, Steps, Where, check_announcement, check_said

log = logging.getLogger("fxcache")

#: How many evaluations a report goes back.
MAX_RECORDS = 10_000


class Outdated(Exception):  # noqa: N818 - a signal between executor and shortcut
    """What was learned of the model does not hold any more, or a new trajectory begins, whose first
    evaluation must be called with all checks: the complete way must be taken.
    """


LastCall = tuple[Any, Slot, tuple[Any, ...], Sequence[Any]]


class Session:
    """State and bookkeeping of one denoiser. What it measures and runs is the executor's matter."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.steps = Steps(self.begin, self.say_once)
        self.steps.looks = getattr(policy, "control_threshold", None) is None
        self.slots = Slots()
        #: Of batches under CUDA graphs: what runs so many rows, and its memory.
        self.buckets: dict[Hashable, Any] = {}
        #: Each with what waits for the error of the forecast at that miss, if it was measured.
        self.records: deque[tuple[Record, Error | None]] = deque(maxlen=MAX_RECORDS)
        self.evaluations = 0
        #: The policy from the next trajectory on, and what captures the model for it.
        self.next_policy: Policy | None = None
        self.recapture: Callable[[], None] | None = None
        self.is_outdated = False
        #: How many steps a trajectory has whose number of steps nobody announced, if it is known.
        self.expected_steps: int | None = None
        self.graphs = 0
        self.recompiles = 0
        # A ContextVar, so that threads and coroutines that serve other requests do not mix.
        self._where: ContextVar[Where] = ContextVar("fxcache_where", default=Where())  # noqa: B039
        #: Buffers are part of CUDA graphs, and are kept from trajectory to trajectory.
        self.keeps_buffers = False
        #: The evaluation that this thread or coroutine is in.
        self.call: ContextVar[Call | None] = ContextVar("fxcache_call", default=None)
        #: Whether the caller skipped the checks that a trajectory begins with.
        self.trusts_trajectory: ContextVar[bool] = ContextVar("fxcache_trusts", default=False)
        #: Those of a batch, which it evaluates together.
        self.calls: ContextVar[list[Call] | None] = ContextVar("fxcache_calls", default=None)
        #: Asked once the device is busy: whether what was learned of the model still holds; and
        #: with True before a miss: whether the weights that only it reads are laid out as before.
        self.holds: ContextVar[Callable[[bool], bool] | None] = ContextVar(
            "fxcache_holds", default=None
        )
        #: The last evaluation of this thread: executor, slot, flat inputs and outputs.
        self.last_call: ContextVar[LastCall | None] = ContextVar("fxcache_last", default=None)
        #: Told of every evaluation: slot, state, metric (NaN: none) and outputs.
        self.observe: Callable[[Slot, BranchState, float, Sequence[Any]], None] | None = None
        #: The share of the graph's FLOPs that a hit skips, 0 to 1; known once it was rewritten.
        self.skipped_share = 0.0
        #: What the audits gave, one a capture.
        self.audits: list[float] = []
        #: Compares forecasts during the first trajectory, then says what it found (None: nothing).
        self.advice: Advice | None = self._new_advice()
        self.advised: str | None = None
        self._warned: set[str] = set()

    def may_hit(self, own: Policy | None = None) -> bool:
        """Whether the policy (a request's `own`) could ever hit, as far as its threshold says."""
        policy = own or self.policy
        limits = (getattr(policy, name, math.inf) for name in ("threshold", "tolerance"))
        return 0 not in limits and not self.observe

    def _new_advice(self) -> Advice | None:
        """None for what was fitted to its steps already, checks itself, or never hits."""
        forecast = self.policy.forecast
        has_own = isinstance(forecast, Fitted | Within | Corrected)
        return None if has_own or not self.may_hit() else Advice(forecast)

    # --- where an evaluation belongs ---

    @property
    def where(self) -> Where:
        """What the caller said of it."""
        return self._where.get()

    @property
    def slot(self) -> Slot:
        """The slot of the caller."""
        return self.slot_of(self._where.get())

    def slot_of(self, where: Where) -> Slot:
        """The slot of a caller who says this."""
        return self.slots.of(where.slot, where.requests or {}, self.expected_steps)

    @contextmanager
    def at(self, **said: Any) -> Iterator[None]:
        """What the caller says of the evaluations inside: see `Where`."""
        check_said(said, self.policy)
        if "slot" in said:  # one request, and not those of a batch around it
            said["requests"] = None
        token = self._where.set(replace(self._where.get(), **said))
        try:
            yield
        finally:
            self._where.reset(token)
            for key in said.get("requests") or [said.get("slot")]:
                slot = None if key is None else self.slots.get(key)
                if slot is not None and slot.is_over and not slot.is_announced:
                    self.begin(slot)  # its solve is over: the request will not come back
                    self.slots.release(key)

    @contextmanager
    def settled(
        self, inputs: Mapping[str, Any], timestep: Any, where: Where | None = None
    ) -> Iterator[Call]:
        """Inside, an evaluation of `inputs` (by name) is where `Steps` says it belongs, for the
        caller or another who says `where`.
        """
        where, me = where or self.where, threading.get_ident()
        slot = self.slot_of(where)
        if slot.thread not in (None, me):
            self.say_once(
                "threads",
                "two threads evaluate at the same time in one slot, and share its state: name "
                "their requests with denoiser.slot(...)",
            )
        slot.thread = me
        call = self.steps.settle(slot, where, inputs, timestep)
        token = self.call.set(call)
        try:
            yield call
        finally:
            slot.thread = None
            self.call.reset(token)

    @contextmanager
    def trajectory(
        self, num_steps: int | None, first_step: int = 0, slot: Hashable = None
    ) -> Iterator[None]:
        """Announce a trajectory: it starts clean, and nothing of it is left afterwards."""
        check_announcement(num_steps, first_step)
        where = self.where if slot is None else replace(self.where, slot=slot)
        key, held = where.slot, self.slot_of(where)
        self.begin(held, announced=True, num_steps=num_steps, first_step=first_step)
        try:
            yield
        finally:
            self.begin(held)
            if not self.keeps_buffers:
                held.release()
            if key is not None:  # a request is over, and its name will not come back
                self.slots.release(key)

    def begin(self, slot: Slot, **announcement: Any) -> None:
        """Start a new trajectory in `slot`; of the last one, say what is worth saying."""
        self._conclude(slot)
        if self.advice is not None and self.records:  # the first trajectory is over
            self.advised, self.advice = self.advice.finding(), None
            if self.advised is not None:
                log.info(self.advised)
        if self.next_policy is not None:
            self._adopt(self.next_policy)
        timeline = slot.timeline
        listed = None if timeline is None or timeline.has_stopped else timeline.num_steps
        slot.begin(**{"num_steps": listed or self.expected_steps, **announcement})

    def follow(self, policy: Policy) -> None:
        """Follow `policy` from the next trajectory on: at once, if none is going on."""
        self.next_policy = policy
        if not any(slot.is_running for slot in list(self.slots.values())):
            self._adopt(policy)

    def _adopt(self, policy: Policy) -> None:
        """Follow `policy`. Where it needs other pieces, every branch begins anew."""
        needs_capture = pieces_of(policy) != pieces_of(self.policy)
        self.policy, self.next_policy = policy, None
        self.steps.looks = getattr(policy, "control_threshold", None) is None
        self.advice, self.advised = self._new_advice(), None
        self._warned.discard("hits")
        for slot in self.slots.values():
            for state in slot.branches.values():
                state.lose_to(Reason.POLICY_CHANGED)
                if needs_capture:
                    state.release()
        if needs_capture:
            self.is_outdated = True
            if self.recapture is not None:
                self.recapture()

    def _conclude(self, slot: Slot) -> None:
        """Say once if the policy never hit, or always, in a trajectory (but not to an observer)."""
        if self.observe is not None or "hits" in self._warned:
            return
        branches: dict[Hashable, list[Any]] = {}
        for record, _ in list(self.records):  # other threads may add to them
            if record.trajectory == slot.trajectory:
                branches.setdefault(record.branch, []).append(record)
        message = verdict(self.policy, branches, slot.num_steps) if branches else None
        if message is not None:
            self.say_once("hits", message)

    def reset(self, *, records: bool = True) -> None:
        """Forget everything (without `records`, all but what was recorded) and free the memory."""
        self.slots.clear()
        self.buckets.clear()
        if self.next_policy is not None:
            self._adopt(self.next_policy)
        if records:
            self.slots.numbers = itertools.count()
            self.records.clear()
            self.advice, self.advised = self._new_advice(), None
        self.steps.rising = False

    # --- one evaluation ---

    def completed(self, call: Call, timestep: float | None) -> Call:
        """`call` with its step, which a timestep read from a GPU may tell.

        Raises Outdated if a trajectory begins and the caller trusted that none does.
        """
        self.is_outdated = False
        call, is_new = self.steps.complete(call, timestep)
        if self.call.get() is not None:  # whoever comes again for this evaluation counts no step
            self.call.set(call)
        if is_new and (self.trusts_trajectory.get() or self.is_outdated):
            raise Outdated
        return call

    def decide(
        self,
        call: Call,
        metric: float,
        change: Callable[[], float | None] | None,
        agreed: Callable[[Decision], Decision],
    ) -> Decision:
        """Ask the policy, or what it said to the first branch of this step.

        `change` gives the change of the conditioning if that forbids a hit. It is asked only where
        all else allows one, by all ranks or none: `agreed` makes of this rank's decision theirs.
        """
        slot, state, first = call.slot, call.state, call.slot.verdict
        policy = call.where.policy or self.policy
        is_second = first.step == state.step and first.branch != state.label
        follows = policy.decide == "first" and is_second
        if not follows:
            decision = policy.rule(metric, state.history(slot.num_steps))
        elif not state.past:
            decision = Decision(False, Reason.NOTHING_CACHED)
        elif policy.probe is not None and not math.isfinite(metric):
            decision = Decision(False, Reason.NOT_FINITE)
        else:
            decision = Decision(first.is_hit, None if first.is_hit else Reason.FIRST_COMPUTED)
        if decision.reason == Reason.NOTHING_CACHED and state.lost is not None:
            decision = replace(decision, reason=state.lost)
        decision = agreed(decision)
        if decision.is_hit and change is not None:
            by = change()
            decision = decision if by is None else Decision(False, Reason.CONTROL_CHANGED, by)
            decision = agreed(decision)
        if not follows:
            slot.verdict = Verdict(state.label, state.step, decision.is_hit)
        return decision

    def record(self, call: Call, metric: float | None, decision: Decision) -> None:
        """Note what was decided."""
        self.evaluations += 1
        state = call.state
        if call.is_repeat and call.where.branch is None:
            self.say_once("repeat", REPEATED)
        is_predicted = checked(self.policy) and decision.reason != Reason.CONTROL_CHANGED
        record = Record(
            state.step,
            state.label,
            state.timestep,
            metric,
            decision.is_hit,
            decision.reason,
            call.slot.trajectory,
            call.where.slot,
            score=decision.score,
            predicted=(decision.score or None) if is_predicted else None,
        )
        self.records.append((record, None if decision.is_hit else state.error))

    def say_once(self, key: str, message: str) -> None:
        """Log a warning the first time that `key` comes up."""
        if key not in self._warned:
            self._warned.add(key)
            log.warning(message)

    def report(self) -> Report:
        """Everything noted since the start or the last reset."""
        for slot in list(self.slots.values()):
            if not slot.is_announced:  # probably over; of an announced one the end will be known
                self._conclude(slot)
        cached = sum((s.bytes_by_device for s in list(self.slots.values())), Counter[str]())
        records = [
            record if error is None else replace(record, error=error().value)
            for record, error in tuple(self.records)  # others may evaluate meanwhile
        ]
        return Report(
            tuple(records),
            cached.total(),
            self.graphs,
            self.recompiles,
            dict(cached),
            max(self.audits, default=None),
            self.advised if self.advice is None else self.advice.finding(),
        )
