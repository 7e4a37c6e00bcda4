"""Where an evaluation belongs: slot, branch, step and trajectory, settled before the graph runs.

The step is what the caller says (`denoiser.at`), else what the sampler's own list of timesteps
says, else what the timesteps of the evaluations say. The branch is the caller's name for it, or the
one whose conditioning and layout the call continues. On doubt an evaluation is a miss.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxcache.errors import OptionError, PolicyError
from fxcache.pipelines.scheduler import Reading
from fxcache.policy.base import Policy, check_policy, pieces_of
from fxcache.policy.reasons import Reason
from fxcache.runtime.continuity import Continuity, Given, Seen
from fxcache.runtime.state import BranchState, Slot
from fxcache.runtime.timeline import Timeline

log = logging.getLogger("fxcache")

REPEATED = (
    "several evaluations at one timestep in one branch: if they are the branches of "
    "classifier-free guidance, name them with denoiser.branch(...)"
)


@dataclass(frozen=True)
class Where:
    """What the caller says of the calls inside: request, branch, step, and whose policy decides
    (None: nothing). Of a batch, the requests with their policies, and the rows of each.
    """

    slot: Hashable = None
    branch: Hashable = None
    step: int | None = None
    policy: Policy | None = None
    requests: Mapping[Hashable, Policy | None] | None = None
    rows_per_request: int = 1

    def of_requests(self) -> "list[Where]":
        """What is said of each request of a batch."""
        requests = self.requests or {}
        return [replace(self, slot=s, policy=p or self.policy) for s, p in requests.items()]


@dataclass(frozen=True)
class Call:
    """One evaluation's place. `step` is None until its timestep has been read from a GPU.

    `is_repeat`: the branch was evaluated at this timestep before, and nobody says what that means.
    """

    slot: Slot
    state: BranchState
    where: Where
    step: int | None
    timestep: float | None
    is_repeat: bool = False


class Steps:
    """Settles where evaluations belong.

    Args:
        begin: starts a new trajectory in a slot, with `num_steps` and `first_step` if known.
        say_once: logs a warning the first time that a key comes up.
    """

    def __init__(self, begin: Callable[..., None], say_once: Callable[[str, str], None]) -> None:
        self.begin, self.say_once = begin, say_once
        #: Asks a pipeline's scheduler where the sampler is; None is said where it does not know.
        self.clock: Callable[[], Reading | None] | None = None
        #: Whether timesteps rise along a trajectory. They fall in most samplers.
        self.rising = False
        self._single_steps = 0
        #: Names of the noisy inputs, which are others at each step; known after the capture.
        self.samples: frozenset[str] = frozenset()
        #: The path of the graph's time input, if it has one; known after the capture.
        self.time_name: str | None = None
        #: Whether it is known that a call without a time input has none.
        self.knows_time = False
        #: Whether changes of the conditioning are not the policy's own matter.
        self.looks = True

    def settle(self, slot: Slot, where: Where, inputs: Mapping[str, Any], timestep: Any) -> Call:
        """The place of a call of `inputs` (by path), of which `timestep` is the time input."""
        time = number_of(timestep)
        seen = Seen.of(timestep) if time is None and isinstance(timestep, torch.Tensor) else None
        index = where.step
        if index is not None and index < slot.place and not slot.is_announced:
            self.begin(slot)
        # Where a pipeline's scheduler is says nothing of a batch's requests.
        if index is None and self.clock and where.requests is None and not slot.is_announced:
            index = self._read(slot, self.clock(), time, timestep)

        def was_called(state: BranchState) -> bool:
            if index is not None:
                return state.place == index
            if time is not None:
                return state.timestep == time
            return seen is not None and state.time_seen == seen

        given = {name: value for name, value in inputs.items() if value is not timestep}
        is_exact = index is not None or (slot.is_listed and seen is not None)
        search = Continuity(
            slot, where.branch, Given(given, self.samples), was_called, is_exact, self.looks
        )
        state = search.find()
        step: int | None
        is_repeat = False
        if index is not None:
            state = state or search.begin()
            step = index if where.step is not None else slot.timeline.steps[index]
            slot.place = state.place = index
            state.step, state.timestep = step, time
        else:
            # A graph that has a time input tells it, whatever that is in.
            is_timeless = timestep is None and self.knows_time and self.time_name is None
            is_known = time is not None or is_timeless
            state = self._recognised(search, state, time) if is_known else state or search.begin()
            is_same = time is not None and time == state.timestep
            is_repeat = is_same and not slot.is_announced
            if is_same and state.is_running and where.requests is not None and where.branch is None:
                slot.is_mixed = True  # a batch shows too little of a call to tell branches apart
                self.say_once("repeat", REPEATED)
            step = self._counted(slot, state, time) if is_known else None
        if slot.is_mixed and where.requests is not None:
            state.lose(Reason.UNKNOWN_BRANCH)
        search.note(state)
        state.time_seen = seen
        slot.step = max(slot.step, state.step)
        return Call(slot, state, where, step, time, is_repeat)

    def goes_back(self, slot: Slot, timestep: Any) -> bool:
        """Whether a time input lies before the last one of `slot`, as far as that is known."""
        time, last = number_of(timestep), slot.timestep
        return None not in (time, last) and time != last and (time > last) != self.rising  # type: ignore[operator]

    def complete(self, call: Call, timestep: float | None) -> tuple[Call, bool]:
        """`call`, now that its timestep was read (None: it was not), and whether a new trajectory
        begins with it.
        """
        slot, state = call.slot, call.state
        if timestep is None and self.knows_time and not slot.is_announced:
            self._say_timeless()
        is_repeat = timestep is not None and timestep == state.timestep and not slot.is_announced
        # Two calls of one step, which is told too late to keep them apart.
        slot.is_mixed = slot.is_mixed or (is_repeat and slot.is_listed)
        if slot.is_mixed:
            state.lose(Reason.UNKNOWN_BRANCH)
        is_new = not slot.is_announced and self._turns_back(state, timestep)
        if is_new:
            self.begin(slot)
            state.is_running = True
        step = self._counted(slot, state, timestep)
        slot.step = max(slot.step, step)
        return replace(call, step=step, timestep=timestep, is_repeat=is_repeat), is_new

    # --- by timesteps alone ---

    def _recognised(
        self, search: Continuity, state: BranchState | None, time: float | None
    ) -> BranchState:
        """The branch of a call that nobody placed; a new trajectory begins where time goes back, or
        where it goes on with other layouts.
        """
        slot = search.slot
        if slot.is_announced:
            return state or search.begin()
        if time is None:
            self._say_timeless()
        is_relaid = (
            slot.is_running and not search.has_layout() and (time is None or time != slot.timestep)
        )
        # A branch that has a name may be called for many steps before another is.
        last = slot if state is None and search.name is None else state
        if is_relaid or (last is not None and self._turns_back(last, time)):
            self.begin(slot)
            return search.begin()
        return state or search.begin()

    def _say_timeless(self) -> None:
        self.say_once(
            "timestep",
            "this model shows no time input: new trajectories are recognised by their shapes only. "
            "Announce them: with denoiser.trajectory()",
        )

    def _turns_back(self, last: BranchState | Slot, time: float | None) -> bool:
        """Whether `time` lies in another trajectory than that of `last`.

        Some models count up (t from 0 to 1): two "trajectories" of one step in a row that both
        ended by a rise show it, and from then on a fall starts a new one.
        """
        if time is None or last.timestep is None or time == last.timestep:
            return False
        if (time > last.timestep) == self.rising:
            self._single_steps = 0
            return False
        self._single_steps = self._single_steps + 1 if last.step == 0 else 0
        if self._single_steps == 2:
            self.rising, self._single_steps = not self.rising, 0
            log.info("timesteps %s along a trajectory", "rise" if self.rising else "fall")
        return True

    def _counted(self, slot: Slot, state: BranchState, time: float | None) -> int:
        """Count a step of `state`. Two evaluations at one timestep (Heun) are one step; a branch
        that was not called at every step takes its step from the others.
        """
        if time is None:
            state.step += 1
        elif time != state.timestep:
            seen = slot.steps.get(time)
            if seen is None:
                before = (s for t, s in slot.steps.items() if (t < time) == self.rising)
                seen = max(before, default=slot.first_step - 1) + 1
            state.step = max(state.step + 1 + state.pairs.moves(), seen)
        elif slot.is_announced:
            state.step += state.pairs.repeats()
        if time is not None:
            slot.steps[time] = state.step
            slot.timestep = time
        state.timestep = time
        return state.step

    # --- by the sampler's list ---

    def _read(
        self, slot: Slot, reading: Reading | None, time: float | None, timestep: Any
    ) -> int | None:
        """Where in the sampler's list an evaluation at `time` is, None if that cannot be told."""
        if reading is None:
            return None
        timeline = slot.timeline
        if timeline is None or not timeline.is_of(reading):
            timeline = Timeline(reading)
        elif timeline.has_stopped:
            return None
        index = timeline.find(reading, time, timestep)
        if timeline is not slot.timeline or timeline.begins_anew(reading, index):
            timeline = Timeline(reading, timeline.unit)
            index = timeline.find(reading, time, timestep)
            first = 0 if index is None else timeline.steps[index]
            slot.timeline = timeline
            self.begin(slot, first_step=first)
        was_stopped = timeline.has_stopped
        timeline.note(reading, index, time)
        if timeline.has_stopped and not was_stopped:
            self.say_once(
                "clock",
                "the pipeline's scheduler does not move with the denoiser's calls: it is another "
                "sampler that calls it. Trajectories are recognised by their timesteps",
            )
            self.begin(slot)
        return None if timeline.has_stopped else index


def number_of(timestep: Any) -> float | None:
    """A time input as one number (the largest of a batch); None if there is none, or it lies on a
    GPU: that would cost a read-back.
    """
    if not isinstance(timestep, torch.Tensor):
        return float(timestep) if isinstance(timestep, int | float) else None
    if not timestep.numel() or timestep.device.type != "cpu":
        return None
    return float(timestep if timestep.numel() == 1 else timestep.max())


def check_announcement(num_steps: Any, first_step: Any) -> None:
    """Raise OptionError unless these announce a trajectory."""
    if num_steps is not None and (not isinstance(num_steps, int) or num_steps < 1):
        raise OptionError(f"num_steps must be a positive integer or None, got {num_steps!r}")
    if not isinstance(first_step, int) or not 0 <= first_step < (num_steps or math.inf):
        raise OptionError(
            f"first_step must be an integer in [0, num_steps), got {first_step!r} with "
            f"num_steps={num_steps!r}"
        )


def check_said(said: Mapping[str, Any], own: Policy) -> None:
    """Raise OptionError or PolicyError for what a caller cannot say; `own` is the session's."""
    step, requests = said.get("step"), said.get("requests", {})
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise OptionError(f"step must be an integer from 0 on, or None, got {step!r}")
    for policy in (said.get("policy"), *requests.values()):
        if policy is None:
            continue
        check_policy(policy)
        if pieces_of(policy) != pieces_of(own) or policy.forecast != own.forecast:
            raise PolicyError(
                f"a request's policy must have the span, probe, forecast and control_threshold of "
                f"the denoiser's own, {own!r}, got {policy!r}"
            )


def checked_requests(requests: Any, rows: Any) -> dict[Hashable, Policy | None]:
    """A batch's requests and the policy of each. Raises OptionError if they are none."""
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise OptionError(f"rows_per_request must be a positive integer, got {rows!r}")
    if isinstance(requests, str) or not isinstance(requests, Sequence | Mapping) or not requests:
        raise OptionError(
            f"requests must be names in a list, or policies by name, one at least, got {requests!r}"
        )
    twice = [name for name, times in Counter(list(requests)).items() if times > 1]
    if twice or None in requests:
        raise OptionError(f"each request needs a name of its own, got {list(requests)!r}")
    return dict(requests) if isinstance(requests, Mapping) else dict.fromkeys(requests)
