"""The step executor: begins an evaluation, decides on one read-back, runs hit or miss.

This is the host lowering of the branch: an `if` between two compiled regions. A step reads back
once, the metric and the timestep together; where the policy measures nothing, not at all.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from fxcache.policy import Decision
from fxcache.policy.forecast import Corrected, checked
from fxcache.policy.reasons import Reason
from fxcache.runtime.audit import Audit
from fxcache.runtime.conditions import Conditions
from fxcache.runtime.forecast_error import begin_error, by_entry, compared_with
from fxcache.runtime.freshness import Stamp, Weights
from fxcache.runtime.ranks import Ranks
from fxcache.runtime.regions import Begins, Evaluation, Missed
from fxcache.runtime.session import Outdated, Session
from fxcache.runtime.state import BranchState, Buffers, Signature, Slot
from fxcache.runtime.steps import Call, number_of


class Read(NamedTuple):
    """What an evaluation asks for: what its head measured."""

    def __call__(self, evaluation: Evaluation) -> list[float]:
        return evaluation.read()


class Hit(NamedTuple):
    """A hit, with these weights of the forecast by ring slot."""

    weights: Sequence[float]

    def __call__(self, evaluation: Evaluation) -> Sequence[Any]:
        return evaluation.hit(self.weights)


class Miss(NamedTuple):
    """A miss that writes ring slot `slot`; the weights are those of what it is compared with."""

    slot: int
    weights: Sequence[float] = ()

    def __call__(self, evaluation: Evaluation) -> Missed:
        return evaluation.miss(self.slot, self.weights)


Work = Read | Hit | Miss
Steps = Generator[Work, Any, Sequence[Any]]


@dataclass(eq=False, repr=False)
class StepExecutor:
    """Callable in the place of a captured graph, with the graph's own inputs and outputs.

    Args:
        make_regions: what evaluates the graph for a slot, made anew for each set of buffers.
        data: the places of the caller's tensors among the inputs, and their names.
        has_numbers: whether some inputs are numbers.
        timestep: the place of the time input (None: the graph has none).
        ring: how many past residuals a stream.
        signature: says which layout the inputs have; another layout is another trajectory.
        allocate: makes buffers for the layout of the inputs.
        weights: the graph's weights: residuals of others are forgotten.
        ranks: who decides with this one.
        conditions: the conditioning inputs, if the policy wants them looked at.
        audit: tries what is cached before it is used.
        groups: process groups whose ranks compute the graph together, and so share what they
            measure.
        is_all: a call of the model does nothing but run this graph.
    """

    session: Session
    make_regions: Callable[[Slot], Begins]
    data: Mapping[int, str]
    has_numbers: bool
    timestep: int | None
    ring: int
    signature: Callable[[Sequence[Any]], Signature]
    allocate: Callable[[Sequence[Any]], Buffers]
    weights: Weights
    ranks: Ranks
    conditions: Conditions | None = None
    audit: Audit | None = None
    groups: Sequence[str] = ()
    is_all: bool = False
    # By buffers and not in the state: recompiled graphs of one span share the state.
    regions: WeakKeyDictionary[Buffers, Begins] = field(default_factory=WeakKeyDictionary)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        session = self.session
        call = session.call.get() or self._settled(inputs)
        slot, state = call.slot, call.state
        try:
            self.prepare(state, inputs)
            buffers = state.allocated
            regions = self.regions.get(buffers)
            if regions is None:
                regions = self.regions[buffers] = self.make_regions(slot)
            evaluation = regions.begin(inputs, buffers)
            steps = self.steps(call, inputs, self.weights.now(inputs))
            outputs = _driven(steps, evaluation)
        except Outdated:  # nothing was written, and the evaluation comes again
            raise
        except BaseException:
            state.forget()  # whatever was half written is never read
            raise
        if session.call.get() is not None:  # else nobody asks, and the tensors would live on
            session.last_call.set((self, slot, inputs, outputs))
        return outputs

    def prepare(self, state: BranchState, inputs: Sequence[Any]) -> None:
        """Give `state` buffers for the layout of the inputs, if it has others."""
        signature = self.signature(inputs)
        if state.signature != signature:
            if state.past and state.signature is not None:
                state.lost = Reason.CONTROL_CHANGED
            state.release()  # before the new memory is asked for
            state.buffers, state.signature = self.allocate(inputs), signature

    def steps(self, call: Call, inputs: Sequence[Any], current: Callable[[], Stamp]) -> Steps:
        """One evaluation whose head was begun: asks for what is to be run, one after the other, and
        ends with the outputs. Who runs it may run it together with that of others. `current` gives
        the stamp of the weights.
        """
        session, conditions, state = self.session, self.conditions, call.state
        probe = session.policy.probe
        # Checked while a GPU computes the head or, where nothing is measured, the hit.
        checks_late = probe is None
        if not checks_late:
            self._check(state, inputs, current)
        read = [] if checks_late else (yield Read())
        metric, call = self._placed(call, read, inputs)
        change = None
        if conditions is not None:
            change = partial(conditions.forbidding, inputs, state.allocated)
        decision = session.decide(call, metric, change, self._agreed)
        self.ranks.compare(state.step, state.label, metric, decision)
        # It means something where it was compared with this trajectory's own steps.
        is_measured = probe is not None and state.computed >= probe.needs
        measured = metric if is_measured else None
        outputs: Sequence[Any] = ()
        if decision.is_hit:
            past, forecast = [step for step, _ in state.past], session.policy.forecast
            if isinstance(forecast, Corrected):
                weights = forecast.correct(state.step, past, state.hits)
            else:
                weights = forecast.weights(state.step, past)
            outputs = yield Hit(by_entry(state.past, weights, self.ring))
        if checks_late and self._check(state, inputs, current) and decision.is_hit:
            decision = Decision(False, state.lost, decision.score)
        if checks_late:
            self.ranks.compare(state.step, state.label, metric, decision)
        if not decision.is_hit:
            holds = session.holds.get()
            if holds is not None and not holds(True):
                raise Outdated
            if conditions is not None:
                conditions.keep(inputs, state.allocated)
            outputs = yield from self._miss(call, measured, inputs, current)
        else:
            state.reused(decision.score)
        session.record(call, measured, decision)
        if session.observe is not None:
            session.observe(call.slot, state, math.nan if measured is None else measured, outputs)
        return outputs

    def _agreed(self, decision: Decision) -> Decision:
        """`decision`, or the miss that the audit or another rank makes of it."""
        if decision.is_hit and self.audit is not None and self.audit.failed:
            decision = Decision(False, Reason.AUDIT, decision.score)
        return self.ranks.agreed(decision)

    def _settled(self, inputs: Sequence[Any]) -> Call:
        """The place of a call that came from no denoiser: a graph of the registered backend."""
        session = self.session
        given = {name: inputs[place] for place, name in self.data.items()}
        time = None if self.timestep is None else inputs[self.timestep]
        session.steps.knows_time = True
        return session.steps.settle(session.slot, session.where, given, time)

    def _check(
        self, state: BranchState, inputs: Sequence[Any], current: Callable[[], Stamp]
    ) -> bool:
        """Forget the residuals of other weights than these; whether they were others.

        Raises Outdated if the caller came past Dynamo, and what was learned does not hold.
        """
        session = self.session
        holds = session.holds.get()
        if holds is not None and not holds(False):
            raise Outdated
        if not state.past or session.trusts_trajectory.get():
            return False
        are_same = holds is not None
        state.stamp, reason = self.weights.check(state.stamp, inputs, current, are_same=are_same)
        if reason is not None:
            state.lose(reason)
        return reason is not None

    def _placed(
        self, call: Call, read: Sequence[float], inputs: Sequence[Any]
    ) -> tuple[float, Call]:
        """The metric (NaN if nothing was read), and the call with its step."""
        metric, *times = read or (math.nan,)
        if call.step is not None:
            return metric, call
        value = None if self.timestep is None else inputs[self.timestep]
        time = times[0] if times else number_of(value)
        if time is None and isinstance(value, torch.Tensor) and not call.slot.is_announced:
            time = float(value.max()) if value.numel() else None  # a read-back of a GPU
        return metric, self.session.completed(call, time)

    def _miss(
        self,
        call: Call,
        metric: float | None,
        inputs: Sequence[Any],
        current: Callable[[], Stamp],
    ) -> Steps:
        state = call.state
        if metric is not None and not math.isfinite(metric):
            # Either this evaluation or the last computed one is broken: no forecast from the two.
            state.forget()
        if not state.past:
            state.stamp = current()
        advice = None if self.session.observe else self.session.advice
        computed = advice.before_miss(state) if advice is not None else []
        at = state.oldest_slot()
        nodes, weights = compared_with(state, checked(self.session.policy), at)
        # While the piece writes, the slot's old residual is no longer one.
        state.past = [entry for entry in state.past if entry[1] != at]
        outputs: Sequence[Any]
        outputs, sums = yield Miss(at, weights)
        state.refreshed(at)
        state.error = begin_error(state.step, nodes, sums, self.groups)
        if advice is not None:
            advice.after_miss(state, computed)
        if (
            self.audit is not None
            and self.audit.q is None
            and self.session.may_hit(call.where.policy)
        ):
            self.audit.run(tuple(inputs), outputs, state.allocated, at)
            if self.audit.q is not None:
                self.session.audits.append(self.audit.q)
        return outputs


def _driven(steps: Steps, evaluation: Evaluation) -> Sequence[Any]:
    """The outputs of an evaluation that is run by itself."""
    reply = None
    while True:
        try:
            work = steps.send(reply)
        except StopIteration as end:
            outputs: Sequence[Any] = end.value
            return outputs
        reply = work(evaluation)
