"""The step executor: begins an evaluation, decides on one read-back, runs hit or miss.

This is the host lowering of the branch: an `if` between two compiled regions. A step reads back
once, the metric and the timestep together; where the policy measures nothing, not at all.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from fxcache.policy import Decision
from fxcache.runtime.audit import Audit
from fxcache.runtime.conditions import Conditions
from fxcache.runtime.regions import Evaluation, Regions
from fxcache.runtime.session import NewTrajectory, Session
from fxcache.runtime.state import BranchState, Buffers, Signature, Slot
from fxcache.runtime.weights import Weights


class StepExecutor:
    """Callable in the place of a captured graph, with the graph's own inputs and outputs.

    Args:
        make_regions: what evaluates the graph for a slot, made anew for each set of buffers.
        data: the places of the caller's tensors among the inputs.
        has_numbers: whether some inputs are numbers.
        sample: the place of the noisy input (None: it is not known).
        timestep: the place of the time input (None: the graph has none).
        ring: how many past residuals a stream.
        signature: says which layout the inputs have; another layout is another trajectory.
        allocate: makes buffers for the layout of the inputs.
        weights: the graph's weights: residuals of others are forgotten.
        conditions: the conditioning inputs, if the policy wants them looked at.
        audit: tries what is cached before it is used.
        speculate: queue the hit before the decision is known.
    """

    def __init__(
        self,
        session: Session,
        make_regions: Callable[[Slot], Regions],
        *,
        data: Sequence[int],
        has_numbers: bool,
        sample: int | None,
        timestep: int | None,
        ring: int,
        signature: Callable[[Sequence[Any]], Signature],
        allocate: Callable[[Sequence[Any]], Buffers],
        weights: Weights,
        conditions: Conditions | None = None,
        audit: Audit | None = None,
        speculate: bool = False,
    ) -> None:
        self.session, self.make_regions = session, make_regions
        self.signature, self.allocate = signature, allocate
        self.weights, self.conditions, self.audit = weights, conditions, audit
        self.data, self.has_numbers = tuple(data), has_numbers
        self.sample, self.timestep, self.ring, self.speculate = sample, timestep, ring, speculate
        # By buffers and not in the state: recompiled graphs of one span share the state.
        self.regions: WeakKeyDictionary[Buffers, Regions] = WeakKeyDictionary()

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        session = self.session
        slot, state = session.state()
        try:
            signature = self.signature(inputs)
            if state.signature != signature:
                self._relaid(slot, state, signature)
                state.allocate(signature, lambda: self.allocate(inputs))
            evaluation = self._regions(slot, state.allocated).begin(inputs, state.allocated)
            self._check_weights(state, inputs)  # a GPU computes the head meanwhile
            guess = self._guess(state, evaluation)
            metric, timestep = self._measured(evaluation, inputs, slot)
            conditions = self.conditions
            change = None
            if conditions is not None:
                change = partial(conditions.forbidding, inputs, state.allocated)
            decision = session.decide(slot, state, metric, timestep, change)
            if decision.is_hit and self.audit is not None and self.audit.failed:
                decision = Decision(False, "audit", decision.score)
            measured = metric if session.is_measured(state) else None
            if decision.is_hit:
                outputs = self._hit(state, evaluation, guess)
            else:
                if conditions is not None:
                    conditions.keep(inputs, state.allocated)
                outputs = self._miss(state, evaluation, measured, inputs)
        except NewTrajectory:  # nothing was written, and the evaluation comes again
            raise
        except BaseException:
            state.forget()  # whatever was half written is never read
            raise
        self._commit(slot, state, measured, decision, outputs)
        if self.sample is not None:
            session.examine(slot, state, inputs[self.sample], outputs)
        if not session.trusts_trajectory.get():  # else nobody asks, and the tensors would live on
            session.note_call(self, slot, inputs, outputs)
        return outputs

    def _relaid(self, slot: Slot, state: BranchState, signature: Signature) -> None:
        """Another layout is another trajectory, unless somebody says when it ends. So is a control
        whose residuals came or went not, where the timestep tells trajectories apart.
        """
        if state.signature is None:
            return
        has_time = slot.is_known or state.timestep is not None
        if has_time and state.signature.is_same_solve(signature):
            state.lost = "control changed" if state.past else None
        elif not slot.is_known:
            self.session.begin(slot)

    def _check_weights(self, state: BranchState, inputs: Sequence[Any]) -> None:
        """Forget the residuals of other weights than these."""
        if state.past and not self.session.trusts_trajectory.get():
            state.stamp = self.weights.unchanged(state.stamp, inputs)
            if state.stamp is None:
                state.lose("weights changed")

    def _regions(self, slot: Slot, buffers: Buffers) -> Regions:
        regions = self.regions.get(buffers)
        if regions is None:
            regions = self.regions[buffers] = self.make_regions(slot)
        return regions

    def _measured(
        self, evaluation: Evaluation, inputs: Sequence[Any], slot: Slot
    ) -> tuple[float, float | None]:
        """The metric (NaN if nothing is measured) and the timestep (None if it is not known)."""
        if self.session.policy.probe is not None:
            metric, *timestep = evaluation.read()
            return metric, timestep[0] if timestep else None
        value = None if self.timestep is None else inputs[self.timestep]
        return math.nan, self.session.number_of(value, slot)

    def _guess(self, state: BranchState, evaluation: Evaluation) -> tuple[Any, Any] | None:
        """With `speculate`: the weights of a hit at the next step, and its outputs, queued.

        Not where a hit keeps the probe: the evaluation may have to be begun anew.
        """
        probe = self.session.policy.probe
        if not self.speculate or not state.past or probe is None or probe.reference == "previous":
            return None
        weights = self._weights(state, state.step + 1)
        return weights, evaluation.hit(weights)

    def _hit(
        self, state: BranchState, evaluation: Evaluation, guess: tuple[Any, Any] | None
    ) -> Sequence[Any]:
        weights = self._weights(state, state.step)
        if guess is not None and guess[0] == weights:
            outputs: Sequence[Any] = guess[1]
            return outputs
        return evaluation.hit(weights)

    def _miss(
        self,
        state: BranchState,
        evaluation: Evaluation,
        metric: float | None,
        inputs: Sequence[Any],
    ) -> Sequence[Any]:
        if metric is not None and not math.isfinite(metric):
            # Either this evaluation or the last computed one is broken: no forecast from the two.
            state.forget()
        if not state.past:
            state.stamp = self.weights.stamp(inputs)
        advice = None if self.session.observe else self.session.advice
        computed = advice.before_miss(state) if advice is not None else []
        at = state.oldest_slot()
        # While the piece writes, the slot's old residual is no longer one.
        state.past = [entry for entry in state.past if entry[1] != at]
        outputs = evaluation.miss(at)
        state.refreshed(at)
        if advice is not None:
            advice.after_miss(state, computed)
        if self.audit is not None and self.audit.q is None and self.session.may_hit:
            self.audit.run(tuple(inputs), outputs, state.allocated, at)
            if self.audit.q is not None:
                self.session.audits.append(self.audit.q)
        return outputs

    def _weights(self, state: BranchState, step: int) -> list[float]:
        """The forecast's weights by ring slot; 0 for a slot that holds nothing yet."""
        by_slot = [0.0] * self.ring
        weights = self.session.policy.forecast.weights(step, [at for at, _ in state.past])
        for (_, slot), weight in zip(state.past, weights, strict=True):
            by_slot[slot] = weight
        return by_slot

    def _commit(
        self,
        slot: Slot,
        state: BranchState,
        metric: float | None,
        decision: Decision,
        outputs: Sequence[Any],
    ) -> None:
        if decision.is_hit:
            state.reused(decision.score)
        self.session.record(slot, state, metric, decision)
        self.session.evaluations += 1
        if self.session.observe is not None:
            self.session.observe(slot, state, math.nan if metric is None else metric, outputs)
