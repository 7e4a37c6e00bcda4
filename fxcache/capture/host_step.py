"""The decision between exported pieces, on the host: any policy."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxcache.policy import Policy
from fxcache.policy import tensor_rules as rules
from fxcache.policy.base import ForecastError, History
from fxcache.policy.forecast import Corrected, checked


@dataclass(frozen=True)
class HostStep:
    """Callable as a `Step` program is: ``(inputs, state) -> outputs, changed``. `head`, `hit` and
    `miss` are the programs (see `fxcache.capture.programs`).
    """

    policy: Policy
    head: Callable[..., Any]
    hit: Callable[..., Any]
    miss: Callable[..., Any]

    def __call__(
        self, inputs: Mapping[str, Any], state: Mapping[str, torch.Tensor]
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        measured, crossing = self.head(inputs, state)
        numbers, metric = state["numbers"], float(measured)
        limit, num_steps, led = state["settings"].tolist()
        policy = self._limited(limit)
        history = _history(policy, numbers.tolist(), int(num_steps) or None)
        probe = policy.probe
        if probe is not None and history.computed >= probe.needs and not math.isfinite(metric):
            numbers = rules.forgetting(numbers, torch.tensor(True, device=numbers.device))
            history = replace(history, past=(), error=None, computed=0)
        decision = policy.rule(metric, history)
        is_hit = decision.is_hit
        if led >= 0:
            can_follow = bool(history.past) and (probe is None or math.isfinite(metric))
            is_hit = led > 0 and can_follow
        vector = self._weights(policy, numbers.tolist(), history).to(measured.device)
        if is_hit:
            outputs, changed, _ = self.hit(inputs, state, crossing, vector)
            score = torch.tensor(decision.score, dtype=torch.float64, device=numbers.device)
            after, slot = rules.after_hit(numbers, score), torch.tensor(-1)
        else:
            outputs, changed, sums = self.miss(inputs, state, crossing, vector)
            after = rules.after_miss(policy, numbers, sums.to(numbers.device))
            slot = rules.entry_written(numbers)
        return outputs, {"slot": slot, "numbers": after, **changed}

    def _limited(self, limit: float) -> Policy:
        """The policy, with the threshold or tolerance that the state asks for."""
        for name in ("threshold", "tolerance"):
            if limit != getattr(self.policy, name, limit):
                changed: Any = replace(self.policy, **{name: limit})  # type: ignore[type-var]
                return changed  # type: ignore[no-any-return]
        return self.policy

    def _weights(self, policy: Policy, numbers: list[float], history: History) -> torch.Tensor:
        """float32 [ring]: the weight of each entry; 0 of one that holds nothing."""
        held = _held(numbers)
        forecast, past, weights = policy.forecast, history.past, []
        if isinstance(forecast, Corrected) and past:
            hits = [step for step in range(past[-1], history.step) if step not in past]
            weights = forecast.correct(history.step, past, hits)
        elif past:
            weights = forecast.weights(history.step, past)
        by_entry = dict(zip((at for _, at in held), weights, strict=False))
        ring = range(len(numbers) - rules.ENTRIES)
        return torch.tensor([by_entry.get(at, 0.0) for at in ring])


def _held(numbers: list[float]) -> list[tuple[int, int]]:
    """The steps and places of the entries that hold something, newest first."""
    entries = enumerate(numbers[rules.ENTRIES :])
    return sorted(((int(step), at) for at, step in entries if step >= 0), reverse=True)


def _history(policy: Policy, numbers: list[float], num_steps: int | None) -> History:
    past = tuple(step for step, _ in _held(numbers))
    forecast, value, error = checked(policy), numbers[rules.ERROR], None
    if forecast is not None and not math.isnan(value):
        error = ForecastError(past[: forecast.inner.ring + 1], value)
    return History(
        int(numbers[rules.STEP]),
        num_steps,
        numbers[rules.ACCUMULATED],
        int(numbers[rules.HITS_IN_A_ROW]),
        past,
        None,
        int(numbers[rules.COMPUTED]),
        error,
    )
