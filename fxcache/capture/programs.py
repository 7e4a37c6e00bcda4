"""The exported programs: one that decides by itself, or head, hit and miss for a host that does.

`Step` is one program: head, the policy's rule in tensor arithmetic, and ``torch.cond`` between hit
and miss::

    step(inputs, state) -> outputs, changed

State is a dict of tensors: the numbers of the trajectory, what the caller sets, the entries (past
residuals) of each stream, and what the next measurement is compared with. Branches return only what
they change: a miss one fresh entry a stream, and ``changed["slot"]`` says which one it replaces
(-1: it was a hit, and there is none). What else is in `changed` replaces what has its name.

`Head` and `Side` are the same in three programs::

    head(inputs, state) -> metric, crossing
    hit(inputs, state, crossing, weights) -> outputs, changed, sums            miss the same
"""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcache.capture.exporting import Captured
from fxcache.passes.graph import outputs_of
from fxcache.passes.piece_graph import Piece
from fxcache.passes.pieces import ERROR_WEIGHTS, WEIGHTS, other_key, ring_key, slot_key
from fxcache.policy import Policy
from fxcache.policy import tensor_rules as rules
from fxcache.policy.forecast import checked

#: What pieces take, by key.
Values = dict[Hashable, Any]


def entry_name(stream: int, index: int) -> str:
    """What an entry is called in the state."""
    return f"entry_{stream}_{index}"


class PieceProgram(nn.Module):
    """What the programs share: the model, the pieces, and how these are called."""

    def __init__(self, model: nn.Module, policy: Policy, captured: Captured) -> None:
        super().__init__()
        self.model, self.policy, self.captured = model, policy, captured
        self.ring, self.streams = policy.forecast.ring, range(len(captured.residuals))
        for index, constant in enumerate(captured.constants.values()):
            self.register_buffer(f"constant_{index}", constant)

    def given(self, inputs: dict[str, Any], state: dict[str, torch.Tensor]) -> Values:
        """What pieces may take of these, by key."""
        captured, leaves = self.captured, pytree.tree_leaves(inputs)
        values: Values = {n: leaves[at] for n, at in captured.leaves.items()}
        for node, name in captured.weights.items():
            owner, _, own = name.rpartition(".")
            values[node] = getattr(self.model.get_submodule(owner), own)
        for index, node in enumerate(captured.constants):
            values[node] = getattr(self, f"constant_{index}")
        for stream in self.streams:
            for j in range(self.ring):
                entry = state[entry_name(stream, j)]
                values[ring_key(stream, j)] = values[other_key(stream, j)] = entry
        return values | {key: state[key] for key in captured.kept}

    def head(self, values: Values) -> torch.Tensor:
        """Run the head: adds what crosses to `values`; the metric (NaN: nothing is measured)."""
        piece = self.captured.pieces.head
        if piece is None:
            return torch.full((), math.nan, device=self.captured.residuals[0].device)
        *crossing, measured = _run(piece, values)
        values.update(zip(piece.results, crossing, strict=True))
        return torch.as_tensor(measured[0])

    def hit(self, values: Values) -> tuple[Any, ...]:
        """The outputs, a place for each fresh entry, what is kept, and zeros for the sums."""
        piece, kept, probe = self.captured.pieces.hit, self._copies(values), self.policy.probe
        outputs = _run(piece, values | kept)
        fresh = [torch.empty_like(each) for each in self._entries(values)]
        if probe is None or probe.reference != "previous":
            kept = {key: torch.empty_like(value) for key, value in kept.items()}
        sums = torch.zeros(2, device=fresh[0].device)
        return (*_tensors(outputs), *fresh, *kept.values(), sums)

    def miss(self, values: Values) -> tuple[Any, ...]:
        """The outputs, a fresh entry a stream, what is kept, and the sums of the error."""
        piece, kept = self.captured.pieces.miss, self._copies(values)
        fresh: Values = {
            slot_key(s): torch.empty_like(e) for s, e in enumerate(self._entries(values))
        }
        outputs = list(_run(piece, values | kept | fresh))
        sums = torch.zeros(2, device=self.captured.residuals[0].device)
        if checked(self.policy) is not None:
            sums = outputs.pop()
        return (*_tensors(outputs), *fresh.values(), *kept.values(), sums)

    def named(self, results: Any) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
        """What hit and miss give: the model's own outputs, what changed by name, and the sums."""
        *results, sums = results
        names = [*(f"fresh_{stream}" for stream in self.streams), *self.captured.kept]
        changed = dict(zip(names, results[-len(names) :], strict=True))
        computed, spec = iter(results), self.captured.out_spec
        leaves = outputs_of(self.captured.pieces.miss.module.graph)[: spec.num_leaves]
        flat = [next(computed) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        return pytree.tree_unflatten(flat, spec), changed, sums

    def _entries(self, values: Values) -> list[torch.Tensor]:
        return [values[ring_key(stream, 0)] for stream in self.streams]

    def _copies(self, values: Values) -> Values:
        """What is kept, for a piece to write: a branch of ``torch.cond`` writes nothing else."""
        return {key: values[key].clone() for key in self.captured.kept if key in values}


class Step(PieceProgram):
    """One evaluation with its decision. See this module's docstring."""

    def forward(self, inputs: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
        policy, numbers, settings = self.policy, state["numbers"], state["settings"]
        values = self.given(inputs, state)
        metric = self.head(values).to(numbers.device)
        if policy.probe is not None:
            is_measured = numbers[rules.COMPUTED] >= policy.probe.needs
            numbers = rules.forgetting(numbers, is_measured & ~metric.isfinite())
        is_hit, score = rules.decide(policy, metric, numbers, settings)
        vector = rules.weights(policy, numbers).to(self.captured.residuals[0].device)
        values |= {WEIGHTS: vector, ERROR_WEIGHTS: vector}
        pieces = self.captured.pieces
        own = dict.fromkeys([*pieces.hit.arguments, *pieces.miss.arguments])
        own = {key: None for key in own if not _is_slot(key)}
        operands = list({id(values[key]): values[key] for key in own}.values())
        place = {key: next(i for i, o in enumerate(operands) if o is values[key]) for key in own}

        def in_branch(branch: Callable[[Values], Any]) -> Callable[..., Any]:
            return lambda *given: branch({key: given[at] for key, at in place.items()})

        results = torch.ops.higher_order.cond(
            is_hit, in_branch(self.hit), in_branch(self.miss), tuple(operands)
        )
        outputs, changed, sums = self.named(results)
        after = rules.after_miss(policy, numbers, sums.to(numbers.device))
        return outputs, {
            "slot": torch.where(is_hit, -1, rules.entry_written(numbers)),
            "numbers": torch.where(is_hit, rules.after_hit(numbers, score), after),
            **changed,
        }


class Head(PieceProgram):
    """What runs before the decision: the metric, and what crosses, by number."""

    def forward(self, inputs: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
        values, piece = self.given(inputs, state), self.captured.pieces.head
        metric = self.head(values)
        keys = () if piece is None else piece.results
        return metric, [values[key] for key in keys]


class Side(PieceProgram):
    """The hit or the miss, with the weights of the forecast given."""

    def __init__(self, of: PieceProgram, *, is_hit: bool) -> None:
        super().__init__(of.model, of.policy, of.captured)
        self.is_hit = is_hit

    def forward(
        self,
        inputs: dict[str, Any],
        state: dict[str, torch.Tensor],
        crossing: list[torch.Tensor],
        vector: torch.Tensor,
    ) -> Any:
        values, piece = self.given(inputs, state), self.captured.pieces.head
        if piece is not None:
            values.update(zip(piece.results, crossing, strict=True))
        values |= {WEIGHTS: vector, ERROR_WEIGHTS: vector}
        return self.named((self.hit if self.is_hit else self.miss)(values))


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [out.contiguous() for out in outputs if isinstance(out, torch.Tensor)]


def _is_slot(key: Hashable) -> bool:
    return isinstance(key, str) and key.startswith(slot_key(0)[:-1])


def _run(piece: Piece, values: Mapping[Hashable, Any]) -> Any:
    return piece.module(*[values[key] for key in piece.arguments])
